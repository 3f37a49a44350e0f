"""What serving must stand, at full length: ``make test-soak``. Every test prints its figures as a line of JSON.

They take about an hour on two cores and want the machine to themselves. ``-k`` picks; short forms are part of ``make test-all``.
"""

from __future__ import annotations

import json
import sys

import endurance
import equality
import faulty
import fuzz
import pressure
import pytest
import shutdown
import storm
import throughput
from running import serving


SMALL = ["--block-size", "8", "--max-model-len", "128", "--max-slots", "8"]
GOOD = {"prompt": "afterwards", "max_tokens": 24, "ignore_eos": True}


def show(name: str, figures: object) -> None:
    sys.__stdout__.write(f"\n{json.dumps({name: figures})}\n")
    sys.__stdout__.flush()


@pytest.mark.parametrize(("isolation", "seeds"), [("process", (1, 2, 3)), ("thread", (4,))])
def test_abort_storm(model, compiled, isolation, seeds):
    with serving(model, *SMALL, "--max-queue", "1000", "--isolation", isolation, cache=compiled) as server:
        right = server.post("/generate", **GOOD).json()["token_ids"]
        storm.storm(server, clients=200, streams=400, seed=0)  # to its working size
        for seed in seeds:
            seen = storm.storm(server, clients=200, streams=2000, seed=seed)
            show(f"abort storm {seed}, {isolation}", seen)
            assert seen["refused"] == 0 and seen["idle_after"] < 2
            assert seen["rss"][1] < 1.02 * seen["rss"][0]
            assert server.post("/generate", **GOOD).json()["token_ids"] == right


def test_malformed_input(model, compiled):
    with serving(model, *SMALL, cache=compiled) as server:
        seen = fuzz.fuzz(server, examples=500)
        show("malformed input", seen)
        assert seen["good_wrong"] == 0 and seen["slowest"] < fuzz.SLOW_SECONDS


def test_faults(model, compiled):
    with serving(model, cache=compiled, command=faulty.COMMAND) as server:
        good = server.post("/generate", **faulty.GOOD).json()["token_ids"]
        trials = [faulty.trial(server, faulty.KINDS[i % len(faulty.KINDS)], good) for i in range(50)]
        worst = {
            kind: {name: max(t[name] for t in trials if t["kind"] == kind) for name in ("answered", "recovery")} for kind in faulty.KINDS
        }
        show("faults", {"trials": len(trials), "worst seconds": worst, "restarts": server.client.get("/health").json()["restarts"]})
    lost = [t for t in trials if t["kind"] in ("step", "kill", "stop")]
    alone = [t for t in trials if t not in lost]
    assert all(t["code"] == 500 and t["others"] == [200] * 4 for t in alone)
    assert all(set(t["others"]) <= {200, 503} and t["answered"] <= 2 and t["recovery"] <= 15 for t in lost)


def test_back_pressure(model, compiled):
    with serving(model, *SMALL, "--max-queue", "56", cache=compiled) as server:  # 64 places with the 8 slots
        pressure.press(server.url, requests=20, form=GOOD)  # to its working speed
        for number in range(3):
            seen = pressure.press(server.url, requests=500, form=GOOD)
            show(f"back-pressure {number}", seen)
            assert seen["statuses"].keys() == {"200", "429"} and seen["statuses"]["200"] >= 64
            assert seen["complete"] == seen["statuses"]["200"] and seen["retry_after"]
            assert seen["refusal_ms"]["p99"] < 50


@pytest.mark.parametrize("drain_seconds", [0, 30])
def test_shutdown(model, compiled, drain_seconds):
    trials = [shutdown.trial(model, compiled, *SMALL, clients=20, drain_seconds=drain_seconds) for _ in range(15)]
    clean = sum(t["code"] == 0 and not t["left"] for t in trials)
    show(f"shutdown, {drain_seconds} s", {"trials": len(trials), "clean": clean, "seconds": sorted(t["seconds"] for t in trials)})
    assert clean == 15
    if drain_seconds:
        assert all(t["ends"] == ["length"] * 20 for t in trials)


def test_endurance(model, compiled):
    with serving(model, *SMALL, cache=compiled) as server:
        endurance.endure(server, seconds=30, clients=8, seed=0)  # to its working size
        seen = endurance.endure(server, seconds=600, clients=8, seed=1)
        show("endurance", seen)
    assert seen["errors"] == [] and seen["recompiles"] == 0
    assert seen["growth_mb_per_10_min"] < 5


@pytest.mark.parametrize("strategy", ["llada2_edit", "dmax"])
def test_equality(model, compiled, strategy):
    with serving(model, *SMALL, "--strategy", strategy, cache=compiled) as server:
        seen = equality.run(server.url, requests=1000, seed=11, clients=8)
        show(f"equality, {strategy}", seen)
    assert seen["equal"] == 1000


def test_throughput(compiled):
    seen = throughput.compare("embedded", compiled, settings={"max_model_len": 256}, requests=256, rounds=3)
    show("throughput", seen)
    assert seen["ratio"] >= 0.9
