"""The shape of the house: who may import whom, and where a device or a family may be named."""

from __future__ import annotations

import ast
import collections
import pathlib
import types

import pytest
from sweep import left_out, mark_others, sweep


ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(path for package in ("diffulex_jax", "pallas_kernels") for path in (ROOT / package).rglob("*.py"))
FAMILIES = {f"diffulex_jax.models.{name}" for name in ("llada", "llada2", "llada_moe", "qwen2", "qwen3")}

# From the ground up: a package imports its own floor and those below. The first prefix that fits a module counts.
FLOORS = [
    ("pallas_kernels",),
    (
        "diffulex_jax.errors",
        "diffulex_jax.sampling_params",
        "diffulex_jax.state",
        "diffulex_jax.parallel",
        "diffulex_jax.compile_cache",
        "diffulex_jax.lazy",
        "diffulex_jax.version",
    ),
    ("diffulex_jax.models", "diffulex_jax.rules", "diffulex_jax.cache", "diffulex_jax.request_state", "diffulex_jax.strategies"),
    ("diffulex_jax.decode", "diffulex_jax.weights"),
    ("diffulex_jax.engine",),
    (
        "diffulex_jax.async_serving",
        "diffulex_jax.training",
        "diffulex_jax.evaluation",
        "diffulex_jax.bench",
        "diffulex_jax.planning",
        "diffulex_jax.viz",
    ),
    ("diffulex_jax.rollout",),
    ("diffulex_jax.cli", "diffulex_jax.__main__"),
]


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: pathlib.Path) -> set[str]:
    """Modules of our own that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith(("diffulex_jax.", "pallas_kernels."))}


def floor_of(module: str) -> int | None:
    return next((i for i, floor in enumerate(FLOORS) for prefix in floor if (module + ".").startswith(prefix + ".")), None)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_imports_upwards(path):
    mine = floor_of(module_of(path))
    if module_of(path) == "diffulex_jax":
        return  # the public names come from everywhere
    assert mine is not None, f"{module_of(path)} is on no floor"
    assert {name for name in imports(path) if (floor := floor_of(name)) is not None and floor > mine} == set()


def test_a_family_is_known_to_its_own_file_and_the_registry_alone():
    for path in FILES:
        known = {name for name in imports(path) if any((name + ".").startswith(family + ".") for family in FAMILIES)}
        if module_of(path) != "diffulex_jax.models.registry":
            assert not known, f"{module_of(path)} imports {known}"


def test_no_device_is_compared_by_name_outside_the_kernels():
    for path in FILES:
        if module_of(path).startswith("pallas_kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                names = {c.value for c in (node.left, *node.comparators) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not names & {"gpu", "tpu", "cuda"}, f"{path}:{node.lineno} compares a device by name"


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by name: a second one of the same name ends the whole run."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py")]
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []


# What `make test` leaves out: tests/conftest.py asks the same of every file when it does.


class Item:
    """What pytest knows of a test."""

    def __init__(self, file: str, case: str, *marks):
        self.nodeid, self.callspec, self.marks = f"{file}::test_it[{case}]", types.SimpleNamespace(id=case), [mark.mark for mark in marks]

    def get_closest_marker(self, name):
        return next((mark for mark in self.marks if mark.name == name), None)

    def iter_markers(self):
        return iter(self.marks)

    def add_marker(self, name):
        self.marks.append(getattr(pytest.mark, name).mark)


def test_a_file_may_not_vanish_from_make_test():
    swept, kept = Item("a.py", "1", pytest.mark.sweep), Item("a.py", "2")
    pod = Item("b.py", "1", pytest.mark.pods)
    assert left_out([swept, kept, pod]) == ["b.py"]
    assert left_out([swept, pod]) == ["a.py", "b.py"]


def test_cases_that_are_not_named_are_marked():
    items = [Item("a.py", case, pytest.mark.sweep_but("1", "4")) for case in "123"] + [Item("b.py", "1")]
    assert mark_others(items) == ["a.py::test_it[4]"]
    assert [item.get_closest_marker("sweep") is not None for item in items] == [False, True, True, False]
    one, two = sweep([1, 2], but=[1])
    assert one == 1 and (two.values, [mark.name for mark in two.marks]) == ((2,), ["sweep"])
    with pytest.raises(ValueError, match=r"but=\[3\] are not among the cases \[1, 2\]"):
        sweep([1, 2], but=[3])
