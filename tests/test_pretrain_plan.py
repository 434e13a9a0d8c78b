"""``geneloom plan``: arithmetic against real models, saved tensors and DeepSpeed's estimator."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.shards.order import EpochPlan
from data_prep.shards.reader import ShardSet
from pretrain.config import CONFIG_FOLDER
from pretrain.options import CorpusOptions, SpeedOptions
from pretrain.plan.corpus import Corpus, assumed_corpus, read_config, read_corpus
from pretrain.plan.flops import GPUS, dropout_seconds_per_token, flops_per_token
from pretrain.plan.needs import (
    GIB,
    activation_bytes,
    checkpoint_bytes,
    choose,
    make_plan,
    memory_per_gpu,
    num_parameters,
    traffic_bytes,
)
from pretrain.plan.step_time import MACHINES, Compute, step_time
from tests.ranks import run_ranks
from tests.runs import run_training, tiny_config
from tests.saved_tensors import kept_for_backward

ROOT = Path(__file__).resolve().parent.parent
CORPUS = Corpus(1000, 1_000_000, [(1024, 900), (2048, 100)], 25_426, 2.05)


def bert_of(config, num_tokens, max_length):
    from transformers import BertConfig

    model = config.model
    return BertConfig(
        vocab_size=num_tokens,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.intermediate_size,
        hidden_act=model.activation,
        hidden_dropout_prob=model.hidden_dropout,
        attention_probs_dropout_prob=model.attention_dropout,
        max_position_embeddings=max_length,
        pad_token_id=0,
    )


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIG_FOLDER.glob("geneformer*.yaml")))
def test_parameters_are_those_of_the_model(name):
    import torch
    from transformers import BertForMaskedLM

    config = read_config(name, [])
    with torch.device("meta"):
        model = BertForMaskedLM(bert_of(config, 20_275, 4096))
    assert num_parameters(config.model, 20_275, 4096) == model.num_parameters()


def saved_bytes(config, length, cells):
    """Return bytes that a real forward pass keeps for backward, weights apart."""
    import torch
    from transformers import BertForMaskedLM

    from pretrain.model.masked_gene_model import MaskedGeneModel

    bert = BertForMaskedLM._from_config(bert_of(config, 300, length), attn_implementation="sdpa")
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    torch.nn.Module.to(bert.train(), dtype=dtype)
    return kept_for_backward(MaskedGeneModel(bert), 300, cells, length)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("hidden", "attention"), [(0.0, 0.0), (0.02, 0.0), (0.02, 0.02)])
def test_activations_are_what_autograd_keeps(precision, hidden, attention):
    def config(layers):
        return read_config("tiny", [
            f"run.precision={precision}", f"model.num_layers={layers}", "model.hidden_size=64",
            "model.num_heads=4", "model.intermediate_size=128",
            f"model.hidden_dropout={hidden}", f"model.attention_dropout={attention}",
        ])  # fmt: skip

    # The difference of two depths: what lies outside of the layers is no multiple of them.
    kept = saved_bytes(config(6), 256, 2) - saved_bytes(config(2), 256, 2)
    planned = activation_bytes(config(6), on_gpu=False) - activation_bytes(config(2), on_gpu=False)
    assert planned * 2 * 256 == pytest.approx(kept, rel=0.1)


def test_states_are_those_of_the_estimator_of_deepspeed():
    """Both count 20 B a parameter: 16-bit weights, gradients in 16 and 32 bits, 12 B of optimizer.

    At stage 3 the estimator leaves out 2 of them, the weights that are gathered.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    config = read_config("geneformer_v2_104m", ["run.precision=bf16"])
    parameters = num_parameters(config.model, CORPUS.num_tokens, 4096)
    for stage, estimate, left_out in (
        (2, estimate_zero2_model_states_mem_needs(parameters, 8, 1, False, 1.0), 0),
        (3, estimate_zero3_model_states_mem_needs(
            parameters, 0, 8, 1, cpu_offload=False, cpu_offload_params=False,
            zero_init=True, additional_buffer_factor=1.0), 2 * parameters / 8),
    ):  # fmt: skip
        found = memory_per_gpu(config, CORPUS, 4096, stage, 8, 4096)
        ours = found.weights + found.gradients + found.optimizer
        assert ours == pytest.approx(estimate[1] + left_out, rel=1e-6), stage


def test_memory_falls_with_the_stage_and_grows_with_the_micro_batch():
    config = read_config("geneformer_v2_316m", ["run.precision=bf16"])
    totals = [memory_per_gpu(config, CORPUS, 4096, s, 16, 8192).total for s in (0, 1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4
    small, large = (memory_per_gpu(config, CORPUS, 4096, 1, 16, n) for n in (8192, 16_384))
    assert large.activations == 2 * small.activations
    assert large.optimizer == small.optimizer


def test_choice_fits_and_the_next_larger_does_not():
    config = read_config("geneformer_v2_316m", [
        "run.precision=bf16", "batch.tokens_per_step=4194304",
    ])  # fmt: skip
    gpu = GPUS["a100-40"]
    found = choose(config, CORPUS, 4096, gpu, 8)
    assert found and found.memory.fits(gpu)
    assert found.memory.stage == 1
    twice = memory_per_gpu(config, CORPUS, 4096, 1, 8, 2 * found.micro_batch)
    assert found.micro_batch == 131_072 or not twice.fits(gpu)
    huge = read_config("geneformer_v2_316m", ["model.hidden_size=16128", "model.num_layers=96"])
    assert choose(huge, CORPUS, 4096, gpu, 1) is None


def test_flops_of_the_published_model():
    """Geneformer V1 at 1,400 tokens: 84 MFLOP a token, 45 where only hidden genes are asked for.

    The same count by hand: 6 a weight, attention 12 L d, head 6 d V (51 MFLOP with 15 % of it); and
    the last layer's queries, output and feed-forward for 15 %.
    """
    config = read_config("geneformer_v1_6l", [])
    last = 0.85 * (6 * (2 * 256**2 + 2 * 256 * 512) + 12 * 1400 * 256)
    assert flops_per_token(config, 25_426, 1400) == pytest.approx(50.6e6 - last, rel=0.01)
    everywhere = read_config("geneformer_v1_6l", ["masking.probability=0.999"])
    assert flops_per_token(everywhere, 25_426, 1400) == pytest.approx(84.1e6, rel=0.01)


def test_a_cell_objective_costs_a_whole_last_layer_and_a_row_of_logits_a_cell():
    def config(**weights):
        return read_config("geneformer_v1_6l", [f"objective.{k}={v}" for k, v in weights.items()])

    genes, both, cells = config(), config(cell_weight=1), config(cell_weight=1, gene_weight=0)
    last = 0.85 * (6 * (2 * 256**2 + 2 * 256 * 512) + 12 * 1400 * 256)
    head = 6 * 256 * (25_426 + 256)
    found = [flops_per_token(c, 25_426, 1400) for c in (genes, both, cells)]
    assert found[1] - found[0] == pytest.approx(last + head / 1400)
    assert found[1] - found[2] == pytest.approx(0.15 * head)
    logits = [memory_per_gpu(c, CORPUS, 2048, 1, 1, 2048).logits for c in (genes, both, cells)]
    assert logits[1] > logits[0] > logits[2] > 0


_MEMORY = json.loads((ROOT / "docs" / "benchmarks" / "plan_cpu.json").read_text())["runs"]


@pytest.mark.parametrize("run", _MEMORY, ids=lambda run: run["run"])
def test_memory_of_recorded_runs(run):
    config = read_config("geneformer_v1_6l", run["model"])
    corpus = Corpus(1000, 1_000_000, [(1024, 900)], run["num_tokens"], 2.05)
    memory = memory_per_gpu(config, corpus, run["max_length"], 1, 1, run["micro_batch"], False)
    states = memory.weights + memory.gradients + memory.optimizer
    planned = (states + memory.logits + memory.activations) / GIB
    assert planned == pytest.approx(run["memory_gib"]["planned"])
    # Without what the C library keeps of freed blocks: that no plan can know.
    assert planned == pytest.approx(run["memory_gib"]["given_back"], rel=0.1)
    assert checkpoint_bytes(run["parameters"]) == pytest.approx(
        run["checkpoint_bytes"]["measured"], rel=0.001
    )


# What was counted on a cable between two hosts: bytes a parameter and step of each of two ranks.
COLUMNS = [("fp32", 1), ("bf16", 1), ("bf16", 4)]


def counted_traffic() -> dict[tuple[int, str, int], float]:
    """Return (stage, precision, micro-batches) -> bytes, from the table of the page."""
    found = {}
    for line in (ROOT / "deepspeed_configs" / "README.md").read_text().splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if cells[0] in {f"`zero{n}.json`" for n in range(4)} and len(cells) == 4:
            for (precision, passes), text in zip(COLUMNS, cells[1:], strict=True):
                if text:
                    found[int(cells[0][5]), precision, passes] = float(text)
    return found


def test_traffic_is_what_was_counted():
    counted = counted_traffic()
    assert len(counted) == 10
    for (stage, precision, passes), expected in counted.items():
        planned = traffic_bytes(1000, precision, stage, 2, passes) / 1000
        assert planned == pytest.approx(expected, rel=0.02), (stage, precision, passes)
        assert traffic_bytes(1000, precision, stage, 1, passes) == 0


def recorded() -> list[tuple[str, str, int, int, float, float, int, float]]:
    """Return recorded steps on CPUs: recipe, precision, stage, ranks, padded tokens of a rank,
    seconds, padded length, attention dropout."""
    folder = ROOT / "docs" / "benchmarks"
    found = []
    for name in ("zero_cpu", "zero_cpu_104m", "zero_cpu_316m", "scaling_cpu"):
        for c in json.loads((folder / f"{name}.json").read_text())["cases"]:
            tokens = c["padded_tokens"]
            of = c["model"], c["precision"], c["stage"], c["world"]
            # Recorded when attention dropout had kernels in which it cost next to nothing.
            found.append((*of, tokens, c["wall_s"], tokens, 0.0))
    runs = json.loads((folder / "pretrain_cpu.json").read_text())
    for precision in ("fp32", "bf16"):
        for kind, dropout in (("published", 0.02), ("no attention", 0.0)):
            case = runs[precision][f"ours, {kind} dropout"]
            of = "geneformer_v1_6l", precision, 1, 1
            seconds = statistics.median(case["seconds"])
            found.append((*of, case["padded_tokens"], seconds, 1152, dropout))
    return found


@pytest.mark.parametrize(
    "run", recorded(), ids=lambda r: f"{r[0]}-{r[1]}-zero{r[2]}-{r[3]}-{r[4]}-{r[7]}"
)
def test_time_of_recorded_runs(run):
    """Within a quarter. Three numbers of a core (operations a second in each precision, seconds of
    an attention weight with dropout) were found with them."""
    name, precision, stage, ranks, tokens, seconds, length, dropout = run
    changes = [f"run.precision={precision}", "model.activation_checkpointing=false"]
    changes.append(f"model.attention_dropout={dropout}")
    config = read_config(name, changes)
    parameters = num_parameters(config.model, 25_426, 2048)
    compute = tokens * flops_per_token(config, 25_426, length) / GPUS["cpu"].flops(precision)
    compute += tokens * dropout_seconds_per_token(config, GPUS["cpu"], length)
    sent = traffic_bytes(parameters, precision, stage, ranks, 1)
    found = step_time(
        config, MACHINES["cpu"], Compute(compute, 1.25), parameters, stage, ranks, 1, sent
    )
    assert found.seconds == pytest.approx(seconds, rel=0.25)
    low, high = found.interval
    assert low < seconds < high


def test_small_models_wait_for_kernels_and_network():
    """What the arithmetic alone would promise: 250 steps a second of 16 H100."""
    config = read_config("geneformer_v1_6l", ["run.precision=bf16"])
    corpus, length = read_corpus(config, 27_400_000, 1_100, 2_048, 25_426)
    many, one = (make_plan(config, corpus, length, GPUS["h100"], n) for n in (16, 1))
    parts = many["step_seconds"]
    assert 1 / parts["compute"] > 200 > 2 * many["steps_per_second"]
    assert parts["network"] > 0 == one["step_seconds"]["network"]
    for plan in (many, one):
        low, high = plan["hours_interval"]
        assert low < plan["hours"] < high
    # A rate that was measured in a run holds what a run waits for.
    given = make_plan(config, corpus, length, GPUS["h100"], 1, SpeedOptions(1e6))
    assert given["tokens_per_second_and_gpu"] == pytest.approx(1e6)
    assert given["hours_interval"][1] < 1.2 * given["hours"]


def test_a_recipe_has_its_own_corpus_and_says_so():
    names = ("geneformer_v1_6l", "geneformer_v2_104m")
    small, large = (assumed_corpus(name) for name in names)
    assert (small.cells, small.vocabulary_size) == (27_400_000, 25_426)
    assert (large.cells, large.vocabulary_size) == (104_000_000, 20_275)
    other = assumed_corpus("geneformer_v2_104m", CorpusOptions(cells=5_000_000))
    assert (other.cells, other.max_tokens) == (5_000_000, 4_096)
    assert other.sentence().startswith("assumed, for no shards were given: Genecorpus-104M")
    assert "but for what was given: 5,000,000 cells of 1,440 tokens" in other.sentence()


def test_shards_are_named_by_an_option(shards, capsys):
    from pretrain.cli import plan_command

    plan_command(config="tiny", overrides=["run.out=x"], shards=shards)
    assert capsys.readouterr().out.startswith("corpus: of the shards\n")
    plan_command(config="geneformer_v2_104m", overrides=["run.precision=bf16"], gpus=8)
    shown = capsys.readouterr().out
    assert shown.startswith("corpus: assumed, for no shards were given: Genecorpus-104M")


def test_checkpoint_is_as_large_as_planned(shards, tmp_path):
    from pretrain.checkpoints.checkpoint import newest

    config = tiny_config(shards, tmp_path / "run", run__precision="bf16", model__hidden_size=128)
    run_ranks(1, run_training, config)
    corpus, max_length = read_corpus(config, 1, 1, 64, 10)
    planned = checkpoint_bytes(num_parameters(config.model, corpus.num_tokens, max_length))
    saved = newest(tmp_path / "run")
    assert saved is not None
    size = sum(p.stat().st_size for p in saved.folder.glob("*.safetensors"))
    # Names and places of the tensors are some kilobytes more.
    assert planned < size < 1.05 * planned


def test_steps_are_those_of_the_run(shards):
    config = read_config("tiny", [f"data.shards={shards}"])
    corpus, max_length = read_corpus(config, 1, 1, 64, 10)
    opened = ShardSet(shards)
    plan = EpochPlan(opened, "train", 0, config.batch.tokens_per_step)
    found = make_plan(config, corpus, max_length, GPUS["h100"], 1)
    assert found["steps"] == config.run.total_steps(plan.steps_per_epoch)
    assert found["cells"] == sum(b.extent.num_cells for b in plan.buckets)


def test_command_without_shards():
    command = [
        sys.executable, "-c", "from launch.cli import main; main()", "plan",
        "--config", "geneformer_v1_6l", "run.precision=bf16", "--gpus", "8", "--gpu", "h200",
        "--price", "3",
    ]  # fmt: skip
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cost"] == pytest.approx(found["hours"] * 24)
    assert found["cells"] == 27_400_000
    assert 0.02 < found["padding"] < 0.03
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "suggested: run.deepspeed=zero1" in shown
    wrong = subprocess.run(
        [*command[:-4], "--gpu", "tpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert wrong.returncode != 0
    assert "known are" in wrong.stderr
