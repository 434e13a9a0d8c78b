"""Real hosts on one machine: network, process and mount namespaces, each with an sshd of its own.

What tests of several nodes need: addresses that are not loopback, a login by key, a host that can
lose its cable or its power. The file system is the machine's, so folders are shared by default.
Needs root, ip, unshare, nsenter and sshd.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

_TOOLS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen")
_SSHD = "/usr/sbin/sshd"
_UP_S = 20
_PR_SET_PDEATHSIG = 1
_CLUSTERS = itertools.count()
# Process 1 of a host: starts sshd, and buries the dead.
_INIT = """
import os, subprocess, sys
subprocess.run(["mount", "--bind", sys.argv[1], "/root/.ssh"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
subprocess.run(["hostname", sys.argv[2]], check=True)
os.makedirs("/run/sshd", exist_ok=True)
subprocess.Popen([sys.argv[3], "-D", "-f", sys.argv[4], "-E", sys.argv[5]])
while True:
    os.wait()
"""


def why_no_hosts() -> str | None:
    """Return why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if not Path(_SSHD).exists():
        missing.append("sshd")
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2 util-linux openssh-server)"
    probe = f"gp{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    bridge = subprocess.run(
        ["ip", "-n", probe, "link", "add", "b0", "type", "bridge"], capture_output=True, text=True
    )
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return f"no bridges here: {bridge.stderr.strip()}" if bridge.returncode else None


def skip_without_hosts() -> None:
    """Skip the test, and say why, where hosts cannot be made."""
    if reason := why_no_hosts():
        pytest.skip(f"several hosts: {reason}")


@dataclass
class Host:
    """One host; `name` is what the others know it by."""

    name: str
    address: str
    namespace: str
    process: subprocess.Popen
    pid: int
    # Of this host alone: Open MPI's folders there are named by process ids, which hosts share.
    tmp: Path

    def command(self, words: Sequence[str]) -> list[str]:
        """Return a command line that runs `words` on this host, in the current folder."""
        return [
            "nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--uts", "--ipc",
            f"--wd={Path.cwd()}", "env", f"TMPDIR={self.tmp}", *words,
        ]  # fmt: skip

    def run(self, words: Sequence[str], timeout: float = 60, **more) -> subprocess.CompletedProcess:
        """Run a command on this host and return what it said."""
        return subprocess.run(
            self.command(words), capture_output=True, text=True, timeout=timeout, **more
        )

    def start(self, words: Sequence[str], log: Path, **more) -> subprocess.Popen:
        """Start a command on this host; what it says is added to `log`."""
        with log.open("a") as file:
            return subprocess.Popen(
                self.command(words), stdout=file, stderr=subprocess.STDOUT, **more
            )

    def unplug(self) -> None:
        """Take the link down: packets vanish, connections stay open."""
        self._link("down")

    def plug_in(self, seen_from: Host) -> None:
        """Take the link up again, and return when another host can log in."""
        self._link("up")
        wait_for_login(seen_from, self)

    def _link(self, state: str) -> None:
        subprocess.run(["ip", "-n", self.namespace, "link", "set", "eth0", state], check=True)

    def power_off(self) -> None:
        """Cut the cable and end process 1, and with it everything on this host."""
        self.unplug()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait(10)

    def processes(self, words: str) -> list[int]:
        """Return the ids, as this host counts them, of processes whose command holds `words`."""
        found = self.run(["ps", "-eo", "pid=,args="]).stdout.splitlines()
        rows = [line.strip().partition(" ") for line in found if words in line]
        return [int(pid) for pid, _, arguments in rows if "ps -eo" not in arguments]


@contextlib.contextmanager
def hosts(number: int, folder: Path) -> Iterator[list[Host]]:
    """Raise hosts ds1, ds2, ... on one bridge; end them and all that runs on them afterwards."""
    _sweep()
    # Interfaces have names of 15 characters at most.
    number_here = next(_CLUSTERS)
    tag = f"g{os.getpid()}-{number_here}"
    network = f"10.{77 + os.getpid() % 100}.{(os.getpid() // 100 + number_here) % 250}"
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Host] = []
    namespaces: list[str] = []
    Path("/root/.ssh").mkdir(mode=0o700, exist_ok=True)
    key = folder / "id_ed25519"
    _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    names = [f"ds{n}" for n in range(1, number + 1)]
    table = "".join(f"{network}.{n} {name}\n" for n, name in enumerate(names, 1))
    try:
        _do("ip", "link", "add", f"{tag}b", "type", "bridge")
        _do("ip", "link", "set", f"{tag}b", "up")
        for n, name in enumerate(names, 1):
            namespace = f"{tag}-{name}"
            namespaces.append(namespace)
            _plug(namespace, f"{tag}b", f"{tag}v{n}", f"{network}.{n}", table)
            home = _ssh_folder(folder / name, key)
            made.append(_start(name, f"{network}.{n}", namespace, folder / name, home))
        for host in made:
            wait_for_login(made[0], host)
        yield made
    finally:
        for n, host in enumerate(made, 1):
            host.power_off()
            subprocess.run(["ip", "link", "del", f"{tag}v{n}"], capture_output=True)
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
            shutil.rmtree(f"/etc/netns/{namespace}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", f"{tag}b"], capture_output=True)


def _sweep() -> None:
    """Remove the names that tests left which were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines()):
        made_by = re.fullmatch(r"(g(\d+)-\d+)-ds\d+", name)
        if made_by and not Path(f"/proc/{made_by[2]}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            subprocess.run(["ip", "link", "del", f"{made_by[1]}b"], capture_output=True)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def _plug(namespace: str, bridge: str, link: str, address: str, table: str) -> None:
    files = Path("/etc/netns") / namespace
    files.mkdir(parents=True)
    (files / "hosts").write_text(f"127.0.0.1 localhost\n{table}")
    # No name server: asking one that does not answer costs half a minute at every start.
    (files / "resolv.conf").write_text("options timeout:1 attempts:1\n")
    _do("ip", "netns", "add", namespace)
    _do("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _do("ip", "link", "set", link, "master", bridge, "up")
    _do("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    _do("ip", "-n", namespace, "link", "set", "eth0", "up")
    _do("ip", "-n", namespace, "link", "set", "lo", "up")


def _ssh_folder(folder: Path, key: Path) -> Path:
    """Make the folder that is root's .ssh on a host, and the settings of its sshd."""
    home = folder / "ssh"
    home.mkdir(parents=True, mode=0o700)
    (folder / "tmp").mkdir()
    shutil.copy(key, home / "id_ed25519")
    shutil.copy(key.with_suffix(".pub"), home / "authorized_keys")
    (home / "config").write_text("Host *\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n")
    _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    (folder / "sshd_config").write_text(
        textwrap.dedent(f"""\
        HostKey {folder / "host_key"}
        PidFile none
        UsePAM no
        StrictModes no
        PermitRootLogin yes
        PasswordAuthentication no
        MaxStartups 100
        SetEnv TMPDIR={folder / "tmp"}
        """)
    )
    return home


def _start(name: str, address: str, namespace: str, folder: Path, home: Path) -> Host:
    process = subprocess.Popen(
        [
            "ip", "netns", "exec", namespace, "unshare", "--pid", "--mount", "--uts", "--ipc",
            "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", _INIT, str(home), name,
            _SSHD, str(folder / "sshd_config"), str(folder / "sshd.log"),
        ],
        stderr=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + _UP_S
    while not children.read_text().split():
        assert process.poll() is None, f"host {name} did not start"
        assert time.monotonic() < deadline, f"host {name} did not start"
        time.sleep(0.02)
    pid = int(children.read_text().split()[0])
    return Host(name, address, namespace, process, pid, folder / "tmp")


def _die_with_parent() -> None:
    # A test that is killed must not leave hosts behind.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_for_login(source: Host, host: Host) -> None:
    """Return when one host can log in to another."""
    deadline = time.monotonic() + _UP_S
    while source.run(["ssh", "-o", "ConnectTimeout=2", host.name, "true"]).returncode:
        assert time.monotonic() < deadline, f"no login to {host.name}"
        time.sleep(0.2)


def _do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
