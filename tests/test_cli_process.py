"""The command line in a process of its own: what a shell, a terminal and Ctrl-C do to it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import termios
import time

import jax
import pytest

import diffulex_jax
from diffulex_jax import SamplingParams
from diffulex_jax.engine.config import EngineConfig


MODEL = str(pathlib.Path(__file__).parent / "golden" / "tiny-llada2-trained")
SMALL = ["--block-size", "8", "--max-model-len", "64"]
ROOT = pathlib.Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'diffulex-jax'; from diffulex_jax.cli import main; main()"]


def start(*args: str, **settings) -> subprocess.Popen:
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | settings.pop("env", {})
    return subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **settings)


def test_an_argument_that_is_no_utf_8_is_one_line():
    """As a shell passes it: Python makes half a surrogate pair of the byte."""
    process = start("generate", b"caf\xe9")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: an argument is not UTF-8: byte 0xe9")


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["generate", "--help"],
        ["trace", "--help"],
        ["serve", "--help"],
        ["convert", "--help"],
        ["plan", "--help"],
        ["bench", "decode", "--help"],
        ["eval", "--help"],
    ],
)
def test_help_is_whole_and_comes_at_once(args):
    """In a second of processor time, so that a busy machine does not matter, and without what takes seconds to import."""
    timed = COMMAND[-1].replace("main()", "\ntry: main()\nfinally: print(__import__('time').process_time(), *sys.modules, file=sys.stderr)")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run([*COMMAND[:-1], timed, *args], capture_output=True, text=True, env=environment, timeout=60)
    seconds, *modules = done.stderr.split()
    assert float(seconds) < 1
    assert not {"jax", "transformers", "tokenizers", "fastapi", "rich"} & set(modules)
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    if args == ["generate", "--help"]:
        for field in (*dataclasses.fields(SamplingParams), *dataclasses.fields(EngineConfig)):
            assert field.name in ("max_slots", "warm_up") or f"--{field.name.replace('_', '-')} " in done.stdout
        titles = [line for line in done.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
        assert titles == ["Arguments:", "Options:", "The request:", "Decoding:", "The engine:"]
    if args == ["plan", "--help"]:
        assert "diffulex-jax[tpu]" in done.stdout


def test_usage_errors_come_at_once():
    timed = COMMAND[-1].replace("main()", "\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)")
    done = subprocess.run([*COMMAND[:-1], timed, "generate", "--temprature", "1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "No such option: --temprature" in done.stderr and "--temperature" in done.stderr
    assert not {"jax", "transformers"} & set(done.stderr.split())


def test_importing_the_package_imports_no_jax():
    code = (
        "import sys, diffulex_jax, diffulex_jax.engine.config, diffulex_jax.sampling_params; print('jax' in sys.modules, dir(diffulex_jax))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.stdout.startswith("False"), done.stderr
    assert "'Engine'" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = diffulex_jax.Engin


@pytest.mark.sweep_but("2.5")
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5, 5.0, 8.0])
def test_ctrl_c_ends_at_once_with_130_at_any_moment(seconds, tmp_path):
    """While importing, loading, compiling and decoding: nothing is cached here. Destroying XLA while its threads compile would crash."""
    cold = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "DIFFULEX_JAX_CACHE": "off"}
    process = start("generate", "--max-tokens", "200", "--ignore-eos", *["What is 1 + 2?"] * 200, env=cold)
    time.sleep(seconds)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


def on_a_terminal(*args: str, env: dict[str, str], seconds: float = 90) -> tuple[int, str, str]:
    """Exit code, stdout, and what a terminal shows on stderr."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    process = subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # at its end
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    out, _ = process.communicate(timeout=seconds)
    return process.returncode, out, shown.decode()


@pytest.mark.sweep
def test_what_takes_long_is_shown_on_a_terminal(tmp_path):
    args = ["generate", "--model", MODEL, "--prompt-ids", "5", "--max-tokens", "4", "--json", *SMALL]
    code, out, shown = on_a_terminal(*args, env={"JAX_COMPILATION_CACHE_DIR": str(tmp_path)})
    assert code == 0, shown
    assert "compiling llada2 00:0" in shown
    assert len(json.loads(out)["token_ids"]) <= 4
    assert shown.endswith("\r")  # the line is gone before the answer


@pytest.mark.sweep_but("command0")
@pytest.mark.parametrize(
    "command", [["doctor"], ["generate", "--model", MODEL, "--prompt-ids", "5"], ["bench", "decode", "--shape", "tiny"]]
)
def test_a_device_that_is_not_there_is_one_line(command):
    process = start(*command, env={"JAX_PLATFORMS": "rocm"})
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: Unable to initialize backend 'rocm'")
    assert "Traceback" not in err


def test_an_answer_that_the_terminal_cannot_show_is_spelled_out():
    show = "import typer; from diffulex_jax.cli import surroundings; surroundings.prepare(); typer.echo('\\U0001f600')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "\\U0001f600\n", done.stderr


@pytest.mark.sweep
def test_libraries_are_quiet(tmp_path):
    """Where no TPU is, libtpu need not be asked; and nobody says that torch is missing."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "TRANSFORMERS_VERBOSITY")}
    process = subprocess.run(
        [*COMMAND, "generate", "--max-tokens", "4", "--chat", "--max-model-len", "64", "--prompt", "1 + 1"],
        env=environment | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (process.returncode, process.stderr) == (0, "")
