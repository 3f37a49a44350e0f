"""Pictures of decoding. All but :func:`replay` need matplotlib: ``pip install "diffulex-jax[viz]"``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffulex_jax import lazy


if TYPE_CHECKING:
    from diffulex_jax.viz.comparison import compare
    from diffulex_jax.viz.denoising import canvas
    from diffulex_jax.viz.replaying import replay
    from diffulex_jax.viz.steps import confidence, events, tokens_per_step


__all__ = ["canvas", "compare", "confidence", "events", "replay", "tokens_per_step"]

_find = lazy.names(
    __name__,
    {
        "canvas": "diffulex_jax.viz.denoising",
        "compare": "diffulex_jax.viz.comparison",
        "confidence": "diffulex_jax.viz.steps",
        "events": "diffulex_jax.viz.steps",
        "replay": "diffulex_jax.viz.replaying",
        "tokens_per_step": "diffulex_jax.viz.steps",
    },
)


def __getattr__(name: str) -> Any:
    try:
        return _find(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError('diffulex_jax.viz needs matplotlib: pip install "diffulex-jax[viz]"') from error
