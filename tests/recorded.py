"""Token for token what public implementations decode, and their logits: the tests of a family (sources: golden/README.md).

A file of tests imports them from here, with :func:`pytest_generate_tests`, and says of its family:

- ``CHECKPOINTS``: folders below ``golden/``.
- ``LEFT_OUT``: ``{(checkpoint, case): reason}``, the only cases that are stable in float64 and not held against ours.
- ``STABLE``: how many cases are stable in float64.
- ``COUNTED``: of how many of them forwards and edits are compared.
"""

from __future__ import annotations

import functools
import gc
import pathlib

import jax
import numpy as np
import pytest
import replay
from plain import attend_to, logits_of, sees

from diffulex_jax import Engine
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import checkpoint


GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case, or for each checkpoint, of the file; those of engines that show nothing new are marked ``sweep``."""
    names = metafunc.module.CHECKPOINTS
    if "case" in metafunc.fixturenames:
        chosen = cases(metafunc.module, fp64_same=metafunc.function is not test_first_steps)
        kept, params = covering(chosen), []
        for name, case in chosen:
            marks = () if (name, replay.engine_key(case)) in kept else pytest.mark.sweep
            params.append(pytest.param(name, case, id=f"{case.checkpoint}-{case.peer}-{case.id}", marks=marks))
        metafunc.parametrize(("name", "case"), params)
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names)


def covering(chosen: list[tuple[str, replay.Case]]) -> list[tuple[str, replay.EngineKey]]:
    """Engines that together have every checkpoint, peer, strategy and other setting, the one that adds most first."""
    shown: dict[tuple[str, replay.EngineKey], set] = {}
    for name, case in chosen:
        key = replay.engine_key(case)
        shown.setdefault((name, key), set()).update({name, case.peer, key.strategy, *key.more})
    kept, missing = [], set().union(*shown.values())
    while missing:
        kept.append(max(shown, key=lambda engine: len(shown[engine] & missing)))
        missing -= shown[kept[-1]]
    return kept


def test_tokens(name, case):
    assert replay.difference(case, decoded(name, case)) is None


def test_forwards_and_edits(name, case):
    """Wherever the peer counts as ours does."""
    for count in (replay.forwards, replay.edits):
        if (pair := count(case, decoded(name, case))) is not None:
            assert pair[0] == pair[1], count.__name__


@pytest.mark.sweep  # it needs every engine
def test_forwards_and_edits_are_counted(request):
    def counted(count) -> int:
        return sum(count(case, decoded(name, case)) is not None for name, case in cases(request.module))

    assert (counted(replay.forwards), counted(replay.edits)) == request.module.COUNTED


def test_nothing_else_is_left_out(request):
    stable = [(name, case) for name in request.module.CHECKPOINTS for case in recorded(name) if case.recorded["fp64_same"]]
    assert {(name, case.id): said for name, case in stable if (said := replay.left_out(case))} == request.module.LEFT_OUT
    assert len(stable) == request.module.STABLE
    assert not any(replay.unknown_setting(case) for _, case in stable)


@pytest.mark.sweep
def test_first_steps(name, case):
    """Where the peer itself gives other tokens in float64, its first steps still count."""
    pairs = replay.first_steps(case, functools.partial(engine_of, name))
    assert len(pairs) == replay.FIRST_STEPS
    for got, wanted in pairs:
        assert got == wanted


def test_logits(name):
    network, params = checkpoint.load(GOLDEN / name, make_mesh())
    forward = jax.jit(lambda params, ids, mask: logits_of(network, params, ids, attend_to(mask))[0])
    with np.load(GOLDEN / f"{name}.logits.npz") as file:
        for i in range(3):
            ids, want, block = file[f"ids{i}"], file[f"logits{i}"], int(file[f"block{i}"]) if f"block{i}" in file else 32
            got = forward(params, ids, sees(len(ids), block, network.spec.attention))
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@functools.cache
def recorded(name: str) -> list[replay.Case]:
    return [case for path in sorted(GOLDEN.glob(f"{name}.*.json")) for case in replay.load(path, GOLDEN / name)]


def cases(module, *, fp64_same: bool = True) -> list[tuple[str, replay.Case]]:
    """What is held against ours, of the file ``module``."""
    return [
        (name, case)
        for name in module.CHECKPOINTS
        for case in recorded(name)
        if case.recorded["fp64_same"] == fp64_same and (name, case.id) not in module.LEFT_OUT
    ]


def decoded(name: str, case: replay.Case) -> replay.Decoded:
    """Ours; all stable cases that one engine can take go through it together."""
    return _decoded(name, replay.engine_key(case))[case.peer, case.id]


@functools.cache
def _decoded(name: str, key: replay.EngineKey) -> dict[tuple[str, str], replay.Decoded]:
    alike = [case for case in recorded(name) if case.recorded["fp64_same"] and not replay.left_out(case) and replay.engine_key(case) == key]
    return replay.decode(alike, functools.partial(engine_of, name))


@functools.lru_cache(maxsize=1)
def engine_of(name: str, **settings) -> Engine:
    """One at a time: each takes some 1500 of the 65530 mappings of memory that Linux gives to a process."""
    gc.collect()
    return Engine.from_pretrained(str(GOLDEN / name), warm_up=False, **settings)
