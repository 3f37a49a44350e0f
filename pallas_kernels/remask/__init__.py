"""The decision of a step: which masks are filled, which filled tokens give way, which are masked again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import jax

from pallas_kernels.remask import decision, tpu
from pallas_kernels.remask.decision import Decision
from pallas_kernels.target import Target, pick


__all__ = ["Backend", "Decision", "choose_backend", "decide", "decided_by"]

Backend = Literal["reference", "tpu"]

_BACKENDS = {"reference": decision.decide, "tpu": tpu.decide}


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise. XLA makes two or three small kernels of the reference on a GPU."""
    return "tpu" if target.platform == "tpu" else "reference"


_DECIDED_BY: ContextVar[str | None] = ContextVar("decided_by", default=None)


@contextlib.contextmanager
def decided_by(backend: str) -> Iterator[None]:
    """While code is traced in this context, :func:`decide` uses ``backend`` where it is given none: rules know of no backends."""
    token = _DECIDED_BY.set(backend)
    try:
        yield
    finally:
        _DECIDED_BY.reset(token)


def decide(
    tokens: jax.Array,
    masked: jax.Array,
    confidence: jax.Array,
    editable: jax.Array,
    *,
    token: jax.Array,
    prob: jax.Array,
    current_prob: jax.Array,
    times: jax.Array,
    accept_threshold: jax.Array,
    edit_threshold: jax.Array,
    remask_threshold: jax.Array,
    least: jax.Array,
    max_per_position: int,
    backend: str | None = None,
) -> Decision:
    """Fills masks, revises filled tokens and masks doubtful ones again: what the rules threshold, edit and remask do in a chain.

    Args:
      tokens: ``[S, K, B]`` int32, the window.
      masked: ``[S, K, B]`` bool, what is masked.
      confidence: ``[S, K, B]`` float32, probability of each token when it was last written.
      editable: ``[S, K, B]`` bool, positions that may change.
      token, prob, current_prob: ``[S, K, B]``, the prediction (see ``prediction.Best``).
      times: ``[S, K, B]`` int32, how often each position was masked again so far.
      accept_threshold: ``[S]`` float32; masks predicted above it are filled.
      edit_threshold: ``[S]`` float32; filled tokens give way to another token predicted above it.
      remask_threshold: ``[S]`` float32; filled tokens of a lower probability are masked again.
      least: ``[S, K]`` int32, masks to fill at least in each block.
      max_per_position: how often a position may be masked again.
      backend: see :data:`Backend`; None takes that of :func:`decided_by`, else chooses by the current mesh.

    Raises:
      ValueError: for an unknown backend, or an array of the wrong shape.
    """
    windows = {"tokens": tokens, "masked": masked, "confidence": confidence, "editable": editable, "times": times}
    windows |= {"token": token, "prob": prob, "current_prob": current_prob}
    slots = {"accept_threshold": accept_threshold, "edit_threshold": edit_threshold, "remask_threshold": remask_threshold}
    for arrays, shape in ((windows, tokens.shape), (slots, tokens.shape[:1]), ({"least": least}, tokens.shape[:2])):
        for name, array in arrays.items():
            if array.shape != shape:
                raise ValueError(f"remask.decide: {name} has shape {array.shape}, expected {shape}")
    bounds = (*(a[:, None, None] for a in slots.values()), least[..., None])
    backend = _DECIDED_BY.get() if backend is None else backend
    return pick("remask", backend, choose_backend, _BACKENDS)(*windows.values(), *bounds, at_most=max_per_position)
