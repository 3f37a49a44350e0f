"""LLaDA: token for token what public implementations decode, and their logits."""

from __future__ import annotations

from recorded import (
    pytest_generate_tests,
    test_forwards_and_edits,
    test_forwards_and_edits_are_counted,
    test_logits,
    test_nothing_else_is_left_out,
    test_tokens,
)


__all__ = [
    "pytest_generate_tests",
    "test_forwards_and_edits",
    "test_forwards_and_edits_are_counted",
    "test_logits",
    "test_nothing_else_is_left_out",
    "test_tokens",
]

CHECKPOINTS = ("families/tiny-llada", "families/tiny-llada-moe")
LEFT_OUT = {
    ("families/tiny-llada", "llada-16"): "the peer draws the order by a generator of its own",
    ("families/tiny-llada-moe", "llada-14"): "the peer draws the order by a generator of its own",
}
STABLE = 37
COUNTED = (35, 0)
