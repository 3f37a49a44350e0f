"""``bench e2e``: what it measures, and what it refuses."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest
from typer.testing import CliRunner

from diffulex_jax.cli import app


SMALL = ["--shape", "tiny", "--slots", "2", "--requests", "3", "--prompt", "40-70", "--output", "32", "--repeats", "1"]


def run(*args):
    return CliRunner().invoke(app, ["bench", "e2e", *args])


def test_it_measures_from_the_prompt_to_the_last_token():
    result = run(*SMALL, "--tokens-per-forward", "1,8", "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert list(report["first_token"]) == ["31", "100", "500", "2000", "4000"]
    assert all(seconds > 0 for seconds in report["first_token"].values())
    assert (report["prompts"]["count"], report["prompts"]["length"]) == (2, 2000)
    assert report["prompts"]["tokens_per_second"] == pytest.approx(4000 / report["prompts"]["seconds"])
    one, eight = report["outputs"]
    assert (one["tokens_per_forward"], eight["tokens_per_forward"]) == (1, 8)
    assert one["nfe"] >= 32 > 8 >= eight["nfe"] >= 4  # prompts end anywhere in a block
    for figures in (one, eight):
        assert figures["ms_per_step"] == pytest.approx(1e3 * figures["seconds"] * 2 / (figures["nfe"] * 3))
        assert figures["tokens_per_second"] == pytest.approx(3 * 32 / figures["seconds"])


def test_a_model_is_measured_behind_what_all_prompts_share():
    folder = str(pathlib.Path(__file__).parent / "golden" / "tiny-llada2")
    asked = ["--tokens-per-forward", "8", "--first-token", "31", "--shared-prefix", "64", "--dtype", "float32"]
    result = run("--model", folder, *SMALL[2:], *asked)
    assert result.exit_code == 0, result.stderr
    head, first, prompts, outputs = result.stdout.strip().splitlines()
    assert head.startswith(f"{folder}, float32, cpu: cpu")
    assert first.startswith("first token: 31 tokens ")
    assert prompts.startswith("prompts: 2 of ")
    assert outputs.startswith("8 a forward: 3 answers in ") and outputs.endswith(" ms a step")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "huge"], "unknown shape 'huge'"),
        (["--shape", "tiny", "--slots", "0"], "slots=0 must be positive"),
        (["--shape", "tiny", "--tokens-per-forward", "4,0"], "tokens_per_forward=0 must be positive"),
        (["--shape", "tiny", "--prompt", "600-400"], "prompt=600-400 must begin with the lesser number"),
        (["--shape", "tiny", "--prompt", "many"], "--prompt must be integers"),
        (["--shape", "tiny", "--strategy", "nope"], "unknown strategy 'nope'"),
        (["--shape", "tiny", "--shared-prefix", "-1"], "shared_prefix=-1 must not be negative"),
        (["--shape", "tiny", "--first-token", "31,0"], "first_token_prompts=0 must be positive"),
        (["--shape", "tiny", "--model", "embedded"], "shape='tiny' is of random weights; there is a model too"),
        (["--url", "http://127.0.0.1:9"], "model must be given: the model's name at http://127.0.0.1:9"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--strategy", "dmax"], "strategy='dmax' is of an engine of this process"),
        (["--shape", "tiny", "--api-key", "x"], "api_key is of a server: give its url, or leave api_key out"),
        (["--url", "http://127.0.0.1:9", "--model", "m"], "no server answers at http://127.0.0.1:9"),
    ],
)
def test_what_will_not_do_is_one_line(args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("command", [["e2e", "--model", "m"], ["serve"]])
def test_a_server_is_not_measured_without_a_client(command, monkeypatch):
    for module in ("client", "serve"):
        monkeypatch.delitem(sys.modules, f"diffulex_jax.bench.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "httpx", None)
    result = CliRunner().invoke(app, ["bench", *command, "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 2
    assert 'measuring a server needs httpx: pip install "diffulex-jax[serve]"' in result.stderr
