"""Strategies: short named chains of rules."""

from __future__ import annotations

from collections.abc import Callable

from diffulex_jax.rules import Rule, chain, edit, remask, soft_parallel, threshold, token_merge


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


STRATEGIES: dict[str, Callable[[], Rule]] = {"llada2": llada2, "llada2_edit": llada2_edit, "dmax": dmax}


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
