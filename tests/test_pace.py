"""How many tokens of prompts go between denoise steps, how many steps follow, and what becomes of it on the clock."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffulex_jax import SamplingParams
from diffulex_jax.cache.pages import PagePool
from diffulex_jax.engine.pace import Pace
from diffulex_jax.engine.request import Tracked
from diffulex_jax.engine.scheduler import Scheduler
from diffulex_jax.state import LENGTH, StepReport


HOPPER = Pace(4096, (256, 1024, 2048, 4096), 2048)
# Milliseconds on an H100, LLaDA2-mini's shape in bfloat16: of a forward over prompts by its tokens, and of a step by its rows of 32.
FORWARD = {256: 13.8, 1024: 17.1, 2048: 21.8, 4096: 33.3}
STEP = {1: 8.2, 8: 12.6, 32: 15.8}
SLOTS, BLOCK = 32, 32


@pytest.mark.parametrize("rows", [8, 32])
def test_an_h100_holds_nobody_up_for_more_than_half_the_time(rows):
    tokens = HOPPER.prompts(32 * rows)
    held, steps = FORWARD[tokens], HOPPER.steps(tokens, 32 * rows) * STEP[rows]
    assert 0.35 * steps < held < 0.55 * steps


@pytest.mark.parametrize(
    ("pace", "decoding", "tokens", "steps"),
    [
        (HOPPER, 1024, 4096, 4),  # 6144 for two steps of 3072
        (HOPPER, 256, 2048, 4),  # 4096 of 4608
        (HOPPER._replace(budget=512), 1024, 512, 2),
        (Pace(2048, (128,), 32), 128, 256, 4),  # two forwards of 160 for two steps of 160
        (Pace(2048, (128,), 32), 32, 128, 5),  # more than two steps of 64: there is no smaller forward
        (Pace(24, (8,), 0), 4, 8, 4),
    ],
)
def test_the_largest_forwards_that_cost_no_more_than_two_steps(pace, decoding, tokens, steps):
    assert (pace.prompts(decoding), pace.steps(tokens, decoding)) == (tokens, steps)


def test_credit_pays_for_more_at_once():
    assert [HOPPER.prompts(256, credit) for credit in (-3, 0, 4, 6, 14)] == [2048, 2048, 2048, 4096, 4096]
    assert Pace(2048, (128,), 32).prompts(128, credit=14) == 7 * 128  # as many forwards as cost seven steps


def test_nobody_is_owed_a_step_where_nothing_decodes():
    assert HOPPER.steps(4096, 0) == 0


def test_few_tokens_are_followed_by_few_steps():
    assert HOPPER.steps(32, 1024) == 2


class Clock:
    """A device that does nothing but take the time: every row fills ``rate`` tokens of its block a step."""

    def __init__(self, rate):
        self.rate, self.now = rate, 0.0
        self.at: dict[int, int] = {}
        self.nfe: dict[int, int] = {}

    def prefill(self, chunks):
        left = BLOCK * sum(chunk.blocks for chunk in chunks)
        while left > 0:
            size = next((size for size in FORWARD if size >= left), max(FORWARD))
            self.now, left = self.now + FORWARD[size], left - size

    def admit(self, request):
        self.at[request.slot], self.nfe[request.slot] = len(request.prompt), 0

    def launch(self, running, *, max_steps, stop_on_finish):
        self.now += 1  # of the host
        live, limit = set(running), {slot: len(r.prompt) + r.params.max_tokens for slot, r in running.items()}
        for _ in range(max_steps):
            if not live or (stop_on_finish and len(live) < len(running)):
                break
            self.now += float(np.interp(len(live), list(STEP), list(STEP.values())))
            for slot in list(live):
                end = min(limit[slot], (self.at[slot] // BLOCK + 1) * BLOCK)
                self.at[slot], self.nfe[slot] = min(end, self.at[slot] + self.rate), self.nfe[slot] + 1
                live -= {slot} if self.at[slot] == limit[slot] else set()
        report = {name: np.zeros(SLOTS, np.int64) for name in StepReport.__dataclass_fields__ if name != "tokens"}
        for slot, request in running.items():
            report["nfe"][slot], report["length"][slot] = self.nfe[slot], limit[slot]
            report["status"][slot] = 0 if slot in live else LENGTH
            report["start"][slot] = self.at[slot] // BLOCK * BLOCK
            report["settled_upto"][slot] = max(len(request.prompt), self.at[slot] // BLOCK * BLOCK)
        return StepReport(**report, tokens=np.ones((SLOTS, 40 * BLOCK), np.int64)), self.now

    def collect(self, launched):
        self.collected = launched[1]
        return launched[0]


def on_the_clock(prompts, *, output, rate, flood=0, paced=True):
    """Milliseconds until all ``prompts`` (their lengths), given at once, are answered, and those between the tokens of each that came
    together; with prompts of ``flood`` tokens in all slots that they leave."""
    device, numbers = Clock(rate), itertools.count()
    pools, sizes = [PagePool(SLOTS * 160, prefix_cache=False)], {"slots": SLOTS, "block": BLOCK, "page": BLOCK, "window": 1}
    scheduler = Scheduler(device, pools, pace=HOPPER, steps_per_dispatch=8, root=b"", **sizes)
    if not paced:
        prefill = scheduler._prefill
        scheduler._prefill, scheduler._waits_for_prompts = lambda noticed: prefill(False), lambda noticed: False

    def ask(length, output):
        params = SamplingParams(max_tokens=output, seed=0).resolve()
        scheduler.add(request := Tracked(id=next(numbers), prompt=np.ones(length, np.int32), params=params))
        return request

    mine = {ask(length, output): [] for length in prompts}
    seen, left, beside = dict.fromkeys(mine, 0), set(mine), set()
    while left:
        while flood and len(beside) < SLOTS - len(mine):
            beside.add(ask(flood, 1))
        ended = {ended.request for ended in scheduler.step()}
        for request, came in mine.items():
            if len(request.tokens) > seen[request]:
                came.append(device.collected)
                seen[request] = len(request.tokens)
        left, beside = left - ended, beside - ended
    return device.now, [gap for came in mine.values() for gap in np.diff(came)]


LENGTHS = np.random.default_rng(0).integers(400, 601, 64).tolist()


@pytest.mark.parametrize(("rows", "rate"), [(8, 1), (8, 4), (24, 1), (24, 4)])
def test_a_flood_of_prompts_makes_nobody_wait_much_longer(rows, rate):
    asked = {"output": 1000, "rate": rate}
    alone, paced, unpaced = (
        np.percentile(on_the_clock(LENGTHS[:rows], **asked, **kind)[1], 99)
        for kind in ({}, {"flood": 4000}, {"flood": 4000, "paced": False})
    )
    assert paced < 2.3 * alone and paced < 0.85 * unpaced


@pytest.mark.parametrize(
    ("prompts", "output", "rate"),
    [(LENGTHS[:32], 256, 4), (LENGTHS, 256, 4), (LENGTHS, 256, 8), ([2000] * 32, 128, 8), ([2000] * 32, 1, 8)],
)
def test_a_burst_of_requests_takes_no_longer_for_it(prompts, output, rate):
    paced, unpaced = (on_the_clock(prompts, output=output, rate=rate, paced=paced)[0] for paced in (True, False))
    assert paced < 1.05 * unpaced
