"""Collects the environment variables that ranks on every host get from the launching shell."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.errors import DEFAULT_VARIABLES

# Prefixes of variables that set communication, computation and files of libraries; ssh would not
# pass them on.
_PREFIXES = (
    "NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "KMP_", "NUMBA_", "CUBLAS_",
    "TORCH_", "HF_", "TRANSFORMERS_", "TRITON_", "WANDB_",
)  # fmt: skip
# Prefixes of variables that each host or rank has for itself.
_NOT = ("TORCH_ELASTIC_", "TORCHELASTIC_")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# As in DeepSpeed's runner, the file is read in the home folder and in the working folder; the
# latter wins.
_DEEPSPEED_FILE = ".deepspeed_env"

ENV_HELP = "variable for every rank, as NAME=VALUE or NAME for the shell's; may be repeated"


def named_variables(given: Sequence[str]) -> dict[str, str]:
    """Return the variables that ``--env NAME=VALUE`` and ``--env NAME`` set.

    Raises
    ------
    ValueError
        An argument has no valid name, or names a variable that the shell does not have.
    """
    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not _NAME.fullmatch(name):
            raise ValueError(f"--env {name}: must be NAME=VALUE, or the NAME of a variable")
        if not equals and name not in os.environ:
            raise ValueError(f"--env {name}: this shell has no such variable; give {name}=VALUE")
        values[name] = value if equals else os.environ[name]
    return values


def passed_on(given: Sequence[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that ranks get, and print their names, since values may be secrets.

    They are the shell's variables for communication, threads and caches, those of DeepSpeed's
    ``.deepspeed_env``, and those of ``--env``. Later ones win.

    Raises
    ------
    ValueError
        A line of the file or an option is not NAME=VALUE.
    """
    found = {
        name: value
        for name, value in environment.items()
        if name.startswith(_PREFIXES) and not name.startswith(_NOT)
    }
    found |= _of_deepspeed() | named_variables(given)
    # What this command has set itself is passed on in silence.
    told = sorted(n for n, value in found.items() if DEFAULT_VARIABLES.get(n) != value)
    if told:
        print(f"launch: for every rank: {', '.join(told)}", file=sys.stderr, flush=True)
    return found


def _of_deepspeed() -> dict[str, str]:
    name = os.environ.get("DS_ENV_FILE", _DEEPSPEED_FILE)
    found = {}
    for folder in (Path.home(), Path()):
        path = folder / name
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            key, equals, value = line.strip().removeprefix("export ").partition("=")
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if not equals or not _NAME.fullmatch(key):
                raise ValueError(f"{path}, line {number}: '{key}' is not NAME=VALUE")
            found[key] = value
    return found
