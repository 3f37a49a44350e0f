"""Prediction: the best allowed token, its probability and the current token's, from vocabulary logits or hidden states."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.prediction import gpu, reference, tpu
from pallas_kernels.prediction.reference import Best, Sampling
from pallas_kernels.target import Target, is_hopper, pick


__all__ = ["Backend", "Best", "Sampling", "choose_backend", "predict", "predict_from_hidden"]

Backend = Literal["reference", "gpu", "tpu"]

_FROM_LOGITS = {"reference": reference.predict, "gpu": reference.predict, "tpu": tpu.predict}
_FROM_HIDDEN = {
    "reference": reference.predict_from_hidden,
    "gpu": gpu.predict_from_hidden,
    "tpu": tpu.predict_from_hidden,
}


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    return "gpu" if is_hopper(target) else "tpu" if target.platform == "tpu" else "reference"


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
    backend: str | None = None,
) -> Best:
    """Reduces each row of logits to the chosen token and the probabilities rules ask for.

    Probabilities are the model's own: softmax over the allowed vocabulary at temperature 1, whatever the sampling. So a
    threshold means the same at every temperature, and sampling with ``top_k=1`` equals greedy decoding. Where ``tempered``, they are
    those at the row's temperature, before top-k and top-p (SDAR's evaluation, arXiv 2510.06303).

    Args:
      logits: ``[R, V]`` float32.
      current: ``[R]`` int32, the token that stands there; its probability is reported.
      forbidden_id: never chosen, and left out of the softmax unless ``counts_all`` (the mask).
      sampling: rows with temperature above 0 draw from softmax(logits / temperature) cut to top-k, then top-p. None: all are greedy, and
        the device is not asked whether any samples.
      penalized: ``[R]`` int32, a token whose logit is lowered by ``penalty`` (``[R]`` float32); negative: none.
      penalty: see ``penalized``.
      banned: ``[R, M]`` int32, ids that are neither chosen nor counted in the softmax of their row; negative: none.
      top_k: how many best tokens to report.
      tempered: all probabilities, and the entropy, are of softmax(logits / temperature) in rows with a temperature above 0.
      cut: (``tempered``) and of what top-k and top-p leave of that, renormalised: what such a row's token is drawn from (Fast-dLLM v2,
        arXiv 2509.26328). For such rows every backend takes the reference.
      entropy: report the entropy of that distribution. The Hopper kernel has none: with it, ``"gpu"`` takes the reference.
      counts_all: the forbidden id has its share of the softmax, though it is not chosen (LLaDA's confidence, arXiv 2502.09992).
      doubted: ``[R, M]`` int32, ids that may be chosen but are not counted in the softmax of their row, so that their own probability
        is 0; negative: none.
      narrowed: all probabilities, the entropy and the margin are of what the row's top-p, then its top-k, leave, at temperature 0 too, and
        that is what tokens are drawn from; the entropy has 1e-10 added within its logarithm (Dream, arXiv 2508.15487). It asks for
        ``sampling``.
      margin: report by how much the largest probability exceeds the second, whether or not the larger is of a token that may be chosen.
        With it every backend takes the reference, as with ``counts_all`` or ``narrowed`` and ``entropy``; of ``predict_from_hidden``'s rows
        otherwise those that sample with ``counts_all``, that doubt something, or from which something is ``narrowed`` away.
      backend: see :data:`Backend`; None chooses by the current mesh.

    Returns:
      :class:`Best`. Ties go to the lowest id; a row with a NaN has NaN probabilities.

    Raises:
      ValueError: for an unknown backend.
    """
    options: dict[str, Any] = {"forbidden_id": forbidden_id, "sampling": sampling, "penalized": penalized, "penalty": penalty}
    options |= {"tempered": tempered, "entropy": entropy, "banned": banned, "top_k": top_k}
    compute = pick("prediction", backend, choose_backend, _FROM_LOGITS)
    if cut or counts_all or doubted is not None or narrowed or margin:
        options |= {"cut": cut, "counts_all": counts_all, "doubted": doubted, "narrowed": narrowed, "margin": margin}
        return reference.predict(logits, current, **options)
    return compute(logits, current, **options)


def predict_from_hidden(
    hidden: jax.Array,
    lm_head: jax.Array,
    current: jax.Array,
    *,
    vocab_axes: tuple[str, ...] = (),
    backend: str | None = None,
    **options: Any,
) -> Best:
    """:func:`predict` of the logits ``hidden @ lm_head.T`` (float32 sums), which a backend need not ever hold in memory.

    Args:
      hidden: ``[R, D]`` normalised last hidden states.
      lm_head: ``[V, D]``.
      current: ``[R]`` int32.
      vocab_axes: inside a ``jax.shard_map``: the mesh axes that share the vocabulary, each device with consecutive rows of ``lm_head``;
        the devices exchange what they found, and all return the result over the whole vocabulary.
      backend: see :data:`Backend`; None chooses by the current mesh.
      **options: the keywords of :func:`predict`.

    Raises:
      ValueError: for an unknown backend.
    """
    if vocab_axes:
        options["vocab_axes"] = vocab_axes
    compute = pick("prediction", backend, choose_backend, _FROM_HIDDEN)
    margin, counts_all, narrowed = (options.get(name, False) for name in ("margin", "counts_all", "narrowed"))
    if compute is reference.predict_from_hidden or margin or (counts_all or narrowed) and options.get("entropy"):
        return reference.predict_from_hidden(hidden, lm_head, current, **options)
    usual = {name: value for name, value in options.items() if name not in _KNOWN_TO_THE_REFERENCE}
    sampling, doubted = options["sampling"], options.get("doubted")
    if not (options.get("cut") or counts_all or narrowed) and doubted is None:
        return compute(hidden, lm_head, current, **usual)
    greedy = compute(hidden, lm_head, current, **usual | {"sampling": None})  # to the bit, whatever other rows ask for
    if counts_all:
        greedy = _counting_all(greedy, hidden, lm_head, current, **usual)
    apart = jnp.zeros(len(hidden), bool) if doubted is None else (doubted >= 0).any(1)
    if sampling is not None:
        apart |= sampling.temperature > 0
        apart |= ((sampling.top_p < 1) | (sampling.top_k > 0)) & narrowed
    elif doubted is None:
        return greedy

    return reference.redone(greedy, apart, hidden, lm_head, current, **options)


_KNOWN_TO_THE_REFERENCE = {"cut", "counts_all", "doubted", "narrowed", "margin"}


def _counting_all(
    best: Best,
    hidden: jax.Array,
    lm_head: jax.Array,
    current: jax.Array,
    *,
    forbidden_id: int,
    penalized: jax.Array | None = None,
    penalty: jax.Array | None = None,
    banned: jax.Array | None = None,
    vocab_axes: tuple[str, ...] = (),
    **_: Any,
) -> Best:
    """``best`` of greedy rows, but of a softmax in which the forbidden id has its share: two rows of ``lm_head`` tell it."""

    def logit(ids: jax.Array) -> jax.Array:
        count = len(lm_head)
        own = ids - (lax.axis_index(vocab_axes) * count if vocab_axes else 0)
        found = jnp.einsum("rd,rd->r", hidden, lm_head[jnp.clip(own, 0, count - 1)], preferred_element_type=jnp.float32)
        return lax.psum(jnp.where((own >= 0) & (own < count), found, 0), vocab_axes) if vocab_axes else found

    chosen = logit(best.token)
    if penalized is not None and penalty is not None:
        chosen -= jnp.where(best.token == penalized, penalty, 0)
    forbidden = logit(jnp.full_like(best.token, forbidden_id))
    if penalized is not None and penalty is not None:
        forbidden -= jnp.where(penalized == forbidden_id, penalty, 0)
    odds = jnp.exp(jnp.minimum(forbidden - chosen, 80)) * best.prob  # of all that is allowed
    if banned is not None:
        odds = jnp.where((banned == forbidden_id).any(1), 0, odds)
    left = 1 / (1 + odds)
    return best._replace(
        prob=best.prob * left,
        current_prob=jnp.where(current == forbidden_id, odds, best.current_prob) * left,
        top_probs=best.top_probs * left[:, None],
    )
