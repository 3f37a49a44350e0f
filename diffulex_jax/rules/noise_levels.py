"""Filling an output's masks as its noise level falls (Dream, arXiv 2508.15487)."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from diffulex_jax.rules.base import Rule, stateless
from diffulex_jax.rules.blocks import draws
from diffulex_jax.state import DecodeState, Prediction
from pallas_kernels.remask import decision


Confidence = Literal["prob", "margin", "entropy"]


def by_noise_level(*, confidence: Confidence = "prob") -> Rule:
    """Fills as many masks as ``Settings.step_counts`` says, the most confident predictions of the whole output first.

    Where ``alg_temp`` is above 0 they are drawn instead, one after the other, with probabilities softmax(confidence / alg_temp). Of
    equals the lower position goes first.

    Args:
      confidence: what it is measured by: ``"prob"``, the probability of the predicted token (Dream's ``maskgit_plus``); ``"margin"``,
        by how much the largest probability exceeds the second (``topk_margin``); ``"entropy"``, the distribution's, the lowest first.

    Raises:
      ValueError: for another ``confidence``.
    """
    if confidence not in get_args(Confidence):
        raise ValueError(f"confidence={confidence!r} must be one of {', '.join(get_args(Confidence))}")

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        open_, counts, heat = state.masked & state.editable, state.settings.step_counts, state.settings.alg_temp[:, None, None]
        step = jnp.minimum(state.steps - 1, counts.shape[1] - 1)  # the step that runs is counted already
        count = jnp.maximum(jnp.take_along_axis(counts, step, 1), 1)
        found = {"prob": prediction.prob, "margin": prediction.margin, "entropy": prediction.entropy}[confidence]
        assert found is not None, "the rule asks for it"
        score = -found if confidence == "entropy" else found
        # Adding Gumbel noise and taking the largest is drawing without replacement.
        score = jnp.where(heat > 0, score / jnp.where(heat > 0, heat, 1) + draws(state, jax.random.gumbel), score)
        take = open_ & (decision.confidence_rank(jnp.where(open_, score, -jnp.inf)) < count[..., None])
        return state.fill(take, prediction.token, prediction.prob)

    rule = stateless(update, entropy=confidence == "entropy")
    return rule._replace(margin=confidence == "margin", one_block=True)


def at_random() -> Rule:
    """Fills each mask with the probability that the noise level falls by, whatever the prediction (Dream's ``origin``).

    Of N steps, step i, counted from 0, fills a mask with probability 1 - t(i + 1) / t(i), where t falls evenly from 1 to ``eps``; the
    last one fills all. N is ``denoising_steps``, or where that is 0 as many as the output has tokens.
    """

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        s, step = state.settings, state.steps - 1
        steps = jnp.where(s.denoising_steps > 0, s.denoising_steps, state.limit - state.prompt_len)[:, None]
        fall = (1 - s.eps[:, None]) / steps
        share = jnp.where(step >= steps - 1, 1.0, fall / (1 - fall * step))
        take = state.masked & state.editable & (draws(state, jax.random.uniform) < share[..., None])
        return state.fill(take, prediction.token, prediction.prob)

    return stateless(update)._replace(one_block=True)


def step_counts(masks: int, *, steps: int, eps: float) -> list[int]:
    """How many of ``masks`` each step fills, steps that fill none left out.

    The noise level falls evenly from 1 to ``eps`` over ``steps`` steps. Step i fills ``m * (1 - t[i + 1] / t[i])`` of the m masks that are
    left, rounded down; the last step fills them all. In float32, which decides what is rounded, as the authors' code computes it.
    """
    t = _noise_levels(eps, steps + 1)
    share = np.float32(1) - t[1:] / t[:-1]
    counts = []
    for i in range(steps):
        count = masks if i == steps - 1 else int(np.float32(masks) * share[i])
        masks -= count
        counts += [count] * (count > 0)
    return counts


def _noise_levels(eps: float, count: int) -> np.ndarray:
    """``torch.linspace(1, eps, count)`` in float32, bit for bit: counted from the nearer end, and rounded once."""
    i, end = np.arange(count), np.float64(np.float32(eps))
    fall = np.float64((np.float32(eps) - np.float32(1)) / np.float32(count - 1))
    return np.where(i < count // 2, 1 + fall * i, end - fall * (count - i - 1)).astype(np.float32)
