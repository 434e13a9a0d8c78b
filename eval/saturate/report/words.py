"""What a measurement of saturation says, in sentences."""

from __future__ import annotations

from typing import Any, Literal

Limit = Literal["tokens", "cells"]


def limit_of(record: dict[str, Any]) -> Limit | None:
    """Return what the whole corpus lacks more, or None where the interval does not tell.

    With equal epochs of which none is a second one, tokens and cells are the same thing.
    """
    if record["gains"] is None or _are_the_same(record):
        return None
    difference = record["gains"]["tokens_above_cells"]
    if difference["low"] > 0:
        return "tokens"
    return "cells" if difference["high"] < 0 else None


def words(record: dict[str, Any]) -> list[str]:
    """Return the answer, the most important sentence first."""
    found = [_range(record)]
    if record["gains"] is None:
        return [*found, "Too few sizes for a curve: give at least four --shares."]
    return [
        _ten_times(record),
        _limit(record),
        *found,
        *_beside_counting(record),
        _interval(record),
    ]


def _ten_times(record: dict[str, Any]) -> str:
    gain, whole = record["gains"]["ten_times_cells"], _whole(record)
    along = "the same tokens" if record["equal"] == "tokens" else "as many epochs"
    what = f"10 times as many cells ({10 * whole['cells']:,}) and {along}"
    line, residual = record["gains"]["ten_times_cells_line"], record["fit"]["residual"]
    both = f"{_nats(gain)} by the fitted curve, {_nats(line)} by a straight line on log cells"
    if max(gain["low"], line["low"]) <= 0:
        return f"{what} would bring nothing that can be told from zero: {both}."
    found = f"{what} would bring {both}: a loss of {whole['loss'] - line['value']:.3f} to "
    found += f"{whole['loss'] - gain['value']:.3f} instead of {whole['loss']:.3f}."
    if residual > gain["value"]:
        found += f" The curve misses the sizes by {residual:.3f} nats, more than it promises."
    return found


def _limit(record: dict[str, Any]) -> str:
    gains = record["gains"]
    if _are_the_same(record):
        return (
            "Whether cells or tokens are the limit cannot be told: no cell was seen twice, so more "
            "tokens were more cells; --equal tokens tells them apart."
        )
    sentence = {
        "tokens": "Tokens are the limit, not cells: train longer on these cells first.",
        "cells": "Cells are the limit, not tokens: more cells first.",
        None: "Whether cells or tokens are the limit is not told apart here.",
    }[limit_of(record)]
    return (
        f"{sentence} Twice the tokens on the same cells brought {_nats(gains['twice_tokens'])}, "
        f"measured; twice the cells at the same tokens brought {_nats(gains['twice_cells'])}, by "
        "the line through the three largest sizes."
    )


def _range(record: dict[str, Any]) -> str:
    first, whole = record["sizes"][0], _whole(record)
    return (
        f"From {first['cells']:,} to {whole['cells']:,} cells the held-out loss went from "
        f"{first['loss']:.3f} to {whole['loss']:.3f} nats; each cell was seen "
        f"{first['epochs']:,.2f} and {whole['epochs']:,.2f} times."
    )


def _beside_counting(record: dict[str, Any]) -> list[str]:
    beyond = _whole(record)["beyond_arithmetic"]
    if beyond is None:
        return ["What counting tells is not known: the vocabulary has no medians."]
    if beyond > 0:
        return [f"The whole corpus ends {beyond:.3f} nats beyond what counting tells."]
    return [
        f"The whole corpus ends {-beyond:.3f} nats above what counting tells: this curve is of a "
        "model that has not learned what counting knows, and says little of more data. Train "
        "longer first."
    ]


def _interval(record: dict[str, Any]) -> str:
    if record["seeds"] == 1:
        return (
            "Intervals (95 %) say how much depends on which cells were held out, not on the seed "
            "of a training; --seeds 3 adds that. Ten times the corpus is an extrapolation."
        )
    return (
        "Intervals (95 %) say how much depends on which cells were held out and on "
        f"{record['seeds']} seeds. Ten times the corpus is an extrapolation."
    )


def _whole(record: dict[str, Any]) -> dict[str, Any]:
    return next(s for s in record["sizes"] if s["share"] == 1 and s["tokens_part"] == 1)


def _are_the_same(record: dict[str, Any]) -> bool:
    return record["equal"] == "epochs" and _whole(record)["epochs"] <= 1


def _nats(gain: dict[str, float]) -> str:
    return f"{gain['value']:.3f} nats ({gain['low']:.3f} to {gain['high']:.3f})"
