"""DeepSpeed's own checkpoints, out and in: DeepSpeed reads ours, we read those that it writes."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards.reader import ShardSet
from pretrain.config import RunConfig, load_config
from tests.ranks import run_new_ranks, run_ranks
from tests.runs import final_state, metrics, require_same_state, run_training, tiny_config

KINDS = {"weight": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


# Out


def export_all(run: Path, cases: dict[Path, tuple[int, int]]) -> dict[Path, str]:
    """Export a run for each (stage, number of ranks), in a rank's process."""
    import deepspeed.checkpoint.ds_to_universal as universal
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from pretrain.export.to_deepspeed import export_deepspeed

    said = {}
    for out, (stage, ranks) in cases.items():
        said[out] = export_deepspeed(run, out, None, stage, ranks)
        weights = get_fp32_state_dict_from_zero_checkpoint(str(out))
        np.savez(out / "fp32.npz", **{n: t.detach().numpy() for n, t in weights.items()})
        universal.main(
            argparse.Namespace(
                input_folder=str(out / "global_step10"), strict=True, keep_temp_folder=False,
                output_folder=str(out / "universal"), num_extract_workers=1, num_merge_workers=1,
                inject_missing_state=False,
            )
        )  # fmt: skip
    universal.cnt = 0
    return said


def load_by_deepspeed(folder: Path, stage: int) -> dict[str, Any]:
    """Load a folder as a program that knows DeepSpeed alone; called by every rank."""
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from transformers import AutoConfig, AutoModelForMaskedLM

    from pretrain.ranks import dist

    dist.start(60, 1)
    torch.manual_seed(7)
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": 0.001},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups), config=config
    )
    path, client = engine.load_checkpoint(str(folder))
    assert path is not None
    if stage < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, Any] = {"client": client["geneloom"], "steps": engine.global_steps}
    for name, p in engine.module.named_parameters():
        found[name] = {
            "weight": safe_get_full_fp32_param(p).clone().numpy().ravel(),
            "exp_avg": safe_get_full_optimizer_state(p, "exp_avg").clone().numpy().ravel(),
            "exp_avg_sq": safe_get_full_optimizer_state(p, "exp_avg_sq").clone().numpy().ravel(),
        }
    states = engine.optimizer.optimizer.state.values()
    found["adam_steps"] = sorted({float(s["step"]) for s in states if "step" in s})
    dist.leave()
    return found


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> dict[int, Path]:
    """Folders for two ranks at ZeRO 1 and 3, with what DeepSpeed's own programs make of them."""
    base = tmp_path_factory.mktemp("exported")
    folders = {stage: base / f"zero{stage}" for stage in (1, 3)}
    cases = {folder: (stage, 2) for stage, folder in folders.items()}
    said = run_ranks(1, export_all, trained, cases)[0]
    assert said[folders[3]] == (
        f"{folders[3]}/global_step10: ZeRO 3, 2 ranks, weights and moments of step 10"
    )
    return folders


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_loads_what_was_exported(stage, exported, trained):
    expected = final_state(trained)
    for found in run_ranks(2, load_by_deepspeed, exported[stage], stage):
        client, steps, adam = (found.pop(k) for k in ("client", "steps", "adam_steps"))
        assert len(found) == len(expected["weight"])
        for name, kinds in found.items():
            for kind, values in kinds.items():
                theirs = expected[kind][f"bert.{name}"]
                np.testing.assert_array_equal(values, theirs, err_msg=f"{kind} of {name}")
        assert steps == 10 and adam == [10.0]
        assert client["step"] == 10 and client["position"]["seed"] == 0
        assert client["configuration"]["optim"]["learning_rate"] == 5e-3
        assert client["cells_seen"] > 0 and len(client["shards_fingerprint"]) == 64


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_own_programs_read_what_was_exported(stage, exported, trained):
    import torch

    expected = final_state(trained)
    with np.load(exported[stage] / "fp32.npz") as weights:
        for name, values in expected["weight"].items():
            own = weights[name.removeprefix("bert.")].ravel()
            np.testing.assert_array_equal(own, values, err_msg=name)
    for kind, file in KINDS.items():
        for name, values in expected[kind].items():
            path = exported[stage] / "universal" / "zero" / name.removeprefix("bert.")
            found = torch.load(path / f"{file}.pt", weights_only=True)
            found = (found["param"] if isinstance(found, dict) else found).detach().flatten()
            np.testing.assert_array_equal(found.numpy(), values, err_msg=f"{kind} of {name}")


def export_and_read(run: Path, out: Path, stage: int, ranks: int) -> bool:
    """Export a run; return whether a reader of ours finds all of its bits in the folder."""
    import torch

    from pretrain.checkpoints import checkpoint
    from pretrain.export.to_deepspeed import export_deepspeed
    from pretrain.start.from_deepspeed import DeepSpeedReader

    export_deepspeed(run, out, None, stage, ranks)
    own, found = checkpoint.find(run).reader(), DeepSpeedReader(out / "global_step10")
    return found.has_moments(found.shapes) and all(
        torch.equal(
            own.read(kind, f"bert.{name}", 0, shape.numel()),
            found.read(kind, name, 0, shape.numel()),
        )
        for name, shape in found.shapes.items()
        for kind in KINDS
    )


@pytest.mark.long
@pytest.mark.parametrize(("stage", "ranks"), [(1, 3), (2, 2), (3, 3)])
def test_a_run_in_bf16_without_zero_is_exported_bit_for_bit(stage, ranks, shards, tmp_path):
    changes = {"run__precision": "bf16", "run__deepspeed": "zero0"}
    config = tiny_config(shards, tmp_path / "run", **changes)
    run_ranks(1, run_training, config)
    assert run_ranks(1, export_and_read, config.run.out, tmp_path / "out", stage, ranks) == [True]


def test_nothing_of_the_machine_is_exported(exported, trained, shards):
    for path in exported[1].rglob("*"):
        if path.is_file() and path.parent.name != "zero":
            content = path.read_bytes()
            assert str(trained).encode() not in content, path
            assert str(shards).encode() not in content, path


def test_wrong_wishes_are_refused(trained, tmp_path):
    from pretrain.cli import export_command

    with pytest.raises(ValueError, match="--zero 4: must be 1, 2 or 3"):
        export_command(run=trained, out=tmp_path / "a", to="deepspeed", zero=4)
    with pytest.raises(ValueError, match="--zero, --ranks: belong to --to deepspeed"):
        export_command(run=trained, out=tmp_path / "a", zero=1)
    with pytest.raises(ValueError, match="no checkpoint of step 7; kept are those of steps 5, 10"):
        export_command(run=trained, out=tmp_path / "a", to="deepspeed", step="7")
    assert not (tmp_path / "a").exists()


# In


def going_on(folder: Path, shards: Path, out: Path, *more: str) -> RunConfig:
    """Return what ``--config continue --resume-from FOLDER`` makes of a folder, in small."""
    settings = [
        f"model.init_from={folder}", "model.init_moments=true", f"data.shards={shards}",
        f"run.out={out}", "data.num_workers=0", "run.threads=1", "run.epochs=50",
        "run.max_steps=10", "run.log_every_steps=1", "batch.tokens_per_step=1024",
        "batch.tokens_per_micro_batch=512", "optim.learning_rate=5e-3", "optim.warmup_steps=3",
        "evaluation.max_cells=20", "checkpoint.every_steps=5", "model.hidden_dropout=0",
        "model.attention_dropout=0",
    ]  # fmt: skip
    return load_config("continue", [*settings, *more])


def export_of_step_5(run: Path, out: Path) -> None:
    from pretrain.export.to_deepspeed import export_deepspeed

    export_deepspeed(run, out, 5, 3, 2)


def test_out_and_in_again_is_the_run_that_was_never_interrupted(trained, shards, tmp_path):
    """The seed is the same and so is the step: also the order of cells is."""
    folder = tmp_path / "deepspeed"
    run_ranks(1, export_of_step_5, trained, folder)
    start = {"model__init_from": folder, "model__init_moments": True}
    config = tiny_config(shards, tmp_path / "run", **start)
    summary, _ = run_ranks(1, run_training, config)[0]
    assert (summary.first_step, summary.last_step) == (5, 10)
    require_same_state(tmp_path / "run", trained)
    assert [m["step"] for m in metrics(tmp_path / "run", "train")] == [6, 7, 8, 9, 10]
    init = json.loads((tmp_path / "run" / "init.json").read_text())
    assert init["continued"]["step"] == init["continued"]["updates"] == 5
    # The same command goes on from its own checkpoints, the folder is no longer needed.
    shutil.rmtree(folder)
    again, _ = run_ranks(1, run_training, config, True)[0]
    assert again.first_step == 10


def universal_reads_alike(folders: dict[int, Path]) -> None:
    import torch

    from pretrain.start.from_deepspeed import DeepSpeedReader, find_tag

    first = DeepSpeedReader(folders[1] / "global_step10")
    folders_of_tags = [folders[3] / "global_step10", *(f / "universal" for f in folders.values())]
    for tag in folders_of_tags:
        other = DeepSpeedReader(tag)
        # Of ZeRO 3 a universal checkpoint leaves the step out; tied copies are there as weights.
        assert other.steps == 10 and other.updates in (10, None)
        assert other.has_moments(first.shapes) and other.shapes.items() >= first.shapes.items()
        for name, shape in first.shapes.items():
            for kind in KINDS:
                one, two = (r.read(kind, name, 0, shape.numel()) for r in (first, other))
                assert torch.equal(one, two), (kind, name)
    assert find_tag(folders[1]) == folders[1] / "global_step10"


def test_all_kinds_hold_the_same(exported):
    run_ranks(1, universal_reads_alike, exported)


def train_with_trainer(out: Path, stage: int, bf16: bool, kind: str, size: int) -> dict[str, Any]:
    """Train three steps by Hugging Face's Trainer with DeepSpeed; return what DeepSpeed holds."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as `dist` does
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from transformers import Trainer, TrainingArguments

    settings = {
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True, "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=4, max_steps=3, save_steps=3,
        save_strategy="steps", learning_rate=1e-2, warmup_steps=1, weight_decay=0.001,
        deepspeed=settings, use_cpu=True, bf16=bf16, report_to=[], seed=1, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    numbers = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(4, size, (12,), generator=numbers)} for _ in range(64)]
    data: Any = [row | {"labels": row["input_ids"]} for row in rows]
    trainer = Trainer(model=network(kind, size), args=arguments, train_dataset=data)
    trainer.train()
    engine: Any = trainer.model_wrapped
    if stage < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, p in engine.module.named_parameters():
        moments = {k: safe_get_full_optimizer_state(p, k) for k in ("exp_avg", "exp_avg_sq")}
        values = {"weight": safe_get_full_fp32_param(p)} | moments
        found[name] = {k: v.clone().float().numpy().ravel() for k, v in values.items()}
    return found


def network(kind: str, size: int) -> Any:
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        ModernBertConfig,
        ModernBertForMaskedLM,
    )

    common = {
        "vocab_size": size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "pad_token_id": 0, "max_position_embeddings": 2048,
    }  # fmt: skip
    if kind == "bert":
        return BertForMaskedLM(BertConfig(hidden_act="relu", **common))
    words = dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"))
    return ModernBertForMaskedLM(
        ModernBertConfig(decoder_bias=True, tie_word_embeddings=True, **words, **common)
    )


def state_to_start_from(config: RunConfig) -> dict[str, dict[str, np.ndarray]]:
    """Return the live weights and moments of an engine before its first step."""
    from pretrain.checkpoints.zero_state import owned_fragments
    from pretrain.ds_config import derive_ds_config
    from pretrain.engine import Engine
    from pretrain.ranks import dist
    from pretrain.start.continued import foreign_checkpoint

    ranks = dist.start(60, 1)
    shards = ShardSet(config.data.shards)
    last = foreign_checkpoint(config, shards, 10)
    engine = Engine(config, derive_ds_config(config), shards, ranks, last)
    found: dict[str, dict[str, np.ndarray]] = {}
    for fragment in owned_fragments(engine.deepspeed, engine.stage, ranks.rank):
        for kind, tensor in fragment.tensors.items():
            own = found.setdefault(fragment.name.removeprefix("bert."), {})
            own[kind] = tensor.clone().numpy()
        own["step"] = np.array([float(fragment.state["step"])])
    dist.leave()
    return found


@pytest.mark.parametrize(
    ("stage", "bf16", "kind"),
    [
        (2, False, "bert"),
        pytest.param(1, True, "bert", marks=pytest.mark.long),
        pytest.param(3, True, "modernbert", marks=pytest.mark.long),
        pytest.param(3, False, "bert", marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_of_the_trainer_is_gone_on_from(stage, bf16, kind, shards, tmp_path):
    vocabulary = ShardSet(shards).vocabulary
    theirs = run_new_ranks(
        2, train_with_trainer, tmp_path / "trainer", stage, bf16, kind, vocabulary.num_tokens
    )[0]
    folder = tmp_path / "trainer" / "checkpoint-3"
    vocabulary.save(folder / "vocabulary.json")
    config = going_on(folder, shards, tmp_path / "run")
    own = run_ranks(1, state_to_start_from, config)[0]
    assert own.keys() == theirs.keys()
    for name, kinds in theirs.items():
        assert own[name].pop("step") == 3
        for what, values in kinds.items():
            np.testing.assert_array_equal(own[name][what], values, err_msg=f"{what} of {name}")
    summary, _ = run_ranks(1, run_training, config)[0]
    assert (summary.first_step, summary.last_step) == (3, 10)
    assert summary.losses[-1] < summary.losses[0]
    assert json.loads((tmp_path / "run" / "init.json").read_text())["continued"]["step"] == 3
    dry = going_on(folder, shards, tmp_path / "dry")
    assert run_ranks(1, weights_of_a_dry_run, dry)[0].startswith(f"go on at step 3 from {folder}")


def weights_of_a_dry_run(config: RunConfig) -> str:
    from pretrain.cli import resolved

    return resolved(config)["weights"]


# What else a folder may hold


class Canary:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refusals(exported: dict[int, Path], shards: Path, base: Path) -> dict[str, str]:
    """Return what is said of folders that cannot be gone on from, in a rank's process."""
    import torch

    from pretrain.start.continued import foreign_checkpoint

    said = {}

    def refused(name: str, folder: Path, *more: str, steps: int = 30) -> None:
        try:
            config = going_on(folder, shards, base / "run", *more)
            foreign_checkpoint(config, ShardSet(shards), steps)
            said[name] = "not refused"
        except ValueError as error:
            said[name] = str(error)

    def copy(name: str, stage: int = 1) -> Path:
        return Path(shutil.copytree(exported[stage], base / name)) / "global_step10"

    tag = copy("canary")
    model = tag / "mp_rank_00_model_states.pt"
    content = torch.load(model, weights_only=False)
    torch.save(content | {"extra": Canary(base / "hacked")}, model)
    refused("canary", tag.parent)
    with (tag / "mp_rank_00_model_states.pt").open("wb") as file:
        pickle.dump({"extra": Canary(base / "hacked")}, file)
    refused("old canary", tag.parent)
    tag = copy("rank")
    (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    refused("rank", tag.parent)
    tag = copy("cut", 3)
    path = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:5000])
    refused("cut", tag.parent)
    tag = copy("zero0")
    for path in tag.glob("*_optim_states.pt"):
        path.unlink()
    refused("zero0", tag.parent)
    tag = copy("latest")
    (tag.parent / "latest").write_text("../global_step10")
    refused("latest", tag.parent)
    refused("muon", exported[1], "optim.kind=muon")
    refused("steps", exported[1], steps=10)
    tag = copy("divided")
    (tag / "mp_rank_01_model_states.pt").write_bytes(b"")
    refused("divided", tag.parent)
    said["canary ran"] = str((base / "hacked").exists())
    return said


def test_what_cannot_be_gone_on_from_says_why(exported, shards, tmp_path):
    said = run_ranks(1, refusals, exported, shards, tmp_path)[0]
    expected = {
        "canary": "refused as a pickle: it asks for posix.mkdir",
        "old canary": "refused as a pickle",
        "rank": "2 ranks saved, files of 1 are there",
        "cut": "is damaged or cut off",
        "zero0": "files of ZeRO 0 without AdamW's moments by name",
        "latest": "`latest` names '../global_step10', which holds no DeepSpeed checkpoint",
        "muon": "moments of AdamW are of no use to optim.kind=muon",
        "steps": "has done 10 steps, this run would end at step 10",
        "divided": "of a model divided by tensor parallelism",
        "canary ran": "False",
    }
    for name, text in expected.items():
        assert text in said[name], f"{name}: {said[name]}"
    assert said.keys() == expected.keys()


def consolidated(exported: dict[int, Path], shards: Path, base: Path) -> list[str]:
    """Start from files of fp32 weights with other names; return those that gave other weights."""
    import torch

    from pretrain.model.masked_gene_model import build_model
    from pretrain.start.from_deepspeed import DeepSpeedReader
    from pretrain.start.warm_start import start_weights

    reader = DeepSpeedReader(exported[1] / "global_step10")
    weights = {name: reader.tensor(name) for name in reader.shapes}
    spellings = {
        "plain": weights,
        "module": {f"module.{n}": t for n, t in weights.items()},
        "compiled": {f"module._orig_mod.{n}": t for n, t in weights.items()},
        "bare": {n.removeprefix("bert."): t for n, t in weights.items()},
        "held": {f"bert.{n}": t for n, t in weights.items()},
    }
    wrong = []
    for name, tensors in spellings.items():
        folder = base / name
        folder.mkdir()
        for beside in ("config.json", "vocabulary.json"):
            shutil.copy(exported[1] / beside, folder)
        torch.save(tensors, folder / "pytorch_model.bin")
        config = going_on(folder, shards, base / "run", "model.init_moments=false")
        vocabulary = ShardSet(shards).vocabulary
        model = build_model(config.model, vocabulary, 3)
        start_weights(model, vocabulary, config.model)
        own = dict(model.bert.named_parameters())
        if not all(torch.equal(own[n], t) for n, t in weights.items()):
            wrong.append(name)
    return wrong


def test_names_may_have_more_or_less_before_them(exported, shards, tmp_path):
    assert run_ranks(1, consolidated, exported, shards, tmp_path)[0] == []


# Which checkpoint


def test_resume_from_export_of_and_best_of_kept_checkpoints(shards, tmp_path):
    from pretrain.checkpoints import checkpoint

    config = tiny_config(
        shards, tmp_path / "run", checkpoint__every_steps=1, checkpoint__keep=1,
        checkpoint__keep_best=2, evaluation__every_steps=1, optim__learning_rate=0.5,
    )  # fmt: skip
    run = config.run.out
    run_ranks(1, run_training, config)
    losses = {m["step"]: m["loss"] for m in metrics(run, "heldout")}
    best = sorted(losses, key=lambda step: losses[step])
    kept = {checkpoint.step_of(p) for p in (run / "checkpoints").glob("step-*")}
    assert kept == {10, *best[:2]}
    assert checkpoint.find(run, "best").step == best[0]
    record = checkpoint.find(run, best[1]).record
    assert record["heldout_loss"] == losses[best[1]]
    assert (
        record["position"]["step_in_epoch"]
        + (record["position"]["epoch"] * record["position"]["steps_per_epoch"])
        == best[1]
    )
    # The report of the best is that of a run which ended there.
    from eval.report.run_page import write_report

    page = Path(write_report(run, tmp_path / "page.html", [], None, None, None, "best")).read_text()
    assert f"{losses[best[0]]:.4f}" in page and f"{losses[10]:.4f}" not in page
    # Back to the best: the later one is set aside, and the run ends with the same bits.
    shutil.copytree(run, tmp_path / "before")
    run_ranks(1, go_back, config)
    assert (run / "checkpoints" / "aside-step-00000010").is_dir() == (best[0] < 10)
    require_same_state(run, tmp_path / "before")
    assert [m["step"] for m in metrics(run, "train")] == list(range(1, 11))


def go_back(config: RunConfig) -> None:
    from pretrain.ranks import dist
    from pretrain.train import train

    train(config, True, from_step="best")
    dist.leave()
