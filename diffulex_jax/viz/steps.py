"""What each forward did: how sure the model was, what was accepted and revised, how many tokens a forward made."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from diffulex_jax.engine.results import Output
from diffulex_jax.viz.denoising import (
    COMMITTED,
    CONFIDENCE,
    EDIT,
    FAINT,
    FILLED,
    INK,
    MASK,
    MASK_COLOUR,
    PROMPT,
    PROMPT_COLOUR,
    REMASK,
    WAITING,
    Grid,
    draw_ticks,
    grid,
)


ACCEPTED, KEPT, DONE = "#2d9bc1", "#cfe6ef", "#eef4f7"


def confidence(output: Output, *, ax: Axes | None = None) -> Figure:
    """Draws how sure the model was of every position after every forward: a row a forward, a column a position, masks grey.

    Args:
      output: decoded with ``trace=True``.
      ax: draw here. Default: a new figure.

    Returns:
      The figure. A new one is not registered with pyplot, so a notebook shows it once.

    Raises:
      ValueError: for an output without a trace.
    """
    cells = grid(output)
    colour = CONFIDENCE(0.05 + 0.85 * cells.confidence)
    for kind, flat in ((WAITING, "none"), (MASK, MASK_COLOUR), (PROMPT, PROMPT_COLOUR)):
        colour[cells.kind == kind] = to_rgba(flat)
    ax = _axes(cells, ax)
    _draw(ax, cells, colour, title="confidence")
    bar = ax.figure.colorbar(ScalarMappable(cmap=CONFIDENCE), ax=ax, aspect=20, fraction=0.03, pad=0.01)
    bar.ax.tick_params(length=0, labelcolor=FAINT, labelsize=8)
    bar.outline.set_visible(False)
    return _figure(ax)


def events(output: Output, *, ax: Axes | None = None) -> Figure:
    """Draws what every forward did to every position: accepted a token, revised one, masked one again, or left it. Args as of
    :func:`confidence`."""
    cells = grid(output)
    colours = {
        "masked": (cells.kind == MASK, MASK_COLOUR),
        "kept": (cells.kind == FILLED, KEPT),
        "accepted": (accepted(cells), ACCEPTED),
        "revised": (cells.revised, EDIT),
        "masked again": (cells.remasked, REMASK),
        "committed": (cells.kind == COMMITTED, DONE),
        "prompt": (cells.kind == PROMPT, PROMPT_COLOUR),
    }
    colour = np.zeros((*cells.kind.shape, 4))
    for where, flat in colours.values():
        colour[where] = to_rgba(flat)
    ax = _axes(cells, ax)
    _draw(ax, cells, colour, title="accepted and revised")
    _legend(ax, {name: flat for name, (where, flat) in colours.items() if where.any()})
    return _figure(ax)


def tokens_per_step(output: Output, *, ax: Axes | None = None) -> Figure:
    """Draws how many tokens every forward accepted, and how many it revised; what was masked again counts below zero. Args as of
    :func:`confidence`."""
    cells = grid(output)
    forwards = np.arange(1, len(cells.kind) + 1)
    counts = {"accepted": accepted(cells).sum(1), "revised": cells.revised.sum(1), "masked again": -cells.remasked.sum(1)}
    colours = {"accepted": ACCEPTED, "revised": EDIT, "masked again": REMASK}
    if ax is None:
        ax = _new(width=max(6.0, 1.5 + 0.12 * len(forwards)), height=2.4)
    for name, below in (("accepted", 0), ("revised", counts["accepted"]), ("masked again", 0)):
        ax.bar(forwards, counts[name], bottom=below, color=colours[name], width=0.8)
    ax.axhline(output.tokens_per_forward, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    _legend(ax, {name: colours[name] for name, count in counts.items() if count.any()})
    ax.set_title(f"{output.tokens_per_forward:.1f} tokens a forward (dashed)", loc="left", color=INK, fontsize=11)
    ax.set_xlabel("forward", color=FAINT, fontsize=9)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelcolor=FAINT, labelsize=8)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return _figure(ax)


def accepted(cells: Grid) -> np.ndarray:
    """``[n, C]`` bool: positions that a forward found masked and filled. Those given with the request have no confidence."""
    before = np.vstack([np.full_like(cells.kind[:1], WAITING), cells.kind[:-1]])
    return (cells.kind == FILLED) & ((before == MASK) | (before == WAITING)) & (cells.confidence > 0)


def _draw(ax: Axes, cells: Grid, colour: np.ndarray, *, title: str) -> None:
    height, width = cells.kind.shape
    ax.imshow(colour, extent=(0, width, height, 0), aspect="auto", interpolation="nearest")
    for boundary in cells.boundaries:
        ax.axvline(boundary - cells.position, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    draw_ticks(ax, cells)
    ax.set_title(title, loc="left", color=INK, fontsize=11)
    ax.set_xlabel("position", color=FAINT, fontsize=9)
    ax.set_ylabel("forward", color=FAINT, fontsize=9)


def _legend(ax: Axes, colours: dict[str, str]) -> None:
    ax.legend(
        handles=[Patch(color=colour, label=name) for name, colour in colours.items()], loc="lower right", bbox_to_anchor=(1, 1),
        ncols=len(colours), frameon=False, fontsize=8, labelcolor=FAINT, handlelength=1.0, columnspacing=1.2,
    )  # fmt: skip


def _axes(cells: Grid, ax: Axes | None) -> Axes:
    """The axes to draw in; new ones have room for each cell, up to a page."""
    height, width = cells.kind.shape
    return ax or _new(width=min(14.0, max(6.0, 0.12 * width)), height=min(10.0, 1.0 + 0.16 * height))


def _new(*, width: float, height: float) -> Axes:
    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure.subplots()


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure
