"""The command line: every setting has an option, ``--json`` prints one object, wrong input ends in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import inspect
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
import numpy as np
import pytest
from typer.testing import CliRunner

import diffulex_jax
from diffulex_jax import Output, SamplingParams, cli
from diffulex_jax.async_serving import AsyncEngine
from diffulex_jax.bench import decode
from diffulex_jax.bench.shapes import SHAPES, shape_model
from diffulex_jax.cli import options
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.models.base import leaves
from diffulex_jax.planning.plan import plan
from diffulex_jax.strategies import STRATEGIES
from diffulex_jax.weights import checkpoint
from diffulex_jax.weights.checkpoint import EMBEDDED


MODEL = str(pathlib.Path(__file__).parent / "golden" / "tiny-llada2-trained")
SMALL = ["--block-size", "8", "--max-model-len", "64"]
ANSWER = Output(
    text="four",
    token_ids=[7, 8, 9, 10],
    finish_reason="stop",
    nfe=2,
    revised_tokens=1,
    remasked_tokens=3,
    prompt_token_ids=[1, 2],
    seconds=0.5,
    queue_seconds=0.0,
    first_block_seconds=0.25,
    seed=7,
)


ROOT = pathlib.Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'diffulex-jax'; from diffulex_jax.cli import main; main()"]


def run(*args: str, stdin: bytes | None = None):
    return CliRunner().invoke(cli.app, args, input=stdin)


def start(*args: str, **settings) -> subprocess.Popen:
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | settings.pop("env", {})
    return subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **settings)


@pytest.fixture
def asked(monkeypatch):
    """Replaces the engine by one that notes what it was asked and answers ``ANSWER``."""
    seen = {}

    class Engine:
        @classmethod
        def from_pretrained(cls, model, **settings):
            seen.update(model=model, engine=settings)
            return cls()

        def warm_up(self, prompts, params):
            seen.update(warmed_up=prompts)

        def generate(self, prompts, params):
            seen.update(prompts=prompts, params=params)
            return [ANSWER] * (params.n * len(prompts))

    monkeypatch.setattr("diffulex_jax.engine.engine.Engine", Engine)
    monkeypatch.setattr("diffulex_jax.engine.admission.check", lambda *args, **named: None)  # settings need not fit each other
    return seen


# Types of settings -> arguments after the flag, and the value they mean.
ARGUMENTS = {
    "bool": ([], True),
    "str": (["other"], "other"),
    "float": (["0.625"], 0.625),
    "float | None": (["0.625"], 0.625),
    "int": (["3"], 3),
    "int | None": (["3"], 3),
    "tuple[int, ...]": (["3"], (3,)),
    "tuple[str, ...]": (["so, then"], ("so, then",)),
    "Mapping[int, int] | None": (["0:7,5:8"], {0: 7, 5: 8}),
}


@pytest.mark.parametrize("field", dataclasses.fields(SamplingParams), ids=lambda field: field.name)
def test_every_sampling_setting_is_an_option(asked, field):
    arguments, value = ARGUMENTS[field.type]
    assert value != field.default
    result = run("generate", "--prompt", "hi", f"--{field.name.replace('_', '-')}", *arguments)
    assert result.exit_code == 0, result.output
    assert asked["params"] == SamplingParams(**{field.name: value})


def test_settings_of_several_values_are_given_several_times(asked):
    assert run("generate", "--prompt", "hi", "--stop", "a", "--stop", "b", "--stop-token-ids", "1", "--stop-token-ids", "2").exit_code == 0
    assert (asked["params"].stop, asked["params"].stop_token_ids) == (("a", "b"), (1, 2))


def test_every_engine_setting_is_an_option(asked):
    """But for those that follow from the prompts: how many there are, and what they need compiled."""
    chosen = {"max_slots": 1, "warm_up": False}
    settings = {"strategy": "llada2", "mesh": None} | {f.name: f.default for f in dataclasses.fields(EngineConfig) if f.name not in chosen}
    elsewhere = {name: settings.pop(name) for name in ("cache", "sub_block_cache")}  # of other models, and refused for this one
    names = {"strategy": "dmax", "dtype": "bfloat16", "kernels": "reference", "attention": "prefix_full", "mesh": "tensor=1"}
    names |= {"weights": "int8", "kv": "fp8"}
    wanted = {name: 5 for name, default in settings.items() if type(default) in (int, type(None))} | names
    arguments = [part for name, value in wanted.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    wanted |= {name: not default for name, default in settings.items() if type(default) is bool}
    assert wanted.keys() == settings.keys()
    flags = {name: default for name, default in settings.items() if type(default) is bool}
    arguments += [f"--{'no-' * default}{name.replace('_', '-')}" for name, default in flags.items()]
    assert run("generate", "--prompt-ids", "5, 6", *arguments).exit_code == 0
    assert asked["model"] == "embedded"
    assert asked["engine"] == wanted | elsewhere | chosen
    assert asked["prompts"] == asked["warmed_up"] == [[5, 6]]
    for name, value in (("cache", "dual"), ("sub_block_cache", "8")):
        refused = run("generate", "--prompt-ids", "5", f"--{name.replace('_', '-')}", value)
        assert refused.exit_code == 2 and f"error: {name}=" in refused.output and "is not for this model" in refused.output


def test_prompts_come_from_arguments_options_files_and_standard_input(asked, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbffrom a file\n\n")
    result = run("generate", "one", "-", "--prompt", "two", "--prompt-file", str(tmp_path / "prompt.txt"), "--json", stdin=b"piped\r\n")
    assert result.exit_code == 0, result.output
    assert asked["prompts"] == ["one", "piped", "two", "from a file\n"]
    assert len(json.loads(result.stdout)["outputs"]) == 4
    assert run("generate", stdin="caf\xe9".encode()).exit_code == 0
    assert asked["prompts"] == ["caf\xe9"]
    assert run("generate", "--prompt-ids", "1,2", "--prompt-ids", "3").exit_code == 0
    assert asked["prompts"] == [[1, 2], [3]]


def test_standard_input_that_is_no_utf_8_is_one_line():
    result = run("generate", stdin=b"caf\xe9")
    assert (result.exit_code, result.stderr) == (2, "error: standard input is not UTF-8: byte 0xe9 at offset 3\n")


def test_an_argument_that_is_no_utf_8_is_one_line():
    """As a shell passes it: Python makes half a surrogate pair of the byte."""
    process = start("generate", b"caf\xe9")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: an argument is not UTF-8: byte 0xe9")


def test_chat_goes_through_the_chat_template(asked):
    assert run("generate", "--chat", "--prompt", "hi").exit_code == 0
    assert asked["prompts"] == [Tokenizer(EMBEDDED).apply_chat_template([{"role": "user", "content": "hi"}])]


def test_json_is_one_object_with_the_fields_of_the_output(asked):
    expected = dataclasses.asdict(ANSWER) | {"tokens_per_forward": 2.0}
    del expected["trace"]
    assert json.loads(run("generate", "--prompt", "hi", "--json").stdout) == expected
    assert json.loads(run("generate", "--prompt", "hi", "--n", "2", "--json").stdout) == {"outputs": [expected, expected]}


def test_readable_output_names_tokens_forwards_and_edits(asked):
    lines = run("generate", "--prompt", "hi").stdout.splitlines()
    assert lines[0] == "four"
    figures = {name.strip(): value for name, _, value in (line.strip().partition("  ") for line in lines[2:])}
    assert figures["tokens"] == "4 (stop)"
    assert figures["forwards"] == "2"
    assert figures["tokens per forward"] == "2.00"
    assert figures["edits"] == "1"
    assert figures["seed"] == str(ANSWER.seed)
    assert figures["seconds"].startswith("0.50")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", MODEL], "no prompt: give it as an argument"),
        (["--model", MODEL, "--prompt", "a", "--prompt-ids", "1"], "as text or as --prompt-ids, not both"),
        (["--model", MODEL, "--prompt-ids", "1", "--chat"], "--chat takes prompts as text"),
        (["--model", MODEL, "--prompt", ""], "--prompt is empty"),
        (["--model", MODEL, "--prompt", "a"], "holds none; give --prompt-ids"),
        (["--model", MODEL, "--prompt", "a", "--chat"], "holds none; give --prompt-ids"),
        (["--model", MODEL, "--prompt-ids", "1", "--max-model-len", "99999"], "max_model_len=99999"),
        (["--model", MODEL, "--prompt-ids", "1", "--max-tokens", "4000"], "exceeds max_model_len=2048"),
        (["--model", MODEL, "--prompt-ids", "1", "--num-pages", "1", "--max-tokens", "99"], "needs 4 pages"),
        (["--model", MODEL, "--prompt-ids", "1", "--prompt-ids", "5000"], "prompt 1 holds token id 5000"),
        (["--model", MODEL, "--prompt-ids", "1", "--stop", "x"], "needs a tokenizer"),
        (["--model", MODEL, "--prompt-ids", "1", "--pinned", "0:1021"], "pinned[0]=1021"),
        (["--model", MODEL, "--prompt-file", "/no/such/file"], "/no/such/file"),
        (["caf\udce9"], "not UTF-8: byte 0xe9"),
        (["--prompt", "caf\udce9"], "not UTF-8: byte 0xe9"),
        (["--prompt", "a", "--stop", "caf\udce9"], "not UTF-8: byte 0xe9"),
        (["--model", MODEL, "--prompt-ids", "1,x"], "got '1,x'"),
        (["--model", MODEL, "--prompt-ids", "1", "--temperature", "-1"], "temperature=-1.0"),
        (["--model", MODEL, "--prompt-ids", "1", "--top-p", "nan"], "top_p=nan"),
        (["--model", MODEL, "--prompt-ids", "1", "--strategy", "nope"], "unknown strategy 'nope'"),
        (["--model", MODEL, "--prompt-ids", "1", "--dtype", "int8"], "dtype='int8'"),
        (["--model", MODEL, "--prompt-ids", "1", "--mesh", "tensor=two"], "'tensor=two' is not AXIS=DEVICES"),
        (["--model", "/no/such/model", "--prompt-ids", "1"], "'/no/such/model'"),
        (["--model", str(pathlib.Path(MODEL).parent), "--prompt-ids", "1"], "no config.json"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(args, message, monkeypatch):
    """And is known before a weight is read."""
    monkeypatch.setattr(checkpoint, "load", lambda *args, **settings: pytest.fail("loads"))
    result = run("generate", *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_generate_decodes(engine_of):
    """Prompt errors of the engine, and a real answer, through one and the same model."""
    result = run("generate", "--model", MODEL, "--prompt-ids", "216,206,72", "--max-tokens", "12", "--ignore-eos", "--json", *SMALL)
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    (expected,) = engine_of("tiny-llada2-trained", block_size=8, max_model_len=64, max_slots=1).generate(
        [[216, 206, 72]], SamplingParams(max_tokens=12, ignore_eos=True)
    )
    assert (printed["token_ids"], printed["nfe"]) == (expected.token_ids, expected.nfe)
    assert len(printed["token_ids"]) == 12
    assert printed["prompt_token_ids"] == [216, 206, 72]


def test_the_embedded_model_answers_a_chat():
    result = run("generate", "--chat", "--prompt", decode.QUESTIONS[1], "--max-model-len", "256", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["text"].endswith("So the answer is 57.")
    assert printed["finish_reason"] == "stop"
    assert printed["tokens_per_forward"] > 2


def test_bench_decode_measures_speed():
    args = ["--shape", "tiny", "--strategy", "llada2", "--max-tokens", "16", "--prompt-tokens", "8", "--repeats", "2"]
    result = run("bench", "decode", *args, "--json", *SMALL)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    shapes = leaves(shape_model("tiny").schema).values()
    assert report["parameters"] == sum(int(np.prod(param.shape)) for param in shapes)
    assert report["longest_prompt"] == 8
    figures = report["strategies"].pop("llada2")
    assert not report["strategies"]
    # Random weights are never sure of anything: one token a forward.
    assert (figures["tokens"], figures["nfe"], figures["tokens_per_forward"]) == (16, 16, 1.0)
    assert 0 < figures["ms_per_step_median"] <= figures["ms_per_step_p90"]
    assert figures["outside_model_share"] < 1
    assert "llada2" in decode.table(report | {"strategies": {"llada2": figures}})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "exactly one of a model and a shape"),
        (["--shape", "huge"], "unknown shape 'huge'"),
        (["--shape", "tiny", "--strategy", "nope"], "unknown strategy 'nope'"),
        (["--shape", "tiny", "--dtype", "float31"], "'float31'"),
    ],
)
def test_bench_errors_are_one_line(args, message):
    result = run("bench", "decode", *args)
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert message in result.stderr


def test_shape_of_the_cpu_figures_has_131_7_million_parameters():
    shapes = leaves(shape_model("cpu-131m").schema).values()
    assert round(sum(int(np.prod(param.shape)) for param in shapes) / 1e6, 1) == 131.7


def test_random_prompts_hold_neither_mask_nor_eos():
    spec = dataclasses.replace(shape_model("tiny").spec, vocab_size=4, mask_id=2, eos_ids=(0,))
    assert set(sum(decode.random_prompts(spec, count=3, tokens=50), [])) == {1, 3}


def test_doctor_says_what_jax_sees():
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["platform"] == "cpu"
    assert [device["id"] for device in facts["devices"]] == [device.id for device in jax.devices()]
    named = {"block_attention": "reference", "grouped_matmul": "cpu", "remask": "reference", "token_merge": "reference"}
    assert named.items() <= facts["kernels"].items()
    assert jax.__version__ in run("doctor").stdout


def test_doctor_says_which_kernels_a_model_runs_with():
    facts = json.loads(
        run("doctor", "--model", str(pathlib.Path(MODEL).parent / "families/tiny-dream"), "--max-model-len", "256", "--json").stdout
    )["model"]
    assert (facts["strategy"], facts["dtype"], facts["block_size"]) == ("dream", "float32", 512)
    assert facts["kernels"]["prediction"] == {"chosen": "reference", "runs": "plain XLA"}
    assert facts["kernels"]["grouped_matmul"] == {"chosen": "cpu", "runs": None}
    refused = run("doctor", "--dtype", "bfloat16")
    assert refused.exit_code == 2 and "say nothing without --model" in refused.stderr


def test_the_installed_command_is_this_one():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="diffulex-jax")
    assert entry.load() is cli.main


@pytest.mark.parametrize(
    "args",
    [["--help"], ["generate", "--help"], ["serve", "--help"], ["convert", "--help"], ["plan", "--help"], ["bench", "decode", "--help"]],
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


def test_names_in_help_are_those_there_are():
    """Help is printed without importing what takes JAX, so it has lists of its own."""
    assert options.STRATEGY_NAMES == tuple(STRATEGIES)
    assert options.SHAPE_NAMES == tuple(SHAPES)


@pytest.mark.parametrize(("command", "source"), [("serve", AsyncEngine.from_pretrained), ("plan", plan)], ids=["serve", "plan"])
def test_options_written_by_hand_have_the_defaults_of_what_they_set(command, source):
    (found,) = (c.callback for c in cli.app.registered_commands if (c.name or c.callback.__name__) == command)
    own, theirs = inspect.signature(found).parameters, inspect.signature(source).parameters
    shared = [name for name in own if name in theirs and theirs[name].default is not inspect.Parameter.empty]
    named = (
        {"silence_seconds", "tick_seconds"} if command == "serve" else {"slots", "max_len", "mesh", "dtype", "weights", "kv", "strategy"}
    )
    assert named <= set(shared)
    for name in named:
        assert own[name].default == theirs[name].default, name


def test_the_version_is_that_of_the_project():
    assert diffulex_jax.__version__ == importlib.metadata.version("diffulex-jax")
    assert run("--version").stdout == f"diffulex-jax {diffulex_jax.__version__}\n"
    assert f"\nversion: {diffulex_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


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


def test_what_takes_long_is_shown_on_a_terminal(tmp_path):
    args = ["generate", "--model", MODEL, "--prompt-ids", "5", "--max-tokens", "4", "--json", *SMALL]
    code, out, shown = on_a_terminal(*args, env={"JAX_COMPILATION_CACHE_DIR": str(tmp_path)})
    assert code == 0, shown
    assert "compiling llada2 00:0" in shown
    assert len(json.loads(out)["token_ids"]) <= 4
    assert shown.endswith("\r")  # the line is gone before the answer


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
