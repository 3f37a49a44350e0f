"""From vocabulary logits to what decoding needs of them, in plain jnp."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.target import anywhere


_REDONE_AT_ONCE = 64  # rows, whose logits are 40 MB in a vocabulary of 157 k
_NO_LOG_OF_0 = 1e-10  # what Dream's code adds within the logarithm of an entropy


class Sampling(NamedTuple):
    """Per-row sampling settings, ``[R]`` each; a row with temperature 0 is greedy.

    Attributes:
      key: typed PRNG keys, one a row.
      temperature: float32.
      top_p: float32 in (0, 1]; 1 keeps everything.
      top_k: int32; 0 keeps everything.
    """

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array


class Best(NamedTuple):
    """What is known of R positions.

    Attributes:
      token: ``[R]`` int32, the chosen token.
      prob, current_prob: ``[R]`` float32, its probability, and that of the token that stood there.
      top_ids, top_probs: ``[R, M]`` int32 and float32, the best M tokens and their probabilities, best first.
      entropy: ``[R]`` float32, of the distribution that probabilities are of, in nats; None where it was not asked for.
      margin: ``[R]`` float32, by how much its largest probability exceeds its second; None where it was not asked for.
    """

    token: jax.Array
    prob: jax.Array
    current_prob: jax.Array
    top_ids: jax.Array
    top_probs: jax.Array
    entropy: jax.Array | None = None
    margin: jax.Array | None = None


def predict(
    logits: jax.Array,
    current: jax.Array,
    *,
    forbidden_id: int,
    sampling: Sampling | None,
    penalized: jax.Array | None = None,
    penalty: jax.Array | None = None,
    banned: jax.Array | None = None,
    top_k: int = 0,
    tempered: bool = False,
    cut: bool = False,
    entropy: bool = False,
    counts_all: bool = False,
    doubted: jax.Array | None = None,
    narrowed: bool = False,
    margin: bool = False,
) -> Best:
    """See ``prediction.predict``."""
    vocab = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if penalized is not None:
        assert penalty is not None, "penalized tokens need a penalty"
        logits = jnp.where(vocab == penalized[:, None], logits - penalty[:, None], logits)
    allowed = logits if counts_all else jnp.where(vocab == forbidden_id, -jnp.inf, logits)
    allowed = _without(allowed, banned)
    logits = jnp.where(vocab == forbidden_id, -jnp.inf, allowed)
    judged = allowed / cooling(sampling)[:, None] if tempered and sampling is not None else allowed
    judged = _without(judged, doubted)
    greedy = token = _first_largest(logits)
    if narrowed:
        assert sampling is not None, "top-p and top-k are asked for"
        judged = _narrowed(judged, sampling)
        drawn_from = jnp.where(vocab == forbidden_id, -jnp.inf, judged)
        token = lax.cond((sampling.temperature > 0).any(), lambda: _sample(drawn_from, sampling, greedy), lambda: greedy)
    elif sampling is not None:
        draw = functools.partial(_draw, logits, sampling, greedy, judged if cut else None)
        token, drawn_from = lax.cond((sampling.temperature > 0).any(), draw, lambda: (greedy, judged if cut else None))
        judged = drawn_from if cut else judged
    peak = judged.max(-1)
    total = jnp.exp(judged - peak[:, None]).sum(-1)

    def prob_of(token: jax.Array) -> jax.Array:
        return jnp.exp(jnp.take_along_axis(judged, token[..., None] if token.ndim == 1 else token, -1) - peak[:, None]) / total[:, None]

    if top_k <= 1:
        top_ids = greedy[:, None][:, :top_k]
    else:
        top_ids = lax.top_k(logits, top_k)[1].astype(jnp.int32)
    best = Best(token, prob_of(token)[:, 0], prob_of(current)[:, 0], top_ids, prob_of(top_ids))
    if entropy:
        best = best._replace(entropy=_entropy(judged - peak[:, None], total, apart=_NO_LOG_OF_0 if narrowed else 0.0))
    if margin:
        second = jnp.where(vocab == _first_largest(judged)[:, None], -jnp.inf, judged).max(-1)
        best = best._replace(margin=(1 - jnp.exp(second - peak)) / total)
    return best


def _without(logits: jax.Array, ids: jax.Array | None) -> jax.Array:
    """``logits [R, V]`` with minus infinity at the ``ids [R, M]`` of each row that are not negative."""
    if ids is None:
        return logits
    at = jnp.where(ids < 0, logits.shape[1], ids)
    return logits.at[jnp.arange(len(logits))[:, None], at].set(-jnp.inf, mode="drop")


def _entropy(below: jax.Array, total: jax.Array, *, apart: float) -> jax.Array:
    """``[R]`` entropy in nats of logits ``[R, V]``, given as what they lie below the largest, whose exponentials add up to ``total``.

    ``apart`` is added to each probability within its logarithm.
    """
    if apart:
        p = jnp.exp(below) / total[:, None]
        return -(p * jnp.log(p + apart)).sum(-1)
    weighted = jnp.where(below > -jnp.inf, jnp.exp(below) * below, 0.0)
    return jnp.log(total) - weighted.sum(-1) / total


def cooling(sampling: Sampling) -> jax.Array:
    """``[R]`` float32: what a row's logits are divided by; 1 for a greedy row."""
    return jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)


def predict_from_hidden(
    hidden: jax.Array, lm_head: jax.Array, current: jax.Array, *, vocab_axes: tuple[str, ...] = (), **options: Any
) -> Best:
    """See the package's ``predict_from_hidden``; all logits are held in memory."""
    with jax.named_scope("lm_head"):
        logits = jnp.einsum("rd,vd->rv", hidden, lm_head, preferred_element_type=jnp.float32)
        if vocab_axes:
            logits = lax.all_gather(logits, vocab_axes, axis=1, tiled=True)
    return predict(logits, current, **options)


def redone(best: Best, asked: jax.Array, hidden: jax.Array, lm_head: jax.Array, current: jax.Array, **options: Any) -> Best:
    """``best`` with what :func:`predict_from_hidden` says of the rows ``asked [R]``: a few rows at a time, so that few of them cost the
    others little."""
    count, step = len(hidden), min(len(hidden), _REDONE_AT_ONCE)
    rows = jnp.flatnonzero(asked, size=-(-count // step) * step, fill_value=count)

    def turn(carry: tuple[jax.Array, Best]) -> tuple[jax.Array, Best]:
        first, best = carry
        at = lax.dynamic_slice(rows, (first,), (step,))
        of_rows: dict[str, Any] = jax.tree.map(lambda a: a[at] if isinstance(a, jax.Array) else a, options)
        found = predict_from_hidden(hidden[at], lm_head, current[at], **of_rows)
        return first + step, jax.tree.map(lambda whole, new: whole.at[at].set(new, mode="drop"), best, found)

    def more(carry: tuple[jax.Array, Best]) -> jax.Array:
        return anywhere(carry[0] < asked.sum())

    return lax.while_loop(more, turn, (jnp.int32(0), best))[1]


def _draw(logits: jax.Array, sampling: Sampling, greedy: jax.Array, judged: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Gumbel-max over the tempered, filtered logits of the rows with temperature above 0; the others keep ``greedy``.

    Returns:
      The tokens, and, where ``judged`` is given, the logits that they were drawn from, which are ``judged`` where none was.
    """
    hot = sampling.temperature > 0
    scaled = logits / cooling(sampling)[:, None]

    order, count = _ordered_bits(scaled), scaled.shape[0]

    def least_kept() -> jax.Array:
        everything = jnp.full(count, jnp.finfo(jnp.float32).max)
        k = jnp.where(sampling.top_k > 0, sampling.top_k.astype(jnp.float32), everything)
        by_k = _cutoff(order, jnp.ones_like(scaled), k)
        mass = jnp.where(order >= by_k[:, None], jax.nn.softmax(scaled, -1), 0.0)
        p = jnp.where(sampling.top_p < 1, sampling.top_p * mass.sum(-1), everything)
        return jnp.maximum(by_k, _cutoff(order, mass, p))

    # Sixty-four passes over the logits, which most requests do not ask for.
    asked = (hot & ((sampling.top_k > 0) | (sampling.top_p < 1))).any()
    least = lax.cond(asked, least_kept, lambda: jnp.zeros(count, jnp.uint32))
    filtered = jnp.where(order >= least[:, None], scaled, -jnp.inf)
    return _sample(filtered, sampling, greedy), None if judged is None else jnp.where(hot[:, None], filtered, judged)


def _sample(filtered: jax.Array, sampling: Sampling, greedy: jax.Array) -> jax.Array:
    """Gumbel-max over ``filtered [R, V]`` in rows with temperature above 0 that leave a token; the others keep ``greedy``."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, filtered.shape[1:]))(sampling.key)
    hot = (sampling.temperature > 0) & (filtered > -jnp.inf).any(-1)
    return jnp.where(hot, _first_largest(filtered + noise), greedy)


def _narrowed(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """``logits [R, V]`` with minus infinity where the row's top-p, or then its top-k, drops a token; at any temperature.

    Top-p keeps the tokens before which no more than p lies, and tokens that tie with the last. Both ask about the whole distribution.
    """

    def narrow() -> jax.Array:
        order, everything = _ordered_bits(logits), jnp.finfo(jnp.float32).max
        more = jnp.where(sampling.top_p < 1, jnp.nextafter(sampling.top_p, 2.0), everything)
        count = jnp.where(sampling.top_k > 0, sampling.top_k.astype(jnp.float32), everything)
        least = jnp.maximum(_cutoff(order, jax.nn.softmax(logits, -1), more), _cutoff(order, jnp.ones_like(logits), count))
        return jnp.where(order >= least[:, None], logits, -jnp.inf)

    return lax.cond(((sampling.top_p < 1) | (sampling.top_k > 0)).any(), narrow, lambda: logits)


def _first_largest(x: jax.Array) -> jax.Array:
    """``[R]`` int32: argmax of each row; the last id where it is NaN. Two plain reductions compile and run faster than one of pairs."""
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(x == x.max(-1, keepdims=True), ids, x.shape[1] - 1).min(-1)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _cutoff(order: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """``[R]`` uint32: the largest cut-off c with ``mass[order >= c].sum() >= target``; 0 where there is none.

    Bisection over the 32 bits: no sort, so it also suits accelerators on which sorting a vocabulary is slow. Tokens that
    tie at the cut-off stay together.
    """

    def bit(i: jax.Array, low: jax.Array) -> jax.Array:
        probe = low | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough = jnp.where(order >= probe[:, None], mass, 0.0).sum(-1) >= target
        return jnp.where(enough, probe, low)

    return lax.fori_loop(0, 32, bit, jnp.zeros(order.shape[0], jnp.uint32))
