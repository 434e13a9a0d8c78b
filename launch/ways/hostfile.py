"""``geneloom launch hostfile``: ranks on the hosts of a hostfile, by ssh or pdsh."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.options import spread
from launch.attempts import supervise
from launch.environment import ENV_HELP, passed_on
from launch.hosts.ask_hosts import ask_all, ssh
from launch.hosts.checks import ask_facts, find_problems
from launch.hosts.host_choice import HostChoice
from launch.verbs import module_of
from launch.ways.local import RESTARTS_HELP, base_environment, require_device

_KILL_S = 20.0
_LOST_S = 20.0
# A connection is repeated after 1 and 3 s. The operating system answers it, however busy the host.
_LOST_CONNECT_S = 5


@spread
def launch_hostfile(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help="what to run: pretrain, finetune, perturb")],
    hostfile: Annotated[Path, typer.Option(help="lines like `node1 slots=8`")],
    launcher: Annotated[str, typer.Option(help="ssh or pdsh")] = "ssh",
    device: Annotated[str, typer.Option(help="auto, cpu or gpu")] = "auto",
    restarts: Annotated[int, typer.Option(min=0, help=RESTARTS_HELP)] = 3,
    min_hosts: Annotated[int, typer.Option(min=1, help="go on with no fewer hosts")] = 1,
    port: Annotated[int, typer.Option(min=0, max=65535, help="to meet at; 0: a free one")] = 0,
    choice: HostChoice = HostChoice(),
    env: Annotated[list[str] | None, typer.Option(help=ENV_HELP)] = None,
    show: Annotated[bool, typer.Option("--show", help="print the commands and stop")] = False,
) -> None:
    """Run a verb on several hosts: ``geneloom launch hostfile --hostfile H pretrain ...``.

    The hosts are checked first. When a rank dies or a host is gone, the rest is ended, the hosts
    are checked again, and the run goes on from its newest checkpoint on those that are left.
    """
    module_of(verb)
    require_device(device, here=False)
    if verb == "prepare":
        raise ValueError("prepare runs under MPI: `geneloom launch mpi --hostfile H prepare ...`")
    ways = {"ssh": Ssh, "pdsh": Pdsh}
    if launcher not in ways:
        raise ValueError(f"--launcher {launcher}: must be ssh or pdsh")
    if launcher == "pdsh" and shutil.which("pdsh") is None:
        raise ValueError("--launcher pdsh: there is no pdsh here; install it, or use ssh")
    slots = choice.read(hostfile)
    out = supervise.check_and_find_folder(verb, context.args)
    way = ways[launcher](slots, out, device, None, min_hosts, port)
    job = supervise.Job(
        verb, context.args, device, restarts, base_environment(device, here=False),
        passed_on(env or []),
    )  # fmt: skip
    raise SystemExit(supervise.run(way, job, show))


class Cluster:
    """Hosts that are asked over ssh.

    Parameters
    ----------
    slots
        Host -> ranks.
    out
        The folder of the run; it, or the nearest folder above it that exists, must be shared.
    ranks
        So many in all, filled host by host; None: all slots.
    port
        To meet at, on the first host; 0: one that is free there.
    """

    def __init__(
        self,
        slots: dict[str, int],
        out: Path,
        device: str,
        ranks: int | None = None,
        min_hosts: int = 1,
        port: int = 0,
    ) -> None:
        if ranks is not None and ranks > sum(slots.values()):
            raise ValueError(
                f"--ranks {ranks}: the hostfile has {sum(slots.values())} slots; one rank needs one"
            )
        self._slots, self._out, self._device = slots, out, device
        self._ranks, self._min_hosts, self._port = ranks, min_hosts, port
        self._facts: dict[str, dict[str, Any]] = {}
        self._is_first = True

    def usable_hosts(self) -> dict[str, int]:
        """Return the hosts that can be used; at the first time any problem is an error."""
        answers = ask_facts(list(self._slots), self._out)
        problems = find_problems(answers, self._slots, self._device)
        bad = [f"{host}: {text}" for host, texts in problems.items() for text in texts]
        left = {h: n for h, n in self._slots.items() if not problems.get(h)}
        if bad and (self._is_first or len(left) < self._min_hosts):
            raise ValueError(
                f"{len(problems)} of {len(self._slots)} hosts cannot be used:\n  "
                + "\n  ".join(bad)
                + "\n`geneloom doctor --hostfile ...` shows all of them"
            )
        for text in bad:
            print(f"launch: left out: {text}", file=sys.stderr, flush=True)
        self._is_first = False
        self._facts = {h: answers[h].content for h in left}
        return self._first_ranks(left)

    def know(self, facts: dict[str, dict[str, Any]]) -> None:
        """Take what hosts have just said of themselves (`usable_hosts` asks them itself)."""
        self._facts = facts

    def _first_ranks(self, hosts: dict[str, int]) -> dict[str, int]:
        left = self._ranks if self._ranks is not None else sum(hosts.values())
        chosen = {}
        for host, slots in hosts.items():
            if left > 0:
                chosen[host] = min(slots, left)
                left -= chosen[host]
        return chosen

    def meeting_point(self, hosts: dict[str, int]) -> tuple[str, int]:
        """Return an address of the first host, as the others know it, and a port free there.

        Raises
        ------
        ValueError
            The port asked for is in use.
        """
        names = list(hosts)
        # A host often knows its own name as a loopback address.
        asked = names[1] if len(names) > 1 else names[0]
        address = self._facts[asked]["addresses"][names[0]]
        answer = ask_all(names[:1], "port", str(self._port))[names[0]]
        problem = answer.problem or answer.content["problem"]
        if problem:
            raise ValueError(
                f"--port {self._port} on {names[0]}: {problem}; leave --port out to take a free one"
            )
        return address, answer.content["port"]

    def network(self, hosts: dict[str, int]) -> str | None:
        """Return the name of the network interface, where all hosts have the same."""
        names = {self._facts[h]["interface"] for h in hosts}
        return names.pop() if len(names) == 1 else None

    def lost(self, hosts: dict[str, int]) -> list[str]:
        """Return those of the hosts that do not answer any more."""
        answers = ask_all(list(hosts), "port", "0", limit_s=_LOST_S, connect_s=_LOST_CONNECT_S)
        return [host for host, answer in answers.items() if answer.problem]

    def signal(self, hosts: dict[str, int], launch: str, number: int, ranks_only: bool) -> None:
        """Signal a launch's processes on all hosts; only SIGKILL is waited for."""
        which = "ranks" if ranks_only else "all"
        words = [sys.executable, "-m", "launch.hosts.node", "signal", launch, str(number), which]
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        asking = [
            subprocess.Popen(ssh(h, words, connect_s=_LOST_CONNECT_S), **silent) for h in hosts
        ]
        if number == signal.SIGKILL:
            until = time.monotonic() + _KILL_S
            for process in asking:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, until - time.monotonic()))
                process.kill()


class Ssh(Cluster):
    """The ranks of a node, started on each host by a plain ssh (`launch.attempts.node_ranks`)."""

    def commands(
        self, hosts: dict[str, int], attempt: Path, words: list[str], environment: dict[str, str]
    ) -> dict[str, list[str]]:
        address, port = self.meeting_point(hosts)
        ranks = ",".join(map(str, hosts.values()))
        return {
            host: ssh(
                host,
                [
                    sys.executable, "-u", "-m", "launch.attempts.node_ranks", str(number), ranks,
                    address, str(port), *words,
                ],
                environment,
            )
            for number, host in enumerate(hosts)
        }  # fmt: skip


class Pdsh(Cluster):
    """DeepSpeed's own launcher, with pdsh."""

    def commands(
        self, hosts: dict[str, int], attempt: Path, words: list[str], environment: dict[str, str]
    ) -> dict[str, list[str]]:
        address, port = self.meeting_point(hosts)
        # pdsh passes few variables on; DeepSpeed exports those of this file.
        listed = f"DS_ENV_FILE={attempt / supervise.ENVIRONMENT}"
        return {
            "": [
                sys.executable, "-m", "launch.attempts.keep",
                "env", listed, sys.executable, "-m", "deepspeed.launcher.runner",
                "--hostfile", str(attempt / supervise.HOSTFILE), "--launcher", "pdsh",
                "--force_multi", "--no_ssh_check", "--no_local_rank", "--log_level", "error",
                "--master_addr", address, "--master_port", str(port), "--module", *words,
            ]
        }  # fmt: skip
