"""Start the ranks and let them communicate; the only module that calls torch.distributed.

`start` joins the process group, then the functions below count, sum, send and gather over ranks,
and `leave` ends it.
"""

from __future__ import annotations

import errno
import importlib
import os
import secrets
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from data_prep.running.network import (
    INTERFACE,
    TOKEN,
    address_to_listen_at,
    describe_network,
    family_of,
    interface_of_job,
)
from data_prep.running.queue_variables import OWN_NAMES, started_by_another
from pretrain.ds_config import DEEPSPEED_VERSION
from pretrain.ranks.signed_messages import Signer

T = TypeVar("T")
_LINEAR = torch.nn.functional.linear
# The place where this process has met the other ranks, the store there, and how often it was used.
_met: dict[str, Any] = {}
_hosts: torch.distributed.ProcessGroup | None = None
_RANK_VARIABLES = (*OWN_NAMES, "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the world size, and the device that the rank computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(timeout_s: int, threads: int | None) -> Ranks:
    """Join the process group and return this rank; without a launcher the group has one rank.

    Raises
    ------
    ValueError
        Only some of the launcher's variables are set, or DeepSpeed has another version.
    """
    os.environ |= _of_other_launchers(os.environ)
    given = [v for v in _RANK_VARIABLES if v in os.environ]
    if "RANK" in given and len(given) < len(_RANK_VARIABLES):
        missing = sorted(set(_RANK_VARIABLES) - set(given))
        raise ValueError(
            f"environment: RANK is set but {missing} are not; start with the deepspeed launcher, "
            "torchrun, or without any of them"
        )
    if "RANK" not in given:
        os.environ |= dict(
            zip(_RANK_VARIABLES, ("0", "1", "0", "127.0.0.1", _free_port()), strict=True)
        )
    on_gpu = finds_gpu()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    deepspeed = _import_deepspeed()
    if not on_gpu and (interface := interface_of_job(os.environ)):
        os.environ[INTERFACE] = interface
    local_rank = int(os.environ["LOCAL_RANK"])
    gpu = 0
    if on_gpu:
        gpu = gpu_of(local_rank, torch.cuda.device_count())
        torch.cuda.set_device(gpu)
    try:
        _join("nccl" if on_gpu else "gloo", gpu, timedelta(seconds=timeout_s))
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout_s),
            verbose=False,
        )
    except RuntimeError as error:
        raise _no_connection(error) from error
    global _hosts
    # A group of all ranks for tensors in host memory; with gloo the default group is one already.
    _hosts = None
    if on_gpu:
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        assert isinstance(group, torch.distributed.ProcessGroup)
        _hosts = group
    device = torch.device("cuda", gpu) if on_gpu else torch.device("cpu")
    try:
        # This runs before anything is read, because a wrong network interface shows here.
        torch.distributed.all_reduce(torch.zeros(1, device=device))
    except RuntimeError as error:
        raise _no_connection(error) from error
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


def _join(backend: str, gpu: int, timeout: timedelta) -> None:
    """Join the process group through a store that listens at one address only.

    Names in the store begin with a name derived from the launch's token, if there is one. If
    torchrun's agent holds the store, torch joins the group itself.
    """
    if store_is_the_launchers() or torch.distributed.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, uses = _meeting_store(rank == 0, timeout)
    name = Signer(os.environ.get(TOKEN, "")).name
    more: dict[str, Any] = {}
    if backend == "nccl" and world_size > 1:  # DeepSpeed does the same
        more = {"device_id": torch.device("cuda", gpu)}
    torch.distributed.init_process_group(
        backend, store=PrefixStore(f"{name}/{uses}", store), rank=rank, world_size=world_size,
        timeout=timeout, **more,
    )  # fmt: skip


def _meeting_store(is_first: bool, timeout: timedelta) -> tuple[Any, int]:
    """Return the store at ``MASTER_ADDR:MASTER_PORT``, and how often it was used before.

    Rank 0 keeps the store open until it meets the ranks at another place: DeepSpeed's groups
    outlive a run, and a port that is still open cannot be opened again.
    """
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if _met.get("place") == place:
        _met["uses"] += 1
        return _met["store"], _met["uses"]
    _met.clear()
    store = torch.distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        *place, is_master=is_first, timeout=timeout, wait_for_workers=False,
        master_listen_fd=_listener(place[1]) if is_first else None,
    )  # fmt: skip
    _met.update(place=place, store=store, uses=0)
    return store, 0


def _listener(port: int) -> int:
    """Return the descriptor of a socket that listens at the job's address of this machine.

    Raises
    ------
    ValueError
        The port is in use.
    """
    address = address_to_listen_at(os.environ)
    listener = socket.socket(family_of(address))
    # As in torch's own store, a port that was closed a minute ago can be opened again.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        in_use = error.errno == errno.EADDRINUSE
        why = "is in use" if in_use else f"cannot be had ({error.strerror})"
        raise ValueError(
            f"port {port}, at which the ranks are to meet, {why} on this machine; give the "
            "launcher another one (deepspeed: --master_port N, torchrun: --master-port N)"
        ) from error
    listener.listen(2048)
    return listener.detach()


def run_secret() -> str:
    """Return a text that only the ranks of this run know; called by all ranks.

    It is sent through the ranks' own connections, not through the store.
    """
    return os.environ.get(TOKEN, "") + first_rank_says(secrets.token_hex(32))


def _no_connection(error: RuntimeError) -> ConnectionError:
    """Return the error for ranks that found each other but cannot communicate."""
    reason = str(error).partition("\n")[0]
    return ConnectionError(
        f"rank {os.environ['RANK']}: no connection to the other ranks ({reason}). "
        f"{describe_network()}; set GLOO_SOCKET_IFNAME (GPUs: NCCL_SOCKET_IFNAME) to the one that "
        "leads to the other hosts, or give this host's name in /etc/hosts the address that they "
        "reach it at (not 127.0.1.1), and open the firewall between them"
    )


def start_without_others(store: Any, rank: int, world_size: int) -> None:
    """Join a process group whose collective operations do nothing; `leave` ends it.

    It serves to compute which data the files of a rank contain, which does not depend on the
    messages of other ranks.
    """
    deepspeed = _import_deepspeed()
    # "fake" is torch's own backend, which the caller registered with the store.
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=world_size)
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)


def finds_gpu() -> bool:
    """Return whether ranks of this machine will compute on GPUs."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def gpu_of(local_rank: int, visible: int) -> int:
    """Return the index of a rank's GPU among the visible ones.

    If exactly one GPU is visible, it is the rank's own: SLURM's ``--gpus-per-task=1`` and
    Kubernetes show each rank another one. If two ranks see the same GPU, NCCL reports "Duplicate
    GPU detected".

    Raises
    ------
    ValueError
        Several GPUs are visible, but fewer than there are ranks.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ValueError(
            f"local rank {local_rank}: this machine has {visible} GPUs; start one rank per GPU, or "
            "give --device cpu"
        )
    return local_rank


def _of_other_launchers(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE and LOCAL_RANK if mpirun or srun started several processes."""
    found = started_by_another(environment)
    if found is None:
        return {}
    missing = [v for v in ("MASTER_ADDR", "MASTER_PORT") if v not in environment]
    if missing:
        rank, world_size, _ = found.values
        raise ValueError(
            f"environment: {found.launcher} started rank {rank} of {world_size}, but "
            f"{' and '.join(missing)} are not set; start with `geneloom launch`, or export the "
            "first host's name and a free port of it to all ranks"
        )
    return dict(zip(OWN_NAMES, found.values, strict=True))


def _import_deepspeed():
    import deepspeed
    import deepspeed.ops

    if deepspeed.__version__ != DEEPSPEED_VERSION:
        raise ValueError(
            f"deepspeed {deepspeed.__version__} is installed, {DEEPSPEED_VERSION} is needed: the "
            "checkpoints and the gradient scaling were verified with that version"
        )
    # On CPU the first init_distributed would compile this op with g++ (about a minute) and leave 69
    # MB per rank in /dev/shm after every run. Training does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_without_a_compiler()
    return deepspeed


def _import_muon_without_a_compiler() -> None:
    """Import DeepSpeed's own Muon without compiling its functions.

    DeepSpeed looks for it when it receives an optimizer. Its module asks for compiled functions,
    for which torch loads its compiler: this takes 4.3 of the 16 seconds of processor time that a
    rank needs to start and train ten steps of a tiny model. No run uses these functions.
    """
    from deepspeed.runtime import compiler

    own = compiler.compile
    compiler.compile = lambda **_: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = own


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def limit_waiting(timeout_s: int) -> None:
    """Set the timeout of every process group that exists now.

    ZeRO makes its own groups without the timeout given to `start`; a rank that lost its peer would
    wait there for 30 minutes.
    """
    for group in list(distributed_c10d._world.pg_names):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


# A connection to the store raises these errors when its other end is gone.
STORE_ERRORS = (RuntimeError, OSError)
_STORE_TIMEOUT = timedelta(seconds=60)


def open_store(prefix: str) -> PrefixStore:
    """Return a new connection to the key-value store in which the ranks met."""
    # The connection of the training thread is not used, because it may be waiting for a reply.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        address, port, is_master=False, timeout=_STORE_TIMEOUT
    )
    return PrefixStore(prefix, store)


def store_is_the_launchers() -> bool:
    """Return whether the store is held by torchrun's agent and not by rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_from_a_collective(error: BaseException) -> bool:
    """Return whether an error is one that a collective operation raises when another rank is gone.

    gloo raises a plain RuntimeError, and so do many errors that no other rank has caused.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    frames = traceback.walk_tb(error.__traceback__)
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return type(error) is RuntimeError and any(m.startswith("torch.distributed") for m in modules)


def count_over_ranks(values: dict[str, int]) -> dict[str, int]:
    """Return the sums over all ranks in int64, which are exact modulo 2**64.

    The sums are computed between hosts, so no rank waits for its device, which may be a step
    behind.
    """
    tensor = torch.tensor(list(values.values()), dtype=torch.int64)
    torch.distributed.all_reduce(tensor, group=_hosts)
    return dict(zip(values, tensor.tolist(), strict=True))


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return the sums over all ranks in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def sum_in_place(values: torch.Tensor) -> None:
    """Replace a tensor by the sum of the tensors of all ranks."""
    torch.distributed.all_reduce(values)


def send(values: torch.Tensor, to: int) -> None:
    """Send a tensor to a rank, which must call `receive`."""
    torch.distributed.send(values, to)


def receive(values: torch.Tensor, source: int) -> None:
    """Fill a tensor with the one that a rank sends."""
    torch.distributed.recv(values, source)


def exchange(
    values: torch.Tensor, sent_sizes: list[int], received_sizes: list[int]
) -> torch.Tensor:
    """Send a part of `values` to each rank, and return the parts that all ranks send to this one.

    Both are in the order of ranks.

    Parameters
    ----------
    values
        One-dimensional, of sum(sent_sizes) elements.
    sent_sizes, received_sizes
        Number of elements for and from each rank, including this rank itself.
    """
    received = values.new_empty(sum(received_sizes))
    torch.distributed.all_to_all_single(received, values, received_sizes, sent_sizes)
    return received


def gather_text(text: str, ranks: Ranks) -> list[str]:
    """Return the texts of all ranks, in the order of ranks, on every rank."""
    texts: list[str] = [""] * ranks.world_size
    torch.distributed.all_gather_object(texts, text)
    return texts


def first_rank_says(text: str) -> str:
    """Return the text of rank 0 on every rank."""
    holder = [text]
    torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def first_rank_first(ranks: Ranks, function: Callable[[], T]) -> T:
    """Return the result of a function; the other ranks call it after rank 0 has called it.

    It serves for results that are kept in a file: rank 0 computes them, and the others find the
    file. An error of rank 0 is raised on rank 0 alone; the others still call the function.
    """
    if not ranks.is_first:
        wait_for_all()
        return function()
    try:
        return function()
    finally:
        wait_for_all()


def wait_for_all() -> None:
    """Return when every rank has called this function."""
    torch.distributed.barrier()


def leave() -> None:
    """Leave the process group, so that this process can join another one."""
    if torch.distributed.is_initialized():
        # DeepSpeed has groups of its own; torch's call alone would leave DeepSpeed with dead
        # groups.
        _import_deepspeed().comm.destroy_process_group()
    forget_earlier_runs()


def forget_earlier_runs() -> None:
    """Undo the settings that DeepSpeed makes for a whole process.

    After this a run does not depend on earlier runs in the process. ZeRO 3 replaces torch's linear
    layer. The replacement returns gradients in another order (weight, bias), and ZeRO 2 adds up the
    gradients of all ranks in the order in which they come. If only some ranks had used ZeRO 3
    before, biases would be added to weights.

    A run in autocast (bf16 at stage 0) makes every later run communicate gradients in the type of
    the weights, whatever `communication_data_type` says.
    """
    torch.nn.functional.linear = _LINEAR
    # If the module is not imported, it was not used yet.
    if autocast := sys.modules.get("deepspeed.runtime.torch_autocast"):
        vars(autocast).update(TORCH_AUTOCAST_INITIALIZED=False, TORCH_AUTOCAST_DTYPE=None)
