"""A task that a model of 100 000 parameters learns on a CPU in half a minute: digits backwards, with words between them.

The prompt is twelve digits. The answer is the digits backwards, and before each a word, *and* or *then*, drawn at random. So half of an
answer follows from the prompt, and half is anybody's guess, as wording is.
"""

from __future__ import annotations

import numpy as np

from diffulex_jax.models.registry import model_of
from diffulex_jax.training.data import Examples


DIGITS = 12
WORDS = (*"0123456789", "and", "then", "", "", "end", "mask")
AND, END, MASK = 10, 14, 15
CANVAS = 48  # tokens; six blocks

MODEL = model_of(
    {
        "model_type": "sdar",
        "vocab_size": len(WORDS),
        "eos_token_id": END,
        "mask_token_id": MASK,
        "block_size": 8,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "rope_theta": 10_000.0,
    }
)


def examples(count: int, seed: int) -> Examples:
    """``count`` examples on canvases of :data:`CANVAS` tokens; the same arguments give the same."""
    rng = np.random.default_rng(seed)
    digits, words = rng.integers(0, 10, (count, DIGITS)), rng.integers(AND, AND + 2, (count, DIGITS))
    answers = np.stack([words, digits[:, ::-1]], -1).reshape(count, 2 * DIGITS)
    tokens = np.concatenate([digits, answers, np.full((count, CANVAS - 3 * DIGITS), END)], 1)
    return Examples(tokens, np.full(count, DIGITS, np.int32), np.full(count, 3 * DIGITS, np.int32))


def is_correct(prompt: list[int], answer: list[int]) -> bool:
    """Whether an answer's digits are the prompt's backwards, and its words are words."""
    words = answer[::2]
    return answer[1::2] == prompt[::-1] and len(words) == len(prompt) and all(AND <= word < AND + 2 for word in words)
