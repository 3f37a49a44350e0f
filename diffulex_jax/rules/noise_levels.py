"""Filling an output's masks as its noise level falls (Dream, arXiv 2508.15487)."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from diffulex_jax.rules.base import Rule, stateless
from diffulex_jax.rules.blocks import draws
from diffulex_jax.state import DecodeState, Dims, Prediction
from pallas_kernels.remask import decision


Confidence = Literal["prob", "margin", "entropy"]


def by_noise_level(*, confidence: Confidence = "prob") -> Rule:
    """Fills the step's share of the masks that are left, the most confident predictions of the whole output first.

    The share is ``Settings.step_shares``, rounded down to a number of masks; steps that would fill none are left out. Where ``alg_temp`` is
    above 0 masks are drawn instead, one after the other, with probabilities softmax(confidence / alg_temp). Of equals the lower position
    goes first.

    Args:
      confidence: what it is measured by: ``"prob"``, the probability of the predicted token (Dream's ``maskgit_plus``); ``"margin"``,
        by how much the largest probability exceeds the second (``topk_margin``); ``"entropy"``, the distribution's, the lowest first.

    Raises:
      ValueError: for another ``confidence``.
    """
    if confidence not in get_args(Confidence):
        raise ValueError(f"confidence={confidence!r} must be one of {', '.join(get_args(Confidence))}")

    def init(dims: Dims) -> jax.Array:
        return jnp.zeros((dims.slots, dims.window), jnp.int32)

    def update(prediction: Prediction, state: DecodeState, gone: jax.Array) -> tuple[DecodeState, jax.Array]:
        open_, heat = state.masked & state.editable, state.settings.alg_temp[:, None, None]
        count, gone = _next_count(open_.sum(-1), state.settings.step_shares, gone)
        found = {"prob": prediction.prob, "margin": prediction.margin, "entropy": prediction.entropy}[confidence]
        assert found is not None, "the rule asks for it"
        score = -found if confidence == "entropy" else found
        # Adding Gumbel noise and taking the largest is drawing without replacement.
        score = jnp.where(heat > 0, score / jnp.where(heat > 0, heat, 1) + draws(state, jax.random.gumbel), score)
        take = open_ & (decision.confidence_rank(jnp.where(open_, score, -jnp.inf)) < count[..., None])
        return state.fill(take, prediction.token, prediction.prob), gone

    return Rule(init, update, entropy=confidence == "entropy", margin=confidence == "margin", one_block=True, noise=True)


def at_random() -> Rule:
    """Fills each mask with the probability that the noise level falls by, whatever the prediction (Dream's ``origin``).

    That is ``Settings.step_shares``: of N steps, step i, counted from 0, fills a mask with probability 1 - t(i + 1) / t(i), where t falls
    evenly from 1 to ``eps``; the last one fills all. N is ``denoising_steps``, or where that is 0 as many as the output has tokens.
    """

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        shares = state.settings.step_shares
        step = jnp.minimum(state.steps - 1, shares.shape[1] - 1)  # the step that runs is counted already
        share = jnp.take_along_axis(shares, step, 1)
        take = state.masked & state.editable & (draws(state, jax.random.uniform) < share[..., None])
        return state.fill(take, prediction.token, prediction.prob)

    return stateless(update)._replace(one_block=True, noise=True)


def step_shares(steps: int, eps: float) -> np.ndarray:
    """``[steps]`` float32: the share of the masks that are left that each step fills; the last one fills them all.

    The noise level falls evenly from 1 to ``eps`` over ``steps`` steps, and the share is that which it falls by. In float32, which decides
    what is rounded, as the authors' code computes it.
    """
    t = _noise_levels(eps, steps + 1)
    shares = np.float32(1) - t[1:] / t[:-1]
    shares[-1] = 1
    return shares


def _next_count(masks: jax.Array, shares: jax.Array, gone: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many of ``masks [S, K]`` the next step fills that fills any, and the steps gone through with it.

    Args:
      masks: int32, those of each block that are left.
      shares: ``[S, N]`` float32, see ``Settings``.
      gone: ``[S, K]`` int32, steps gone through so far.
    """
    counts = jnp.floor(masks.astype(jnp.float32)[..., None] * shares[:, None]).astype(jnp.int32)
    step = ((jnp.arange(shares.shape[1]) >= gone[..., None]) & (counts > 0)).argmax(-1)
    count = jnp.take_along_axis(counts, step[..., None], -1)[..., 0]
    return jnp.maximum(count, 1), step + 1


def _noise_levels(eps: float, count: int) -> np.ndarray:
    """``torch.linspace(1, eps, count)`` in float32, bit for bit: counted from the nearer end, and rounded once."""
    i, end = np.arange(count), np.float64(np.float32(eps))
    fall = np.float64((np.float32(eps) - np.float32(1)) / np.float32(count - 1))
    return np.where(i < count // 2, 1 + fall * i, end - fall * (count - i - 1)).astype(np.float32)
