"""What can be said of GPUs without one: which of them a rank takes."""

import pytest


def test_the_gpu_of_a_rank():
    from pretrain.dist import gpu_of

    assert [gpu_of(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    # One for each task (SLURM) or container (Kubernetes), whatever number it has for others.
    assert [gpu_of(rank, 1) for rank in range(4)] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="local rank 2: this machine has 2 GPUs; start one rank"):
        gpu_of(2, 2)
