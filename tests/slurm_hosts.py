"""A real SLURM on hosts of `tests.hosts`: a controller on the first, a node daemon on each."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import Host, hosts, why_no_hosts

_DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "scancel")
_UP_S = 30
# Cgroups are the machine's, not a namespace's: processes are found by their parents instead.
# A requeued job waits until the credentials of its last start have expired (120 s by default).
_SETTINGS = """
ClusterName=bare
SlurmctldHost={first}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
SchedulerParameters=sched_interval=1,batch_sched_delay=0
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str | None:
    """Return why SLURM cannot be raised here; None if it can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [d for d in _DAEMONS if shutil.which(d, path=path) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)"
    return why_no_hosts()


@dataclass
class Slurm:
    """A cluster; `login` is the host to submit from."""

    login: Host
    nodes: list[Host]
    environment: dict[str, str]

    def run(self, *words: str, timeout: float = 60) -> str:
        """Run a command on the login host and return what it printed; fail if it fails."""
        done = self.login.run(words, timeout=timeout, env=self.environment)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """Return a job's state: PENDING, RUNNING, COMPLETED, FAILED, ..."""
        fields = self.run("scontrol", "show", "job", job).split()
        return next(f.partition("=")[2] for f in fields if f.startswith("JobState="))

    def wait_for(self, job: str, states: set[str], limit_s: float) -> str:
        """Return a job's state as soon as it is one of `states`."""
        until = time.monotonic() + limit_s
        while (state := self.state(job)) not in states:
            assert time.monotonic() < until, f"job {job} is {state}, not {states}"
            time.sleep(0.3)
        return state


@contextlib.contextmanager
def slurm(number: int, folder: Path) -> Iterator[Slurm]:
    """Raise a cluster of `number` nodes; end it and all its jobs afterwards."""
    with hosts(number, folder / "hosts") as nodes:
        settings = _write_settings(nodes, folder)
        munged = _start_munged(folder)
        environment = os.environ | {"SLURM_CONF": str(settings)}
        environment["PATH"] += os.pathsep + "/usr/sbin"
        cluster = Slurm(nodes[0], nodes, environment)
        try:
            for node in nodes:
                (folder / node.name).mkdir()
            cluster.run("slurmctld", "-c")
            for node in nodes:
                started = node.run(["slurmd", "-N", node.name], env=environment)
                assert started.returncode == 0, started.stderr
            _wait_until_idle(cluster, number)
            yield cluster
        finally:
            munged.terminate()
            munged.wait(10)


def _write_settings(nodes: list[Host], folder: Path) -> Path:
    (folder / "state").mkdir(parents=True)
    lines = [f"NodeName={n.name} NodeAddr={n.address} CPUs=2 State=UNKNOWN" for n in nodes]
    path = folder / "slurm.conf"
    path.write_text(
        _SETTINGS.format(
            first=nodes[0].name, address=nodes[0].address, folder=folder, nodes="\n".join(lines)
        )
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    return path


def _start_munged(folder: Path) -> subprocess.Popen:
    """Start the daemon that signs messages; all hosts reach it through one socket."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = [f"--{n}-file={folder / f'munge.{n}'}" for n in ("pid", "log", "seed")]
    with (folder / "munged.out").open("wb") as log:
        return subprocess.Popen(
            ["/usr/sbin/munged", "--foreground", "--force", f"--key-file={key}",
             f"--socket={folder / 'munge.socket'}", *files],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _wait_until_idle(cluster: Slurm, number: int) -> None:
    until = time.monotonic() + _UP_S
    while True:
        done = cluster.login.run(["sinfo", "-h", "-N", "-o", "%T"], env=cluster.environment)
        if done.stdout.split() == ["idle"] * number:
            return
        assert time.monotonic() < until, f"SLURM does not come up: {done.stdout}{done.stderr}"
        time.sleep(0.2)
