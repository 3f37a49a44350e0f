"""Generated grade-school arithmetic and word problems with short worked answers.

A problem's **key** is its family and operands; a checksum of the key decides whether the problem belongs to training or to
test, so the two are disjoint by construction whatever names, objects, phrasing or seed are drawn. Draws that no child should
meet (a negative difference, an inexact quotient, a product of two large numbers) are rejected.

A worked answer has one sentence per step and one for the result, e.g. for ``What is 5 x 12 - 17?``::

    First we can just find 5 x 12 = 60. Then you can quickly get 60 - 17 = 43. So the answer is 43.

Later steps depend on earlier results. The filler words are drawn at random, as people's wording is: no decoder can know them
beforehand, so a decoder that waits until it is sure of a word spends a forward on each.

**Correct** means that the last ``the answer is N`` of a text states the problem's final number; wording is free.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from diffulex_jax.training.arithmetic.families import FAMILIES, ITEMS, NAMES, Family


Split = Literal["train", "test"]
LARGEST = 999  # of any result
EASY_FACTOR = 12  # the smaller factor of any product
TEST_SHARE = 16  # one key in this many is a test problem

FIRST = (("First", 0.6), ("Now", 0.25), ("Here", 0.15))
LATER = (("Then", 0.6), ("Next", 0.25), ("And", 0.15))
WHO = (("we", 0.6), ("I", 0.25), ("you", 0.15))
MAY = (("can", 0.6), ("may", 0.25), ("will", 0.15))
HOW = (("just", 0.6), ("quickly", 0.25), ("simply", 0.15))
VERB = (("find", 0.6), ("get", 0.25), ("see", 0.15))
CLOSE = (("So", 0.6), ("Thus", 0.25), ("Hence", 0.15))


class Problem(NamedTuple):
    """A question, one worked answer in words, its final number, and the key that decides its split."""

    question: str
    answer: str
    final: int
    key: str


class Step(NamedTuple):
    """One computation of a worked answer; every field is ``[N]`` int64 except the operator."""

    left: np.ndarray
    operator: str
    right: np.ndarray
    result: np.ndarray


def generate(split: Split, count: int, *, seed: int | tuple[int, int], unique: bool = False) -> list[Problem]:
    """``count`` problems of a split, families in equal shares, in random order; the same arguments give the same list.

    Args:
      split: which side of the key checksum to draw from.
      count: how many.
      seed: of a NumPy generator.
      unique: draw every key at most once.
    """
    rng = np.random.default_rng(seed)
    problems: list[Problem] = []
    seen: set[str] = set()
    while len(problems) < count:
        share = -(-(count - len(problems)) // len(FAMILIES))
        for family in FAMILIES:
            for problem in _draw(family, rng, split, share):
                if unique and problem.key in seen:
                    continue
                seen.add(problem.key)
                problems.append(problem)
    return [problems[i] for i in rng.permutation(len(problems))[:count]]


def split_of(key: str) -> Split:
    """The split a problem key belongs to."""
    return "test" if zlib.crc32(key.encode()) % TEST_SHARE == 0 else "train"


def final_number(text: str) -> int | None:
    """The number stated by the last ``the answer is N`` of a text, or None."""
    found = re.findall(r"the answer is (\d+)\b", text)
    return int(found[-1]) if found else None


def equations(text: str) -> list[str]:
    """The equations of a worked answer, e.g. ``["5 x 12 = 60", "60 - 17 = 43"]``."""
    return re.findall(r"\d+ [-+x/] \d+ = \d+", text)


def is_correct(problem: Problem, text: str) -> bool:
    """Exact match: the text's final number is the problem's."""
    return final_number(text) == problem.final


def _draw(family: Family, rng: np.random.Generator, split: Split, count: int) -> Iterator[Problem]:
    """``count`` problems of one family and split."""
    letters = "abcdefgh"[: len(family.ranges)]
    while count > 0:
        tries = 64 * count
        low, high = np.array(family.ranges).T[..., None]
        # The square favours small operands: problems of one, two and three digits all occur.
        operands = low + ((high + 1 - low) * rng.random((len(letters), tries)) ** 2).astype(np.int64)
        steps, sound = _solve(family, dict(zip(letters, operands, strict=True)))
        for n in np.flatnonzero(sound)[: 2 * count + 32]:
            values = operands[:, n].tolist()
            key = f"{family.name} {' '.join(map(str, sorted(values) if family.symmetric else values))}"
            if split_of(key) == split and count > 0:
                count -= 1
                solution = [(s.left[n], s.operator, s.right[n], s.result[n]) for s in steps]
                yield _write(family, rng, dict(zip(letters, values, strict=True)), solution, key)


def _solve(family: Family, operands: dict[str, np.ndarray]) -> tuple[list[Step], np.ndarray]:
    """The steps of many draws of a family, and which draws are sound (``[N]`` bool)."""
    sound = np.ones(len(operands["a"]), bool)
    steps: list[Step] = []

    def value(term: str) -> np.ndarray:
        if term.startswith("#"):
            return steps[int(term[1:]) - 1].result
        return operands[term] if term in operands else np.full(len(sound), int(term))

    for text in family.steps:
        left, operator, right = text.split()
        x, y = value(left), value(right)
        if operator == "/":
            result = x // np.maximum(y, 1)
            sound &= (y > 0) & (result * y == x)
        else:
            result = {"+": x + y, "-": x - y, "x": x * y}[operator]
        if operator == "x":
            sound &= (np.minimum(x, y) <= EASY_FACTOR) | (y == 60)
        sound &= (result >= 0) & (result <= LARGEST)
        steps.append(Step(x, operator, y, result))
    return steps, sound


def _write(family: Family, rng: np.random.Generator, operands: dict[str, int], steps: list[tuple], key: str) -> Problem:
    """Puts one draw into words."""
    draws = iter(rng.random(5 + 5 * len(steps)).tolist())

    def pick(words: tuple[tuple[str, float], ...]) -> str:
        sums = itertools.accumulate(share for _, share in words)
        u = next(draws)
        return next((word for (word, _), total in zip(words, sums, strict=True) if u < total), words[-1][0])

    def one_of(choices: tuple[str, ...]) -> str:
        return choices[int(next(draws) * len(choices))]

    name = one_of(NAMES)
    other = one_of(tuple(n for n in NAMES if n != name))
    question = one_of(family.phrasings).format(name=name, other=other, item=one_of(ITEMS), **operands)
    sentences = [
        f"{pick(LATER if i else FIRST)} {pick(WHO)} {pick(MAY)} {pick(HOW)} {pick(VERB)} {left} {operator} {right} = {result}."
        for i, (left, operator, right, result) in enumerate(steps)
    ]
    final = int(steps[-1][-1])
    return Problem(question, " ".join([*sentences, f"{pick(CLOSE)} the answer is {final}."]), final, key)
