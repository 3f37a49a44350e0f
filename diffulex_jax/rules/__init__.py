"""Decoding rules: pure transforms of the state, composed with :func:`chain`."""

from diffulex_jax.rules.base import Rule, chain, dims_for, stateless
from diffulex_jax.rules.decide import decide
from diffulex_jax.rules.edit import edit
from diffulex_jax.rules.entropy_bounded import entropy_bounded
from diffulex_jax.rules.factor import factor
from diffulex_jax.rules.levenshtein import levenshtein
from diffulex_jax.rules.noise_levels import at_random, by_noise_level
from diffulex_jax.rules.rationed import rationed
from diffulex_jax.rules.remask import remask
from diffulex_jax.rules.scheduled import scheduled
from diffulex_jax.rules.sequential import sequential
from diffulex_jax.rules.soft_parallel import soft_parallel
from diffulex_jax.rules.sub_blocks import in_sub_blocks
from diffulex_jax.rules.threshold import threshold
from diffulex_jax.rules.token_merge import token_merge


__all__ = [
    "Rule",
    "at_random",
    "by_noise_level",
    "chain",
    "decide",
    "dims_for",
    "edit",
    "entropy_bounded",
    "factor",
    "in_sub_blocks",
    "levenshtein",
    "rationed",
    "remask",
    "scheduled",
    "sequential",
    "soft_parallel",
    "stateless",
    "threshold",
    "token_merge",
]
