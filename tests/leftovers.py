"""What a use of a process has left behind in it, beside the result."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import pickle
import random
import signal
import sys
import threading
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_RANK_VARIABLES = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR",
    "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE",
    # Torch, DeepSpeed and scikit-learn set these when they are first imported.
    "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK", "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
}  # fmt: skip
# fsspec keeps its event loop, tqdm its monitor, once started.
_LASTING_THREADS = ("fsspecIO", "asyncio_", "tqdm_monitor")
_OURS = ("data_prep", "pretrain", "eval", "launch")


class Baseline:
    """The state of a process before its first use.

    `reset` sets what every use may change: random numbers and signal handlers. `leftovers` names
    what no use may change: environment, working folder, process groups, threads, CUDA, hooks,
    settings of torch, global random states that are not torch's, handlers of loggers, functions
    and classes of this project that were replaced.
    """

    def __init__(self) -> None:
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._state = _state()
        self._code = _code()
        self._settings = _deepspeed_settings()

    def reset(self) -> None:
        """Seed torch's random numbers, and give signals back to their first handlers.

        DeepSpeed counts modules and parameters under ZeRO 3 over the life of a process and compares
        the numbers over ranks, whose processes may have had other uses before: they start again.
        """
        import torch
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init

        torch.manual_seed(0)
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0  # type: ignore
        Init.param_id = 0
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def leftovers(self) -> list[str]:
        """Return a sentence about each thing that is not as it was."""
        now = _state()
        names = dict.fromkeys([*self._state, *now])
        found = [
            f"{name}: {self._state.get(name)} -> {now.get(name)}"
            for name in names
            if now.get(name) != self._state.get(name)
        ]
        code = _code()
        # What was imported since is new, and becomes part of what must not change.
        found += [
            f"{name} was replaced" for name in self._code if code.get(name) != self._code[name]
        ]
        self._code = code | self._code
        settings = _deepspeed_settings()
        found += [
            f"{name}: {value} -> {settings[name]}"
            for name, value in self._settings.items()
            if settings.get(name) != value
        ]
        self._settings = settings | self._settings
        return found


def _state() -> dict[str, Any]:
    import numpy as np
    import torch
    from torch.nn.modules import module as modules
    from torch.optim import optimizer as optimizers

    # Not the values: a test's message is no place for them.
    environment = {
        f"environment variable {name}": hashlib.sha256(value.encode()).hexdigest()[:8]
        for name, value in os.environ.items()
        if name not in _RANK_VARIABLES
    }
    hooks = [
        len(value)
        for owner in (modules, optimizers)
        for name, value in sorted(vars(owner).items())
        if name.startswith("_global_") and hasattr(value, "__len__")
    ]
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in _OURS)]
    return environment | {
        "working folder": os.getcwd(),  # noqa: PTH109
        "process group": torch.distributed.is_initialized(),
        "threads": sorted(
            t.name for t in threading.enumerate() if not t.name.startswith(_LASTING_THREADS)
        ),
        "CUDA": torch.cuda.is_initialized(),
        "hooks": hooks,
        "torch": (
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"),
        ),
        "random state of Python": hashlib.sha256(pickle.dumps(random.getstate())).hexdigest(),
        "random state of numpy": hashlib.sha256(
            pickle.dumps(np.random.get_state())  # noqa: NPY002
        ).hexdigest(),
        "handlers of loggers": [[repr(h) for h in logger.handlers] for logger in loggers],
        "levels of loggers": [logger.level for logger in loggers],
        "hooks of the interpreter": (threading.excepthook, sys.gettrace(), sys.getprofile()),
    }  # fmt: skip


def _deepspeed_settings() -> dict[str, Any]:
    """Return the variables of DeepSpeed's modules that hold one plain value."""
    import torch

    plain = (bool, int, float, str, torch.dtype, type(None))
    return {
        f"{name}.{key}": value
        for name, module in list(sys.modules.items())
        if name.startswith("deepspeed.") and module is not None
        for key, value in list(vars(module).items())
        if isinstance(value, plain) and not key.startswith("__")
    } | {"torch.nn.functional.linear": torch.nn.functional.linear.__module__}


def _code() -> dict[str, int]:
    """Return the identity of every function and class of this project, and of their methods."""
    found = {}
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] not in _OURS:
            continue
        for key, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__module__", None) == name:
                found[f"{name}.{key}"] = id(value)
                if isinstance(value, type):
                    for attribute, part in list(vars(value).items()):
                        if callable(part) and not attribute.startswith("__"):
                            # Torch wraps the step of an optimizer's class at its first use.
                            found[f"{name}.{key}.{attribute}"] = id(inspect.unwrap(part))
    return found
