"""A request as the host knows it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import numpy as np

from diffulex_jax.engine.results import TraceStep
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.state import Canvas


@dataclasses.dataclass(eq=False)
class Tracked:
    """A request the scheduler knows.

    Attributes:
      id: the engine's number of the request.
      prompt: ``[n]`` int32.
      params: its settings, none left to the strategy, for one output.
      trace: steps recorded so far; None where not asked for.
      slot: where it runs or is being prefilled; None while it waits.
      pages: the pages it holds, in order of position.
      written: blocks whose KV is in those pages.
      digests: digests of its first pages, as far as they were asked for.
      start: absolute position of its window.
      tokens: generated tokens that can no longer change.
      nfe, revised, remasked: its counters, as last reported.
      saved: its row and KV while preempted.
      checked, run: how far stops were looked for, and the length of the run of equal tokens there.
      passed_over: how often later requests overtook it while it waited for pages.
      order: its number among the requests that entered a slot.
      queued, began, settled: ``time.perf_counter()`` when it was queued, first entered a slot, and had its first final tokens; 0
        before that.
    """

    id: int
    prompt: np.ndarray
    params: SamplingParams
    trace: list[TraceStep] | None = None
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    written: int = 0
    digests: list[bytes] = dataclasses.field(default_factory=list)
    start: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    nfe: int = 0
    revised: int = 0
    remasked: int = 0
    saved: Any = None
    checked: int = 0
    run: int = 0
    passed_over: int = 0
    order: int = 0
    queued: float = dataclasses.field(default_factory=time.perf_counter)
    began: float = 0.0
    settled: float = 0.0

    @property
    def known(self) -> int:
        """Absolute position up to which its tokens are known to the host."""
        return len(self.prompt) + len(self.tokens)

    @property
    def wants_sequence(self) -> bool:
        """Whether its output needs what only the device knows of each position."""
        return self.params.logprobs or self.params.return_step_map

    @property
    def salt(self) -> bytes:
        """What must agree, beside tokens, for KV to be shared: the adapter that made it, and the client's own. 0xff is in no UTF-8."""
        name = self.params.adapter_name
        return (b"" if name is None else name.encode() + b"\xff") + self.params.cache_salt.encode()

    def known_tokens(self, first: int, size: int) -> np.ndarray:
        """``[size]`` int32: the tokens of ``size`` known positions from ``first`` on."""
        n = len(self.prompt)
        return np.array([*self.prompt[first : first + size], *self.tokens[max(0, first - n) : first + size - n]], np.int32)


class Chunk(NamedTuple):
    """Blocks ``[first, first + blocks)`` of a request's prompt."""

    request: Tracked
    first: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Ended:
    """A request that left its slot by itself: why, and what is known of its positions (``[T]`` each) where that is wanted."""

    request: Tracked
    status: int
    sequence: Canvas | None
