"""One cache of compiled programs, where it is said to be, unless JAX has been told of another."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import zlib

import pytest


ROOT = pathlib.Path(__file__).parent.parent
LOOK = """
import json, jax
from diffulex_jax import compile_cache
folder = compile_cache.enable()
again = compile_cache.enable()
print(json.dumps([str(folder), str(again), jax.config.jax_compilation_cache_dir]))
"""
MODEL = str(ROOT / "tests" / "golden" / "tiny-llada2-trained")


def look(code: str = LOOK, **variables: str):
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "DIFFULEX_JAX_CACHE", "XDG_CACHE_HOME")}
    environment = kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.sweep_but("variables1-{tmp}/x/diffulex-jax/compiled", "variables2-{tmp}/moved")
@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HOME": "{tmp}"}, "{tmp}/.cache/diffulex-jax/compiled"),
        ({"XDG_CACHE_HOME": "{tmp}/x"}, "{tmp}/x/diffulex-jax/compiled"),
        ({"XDG_CACHE_HOME": "{tmp}/x", "DIFFULEX_JAX_CACHE": "{tmp}/moved"}, "{tmp}/moved"),
        ({"HOME": "{tmp}", "DIFFULEX_JAX_CACHE": "~/moved"}, "{tmp}/moved"),
    ],
)
def test_the_cache_is_where_it_is_said_to_be(tmp_path, variables, place):
    (folder, again, told), _ = look(**{name: value.format(tmp=tmp_path) for name, value in variables.items()})
    assert folder == again == told
    assert pathlib.Path(folder).parent == pathlib.Path(place.format(tmp=tmp_path))
    assert pathlib.Path(folder).is_dir()


@pytest.mark.sweep_but("OFF")
@pytest.mark.parametrize("off", ["off", "OFF", ""])
def test_it_can_be_turned_off(tmp_path, off):
    assert look(HOME=str(tmp_path), DIFFULEX_JAX_CACHE=off)[0] == ["None", "None", None]
    assert not list(tmp_path.iterdir())


def test_what_jax_was_told_stays(tmp_path):
    theirs = str(tmp_path / "theirs")
    variables = {"JAX_COMPILATION_CACHE_DIR": theirs, "HOME": str(tmp_path), "DIFFULEX_JAX_CACHE": str(tmp_path / "ours")}
    assert look(**variables)[0] == ["None", "None", theirs]


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    (folder, _, told), noise = look(DIFFULEX_JAX_CACHE=str(tmp_path / "file"))
    assert (folder, told) == ("None", None)
    assert "compiled programs are not kept" in noise and "DIFFULEX_JAX_CACHE" in noise


def test_a_second_engine_compiles_nothing(tmp_path):
    """Another process, and a program that has compiled before it builds an engine."""
    code = f"""
import json, jax, jax.monitoring
seen = dict(hits=0, misses=0)
jax.jit(lambda x: x + 1)(1)
def note(event, **_):
    for name in seen:
        seen[name] += event == f"/jax/compilation_cache/cache_{{name}}"
jax.monitoring.register_event_listener(note)
from diffulex_jax import Engine
Engine.from_pretrained({MODEL!r}, max_slots=1, max_model_len=32, block_size=8)
print(json.dumps(seen))
"""
    first, _ = look(code, DIFFULEX_JAX_CACHE=str(tmp_path))
    second, _ = look(code, DIFFULEX_JAX_CACHE=str(tmp_path))
    assert first["misses"] > 3
    assert second["misses"] == 0 and second["hits"] >= first["misses"]


def test_an_entry_that_was_half_written_is_written_anew(tmp_path):
    """A process was killed while it wrote: the next one is neither told of it for ever, nor compiles for ever."""
    code = "import json, jax; from diffulex_jax import compile_cache; compile_cache.enable(); jax.jit(lambda x: x * 3 + 1)(2); print(0)"
    look(code, DIFFULEX_JAX_CACHE=str(tmp_path))
    (entry,) = tmp_path.glob("*/jit__lambda*-cache")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-20])
    _, noise = look(code, DIFFULEX_JAX_CACHE=str(tmp_path))
    assert "cache" not in noise
    assert len(entry.read_bytes()) > len(whole) - 20
    assert zlib.decompress(entry.read_bytes())
