"""Muon beside AdamW: plain PyTorch's numbers at every ZeRO stage; resumed exactly; or refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pretrain.config import OptimConfig, RunConfig, load_config
from pretrain.ds_config import DEEPSPEED_CONFIG_FOLDER, derive_ds_config
from tests.ranks import run_ranks
from tests.runs import final_state, metrics, require_same_state, run_training, tiny_config

_STEPS, CUT = 9, 7
# ZeRO 1 on two ranks cuts the row of all 3,318 numbers of matrices at 1,660: one number into a row.
_SIZES = {
    "model__num_layers": 1, "model__hidden_size": 21, "model__num_heads": 3,
    "model__intermediate_size": 37,
}  # fmt: skip
SETTINGS = _SIZES | {
    "optim__kind": "muon", "optim__learning_rate": 2e-3, "optim__beta2": 0.98,
    "optim__weight_decay": 0.05, "optim__max_grad_norm": 0.5, "optim__muon_weight_decay": 0.1,
    "optim__muon_schedule": "cosine", "optim__muon_warmup_steps": 5, "run__max_steps": _STEPS,
    "checkpoint__every_steps": CUT,
}  # fmt: skip
# Losses relative, weights absolute.
_LOSS_LIMIT, _WEIGHT_LIMIT, ELASTIC_LIMIT = 1e-6, 1e-5, 1e-5
_LAYER = re.compile(r"\.layers?\.\d+\..*weight$")
# Of a ModernBERT: maps that are one parameter, one below the other.
_MAPS = {"Wqkv": 3, "Wi": 2}


# --- what it should be ---


def _orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Return five Newton-Schulz steps from a matrix, in float64."""
    x = matrix.astype(np.float64)
    x = (x.T if x.shape[0] > x.shape[1] else x) / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def plain_muon(config: RunConfig) -> dict[str, Any]:
    """Return losses, norms, rates and weights of a run by torch alone: no ZeRO, one process."""
    import torch

    from data_prep.shards.reader import ShardSet
    from pretrain.batches.forward_arguments import to_device
    from pretrain.batches.step_dataset import StepDataset
    from pretrain.model.masked_gene_model import build_model

    shards, optim, batch = ShardSet(config.data.shards), config.optim, config.batch
    model = build_model(config.model, shards.vocabulary, config.run.seed)
    named = dict(model.named_parameters())
    inside = [n for n, p in named.items() if _LAYER.search(n) and p.ndim == 2]
    plain = [n for n, p in named.items() if p.ndim < 2]
    decay = [n for n in named if n not in plain and n not in inside]
    adamw = torch.optim.AdamW(
        [
            {"params": [named[n] for n in decay]},
            {"params": [named[n] for n in plain], "weight_decay": 0.0},
        ],
        weight_decay=optim.weight_decay, betas=(optim.beta1, optim.beta2), eps=optim.eps,
    )  # fmt: skip
    data = StepDataset(
        shards, "train", config.run.seed, batch.tokens_per_step, batch.tokens_per_micro_batch,
        config.masking, 0, 1,
    )  # fmt: skip
    speed = {n: np.zeros(named[n].shape) for n in inside}
    found: dict[str, Any] = {"losses": [], "norms": [], "rates": [], "muon_rates": []}
    for step in range(_STEPS):
        left = 1 - (step - 3) / (_STEPS - 3)
        rate = 2e-3 * min((step + 1) / 4, left)
        turn = np.cos(np.pi * max(0, step - 5) / (_STEPS - 5))
        muon_rate = 0.02 * min((step + 1) / 6, (1 + turn) / 2)
        micros = data[step].micro_batches
        hidden = sum(int((m.labels >= 0).sum()) for m in micros)
        total = 0.0
        for micro in micros:
            losses, _ = model(*to_device(micro, torch.device("cpu")))
            (losses.sum() / hidden).backward()
            total += float(losses.detach().sum())
        gradients = {n: p.grad for n, p in named.items() if p.grad is not None}
        norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
        for gradient in gradients.values():
            gradient *= min(1.0, optim.max_grad_norm / norm)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        for name in inside:
            slope = gradients[name].double().numpy()
            speed[name] = 0.95 * speed[name] + slope
            ahead = np.split(slope + 0.95 * speed[name], _MAPS.get(name.split(".")[-2], 1))
            rows, columns = ahead[0].shape
            turned = np.concatenate([_orthogonal(part) for part in ahead])
            turned *= max(1, rows / columns) ** 0.5
            with torch.no_grad():
                named[name].mul_(1 - muon_rate * 0.1)
                named[name].sub_(torch.from_numpy(muon_rate * turned))
        model.zero_grad()
        for key, value in zip(found, (total / hidden, norm, rate, muon_rate), strict=True):
            found[key].append(value)
    return found | {"weights": {n: p.detach().numpy().ravel() for n, p in named.items()}}


# --- runs ---


@dataclass(frozen=True)
class Start:
    """One start of a run; `goes_on_from`: a run, without the last of its checkpoints."""

    config: RunConfig
    goes_on_from: Path | None = None


def train_all(starts: Sequence[Start]) -> list[list[float]]:
    """Return the losses of one run after the other: to start ranks costs more than to train."""
    import os

    from pretrain.ranks import dist
    from pretrain.train import train

    losses = []
    for start in starts:
        # The other ranks read nothing before rank 0 has chosen the checkpoint.
        if start.goes_on_from and os.environ["RANK"] == "0":
            shutil.copytree(start.goes_on_from, start.config.run.out)
            shutil.rmtree(max((start.config.run.out / "checkpoints").glob("step-*")))
        losses.append(train(start.config, resume=start.goes_on_from is not None).losses)
    dist.leave()
    return losses


def replayed_and_trained(replayed: RunConfig, starts: Sequence[Start]) -> tuple:
    import torch

    torch.set_num_threads(1)
    return plain_muon(replayed), train_all(starts)


def exchanged_and_trained(starts: Sequence[Start]) -> tuple:
    return _pieces_come_and_go(), train_all(starts)


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> SimpleNamespace:
    """Everything that the tests below look at, in one start for each number of ranks."""
    folder = tmp_path_factory.mktemp("muon")

    def config(name: str, stage: int, **changes: Any) -> RunConfig:
        settings = SETTINGS | {"run__deepspeed": f"zero{stage}"} | changes
        return tiny_config(shards, folder / name, **settings)

    bf16 = {"run__precision": "bf16", "run__max_steps": 8, "checkpoint__every_steps": 6}
    first = [config("0-1", 0)]
    second = [config("1-2", 1), config("2-2", 2, batch__tokens_per_micro_batch=128)]
    half = [config("bf16", 1, **bf16), config("bf16-on", 1, **bf16)]
    same = config("2-2-on", 2, batch__tokens_per_micro_batch=128)
    moved = [config("0-1-to-1-2", 1), config("1-2-to-3-3", 3)]
    third = [config("3-3", 3)]
    replay, losses_1 = run_ranks(1, replayed_and_trained, first[0], [Start(c) for c in first])[0]
    starts = [
        *map(Start, second), Start(same, second[1].run.out), Start(moved[0], first[0].run.out),
        Start(half[0]), Start(half[1], half[0].run.out),
    ]  # fmt: skip
    losses_2 = run_ranks(2, train_all, starts)[0]
    starts = [Start(third[0]), Start(moved[1], second[0].run.out)]
    of_ranks = run_ranks(3, exchanged_and_trained, starts)
    configs = [*first, *second, same, moved[0], *half, *third, moved[1]]
    losses = [*losses_1, *losses_2, *of_ranks[0][1]]
    return SimpleNamespace(
        replay=replay,
        out={c.run.out.name: c.run.out for c in configs},
        losses=dict(zip([c.run.out.name for c in configs], losses, strict=True)),
        exchanged=[found for found, _ in of_ranks],
        config=config,
    )


def require_replayed(run: Path, losses: list[float], replay: dict[str, Any]) -> None:
    np.testing.assert_allclose(losses, replay["losses"], rtol=_LOSS_LIMIT)
    weights = final_state(run)["weight"]
    assert weights.keys() == replay["weights"].keys()
    for name, expected in replay["weights"].items():
        np.testing.assert_allclose(weights[name], expected, atol=_WEIGHT_LIMIT, err_msg=name)


@pytest.mark.parametrize("name", ["0-1", "1-2", "2-2", "3-3"])
def test_plain_pytorch_on_any_ranks_and_stage(name, runs):
    """Stage and ranks; the gradient is clipped before momentum sees it."""
    require_replayed(runs.out[name], runs.losses[name], runs.replay)
    records = metrics(runs.out[name], "train")
    for key, of_replay in (("grad_norm", "norms"), ("learning_rate", "rates")):
        np.testing.assert_allclose([m[key] for m in records], runs.replay[of_replay], rtol=1e-4)
    rates = [m["muon_learning_rate"] for m in records]
    np.testing.assert_allclose(rates, runs.replay["muon_rates"], rtol=1e-12)
    assert min(runs.replay["norms"]) > 0.5, "clipping was not tested"


def test_a_matrix_is_cut_in_the_middle_of_a_row(runs):
    """ZeRO 1 cuts the row of all matrices in two, ZeRO 3 each matrix in three."""
    wide = re.compile(r"layer\.\d+\.output\.dense\.weight$")
    for name in ("1-2", "3-3"):
        cuts = {
            of: starts for of, starts in _starts(runs.out[name]).items()
            if _LAYER.search(of) and "LayerNorm" not in of
        }  # fmt: skip
        assert any(at % (37 if wide.search(of) else 21) for of, all_ in cuts.items() for at in all_)


def _starts(run: Path) -> dict[str, list[int]]:
    """Return where the fragments of each parameter begin, of all ranks."""

    from safetensors import safe_open

    from pretrain.checkpoints import checkpoint

    last = checkpoint.newest(run)
    assert last is not None
    found: dict[str, list[int]] = {}
    for file in last.record["files"]:
        with safe_open(last.folder / file["name"], framework="np") as content:
            for name, start in json.loads(content.metadata()["starts"]).items():
                found.setdefault(name, []).append(start)
    return found


def test_muon_keeps_one_number_and_adamw_two(runs):
    state = final_state(runs.out["2-2"])
    assert {n for n in state["weight"] if _LAYER.search(n) and "LayerNorm" not in n} == set(
        state["momentum"]
    )
    assert state["exp_avg"].keys() == state["exp_avg_sq"].keys()
    assert state["weight"].keys() == state["momentum"].keys() | state["exp_avg"].keys()
    assert not state["momentum"].keys() & state["exp_avg"].keys()


@pytest.mark.parametrize(("resumed", "whole"), [("2-2-on", "2-2"), ("bf16-on", "bf16")])
def test_resumed_run_has_the_same_bits(resumed, whole, runs):
    assert 0 < len(runs.losses[resumed]) < len(runs.losses[whole])
    assert runs.losses[resumed] == runs.losses[whole][-len(runs.losses[resumed]) :]
    require_same_state(runs.out[resumed], runs.out[whole])


@pytest.mark.parametrize("name", ["0-1-to-1-2", "1-2-to-3-3"])
def test_goes_on_at_another_stage_and_number_of_ranks(name, runs):
    expected = runs.replay["losses"][CUT:]
    np.testing.assert_allclose(runs.losses[name], expected, rtol=ELASTIC_LIMIT)
    weights = final_state(runs.out[name])["weight"]
    for key, values in runs.replay["weights"].items():
        np.testing.assert_allclose(weights[key], values, atol=2e-5, err_msg=key)


def test_checkpoint_and_memory_are_as_planned(runs):
    from pretrain.plan.corpus import read_corpus as corpus_of
    from pretrain.plan.needs import (
        checkpoint_bytes,
        memory_per_gpu,
        muon_parameters,
        num_parameters,
    )

    muon = runs.config("none", 1)
    adamw = muon.model_copy(update={"optim": OptimConfig()})
    corpus, max_length = corpus_of(muon, 1, 1, 64, 10)
    parameters = num_parameters(muon.model, corpus.num_tokens, max_length)
    assert muon_parameters(muon) == 3_318 and muon_parameters(adamw) == 0
    state = final_state(runs.out["1-2"])
    stored = 4 * sum(values.size for kind in state.values() for values in kind.values())
    assert stored == checkpoint_bytes(parameters, muon_parameters(muon))
    assert stored == metrics(runs.out["1-2"], "checkpoint")[-1]["bytes"]
    plans = [memory_per_gpu(c, corpus, max_length, 1, 2, 64) for c in (adamw, muon)]
    assert plans[0].optimizer - plans[1].optimizer == 4 * 3_318 / 2


# --- who computes what ---


def _pieces_come_and_go() -> dict[str, Any]:
    """Gather and scatter seven matrices of which one of three ranks holds nothing."""
    import torch

    from pretrain.checkpoints.zero_state import Fragment
    from pretrain.optimizer.matrix_dealing import Exchange, Matrix
    from pretrain.ranks import dist

    ranks = dist.start(60, 1)
    shapes = [(3, 5), (7, 2), (4, 4), (1, 9), (6, 5), (2, 2), (5, 3)]
    matrices = [Matrix(f"m{i}", 0, *shape) for i, shape in enumerate(shapes)]
    values = [torch.arange(m.numel) + 100.0 * i for i, m in enumerate(matrices)]
    # Rank 0 holds two vectors of the middle, rank 2 the ends; 17 and 50 are inside of a row.
    bounds = {0: [(17, 50)], 1: [], 2: [(0, 17), (50, 103)]}[ranks.rank]
    flat = torch.full((103,), -1.0)
    fragments, at, offset = [], 0, 0
    for matrix, value in zip(matrices, values, strict=True):
        for low, high in bounds:
            a, b = max(low, at), min(high, at + matrix.numel)
            if a < b:
                flat[offset : offset + b - a] = value[a - at : b - at]
                fragments.append(Fragment(matrix.name, a - at, b - a, flat, offset, {}))
                offset += b - a
        at += matrix.numel
    exchange = Exchange(matrices, fragments, [flat], ranks, False)
    before = flat.clone()
    whole = exchange.gather([flat])
    right = {n: bool((m.flatten() == values[n]).all()) for n, m in whole.items()}
    exchange.scatter({n: m + 0.5 for n, m in whole.items()}, [flat])
    back = bool((flat[:offset] == before[:offset] + 0.5).all() and (flat[offset:] == -1).all())
    return {"right": right, "back": back}


def test_pieces_reach_their_owner_and_come_back(runs):
    """Seven matrices on three ranks, of which one holds none of them but computes its share."""
    owned = [set(found["right"]) for found in runs.exchanged]
    assert sorted(n for numbers in owned for n in numbers) == list(range(7)), "each has one owner"
    assert all(owned)
    assert all(all(found["right"].values()) and found["back"] for found in runs.exchanged)


def test_work_is_dealt_evenly():
    from pretrain.optimizer.matrix_dealing import Matrix, deal

    matrices = [Matrix(str(i), 0, 10 + i, 10) for i in range(7)]
    owners = deal(matrices, 3)
    work = [sum(m.work for m, o in zip(matrices, owners, strict=True) if o == r) for r in range(3)]
    assert max(work) - min(work) <= max(m.work for m in matrices)
    assert sorted(owners.count(r) for r in range(3)) == [2, 2, 3]


def test_a_layout_that_is_not_known_is_refused():
    from pretrain.optimizer.matrix_dealing import Matrix, _require_whole, pieces_of

    matrices = [Matrix("a.weight", 0, 2, 3), Matrix("a.weight", 6, 2, 3)]
    halves = [("a.weight", 0, 5, 0, 0)], [("a.weight", 5, 7, 0, 0)]
    pieces = [pieces_of(matrices, held, rank) for rank, held in enumerate(halves)]
    assert [(p.matrix, p.rank, p.start, p.numel, p.offset) for p in sum(pieces, [])] == [
        (0, 0, 0, 5, 0), (0, 1, 5, 1, 0), (1, 1, 0, 6, 1),
    ]  # fmt: skip
    _require_whole(matrices, sum(pieces, []), 1)
    for wrong in (pieces[0], [*pieces[0], *pieces[0], *pieces[1]]):
        with pytest.raises(ValueError, match="optim.kind=muon: .* not each element once.*zero1"):
            _require_whole(matrices, wrong, 1)


def test_fused_parameters_are_orthogonalised_by_map():
    from pretrain.optimizer.muon import matrices_of

    query, key, value = matrices_of("model.layers.3.attn.Wqkv.weight", (48, 16))
    assert [m.start for m in (query, key, value)] == [0, 256, 512]
    assert {(m.rows, m.columns) for m in (query, key, value)} == {(16, 16)}
    assert [(m.start, m.rows) for m in matrices_of("model.layers.3.mlp.Wi.weight", (40, 16))] == [
        (0, 20), (320, 20),
    ]  # fmt: skip
    (whole,) = matrices_of("bert.encoder.layer.0.output.dense.weight", (16, 40))
    assert (whole.start, whole.rows, whole.columns) == (0, 16, 40)


# --- refusals ---


def _optim(*overrides: str) -> OptimConfig:
    return load_config("tiny", ["data.shards=s", "run.out=r", *overrides]).optim


def test_settings_of_muon_are_filled_in_and_need_muon():
    assert _optim().muon_learning_rate is None
    optim = _optim("optim.kind=muon", "optim.warmup_steps=7", "optim.muon_momentum=0.9")
    assert (optim.muon_learning_rate, optim.muon_weight_decay) == (0.02, 0.01)
    assert (optim.muon_warmup_steps, optim.muon_momentum) == (7, 0.9)
    assert OptimConfig.model_validate(optim.model_dump()) == optim, "a record can be read again"
    with pytest.raises(ValueError, match="muon_learning_rate: belong to kind=muon, kind is adamw"):
        _optim("optim.muon_learning_rate=0.1")


@pytest.mark.parametrize("file", sorted(p.stem for p in DEEPSPEED_CONFIG_FOLDER.glob("*.json")))
def test_files_under_which_muon_is_not_exact_are_refused(file):
    content = json.loads((DEEPSPEED_CONFIG_FOLDER / f"{file}.json").read_text())
    config = tiny_config(Path("s"), Path("r"), optim__kind="muon", run__deepspeed=file)
    if "offload" in json.dumps(content) or "quantized" in json.dumps(content):
        with pytest.raises(
            ValueError, match=rf"{file}.json: .*not with optim.kind=muon.*take zero"
        ):
            derive_ds_config(config)
    else:
        assert derive_ds_config(config)["zero_allow_untested_optimizer"]


def test_another_order_of_weights_is_refused(tmp_path):
    zero = {"stage": 2, "round_robin_gradients": True}
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    config = tiny_config(Path("s"), Path("r"), run__deepspeed=str(tmp_path / "own.json"))
    with pytest.raises(ValueError, match="own.json: round_robin_gradients: not supported"):
        derive_ds_config(config)


def _record(config: RunConfig) -> dict[str, Any]:
    return {"recipe": config.recipe(), "vocabulary_sha256": "v", "shards_fingerprint": "f"}


def test_resume_across_optimizers_names_both():
    from pretrain.checkpoints import checkpoint

    adamw = _record(tiny_config(Path("s"), Path("r")))
    muon = _record(tiny_config(Path("s"), Path("r"), optim__kind="muon"))
    old = json.loads(json.dumps(adamw))
    del old["recipe"]["optim.kind"]
    checkpoint.require_same(old, adamw, allow_changes=False)
    for before, after, words in (
        (old, muon, "optim.kind: 'adamw' -> 'muon'; give optim.kind=adamw"),
        (adamw, muon, "optim.kind: 'adamw' -> 'muon'; give optim.kind=adamw"),
        (muon, adamw, "optim.kind: 'muon' -> 'adamw'; give optim.kind=muon"),
    ):
        for allow_changes in (False, True):
            with pytest.raises(ValueError, match=re.escape(words)):
                checkpoint.require_same(before, after, allow_changes)


def test_a_warmup_that_outlasts_the_run_is_refused():
    from pretrain.optim import require_reachable_peak

    optim = _optim("optim.kind=muon", "optim.warmup_steps=2", "optim.muon_warmup_steps=30")
    with pytest.raises(ValueError, match=r"optim.muon_warmup_steps=30: the run has only 20 steps"):
        require_reachable_peak(optim, 20)


# --- the whole table ---


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_plain_pytorch_in_all_combinations(ranks, runs):
    configs = [
        runs.config(f"{ranks}-{stage}-{size}", stage, batch__tokens_per_micro_batch=size)
        for stage in range(4)
        for size in (128, 512)
    ]
    losses = run_ranks(ranks, train_all, [Start(c) for c in configs])[0]
    for config, found in zip(configs, losses, strict=True):
        require_replayed(config.run.out, found, runs.replay)


@pytest.mark.slow
def test_zero_3_in_groups_of_few_weights(runs, tmp_path):
    """A file of a user's own; Muon's matrices come in several calls of a step."""
    zero = {"stage": 3, "overlap_comm": False, "sub_group_size": 500}
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    own = {"run__deepspeed": str(tmp_path / "own.json")}
    whole, on = (runs.config(f"groups{end}", 3, **own) for end in ("", "-on"))
    losses = run_ranks(2, train_all, [Start(whole), Start(on, whole.run.out)])[0]
    require_replayed(whole.run.out, losses[0], runs.replay)
    assert losses[1] == losses[0][CUT:]
    require_same_state(on.run.out, whole.run.out)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_resumed_run_has_the_same_bits_at_every_stage(ranks, precision, runs):
    starts = []
    for stage in range(4):
        names = [f"{precision}-{ranks}-{stage}{end}" for end in ("", "-on")]
        whole, on = (runs.config(n, stage, run__precision=precision) for n in names)
        starts += [Start(whole), Start(on, whole.run.out)]
    losses = run_ranks(ranks, train_all, starts)[0]
    for number in range(0, len(starts), 2):
        assert losses[number + 1] == losses[number][CUT:]
        require_same_state(starts[number + 1].config.run.out, starts[number].config.run.out)


def test_run_is_not_taken_over_by_another_optimizer(shards, runs, tmp_path):
    shutil.copytree(runs.out["0-1"], tmp_path / "run")
    settings = {k: v for k, v in SETTINGS.items() if "muon" not in k}
    config = tiny_config(shards, tmp_path / "run", **settings | {"optim__kind": "adamw"})
    with pytest.raises(AssertionError, match="optim.kind: 'muon' -> 'adamw'"):
        run_ranks(1, run_training, config, True)


@pytest.mark.quick
def test_products_in_bf16_as_on_a_gpu():
    """Nearly the same direction, in as many products, for all matrices of a shape at once."""
    import torch

    from pretrain.optimizer.muon import muon_direction, orthogonalise
    from tests.test_pretrain_packing import Operations

    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 64, 24, generator=generator)
    exact, found = orthogonalise(matrices, 5), orthogonalise(matrices, 5, torch.bfloat16)
    assert found.dtype == torch.float32
    likeness = torch.nn.functional.cosine_similarity(exact.flatten(1), found.flatten(1))
    assert (likeness > 0.999).all()
    assert ((torch.linalg.svdvals(found) - 1).abs() < 0.35).all()
    assert torch.equal(orthogonalise(matrices, 5, torch.float32), exact)
    on_gpu = {n: torch.empty(64, 24, device="meta") for n in range(6)}
    seen = Operations()
    with seen.mode():
        directions = muon_direction(on_gpu, 5)
    assert seen.counts["aten.baddbmm"] == 10
    assert all(d.dtype == torch.float32 for d in directions.values())
