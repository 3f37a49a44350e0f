"""What is asked, and what counts as right; and the suites that are generated: any number of items, the same for the same seed.

``words`` and ``arithmetic`` are the embedded model's held-out problems, with words and without. The others are instructions over a short
list of names, after ParallelBench's waiting line (arXiv 2510.04767): ``copy``, ``insert``, ``remove`` and ``replace`` decide each position
by itself, as well in parallel as one by one; in ``reverse`` and ``sort`` it depends on many of the prompt's; and in ``shuffle`` on each
other: names that are drawn at once, each from its own distribution, repeat and are missing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffulex_jax.training.arithmetic import tasks


class Item(NamedTuple):
    """One question.

    Attributes:
      prompt: what the model is given, as it is or as a user's message.
      grade: whether a text answers it.
      program: makes of a text a Python program that ends with exit code 0 where it is right; then it is run in the place of ``grade``.
    """

    prompt: str
    grade: Callable[[str], bool] | None = None
    program: Callable[[str], str] | None = None


class Suite(NamedTuple):
    """Items under a name, which may be a file's."""

    name: str
    items: Sequence[Item]

    @property
    def runs_code(self) -> bool:
        """Whether grading runs what the model wrote."""
        return any(item.program is not None for item in self.items)


NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "Jane", "Kim", "Leo", "Mia", "Noah", "Olga", "Paul")


def generated(name: str, count: int, *, seed: int) -> Suite:
    """A generated suite.

    Args:
      name: one of :data:`GENERATED`.
      count: how many different items.
      seed: which.

    Raises:
      ValueError: for another name, naming those there are.
    """
    if name not in GENERATED:
        raise ValueError(f"suite {name!r} is none of {', '.join(GENERATED)}, and no file")
    return Suite(name, GENERATED[name](count, seed))


WITHOUT_A_STORY = (
    *("add", "sub", "mul", "div", "mul-add", "mul-sub", "add-mul", "sub-mul", "add-sub", "add-div", "sum-of-products"),
    *("recipe-of-three", "recipe-of-four"),
)
"""Families of problems that name nobody and nothing."""


def _problems(count: int, seed: int, *, words: bool) -> list[Item]:
    problems: list[tasks.Problem] = []
    drawn = count
    while len(problems) < count:
        drawn *= 2
        found = tasks.generate("test", drawn, seed=seed, unique=True)
        problems = [problem for problem in found if (problem.key.split()[0] not in WITHOUT_A_STORY) == words]
    return [Item(problem.question, functools.partial(tasks.is_correct, problem)) for problem in problems[:count]]


def _list_operation(instruction: str, change: Callable[[list[str], int, str], list[str]] | None) -> Callable[[int, int], list[Item]]:
    """Items of one operation on a list; ``change(names, index, name) -> names`` is what is right, None: any other order."""

    def items(count: int, seed: int) -> list[Item]:
        rng = np.random.default_rng((seed, len(instruction)))
        made: dict[str, Item] = {}
        while len(made) < count:
            drawn = rng.permutation(NAMES)[: rng.integers(4, 9) + 1].tolist()
            names, other, index = drawn[:-1], drawn[-1], int(rng.integers(len(drawn) - 1))
            told = instruction.format(name=names[index], other=other, position=index + 1)
            prompt = f"Here is a waiting line: {', '.join(names)}. {told} Answer with the names alone, separated by commas."
            want = None if change is None else change(list(names), index, other)
            made[prompt] = Item(prompt, functools.partial(_is_line, names=names, want=want))
        return list(made.values())

    return items


def _is_line(text: str, *, names: Sequence[str], want: Sequence[str] | None) -> bool:
    """Whether the last line of a text that holds names is ``want``, or where that is None, ``names`` in another order."""
    lines = [found for line in text.splitlines() if (found := re.findall(rf"\b(?:{'|'.join(NAMES)})\b", line))]
    if not lines:
        return False
    return lines[-1] == list(want) if want is not None else sorted(lines[-1]) == sorted(names) and lines[-1] != list(names)


def _without(names: list[str], index: int) -> list[str]:
    return [*names[:index], *names[index + 1 :]]


GENERATED: dict[str, Callable[[int, int], list[Item]]] = {
    "words": functools.partial(_problems, words=True),
    "arithmetic": functools.partial(_problems, words=False),
    "copy": _list_operation("Copy it.", lambda names, i, other: names),
    "insert": _list_operation("Insert {other} before position {position}.", lambda names, i, other: [*names[:i], other, *names[i:]]),
    "remove": _list_operation("Remove {name}.", lambda names, i, other: _without(names, i)),
    "replace": _list_operation("Replace {name} by {other}.", lambda names, i, other: [*names[:i], other, *names[i + 1 :]]),
    "reverse": _list_operation("Reverse it.", lambda names, i, other: names[::-1]),
    "sort": _list_operation("Sort it by the alphabet.", lambda names, i, other: sorted(names)),
    "shuffle": _list_operation("Shuffle it into any other order.", None),
}
"""``(count, seed) -> items`` by name."""
