"""The forward of a step that prefills prompts too, as the Hopper kernels compute it, against one forward after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from test_gpu_layers import MODEL

from diffulex_jax import SamplingParams, decode
from diffulex_jax.bench.shapes import random_params
from diffulex_jax.decode.window_forward import forward_beside_prompts, window_forward
from diffulex_jax.models.registry import model_of
from diffulex_jax.request_state import admit, empty_state, make_request
from diffulex_jax.rules import dims_for
from diffulex_jax.state import KVPool
from diffulex_jax.strategies import llada2
from pallas_kernels import choose


SMALL = model_of(MODEL.config.to_hf() | {"num_hidden_layers": 2})
BLOCK, PAGES = 32, 4  # of a slot


def test_prompts_beside_windows(rng, relative_error):
    """The first row commits a block, the prompts of the others are written in this very forward."""
    own, rule, slots = choose(jax.devices()[0]), llada2(), 3
    sizes = {"slots": slots, "window": 1, "block": BLOCK, "page": BLOCK, "pages_per_slot": PAGES}
    program = decode.Program(SMALL, dims_for(rule, **sizes, mask_id=SMALL.spec.mask_id), rule, own)
    assert program.mixes(jnp.bfloat16)
    params = random_params(SMALL, jnp.bfloat16, kernels=own)
    params["moe"]["router"] *= 40  # scores far enough apart that rounding seldom changes a choice
    table = rng.permutation(slots * PAGES).astype(np.int32).reshape(slots, -1)
    layers = SMALL.spec.layers
    pool = KVPool(*[jnp.zeros((layers.count, table.size, BLOCK, layers.kv_heads, layers.head_dim), jnp.bfloat16)] * 2)
    written = [rng.integers(0, 60, n).astype(np.int32) for n in (40, 70, 33)]
    state = empty_state(program.dims, rule)
    for slot, prompt in enumerate(written):
        request = make_request(program.dims, prompt=prompt, params=SamplingParams(max_tokens=BLOCK), eos_ids=())
        state = admit(program.dims, rule, state, slot, request)
    pending = state.pending.replace(tokens=state.pending.tokens.at[0].set(written[0][:BLOCK]), live=state.pending.live.at[0].set(True))
    state = state.replace(pending=pending, written_upto=state.written_upto.at[0].set(0))
    rows = [(1, 0), (1, 1), (2, 0)]  # slot and block
    prompts = decode.Prompts(
        np.stack([written[slot][block * BLOCK :][:BLOCK] for slot, block in rows])[:, None],
        start=np.array([block * BLOCK for _, block in rows], np.int32),
        length=np.full(len(rows), BLOCK, np.int32),
        written=np.ones((len(rows), 1), bool),
        page_table=table[[slot for slot, _ in rows]],
    )

    def forward_apart(pool, params, state, count):
        return window_forward(program, params, pool, state, page_table=table, count=count)

    @jax.jit
    def apart(params, pool, state):
        return forward_apart(decode.prefill(program, params, pool, prompts)[0], params, state, slots)

    @jax.jit
    def few(params, pool, state):
        return forward_apart(decode.prefill(program, params, pool, prompts)[0], params, state, 1)

    @jax.jit
    def beside(params, pool, state):
        return forward_beside_prompts(program, params, pool, state, page_table=table, prompts=prompts)

    want, want_pool, _ = apart(params, pool, state)
    for got, got_pool, _ in (beside(params, pool, state), few(params, pool, state)):
        for a, b in zip(jax.tree.leaves(got_pool), jax.tree.leaves(want_pool), strict=True):
            assert relative_error(a, b) < 2e-2
        off = jnp.linalg.norm((got - want).astype(jnp.float32), axis=-1) / jnp.linalg.norm(want.astype(jnp.float32), axis=-1)
        print("relative error of the middle position", float(jnp.median(off)))
        assert float(jnp.median(off)) < 2e-2
    assert float(jnp.abs(want_pool.k[:, table[1, :2]].astype(jnp.float32)).max()) > 0.1
