"""What clients see when something breaks: an answer at once, and a server that works again."""

from __future__ import annotations

import time

import faulty
import psutil
import pytest
from running import serving, still_alive


@pytest.fixture(scope="module")
def server(model, compiled):
    with serving(model, cache=compiled, command=faulty.COMMAND) as server:
        yield server


@pytest.fixture(scope="module")
def good(server):
    return server.post("/generate", **faulty.GOOD).json()["token_ids"]


@pytest.mark.parametrize("kind", ["tokenizer", "detokenizer", "nan"])
def test_a_request_that_breaks_hurts_nobody_else(server, good, kind):
    seen = faulty.trial(server, kind, good)
    assert (seen["code"], seen["others"]) == (500, [200] * 4)
    assert server.client.get("/health").json()["restarts"] == 0


def test_an_error_nobody_foresaw_has_the_envelope_too(server):
    answer = server.post("/tokenize", prompt=faulty.BOOM)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("kind", ["step", "stop"])
def test_a_lost_engine_fails_all_it_had_and_is_replaced(server, good, kind):
    before = server.client.get("/health").json()["restarts"]
    seen = faulty.trial(server, kind, good)
    assert set(seen["others"]) <= {200, 503} and 503 in seen["others"]
    assert seen["answered"] < 2 + 0.5  # it is looked at every quarter of a second
    assert seen["recovery"] < 30
    assert server.client.get("/health").json()["restarts"] == before + 1


def test_health_says_that_the_engine_is_down(server, good):
    psutil.Process(server.client.get("/server_info").json()["engine"]["pid"]).kill()
    deadline = time.monotonic() + 2
    while (answer := server.client.get("/health")).status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert answer.status_code == 503 and "exit code -9" in answer.json()["error"]["message"]
    assert server.client.get("/ready").status_code == 503
    refused = server.post("/generate", **faulty.GOOD)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    while server.client.get("/health").status_code == 503:
        time.sleep(0.05)
    assert server.post("/generate", **faulty.GOOD).json()["token_ids"] == good


@pytest.mark.sweep
def test_the_engine_does_not_outlive_its_server(server):
    engine = psutil.Process(server.client.get("/server_info").json()["engine"]["pid"])
    server.process.kill()  # the last test: nobody needs it any more
    assert still_alive([engine], 5) == []
