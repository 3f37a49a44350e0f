"""The models that are decoded, and the requests: sizes that eight devices can share."""

from __future__ import annotations

import functools

import jax

from diffulex_jax.models.base import init
from diffulex_jax.models.registry import model_of


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
SHAPE = SIZES | {
    "model_type": "llada2_moe",
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "mask_token_id": 95,
    "eos_token_id": 94,
    "max_position_embeddings": 256,
}
MODEL = model_of(SHAPE)
NEXT = model_of(  # biases, a head that is the embeddings, and outputs that speak of the next position
    SIZES
    | {
        "model_type": "Fast_dLLM_Qwen",
        "mask_token_id": 95,
        "eos_token_id": 94,
        "tie_word_embeddings": True,
    }
)
SLOTS, WINDOW, BLOCK, PAGES, STEPS = 4, 2, 4, 6, 24
MASK = MODEL.spec.mask_id
PROMPTS = (9, 3, 8, 11)  # tokens: two whole blocks, none, two and nothing else, two


@functools.cache
def random_weights(model=MODEL, seed=0):
    """Random parameters as arrays of NumPy, of one program: JAX would compile one for each array, and one for each that moves to a mesh."""
    return jax.device_get(jax.jit(functools.partial(init, model, scale=0.3))(jax.random.key(seed)))
