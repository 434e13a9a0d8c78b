"""Describe the cells that a plan is made for: those of shards, or an assumed corpus.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist

import numpy as np

from data_prep.shards.reader import ShardSet
from pretrain.config import RunConfig, load_config
from pretrain.options import CorpusOptions

_NOT_GIVEN = "."
_BUCKET = 64
# These values are from recorded runs: docs/results.md.
_BYTES_PER_TOKEN = 2.05
_LOG_SD = 0.5


@dataclass(frozen=True)
class Corpus:
    """The training corpus: cells, real tokens, and (padded length, cells) of each bucket."""

    cells: int
    tokens: int
    buckets: Sequence[tuple[int, int]]
    num_tokens: int
    bytes_per_token: float

    @property
    def padded_tokens(self) -> int:
        return sum(length * cells for length, cells in self.buckets)

    @property
    def longest(self) -> int:
        return max(length for length, _ in self.buckets)

    def shown(self, subset: int | None) -> Corpus:
        """Return the corpus in which each cell shows at most `subset` genes; None: all genes."""
        if subset is None:
            return self
        buckets = [(min(length, subset), cells) for length, cells in self.buckets]
        tokens = min(self.tokens, sum(length * cells for length, cells in buckets))
        # The loader still reads whole cells.
        read = self.bytes_per_token * self.tokens / tokens
        return Corpus(self.cells, tokens, buckets, self.num_tokens, read)

    def num_steps(self, tokens_per_step: int) -> int:
        """Return the optimizer steps of an epoch, as `data_prep.shards.order` divides it."""
        return sum(-(-cells // max(1, tokens_per_step // length)) for length, cells in self.buckets)


def read_config(config: str, overrides: list[str]) -> RunConfig:
    """Return a run configuration; shards and run folder may be missing, as a plan needs neither."""
    try:
        return load_config(config, overrides)
    except ValueError:
        given = {o.split("=")[0] for o in overrides}
        needed = ("data.shards", "run.out")
        assumed = [f"{k}={_NOT_GIVEN}" for k in needed if k not in given]
        return load_config(config, [*overrides, *assumed])


def has_shards(config: RunConfig) -> bool:
    """Return whether a configuration of `read_config` names shards."""
    return config.data.shards != _NOT_GIVEN


@dataclass(frozen=True)
class AssumedCorpus:
    """An assumed corpus for plans without shards: number and lengths of its cells."""

    name: str
    cells: int
    mean_tokens: int
    max_tokens: int
    vocabulary_size: int

    def sentence(self) -> str:
        """Return a sentence that tells what is assumed."""
        return (
            f"assumed, for no shards were given: {self.name}: {self.cells:,} cells of "
            f"{self.mean_tokens:,} tokens on average, at most {self.max_tokens:,}, vocabulary "
            f"{self.vocabulary_size:,}; give --shards, or --cells, --mean-tokens, --max-tokens "
            "and --vocabulary-size"
        )


# Numbers of genes and cells are from Geneformer's papers and dictionaries; lengths are means of its
# tokens.
_V1 = AssumedCorpus("Genecorpus-30M, vocabulary of V1", 27_400_000, 1_100, 2_048, 25_426)
_V2 = AssumedCorpus("Genecorpus-104M, vocabulary of V2", 104_000_000, 1_440, 4_096, 20_275)
_CORPORA = {"geneformer_v2_104m": _V2, "geneformer_v2_316m": _V2, "geneloom_100m": _V2}


def assumed_corpus(config: str, given: CorpusOptions = CorpusOptions()) -> AssumedCorpus:
    """Return the corpus of a supplied recipe (of V1 for any other), with what was said of it."""
    usual = _CORPORA.get(config, _V1)
    said = {name: value for name, value in asdict(given).items() if value is not None}
    return replace(
        usual, **said, name=f"{usual.name}, but for what was given" if said else usual.name
    )


def read_corpus(
    config: RunConfig, cells: int, mean_tokens: int, max_tokens: int, vocabulary_size: int
) -> tuple[Corpus, int]:
    """Return the corpus of data.shards, or an assumed one of `cells` cells, and its maximum length.

    Lengths of an assumed corpus are log-normal, cut at the maximum, in buckets of 64: with a mean
    of 1,100 about 7 % of the cells reach 2,048, as the paper reports for Genecorpus-30M.
    """
    if has_shards(config):
        shards = ShardSet(config.data.shards, config.data.cache, share=config.data.share)
        train = {b["length"]: b for b in shards.manifest["buckets"] if b["split"] == "train"}
        lengths = [(e.length, e.num_cells) for e in shards.extents("train")]
        cells = sum(n for _, n in lengths)
        # The cells of a bucket are nearly as long as each other.
        tokens = round(sum(train[k]["tokens"] * n / train[k]["cells"] for k, n in lengths))
        size = sum(b["bytes"] for b in train.values()) / sum(b["tokens"] for b in train.values())
        corpus = Corpus(cells, tokens, lengths, shards.vocabulary.num_tokens, size)
        return corpus.shown(config.masking.subset), shards.vocabulary.max_length
    if mean_tokens >= max_tokens:
        raise ValueError(f"--mean-tokens {mean_tokens}: must be below --max-tokens {max_tokens}")
    lengths = _assumed_lengths(mean_tokens, max_tokens)
    buckets = np.unique(-(-lengths // _BUCKET) * _BUCKET, return_counts=True)
    counted = [(int(b), round(n * cells / len(lengths))) for b, n in zip(*buckets, strict=True)]
    tokens = round(cells * float(lengths.mean()))
    corpus = Corpus(cells, tokens, counted, vocabulary_size, _BYTES_PER_TOKEN)
    return corpus.shown(config.masking.subset), max_tokens


def _assumed_lengths(mean_tokens: int, max_tokens: int) -> np.ndarray:
    """Return int64 [2000] cell lengths with the given mean: log-normal, cut at the maximum."""
    places = (np.arange(2000) + 0.5) / 2000
    shape = np.exp(_LOG_SD * np.array([NormalDist().inv_cdf(p) for p in places]))
    low, high = 0.0, float(max_tokens) * 100
    for _ in range(100):
        middle = (low + high) / 2
        is_low = np.minimum(middle * shape, max_tokens).mean() < mean_tokens
        low, high = (middle, high) if is_low else (low, middle)
    return np.clip(np.rint(low * shape), 1, max_tokens).astype(np.int64)
