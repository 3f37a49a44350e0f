"""The decode step over a real, tiny model: what is written to the pool, and when."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import EOS, KERNELS, MODEL, dims_of

from diffulex_jax import Rule, SamplingParams, decode
from diffulex_jax.models.base import init
from diffulex_jax.request_state import admit, empty_state, make_request
from diffulex_jax.state import DecodeState, KVPool
from diffulex_jax.strategies import dmax
from pallas_kernels import choose_for
from pallas_kernels.target import Target


BLOCK, PAGES = 4, 3
TABLE = np.array([[2, 0, 1]], np.int32)  # the pages of the only slot
REFERENCE, FAST = dmax(), dmax(mode="fast")
HOPPER = choose_for(Target("gpu", 9.0))
PARAMS = init(MODEL, jax.random.key(0), scale=0.5)


def setup(rule: Rule, prompt: list[int], **settings) -> tuple[decode.Program, KVPool, DecodeState]:
    """A program for one slot, an empty pool, and a state that holds one request."""
    dims = dims_of(rule, block=BLOCK, pages=PAGES)
    request = make_request(dims, prompt=np.array(prompt, np.int32), params=SamplingParams(**settings), eos_ids=(EOS,))
    state = admit(dims, rule, empty_state(dims, rule), 0, request)
    layers = MODEL.spec.layers
    shape = (layers.count, PAGES, BLOCK, layers.kv_heads, layers.head_dim)
    return decode.Program(MODEL, dims, rule, KERNELS), KVPool(jnp.zeros(shape), jnp.zeros(shape)), state


denoise = functools.partial(jax.jit, static_argnums=0)(functools.partial(decode.denoise, steps=40))
KNOWN = np.zeros(1, np.int32)
prefill = functools.partial(jax.jit, static_argnums=0)(decode.prefill)


def rows(*pieces: tuple[int, list[int]], size: int = 2) -> decode.Prompts:
    """``size`` rows of two blocks, which hold ``pieces`` of a prompt, each from a block on."""
    made = decode.Prompts(
        tokens=np.zeros((size, 2, BLOCK), np.int32),
        start=np.zeros(size, np.int32),
        length=np.zeros(size, np.int32),
        written=np.zeros((size, 2), bool),
        page_table=np.repeat(TABLE, size, 0),
    )
    for i, (first, tokens) in enumerate(pieces):
        made.tokens[i].reshape(-1)[: len(tokens)] = tokens
        made.start[i], made.length[i], made.written[i] = first * BLOCK, len(tokens), np.arange(2) < len(tokens) // BLOCK
    return made


def prefilled(program: decode.Program, pool: KVPool, tokens: list[int]) -> KVPool:
    """The pool after a plain forward over whole blocks of ``tokens``."""
    return prefill(program, PARAMS, pool, rows((0, tokens)))[0]


@pytest.mark.sweep
def test_a_forward_that_commits_a_block_equals_commit_and_decode_apart():
    """One step that fills the whole window, with the block before it in the pool already, or still to be written."""
    program, pool, state = setup(REFERENCE, [1, 2, 3, 4, 5], max_tokens=20, accept_threshold=0.0)
    pending = state.pending.replace(tokens=jnp.array([[1, 2, 3, 4]]), live=jnp.array([True]))
    before = state.replace(pending=pending, written_upto=jnp.array([0]))
    apart_pool, apart, _, _ = denoise(
        program, PARAMS, prefilled(program, pool, [1, 2, 3, 4]), state, page_table=TABLE, known=KNOWN, max_steps=1, stop_on_finish=False
    )
    pool, together, _, _ = denoise(program, PARAMS, pool, before, page_table=TABLE, known=KNOWN, max_steps=1, stop_on_finish=False)
    assert together.tokens.tolist() == apart.tokens.tolist()
    assert not together.masked.any()
    np.testing.assert_allclose(together.confidence, apart.confidence, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), pool, apart_pool)
    assert np.abs(pool.k[:, 2]).min() > 0  # the block's page was written, and no other
    assert not pool.k[:, :2].any()
    assert together.written_upto.tolist() == apart.written_upto.tolist() == [4]
    assert not together.pending.live.any()


def test_a_prefill_in_chunks_equals_one():
    program, pool, state = setup(REFERENCE, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    one = prefilled(program, pool, [1, 2, 3, 4, 5, 6, 7, 8])
    chunks = prefilled(program, pool, [1, 2, 3, 4])
    chunks, _ = prefill(program, PARAMS, chunks, rows((1, [5, 6, 7, 8])))
    together, _ = prefill(program, PARAMS, pool, rows((1, [5, 6, 7, 8]), (0, [1, 2, 3, 4])))
    for got in (chunks, together):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, one)
    assert np.abs(one.k[:, :1]).min() > 0
    assert not one.k[:, 1].any()


@pytest.mark.parametrize(
    ("rule", "settings", "hard"),
    [
        (REFERENCE, {"accept_threshold": 0.0, "settle_threshold": 0.0}, True),  # a step a block
        (REFERENCE, {"accept_threshold": 0.2, "settle_threshold": 0.9}, True),  # several, with soft inputs in between
        (FAST, {"accept_threshold": 0.0, "settle_threshold": 0.0}, False),
    ],
    ids=["reference, one step", "reference, several", "fast"],
)
def test_kv_of_a_finished_dmax_block(rule, settings, hard):
    """The authors write it from the plain tokens; Diffulex's fast path from the last step's soft ones."""
    program, pool, state = setup(rule, [1, 2], max_tokens=9, ignore_eos=True, **settings)
    pool_after, state, report, _ = denoise(program, PARAMS, pool, state, page_table=TABLE, known=KNOWN, max_steps=40, stop_on_finish=True)
    assert report.length.tolist() == [11]
    assert report.written_upto.tolist() == [8]
    plain = prefilled(program, pool, state.sequence.tokens[0, :8].tolist())
    np.testing.assert_allclose(pool_after.k[0, 2, :2], plain.k[0, 2, :2], atol=1e-5)  # the prompt's own positions are never soft
    error = np.abs(pool_after.k[:, [2, 0]] - plain.k[:, [2, 0]]).max()
    assert error < 1e-5 if hard else error > 1e-2


def test_written_upto_follows_the_forward_that_wrote():
    """Every step fills one block of 4; a block counts as written after the next step, not before."""
    program, pool, state = setup(REFERENCE, [1, 2], max_tokens=10, accept_threshold=0.0, settle_threshold=0.0, ignore_eos=True)
    seen = []
    for _ in range(3):
        pool, state, report, _ = denoise(program, PARAMS, pool, state, page_table=TABLE, known=KNOWN, max_steps=1, stop_on_finish=True)
        seen.append((int(report.written_upto[0]), int(report.settled_upto[0])))
    assert seen == [(0, 4), (4, 8), (8, 12)]


@pytest.mark.sweep_but("0.7")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_steps_of_a_kind_in_loops_of_their_own_are_the_same_steps(temperature):
    """How a GPU runs them; its kernels leave float32 to plain XLA. Blocks end at different steps, and in the middle of a dispatch."""
    ends = []
    for kernels, greedy in ((KERNELS, False), (HOPPER, temperature == 0)):
        program, pool, state = setup(REFERENCE, [1, 2, 3], max_tokens=9, accept_threshold=0.3, temperature=temperature, seed=3)
        program = program._replace(kernels=kernels, greedy=greedy)
        for _ in range(2):
            pool, state, report, trace = denoise(
                program, PARAMS, pool, state, page_table=TABLE, known=KNOWN, max_steps=3, stop_on_finish=False
            )
            ends.append((report, trace))
    for (report, trace), (want_report, want_trace) in zip(ends[2:], ends[:2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, report, want_report)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), trace, want_trace)
