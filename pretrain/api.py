"""For notebooks and programs: pretraining and export as functions, with the commands' settings.

Torch and DeepSpeed are imported when a function is called.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pretrain.config import RunConfig, load_config
from pretrain.options import StartOptions

if TYPE_CHECKING:
    from pretrain.summary import RunSummary

__all__ = ["RunConfig", "StartOptions", "export", "load_config", "train"]


def train(config: RunConfig, start: StartOptions = StartOptions()) -> RunSummary:
    """Pretrain as ``geneloom pretrain``; under a launcher every rank calls it.

    The environment is afterwards what it was: a process that is no rank of a launcher can train
    again, and start other programs.

    Parameters
    ----------
    config
        Of `load_config`: a YAML file or the name of a supplied one, and ``section.field=value``.

    Raises
    ------
    ValueError
        Wrong settings or data, before anything is written; more in `pretrain.train.train`.

    Examples
    --------
    >>> config = load_config("tiny", ["data.shards=shards", "run.out=run", "run.max_steps=60"])
    >>> train(config).heldout["loss"]
    """
    before = dict(os.environ)
    try:
        return train_as_rank(config, start)
    except BaseException:
        if "RANK" not in before:  # alone, so nobody waits for this rank to leave
            from pretrain.ranks import dist

            dist.leave()
        raise
    finally:
        os.environ.clear()
        os.environ.update(before)


def train_as_rank(config: RunConfig, start: StartOptions) -> RunSummary:
    """Train in a process that is there for this alone, and keeps its environment of a rank."""
    # A connection that ends is told in one line here, with torch's own warnings in thirty.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it
        # NCCL else chooses how to add up by size and network, anew at each start.
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NCCL_PROTO", "Simple")
    # Torch asks for large pages then: a tenth less time on a CPU, no more memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Heavy imports only now: a wrong setting is told in half a second.
    from pretrain import train as training
    from pretrain.ranks import dist

    resume = "if-saved" if start.restart else start.resume
    summary = training.train(config, resume, start.allow_changes, start.profile, start.step)
    dist.leave()
    return summary


def export(
    run: Path | str,
    out: Path | str,
    step: int | Literal["best"] | None = None,
    shards: Path | str | None = None,
    state_cells: int | None = None,
) -> str:
    """Write a checkpoint as a Hugging Face folder and return a sentence: ``geneloom export``.

    Parameters and errors as of `pretrain.export.model_folder.export`; `state_cells` None: as many
    as its default says.

    Examples
    --------
    >>> export("run", "model")
    """
    use_cpu_where_no_gpu()
    import torch

    from pretrain.export import model_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cells = model_folder.NUM_CELLS if state_cells is None else state_cells
    return model_folder.export(Path(run), Path(out), step, shards, cells, device)


def use_cpu_where_no_gpu() -> None:
    """Silence what transformers and DeepSpeed say at an export that is none of the user's."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    if not torch.cuda.is_available():
        # Transformers imports DeepSpeed to save, which would warn that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    disable_progress_bar()
    # DeepSpeed calls a function that torch has renamed; nothing for the user to do.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
