"""Requests in and out at any moment: no stale read, no lost page, nobody left behind."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from hypothesis.strategies import integers, sampled_from
from shadow import BLOCK, ShadowDevice, StaleRead, World

from diffulex_jax.cache.pages import PagePool
from diffulex_jax.engine.pace import Pace
from diffulex_jax.engine.request import Tracked
from diffulex_jax.sampling_params import SamplingParams


ACTIONS = ["add", "add", "step", "step", "step", "step", "abort", "preempt"]
POOLS = [4.0, 1.2, 1.0]  # times what one longest request needs


def episode(*, seed: int, **options) -> World:
    world = World(seed=seed, **options)
    for _ in range(40):
        getattr(world, world.random.choice(ACTIONS))()
    world.finish()
    return world


@pytest.mark.sweep_but("1.2-2", "1.0-4")
@pytest.mark.parametrize("blocks_of_a_page", [1, 2, 4])
@pytest.mark.parametrize("pool", POOLS)
def test_a_thousand_episodes_read_nothing_stale(pool, blocks_of_a_page):
    worlds = [episode(pool=pool, seed=seed, page=blocks_of_a_page * BLOCK) for seed in range(1000)]
    assert sum(world.device.reads for world in worlds) > 50_000
    assert sum(world.hits for world in worlds) > 1000 / blocks_of_a_page**2
    if pool < 2:
        assert sum(world.scheduler.preemptions for world in worlds) > 1000


@pytest.mark.sweep_but("4.0-1-True", "1.2-2-False", "1.0-1-False", "1.0-2-True")
@pytest.mark.parametrize("keeps_window", [False, True])
@pytest.mark.parametrize("blocks_of_a_page", [1, 2])
@pytest.mark.parametrize("pool", POOLS)
def test_the_last_block_of_a_prompt_may_be_left_to_the_first_step(pool, blocks_of_a_page, keeps_window):
    """And a window may need its pages before it is committed."""
    kind = {"commit_alone": True, "keeps_window": keeps_window}
    worlds = [episode(pool=pool, seed=seed, page=blocks_of_a_page * BLOCK, **kind) for seed in range(300)]
    assert sum(world.hits for world in worlds) > 300 / blocks_of_a_page**2


@pytest.mark.sweep_but("4.0-2", "1.2-4", "1.0-2")
@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("pool", POOLS)
def test_slots_and_pages_of_several_shards(pool, shards):
    """The device sees that every slot has pages of its own devices only."""
    worlds = [episode(pool=pool, seed=seed, shards=shards) for seed in range(300)]
    assert sum(world.hits for world in worlds) > 300 / shards
    if pool < 2:
        assert sum(world.scheduler.preemptions for world in worlds) > 100


def placed(world: World, prompts: list[list[int]]) -> list[int]:
    """The shard (of two) that each prompt is put in when they come at once."""
    requests = [Tracked(id=i, prompt=np.array(p, np.int32), params=SamplingParams(max_tokens=1)) for i, p in enumerate(prompts)]
    for request in requests:
        world.requests[request.id] = request
        world.scheduler.add(request)
    world.step()
    return [request.slot // 2 for request in requests if request.slot is not None]


def test_requests_go_where_least_runs():
    assert placed(World(pool=4.0, seed=0, shards=2), [[i] * 9 for i in range(4)]) == [0, 1, 0, 1]


def test_requests_go_where_their_prompt_begins_unless_that_is_busier():
    world, prompt = World(pool=4.0, seed=0, shards=2), [7] * 17
    assert placed(world, [[1] * 9, prompt]) == [0, 1]
    world.finish()
    assert placed(world, [prompt]) == [1]
    world.finish()
    assert placed(world, [prompt, prompt, [2] * 9, prompt]) == [1, 1, 0, 0]
    assert world.hits == 3 * (len(prompt) // BLOCK)


class InferredDevice(ShadowDevice):
    """Upstream's rule: a resumed request's finished block counts as cached, whether or not any step wrote it."""

    def restore(self, request: Tracked) -> None:
        super().restore(request)
        row = self.rows[request.slot]
        if row.ready:
            row.start, row.ready = row.start + BLOCK, False
            row.written = row.start
            request.pages += [request.pages[-1]] * (row.start // BLOCK - len(request.pages))


def test_inferring_what_is_cached_reads_stale_pages():
    """The oracle sees the defect it is there for."""
    with pytest.raises(StaleRead):
        for seed in range(200):
            episode(pool=1.0, seed=seed, device=InferredDevice)


def test_publishing_before_the_write_reads_stale_pages(monkeypatch):
    allocate = PagePool.allocate

    def publish_at_once(self, n):
        pages = allocate(self, n)
        for page in pages:
            self.publish(page, bytes([page % 7]))
        return pages

    monkeypatch.setattr(PagePool, "allocate", publish_at_once)
    monkeypatch.setattr("diffulex_jax.engine.scheduler.chain_digest", lambda parent, tokens: bytes([int(np.sum(tokens)) % 7]))
    with pytest.raises(StaleRead):
        for seed in range(50):
            episode(pool=4.0, seed=seed)


class Machine(RuleBasedStateMachine):
    @initialize(pool=sampled_from(POOLS), seed=integers(0, 2**32))
    def begin(self, pool, seed):
        self.world = World(pool=pool, seed=seed)

    @rule(action=sampled_from(ACTIONS))
    def act(self, action):
        getattr(self.world, action)()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.finish()


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase


def test_a_request_that_waits_for_pages_does_not_hold_up_small_ones():
    world = World(pool=1.0, seed=0)
    big = Tracked(id=0, prompt=np.ones(50, np.int32), params=SamplingParams(max_tokens=14))
    small = [Tracked(id=i, prompt=np.full(2, i, np.int32), params=SamplingParams(max_tokens=2)) for i in (1, 2, 3)]
    first = Tracked(id=4, prompt=np.full(30, 4, np.int32), params=SamplingParams(max_tokens=30))
    for request in [first, big, *small]:
        world.requests[request.id] = request
        world.scheduler.add(request)
    order = []
    while len(world.scheduler):
        world.step()
        order += [ended.request.id for ended in world.ended if ended.request.id not in order]
    assert set(order[:3]) == {1, 2, 3} and order[-1] == 0


def test_prompts_share_the_token_budget_in_turn():
    world = World(pool=4.0, seed=0)
    chunks = []
    prefill = world.device.prefill
    world.device.prefill = lambda given: (chunks.append([(chunk.request.id, chunk.blocks) for chunk in given]), prefill(given))
    for i, length in enumerate((60, 9)):
        request = Tracked(id=i, prompt=np.full(length, i, np.int32), params=SamplingParams(max_tokens=1))
        world.requests[i] = request
        world.scheduler.add(request)
    world.step()
    assert chunks == [[(0, 6)]]  # 24 tokens a step, blocks of 4
    world.step()
    assert chunks[1] == [(1, 2), (0, 4)]  # the short prompt is not behind the long one, and both go together
    world.finish()
    assert chunks[2] == [(0, 5)]
    assert sum(count for given in chunks for id_, count in given if id_ == 0) == 15


def test_every_shard_has_a_token_budget_of_its_own():
    world = World(pool=4.0, seed=0, shards=2)
    chunks = []
    prefill = world.device.prefill
    world.device.prefill = lambda given: (chunks.append([(chunk.request.id, chunk.blocks) for chunk in given]), prefill(given))
    for i, length in enumerate((40, 60, 60)):
        add(world, i, prompt=length, max_tokens=1)  # the first and the last in one shard, the second in the other
    world.step()
    world.step()
    assert chunks == [[(0, 6), (1, 6)], [(2, 6), (1, 6)]]  # 24 tokens a step in each, blocks of 4
    world.finish()


def add(world: World, id_: int, *, prompt: int, max_tokens: int) -> Tracked:
    request = Tracked(id=id_, prompt=np.full(prompt, id_, np.int32), params=SamplingParams(max_tokens=max_tokens))
    world.requests[id_] = request
    world.scheduler.add(request)
    return request


def test_a_prompt_with_nothing_to_prefill_waits_for_none():
    world = World(pool=4.0, seed=0)
    long, short = add(world, 0, prompt=60, max_tokens=1), add(world, 1, prompt=3, max_tokens=40)
    world.step()
    assert list(world.scheduler.running.values()) == [short] and list(world.scheduler.prefilling) == [long]


class Log(ShadowDevice):
    """Notes tokens of prompts and steps, in order."""

    def __init__(self, **kind):
        super().__init__(**kind)
        self.done: list[tuple[str, int]] = []

    def prefill(self, chunks):
        self.done.append(("prompts", 4 * sum(chunk.blocks for chunk in chunks)))
        super().prefill(chunks)

    def launch(self, running, **asked):
        before = max((self.rows[slot].nfe for slot in running), default=0)
        report = super().launch(running, **asked)
        self.done.append(("steps", int(report.nfe.max()) - before))
        return report


def test_prompts_leave_those_who_wait_for_more_two_thirds_of_the_time(monkeypatch):
    """A flood of prompts of one token each, every one of which ends a dispatch early, beside a row that decodes."""
    monkeypatch.setattr("diffulex_jax.engine.scheduler.CREDIT", 0)
    world = World(pool=6.0, seed=0, device=Log)
    world.scheduler.pace = Pace(24, (8,), 4)  # 8 tokens of prompts cost 12, a step over one block 8
    decoding = add(world, 0, prompt=3, max_tokens=61)
    while not decoding.tokens:
        world.step()
    world.device.done.clear()
    count = 0
    while world.scheduler.running.get(decoding.slot) is decoding:
        if len(world.scheduler) < 3:
            count += 1
            add(world, count, prompt=40, max_tokens=1)
        world.step()
    kinds = [(kind, [n for _, n in group]) for kind, group in itertools.groupby(world.device.done, key=lambda entry: entry[0])]
    prompts, steps = ([counts for kind, counts in kinds[:-2] if kind == wanted] for wanted in ("prompts", "steps"))
    assert len(prompts) > 5
    assert all(len(given) == 1 and given[0] <= 16 for given in prompts)
    assert min(map(sum, steps[1:])) >= 2
    assert any(len(between) > 1 for between in steps)  # some dispatch was ended early, and prompts waited all the same


def test_prompts_come_first_where_nobody_has_seen_a_token():
    """Of requests that came together, up to so many tokens; whoever comes later holds nobody up."""
    world = World(pool=6.0, seed=0, device=Log)
    world.scheduler.pace = Pace(24, (8,), 4)
    world.device.random = types.SimpleNamespace(random=lambda: 1.0)  # no block ever ends
    add(world, 0, prompt=3, max_tokens=61)
    for i in (1, 2):
        add(world, i, prompt=48, max_tokens=1)
    for _ in range(4):
        world.step()
    assert world.device.done == [*[("prompts", 24)] * 4, ("steps", world.scheduler.steps_per_dispatch)]
    add(world, 3, prompt=48, max_tokens=1)
    world.step()
    assert world.device.done[5:] == [("prompts", 24), ("steps", 2)]

    world = World(pool=6.0, seed=0, device=Log)
    world.scheduler.pace = Pace(24, (8,), 2)  # 32 times 2 tokens: at the third round
    world.device.random = types.SimpleNamespace(random=lambda: 1.0)
    add(world, 0, prompt=3, max_tokens=61)
    for i in (1, 2, 3):
        add(world, i, prompt=60, max_tokens=1)
    for _ in range(4):
        world.step()
    assert world.device.done == [*[("prompts", 24)] * 3, ("steps", 2), ("prompts", 24)]
