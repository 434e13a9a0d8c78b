"""What can be said of GPUs without one: which of them a rank takes, and what it computes with."""

import pytest

from pretrain.config import load_config

A100, H100, V100 = (8, 0), (9, 0), (7, 0)


def test_the_gpu_of_a_rank():
    from pretrain.ranks.dist import gpu_of

    assert [gpu_of(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    # One for each task (SLURM) or container (Kubernetes), whatever number it has for others.
    assert [gpu_of(rank, 1) for rank in range(4)] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="local rank 2: this machine has 2 GPUs; start one rank"):
        gpu_of(2, 2)


def chosen(capability, *overrides, micro_batches=1, config="geneformer_v1_6l"):
    import torch

    from pretrain.device import computing, with_precision

    settings = load_config(config, ["data.shards=x", "run.out=x", *overrides])
    device = torch.device("cuda" if capability else "cpu")
    return computing(with_precision(settings, capability), device, capability, micro_batches)


@pytest.mark.parametrize(
    ("capability", "overrides", "precision", "packed"),
    [
        (None, (), "fp32", False),
        (H100, (), "bf16", True),
        (A100, (), "bf16", True),
        (V100, (), "fp32", False),
        (None, ("run.precision=bf16",), "bf16", False),
        (H100, ("run.precision=fp32",), "fp32", False),
        (H100, ("run.packing=never",), "bf16", False),
        (None, ("run.packing=always",), "fp32", True),
        (H100, ("model.hidden_size=240", "model.num_heads=20"), "bf16", False),  # 12 wide
        (H100, ("model.hidden_size=264", "model.num_heads=1"), "bf16", False),
        (H100, ("run.compile=default",), "bf16", True),
        (H100, ("run.compile=reduce-overhead",), "bf16", False),
    ],
)
def test_precision_and_packing_follow_the_device(capability, overrides, precision, packed):
    found = chosen(capability, *overrides)
    assert (found.precision, found.packed) == (precision, packed)
    assert found.record["precision"] == precision
    assert "remarks" not in found.record


def test_published_and_recommended_models_are_packed():
    from pretrain.config import CONFIG_FOLDER

    for path in sorted(CONFIG_FOLDER.glob("gene*.yaml")):
        assert chosen(H100, config=path.stem).packed, path.stem


@pytest.mark.parametrize(
    ("micro_batches", "overrides", "mode", "remark"),
    [
        (1, (), "reduce-overhead", ""),
        (2, (), "default", "a step has 2 micro-batches"),
        (1, ("model.activation_checkpointing=true",), "default", "activation_checkpointing"),
    ],
)
def test_cuda_graphs_only_where_nothing_is_kept_over_a_replay(
    micro_batches, overrides, mode, remark
):
    found = chosen(H100, "run.compile=reduce-overhead", *overrides, micro_batches=micro_batches)
    assert found.compile == found.record["compile"] == mode
    assert remark in " ".join(found.remarks)
    assert bool(found.remarks) == bool(remark)
    assert chosen(H100, "run.compile=default", micro_batches=9).compile == "default"
    assert chosen(H100, "run.compile=off").compile == "off"


def test_packed_cells_and_cuda_graphs_contradict_each_other():
    with pytest.raises(ValueError, match=r"packing=always: not with run\.compile=reduce"):
        chosen(H100, "run.packing=always", "run.compile=reduce-overhead")


def test_no_graph_replays_in_the_dry_pass():
    """Its gradients are kept until the first step: layers run as written inside, and only there."""
    from tests.test_pretrain_packing import build

    model = build("bert")
    for mode, without in (("reduce-overhead", None), ("default", "compiled")):
        model.compile_layers(mode, {(2, 8)})
        compiled = model._compiled
        with model.without_graphs():
            assert model._compiled is (compiled if without else None)
        assert model._compiled is compiled is not None


def test_tf32_is_said_and_decides_weights_only_where_asked_for():
    plain, tf32 = chosen(H100, "run.precision=fp32"), chosen(H100, "run.tf32=true")
    assert not plain.tf32
    assert tf32.record["tf32"]
    assert not chosen(None, "run.tf32=true").tf32
    given = ["data.shards=x", "run.out=x"]
    assert "run.tf32" not in load_config("tiny", given).recipe()
    assert load_config("tiny", [*given, "run.tf32=true"]).recipe()["run.tf32"] is True


def test_weights_and_sums_stay_in_fp32_where_a_gpu_computes_in_bf16():
    from pretrain.device import with_precision
    from pretrain.ds_config import derive_ds_config

    for stage, expected in (
        (0, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    ):
        given = ["data.shards=x", "run.out=x", f"run.deepspeed=zero{stage}"]
        found = derive_ds_config(with_precision(load_config("tiny", given), H100))
        assert {k: found[k] for k in expected} == expected
        on_cpu = derive_ds_config(with_precision(load_config("tiny", given), None))
        assert not {"torch_autocast", "bf16"} & set(on_cpu)
