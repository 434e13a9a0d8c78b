"""Read the architecture from a model folder, and compare it with the settings of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BERT, MODERNBERT = "bert", "modernbert"
_TITLES = {BERT: "BERT", MODERNBERT: "ModernBERT"}
# The config.json of `model.init_from` decides these settings; the values are Hugging Face's names.
_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "initializer_range": "initializer_range",
}
_FOLDER_NAMES = {
    BERT: _NAMES
    | {
        "activation": "hidden_act",
        "layer_norm_eps": "layer_norm_eps",
        "hidden_dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    MODERNBERT: _NAMES
    | {
        "activation": "hidden_activation",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout": "mlp_dropout",
        "attention_dropout": "attention_dropout",
        "local_window": "local_attention",
    },
}
# These settings of a ModernBERT are not single values in its config.json.
_LAYER_TYPES = ("full_attention", "sliding_attention")
_ROTARY_BASES = dict(zip(("rotary_base", "local_rotary_base"), _LAYER_TYPES, strict=True))
# No stored weight depends on these settings, so a run may choose other values.
_FREE_TO_DIFFER = {"hidden_dropout", "attention_dropout", "initializer_range"}
# The shapes and the meaning of the weights depend on these settings.
ARCHITECTURE = {
    "architecture", "global_every", *_ROTARY_BASES, *_FOLDER_NAMES[BERT], *_FOLDER_NAMES[MODERNBERT]
} - _FREE_TO_DIFFER  # fmt: skip
# The model always has these values, and folders may leave them out.
_NOT_SETTABLE = {
    BERT: {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "tie_word_embeddings": True,
    },
    MODERNBERT: {
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "tie_word_embeddings": True,
    },
}


def read_model_config(path: Path) -> dict[str, Any]:
    """Return the content of a model folder's ``config.json``.

    Raises
    ------
    ValueError
        The file is missing or damaged, or describes neither a BERT nor a ModernBERT.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "expected a folder of `geneloom export`, or a BERT or ModernBERT of Hugging Face"
        if (path.parent / "model_config.json").exists():
            hint = "this is a run folder; `geneloom export` makes a model folder of it"
        raise ValueError(f"{path.parent}: no {path.name}; {hint}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in _FOLDER_NAMES:
        raise ValueError(
            f"{path.parent}: {path.name} describes a model of type {kind!r}, neither 'bert' nor "
            "'modernbert'"
        )
    return content


def read_architecture(path: Path) -> dict[str, Any]:
    """Return the model settings that a model folder's ``config.json`` describes.

    Raises
    ------
    ValueError
        As in `read_model_config`; or the file lacks a setting, or describes an unsupported variant.
    """
    content = read_model_config(path)
    kind = content["model_type"]
    names = _FOLDER_NAMES[kind]
    missing = sorted(set(names.values()) - content.keys())
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}")
    foreign = [
        f"{k} {content[k]!r} instead of {v!r}"
        for k, v in _NOT_SETTABLE[kind].items()
        if content.get(k, v) != v
    ]
    if foreign:
        raise ValueError(f"{path}: another kind of {_TITLES[kind]}: {', '.join(foreign)}")
    found = {"architecture": kind} | {ours: content[theirs] for ours, theirs in names.items()}
    return found | (_rotary_settings(path, content) if kind == MODERNBERT else {})


def layer_types(num_layers: int, global_every: int) -> list[str]:
    """Return the attention type (full or sliding) of each ModernBERT layer, as in its config."""
    return [_LAYER_TYPES[bool(n % global_every)] for n in range(num_layers)]


def _rotary_settings(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return which layers of a ModernBERT are global, and the bases of its rotary positions.

    Folders of 2024 store these as numbers, later ones as lists and dictionaries.
    """
    number = content["num_hidden_layers"]
    types = content.get("layer_types") or layer_types(
        number, content.get("global_attn_every_n_layers", 3)
    )
    rotary = content.get("rope_parameters") or {
        _LAYER_TYPES[0]: {"rope_theta": content.get("global_rope_theta", 160_000.0)},
        _LAYER_TYPES[1]: {"rope_theta": content.get("local_rope_theta", 10_000.0)},
    }
    every = next((n for n in range(1, number + 1) if layer_types(number, n) == types), None)
    if every is None:
        raise ValueError(f"{path}: its global layers are not every n-th: {types}")
    kinds = {str(rotary[t].get("rope_type", "default")) for t in _LAYER_TYPES}
    if kinds != {"default"}:
        raise ValueError(f"{path}: rotary positions of kind {sorted(kinds)}, not 'default'")
    bases = {ours: float(rotary[theirs]["rope_theta"]) for ours, theirs in _ROTARY_BASES.items()}
    return {"global_every": every} | bases


def is_same(name: str, value: Any, theirs: dict[str, Any]) -> bool:
    """Return whether a model setting means what a folder says (`theirs`: of `read_architecture`).

    A folder lists the kinds of its layers; where there are few, several distances between global
    layers give the same list.
    """
    value = number_if_one(value)
    if name == "global_every" and isinstance(value, int | float) and value >= 1:
        layers = theirs["num_layers"]
        return layer_types(layers, int(value)) == layer_types(layers, theirs[name])
    return value == theirs[name]


def architecture_conflicts(
    given: dict[str, Any], folder: Path, theirs: dict[str, Any]
) -> list[str]:
    """Return one sentence if model settings conflict with a folder's weights, else nothing.

    Parameters
    ----------
    given
        Any part of the model section.
    theirs
        The result of `read_architecture` for `folder`.
    """
    own, other = given.get("architecture"), theirs["architecture"]
    if own is not None and own != other:
        return [
            f"'model.init_from': {folder} holds a {other}, model.architecture is {own}: weights of "
            "one are of no use to the other; leave model.architecture out to go on with the "
            f"{other}, or model.init_from to train a {own} from its first step"
        ]
    told = [k for k in theirs if k not in _FREE_TO_DIFFER and given.get(k) is not None]
    differing = [
        f"{k} {given[k]} given, {theirs[k]} there" for k in told if not is_same(k, given[k], theirs)
    ]
    if not differing:
        return []
    return [
        f"'model.init_from': {folder} has another architecture: {', '.join(differing)}; leave "
        "these fields out (`--config continue` has none)"
    ]


def take_architecture(content: dict) -> list[str]:
    """Fill the missing model settings from the folder of `init_from`, and return the conflicts."""
    given = content.get("model")
    if not isinstance(given, dict) or not isinstance(given.get("init_from"), str):
        return []
    folder = Path(given["init_from"])
    path = folder / "config.json"
    run = content.get("run")
    if not path.exists() and isinstance(run, dict):
        # A run that is resumed has stored its architecture, and does not need the folder any more.
        own = Path(str(run.get("out"))) / "model_config.json"
        path = own if own.exists() else path
    try:
        theirs = read_architecture(path)
    except ValueError as error:
        return [f"'model.init_from': {error}"]
    conflicts = architecture_conflicts(given, folder, theirs)
    if not conflicts:
        content["model"] = theirs | given
    return conflicts


def number_if_one(value: Any) -> Any:
    """Return a number if the text is one (YAML 1.1 reads 1e-3 as text), else the value itself."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
