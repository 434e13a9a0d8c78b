"""Check that all ranks run the same code on the same data with the same settings.

`agreed_world` is called before the first step. A rank that differs would silently train on other
cells or by other rules, or fail in a collective operation with a message that does not tell the
reason.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import socket
import time
from importlib.metadata import version
from typing import Any

from data_prep.errors import SharedFailure, said_of
from data_prep.shards.reader import ShardSet
from data_prep.version import VERSION, code_digest
from pretrain.config import RunConfig
from pretrain.ranks import dist
from pretrain.ranks.dist import Ranks

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "numba")
# Each host may keep the shards in another place, but their content must be the same.
_OWN = ("data.shards", "data.cache")
_SKEW_S = 5.0
_SHOWN = 5


class DifferentWorlds(SharedFailure, ValueError):
    """The ranks of a run differ in code, settings or data."""


def agreed_world(config: RunConfig, ds_config: dict[str, Any], ranks: Ranks) -> ShardSet:
    """Compare code, versions, settings, clocks and shards of all ranks; return the shards.

    All ranks call it before anything is written. Clocks that differ only cause a warning, because
    nothing but the times in records depends on them.

    Raises
    ------
    DifferentWorlds
        Raised on all ranks, with host, item and both values of each difference, or if one of the
        ranks cannot open the shards.
    """
    _require_same_settings(config, ds_config, ranks)
    return _agreed_shards(config, ranks)


def _require_same_settings(config: RunConfig, ds_config: dict[str, Any], ranks: Ranks) -> None:
    mine = {
        "package version": VERSION,
        "code of the package": code_digest(),
        "python": platform.python_version(),
        **{f"version of {name}": version(name) for name in _PACKAGES},
        "device": ranks.device.type,
        **_flat({"file of run.deepspeed": ds_config}),
        **{k: v for k, v in _flat(config.model_dump(mode="json")).items() if k not in _OWN},
    }
    _require_equal(mine, ranks)
    dist.wait_for_all()
    _compare_clocks(dist.gather_text(f"{time.time()} {socket.gethostname()}", ranks), ranks)


def _agreed_shards(config: RunConfig, ranks: Ranks) -> ShardSet:
    shards, problem = None, ""
    try:
        shards = ShardSet(config.data.shards, config.data.cache, share=config.data.share)
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = said_of(error)
    told = [json.loads(t) for t in dist.gather_text(json.dumps([_host(ranks), problem]), ranks)]
    if failed := [(host, text) for host, text in told if text]:
        everywhere = len(failed) == len(told) and len({text for _, text in failed}) == 1
        said = failed[0][1] if everywhere else "; ".join(f"{h}: {t}" for h, t in failed[:_SHOWN])
        raise DifferentWorlds(said)
    assert shards is not None
    mine = {"vocabulary": shards.vocabulary.sha256[:12], "shards": shards.fingerprint[:12]}
    _require_equal(mine, ranks)
    return shards


def _require_equal(mine: dict[str, Any], ranks: Ranks) -> None:
    """Raise on all ranks if their values differ; if they are equal, only one hash is sent."""
    text = json.dumps([_host(ranks), mine])
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(dist.gather_text(digest, ranks))) == 1:
        return
    first, *others = (json.loads(told) for told in dist.gather_text(text, ranks))
    problems = []
    for host, values in others:
        for item in dict.fromkeys([*first[1], *values]):
            here, there = (v.get(item) for v in (first[1], values))
            if here != there:
                problems.append(f"{item}: {there!r} on {host}, {here!r} on {first[0]}")
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise DifferentWorlds(
        f"the ranks are not alike: {'; '.join(problems[:_SHOWN])}{more}. Install the same version, "
        "and give the same settings and shards everywhere"
    )


def _compare_clocks(told: list[str], ranks: Ranks) -> None:
    clocks = [(float(t), host) for t, host in (text.split(" ", 1) for text in told)]
    slow, fast = min(clocks), max(clocks)
    if fast[0] - slow[0] > _SKEW_S and ranks.is_first:
        logger.warning(
            "the clocks of the hosts differ by %.0f s: %s on %s, %s on %s; start chrony or ntpd",
            fast[0] - slow[0], _clock(slow[0]), slow[1], _clock(fast[0]), fast[1],
        )  # fmt: skip


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _host(ranks: Ranks) -> str:
    return f"{socket.gethostname()} (rank {ranks.rank})"


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested values as one dict whose names contain dots."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat
