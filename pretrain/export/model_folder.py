"""Export a checkpoint as a Hugging Face model folder, and load such folders.

`export` writes a folder; `load_exported` reads it, or a published Geneformer folder.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data_prep.files import complete_folder, file_sha256, require_new
from data_prep.genes.vocabulary import Vocabulary, load_vocabulary, open_vocabulary
from data_prep.shards.format import lay_out
from data_prep.shards.reader import ShardSet
from pretrain.cell_states.cell_state import FILE_NAME as STATE_NAME
from pretrain.cell_states.cell_state import NUM_CELLS, CellState, fit_cell_state
from pretrain.checkpoints import checkpoint, zero_state
from pretrain.config import load_config
from pretrain.counting.arithmetic_prior import FILE_NAME as PRIOR_NAME
from pretrain.counting.arithmetic_prior import ArithmeticPrior
from pretrain.counting.corpus_svd import FILE_NAME as SVD_NAME
from pretrain.counting.corpus_svd import CorpusSvd
from pretrain.measure.heldout import arithmetic_sentence, score_rows
from pretrain.measure.metrics import read_metrics
from pretrain.model.architectures import (
    EncoderConfig,
    Network,
    attention_implementation,
    encoder_of,
    network_class,
    new_network,
    read_encoder_config,
)
from pretrain.model.counted_start import describe
from pretrain.model.masked_gene_model import MaskedGeneModel
from pretrain.settings.architecture import ARCHITECTURE, is_same, read_architecture

EXPORT_FORMAT = "geneloom-model/1"
RECORD_NAME = "geneloom.json"
_SHOWN = 3
# Older versions of PyTorch wrote the second file; only tensors are read, and no code in it is run.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# AttributeError is raised if the pickle is not a dictionary of tensors.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError)


def export(
    run: Path,
    out: Path,
    step: checkpoint.Which = None,
    shards: Path | str | None = None,
    state_cells: int = NUM_CELLS,
    device: str = "cpu",
) -> str:
    """Write a complete checkpoint of a run as a Hugging Face folder; return a summary sentence.

    The folder contains fp32 weights (safetensors), ``config.json``, ``vocabulary.json``, the same
    vocabulary as Geneformer's two dictionaries, ``geneloom.json`` (the training data and the number
    of steps), the corpus SVD if the run has it, the cell state if the shards can be read, and a
    model card. It appears complete or not at all.

    Parameters
    ----------
    step
        Step of the checkpoint, or ``best``; None: the newest.
    shards
        Shards of the pretraining; by default the location in the run's settings.
    state_cells
        Training cells to encode for the cell state (`pretrain.cell_states.cell_state`); 0: no cell
        state.
    device
        Device that encodes them.

    Raises
    ------
    ValueError
        `run` is no run folder or has no such checkpoint, `out` is not empty, or the run's
        ``model_config.json`` does not describe the weights.
    """
    require_new(out)
    last = checkpoint.find(run, step)
    vocabulary = own_vocabulary(run, last)
    bert = load_checkpoint(run, last)
    with complete_folder(out, "config.json") as partial:
        bert.save_pretrained(partial)
        write_vocabulary(partial, vocabulary)
        if svd := CorpusSvd.found_in(run, vocabulary):
            svd.save(partial)
        record = export_record(run, last)
        state = _write_cell_state(
            partial, run, bert, vocabulary, shards, state_cells, device, trained_share(record)
        )
        if record["prior"]:
            ArithmeticPrior.load(run, vocabulary).save(partial)
        (partial / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")
        (partial / "README.md").write_text(_model_card(record, bert))
    return f"{out}: step {last.step}, {bert.num_parameters():,} parameters; {state}"


def _write_cell_state(
    folder: Path,
    run: Path,
    network: Network,
    vocabulary: Vocabulary,
    shards: Path | str | None,
    cells: int,
    device: str,
    share: float,
) -> str:
    """Write the cell state of a model into its folder; return a part of a sentence."""
    if cells == 0:
        return "no cell state"
    location = str(shards or load_config(run / "config.yaml").data.shards)
    try:
        if "://" in location:
            raise ValueError(f"{location}: is a URL, a folder is needed")
        opened = ShardSet(location, share=share)
        if opened.vocabulary.sha256 != vocabulary.sha256:
            raise ValueError(
                f"{location}: vocabulary {opened.vocabulary.sha256[:12]}, the run has "
                f"{vocabulary.sha256[:12]}"
            )
        digest = weights_digest(folder)
        state = fit_cell_state(encoder_of(network), opened, cells, digest, device=device)
    except (OSError, ValueError) as error:
        if shards is not None:
            raise ValueError(f"--shards {shards}: {error}") from error
        return f"no cell state: {error}; give --shards"
    finally:
        torch.nn.Module.to(network, device=torch.device("cpu"))
    state.save(folder)
    return f"cell states of {state.width} numbers ({state.origin['cells']} training cells)"


def own_vocabulary(run: Path, found: checkpoint.Checkpoint) -> Vocabulary:
    """Return the vocabulary of a run; ValueError if the checkpoint was trained with another one."""
    vocabulary = load_vocabulary(run / "vocabulary.json")
    if vocabulary.sha256 != found.record["vocabulary_sha256"]:
        raise ValueError(
            f"{run}: vocabulary.json has hash {vocabulary.sha256[:12]}, the checkpoint was trained "
            f"with {found.record['vocabulary_sha256'][:12]}"
        )
    return vocabulary


def load_checkpoint(run: Path, found: checkpoint.Checkpoint) -> Network:
    """Return the model of a run's checkpoint with fp32 weights, in evaluation mode.

    Raises
    ------
    ValueError
        As in `own_network`.
    """
    bert = own_network(run, found)
    zero_state.load_weights(MaskedGeneModel(bert), found.reader())
    return bert.eval()


def own_network(run: Path, found: checkpoint.Checkpoint) -> Network:
    """Return the network of a run's checkpoint with random weights.

    Raises
    ------
    ValueError
        The run's ``model_config.json`` does not describe the weights, so it was changed.
    """
    path, recipe = run / "model_config.json", found.record["recipe"]
    # Some settings change no shape (heads, activation, windows), so they are compared by name.
    trained = {k.removeprefix("model."): v for k, v in recipe.items() if k.startswith("model.")}
    theirs = read_architecture(path)
    problems = [
        f"{name} is {value!r}, the checkpoint was trained with {trained[name]!r}"
        for name, value in theirs.items()
        if name in ARCHITECTURE and name in trained and not is_same(name, trained[name], theirs)
    ]
    bert, reader = new_network(read_encoder_config(path)), found.reader()
    sizes = {name: p.numel() for name, p in MaskedGeneModel(bert).named_parameters()}
    stored = {name: reader.numel(name) for name in reader.names}
    problems += [
        f"{name} has {sizes.get(name, 0):,} numbers, {stored.get(name, 0):,} are stored"
        for name in sorted({*sizes, *stored})
        if sizes.get(name) != stored.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"{path}: does not fit the weights of step {found.step}: "
            f"{'; '.join(problems[:_SHOWN])}{more}; restore the file as the run wrote it"
        )
    return bert


def load_exported(folder: Path, vocabulary_path: Path | None = None) -> tuple[Network, Vocabulary]:
    """Return model and vocabulary of an exported folder, or of a published Geneformer folder.

    Parameters
    ----------
    vocabulary_path
        Geneformer's dictionaries, for folders without ``vocabulary.json``.

    Raises
    ------
    ValueError
        There is no model or no vocabulary, or the two do not belong together.
    """
    config = read_encoder_config(folder / "config.json")
    vocabulary = folder_vocabulary(folder, vocabulary_path)
    model = _load_network(folder, config)
    require_belonging(folder, model.config.vocab_size, vocabulary)
    if model.config.max_position_embeddings < vocabulary.max_length:
        raise ValueError(
            f"{folder}: the model has {model.config.max_position_embeddings} positions, the "
            f"vocabulary makes sequences of {vocabulary.max_length}"
        )
    return model.eval(), vocabulary


def model_digest(folder: Path, vocabulary: Vocabulary) -> str:
    """Return a hash of a model folder's weights and of the vocabulary they are used with."""
    hashes = [*_weight_hashes(folder), vocabulary.sha256]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """Return a hash of a model folder's weights."""
    return hashlib.sha256("".join(_weight_hashes(folder)).encode()).hexdigest()


def folder_cell_state(folder: Path, vocabulary: Vocabulary) -> CellState | None:
    """Return the cell state of a model folder, or None if it has none.

    Raises
    ------
    ValueError
        The cell state cannot be read, or belongs to other weights.
    """
    if not (folder / STATE_NAME).is_file():
        return None
    return CellState.load(folder, vocabulary, weights_digest(folder))


def _weight_hashes(folder: Path) -> list[str]:
    beside = (SVD_NAME, PRIOR_NAME, STATE_NAME)
    found = sorted(p for p in folder.glob("*.safetensors") if p.name not in beside)
    return [file_sha256(p) for p in found or [weight_file(folder)]]


def weight_file(folder: Path) -> Path:
    """Return the file of weights in a model folder; ValueError if there is none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder}: has no weights; expected {' or '.join(WEIGHT_FILES)}")


def folder_vocabulary(folder: Path, vocabulary_path: Path | None) -> Vocabulary:
    """Return the vocabulary of a model folder; arguments and errors as in `load_exported`."""
    own = folder / "vocabulary.json"
    if vocabulary_path is None and not own.exists():
        raise ValueError(
            f"{folder}: has no vocabulary.json; give --vocab (to pretrain: model.init_vocabulary=) "
            "Geneformer's dictionaries"
        )
    vocabulary = open_vocabulary(vocabulary_path or own)
    if (folder / RECORD_NAME).exists():
        record = json.loads((folder / RECORD_NAME).read_text())
        if record["vocabulary_sha256"] != vocabulary.sha256:
            raise ValueError(
                f"{folder}: the model was trained with vocabulary "
                f"{record['vocabulary_sha256'][:12]}, {vocabulary_path or own} is "
                f"{vocabulary.sha256[:12]}"
            )
    return vocabulary


def require_belonging(folder: Path, num_tokens: int, vocabulary: Vocabulary) -> None:
    """Raise ValueError if a folder's model has another number of tokens than the vocabulary."""
    if num_tokens != vocabulary.num_tokens:
        raise ValueError(
            f"{folder}: the model has {num_tokens:,} tokens, the vocabulary "
            f"{vocabulary.num_tokens:,}; they belong to different versions"
        )


def _load_network(folder: Path, config: EncoderConfig) -> Network:
    try:
        loaded: Any = network_class(config).from_pretrained(
            folder,
            local_files_only=True,
            attn_implementation=attention_implementation(config),
            output_loading_info=True,
        )
    except (OSError, *UNREADABLE) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error})") from error
    model, loading = loaded
    prefix = f"{model.base_model_prefix}."
    missing = sorted(k for k in loading["missing_keys"] if k.startswith(prefix))
    if missing:
        raise ValueError(
            f"{folder}: the weights lack {len(missing)} encoder tensors, which would be random, "
            f"e.g. {missing[:2]}"
        )
    return model


def random_twin(model: Network, seed: int) -> Network:
    """Return the same architecture with random weights, as a baseline for pretraining."""
    torch.manual_seed(seed)
    return new_network(model.config).eval()


def token_dictionary(vocabulary: Vocabulary) -> dict[str, int]:
    """Return name -> token of special tokens and genes, as in Geneformer's token dictionary."""
    return vocabulary.special_tokens | {
        g: i + vocabulary.first_gene_token for i, g in enumerate(vocabulary.genes)
    }


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Write a vocabulary in the format of this project, and as Geneformer's two dictionaries."""
    vocabulary.save(folder / "vocabulary.json")
    medians = dict(zip(vocabulary.genes, vocabulary.medians.tolist(), strict=True))
    (folder / "token_dictionary.json").write_text(json.dumps(token_dictionary(vocabulary)))
    (folder / "gene_median_dictionary.json").write_text(json.dumps(medians))


# The entries of env.json to publish; the command and the machine stay private.
_PUBLISHED = ("commit", "dirty", "python", "versions", "gpus")


def export_record(run: Path, last: checkpoint.Checkpoint) -> dict[str, Any]:
    """Return the content of ``geneloom.json``: the model's training data and number of steps."""
    manifest = json.loads((run / "shards_manifest.json").read_text())
    environment = json.loads((run / "env.json").read_text())
    heldout = [m for m in read_metrics(run) if m["kind"] == "heldout" and m["step"] <= last.step]
    return {
        "format": EXPORT_FORMAT,
        "step": last.step,
        **{k: last.record[k] for k in ("vocabulary_sha256", "shards_fingerprint", "recipe")},
        # The record lacks this key in checkpoints of versions that knew only random initial
        # weights.
        "init": _without_path(last.record.get("init")),
        "prior": last.record.get("prior"),
        "heldout": heldout[-1] if heldout else None,
        "environment": {k: environment[k] for k in _PUBLISHED if k in environment},
        "sources": [{k: s[k] for k in ("name", "cells_kept")} for s in manifest["sources"]],
        "train_cells": sum(
            extent.num_cells
            for split, extent in lay_out(manifest, trained_share(last.record))[0]
            if split == "train"
        ),
    }


def trained_share(record: dict[str, Any]) -> float:
    """Return the share of the training cells that a checkpoint or an exported model was made of."""
    return record["recipe"].get("data.share", 1.0)


def _without_path(init: dict | None) -> dict | None:
    """Return the record of the initial weights, in which a folder is given by its name alone."""
    return {**init, "folder": Path(init["folder"]).name} if init and "folder" in init else init


def _start_sentence(init: dict) -> str:
    if "counted" in init:
        return f"Its {describe(init)}."
    kept, new = init["genes"]["kept"]["count"], init["genes"]["new"]["count"]
    return (
        f"It started from the weights of `{Path(init['folder']).name}` (SHA-256 "
        f"`{init['weights_sha256'][:12]}`): {kept:,} of {kept + new:,} genes had weights there, "
        f"{new:,} were new."
    )


def _model_card(record: dict, bert: Network) -> str:
    cells = record["train_cells"]
    names = ", ".join(s["name"] for s in record["sources"])
    lines = [
        "---", "library_name: transformers", "tags: [single-cell, masked-lm]", "---", "",
        "# Masked encoder of single cells", "",
        f"A {type(bert).__name__}: "
        f"{bert.config.num_hidden_layers} layers of width {bert.config.hidden_size}, "
        f"{bert.num_parameters():,} parameters, {bert.config.vocab_size:,} tokens, at most "
        f"{bert.config.max_position_embeddings:,} of them in a cell. Pretrained with Geneloom for "
        f"{record['step']:,} steps on {cells:,} cells ({names}).", "",
    ]  # fmt: skip
    if record["init"]:
        lines += [_start_sentence(record["init"]), ""]
    heldout = record["heldout"]
    if heldout:
        lines += [
            f"Held-out cells (n = {heldout['cells']}), 15 % of the genes hidden:", "",
            "| | cross-entropy (nats) | beyond arithmetic | top-1 | top-10 |",
            "|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in score_rows(heldout)), "",
            arithmetic_sentence(heldout),
        ]  # fmt: skip
    if record["prior"]:
        lines += [
            "", "The head's logits stand beside what counting tells of a hidden gene, in "
            f"`{PRIOR_NAME}`: the losses above are those of both together. Embeddings do not "
            "depend on it; for predictions of hidden genes add it:", "",
            "```python", "from pretrain.counting.arithmetic_prior import ArithmeticPrior, Hidden",
            "prior = ArithmeticPrior.load(folder, vocabulary)",
            "hidden = Hidden(input_ids, attention_mask, masked_places, labels)",
            "logits = prior.added_to(logits, hidden)", "```",
        ]  # fmt: skip
    lines += [
        "", "Input: ranked gene tokens. `vocabulary.json` holds genes, medians, special tokens and "
        f"encoding (hash `{record['vocabulary_sha256'][:12]}`); `geneloom embed` uses it. Settings "
        "and environment of the run: `geneloom.json`.", "",
        "```python", "from transformers import AutoModelForMaskedLM",
        'model = AutoModelForMaskedLM.from_pretrained("this folder")', "```", "",
    ]  # fmt: skip
    return "\n".join(lines)
