"""DMax's on-policy uniform training: a model learns to repair its own drafts, so that it can accept many tokens at once.

    diffulex-jax train dmax --model DIR --data ANSWERS.jsonl --out DIR

The settings are the authors' (arXiv 2604.08302): half of the rows see masks, at a ratio of 0.75, half the model's own choices in their
place, and all of the response counts. They train on the model's own greedy answers; so should the file be: ``diffulex-jax generate``
makes them. Their learning rate is for models of 16 billion parameters.
"""

from __future__ import annotations

import functools

from diffulex_jax.training import objective
from diffulex_jax.training.arithmetic import data
from diffulex_jax.training.recipe import Recipe, Term


NOISE = (0.75, 0.75)

RECIPE = Recipe(
    model="embedded",
    data=functools.partial(data.generated, count=20_000),
    objectives=(
        Term("masked", functools.partial(objective.masked, noise=NOISE, all_count=True), 0.5),
        Term("on_policy", functools.partial(objective.on_policy, noise=NOISE, some_stay=False), 0.5),
    ),
    steps=10_000,
    rows=8,
    learning_rate=2e-6,
    warmup=300,
    weight_decay=0.01,
    beta2=0.999,
)
