"""What is recorded of a command line: everything but what somebody may want to keep to himself.

Commands stand in run folders, batch files and model folders, which are copied and published.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

HIDDEN = "HIDDEN"
# Of these variables the value is recorded: they say how a run was set up, and hold no secrets.
_PUBLIC = frozenset(
    {"CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONSAFEPATH",
     "DS_ACCELERATOR"}
)  # fmt: skip
_PUBLIC_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "OMP_", "MKL_", "NUMBA_", "CUBLAS_")
# `HF_TOKEN` and `--api-key`, not `batch.tokens_per_step`.
_SECRET = re.compile(
    r"(^|[-_.])(token|secrets?|password|passwd|passphrase|credentials?|auth|"
    r"(api|access|private|secret)[-_]?key)$",
    re.IGNORECASE,
)
_URL_USER = re.compile(r"(?<=://)[^/@\s]+@")
# A query may be a signature that opens the file to whoever has it.
_URL_QUERY = re.compile(r"(://[^\s?#]*\?)[^\s#]+")


def is_public(variable: str) -> bool:
    """May the value of an environment variable be recorded?"""
    known = variable in _PUBLIC or variable.startswith(_PUBLIC_PREFIXES)
    return known and not _SECRET.search(variable)


def redacted(words: Sequence[str]) -> list[str]:
    """Return a command line as it may be recorded.

    Hidden are: values of ``--env NAME=VALUE`` unless the variable is one of a short list, values of
    settings and options whose name looks like that of a secret, and user names, passwords and
    queries in URLs.
    """
    found, is_value_of = [], ""
    for word in words:
        if is_value_of == "--env":
            word = _without_value(word)
        elif is_value_of:
            word = HIDDEN
        elif word.startswith("--env="):
            word = "--env=" + _without_value(word.removeprefix("--env="))
        elif "=" in word and _SECRET.search(word.partition("=")[0]):
            word = f"{word.partition('=')[0]}={HIDDEN}"
        is_option = word.startswith("--") and "=" not in word
        is_value_of = word if word == "--env" or (is_option and _SECRET.search(word)) else ""
        found.append(without_credentials(word))
    return found


def redacted_command(words: Sequence[str]) -> str:
    """Return `redacted` words as one line for a shell."""
    return shlex.join(redacted(words))


def without_credentials(text: str) -> str:
    """Return a text whose URLs have no user, password or query any more."""
    return _URL_QUERY.sub(rf"\1{HIDDEN}", _URL_USER.sub(f"{HIDDEN}@", text))


def _without_value(setting: str) -> str:
    name = setting.partition("=")[0]
    return setting if is_public(name) else f"{name}={HIDDEN}"
