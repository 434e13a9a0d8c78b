"""TensorBoard's plots of several curves: every curve that they name is one that a run writes."""

from tests.ranks import run_ranks
from tests.runs import run_training, tiny_config
from tests.synthetic import make_shards


def test_curves_of_the_layout_are_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pretrain.counting.baselines import BASELINE_NAMES
    from pretrain.measure.metrics import LAYOUT

    config = tiny_config(
        make_shards(tmp_path), tmp_path / "run", run__max_steps=6, optim__kind="muon",
        objective__cell_weight=0.5,
    )  # fmt: skip
    run_ranks(1, run_training, config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    plots = [tags for group in LAYOUT.values() for _, tags in group.values()]
    named = {tag for tags in plots for tag in tags}
    assert named <= set(events.Tags()["scalars"])
    assert {f"heldout/baseline_{name}" for name in BASELINE_NAMES} <= named
