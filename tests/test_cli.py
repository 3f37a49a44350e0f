"""The command line: every setting has an option, ``--json`` prints one object, wrong input ends in one line."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import pathlib

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


def run(*args: str, stdin: bytes | None = None):
    return CliRunner().invoke(cli.app, args, input=stdin)


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
    "str | None": (["other"], "other"),
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
    names |= {"weights": "int8", "kv": "fp8", "adapter": "folder", "adapters": "math=one,code=two"}
    wanted = {name: 5 for name, default in settings.items() if type(default) in (int, type(None))} | names
    arguments = [part for name, value in wanted.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    wanted |= {name: not default for name, default in settings.items() if type(default) is bool}
    assert wanted.keys() == settings.keys()
    flags = {name: default for name, default in settings.items() if type(default) is bool}
    arguments += [f"--{'no-' * default}{name.replace('_', '-')}" for name, default in flags.items()]
    assert run("generate", "--prompt-ids", "5, 6", *arguments).exit_code == 0
    assert asked["model"] == "embedded"
    assert asked["engine"] == wanted | elsewhere | chosen | {"adapters": {"math": "one", "code": "two"}}
    assert asked["prompts"] == asked["warmed_up"] == [[5, 6]]
    for name, value in (("cache", "dual"), ("sub_block_cache", "8")):
        refused = run("generate", "--prompt-ids", "5", f"--{name.replace('_', '-')}", value)
        assert refused.exit_code == 2 and f"error: {name}=" in refused.output and "is not for this model" in refused.output


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ("math", "'math' is not NAME=DIR,..."),
        ("math=", "'math=' is not NAME=DIR,..."),
        ("math=a,math=b", "'math=a,math=b' says 'math' twice"),
        ("served=a", "error: --adapters: 'served' is what clients call the model itself; choose another name"),
    ],
)
def test_adapters_that_cannot_be_told_apart_are_refused(adapters, message):
    result = run("serve", "--served-model-name", "served", "--adapters", adapters)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


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


@pytest.mark.sweep
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


@pytest.mark.sweep
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
