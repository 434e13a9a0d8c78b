"""Which trainings a measurement of saturation consists of, what they cost, and whether they ended.

Every size is an ordinary run of ``geneloom pretrain`` with `data.share`, in a folder of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from eval.saturate.settings import SaturateOptions
from pretrain.config import RunConfig, load_config
from pretrain.plan.corpus import Corpus, read_corpus
from pretrain.plan.flops import GPUS
from pretrain.plan.needs import make_plan

RUNS_NAME, CELLS_NAME = "runs", "heldout_cells.parquet"
# These are what a size differs in, so they are not the user's.
_OWN = ("data.shards", "data.share", "run.out", "evaluation.every_steps")


@dataclass(frozen=True)
class Training:
    """One training: a share of the cells, a part of the tokens, a seed.

    Attributes
    ----------
    arguments
        Of ``geneloom pretrain``.
    """

    name: str
    share: float
    tokens_part: float
    config: RunConfig
    corpus: Corpus
    max_length: int
    steps: int
    arguments: tuple[str, ...]

    @property
    def run(self) -> Path:
        return self.config.run.out

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def tokens(self) -> int:
        """Expected number of real tokens of the whole training."""
        return round(self.corpus.tokens / self._steps_per_epoch * self.steps)

    @property
    def epochs(self) -> float:
        """How often each cell is seen."""
        return self.steps / self._steps_per_epoch

    @property
    def _steps_per_epoch(self) -> int:
        return self.corpus.num_steps(self.config.batch.tokens_per_step)

    def is_done(self) -> bool:
        """Return whether the run has scored the held-out cells after its last step."""
        path = self.run / CELLS_NAME
        if not path.is_file():
            return False
        return (pq.read_schema(path).metadata or {}).get(b"step") == str(self.steps).encode()

    def estimate(self, options: SaturateOptions) -> dict[str, Any]:
        """Return what ``geneloom plan`` says of this training."""
        gpu, gpus = GPUS[options.gpu], options.gpus
        return make_plan(self.config, self.corpus, self.max_length, gpu, gpus, options.speed)


def plan_trainings(
    shards: Path | str, out: Path, config: str, overrides: Sequence[str], options: SaturateOptions
) -> list[Training]:
    """Return the trainings, the smallest share first, for each seed.

    The last of each seed has the whole corpus and half the tokens: beside the whole corpus with all
    tokens it tells what tokens bring where cells stay the same.

    Raises
    ------
    ValueError
        The settings are wrong, name what each size has of its own, or leave a size without steps
        or without held-out cells.
    """
    from pretrain.optim import require_reachable_peak  # imports torch

    for override in overrides:
        if override.partition("=")[0] in _OWN:
            raise ValueError(f"{override}: each size has its own; leave it out")
    if options.gpu not in GPUS:
        raise ValueError(f"--gpu {options.gpu}: known are {', '.join(GPUS)}")
    given = [*overrides, f"data.shards={shards}"]
    whole = load_config(config, [*given, f"run.out={out / RUNS_NAME}"])
    corpus, _ = read_corpus(whole, 0, 0, 0, 0)
    per_epoch = corpus.num_steps(whole.batch.tokens_per_step)
    steps = whole.run.total_steps(per_epoch)
    if steps < 2:
        raise ValueError(
            f"{shards}: {steps} step for the whole corpus, which cannot be halved; give more "
            "run.epochs, or a smaller batch.tokens_per_step"
        )
    # Warm-ups are scaled with the steps: if that of the whole does not fit, no training starts.
    require_reachable_peak(whole.optim, steps)
    sizes = [(share, 1.0) for share in options.shares] + [(1.0, 0.5)]
    made = []
    for seed in range(options.seeds):
        more = [*given, f"run.seed={whole.run.seed + seed}"]
        for share, part in sizes:
            wanted = corpus.tokens / per_epoch * steps * part
            if options.equal == "epochs":
                wanted *= share
            made.append(_training(out, config, more, (share, part, seed), wanted, steps))
    return made


def _training(
    out: Path,
    config: str,
    given: list[str],
    size: tuple[float, float, int],
    tokens: float,
    whole_steps: int,
) -> Training:
    share, part, seed = size
    name = f"cells-{share:g}" + ("-half-tokens" if part < 1 else "")
    name += f"-seed-{seed}" if seed else ""
    given = [*given, f"data.share={share}", f"run.out={(out / RUNS_NAME / name).absolute()}"]
    found = load_config(config, given)
    corpus, max_length = read_corpus(found, 0, 0, 0, 0)
    per_epoch = corpus.num_steps(found.batch.tokens_per_step)
    # A step of few cells holds fewer tokens, for it has the cells of one bucket.
    steps = max(1, round(tokens / (corpus.tokens / per_epoch)))
    settings = [
        f"run.max_steps={steps}", f"run.epochs={-(-steps // per_epoch)}",
        f"evaluation.every_steps={steps}",
        # Otherwise a short training would end before its rates have risen.
        *(f"optim.{k}={round(n * steps / whole_steps)}" for k, n in _warmups(found).items()),
    ]  # fmt: skip
    given = [*given, *settings]
    arguments = ("--config", config, *given)
    settled = load_config(config, given)
    return Training(name, share, part, settled, corpus, max_length, steps, arguments)


def _warmups(config: RunConfig) -> dict[str, int]:
    found = {"warmup_steps": config.optim.warmup_steps}
    if config.optim.muon_warmup_steps is not None:
        found["muon_warmup_steps"] = config.optim.muon_warmup_steps
    return found
