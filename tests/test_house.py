"""The shape of the house: who may import whom, and where a device or a family may be named."""

from __future__ import annotations

import ast
import pathlib

import pytest


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
