"""docs/formats.md is enough: its code alone gives the order of cells, and it names every field."""

from __future__ import annotations

import ast
import builtins
import functools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.hashing import mix64
from data_prep.prepare.options import PrepareOptions
from data_prep.prepare.run import prepare
from data_prep.prepare.work_list import choose_heldout_groups
from data_prep.shards.format import lay_out
from data_prep.shards.order import EpochPlan
from data_prep.shards.reader import ShardSet
from data_prep.sources.source_spec import SourceOptions, source_at
from tests.pages import section as section_of
from tests.pages import slug
from tests.synthetic import write_cells

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "formats.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
(ORDER,) = [block for block in BLOCKS if "def steps_of(" in block]
SPLITS = ("train", "heldout")


def definitions(code: str) -> SimpleNamespace:
    """Return the page's functions, without what it does with them."""
    tree = ast.parse(code)
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper())
    ]
    found: dict[str, Any] = {}
    builtins.exec(compile(tree, "formats.md", "exec"), found)
    return SimpleNamespace(**found)


def layout(*tars: tuple[str, int, list[int]], block_cells: int = 8) -> dict[str, Any]:
    """Return the part of a manifest that decides the order: split, length, cells of each tar."""
    shards = [
        {"split": split, "bucket_length": length, "cells": number}
        for split, length, cells in tars
        for number in cells
    ]
    return {"settings": {"block_cells": block_cells}, "shards": shards}


def plan_of(manifest: dict[str, Any], split: str, seed: int, tokens_per_step: int) -> EpochPlan:
    shards = ShardSet.__new__(ShardSet)
    shards._extents, _ = lay_out(manifest)
    return EpochPlan(shards, split, seed, tokens_per_step)


def epochs_of(plan: EpochPlan, number: int) -> list[list[list[int]]]:
    steps = plan.steps_per_epoch
    return [
        [plan.cells(plan.step(epoch * steps + i)).tolist() for i in range(steps)]
        for epoch in range(number)
    ]


LAYOUTS = {
    "one tar": layout(("train", 64, [203]), ("train", 128, [64]), ("heldout", 64, [9])),
    "tars, the last one short": layout(
        ("train", 32, [24, 24, 24, 24, 5]), ("train", 64, [16, 16, 16]), ("heldout", 32, [8, 3])
    ),
    "tars of different sizes": layout(
        ("train", 64, [16, 40, 24, 3]), ("train", 128, [8, 8, 16]), ("heldout", 64, [7])
    ),
    "steps of one cell": layout(("train", 64, [13]), ("train", 1000, [8, 2])),
    "many blocks": layout(("train", 16, [120] * 7 + [33]), block_cells=3),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_page_gives_the_order(name):
    page, manifest = definitions(ORDER), LAYOUTS[name]
    for split in {s["split"] for s in manifest["shards"]}:
        plan = plan_of(manifest, split, 5, 1500)
        found = [page.steps_of(manifest, split, 5, 1500, epoch) for epoch in range(2)]
        assert found == epochs_of(plan, 2)
        assert found[0] != found[1]


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("0x94D049BB133111EB", "0x94D049BB133111ED"),
        ("range(6)", "range(5)"),
        ("cells[0] if uniform else block", "block"),
        ('"cells", epoch, place', '"cells", place, epoch'),
        ("max(16,", "max(15,"),
        ("number < cells // run:", "number < cells // run - 1:"),
        ("(place << 48)", "(place << 32)"),
        ("// rest", "// (rest + 1)"),
    ],
)
def test_another_order_is_noticed(text, other):
    assert ORDER.count(text) == 1
    page, name = definitions(ORDER.replace(text, other)), "tars, the last one short"
    plan = plan_of(LAYOUTS[name], "train", 5, 1500)
    found = [page.steps_of(LAYOUTS[name], "train", 5, 1500, epoch) for epoch in range(2)]
    assert found != epochs_of(plan, 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Cells, shards of several tars a bucket, and what a run leaves that the page reads."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "simulated").mkdir()
    cells = write_cells(folder / "simulated" / "cells.h5ad", num_cells=300)
    options = PrepareOptions(
        seed=3, heldout_share=0.1, block_cells=4, shard_mib=0.002, vocabulary_min_cells=1
    )
    spec = source_at(cells, SourceOptions(columns=("cell_type", "donor")))
    prepare([spec], folder / "shards", None, options)
    shards = ShardSet(folder / "shards")
    plan = EpochPlan(shards, "train", 7, 2000)
    step = plan.steps_per_epoch + 5
    served = np.concatenate([plan.cells(plan.step(i)) for i in range(step)])
    record = {
        "step": step,
        "cells_seen": len(served),
        "cells_digest": f"{int(mix64(served).sum(dtype=np.uint64)):016x}",
        "recipe": {"run.seed": 7, "batch.tokens_per_step": 2000},
    }
    checkpoints = folder / "run" / "checkpoints"
    (checkpoints / "step").mkdir(parents=True)
    (checkpoints / "latest").write_text("step\n")
    (checkpoints / "step" / "checkpoint.json").write_text(json.dumps(record))
    (folder / "run" / "shards_manifest.json").write_text(json.dumps(shards.manifest))
    return folder


def test_page_gives_split_place_and_digest(home, monkeypatch):
    """Its code as it stands, on tars that share a bucket; and with a wrong digest, and hash."""
    manifest = json.loads((home / "shards" / "manifest.json").read_text())
    assert {1, 2} < {b["shards"] for b in manifest["buckets"]}
    monkeypatch.chdir(home)
    builtins.exec(compile(ORDER, "formats.md", "exec"), {})
    for text, other in (
        ("sum(map(mix64, served))", "sum(served)"),
        ('settings["seed"], "heldout"', '1, "heldout"'),
        ('settings["seed"], "shuffle"', '1, "shuffle"'),
    ):
        assert ORDER.count(text) == 1
        with pytest.raises(AssertionError):
            builtins.exec(compile(ORDER.replace(text, other), "formats.md", "exec"), {})


@pytest.mark.parametrize("seed", range(40))
def test_page_gives_heldout_groups(seed):
    """The rule as the page's sentences say it."""
    page, rng = definitions(ORDER), np.random.default_rng(seed)
    names = ["", "blood", "Herz", "größer", "d4", "d5"][: rng.integers(2, 7)]
    sizes = {name: int(rng.integers(1, 400)) for name in names}
    share = float(rng.uniform(0.1, 0.4))
    hashed = {
        n: page.keyed_hash(
            page.stream_key(seed, "heldout"),
            zlib.crc32(n.encode()) << 32 | zlib.adler32(n.encode()),
        )
        for n in names
    }
    wanted, taken = share * sum(sizes.values()), []
    for name in sorted(filter(None, names), key=hashed.__getitem__):
        before = sum(sizes[n] for n in taken)
        another_stays = len(taken) + 1 < len(names)
        if before < wanted and before + sizes[name] <= 2 * wanted and another_stays:
            taken.append(name)
    taken = taken or [min(filter(None, names), key=lambda n: (sizes[n], n))]
    options = PrepareOptions(seed=seed, heldout_share=share, heldout_by="tissue")
    if sum(sizes[n] for n in taken) > sum(sizes.values()) / 2 > wanted:
        with pytest.raises(ValueError, match="smallest choice of whole groups"):
            choose_heldout_groups(Counter(sizes), options)
    else:
        assert choose_heldout_groups(Counter(sizes), options) == tuple(sorted(taken))


def section(title: str) -> str:
    """Return the text below the heading that begins so, without code."""
    return re.sub(r"^```.*?^```", "", section_of(PAGE, slug(title), begins=True), flags=re.M | re.S)


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))


def keys(value: Any, free: Iterable[str]) -> Iterator[str]:
    """Yield the keys of JSON; not those below a key of `free`, which are the user's."""
    if isinstance(value, list):
        for part in value:
            yield from keys(part, free)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            if key not in free:
                yield from keys(part, free)


def test_page_names_every_field_of_shards(home):
    folder = home / "shards"
    found = {
        name: set(keys(json.loads((folder / name).read_text()), ("rejected", "aliases")))
        for name in ("manifest.json", "statistics.json", "vocabulary.json")
    }
    batch = ShardSet(folder).read_block(0).batch
    found["A member"] = set(batch.schema.names) - {"cell_type", "donor"}
    found["index.parquet"] = set(pq.read_schema(folder / "index.parquet").names)
    found["Vocabulary, format"] = found.pop("vocabulary.json")
    for title, fields in found.items():
        title = f"`{title}`" if "." in title else title
        assert not fields - named(section(title)), title
    # And the other way round: fields that a table names are there.
    rows = re.findall(r"^\| (`[^|]*) \|", section("`manifest.json`"), flags=re.M)
    assert named(" ".join(rows)) <= found["manifest.json"] and len(rows) > 12


@functools.cache
def functions(path: str) -> dict[str, ast.AST]:
    tree = ast.parse((ROOT / path).read_text())
    found: dict[str, ast.AST] = {}
    for node in ast.walk(tree):  # those of the module first
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, node)
    return found


def text_of(node: ast.AST | None) -> str | None:
    """Return a constant text, with N for what an f-string fills in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(v) or "N" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def written_keys(path: str, name: str) -> set[str]:
    """Return the keys of dictionaries in a function, or the fields of a data class."""
    owner, found = functions(path)[name], set()
    for node in ast.walk(owner):
        if isinstance(node, ast.Dict | ast.Set):
            texts = node.keys if isinstance(node, ast.Dict) else node.elts
            found |= {text_of(key) for key in texts}
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found.add(text_of(node.slice))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "record_event":
            found |= {k.arg for k in node.keywords} | {text_of(a) for a in node.args}
        elif isinstance(node, ast.DictComp):
            found |= {text_of(e) for g in node.generators for e in getattr(g.iter, "elts", [])}
        elif isinstance(owner, ast.ClassDef) and isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target))
    return {key for key in found if key}


FINETUNING, BENCHMARK = "Scores of a fine-tuning", "Results of a benchmark"
RUN = "Run folder"
WRITTEN = [
    (RUN, "data_prep/running/owner.py", "_mine"),
    (RUN, "data_prep/running/owner.py", "this_process"),
    (RUN, "pretrain/run_folder/ended.py", "_write"),
    (RUN, "pretrain/run_folder/run_record.py", "environment"),
    (RUN, "pretrain/start/warm_start.py", "compared"),
    (RUN, "pretrain/start/warm_start.py", "_compare_genes"),
    (RUN, "pretrain/start/warm_start.py", "_compare_medians"),
    (RUN, "pretrain/measure/not_finite.py", "_dump"),
    (RUN, "pretrain/measure/step_profile.py", "summarise"),
    ("`metrics.jsonl`", "pretrain/measure/metrics.py", "write"),
    ("`metrics.jsonl`", "pretrain/measure/metrics.py", "close_window"),
    ("`metrics.jsonl`", "pretrain/train.py", "_log_window"),
    ("`metrics.jsonl`", "pretrain/summary.py", "cells_record"),
    ("`metrics.jsonl`", "pretrain/checkpoints/publish.py", "_publish"),
    ("`metrics.jsonl`", "pretrain/measure/not_finite.py", "skip"),
    (RUN, "pretrain/start/continued.py", "_record"),
    ("DeepSpeed folder", "pretrain/export/to_deepspeed.py", "_client_state"),
    ("A checkpoint", "pretrain/run_folder/run_record.py", "run_record"),
    ("A checkpoint", "pretrain/summary.py", "cells_record"),
    ("A checkpoint", "pretrain/run_folder/run_record.py", "step_record"),
    ("A checkpoint", "pretrain/measure/not_finite.py", "record"),
    ("A checkpoint", "pretrain/checkpoints/publish.py", "_finish"),
    ("A checkpoint", "pretrain/checkpoints/publish.py", "_write_mine"),
    ("A checkpoint", "pretrain/checkpoints/checkpoint.py", "write_record"),
    ("`launch/`", "launch/attempts/supervise.py", "_write_rank_settings"),
    ("`launch/`", "launch/attempts/supervise.py", "run"),
    ("`launch/`", "launch/ways/requeue.py", "requeue_code"),
    ("`launch/`", "launch/ways/slurm.py", "launch_slurm"),
    ("`launch/`", "launch/attempts/rank_logs.py", "record_event"),
    ("`launch/`", "launch/attempts/rank.py", "main"),
    ("Model folder", "pretrain/export/model_folder.py", "export_record"),
    ("A perturbation screen", "eval/perturb/screen/run.py", "_begin"),
    ("A perturbation screen", "eval/perturb/screen/results.py", "begin"),
    ("Other tables", "eval/cells/attention_tables.py", "attention_file"),
    ("Other tables", "eval/simulate/write.py", "simulate"),
    (FINETUNING, "eval/finetune/score_cells.py", "finetune_cells"),
    (FINETUNING, "eval/finetune/score_cells.py", "_score_seed"),
    (FINETUNING, "eval/finetune/settings.py", "FinetuneSettings"),
    (FINETUNING, "eval/finetune/results.py", "training_record"),
    (FINETUNING, "eval/finetune/results.py", "summarise"),
    (FINETUNING, "eval/benchmark/finetune_genes.py", "finetune_genes"),
    (FINETUNING, "eval/benchmark/finetune_genes.py", "_results"),
    (FINETUNING, "eval/benchmark/finetune_genes.py", "_fold"),
    (FINETUNING, "eval/benchmark/contest/over_genes.py", "table_of_genes"),
    (FINETUNING, "eval/scores/metrics.py", "score_classes"),
    (FINETUNING, "eval/scores/metrics.py", "mean_and_interval"),
    ("Embeddings", "eval/cells/embed_genes.py", "embed_genes_file"),
    ("Embeddings", "eval/cells/embedded_parts.py", "as_json"),
    ("Does more data pay", "eval/saturate/run.py", "saturate"),
    ("Does more data pay", "eval/saturate/run.py", "_record"),
    ("Does more data pay", "eval/saturate/run.py", "_sizes"),
    ("Does more data pay", "eval/saturate/run.py", "_fitted"),
    ("Does more data pay", "eval/saturate/report/fit.py", "gains"),
    ("Does more data pay", "eval/saturate/report/fit.py", "with_interval"),
    ("Does more data pay", "eval/saturate/probes.py", "probe_size"),
    ("A classifier", "eval/finetune/classifier.py", "save_classifier"),
    ("A classifier", "eval/finetune/classifier.py", "Head"),
    (BENCHMARK, "eval/benchmark/run.py", "run_benchmark"),
    (BENCHMARK, "eval/benchmark/run.py", "_run_task"),
    (BENCHMARK, "eval/benchmark/run.py", "_describe"),
    (BENCHMARK, "eval/benchmark/run.py", "_skipped"),
    (BENCHMARK, "eval/benchmark/run.py", "_claim"),
    (BENCHMARK, "eval/benchmark/outcome.py", "Outcome"),
    (BENCHMARK, "eval/benchmark/outcome.py", "TaskRun"),
    (BENCHMARK, "eval/benchmark/outcome.py", "outcome"),
    (BENCHMARK, "eval/benchmark/contest/verdicts.py", "summarise"),
    (BENCHMARK, "eval/benchmark/contest/verdicts.py", "_compare"),
    (BENCHMARK, "eval/benchmark/contest/verdicts.py", "holm"),
]
# Keys of what never stays on disk, or has a name of its own.
ELSEWHERE = {
    "_write_mine": {"error"},
    # What a checkpoint says that goes on from another program's is never written as such.
    "_record": {"cells_seen", "cells_digest", "cells_quarantined", "prior", "init"},
    "finetune_cells": {"limits"},
    "FinetuneSettings": {"reads"},  # of keys
    "table_of_genes": {"occurrences"},
    "_score_seed": {"fine-tuned, N", "frozen embedding, N"},
    "_write_rank_settings": {"GENELOOM_LAUNCH_COMMAND"},
}


@pytest.mark.parametrize(("title", "path", "name"), WRITTEN)
def test_page_names_what_the_code_writes(title, path, name):
    found = written_keys(path, name) - ELSEWHERE.get(name, set())
    assert found, f"{path}: {name} writes nothing; has it moved?"
    assert not found - named(section(title))


def test_page_names_scores_of_heldout_cells():
    from pretrain.counting.baselines import BASELINE_NAMES
    from pretrain.measure.heldout import heldout_record

    class Scores(dict):
        def __missing__(self, key: str) -> str:
            return key

    curves: dict[str, Any] = {"loss": 1.0, "loss_by_rank_decile": []}
    curves |= {"loss_by_bucket": {}, "loss_by_dataset": {}}
    baselines = {"NAME": Scores(), "arithmetic": Scores(curves)}
    evaluation = SimpleNamespace(
        baselines=baselines, num_cells=1, without_arithmetic="no medians", prior="arithmetic"
    )
    record = heldout_record(Scores(curves), evaluation, "remark")  # type: ignore[arg-type]
    assert "baseline_NAME_top10" in record
    record = {k: v for k, v in record.items() if not k.startswith("baseline_arithmetic")}
    assert not {*record, *BASELINE_NAMES} - named(section("`metrics.jsonl`"))
