"""Pictures of a load. They need matplotlib: ``pip install "diffulex-jax[serve]"``."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from diffulex_jax.bench.load import Load, Seen


_GOOD, _BAD, _LIMIT, _INK = "#2c7fb8", "#c2255c", "#e8590c", "#1f2933"


def draw(seen: Sequence[Seen], load: Load, path: pathlib.Path) -> None:
    """Writes one PNG: answers over time, throughput over time, and how latencies are distributed.

    Args:
      seen: the requests of a load.
      load: what it was; its limits are drawn.
      path: of the file.

    Raises:
      ValueError: where no request succeeded.
    """
    good, bad = [s for s in seen if s.ok], [s for s in seen if not s.ok]
    if not good:
        raise ValueError("no request succeeded; there is nothing to draw")
    figure, ((over_time, rates), (first, whole)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    over_time.scatter([s.sent for s in good], [s.e2e for s in good], s=9, color=_GOOD, label=f"{len(good)} answered")
    if bad:
        over_time.scatter([s.sent for s in bad], [s.e2e for s in bad], s=12, color=_BAD, marker="x", label=f"{len(bad)} failed")
    over_time.legend(frameon=False)
    _label(over_time, "whole answer, by when it was asked for", "seconds since the load began", "seconds")
    ends = np.array([s.done for s in good])
    edges = np.linspace(0, ends.max(), max(2, min(60, len(good) // 4)))
    tokens, _ = np.histogram(ends, edges, weights=[s.tokens for s in good])
    rates.stairs(tokens / np.diff(edges), edges, color=_GOOD, fill=True, alpha=0.6)
    _label(rates, "tokens of answers completed, a second", "seconds since the load began", "tokens/s")
    curves = {"first block": [s.ttfb for s in good], "between blocks": [gap for s in good for gap in s.gaps]}
    for (name, values), colour in zip(curves.items(), (_GOOD, _INK), strict=True):
        if values:
            first.ecdf(values, label=name, color=colour)
    first.axvline(load.ttfb_limit, color=_LIMIT, ls=":", label="limit of the first block")
    first.legend(frameon=False)
    _label(first, "blocks that came within", "seconds", "share")
    whole.ecdf([s.e2e for s in good], color=_GOOD)
    whole.axvline(load.e2e_limit, color=_LIMIT, ls=":", label="limit")
    whole.legend(frameon=False)
    _label(whole, "answers that were complete within", "seconds", "share")
    for axes in (first, whole):
        axes.set_xlim(left=0)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
