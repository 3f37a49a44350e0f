"""Prompts that are prefilled in the forward of a denoise step: the same as one after the other, but for last bits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import EOS, KERNELS, MODEL
from test_background import MIXED, PROMPTS, ids, names_called
from test_warm_up import PARAMS

from diffulex_jax import Engine, SamplingParams, decode
from diffulex_jax.decode import program as programs
from diffulex_jax.decode.window import advance, write_window
from diffulex_jax.engine import build
from diffulex_jax.engine.request import Chunk, Tracked
from diffulex_jax.models.base import init
from diffulex_jax.models.registry import model_of
from diffulex_jax.request_state import admit, empty_state, make_request
from diffulex_jax.rules import dims_for
from diffulex_jax.state import KVPool
from diffulex_jax.strategies import dmax, llada2
from pallas_kernels import Kernels, choose


BY_BLOCKS = model_of(MODEL.config.to_hf() | {"expert_capacity": 3, "block_size": 4})  # whose tokens choose experts together
CASES = {
    "a page a block": {"page": 4},
    "two blocks a page, a window of two": {"page": 8, "window": 2},
    "two pages a block": {"page": 2},
    "soft inputs": {"page": 4, "rule": dmax()},
    "experts by blocks": {"page": 4, "model": BY_BLOCKS},
}
PROMPT, OLD = [*range(1, 9), 3], [5, 6, 7, 8, 9, 10]  # two blocks and a token; a block and two


step = jax.jit(decode.step, static_argnums=0, static_argnames="pending")
prefill = jax.jit(decode.prefill, static_argnums=0)


def world(*, page: int, window: int = 1, rule=None, model=MODEL):
    """A program of three slots, of which the first has denoised and is about to move on; the second's prompt is not written yet."""
    rule = rule or llada2()
    sizes = {"slots": 3, "window": window, "block": 4, "page": page, "pages_per_slot": 24 // page}
    dims, layers = dims_for(rule, **sizes, mask_id=MODEL.spec.mask_id), model.spec.layers
    program = decode.Program(model, dims, rule, KERNELS)
    params = PARAMS if model is MODEL else init(model, jax.random.key(0), jnp.float32, scale=0.5)
    table = np.random.default_rng(0).permutation(3 * dims.pages_per_slot).astype(np.int32).reshape(3, -1)
    pool = KVPool(*[jnp.zeros((layers.count, table.size, page, layers.kv_heads, layers.head_dim))] * 2)
    pool, _ = prefill(program, params, pool, prompts(table[:1], OLD[:4]))
    state = empty_state(dims, rule)
    for slot, prompt in enumerate([OLD, PROMPT]):
        settings = SamplingParams(max_tokens=8, accept_threshold=0.0 if slot == 0 else 0.9, ignore_eos=True)
        request = make_request(dims, prompt=np.array(prompt, np.int32), params=settings, eos_ids=(EOS,))
        state = admit(dims, rule, state, slot, request)
        while slot == 0 and not state.ready[0]:
            pool, state = step(program, params, pool, state, page_table=table)
    return program, params, pool, state, table


def prompts(table: np.ndarray, tokens: list[int]) -> decode.Prompts:
    """One row of two blocks that is there, and one that is not."""
    there = np.array([len(tokens), 0], np.int32)
    padded = np.zeros((2, 2, 4), np.int32)
    padded[0].reshape(-1)[: len(tokens)] = tokens
    written = np.arange(2) < there[:, None] // 4
    return decode.Prompts(padded, np.zeros(2, np.int32), there, written, np.repeat(table, 2, 0))


@pytest.mark.sweep_but("two blocks a page, a window of two", "experts by blocks")
@pytest.mark.parametrize("case", CASES)
def test_a_step_beside_prompts_is_both(case):
    program, params, pool, state, table = world(**CASES[case])
    given = prompts(table[1:2], PROMPT[:8])
    apart_before, _ = prefill(program, params, pool, given)
    apart, want = step(program, params, apart_before, advance(program.dims, program.rule, state), page_table=table)
    known = jnp.array([7, 9, 0])
    mix = jax.jit(decode.mixed_step, static_argnums=0)
    mixed, got, said = mix(program, params, pool, state, page_table=table, known=known, prompts=given)
    assert said.nfe.tolist() == got.nfe.tolist() and said.written_upto.tolist() == [8, 8, 0]
    assert said.tokens[:2, 0].tolist() == [got.sequence.tokens[0, 7], got.sequence.tokens[1, 9]]
    assert got.nfe[1:].tolist() == [1, 0] and got.written_upto.tolist() == [8, 8, 0]
    written = want.replace(sequence=write_window(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), (mixed, got), (apart, written))
    assert np.abs(np.asarray(mixed.k - pool.k)).max() > 0.1
    few = step(program, params, apart_before, advance(program.dims, program.rule, state), page_table=table, pending=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), few, (apart, want))


@pytest.fixture
def used(monkeypatch):
    """Names of the programs that engines call, which mix as they would on a GPU."""
    kinds = {"host_drives_loops": True, "prefill_tokens": (64,), "free_tokens": 64, "rows_apart": False}
    monkeypatch.setattr(build, "choose", lambda device: choose(device)._replace(**kinds))
    monkeypatch.setattr(programs, "_MANY_SLOTS", 4)  # and one pending block is few
    monkeypatch.setattr(Kernels, "for_layers", lambda self, dtype: self)
    return names_called(monkeypatch)


def test_an_engine_mixes_where_it_can(used):
    sizes = {"block_size": 4, "max_slots": 4, "max_model_len": 128, "num_pages": 8}  # too few: requests are set aside
    built = Engine(MODEL, PARAMS, prefix_cache=False, **sizes)
    built.warm_up()
    assert {name[0] for name in used} == {"denoise", "prefill", "mixed"}
    prompts = [PROMPTS[i] for i in (1, 1, 0, 0)]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    mixed, built._device._mixed = built._device._mixed, {}
    apart = built.generate(prompts, params)
    built._device._mixed = mixed
    assert ids(built.generate(prompts, params)) == ids(apart) and built.stats["preemptions"] > 1
    used.clear()
    assert ids(built.generate(PROMPTS[1:2], MIXED[2:])) == ids(built.generate(PROMPTS[1:2], MIXED[2:], trace=True))
    assert [name[0] for name in used if name[0] != "denoise"] == ["mixed", "prefill"]  # a step beside prompts is in no trace
    used.clear()
    assert len(built.generate(PROMPTS[1:2], SamplingParams(max_tokens=1))[0].token_ids) == 1
    assert [name[0] for name in used] == ["mixed"] + ["denoise"] * (len(used) - 1)  # which one token need not wait for
    used.clear()
    assert len(built.generate(PROMPTS[1:2], SamplingParams(max_tokens=1, accept_threshold=0.0))[0].token_ids) == 1
    assert [name[0] for name in used] == ["mixed"]
    used.clear()
    built.generate(PROMPTS[1:2], MIXED[1])
    assert "mixed" not in {name[0] for name in used}  # whose row samples

    # Whoever reads or writes pages or rows comes after what waits for a step.
    device, request = built._device, Tracked(id=99, prompt=np.arange(8, dtype=np.int32), params=MIXED[0].resolve(), slot=0, pages=[0])
    acts = {
        "save": lambda: setattr(request, "saved", device.save(request)),
        "restore": lambda: device.restore(request),
        "read": lambda: device.read(request),
        "release": lambda: device.release(0),
    }
    for name, act in acts.items():
        device.prefill([Chunk(request, 0, 2)])
        device.admit(request)
        assert device._held.entering is request and not device.state.live[0]
        act()
        assert device._held is None and bool(device.state.live[0]) == (name != "release")
        device.release(0)
    device.prefill([Chunk(request, 0, 2)])
    for slot in (1, 2):
        device.admit(dataclasses.replace(request, slot=slot))
    assert device._held.entering.slot == 2 and device.state.live.tolist() == [False, True, False, False]
    for slot in (1, 2):
        device.release(slot)


def test_a_request_past_the_last_slot_enters_none():
    program, _, _, state, _ = world(page=4)
    request = make_request(program.dims, prompt=np.array(PROMPT, np.int32), params=SamplingParams(), eos_ids=())
    jax.tree.map(np.testing.assert_array_equal, admit(program.dims, program.rule, state, jnp.int32(3), request), state)
