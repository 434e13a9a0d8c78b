"""What is recorded of command lines: no value that somebody may want to keep to himself."""

from __future__ import annotations

import pytest

from data_prep.running.redact import is_public, redacted


@pytest.mark.quick
@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("--env API_KEY=x", "--env API_KEY=HIDDEN"),
        ("--env=HF_TOKEN=x=y", "--env=HF_TOKEN=HIDDEN"),
        ("--env SPACE=x", "--env SPACE=HIDDEN"),
        ("--env NCCL_DEBUG=INFO", "--env NCCL_DEBUG=INFO"),
        ("--env NCCL_AUTH=x", "--env NCCL_AUTH=HIDDEN"),
        ("--token x --out y", "--token HIDDEN --out y"),
        ("--db.password=x", "--db.password=HIDDEN"),
        ("hub.secret=x run.out=y", "hub.secret=HIDDEN run.out=y"),
        ("batch.tokens_per_step=12", "batch.tokens_per_step=12"),
        ("a=https://me:x@host/p", "a=https://HIDDEN@host/p"),
        ("--setup=export\tA=x --time 5", "--setup=HIDDEN --time 5"),
        ("--setup x --time 5", "--setup HIDDEN --time 5"),
        ("--sbatch=--export=ALL,A=x", "--sbatch=--export=HIDDEN"),
        ("--sbatch --export=A=x --sbatch=--mem=3G", "--sbatch --export=HIDDEN --sbatch=--mem=3G"),
        ("A=b\tHF_TOKEN=x\thub.secret=y", "A=b\tHF_TOKEN=HIDDEN\thub.secret=HIDDEN"),
        ("s3://bucket/p?X-Amz-Signature=x&b=1", "s3://bucket/p?HIDDEN"),
        ("https://host/p#part me@host", "https://host/p#part me@host"),
    ],
)
def test_what_is_recorded_of_a_command(given, recorded):
    assert redacted(given.split(" ")) == recorded.split(" ")


@pytest.mark.quick
def test_variables_that_may_be_recorded():
    assert all(map(is_public, ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME")))
    assert not any(map(is_public, ("AWS_ACCESS_KEY_ID", "HOME", "NCCL_TOKEN", "WANDB_API_KEY")))
