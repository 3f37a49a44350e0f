"""Prompts packed into forwards: a block's KV is the same, to the bit, however prompts are cut and whatever goes with them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import composite, integers, lists, permutations
from scripted import KERNELS, MODEL

from diffulex_jax import decode
from diffulex_jax.engine import packing, programs
from diffulex_jax.engine.packing import Shape
from diffulex_jax.engine.request import Chunk, Tracked
from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.base import init
from diffulex_jax.rules import dims_for
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import KVPool
from diffulex_jax.strategies import dmax


LENGTHS = (70, 33, 9, 31)  # tokens of prompts, which are slots' at the same time
TOKENS = 80  # of a slot
PARAMS = init(MODEL, jax.random.key(0), scale=0.5)
GEOMETRIES = {"4 in 8": (4, 8), "8 in 2 pages": (8, 4), "16": (16, 16)}


def program_of(block: int, page: int, policy: AttentionPolicy | None = None) -> decode.Program:
    rule = dmax()
    sizes = {"slots": len(LENGTHS), "window": 1, "block": block, "page": page, "pages_per_slot": TOKENS // page}
    return decode.Program(MODEL, dims_for(rule, **sizes, mask_id=MODEL.spec.mask_id), rule, KERNELS, policy or AttentionPolicy())


class World:
    """Prompts, their pages, and a pool that holds nothing readable."""

    def __init__(self, block: int, page: int, policy: AttentionPolicy | None = None):
        self.program = program_of(block, page, policy)
        dims, rng = self.program.dims, np.random.default_rng(0)
        pages = rng.permutation(dims.slots * dims.pages_per_slot).reshape(dims.slots, -1)
        self.requests = [
            Tracked(id=i, prompt=rng.integers(0, 14, n).astype(np.int32), params=SamplingParams(), pages=pages[i].tolist())
            for i, n in enumerate(LENGTHS)
        ]
        self.whole = [n // block for n in LENGTHS]
        self.shapes = packing.prefill_shapes(self.program, (64,), budget=1000)
        self._prefill = jax.jit(functools.partial(programs.prefill, self.program))

    def table(self, pages) -> np.ndarray:
        table = np.full(self.program.dims.pages_per_slot, self.program.dims.slots * self.program.dims.pages_per_slot, np.int32)
        table[: len(pages)] = pages
        return table

    def pool(self) -> KVPool:
        layers, dims = MODEL.spec.layers, self.program.dims
        shape = (layers.count, dims.slots * dims.pages_per_slot, dims.page, layers.kv_heads, layers.head_dim)
        return KVPool(*[jnp.full(shape, jnp.nan)] * 2)

    def prefilled(self, *rounds: list[Chunk]) -> KVPool:
        """The pool after the device was given ``rounds``, one after the other."""
        pool = self.pool()
        for chunks in rounds:
            for packed, _ in packing.pack(self.program, self.shapes, chunks, table_of=self.table):
                pool, _ = self._prefill(PARAMS, pool, packed.prompts)
        return pool

    def alone(self) -> KVPool:
        return self.prefilled(*([Chunk(request, 0, count)] for request, count in zip(self.requests, self.whole, strict=True)))


world_of = functools.cache(lambda name: World(*GEOMETRIES[name]))
alone_of = functools.cache(lambda name: world_of(name).alone())


@composite
def cuts(draw):
    """For each prompt, fractions at which it is cut; the order in which chunks come; and how many of them make a round."""
    fractions = [draw(lists(integers(0, 100), max_size=4)) for _ in LENGTHS]
    order = draw(permutations([i for i, at in enumerate(fractions) for _ in range(len(at) + 1)]))
    return fractions, order, draw(lists(integers(1, 9), min_size=1, max_size=8))


@pytest.mark.sweep_but("8 in 2 pages")
@pytest.mark.parametrize("name", GEOMETRIES)
@given(cuts())
def test_a_block_is_the_same_however_prompts_are_cut_and_packed(name, drawn):
    world, (fractions, order, sizes) = world_of(name), drawn
    left = []
    for request, whole, at in zip(world.requests, world.whole, fractions, strict=True):
        ends = [0, *sorted(whole * percent // 100 for percent in at), whole]
        left.append([Chunk(request, a, b - a) for a, b in zip(ends, ends[1:], strict=False)])
    chunks = [left[i].pop(0) for i in order]
    chunks = [chunk for chunk in chunks if chunk.blocks]
    rounds = []
    while chunks:
        size = sizes[len(rounds) % len(sizes)]
        rounds.append(chunks[:size])
        chunks = chunks[size:]
    jax.tree.map(np.testing.assert_array_equal, world.prefilled(*rounds), alone_of(name))
    assert world._prefill._cache_size() == 1


@pytest.mark.parametrize("name", GEOMETRIES)
def test_just_the_blocks_asked_for_are_written(name):
    world, pool = world_of(name), alone_of(name)
    page, block = world.program.dims.page, world.program.dims.block
    for request, whole in zip(world.requests, world.whole, strict=True):
        flat = np.asarray(pool.k[:, request.pages]).reshape(MODEL.spec.layers.count, -1)
        written = ~np.isnan(flat).reshape(*flat.shape[:1], len(request.pages) * page, -1).any((0, 2))
        assert written.tolist() == [i < whole * block for i in range(TOKENS)]


def test_a_prompt_is_one_sequence():
    """What its rows see of each other is what a forward over all of it sees: the blocks before and their own."""
    whole, packed = World(4, 8, AttentionPolicy("whole")), world_of("4 in 8")
    causal = whole.program._replace(attention=AttentionPolicy())
    request = whole.requests[0]
    shape = Shape(1, -(-TOKENS // 4))
    row = packing.packed(whole.program.dims, shape, {0: packing.Row(request, 0, 17, 0, 17)}, table_of=whole.table)
    pool, _ = jax.jit(functools.partial(programs.prefill, causal))(PARAMS, whole.pool(), row.prompts)
    for got, want in zip(jax.tree.leaves(packed.prefilled([Chunk(request, 0, 17)])), jax.tree.leaves(pool), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_whole_prompt_sees_the_part_that_is_left_to_decoding():
    """And nothing past it: what lies in the rest of the row changes nothing."""
    world = World(4, 8, AttentionPolicy("whole"))
    assert world.shapes == [Shape(1, n) for n in (2, 4, 8, 16, 32)]
    request, pools = world.requests[2], []  # 9 tokens: two blocks, and a token of a third
    for last in (1, 1, 2):
        prompt = np.append(request.prompt[:8], last).astype(np.int32)
        pools.append(world.prefilled([Chunk(Tracked(id=0, prompt=prompt, params=SamplingParams(), pages=request.pages), 0, 2)]))
    same, other = (np.asarray(pool.v[1, request.pages[0]]) for pool in pools[1:])
    np.testing.assert_array_equal(pools[0].v[1, request.pages[0]], same)
    assert np.abs(same - other).min() > 0
    assert np.isnan(pools[0].k[:, request.pages[1]]).all()


@pytest.mark.parametrize(
    ("block", "page", "slots", "sizes", "budget", "shapes"),
    [
        (32, 32, 8, (256, 1024, 4096), 2048, [(8, 1), (32, 1)]),  # a round holds no more
        (4, 8, 8, (256,), 2048, [(8, 8)]),  # a row of 32 tokens is eight blocks
        (64, 64, 8, (256,), 2048, [(4, 1)]),
        (32, 32, 1, (256, 1024), 2048, [(3, 1)]),  # one slot of 80 tokens never has more
        (32, 32, 8, (128,), 20, [(4, 1)]),
    ],
)
def test_shapes(block, page, slots, sizes, budget, shapes):
    rule, tokens = dmax(), 80 if slots == 1 else 4096
    sizes_of = {"slots": slots, "window": 1, "block": block, "page": page, "pages_per_slot": -(-tokens // page)}
    program = decode.Program(MODEL, dims_for(rule, **sizes_of, mask_id=15), rule, KERNELS)
    assert packing.prefill_shapes(program, sizes, budget=budget) == [Shape(*shape) for shape in shapes]


def test_many_rows_take_few_forwards():
    world = world_of("16")  # 4, 2, 0 and 1 blocks: four rows of two
    chunks = [Chunk(request, 0, count) for request, count in zip(world.requests, world.whole, strict=True) if count]
    made = list(packing.pack(world.program, [Shape(1, 2), Shape(3, 2)], chunks, table_of=world.table))
    assert [packed.prompts.tokens.shape for packed, _ in made] == [(3, 2, 16), (1, 2, 16)]
    assert [packed.prompts.length.tolist() for packed, _ in made] == [[32, 32, 32], [16]]


def test_a_shard_computes_its_own_prompts():
    """Four slots in two shards, prompts of 70, 33 and 31 tokens in blocks of 16: in the fuller one three rows of two blocks."""
    world = world_of("16")
    requests = [dataclasses.replace(world.requests[i], slot=slot) for i, slot in ((0, 1), (1, 2), (3, 0))]
    chunks = [Chunk(request, 0, len(request.prompt) // 16) for request in requests]
    ((packed, whose),) = packing.pack(world.program, [Shape(1, 2), Shape(3, 2)], chunks, table_of=world.table, shards=2)
    assert packed.prompts.length.tolist() == [32, 32, 16, 32, 0, 0]
    assert {row: request.slot for row, request in whose.items()} == {0: 1, 1: 1, 2: 0, 3: 2}
    assert packed.prompts.page_table[3].tolist() == world.table(requests[1].pages).tolist()
    assert packing.prefill_shapes(world.program, (64, 1024), budget=1024, shards=2) == [Shape(2, 2), Shape(6, 2)]


def test_the_shape_of_a_whole_prompt_is_its_own():
    """Not that of a longer one that another shard computes: a matmul's rounding may change with its shape."""
    world = World(4, 8, AttentionPolicy("whole"))
    requests = [dataclasses.replace(world.requests[i], slot=slot) for slot, i in enumerate((2, 3, 1, 2))]
    chunks = [Chunk(request, 0, len(request.prompt) // 4) for request in requests]  # 9, 31, 33 and 9 tokens
    made = list(packing.pack(world.program, world.shapes, chunks, table_of=world.table, shards=2))
    assert [packed.prompts.tokens.shape for packed, _ in made] == [(2, 4, 4), (2, 8, 4), (2, 16, 4)]
    assert [[requests.index(request) for request in whose.values()] for _, whose in made] == [[0, 3], [1], [2]]
