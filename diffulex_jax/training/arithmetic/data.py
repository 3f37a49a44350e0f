"""Problems as token canvases: prompt, worked answer, end-of-sequence to the end."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Sequence

import numpy as np

from diffulex_jax.training.arithmetic import tasks, tokenizer
from diffulex_jax.training.data import Batches, Examples, shuffled
from diffulex_jax.training.recipe import About


CANVAS = 128  # tokens; four blocks
SHARD = 20_000  # problems per unit of parallel work


def generated(about: About, *, count: int, workers: int = 1) -> Batches:
    """Batches of ``count`` generated problems, for a model whose tokenizer is :mod:`tokenizer`'s.

    Raises:
      ValueError: for a model of another vocabulary.
    """
    if about.model.spec.vocab_size != tokenizer.VOCAB_SIZE:
        raise ValueError(f"the problems have a vocabulary of {tokenizer.VOCAB_SIZE}, and this model one of {about.model.spec.vocab_size}")
    return shuffled(training_set(count, seed=about.seed, workers=workers), rows=about.rows, seed=about.seed)


def prompts(problems: Sequence[tasks.Problem], rng: np.random.Generator) -> list[str]:
    """A prompt text per problem: half of them bare questions, half chat turns.

    Some bare questions carry a line end or a ``Question:``/``Answer:`` frame; some chat turns a system message or an earlier
    turn. So the answer begins at every position of a block, and a model served over either API has seen its prompts.
    """
    texts = []
    for problem, u in zip(problems, rng.random(len(problems)), strict=True):
        question = problem.question
        if u < 0.40:
            texts.append(question)
        elif u < 0.45:
            texts.append(question + "\n")
        elif u < 0.50:
            texts.append(f"Question: {question}\nAnswer:")
        elif u < 0.80:
            texts.append(tokenizer.chat(question))
        elif u < 0.90:
            texts.append(tokenizer.chat(question, system=tokenizer.SYSTEM_PROMPTS[rng.integers(len(tokenizer.SYSTEM_PROMPTS))]))
        else:
            earlier = problems[int(rng.integers(len(problems)))]
            texts.append(tokenizer.chat(earlier.question) + earlier.answer + tokenizer.ROLE_END + tokenizer.chat(question))
    return texts


def encode(texts: Sequence[str], answers: Sequence[str], *, canvas: int = CANVAS) -> Examples:
    """Tokenizes prompts and answers onto canvases; pairs that do not fit, with one end-of-sequence token, are left out."""
    coder = tokenizer.build()
    eos = coder.token_to_id(tokenizer.EOS)
    tokens = np.full((len(texts), canvas), eos, np.uint16)
    start, end = np.zeros(len(texts), np.int32), np.zeros(len(texts), np.int32)
    for i, (prompt, answer) in enumerate(zip(coder.encode_batch(texts), coder.encode_batch(answers), strict=True)):
        ids = prompt.ids + answer.ids
        start[i], end[i] = len(prompt.ids), len(ids)
        if end[i] < canvas:
            tokens[i, : end[i]] = ids
    fits = end < canvas
    return Examples(tokens[fits], start[fits], end[fits])


def training_set(count: int, *, seed: int, workers: int) -> Examples:
    """About ``count`` training examples (those that fit), generated in parallel; the number of workers does not change them."""
    shards = -(-count // SHARD)
    seeds = [(seed, shard) for shard in range(shards)]
    if workers > 1:
        # Spawned, not forked: the parent may already hold an accelerator.
        with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _single_threaded) as pool:
            parts = list(pool.map(_shard, seeds))
    else:
        parts = [_shard(seed) for seed in seeds]
    return Examples(*(np.concatenate(column)[:count] for column in zip(*parts, strict=True)))


def _single_threaded() -> None:
    """Keeps the tokenizer of a worker process from starting a thread per core in each of them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _shard(seed: tuple[int, int]) -> Examples:
    problems = tasks.generate("train", SHARD, seed=seed)
    return encode(prompts(problems, np.random.default_rng((*seed, 1))), [p.answer for p in problems])
