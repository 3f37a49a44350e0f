"""SDAR: token for token what public implementations decode, and their logits."""

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

CHECKPOINTS = ("families/tiny-sdar", "families/tiny-sdar-trained", "families/tiny-sdar-moe")
LEFT_OUT = {
    ("families/tiny-sdar", "tiny-sdar.gen-4"): (
        "generate.py measures the confidence after top-k: with top_k=1 it is 1, so a block takes one step"
    ),
}
STABLE = 52
COUNTED = (51, 0)
