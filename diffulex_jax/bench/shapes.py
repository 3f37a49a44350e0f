"""Network shapes to measure without a checkpoint."""

from __future__ import annotations

import dataclasses

from diffulex_jax.config import ModelConfig


_TINY = ModelConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    n_group=4,
    topk_group=2,
    mask_token_id=1021,
    eos_token_id=1020,
    max_position_embeddings=4096,
)

SHAPES: dict[str, ModelConfig] = {
    "tiny": _TINY,
    # 131.7 M parameters: what two CPU cores decode in tens of milliseconds a step.
    "cpu-131m": dataclasses.replace(
        _TINY,
        vocab_size=32_768,
        hidden_size=512,
        intermediate_size=1280,
        num_hidden_layers=8,
        head_dim=64,
        num_experts=32,
        moe_intermediate_size=256,
        mask_token_id=32_767,
        eos_token_id=32_766,
    ),
}
