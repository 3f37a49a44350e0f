"""The decision of a step: which masks are filled, which filled tokens give way, which are masked again."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.remask import decision, tpu
from pallas_kernels.remask.decision import Decision
from pallas_kernels.target import Target, pick


__all__ = ["Backend", "Decision", "choose_backend", "decide"]

Backend = Literal["reference", "tpu"]

_BACKENDS = {"reference": decision.decide, "tpu": tpu.decide}


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise. XLA makes two or three small kernels of the reference on a GPU."""
    return "tpu" if target.platform == "tpu" else "reference"


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
    num_to_transfer: jax.Array,
    may_force: jax.Array,
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
      num_to_transfer: ``[S]`` int32, masks to fill at least in each block.
      may_force: ``[S, K]`` bool, blocks that this holds for; the others may fill none.
      max_per_position: how often a position may be masked again.
      backend: see :data:`Backend`; None chooses by the current mesh.

    Raises:
      ValueError: for an unknown backend, or an array of the wrong shape.
    """
    windows = {"tokens": tokens, "masked": masked, "confidence": confidence, "editable": editable, "times": times}
    windows |= {"token": token, "prob": prob, "current_prob": current_prob}
    slots = {"accept_threshold": accept_threshold, "edit_threshold": edit_threshold, "remask_threshold": remask_threshold}
    expected = [(windows, tokens.shape), (slots | {"num_to_transfer": num_to_transfer}, tokens.shape[:1])]
    for arrays, shape in (*expected, ({"may_force": may_force}, tokens.shape[:2])):
        for name, array in arrays.items():
            if array.shape != shape:
                raise ValueError(f"remask.decide: {name} has shape {array.shape}, expected {shape}")
    least = jnp.where(may_force, num_to_transfer[:, None], 0)
    bounds = (*(a[:, None, None] for a in slots.values()), least[..., None])
    return pick("remask", backend, choose_backend, _BACKENDS)(*windows.values(), *bounds, at_most=max_per_position)
