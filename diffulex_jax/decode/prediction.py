"""From hidden states of the window to what rules read: the chosen token of each position, and the probabilities they ask for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffulex_jax.decode.program import Program
from diffulex_jax.models.base import Params
from diffulex_jax.parallel.mesh import shared_by
from diffulex_jax.state import DecodeState, Prediction
from pallas_kernels import prediction


def predict(program: Program, params: Params, hidden: jax.Array, state: DecodeState) -> Prediction:
    """What ``hidden [S, K B, D]`` says about the window; each row by its own settings."""
    shape, settings = state.tokens.shape, state.settings
    # Dream's entropy and margin are of a kind of their own, also where nothing is left out.
    narrowed = program.confidence == "narrowed" and not (program.greedy and not program.rule.entropy and not program.rule.margin)
    per_position = shape[1] * shape[2]

    def rows(a: jax.Array) -> jax.Array:
        return jnp.repeat(a, per_position, 0)

    early = (state.positions - state.prompt_len[:, None, None] < settings.min_tokens[:, None, None]).reshape(-1)
    left = jnp.concatenate([jnp.full_like(state.tokens[..., :1], -1), state.tokens[..., :-1]], -1)
    best = prediction.predict_from_hidden(
        hidden.reshape(-1, hidden.shape[-1]),
        program.model.head(params),
        state.tokens.reshape(-1),
        forbidden_id=program.dims.mask_id,
        sampling=None if program.greedy and not narrowed else _sampling(program, state),
        penalized=left.reshape(-1),
        penalty=rows(settings.penalty_lambda),
        banned=jnp.where(early[:, None], rows(settings.stop_ids), -1),
        top_k=program.dims.candidates,
        tempered=program.confidence in ("tempered", "drawn", "narrowed"),
        cut=program.confidence == "drawn",
        counts_all=program.confidence in ("whole", "narrowed"),
        doubted=rows(settings.doubted_ids) if program.confidence == "whole" and not program.greedy else None,
        narrowed=narrowed,
        entropy=program.rule.entropy,
        margin=program.rule.margin,
        vocab_axes=shared_by("vocab"),
        backend=program.kernels.prediction,
    )
    return Prediction(
        token=best.token.reshape(shape),
        prob=best.prob.reshape(shape),
        current_prob=best.current_prob.reshape(shape),
        top_ids=best.top_ids.reshape(*shape, -1),
        top_probs=best.top_probs.reshape(*shape, -1),
        masked=state.masked,
        entropy=None if best.entropy is None else best.entropy.reshape(shape),
        margin=None if best.margin is None else best.margin.reshape(shape),
    )


def _sampling(program: Program, state: DecodeState) -> prediction.Sampling:
    """Settings and a random key for each position.

    A draw belongs to a position, and unless the strategy says so not to a step: while the distribution stays, so does the sample, and
    edit rules settle. After a re-mask the request draws anew; the same noise would choose the doubted token again.
    """
    settings, per_position = state.settings, state.tokens.shape[1] * state.tokens.shape[2]

    def rows(a: jax.Array) -> jax.Array:
        return jnp.repeat(a, per_position, 0)

    keys = jax.random.wrap_key_data(rows(state.key))
    draws = jax.vmap(jax.random.fold_in)(keys, state.positions.reshape(-1))
    draws = jax.vmap(jax.random.fold_in)(draws, rows(state.nfe if program.draws == "step" else state.remasked))
    temperature = jnp.where(state.live, settings.temperature, 0)
    return prediction.Sampling(draws, rows(temperature), rows(settings.top_p), rows(settings.top_k))
