"""Prediction update: the best allowed token, its probability and the current token's, from vocabulary logits or hidden states."""

from __future__ import annotations

from typing import Any, Literal

import jax

from pallas_kernels.remask import reference
from pallas_kernels.remask.reference import Best, Sampling, predict
from pallas_kernels.target import Target, pick


__all__ = ["Backend", "Best", "Sampling", "choose_backend", "predict", "predict_from_hidden"]

Backend = Literal["reference"]

_FROM_HIDDEN = {"reference": reference.predict_from_hidden}


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    return "reference"


def predict_from_hidden(hidden: jax.Array, lm_head: jax.Array, current: jax.Array, *, backend: str | None = None, **options: Any) -> Best:
    """:func:`predict` of the logits ``hidden @ lm_head.T`` (float32 sums), which a backend need not ever hold in memory.

    Args:
      hidden: ``[R, D]`` normalised last hidden states.
      lm_head: ``[V, D]``.
      current: ``[R]`` int32.
      backend: see :data:`Backend`; None chooses by the current mesh.
      **options: the keywords of :func:`predict`.

    Raises:
      ValueError: for an unknown backend.
    """
    return pick("remask", backend, choose_backend, _FROM_HIDDEN)(hidden, lm_head, current, **options)
