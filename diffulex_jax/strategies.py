"""Strategies: short named chains of rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffulex_jax.rules import Rule, chain, edit, levenshtein, remask, soft_parallel, threshold, token_merge


def llada2() -> Rule:
    """LLaDA2.0: fill masks above a threshold."""
    return chain(threshold(), remask())


def llada2_edit() -> Rule:
    """LLaDA2.1: fill masks and revise filled tokens in the same step."""
    return chain(threshold(), edit(), remask())


def dmax(*, mode: str = "reference", top_k: int = 1) -> Rule:
    """DMax's soft parallel decoding.

    Args:
      mode: ``"reference"`` (the authors' rule) or ``"fast"`` (Diffulex's fast path: only newly filled tokens are soft, only
        masked positions are asked for confidence, and a block's KV comes from its last soft inputs).
      top_k: candidates mixed into a soft token.

    Raises:
      ValueError: for another mode.
    """
    if mode == "reference":
        return chain(soft_parallel(), remask(), token_merge(top_k=top_k))
    if mode == "fast":
        return chain(soft_parallel(settle_on="masked"), remask(), token_merge(top_k=top_k, newly_filled_only=True, commit_soft=True))
    raise ValueError(f"dmax mode {mode!r} must be 'reference' or 'fast'")


def llada2_levenshtein() -> Rule:
    """LLaDA2.2: fill and revise, and let positions be deleted or inserted within the block."""
    return levenshtein()


STRATEGIES: dict[str, Callable[[], Rule]] = {
    "llada2": llada2,
    "multi_bd": llada2,
    "d2f": llada2,
    "llada2_edit": llada2_edit,
    "llada2_levenshtein": llada2_levenshtein,
    "dmax": dmax,
}

SUGGESTED: dict[str, dict[str, Any]] = {
    "multi_bd": {"buffer_size": 2},  # MBD-LMs' buffer
    "d2f": {"buffer_size": 4, "attention": "prefix_full"},
}
"""Engine settings that go with a strategy where the caller names none: multi-block diffusion and D2F are ``llada2``'s rule in a wider
window, D2F with prompts that see all of themselves."""


def resolve(strategy: str | Rule) -> Rule:
    """The rule of a strategy's name, or the rule itself.

    Raises:
      ValueError: for an unknown name.
      TypeError: for anything else.
    """
    if isinstance(strategy, Rule):
        return strategy
    if not isinstance(strategy, str):
        raise TypeError(f"strategy must be a name or a Rule, got {strategy!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}, or pass a Rule")
    return STRATEGIES[strategy]()
