"""Multi-block teacher forcing (MultiTF of MBD-LMs): a model learns to denoise several blocks together.

    diffulex-jax train multi_block --model DIR --data ANSWERS.jsonl --out DIR

Groups of two blocks, the later the noisier, as in a window of ``buffer_size=2``. The settings are the authors' for LLaDA2-mini
(SJTU-DENG-Lab/mbd-lms). For a model that ``dmax`` trained, give the objective ``drafts=True``, as they do.
"""

from __future__ import annotations

import functools

from diffulex_jax.training import objective
from diffulex_jax.training.arithmetic import data
from diffulex_jax.training.recipe import Recipe, Term


RECIPE = Recipe(
    model="embedded",
    data=functools.partial(data.generated, count=20_000),
    objectives=(Term("multi_block", functools.partial(objective.multi_block, most=2)),),
    steps=4000,
    rows=32,
    learning_rate=2e-6,
    warmup=120,
    weight_decay=0.01,
    beta2=0.999,
)
