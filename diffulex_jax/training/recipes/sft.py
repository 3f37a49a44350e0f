"""Supervised fine-tuning of a block-diffusion model: the answers of a file, given their prompts.

    diffulex-jax train sft --model DIR --data ANSWERS.jsonl --out DIR [--lora-rank 16]

A line of the file is ``{"prompt": ..., "completion": ...}`` or ``{"messages": [...]}``. Each block of an answer is masked with a ratio of
its own, and the masked tokens are predicted (block diffusion, arXiv 2503.09573). Without ``--model`` and ``--data`` it fine-tunes the
embedded model on its own kind of problems, which shows that it runs.
"""

from __future__ import annotations

import functools

from diffulex_jax.training import objective
from diffulex_jax.training.arithmetic import data
from diffulex_jax.training.recipe import Recipe, Term


RECIPE = Recipe(
    model="embedded",
    data=functools.partial(data.generated, count=20_000),
    objectives=(Term("masked", objective.masked),),
    steps=1000,
    rows=32,
    learning_rate=1e-5,
    warmup=30,
    weight_decay=0.1,
    beta2=0.999,
    balance=0.001,
)
