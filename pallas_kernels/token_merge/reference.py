"""Soft-token embeddings in plain jnp."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeSpec:
    """How candidates are mixed; static. See ``rules.token_merge`` for what each field means."""

    mode: str = "dmax_topk"
    top_k: int = 1
    renormalize: bool = True
    weight: float = 1.0
    commit_soft: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("dmax_topk", "iter_smooth_topk"):
            raise ValueError(f"merge mode {self.mode!r} must be 'dmax_topk' or 'iter_smooth_topk'")
        if self.top_k < 1:
            raise ValueError(f"merge top_k={self.top_k} must be at least 1")
        if self.mode == "dmax_topk" and self.weight != 1.0:
            raise ValueError(f"merge weight={self.weight} is read by mode 'iter_smooth_topk' only")
        if self.mode == "iter_smooth_topk" and not self.renormalize:
            raise ValueError("merge renormalize=False is read by mode 'dmax_topk' only")
        if not 0.0 < self.weight < float("inf"):
            raise ValueError(f"merge weight={self.weight} must be positive and finite")


def merge(
    table: jax.Array, tokens: jax.Array, *, mask_id: int, ids: jax.Array, probs: jax.Array, soft: jax.Array, spec: MergeSpec
) -> jax.Array:
    """See the package's ``merge``."""
    hard = table[tokens]
    candidates = table[ids].astype(jnp.float32)
    mix = jnp.einsum("...md,...m->...d", candidates, probs)
    if spec.mode == "iter_smooth_topk":
        mix = hard.astype(jnp.float32) + spec.weight * mix
    else:
        mask = table[mask_id].astype(jnp.float32)
        rest = jnp.maximum(0.0, 1.0 - probs.sum(-1))
        mix = mix + rest[..., None] * mask
        if spec.renormalize:
            norm = (probs * jnp.linalg.norm(candidates, axis=-1)).sum(-1) + rest * jnp.linalg.norm(mask)
            mix = mix * (norm / (jnp.linalg.norm(mix, axis=-1) + 1e-6))[..., None]
    return jnp.where(soft[..., None], mix.astype(table.dtype), hard)
