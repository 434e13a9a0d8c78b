"""What a model folder says of its model, and whether settings agree with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Settings that the config.json of `model.init_from` decides, and Hugging Face's names for them.
_FOLDER_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
}
# No stored weight depends on them: a run may choose others.
_FREE_TO_DIFFER = {"hidden_dropout", "attention_dropout", "initializer_range"}
# What the shapes and the meaning of weights depend on.
ARCHITECTURE = _FOLDER_NAMES.keys() - _FREE_TO_DIFFER
# What the model always is. Folders leave these out when they are so.
_NOT_SETTABLE = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "tie_word_embeddings": True,
}


def read_bert_config(path: Path) -> dict[str, Any]:
    """Return the content of a model folder's ``config.json``.

    Raises
    ------
    ValueError
        The file is missing or damaged, or describes a model that is no BERT.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "expected a folder of `geneloom export` or a Hugging Face BERT folder"
        if (path.parent / "model_config.json").exists():
            hint = "this is a run folder; `geneloom export` makes a model folder of it"
        raise ValueError(f"{path.parent}: no {path.name}; {hint}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "bert":
        raise ValueError(
            f"{path.parent}: {path.name} describes a model of type {kind!r}, not 'bert'"
        )
    return content


def read_architecture(path: Path) -> dict[str, Any]:
    """Return the model settings that a model folder's ``config.json`` describes.

    Raises
    ------
    ValueError
        As `read_bert_config`; or the file lacks a setting, or describes another kind of BERT.
    """
    content = read_bert_config(path)
    missing = sorted(set(_FOLDER_NAMES.values()) - content.keys())
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}")
    foreign = [
        f"{k} {content[k]!r} instead of {v!r}"
        for k, v in _NOT_SETTABLE.items()
        if content.get(k, v) != v
    ]
    if foreign:
        raise ValueError(f"{path}: another kind of BERT: {', '.join(foreign)}")
    return {ours: content[theirs] for ours, theirs in _FOLDER_NAMES.items()}


def architecture_conflicts(
    given: dict[str, Any], folder: Path, theirs: dict[str, Any]
) -> list[str]:
    """Return one sentence if given model settings are not those of a folder's weights, or none.

    Parameters
    ----------
    given
        Any part of the model section.
    theirs
        What `read_architecture` says of `folder`.
    """
    differing = [
        f"{k} {given[k]} given, {theirs[k]} there"
        for k in _FOLDER_NAMES
        if k in given and k not in _FREE_TO_DIFFER and number_if_one(given[k]) != theirs[k]
    ]
    if not differing:
        return []
    return [
        f"'model.init_from': {folder} has another architecture: {', '.join(differing)}; leave "
        "these fields out (`--config continue` has none)"
    ]


def take_architecture(content: dict) -> list[str]:
    """Fill the model settings that only the folder of `init_from` gives; return what conflicts."""
    given = content.get("model")
    if not isinstance(given, dict) or not isinstance(given.get("init_from"), str):
        return []
    folder = Path(given["init_from"])
    path = folder / "config.json"
    run = content.get("run")
    if not path.exists() and isinstance(run, dict):
        # A run that goes on has its architecture itself, and needs the folder no more.
        own = Path(str(run.get("out"))) / "model_config.json"
        path = own if own.exists() else path
    try:
        theirs = read_architecture(path)
    except ValueError as error:
        return [f"'model.init_from': {error}"]
    content["model"] = theirs | given
    return architecture_conflicts(given, folder, theirs)


def number_if_one(value: Any) -> Any:
    """Return text that is a number as one (YAML 1.1 reads 1e-3 as text), anything else as it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
