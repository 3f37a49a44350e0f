"""What a load on a server is, and the figures of one."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """How requests arrive.

    Attributes:
      requests: how many there are in all.
      concurrency: (closed loop) clients that each send their next request when the last is answered.
      rate: (open loop, in place of clients) requests a second on average, at random moments, whether answers come or not. 0: closed loop.
      ramp_seconds: clients start, or the rate rises, evenly over this time.
      ttfb_limit: a request is good only if its first block came within so many seconds.
      e2e_limit: a request is good only if it was complete within so many seconds.
      load_seed: of the moments of arrival.
    """

    requests: int = 100
    concurrency: int = 8
    rate: float = 0.0
    ramp_seconds: float = 0.0
    ttfb_limit: float = 1.0
    e2e_limit: float = 10.0
    load_seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 1 if field.name in ("requests", "concurrency") else 0
            if not value >= least or value == float("inf"):
                raise ValueError(f"{field.name}={value} must be at least {least}")


@dataclasses.dataclass
class Seen:
    """One request as its client saw it; times in seconds, ``sent`` and ``done`` since the load began.

    Attributes:
      status: of HTTP, or of the error in the stream; 0 where there was no answer.
      blocks: when each commit came, since the load began.
    """

    sent: float
    done: float = 0.0
    status: int = 0
    blocks: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    nfe: int = 0

    @property
    def ok(self) -> bool:
        return self.status == 200

    @property
    def ttfb(self) -> float:
        """Time to the first block."""
        return self.blocks[0] - self.sent if self.blocks else self.done - self.sent

    @property
    def e2e(self) -> float:
        """Time to the complete answer."""
        return self.done - self.sent

    @property
    def gaps(self) -> list[float]:
        """Between blocks."""
        return [b - a for a, b in itertools.pairwise(self.blocks)]


def arrivals(load: Load) -> Iterator[float]:
    """Moments of an open loop, in seconds: Poisson, at a rate that rises to ``rate`` over ``ramp_seconds``."""
    rng, expected = random.Random(load.load_seed), 0.0
    while True:
        expected += rng.expovariate(1.0)  # the number of arrivals a moment corresponds to
        in_ramp = load.rate * load.ramp_seconds / 2
        if expected < in_ramp:
            yield (2 * expected * load.ramp_seconds / load.rate) ** 0.5
        else:
            yield load.ramp_seconds + (expected - in_ramp) / load.rate


def report(seen: Sequence[Seen], load: Load, seconds: float) -> dict[str, Any]:
    """Figures of a load, ready for JSON.

    ``goodput``: requests a second that kept both limits. ``tokens_per_forward``: over all outputs. ``errors``: how many by status (0: no
    answer). ``ttfb`` (time to first block), ``inter_block``, ``e2e``: seconds, of requests that succeeded.
    """
    good = [s for s in seen if s.ok]
    tokens, nfe = sum(s.tokens for s in good), sum(s.nfe for s in good)
    kept = sum(s.ttfb <= load.ttfb_limit and s.e2e <= load.e2e_limit for s in good)
    return {
        "load": dataclasses.asdict(load),
        "seconds": seconds,
        "requests": len(seen),
        "succeeded": len(good),
        "errors": dict(collections.Counter(str(s.status) for s in seen if not s.ok)),
        "requests_per_second": len(good) / seconds,
        "goodput": kept / seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "nfe": nfe,
        "nfe_per_request": nfe / max(len(good), 1),
        "tokens_per_forward": tokens / max(nfe, 1),
        "ttfb": spread([s.ttfb for s in good]),
        "inter_block": spread([gap for s in good for gap in s.gaps]),
        "e2e": spread([s.e2e for s in good]),
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    if not values:
        return None
    points = (50, 90, 95, 99)
    return {"mean": float(np.mean(values))} | {f"p{p}": float(v) for p, v in zip(points, np.percentile(values, points), strict=True)}


def text(figures: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    lines = {
        "requests": f"{figures['succeeded']} of {figures['requests']} in {figures['seconds']:.1f} s; errors {figures['errors'] or 'none'}",
        "requests/s": f"{figures['requests_per_second']:.2f}, of them good {figures['goodput']:.2f}",
        "tokens/s": f"{figures['tokens_per_second']:.1f}",
        "forwards": f"{figures['nfe_per_request']:.1f} a request, {figures['tokens_per_forward']:.2f} tokens each",
    }
    for name, label in (("ttfb", "first block"), ("inter_block", "between blocks"), ("e2e", "whole answer")):
        if figures[name]:
            lines[label] = ", ".join(f"{point} {1000 * value:.0f} ms" for point, value in figures[name].items())
    return "\n".join(f"{label:>15}  {line}" for label, line in lines.items())
