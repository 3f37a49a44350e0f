"""Programs that are kept on disk ready to run: another process makes nothing anew, and never takes one for another."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compile_cache import MODEL, look

from diffulex_jax.engine import executables
from diffulex_jax.parallel.mesh import make_mesh


ENGINE = f"""
import json, jax, jax.monitoring
lowered = []
def note(event, _seconds, **about):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        lowered.append(about.get("fun_name", ""))
jax.monitoring.register_event_duration_secs_listener(note)
from diffulex_jax import Engine, SamplingParams
engine = Engine.from_pretrained({MODEL!r}, max_slots=1, max_model_len=32, block_size=8)
output = engine.generate([[3, 4, 5, 6, 7, 8, 9, 10, 11]], SamplingParams(max_tokens=8, temperature=0.5, seed=1))[0].token_ids
print(json.dumps([len([name for name in lowered if "traced" in name]), output]))
"""


def test_another_process_makes_no_program_anew_and_mends_one_that_is_broken(tmp_path):
    (first, answer), _ = look(ENGINE, DIFFULEX_JAX_CACHE=str(tmp_path))
    (again, same), _ = look(ENGINE, DIFFULEX_JAX_CACHE=str(tmp_path))
    assert first == 2 and again == 0 and same == answer  # one program denoises, and one prefills
    kept = sorted(tmp_path.rglob("*.program"))
    assert len(kept) == first
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    (mended, same), _ = look(ENGINE, DIFFULEX_JAX_CACHE=str(tmp_path))
    assert mended == 1 and same == answer
    assert look(ENGINE, DIFFULEX_JAX_CACHE=str(tmp_path))[0] == [0, answer]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(executables.compile_cache, "in_use", lambda: tmp_path)
    return tmp_path


def adding(constant: np.ndarray):
    return jax.jit(lambda x: x + jnp.asarray(constant))


def test_programs_that_differ_in_what_they_hold_are_two(folder: pathlib.Path):
    mesh, x = make_mesh(), np.zeros(3, np.float32)
    added = [np.array([1, 2, 3], np.float32), np.array([1, 2, 4], np.float32)]
    for _ in range(2):  # compiled, then read
        for constant in added:
            np.testing.assert_array_equal(executables.Programs(mesh)("add", adding(constant), x), constant)
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


def test_old_programs_are_forgotten(folder):
    import os

    old = folder / "old.program"
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    executables.Programs(make_mesh())("add", adding(np.ones(3, np.float32)), np.zeros(3, np.float32))
    executables._threads().submit(lambda: None).result()
    assert not old.exists() and len(list(folder.iterdir())) == 1
