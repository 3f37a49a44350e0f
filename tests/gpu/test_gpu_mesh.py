"""Two GPUs give what one gives."""

from __future__ import annotations

import jax
import pytest

from diffulex_jax import Engine, SamplingParams


# `make test-gpu` runs on one GPU, too; there is nothing to share there.
pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
SIZES = {"max_slots": 4, "max_model_len": 128}


def answers(mesh, **options):
    engine = Engine.from_pretrained("embedded", mesh=mesh, **SIZES, **options)
    settings = [SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=0.8, seed=1)] * 2
    return [o.token_ids for o in engine.generate(["1+1=?", "12*3=?", "7-5=?", "(4+5)*2=?"], settings)]


@pytest.mark.parametrize("mesh", ["tensor=2", "expert=2"])
@pytest.mark.parametrize("strategy", ["llada2_edit", "dmax"])
def test_two_gpus_write_the_tokens_of_one(strategy, mesh):
    """In float32, with the reference's kernels and with the machine's."""
    one = answers(None, strategy=strategy)
    assert answers(mesh, strategy=strategy) == one
    assert answers(mesh, strategy=strategy, kernels="reference") == one
