"""``bench e2e``: what it measures, and what it refuses."""

from __future__ import annotations

import json
import pathlib
import sys
import types

import numpy as np
import pytest
from typer.testing import CliRunner

from diffulex_jax import bench
from diffulex_jax.bench import answering, e2e
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


@pytest.mark.sweep
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
    assert ", first block " in outputs and ", between blocks " in outputs


@pytest.mark.sweep
def test_requests_arrive_at_a_rate_and_a_flood_of_prompts_beside_them():
    asked = ["--tokens-per-forward", "8", "--first-token", "31", "--dtype", "float32", "--slots", "4", "--output", "96"]
    result = run(*SMALL[:2], "--requests", "3", "--prompt", "40-70", *asked, "--repeats", "1", "--rate", "20", "--flood", "300", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["rate"], report["flood"]) == (20, 300)
    (figures,) = report["outputs"]
    flood = figures["flood"]
    assert (flood["at_once"], flood["length"]) == (1, 300)
    assert figures["ms_per_step"] is None  # slots stand empty between arrivals
    for given in (figures, flood):
        assert 0 < given["first_block"]["p50"] <= given["first_block"]["p99"]
        assert 0 < given["inter_block"]["p50"] <= given["inter_block"]["p99"]
    assert flood["p99_ratio"] == flood["inter_block"]["p99"] / figures["inter_block"]["p99"]
    assert flood["prompts_per_second"] > 0 and flood["answered"]["p50"] > 0


class Clockwork:
    """An engine on a clock of its own: a step takes a second, which gives every request 8 tokens, once it is through with its prompt:
    100 tokens a step."""

    def __init__(self):
        self.now, self.given, self.discarded = 0.0, [], []
        self.left: dict[int, types.SimpleNamespace] = {}

    @property
    def has_work(self):
        return bool(self.left)

    def add(self, prompt, params):
        self.given.append((self.now, len(prompt), params.max_tokens))
        self.left[len(self.given)] = types.SimpleNamespace(prompt=len(prompt), wanted=params.max_tokens, tokens=[], nfe=0)
        return [len(self.given)]

    def step(self):
        self.now += 1.0
        for request in self.left.values():
            request.prompt -= 100
            if request.prompt <= 0:
                request.tokens += [5] * min(8, request.wanted - len(request.tokens))
                request.nfe += 1
        ended = {id_: request for id_, request in self.left.items() if len(request.tokens) == request.wanted}
        self.left = {id_: request for id_, request in self.left.items() if id_ not in ended}
        return {id_: types.SimpleNamespace(token_ids=request.tokens, nfe=request.nfe) for id_, request in ended.items()}

    def progress(self, id_):
        return self.left[id_]

    def discard(self, id_):
        self.discarded.append(id_)
        del self.left[id_]


@pytest.fixture
def clockwork(monkeypatch):
    engine = Clockwork()
    clock = types.SimpleNamespace(perf_counter=lambda: engine.now, sleep=lambda seconds: setattr(engine, "now", engine.now + seconds))
    monkeypatch.setattr(answering, "time", clock)
    return engine


def test_requests_are_timed_from_when_they_were_due(clockwork):
    found = answering.InProcess(clockwork).answer([[1], [2]], output=16, tokens_per_forward=8, moments=[0.5, 5.25])
    # The first waits for nobody: steps end at 1.5 and 2.5. Nothing is to do until 5.25.
    assert found.came == [[1.0, 2.0], [1.0, 2.0]] and found.seconds == 7.25
    assert (found.first, found.gaps) == ([1.0, 1.0], [1.0, 1.0])
    late = answering.InProcess(clockwork).answer([[1], [2]], output=16, tokens_per_forward=8, moments=[0.0, 0.5])
    assert late.came == [[1.0, 2.0], [1.5, 2.5]]  # due while the engine was busy, and given when it came back
    assert (found.tokens, found.forwards, found.beside) == (32, 4, [])


def test_a_flood_goes_on_until_the_others_are_answered(clockwork):
    flood = answering.Flood(iter([[0] * n for n in (100, 200, 101, 102, 900, 901)]), 2)
    found = answering.InProcess(clockwork).answer([[1]], output=24, tokens_per_forward=8, flood=flood)
    assert clockwork.given == [(0, 1, 24), (0, 100, 1), (0, 200, 1), (1, 101, 1), (2, 102, 1)]
    assert found.came == [[1.0, 2.0, 3.0]] and found.tokens == 24  # of those that were asked for, only
    assert found.beside == [1.0, 2.0, 2.0]
    assert clockwork.discarded == [5] and not clockwork.left  # what was under way when the others were answered


def test_a_ratio_of_what_lies_between_blocks():
    alone = answering.Answers(2.0, 64, None, [[0.5, 1.0], [0.5, 1.0, 1.5]], [])
    beside = answering.Answers(4.0, 64, None, [[0.5, 2.0], [0.5, 1.5, 2.0]], [0.5, 1.5])
    figures = e2e.under_flood(alone, beside, at_once=2, length=4000)
    assert figures["p99_ratio"] == pytest.approx(np.percentile([1.5, 1.0, 0.5], 99) / 0.5)
    assert (figures["prompts_per_second"], figures["tokens_per_second"], figures["answered"]["mean"]) == (0.5, 16.0, 1.0)
    once = answering.Answers(2.0, 64, None, [[0.5], [0.5]], [])
    assert e2e.under_flood(once, once, at_once=2, length=4000)["p99_ratio"] is None


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
        (["--shape", "tiny", "--rate", "0"], "rate=0.0 must be positive"),
        (["--shape", "tiny", "--rate", "inf"], "rate=inf must be positive"),
        (["--shape", "tiny", "--flood", "0", "--requests", "8"], "flood=0 must be positive"),
        (["--shape", "tiny", "--flood", "300"], "flood=300 needs slots of its own: give fewer requests (64) than slots (32)"),
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
        monkeypatch.delattr(bench, module, raising=False)  # what an earlier test imported is found there, too
    monkeypatch.setitem(sys.modules, "httpx", None)
    result = CliRunner().invoke(app, ["bench", *command, "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 2
    assert 'measuring a server needs httpx: pip install "diffulex-jax[serve]"' in result.stderr
