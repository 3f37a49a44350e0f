"""Token merge: input embeddings with soft tokens."""

from __future__ import annotations

from typing import Literal

import jax

from pallas_kernels.target import Target, is_hopper, pick
from pallas_kernels.token_merge import gpu, reference, tpu
from pallas_kernels.token_merge.reference import MergeSpec


__all__ = ["Backend", "MergeSpec", "choose_backend", "merge"]

Backend = Literal["reference", "gpu", "tpu"]

_BACKENDS = {"reference": reference.merge, "gpu": gpu.merge, "tpu": tpu.merge}


def choose_backend(target: Target) -> Backend:
    """The backend used on ``target`` unless told otherwise."""
    return "gpu" if is_hopper(target) else "tpu" if target.platform == "tpu" else "reference"


def merge(
    table: jax.Array,
    tokens: jax.Array,
    *,
    mask_id: int,
    ids: jax.Array,
    probs: jax.Array,
    soft: jax.Array,
    spec: MergeSpec,
    backend: str | None = None,
) -> jax.Array:
    """Embeddings of tokens, soft where asked (DMax, arXiv 2604.08302, eq. for hybrid embeddings; mixed in float32).

    Args:
      table: ``[V, D]`` input embeddings.
      tokens: ``[..., B]`` int32.
      mask_id: the mask token's id.
      ids: ``[..., B, M]`` int32 candidates, M = ``spec.top_k``.
      probs: ``[..., B, M]`` float32.
      soft: ``[..., B]`` bool.
      spec: the mix.
      backend: see :data:`Backend`; None chooses by the current mesh.

    Returns:
      ``[..., B, D]`` in the table's dtype. Where ``soft``, with candidate embeddings e_j of probability p_j and the mask's
      embedding m taking the rest r: ``dmax_topk`` gives h = sum p_j e_j + r m, scaled to norm sum p_j |e_j| + r |m| if
      ``renormalize``; ``iter_smooth_topk`` gives e(token) + weight * sum p_j e_j.

    Raises:
      ValueError: for an unknown backend.
    """
    return pick("token_merge", backend, choose_backend, _BACKENDS)(
        table, tokens, mask_id=mask_id, ids=ids, probs=probs, soft=soft, spec=spec
    )
