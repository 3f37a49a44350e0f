"""Soft tokens: what a filled position looks like to the next forward."""

from __future__ import annotations

from diffulex_jax.rules.base import Rule, stateless
from diffulex_jax.state import DecodeState, Merge, Prediction
from pallas_kernels.token_merge import MergeSpec


def token_merge(
    *,
    top_k: int = 1,
    mode: str = "dmax_topk",
    renormalize: bool = True,
    weight: float = 1.0,
    newly_filled_only: bool = False,
    commit_soft: bool = False,
) -> Rule:
    """Lets filled, generated positions enter the next forward as a mix of embeddings (DMax, arXiv 2604.08302). Put it last.

    Args:
      top_k: candidates to mix.
      mode: ``"dmax_topk"``: candidates by probability, the rest of the mass on the mask embedding;
        ``"iter_smooth_topk"``: the token's own embedding plus ``weight`` times the candidates' mix.
      renormalize: (``dmax_topk``) scale the mix to the weighted mean of the norms that went into it.
      weight: (``iter_smooth_topk``) share of the candidates' mix.
      newly_filled_only: only tokens filled in this step are soft (Diffulex's fast path).
      commit_soft: a finished block's KV is written from its soft inputs (Diffulex) instead of its plain tokens (DMax).

    Raises:
      ValueError: for a setting out of range, or one that the mode would not read.
    """
    spec = MergeSpec(mode=mode, top_k=top_k, renormalize=renormalize, weight=weight, commit_soft=commit_soft)

    def update(prediction: Prediction, state: DecodeState) -> DecodeState:
        soft = state.editable & ~state.masked
        if newly_filled_only:
            soft &= prediction.masked
        if not commit_soft:
            done = ~state.masked.any(-1) & ~state.hold
            soft &= ~done[..., None]
        return state.replace(merge=Merge(ids=prediction.top_ids[..., :top_k], probs=prediction.top_probs[..., :top_k], soft=soft))

    return stateless(update, merge=spec)
