"""Asks a model the items of suites: how many are right, and what that took."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffulex_jax.engine.engine import Engine
from diffulex_jax.engine.results import Output
from diffulex_jax.errors import SettingError
from diffulex_jax.evaluation import sandbox
from diffulex_jax.evaluation.suites import Item, Suite
from diffulex_jax.sampling_params import SamplingParams, seeds


COUNTING = (
    "tokens: generated, before the end of sequence. forwards: each request's own, prefill not counted, of requests decoded together too. "
    "tokens/s: all tokens by the wall-clock time from the first request to the last output; loading and compiling are not counted."
)
"""What the figures mean."""


class Work(NamedTuple):
    """What decoding took; :data:`COUNTING` says how it is counted.

    Attributes:
      tokens, forwards, revised: totals; ``revised`` filled tokens were changed.
      seconds: of wall-clock time.
    """

    tokens: int
    forwards: int
    revised: int
    seconds: float

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a suite.

    Attributes:
      suite: its name.
      right, items: how many answers are right, and of how many.
      work: what they took.
      finish_reasons: how often outputs ended why.
    """

    suite: str
    right: int
    items: int
    work: Work
    finish_reasons: dict[str, int]

    def plain(self) -> dict[str, Any]:
        """The figures as JSON has them, with the 95 % interval of the accuracy."""
        low, high = wilson(self.right, self.items)
        accuracy = {"accuracy": self.right / self.items, "low": low, "high": high}
        rates = {"tokens_per_forward": self.work.tokens_per_forward, "tokens_per_second": self.work.tokens_per_second}
        reasons = {"finish_reasons": self.finish_reasons}
        return {"suite": self.suite, "items": self.items, "right": self.right} | accuracy | self.work._asdict() | rates | reasons


def evaluate(
    engine: Engine, suite: Suite, params: SamplingParams, *, chat: bool = False, run_code: bool = False, progress: bool = False
) -> tuple[Result, list[tuple[str, bool]]]:
    """Decodes a suite's items, all at once, and marks the answers.

    Args:
      engine: with a tokenizer.
      suite: what to ask.
      params: of every item. ``max_tokens`` is cut to what the engine's ``max_model_len`` leaves; items have seeds of their own that
        follow from ``seed``.
      chat: put prompts through the model's chat template.
      run_code: run what the model wrote where a suite is graded so; see ``sandbox``.
      progress: show a bar.

    Returns:
      The result, and each answer with whether it is right.

    Raises:
      ValueError: for a suite that is graded by running code, without ``run_code``; where the model has no tokenizer; for a prompt that
        leaves no room for an answer, naming the item.
    """
    check(suite, run_code=run_code)
    if engine.tokenizer is None:
        raise ValueError("the model has no tokenizer; suites are texts")
    prompts = [
        engine.tokenizer.apply_chat_template([{"role": "user", "content": item.prompt}]) if chat else engine.tokenizer.encode(item.prompt)
        for item in suite.items
    ]
    room = [engine.settings.max_model_len - len(prompt) for prompt in prompts]
    if min(room) < 1:
        i = room.index(min(room))
        raise ValueError(f"{suite.name}: item {i} has {len(prompts[i])} tokens, and max_model_len={engine.settings.max_model_len}")
    drawn = seeds(dataclasses.replace(params, n=len(prompts)))
    each = [
        dataclasses.replace(params, max_tokens=min(params.max_tokens, n), min_tokens=min(params.min_tokens, n), seed=seed)
        for n, seed in zip(room, drawn, strict=True)
    ]
    outputs, work = decode(engine, prompts, each, progress=progress)
    answers = [output.text or "" for output in outputs]
    marks = grade(suite.items, answers)
    reasons = {reason: sum(o.finish_reason == reason for o in outputs) for reason in sorted({o.finish_reason for o in outputs})}
    return Result(suite.name, sum(marks), len(marks), work, reasons), list(zip(answers, marks, strict=True))


def check(suite: Suite, *, run_code: bool) -> None:
    """Checks that a suite may be graded.

    Raises:
      ValueError: where that runs code, and ``run_code`` is False.
    """
    if suite.runs_code and not run_code:
        raise SettingError("run_code", f"{suite.name} is graded by running what the model writes, as you, on this machine; say --run-code")


def decode(
    engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], *, progress: bool = False
) -> tuple[list[Output], Work]:
    """Outputs of prompts, decoded together, and what that took. What they need is compiled before the clock starts."""
    engine.warm_up(prompts, params)
    engine.generate(prompts[:1], [dataclasses.replace(params[0], n=1, max_tokens=1, min_tokens=0)])  # loads the tokenizer
    began = time.perf_counter()
    outputs = engine.generate(prompts, params, progress=progress)
    seconds = time.perf_counter() - began
    tokens, forwards = sum(len(output.token_ids) for output in outputs), sum(output.nfe for output in outputs)
    return outputs, Work(tokens, forwards, sum(output.revised_tokens for output in outputs), seconds)


def grade(items: Sequence[Item], answers: Sequence[str]) -> list[bool]:
    """Whether each answer is right; programs run as many at once as there are processors."""

    def one(item: Item, answer: str) -> bool:
        if item.program is not None:
            return sandbox.passes(item.program(answer))
        assert item.grade is not None, "an item is graded one way or the other"
        return item.grade(answer)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(one, items, answers))


def wilson(right: int, items: int, *, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share, for 95 % unless ``z`` says otherwise; it stays within 0 and 1, also at the ends."""
    share, spread = right / items, z * z / items
    middle, half = share + spread / 2, z * math.sqrt(share * (1 - share) / items + spread / items / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def table(results: Sequence[Result]) -> str:
    """Results as lines of text."""
    lines = [f"{'suite':24} {'right':>11} {'95 %':>16} {'tokens/forward':>14} {'tokens/s':>8}"]
    for result in results:
        low, high = wilson(result.right, result.items)
        right = f"{result.right / result.items:.1%}"
        work = f"{result.work.tokens_per_forward:14.2f} {result.work.tokens_per_second:8.0f}"
        lines.append(f"{result.suite[:24]:24} {right:>11} {f'{low:.1%} to {high:.1%}':>16} {work}")
    return "\n".join([*lines, "", COUNTING])
