"""Programs that are kept on disk ready to run: another process makes nothing anew, and never takes one for another."""

from __future__ import annotations

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compile_cache import look

from diffulex_jax.engine import executables
from diffulex_jax.parallel.mesh import make_mesh


PROGRAM = """
import json, jax, jax.monitoring, jax.numpy as jnp, pathlib
lowered = []
def note(event, _seconds, **about):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        lowered.append(about.get("fun_name", ""))
jax.monitoring.register_event_duration_secs_listener(note)
from diffulex_jax.engine import executables
from diffulex_jax.parallel.mesh import make_mesh
executables.compile_cache.in_use = lambda: pathlib.Path("{folder}")
def halved(x, steps):
    return jax.lax.fori_loop(0, steps, lambda i, x: jnp.where(x > 1, x / 2, x), x)
found = executables.Programs(make_mesh(), keep=True)("halved", jax.jit(halved), jnp.arange(8.0), jnp.int32(2))
print(json.dumps([len([name for name in lowered if "halved" in name]), found.tolist()]))
"""


@pytest.mark.sweep
def test_another_process_makes_no_program_anew_and_mends_one_that_is_broken(tmp_path):
    def run():
        return look(PROGRAM.format(folder=tmp_path), DIFFULEX_JAX_CACHE="off")[0]

    answer = [0, 1, 1, 0.75, 1, 1.25, 1.5, 1.75]
    assert run() == [1, answer] and run() == [0, answer]
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert run() == [1, answer] and run() == [0, answer]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(executables.compile_cache, "in_use", lambda: tmp_path)
    return tmp_path


def adding(constant: np.ndarray):
    return jax.jit(lambda x: x + jnp.asarray(constant))


def test_programs_that_differ_in_what_they_hold_are_two(folder: pathlib.Path):
    mesh, x = make_mesh(), np.zeros(3, np.float32)
    new = time.time_ns() % 10**6  # never compiled before: a CPU cannot write down what JAX's cache gave it
    added = [np.array([1, 2, new], np.float32), np.array([1, 2, new + 1], np.float32)]
    for _ in range(2):  # compiled, then read
        for constant in added:
            np.testing.assert_array_equal(executables.Programs(mesh, keep=True)("add", adding(constant), x), constant)
    assert len(list(folder.iterdir())) == 2


def test_what_decides_a_program_decides_its_file(folder, monkeypatch):
    mesh, x = make_mesh(), np.zeros(3, np.float32)

    def file():
        with jax.set_mesh(mesh):
            return executables._file_of(jax.jit(lambda x: x + 1).trace(x), x, mesh)

    first = file()
    assert file() == first
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert file() != first
    monkeypatch.undo()
    monkeypatch.setattr(executables.compile_cache, "in_use", lambda: folder)
    assert file() == first
    monkeypatch.setattr(executables, "_sources", lambda: "another version")
    assert file() != first


@pytest.mark.parametrize(
    ("name", "value", "decides"),
    [
        ("jax_disable_most_optimizations", "other", True),
        ("jax_optimization_level", "O1", True),
        ("jax_default_matmul_precision", "highest", True),
        ("jax_threefry_partitionable", "other", True),
        ("jax_compilation_cache_dir", "/elsewhere", False),
        ("jax_persistent_cache_min_compile_time_secs", 7.0, False),
    ],
)
def test_settings_of_jax_decide_a_program(folder, name, value, decides):
    """Of those that say how it is compiled; a folder of programs may be moved."""
    mesh, x = make_mesh(), np.zeros(3, np.float32)

    def file():
        with jax.set_mesh(mesh):
            return executables._file_of(jax.jit(lambda x: x + 1).trace(x), x, mesh)

    first, before = file(), jax.config.values[name]
    try:
        jax.config.update(name, not before if value == "other" else value)
        assert (file() != first) == decides
    finally:
        jax.config.update(name, before)
    assert file() == first


def test_what_a_kernel_closes_over_has_no_value():
    """It may be an argument of what the kernel is in, whose trace spells it."""
    inner = jax.make_jaxpr(lambda x: x + jnp.arange(3))(1)
    found: list[int] = []

    @jax.jit
    def outer(x: jax.Array) -> jax.Array:
        for held in (inner.consts, [x] * len(inner.consts)):
            found.append(len(list(executables._constants(type(inner)(inner.jaxpr, held)))))
        return x

    outer(jnp.arange(3))
    assert found == [len(inner.consts), 0]


def test_old_programs_are_forgotten(folder):
    import os

    old = folder / "old.program"
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    executables.Programs(make_mesh(), keep=True)("add", adding(np.ones(3, np.float32)), np.zeros(3, np.float32))
    executables._threads().submit(lambda: None).result()
    assert not old.exists() and len(list(folder.iterdir())) == 1
