"""The canvas denoising, as a picture: a row a forward, a column a position."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from diffulex_jax.engine.results import Output


WAITING, PROMPT, MASK, FILLED, COMMITTED = range(5)

CONFIDENCE = mpl.colormaps["YlGnBu"]
MASK_COLOUR, PROMPT_COLOUR, INK, FAINT, EDIT, REMASK = "#e9ebee", "#c9ccd3", "#1f2933", "#7b8794", "#e8590c", "#c2255c"
CELL_WIDTH, CELL_HEIGHT = 0.36, 0.3  # inches
SMALLEST_CELL_WITH_TEXT = 0.25  # inches
SMALLEST_FONT, LARGEST_FONT = 6.0, 9.5  # points


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is drawn: n forwards, C positions.

    Attributes:
      forward: number of the first row, from 1 on.
      position: absolute position of the first column.
      kind: ``[n, C]`` WAITING (not in the window yet), PROMPT, MASK, FILLED, or COMMITTED (no longer in the window).
      tokens, confidence: ``[n, C]`` where filled or committed, else 0.
      revised, remasked: ``[n, C]`` bool, filled tokens that this forward changed or masked again.
      boundaries: absolute positions between blocks.
    """

    forward: int
    position: int
    kind: np.ndarray
    tokens: np.ndarray
    confidence: np.ndarray
    revised: np.ndarray
    remasked: np.ndarray
    boundaries: list[int]

    def blocks(self) -> list[Grid]:
        """One grid a block: its columns, and its rows from its first token to its last forward."""
        parts = []
        for start, end in itertools.pairwise([self.position, *self.boundaries, self.position + self.kind.shape[1]]):
            columns = slice(start - self.position, end - self.position)
            begun = (self.kind[:, columns] >= FILLED).any(1)
            open_ = ((self.kind[:, columns] == MASK) | (self.kind[:, columns] == FILLED)).any(1)
            rows = np.flatnonzero(begun & open_)
            if rows.size:
                cut = np.s_[rows[0] : rows[-1] + 1, columns]
                arrays = {name: getattr(self, name)[cut] for name in ("kind", "tokens", "confidence", "revised", "remasked")}
                parts.append(Grid(forward=self.forward + int(rows[0]), position=start, boundaries=[], **arrays))
        return parts


def grid(output: Output) -> Grid:
    """The trace of an output by absolute position, from its first window to the end of the answer and its EOS.

    Raises:
      ValueError: for an output without a trace.
    """
    if not output.trace:
        raise ValueError("this output has no trace; pass trace=True to Engine.generate")
    prompt, first = len(output.prompt_token_ids), output.trace[0].start
    end = prompt + len(output.token_ids) + (output.finish_reason == "stop")
    shape = len(output.trace), end - first
    kind, tokens, confidence = np.full(shape, WAITING), np.zeros(shape, int), np.zeros(shape)
    revised, remasked = np.zeros(shape, bool), np.zeros(shape, bool)
    boundaries = set()
    for i, step in enumerate(output.trace):
        done, width = step.start - first, min(len(step.tokens), end - step.start)
        here = np.s_[i, done : done + width]
        boundaries |= {step.start, step.start + len(step.tokens)}
        kind[i, :done] = COMMITTED
        if done:
            tokens[i, :done], confidence[i, :done] = tokens[i - 1, :done], confidence[i - 1, :done]
        kind[here] = np.where(step.masked, MASK, FILLED)[:width]
        tokens[here] = np.where(step.masked, 0, step.tokens)[:width]
        confidence[here] = np.where(step.masked, 0, step.confidence)[:width]
        revised[here], remasked[here] = step.revised[:width], step.remasked[:width]
        kind[i, : max(0, prompt - first)] = PROMPT
    return Grid(1, first, kind, tokens, confidence, revised, remasked, sorted(b for b in boundaries if first < b < end))


def canvas(output: Output, *, decode_token: Callable[[int], str] | None = None, ax: Axes | None = None) -> Figure:
    """Draws how an output came about: confidence as colour, masks grey, edits framed, tokens masked again crossed.

    Args:
      output: decoded with ``trace=True``.
      decode_token: text of one token id; written into the cells where they are wide enough.
      ax: draw all blocks side by side here. Default: a new figure with a panel for each block.

    Returns:
      The figure. A new one is not registered with pyplot, so a notebook shows it once.

    Raises:
      ValueError: for an output without a trace.
    """
    whole = grid(output)
    parts = whole.blocks() if ax is None else [whole]
    columns, rows = max(part.kind.shape[1] for part in parts), [part.kind.shape[0] for part in parts]
    if ax is None:
        size = max(6.0, columns * CELL_WIDTH + 1.3), sum(rows) * CELL_HEIGHT + 0.35 * len(parts) + 0.9
        figure = plt.figure(figsize=size, layout="constrained")
        plt.close(figure)
        axes = list(figure.subplots(len(parts), 1, height_ratios=rows, squeeze=False)[:, 0])
    else:
        axes = [ax]
    for part, axis in zip(parts, axes, strict=True):
        _draw_cells(axis, part, columns)
        draw_ticks(axis, part)
    _draw_legend(axes, parts, output)
    root = axes[0].get_figure(root=True)
    assert root is not None
    if decode_token is not None:
        root.draw_without_rendering()  # lays out: from here on it is known how wide a cell is
        room = root.get_figwidth() * axes[0].get_position().width / columns
        if room >= SMALLEST_CELL_WITH_TEXT:
            for part, axis in zip(parts, axes, strict=True):
                _draw_texts(axis, part, room, decode_token)
    return root


def _draw_cells(ax: Axes, cells: Grid, columns: int) -> None:
    colour = CONFIDENCE(0.05 + 0.85 * cells.confidence)
    colour[cells.kind == COMMITTED] = 0.45 * colour[cells.kind == COMMITTED] + 0.55  # towards white
    for kind, flat in ((WAITING, "none"), (MASK, MASK_COLOUR), (PROMPT, PROMPT_COLOUR)):
        colour[cells.kind == kind] = to_rgba(flat)
    height, width = cells.kind.shape
    ax.pcolormesh(np.arange(width + 1), np.arange(height + 1), colour, edgecolors="white", linewidth=1.2)
    for y, x in zip(*np.nonzero(cells.revised), strict=True):
        ax.add_patch(Rectangle((x + 0.07, y + 0.07), 0.86, 0.86, fill=False, edgecolor=EDIT, linewidth=1.8))
    y, x = np.nonzero((cells.kind == MASK) & ~cells.remasked)
    ax.scatter(x + 0.5, y + 0.5, s=3, color=FAINT, linewidths=0)
    y, x = np.nonzero(cells.remasked)
    ax.scatter(x + 0.5, y + 0.5, s=22, color=REMASK, marker="x", linewidths=1.4)
    for boundary in cells.boundaries:
        ax.axvline(boundary - cells.position, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    ax.set_xlim(0, columns)
    ax.set_ylim(height, 0)


def draw_ticks(ax: Axes, cells: Grid) -> None:
    height, width = cells.kind.shape
    every = 8 if width <= 128 else 32
    positions = [p for p in range(cells.position, cells.position + width) if p % every == 0]
    ax.set_xticks([p - cells.position + 0.5 for p in positions], [str(p) for p in positions])
    every = -(-height // 24)
    rows = range(every - 1, height, every)
    ax.set_yticks([row + 0.5 for row in rows], [str(cells.forward + row) for row in rows])
    ax.tick_params(length=0, labelcolor=FAINT, labelsize=8)
    ax.spines[:].set_visible(False)


def _draw_texts(ax: Axes, cells: Grid, room: float, decode_token: Callable[[int], str]) -> None:
    """Writes token texts into cells that are ``room`` inches wide; what does not fit at the smallest size is cut."""
    labels = {int(token): _printable(decode_token(int(token))) for token in np.unique(cells.tokens[cells.kind >= FILLED])}
    fit = room * 72 / 0.7  # points x characters: a character and its share of the margin are about 0.7 of the font size
    most = int(fit / SMALLEST_FONT)
    for y, x in zip(*np.nonzero(cells.kind >= FILLED), strict=True):
        text = labels[int(cells.tokens[y, x])]
        text = text if len(text) <= most else text[: most - 1] + "…"
        size = min(LARGEST_FONT, fit / len(text))
        colour = "white" if cells.kind[y, x] == FILLED and cells.confidence[y, x] > 0.5 else INK
        ax.text(x + 0.5, y + 0.53, text, fontsize=size, color=colour, ha="center", va="center", parse_math=False)


def _draw_legend(axes: list[Axes], parts: list[Grid], output: Output) -> None:
    kinds = set(np.concatenate([part.kind.ravel() for part in parts]).tolist())
    handles = {
        "mask": (MASK in kinds, Line2D([], [], linestyle="", marker=".", color=FAINT)),
        "prompt": (PROMPT in kinds, Patch(color=PROMPT_COLOUR)),
        "committed": (COMMITTED in kinds, Patch(color=CONFIDENCE(0.9), alpha=0.45)),
        "edited": (any(part.revised.any() for part in parts), Patch(fill=False, edgecolor=EDIT, linewidth=1.8)),
        "masked again": (any(part.remasked.any() for part in parts), Line2D([], [], linestyle="", marker="x", color=REMASK)),
    }
    shown = {label: handle for label, (present, handle) in handles.items() if present}
    top, bottom = axes[0], axes[-1]
    speed = f"{len(output.token_ids)} tokens in {output.nfe} forwards, {output.tokens_per_forward:.1f} a forward"
    top.set_title(f"{speed}, {output.revised_tokens} edited", loc="left", color=INK, fontsize=11, pad=10)
    if shown:  # matplotlib takes no legend of nothing
        top.legend(
            handles=list(shown.values()), labels=list(shown), loc="lower right", bbox_to_anchor=(1, 1), ncols=len(shown), frameon=False,
            fontsize=8, labelcolor=FAINT, handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip
    tallest = max(zip(axes, parts, strict=True), key=lambda panel: len(panel[1].kind))[0]
    tallest.set_ylabel("forward", color=FAINT, fontsize=9)
    bottom.set_xlabel("position", color=FAINT, fontsize=9)
    bar = top.figure.colorbar(ScalarMappable(cmap=CONFIDENCE), ax=axes, aspect=30, fraction=0.02, pad=0.01)
    bar.set_label("confidence", color=FAINT, fontsize=9)
    bar.ax.tick_params(length=0, labelcolor=FAINT, labelsize=8)
    bar.outline.set_visible(False)


def _printable(text: str) -> str:
    """A token's text, trimmed; what there is of it, made visible, where it is nothing but space."""
    return text.strip() or text.replace("\n", "⏎").replace(" ", "␣") or "∅"
