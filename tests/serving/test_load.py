"""Short forms of what ``make test-soak`` runs at full length."""

from __future__ import annotations

import endurance
import equality
import fuzz
import pressure
import pytest
import storm
import throughput


def test_cut_streams_leave_nothing_behind(server):
    good = {"prompt": "after the storm", "max_tokens": 24, "ignore_eos": True}
    before = server.post("/generate", **good).json()["token_ids"]
    seen = storm.storm(server, clients=20, streams=60, seed=1)
    assert seen["cut"] >= 50 and seen["refused"] == 0 and seen["idle_after"] < 2
    assert server.post("/generate", **good).json()["token_ids"] == before


def test_made_up_requests_never_break_the_server(server):
    seen = fuzz.fuzz(server, examples=12)
    assert len(seen["statuses"]) >= 13
    assert "200" in seen["statuses"]["POST /generate"] and "400" in seen["statuses"]["POST /generate"]
    assert seen["good"] > 1 and seen["good_wrong"] == 0


def test_streams_answers_and_replays_are_equal(server):
    seen = equality.run(server.url, requests=24, seed=7, clients=4)
    assert seen["equal"] == 24 and seen["with multi-byte text"] > 5 and seen["with broken bytes"] > 5


def test_what_is_accepted_finishes_and_the_rest_is_refused(server_of):
    server = server_of("--max-queue", "16")
    seen = pressure.press(server.url, requests=100, form={"prompt": "x", "max_tokens": 24, "ignore_eos": True})
    assert seen["statuses"].keys() == {"200", "429"} and seen["statuses"]["200"] >= 20
    assert seen["complete"] == seen["statuses"]["200"] and seen["retry_after"]


def test_a_while_of_mixed_work(server):
    seen = endurance.endure(server, seconds=4, clients=4, seed=3)
    assert seen["errors"] == [] and seen["recompiles"] == 0
    assert seen["answers"] > 10 and seen["aborts"] > 0


@pytest.mark.sweep
def test_http_gives_the_same_tokens_at_about_the_same_speed(model, compiled):
    # How close is for a quiet machine to say; tests run beside others.
    settings = {"block_size": 8, "max_model_len": 128, "max_slots": 4}
    seen = throughput.compare(str(model), compiled, settings=settings, requests=64, rounds=1)
    assert seen["ratio"] > 0.3
