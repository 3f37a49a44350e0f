"""The embedded model: a small LLaDA2-MoE that does grade-school arithmetic.

    diffulex-jax train embedded --out DIR

Half of every batch learns block diffusion, half the repair of its own drafts. Writes a Hugging Face directory with metrics and a model
card; ``diffulex_jax/embedded`` is one.
"""

from __future__ import annotations

import functools

from diffulex_jax.models.registry import model_of
from diffulex_jax.training import objective
from diffulex_jax.training.arithmetic import data, tokenizer
from diffulex_jax.training.arithmetic.export import export
from diffulex_jax.training.recipe import Recipe, Term


MODEL = model_of(
    {
        "model_type": "llada2_moe",
        "vocab_size": tokenizer.VOCAB_SIZE,
        "mask_token_id": tokenizer.VOCAB_SIZE - 1,
        "eos_token_id": tokenizer.VOCAB_SIZE - 2,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 9,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "n_group": 4,
        "topk_group": 2,
        "max_position_embeddings": 4096,
    }
)

RECIPE = Recipe(
    model=MODEL,
    data=functools.partial(data.generated, count=1_500_000, workers=8),
    objectives=(Term("masked", objective.masked, 0.5), Term("on_policy", objective.on_policy, 0.5)),
    steps=10_500,
    rows=256,
    learning_rate=2e-3,
    warmup=300,
    weight_decay=0.05,
    beta2=0.98,
    balance=0.01,
    finish=export,
)
