"""The kinds of problems: phrasings, operand ranges and solution steps, as data. :mod:`tasks` gives them meaning."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """One kind of problem.

    name: identifies the family in problem keys.
    ranges: inclusive range of each operand, in the order of the letters a, b, c, ...
    steps: ``left operator right`` each; a letter is an operand, ``#n`` the result of step n (from 1), a number itself.
    phrasings: question templates over the operand letters and ``{name}``, ``{other}``, ``{item}``.
    symmetric: exchanging the operands gives the same problem, so its key sorts them.
    """

    name: str
    ranges: tuple[tuple[int, int], ...]
    steps: tuple[str, ...]
    phrasings: tuple[str, ...]
    symmetric: bool = False


NAMES = ("Tom", "Mia", "Ben", "Ana", "Sam", "Eva", "Leo", "Zoe", "Max", "Ivy", "Jack", "Lucy")
ITEMS = ("apples", "pens", "books", "coins", "cards", "stamps", "marbles", "shells", "eggs", "beads", "cups", "toys")

ANY, TWO, ONE, FEW = (1, 999), (2, 99), (2, 9), (2, 12)

FAMILIES = (
    # One step.
    Family("add", (ANY, ANY), ("a + b",), ("What is {a} + {b}?", "How much is {a} plus {b}?", "What is {a}+{b}?", "{a} + {b} = ?"), True),
    Family("sub", (ANY, ANY), ("a - b",), ("What is {a} - {b}?", "How much is {a} minus {b}?", "What is {a}-{b}?", "{a} - {b} = ?")),
    Family(
        "mul", (FEW, TWO), ("a x b",), ("What is {a} x {b}?", "How much is {b} times {a}?", "What is {b} x {a}?", "{a} x {b} = ?"), True
    ),
    Family("div", ((2, 999), ONE), ("a / b",), ("What is {a} / {b}?", "How much is {a} divided by {b}?", "{a} / {b} = ?")),
    # Expressions.
    Family("mul-add", (FEW, TWO, ANY), ("a x b", "#1 + c"), ("What is {a} x {b} + {c}?", "What is {c} + {a} x {b}?")),
    Family("mul-sub", (FEW, TWO, ANY), ("a x b", "#1 - c"), ("What is {a} x {b} - {c}?",)),
    Family("add-mul", (TWO, TWO, ONE), ("a + b", "#1 x c"), ("What is ({a} + {b}) x {c}?", "Add {a} and {b}, then multiply by {c}.")),
    Family("sub-mul", (TWO, TWO, ONE), ("a - b", "#1 x c"), ("What is ({a} - {b}) x {c}?", "Take {b} from {a}, then multiply by {c}.")),
    Family("add-sub", (ANY, ANY, ANY), ("a + b", "#1 - c"), ("What is {a} + {b} - {c}?",)),
    Family("add-div", (ANY, ANY, ONE), ("a + b", "#1 / c"), ("What is ({a} + {b}) / {c}?", "Add {a} and {b}, then divide by {c}.")),
    Family("sum-of-products", (ONE, TWO, ONE, TWO), ("a x b", "c x d", "#1 + #2"), ("What is {a} x {b} + {c} x {d}?",)),
    Family(
        "recipe-of-three",
        (TWO, TWO, ONE, ANY),
        ("a + b", "#1 x c", "#2 - d"),
        ("Start with {a}. Add {b}. Multiply by {c}. Take away {d}. What do you have?",),
    ),
    Family(
        "recipe-of-four",
        (TWO, ONE, ANY, TWO, ONE),
        ("a x b", "#1 + c", "#2 - d", "#3 / e"),
        ("Start with {a}. Multiply by {b}. Add {c}. Take away {d}. Divide by {e}. What do you have?",),
    ),
    # Stories of two steps.
    Family(
        "boxes",
        (FEW, TWO, ANY),
        ("a x b", "#1 - c"),
        (
            "{name} has {a} boxes with {b} {item} in each box. {name} gives away {c} {item}. How many {item} are left?",
            "A shop has {a} boxes of {b} {item}. It sells {c} {item}. How many {item} are left?",
        ),
    ),
    Family(
        "change",
        (FEW, (2, 60), (5, 500)),
        ("a x b", "c - #1"),
        (
            "{name} buys {a} {item} for ${b} each and pays with ${c}. How much change does {name} get?",
            "{name} has ${c} and buys {a} {item} at ${b} each. How many dollars are left?",
        ),
    ),
    Family(
        "share",
        (ANY, ANY, ONE),
        ("a + b", "#1 / c"),
        (
            "{name} has {a} {item} and {other} has {b} {item}. They share them equally among {c} friends. "
            "How many {item} does each friend get?",
            "{name} packs {a} {item} and then {b} more {item} into {c} equal bags. How many {item} are in each bag?",
        ),
    ),
    Family(
        "saving",
        (FEW, TWO, ANY),
        ("a x b", "#1 + c"),
        (
            "{name} saves ${b} a week for {a} weeks and already had ${c}. How many dollars does {name} have now?",
            "{name} works {a} hours for ${b} an hour and finds ${c}. How many dollars does {name} have?",
        ),
    ),
    Family(
        "times-as-many",
        (TWO, ONE),
        ("a x b", "#1 + a"),
        ("{name} has {a} {item}. {other} has {b} times as many. How many {item} do they have together?",),
    ),
    Family(
        "time",
        (ONE, (1, 59)),
        ("a x 60", "#1 + b"),
        (
            "A trip takes {a} hours and {b} minutes. How many minutes is that?",
            "{name} reads for {a} hours and {b} minutes. How many minutes is that?",
        ),
    ),
    Family(
        "rectangle", (TWO, TWO), ("a + b", "#1 x 2"), ("A garden is {a} meters long and {b} meters wide. How long is its fence?",), True
    ),
    # Stories of three and four steps.
    Family(
        "bus",
        (TWO, TWO, TWO, TWO),
        ("a - b", "#1 + c", "#2 - d"),
        ("A bus has {a} people. At one stop {b} get off and {c} get on. Then {d} get off. How many people are on the bus?",),
    ),
    Family(
        "more-than",
        (ANY, TWO, ANY),
        ("a + b", "a + #1", "#2 - c"),
        ("{name} has {a} {item}. {other} has {b} more than {name}. Together they sell {c}. How many {item} are left?",),
    ),
    Family(
        "reading",
        (FEW, TWO, FEW, TWO),
        ("a x b", "c x d", "#1 + #2"),
        (
            "{name} reads {b} pages a day for {a} days, then {d} pages a day for {c} days. How many pages does {name} read?",
            "{name} buys {a} {item} for ${b} each and {other} buys {c} for ${d} each. How many dollars do they pay?",
        ),
    ),
    Family(
        "teams",
        (FEW, TWO, TWO, ONE),
        ("a x b", "#1 + c", "#2 / d"),
        ("{a} classes of {b} children and {c} parents form {d} equal teams. How many people are in each team?",),
    ),
    Family(
        "bakery",
        (FEW, TWO, ANY, ONE),
        ("a x b", "#1 - c", "#2 x d"),
        ("{name} bakes {a} trays of {b} cakes and burns {c}. {name} sells the rest for ${d} each. How many dollars does {name} get?",),
    ),
    Family(
        "two-buys-change",
        (ONE, TWO, ONE, TWO, ANY),
        ("a x b", "c x d", "#1 + #2", "e - #3"),
        ("{name} buys {a} {item} at ${b} and {c} bags at ${d} and pays with ${e}. How much change does {name} get?",),
    ),
    Family(
        "farm",
        (FEW, TWO, TWO, ONE),
        ("a x b", "#1 - c", "#2 / d", "#3 + b"),
        ("{name} picks {b} {item} a day for {a} days, sells {c}, fills {d} bags and adds {b} to one. How many are in it?",),
    ),
)
