"""LLaDA2: token for token what public implementations decode, and their logits."""

from __future__ import annotations

from recorded import (
    pytest_generate_tests,
    test_first_steps,
    test_forwards_and_edits,
    test_forwards_and_edits_are_counted,
    test_logits,
    test_nothing_else_is_left_out,
    test_tokens,
)


__all__ = [
    "pytest_generate_tests",
    "test_first_steps",
    "test_forwards_and_edits",
    "test_forwards_and_edits_are_counted",
    "test_logits",
    "test_nothing_else_is_left_out",
    "test_tokens",
]

CHECKPOINTS = ("tiny-llada2", "tiny-llada2-trained")
LEFT_OUT = {
    ("tiny-llada2", "diffusers-16"): "an EOS ends it although tokens before it would still be edited",
    ("tiny-llada2", "diffusers-18"): "run with the pipeline's own 2-D mask: plainly causal, not block-causal",
    ("tiny-llada2-trained", "diffusers-18"): "run with the pipeline's own 2-D mask: plainly causal, not block-causal",
}
STABLE = 88
COUNTED = (34, 24)
