"""Strategies side by side."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from diffulex_jax.engine.results import Output


_BAR, _INK, _FAINT = "#2c7fb8", "#1f2933", "#8a939f"


def compare(outputs: Mapping[str, Output]) -> Figure:
    """Draws tokens per forward and forwards of several outputs as labelled bars.

    Args:
      outputs: name (of the strategy, say) -> output.

    Returns:
      The figure; it is not registered with pyplot, so a notebook shows it once.

    Raises:
      ValueError: for no outputs.
    """
    if not outputs:
        raise ValueError("nothing to compare")
    names = [f"{name}\n{len(o.token_ids)} tokens, {o.revised_tokens} edited" for name, o in outputs.items()]
    figure = plt.figure(figsize=(9, 0.62 * len(outputs) + 0.8), layout="constrained")
    plt.close(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, title, values, colour, form in (
        (left, "tokens per forward", [o.tokens_per_forward for o in outputs.values()], _BAR, "%.1f"),
        (right, "forwards", [o.nfe for o in outputs.values()], _FAINT, "%d"),
    ):
        ax.set_title(title, loc="left", color=_INK, fontsize=11)
        ax.bar_label(ax.barh(names, values, color=colour, height=0.55), fmt=form, padding=4, color=_INK)
        ax.margins(x=0.12)
        ax.spines[:].set_visible(False)
        ax.set_xticks([])
        ax.tick_params(length=0, labelcolor=_INK, labelsize=9)
    left.invert_yaxis()
    return figure
