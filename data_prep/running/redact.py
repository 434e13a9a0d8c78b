"""Removes secrets from a command line before it is recorded.

Commands are recorded in run folders, batch files and model folders, which are copied and published.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

HIDDEN = "HIDDEN"
# The values of these variables are recorded: they tell how a run was set up and hold no secrets.
_PUBLIC = frozenset(
    {"CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONSAFEPATH",
     "DS_ACCELERATOR"}
)  # fmt: skip
_PUBLIC_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "OMP_", "MKL_", "NUMBA_", "CUBLAS_")
# The pattern matches `HF_TOKEN` and `--api-key`, but not `batch.tokens_per_step`.
_SECRET = re.compile(
    r"(^|[-_.])(token|secrets?|password|passwd|passphrase|credentials?|auth|"
    r"(api|access|private|secret)[-_]?key)$",
    re.IGNORECASE,
)
# The same names inside of a word, such as a command that is handed to another shell.
_ASSIGNED = re.compile(
    r"(?<![\w.-])((?:[\w.-]*[-_.])?(?:token|secrets?|password|passwd|passphrase|credentials?|auth|"
    r"(?:api|access|private|secret)[-_]?key))=([^\s,;&'\"]+)",
    re.IGNORECASE,
)
# Lines of a shell, and variables that sbatch hands on.
_HIDDEN_WHOLE = ("--setup=", "--export=", "--sbatch=--export=")
_URL_USER = re.compile(r"(?<=://)[^/@\s]+@")
# The query of a URL may be a signature with which anyone can open the file.
_URL_QUERY = re.compile(r"(://[^\s?#]*\?)[^\s#]+")


def is_public(variable: str) -> bool:
    """Return whether the value of an environment variable may be recorded."""
    known = variable in _PUBLIC or variable.startswith(_PUBLIC_PREFIXES)
    return known and not _SECRET.search(variable)


def redacted(words: Sequence[str]) -> list[str]:
    """Return a command line without secrets, so that it may be recorded.

    It hides the values of ``--env NAME=VALUE`` unless the variable is on a short list, lines of
    ``--setup``, variables of ``--sbatch=--export``, whatever is assigned to a name that looks like
    that of a secret, and user names, passwords and queries in URLs.
    """
    found, is_value_of = [], ""
    for word in words:
        if is_value_of == "--env":
            word = _without_value(word)
        elif is_value_of:
            word = HIDDEN
        elif word.startswith("--env="):
            word = "--env=" + _without_value(word.removeprefix("--env="))
        elif word.startswith(_HIDDEN_WHOLE):
            word = next(p for p in _HIDDEN_WHOLE if word.startswith(p)) + HIDDEN
        elif "=" in word and _SECRET.search(word.partition("=")[0]):
            word = f"{word.partition('=')[0]}={HIDDEN}"
        is_option = word.startswith("--") and "=" not in word
        has_secret = word in ("--env", "--setup") or (is_option and _SECRET.search(word))
        is_value_of = word if has_secret else ""
        found.append(_ASSIGNED.sub(rf"\1={HIDDEN}", without_credentials(word)))
    return found


def redacted_command(words: Sequence[str]) -> str:
    """Return a command line without secrets (`redacted`) as one line for a shell."""
    return shlex.join(redacted(words))


def without_credentials(text: str) -> str:
    """Return the text with users, passwords and queries in its URLs hidden."""
    return _URL_QUERY.sub(rf"\1{HIDDEN}", _URL_USER.sub(f"{HIDDEN}@", text))


def _without_value(setting: str) -> str:
    name = setting.partition("=")[0]
    return setting if is_public(name) else f"{name}={HIDDEN}"
