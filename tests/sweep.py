"""Which of many cases `make test` runs: one of each kind. `make test-all` runs them all. CONTRIBUTING.md says when to mark one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], *, but: Iterable[Any]) -> list[Any]:
    """``cases`` as parameters, all of them marked ``sweep`` but those in ``but``. Raises ValueError where one of those is no case."""
    cases, but = list(cases), list(but)
    if unknown := [case for case in but if case not in cases]:
        raise ValueError(f"but={unknown} are not among the cases {cases}")
    return [case if case in but else pytest.param(case, marks=pytest.mark.sweep) for case in cases]


def mark_others(items: Iterable[pytest.Item]) -> list[str]:
    """Marks ``sweep`` each case of a test that its ``sweep_but`` does not name; returns what it names and is no case."""
    unknown: dict[str, set[str]] = {}
    for item in items:
        if kept := item.get_closest_marker("sweep_but"):
            unknown.setdefault(item.nodeid.split("[")[0], set(kept.args)).discard(item.callspec.id)
            if item.callspec.id not in kept.args:
                item.add_marker("sweep")
    return [f"{test}[{case}]" for test, cases in unknown.items() for case in sorted(cases)]


def left_out(items: Iterable[pytest.Item]) -> list[str]:
    """Files of which every test is marked ``sweep`` or ``pods``."""
    marks: dict[str, list[set[str]]] = {}
    for item in items:
        marks.setdefault(item.nodeid.split("::")[0], []).append({mark.name for mark in item.iter_markers()})
    return sorted(file for file, each in marks.items() if all(names & {"sweep", "pods"} for names in each))
