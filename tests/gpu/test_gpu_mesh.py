"""Two GPUs give what one gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.parallel.mesh import make_mesh
from pallas_kernels import prediction


# `make test-gpu` runs on one GPU, too; there is nothing to share there.
pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
SIZES = {"max_slots": 4, "max_model_len": 128}


def answers(mesh, **options):
    engine = Engine.from_pretrained("embedded", mesh=mesh, **SIZES, **options)
    settings = [SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=0.8, seed=1)] * 2
    return [o.token_ids for o in engine.generate(["1+1=?", "12*3=?", "7-5=?", "(4+5)*2=?"], settings)]


@pytest.mark.parametrize("mesh", ["tensor=2", "expert=2", "data=2"])
@pytest.mark.parametrize("strategy", ["llada2_edit", "dmax"])
def test_two_gpus_write_the_tokens_of_one(strategy, mesh):
    """In float32, with the reference's kernels and with the machine's."""
    one = answers(None, strategy=strategy)
    assert answers(mesh, strategy=strategy) == one
    assert answers(mesh, strategy=strategy, kernels="reference") == one


@pytest.mark.parametrize("rows, vocab, width", [(32, 157184, 2048), (300, 50272, 512)])
def test_two_gpus_find_in_halves_of_the_vocabulary_what_one_finds_in_all_of_it(rng, relative_error, rows, vocab, width):
    hidden, lm_head = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for shape in ((rows, width), (vocab, width)))
    lm_head *= 0.05
    best = np.asarray(jnp.einsum("rd,vd->rv", hidden, lm_head, preferred_element_type=jnp.float32).argmax(1))
    row = np.arange(rows)
    options = {
        "forbidden_id": int(best[2]),
        "sampling": None,
        "penalized": jnp.asarray(np.where(row % 2 == 0, best, -1), jnp.int32),
        "penalty": jnp.asarray(np.where(row % 3 == 0, 0.0, 2.5), jnp.float32),
        "banned": jnp.asarray(np.stack([np.where(row % 4 == 1, best, -1), rng.integers(0, vocab, rows)], 1), jnp.int32),
        "top_k": 1,
    }
    current = jnp.asarray(np.where(row % 5 == 0, best, rng.integers(0, vocab, rows)), jnp.int32)

    def find(hidden, lm_head, current, vocab_axes=("tensor",)):
        return prediction.predict_from_hidden(hidden, lm_head, current, vocab_axes=vocab_axes, backend="gpu", **options)

    one = jax.jit(find, static_argnums=3)(hidden, lm_head, current, ())
    mesh, every, half = make_mesh(tensor=2), PartitionSpec(), PartitionSpec("tensor")
    placed = (jax.device_put(a, NamedSharding(mesh, where)) for a, where in ((hidden, every), (lm_head, half), (current, every)))
    with jax.set_mesh(mesh):
        two = jax.jit(jax.shard_map(find, in_specs=(every, half, every), out_specs=every, check_vma=False))(*placed)
    # A row's logits are the same sums in either; only the exponentials are added up in another order.
    np.testing.assert_array_equal(two.token, one.token)
    assert relative_error(two.prob, one.prob) < 1e-5
    assert relative_error(two.current_prob, one.current_prob) < 1e-5
