"""Prediction on TPU: the vocabulary streamed through VMEM once, logits of a tile at a time and never in HBM.

The kernel leaves a :class:`Partial` of the part of the vocabulary that it saw. Parts of one device or of several that share the
vocabulary are joined by :func:`_finish`, which turns them into probabilities.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.prediction import reference
from pallas_kernels.prediction.reference import Best, Sampling
from pallas_kernels.prediction.tpu_kernel import LANES, Columns, Partial, Shown, cooled, lowered, stream
from pallas_kernels.target import anywhere


MAX_TOP_K = LANES
_FILTERED_ROWS = 32  # rows whose logits are made in full at a time, where top-p or top-k asks for them


def predict(logits: jax.Array, current: jax.Array, *, sampling: Sampling | None, top_k: int = 0, **options: Any) -> Best:
    """See ``prediction.predict``."""

    def full(rows: slice | jax.Array) -> jax.Array:
        return logits[rows].astype(jnp.float32)

    return _predict((logits,), full, current, sampling=sampling, top_k=top_k, **options)


def predict_from_hidden(
    hidden: jax.Array, lm_head: jax.Array, current: jax.Array, *, sampling: Sampling | None, top_k: int = 0, **options: Any
) -> Best:
    """See ``prediction.predict_from_hidden``."""

    def full(rows: slice | jax.Array) -> jax.Array:
        return jnp.einsum("rd,vd->rv", hidden[rows], lm_head, preferred_element_type=jnp.float32)

    return _predict((hidden, lm_head), full, current, sampling=sampling, top_k=top_k, **options)


def _predict(
    source: Sequence[jax.Array],
    full: Any,
    current: jax.Array,
    *,
    forbidden_id: int,
    sampling: Sampling | None,
    penalized: jax.Array | None = None,
    penalty: jax.Array | None = None,
    banned: jax.Array | None = None,
    top_k: int,
    tempered: bool = False,
    entropy: bool = False,
    vocab_axes: tuple[str, ...] = (),
    tile: tuple[int, int] | None = None,
    interpret: Any = False,
) -> Best:
    if top_k > MAX_TOP_K:
        raise ValueError(f"top_k={top_k}: the TPU kernel reports at most {MAX_TOP_K} tokens")
    rows = current.shape[0]
    if sampling is None:
        cold = jnp.zeros(rows, jnp.float32)
        sampling = Sampling(jax.random.split(jax.random.key(0, impl="threefry2x32"), rows), cold, cold + 1, cold.astype(jnp.int32))
    vocab = source[-1].shape[0 if len(source) == 2 else 1]
    if str(jax.random.key_impl(sampling.key)) != "threefry2x32":
        raise ValueError(f"the TPU kernel draws with threefry2x32 keys, got {jax.random.key_impl(sampling.key)}")
    nothing = jnp.full(rows, -1, jnp.int32)
    penalty = jnp.zeros(rows, jnp.float32) if penalty is None else penalty
    banned = jnp.full((rows, 1), -1, jnp.int32) if banned is None else banned
    words = lax.bitcast_convert_type(jax.random.key_data(sampling.key), jnp.int32)
    columns = Columns(
        jnp.concatenate([current[:, None], (nothing if penalized is None else penalized)[:, None], words, banned], 1),
        jnp.stack([penalty, reference.cooling(sampling)], 1),
    )
    hot = sampling.temperature > 0
    offset = lax.axis_index(vocab_axes) * vocab if vocab_axes else 0
    shown = Shown(top_k if top_k > 1 else 0, tempered, entropy)
    part = stream(
        source, columns, hot, (banned >= 0).any(1), offset, forbidden_id=forbidden_id, shown=shown, tile=tile, interpret=interpret
    )
    parts = _exchange(part, vocab_axes) if vocab_axes else jax.tree.map(lambda a: a[None], part)
    best = _finish(parts, hot, reference.cooling(sampling) if tempered else None, top_k=top_k)

    filtered = hot & ((sampling.top_p < 1) | (sampling.top_k > 0))

    def exact(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = full(rows)
        if vocab_axes:
            logits = lax.all_gather(logits, vocab_axes, axis=1, tiled=True)
        take = functools.partial(jax.tree.map, lambda a: a[rows])
        some = reference.predict(
            logits,
            current[rows],
            forbidden_id=forbidden_id,
            sampling=take(sampling),
            penalized=take(penalized),
            penalty=penalty[rows],
            banned=banned[rows],
            tempered=tempered,
        )
        return some.token, some.prob

    def draw_filtered() -> Best:
        """top-p and top-k need all of a row's logits at once: those rows, and none of the others, are drawn by the reference."""
        size = min(_FILTERED_ROWS, rows)
        count = -(-rows // size)
        at = jnp.minimum(jnp.arange(count * size), rows - 1).reshape(count, size)
        nothing = jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.float32)
        token, prob = lax.map(lambda rows: lax.cond(anywhere(filtered[rows].any()), exact, lambda rows: nothing, rows), at)
        token, prob = token.reshape(-1)[:rows], prob.reshape(-1)[:rows]
        return best._replace(token=jnp.where(filtered, token, best.token), prob=jnp.where(filtered, prob, best.prob))

    return lax.cond(anywhere(filtered.any()), draw_filtered, lambda: best)


def _exchange(part: Partial, axes: tuple[str, ...]) -> Partial:
    """The partials of all devices, ``[n, R, ...]`` each, in one exchange."""
    columns = [a if a.dtype == jnp.int32 else lax.bitcast_convert_type(a, jnp.int32) for a in part]
    everyones = lax.all_gather(jnp.concatenate(columns, 1), axes)
    ends = list(itertools.accumulate(a.shape[1] for a in part))
    parts = (everyones[..., end - a.shape[1] : end] for a, end in zip(part, ends, strict=True))
    return Partial(*(p if a.dtype == jnp.int32 else lax.bitcast_convert_type(p, jnp.float32) for p, a in zip(parts, part, strict=True)))


def _finish(parts: Partial, hot: jax.Array, temperature: jax.Array | None, *, top_k: int) -> Best:
    """Joins the partials ``[n, R, ...]`` of n consecutive parts of the vocabulary; ``temperature [R]`` where they are tempered."""
    p = Partial._make([*(a[..., 0] for a in parts[:-3]), *parts[-3:]])
    peak = p.peak.max(0)
    lower = cooled(p.peak - peak, temperature)
    total = (p.total * jnp.exp(lower)).sum(0)
    entropy = None
    if p.slope.shape[-1]:
        entropy = jnp.log(total) - lowered(p.slope[..., 0], p.total, lower).sum(0) / total

    def of_largest(key: jax.Array, value: jax.Array) -> jax.Array:
        return value[0] if len(value) == 1 else jnp.take_along_axis(value, key.argmax(0)[None], 0)[0]

    def prob(logit: jax.Array) -> jax.Array:
        shape = (...,) + (None,) * (logit.ndim - 1)
        return jnp.exp(cooled(logit - peak[shape], None if temperature is None else temperature[shape])) / total[shape]

    token = jnp.where(hot, of_largest(p.score, p.drawn), of_largest(p.peak, p.best))
    logit = jnp.where(hot, of_largest(p.score, p.drawn_logit), peak)
    if top_k == 1:
        top_logits, top_ids = peak[:, None], of_largest(p.peak, p.best)[:, None]
    else:
        top_logits, top_ids = (jnp.moveaxis(a, 0, 1).reshape(len(peak), -1) for a in (p.top_logits, p.top_ids))
        if len(p.peak) > 1:
            top_logits, at = lax.top_k(top_logits, top_k)
            top_ids = jnp.take_along_axis(top_ids, at, 1)
    return Best(token, prob(logit), prob(p.current.max(0)), top_ids, prob(top_logits), entropy)
