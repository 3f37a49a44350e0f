"""Decoding without a model: states written down as lists, and predictions that follow a script."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffulex_jax import Rule, SamplingParams, decode
from diffulex_jax.decode import denoise_step
from diffulex_jax.models.attention import AttentionPolicy
from diffulex_jax.models.registry import model_of
from diffulex_jax.request_state import admit, empty_state, make_request, settings_row
from diffulex_jax.rules import dims_for
from diffulex_jax.state import FINISH_REASONS, DecodeState, Dims, KVPool, Prediction
from pallas_kernels import choose


MASK, EOS = 15, 14
KERNELS = choose(jax.devices()[0])
RAW = {
    "model_type": "llada2_moe",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_group": 2,
    "topk_group": 1,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
}
MODEL = model_of(RAW)


def dims_of(rule: Rule, *, slots: int = 1, window: int = 1, block: int = 4, pages: int = 4, **kind: bool) -> Dims:
    sizes = {"slots": slots, "window": window, "block": block, "page": block, "pages_per_slot": pages}
    return dims_for(rule, **sizes, mask_id=MASK, **kind)


def settings_of(*, step_shares: Sequence[float] = (), **settings):
    row = settings_row(SamplingParams(**settings), (EOS,), np.array(step_shares, np.float32))
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[None]), row)


def block_of(rule: Rule, tokens: Sequence[int | None], *, frozen: int = 0, **settings) -> DecodeState:
    """One live row whose window is one block of ``tokens`` (None: masked), the first ``frozen`` of them prompt."""
    state = _empty_state(dims_of(rule, block=len(tokens)), rule)
    written = {  # by NumPy: each small array that JAX makes is a program
        "tokens": np.array([[[MASK if t is None else t for t in tokens]]], np.int32),
        "masked": np.array([[[t is None for t in tokens]]]),
        "frozen": np.arange(len(tokens))[None, None] < frozen,
        "active": np.ones((1, 1), bool),
        "live": np.ones(1, bool),
        "prompt_len": np.array([frozen], np.int32),
        "limit": np.array([len(tokens)], np.int32),
    }
    return state.replace(**jax.tree.map(jnp.asarray, written), settings=settings_of(**settings))


_empty_state = functools.partial(jax.jit, static_argnums=(0, 1))(empty_state)


def update(
    rule: Rule,
    state: DecodeState,
    tokens: Sequence[int],
    probs: Sequence[float],
    *,
    current: Sequence[float] | None = None,
    entropy: Sequence[float] | None = None,
    margin: Sequence[float] | None = None,
) -> DecodeState:
    """One application of a rule to a block: the model says ``tokens`` with ``probs``, and ``current`` of what stands there."""
    token, prob = jnp.asarray(np.array([[tokens]], np.int32)), jnp.asarray(np.array([[probs]], np.float32))
    prediction = Prediction(
        token=token,
        prob=prob,
        current_prob=jnp.where(token == state.tokens, prob, 1 - prob) if current is None else jnp.array([[current]], jnp.float32),
        top_ids=token[..., None],
        top_probs=prob[..., None],
        masked=state.masked,
        entropy=None if entropy is None else jnp.array([[entropy]], jnp.float32),
        margin=None if margin is None else jnp.array([[margin]], jnp.float32),
    )
    state = state.replace(steps=state.steps + state.active, hold=jnp.zeros_like(state.hold))
    state, rule_state = rule.update(prediction, state, state.rule)
    return state.replace(rule=rule_state)


def shown(state: DecodeState) -> list[int | None]:
    """The window of the first row; None where masked."""
    tokens, masked = (np.asarray(a)[0].reshape(-1) for a in (state.tokens, state.masked))
    return [None if m else int(t) for t, m in zip(tokens, masked, strict=True)]


def held(state: DecodeState) -> bool:
    """Whether the rules keep the first row's first block open; a block with masks is never let go."""
    return bool(np.asarray(state.hold)[0, 0] | np.asarray(state.masked)[0, 0].any())


@dataclasses.dataclass(frozen=True)
class Script:
    """What the model says to one request: at its n-th forward, row n (the last one, from then on) by absolute position.

    ``current`` is the probability of what stands there, where that is not what the model says. Entropies are ``1 - probs``, margins
    ``probs / 2``.
    """

    prompt: Sequence[int]
    tokens: np.ndarray = dataclasses.field(repr=False)
    probs: np.ndarray = dataclasses.field(repr=False)
    params: SamplingParams
    current: np.ndarray | None = dataclasses.field(default=None, repr=False)


def script(prompt: Sequence[int], *steps: tuple[Sequence[int], Sequence[float]], **settings) -> Script:
    """A script from ``(tokens, probs)`` of each step."""
    tokens, probs = zip(*steps, strict=True)
    return Script(prompt, np.array(tokens, np.int32), np.array(probs, np.float32), SamplingParams(**settings))


@dataclasses.dataclass(frozen=True)
class Played:
    tokens: list[int]
    reason: str | None
    nfe: int
    revised: int
    remasked: int
    trace: list[list[int | None]]
    """The window after every step."""
    starts: list[int]
    """Where it began."""
    revised_a_step: list[int]
    remasked_a_step: list[int]


def forward(
    program: decode.Program, scripts: dict, pool: KVPool, state: DecodeState, *_: Any, **__: Any
) -> tuple[Any, KVPool, DecodeState]:
    """Stands in for the network's forward over the window; a scripted prediction needs none of its hidden states."""
    written = state.pending.live & state.live
    state = state.replace(
        written_upto=jnp.where(written, state.start, state.written_upto),
        pending=state.pending.replace(live=jnp.zeros_like(written)),
    )
    return None, pool, state


def predict(program: decode.Program, scripts: dict, hidden: None, state: DecodeState) -> Prediction:
    """Stands in for ``decode.prediction.predict``; ``scripts`` holds ``[S, n, T]`` arrays."""
    slots, shape = jnp.arange(len(state.nfe)), state.tokens.shape
    step = jnp.minimum(state.nfe, scripts["tokens"].shape[1] - 1)
    at = state.positions.reshape(len(slots), -1)
    token, prob, current = (
        jnp.take_along_axis(scripts[name][slots, step], at, 1, mode="clip").reshape(shape) for name in ("tokens", "probs", "current")
    )
    rank = jnp.arange(program.dims.candidates)  # the next best are the ids below
    return Prediction(
        token=token,
        prob=prob,
        current_prob=jnp.where(token == state.tokens, prob, current),
        top_ids=(token[..., None] - rank) % EOS,
        top_probs=prob[..., None] / (1 + rank),
        masked=state.masked,
        entropy=1 - prob if program.rule.entropy else None,
        margin=prob / 2 if program.rule.margin else None,
    )


_denoise = functools.partial(jax.jit, static_argnums=0, static_argnames="steps")(decode.denoise)
_admit = functools.partial(jax.jit, static_argnums=(0, 1))(admit)


def play(
    rule: Rule, *scripts: Script, block: int, pages: int, steps: int, window: int = 1, **kind: bool
) -> tuple[list[Played], DecodeState]:
    """Decodes one request a script, all together, for at most ``steps`` steps; ``kind``: see ``Dims``."""
    dims = dims_of(rule, slots=len(scripts), window=window, block=block, pages=pages, **kind)
    state = _empty_state(dims, rule)
    for slot, s in enumerate(scripts):
        request = make_request(dims, prompt=np.array(s.prompt, np.int32), params=s.params, eos_ids=(EOS,))
        state = _admit(dims, rule, state, slot, request)

    def padded(array: np.ndarray) -> np.ndarray:
        return np.pad(array[:steps], ((0, max(0, steps - len(array))), (0, 0)), mode="edge")  # of one shape: one compilation

    arrays = {
        "tokens": np.stack([padded(s.tokens) for s in scripts]),
        "probs": np.stack([padded(s.probs) for s in scripts]),
        "current": np.stack([padded(1 - s.probs if s.current is None else s.current) for s in scripts]),
    }
    pool = KVPool(jnp.zeros((1, pages)), jnp.zeros((1, pages)))
    tables = np.tile(np.arange(pages, dtype=np.int32), (len(scripts), 1))
    policy = AttentionPolicy("whole", canvas="whole", cache="none") if dims.whole_canvas else AttentionPolicy()
    program, no_forward = (
        decode.Program(MODEL, dims, rule, KERNELS, policy),
        mock.patch.object(denoise_step, "canvas_forward", lambda *a: (None, a[2])),
    )
    with mock.patch.object(denoise_step, "predict", predict), mock.patch.object(denoise_step, "window_forward", forward), no_forward:
        known, options = np.zeros(len(scripts), np.int32), {"steps": steps, "max_steps": steps, "stop_on_finish": False}
        _, state, report, trace = _denoise(program, arrays, pool, state, page_table=tables, known=known, **options)
    played, (tokens, report, trace) = [], jax.device_get((state.sequence.tokens, report, trace))
    for slot, s in enumerate(scripts):
        took_part = np.flatnonzero(trace.live[:, slot])
        played.append(
            Played(
                tokens=tokens[slot, len(s.prompt) : report.length[slot]].tolist(),
                reason=FINISH_REASONS.get(int(report.status[slot])),
                nfe=int(report.nfe[slot]),
                revised=int(report.revised[slot]),
                remasked=int(report.remasked[slot]),
                trace=[
                    np.where(trace.masked[i, slot], None, np.asarray(trace.tokens[i, slot], object)).reshape(-1).tolist() for i in took_part
                ],
                starts=trace.start[took_part, slot].tolist(),
                revised_a_step=trace.revised[took_part, slot].sum((1, 2)).tolist(),
                remasked_a_step=trace.remasked[took_part, slot].sum((1, 2)).tolist(),
            )
        )
    return played, state
