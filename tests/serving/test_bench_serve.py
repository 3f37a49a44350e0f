"""``diffulex-jax bench serve``: the load it makes and the figures it gives."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from diffulex_jax import cli
from diffulex_jax.bench.load import Load, Seen, arrivals, report, spread


def bench(*args: str):
    return CliRunner().invoke(cli.app, ["bench", "serve", *args])


@pytest.mark.parametrize("load", [["--concurrency", "3", "--ramp-seconds", "0.1"], ["--rate", "50", "--ramp-seconds", "0.1"]])
def test_a_load_is_measured_and_drawn(server, tmp_path, load):
    options = ["--requests", "12", "--prompt-tokens", "5", "--max-tokens", "24", "--ignore-eos", "--plot", str(tmp_path / "load.png")]
    result = bench("--url", server.url, *options, *load, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["requests"], figures["succeeded"], figures["errors"], figures["tokens"]) == (12, 12, {}, 12 * 24)
    assert figures["settings"] == {"max_tokens": 24, "ignore_eos": True}
    assert figures["tokens_per_forward"] == figures["tokens"] / figures["nfe"]
    assert figures["goodput"] <= figures["requests_per_second"]
    assert 0 < figures["ttfb"]["p50"] <= figures["e2e"]["p99"]
    assert figures["inter_block"]["mean"] > 0
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_the_readable_form_names_errors(server):
    result = bench("--url", server.url, "--requests", "2", "--prompt", "x", "--max-tokens", "1000")
    assert result.exit_code == 0
    assert "0 of 2" in result.stdout and "'400': 2" in result.stdout


def test_no_server_is_one_line():
    result = bench("--url", "http://127.0.0.1:9")
    assert result.exit_code == 2 and result.stderr.startswith("error: no server of ours at http://127.0.0.1:9")


@pytest.mark.parametrize("args", [["--requests", "0"], ["--rate", "-1"], ["--concurrency", "0"], ["--prompt", "x", "--prompt-tokens", "3"]])
def test_wrong_settings_are_errors(args):
    assert bench(*args).exit_code == 2


def test_goodput_counts_what_kept_both_limits():
    good, late, slow = Seen(0.0, 1.0, 200, [0.1], 10, 2), Seen(0.0, 1.0, 200, [0.9], 10, 2), Seen(0.0, 9.0, 200, [0.1], 10, 2)
    failed = Seen(0.0, 0.1, 429)
    figures = report([good, late, slow, failed], Load(requests=4, ttfb_limit=0.5, e2e_limit=5.0), seconds=2.0)
    assert (figures["goodput"], figures["requests_per_second"], figures["errors"]) == (0.5, 1.5, {"429": 1})
    assert (figures["tokens"], figures["nfe"], figures["tokens_per_forward"], figures["nfe_per_request"]) == (30, 6, 5.0, 2.0)


def test_blocks_are_timed_from_the_request_and_from_each_other():
    seen = Seen(10.0, 13.0, 200, [10.5, 11.0, 13.0])
    assert (seen.ttfb, seen.gaps, seen.e2e) == (0.5, [0.5, 2.0], 3.0)


def test_arrivals_keep_their_rate_and_ramp():
    times = np.array(list(itertools.takewhile(lambda t: t < 110, arrivals(Load(rate=50, ramp_seconds=10)))))
    assert np.all(np.diff(times) >= 0)
    assert np.sum(times > 10) / 100 == pytest.approx(50, rel=0.05)
    assert np.sum(times < 10) == pytest.approx(250, rel=0.2)
    assert np.sum(times < 5) == pytest.approx(62, rel=0.3)


def test_spread():
    assert spread([1.0, 2.0, 3.0]) == {
        "mean": 2.0,
        "p50": 2.0,
        "p90": pytest.approx(2.8),
        "p95": pytest.approx(2.9),
        "p99": pytest.approx(2.98),
    }
    assert spread([]) is None


@pytest.mark.parametrize("rates", [[4, 8], None])
def test_a_server_is_measured_from_the_prompt_to_the_last_token(server, rates):
    """With rates ours says what it took; without, nothing is asked that only ours knows."""
    name = server.client.get("/v1/models").json()["data"][0]["id"]
    asked = [
        "--url",
        server.url,
        "--model",
        name,
        "--slots",
        "2",
        "--requests",
        "3",
        "--prompt",
        "20-30",
        "--output",
        "32",
        "--repeats",
        "1",
    ]
    rate = ",".join(map(str, rates or []))
    result = CliRunner().invoke(
        cli.app, ["bench", "e2e", *asked, "--first-token", "31", "--vocabulary", "50", "--tokens-per-forward", rate, "--json"]
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["first_token"]["31"] > 0 and report["prompts"]["count"] == 2
    assert [figures["tokens_per_forward"] for figures in report["outputs"]] == (rates or [None])
    for figures in report["outputs"]:
        assert figures["tokens_per_second"] == pytest.approx(3 * 32 / figures["seconds"])
        assert 0 < figures["first_block"]["p50"] < figures["seconds"]
        assert (figures["nfe"] is None) == (figures["ms_per_step"] is None) == (rates is None)


def test_a_server_is_measured_at_a_rate_and_beside_a_flood(server):
    name = server.client.get("/v1/models").json()["data"][0]["id"]
    sizes = ["--slots", "4", "--requests", "2", "--prompt", "20-30", "--output", "64", "--first-token", "31", "--repeats", "1"]
    asked = ["--url", server.url, "--model", name, *sizes, "--vocabulary", "50", "--tokens-per-forward", "4", "--rate", "20"]
    result = CliRunner().invoke(cli.app, ["bench", "e2e", *asked, "--flood", "40", "--json"])
    assert result.exit_code == 0, result.stderr
    (figures,) = json.loads(result.stdout)["outputs"]
    flood = figures["flood"]
    assert figures["ms_per_step"] is None and (flood["at_once"], flood["length"]) == (2, 40)
    assert flood["prompts_per_second"] > 0 and flood["answered"]["p50"] > 0
    for given in (figures, flood):
        assert 0 < given["first_block"]["p50"] and 0 < given["inter_block"]["p50"]
    assert flood["p99_ratio"] == flood["inter_block"]["p99"] / figures["inter_block"]["p99"]


def test_what_a_server_says_against_a_flood_is_said(server):
    name = server.client.get("/v1/models").json()["data"][0]["id"]
    sizes = ["--slots", "2", "--requests", "1", "--prompt", "20", "--output", "64", "--first-token", "31", "--repeats", "1"]
    asked = ["--url", server.url, "--model", name, *sizes, "--vocabulary", "50", "--tokens-per-forward", "4"]
    result = CliRunner().invoke(cli.app, ["bench", "e2e", *asked, "--flood", "100000"])
    assert result.exit_code == 2 and f"{server.url} says 400" in result.stderr
