"""What the host does for a step costs the same at the beginning of an output and after thousands of tokens."""

from __future__ import annotations

import statistics
import time

import numpy as np

from diffulex_jax import SamplingParams
from diffulex_jax.cache.pages import PagePool
from diffulex_jax.engine.pace import Pace
from diffulex_jax.engine.request import Tracked
from diffulex_jax.engine.scheduler import Scheduler
from diffulex_jax.engine.stops import find_cut
from diffulex_jax.state import LENGTH, RUNNING, StepReport


SLOTS, BLOCK, LONGEST, A_STEP = 8, 32, 8192, 4


class Instant:
    """A device that decodes four tokens a row in no time."""

    def __init__(self):
        self.at = np.zeros(SLOTS, np.int64)

    def prefill(self, chunks):
        pass

    def admit(self, request):
        self.at[request.slot] = len(request.prompt)

    def launch(self, running, *, max_steps, stop_on_finish):
        self.at += A_STEP
        limit = np.array([running[slot].known + LONGEST for slot in range(SLOTS)])
        done = self.at >= LONGEST
        start = self.at // BLOCK * BLOCK
        zero = np.zeros(SLOTS, np.int64)
        return StepReport(
            status=np.where(done, LENGTH, RUNNING),
            nfe=zero,
            revised=zero,
            remasked=zero,
            written_upto=np.maximum(start - BLOCK, 0),
            start=start,
            settled_upto=np.minimum(self.at, limit),
            length=np.full(SLOTS, LONGEST),
            tokens=np.ones((SLOTS, 2 * BLOCK), np.int64),
        )

    def collect(self, launched):
        return launched


def test_the_host_needs_no_longer_for_a_step_of_a_long_output():
    scheduler = Scheduler(
        Instant(),
        [PagePool(SLOTS * LONGEST // BLOCK)],
        slots=SLOTS,
        block=BLOCK,
        page=BLOCK,
        window=1,
        pace=Pace(2048, (128,), 0),
        steps_per_dispatch=1,
        root=b"",
    )
    params = SamplingParams(max_tokens=LONGEST - 4, ignore_eos=True, max_repetition_run=2**30)
    for i in range(SLOTS):
        scheduler.add(Tracked(id=i, prompt=np.zeros(4, np.int32), params=params))
    spent = []
    while len(scheduler):
        began = time.thread_time()  # of this thread alone: the machine may be busy with other things
        scheduler.step()
        for request in scheduler.running.values():
            find_cut(request, None)
        spent.append(time.thread_time() - began)
    assert len(spent) > LONGEST / A_STEP - 10
    at_128, at_8192 = (1e3 * statistics.median(part) for part in (spent[8:72], spent[-200:-8]))
    assert at_128 < 0.3 and at_8192 < 0.3, f"{at_128:.3f} and {at_8192:.3f} ms a step"
    assert at_8192 < 1.5 * at_128 + 0.02, f"{at_128:.3f} ms a step at 128 tokens, {at_8192:.3f} at {LONGEST}"
    print(f"{at_128:.3f} ms a step at 128 tokens, {at_8192:.3f} at {LONGEST}")
