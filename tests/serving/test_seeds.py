"""Randomness over HTTP: fresh without a seed, told, and the same again with one."""

from __future__ import annotations

import concurrent.futures
import time

import pytest
from running import frames

from diffulex_jax import Engine, SamplingParams


ASKED = {"prompt": "What is 12 + 30?", "max_tokens": 24, "temperature": 2.0, "ignore_eos": True}


def test_without_a_seed_every_answer_is_drawn_anew(server):
    alone = [server.post("/generate", **ASKED).json() for _ in range(3)]
    assert len({tuple(one["token_ids"]) for one in alone}) == len({one["seed"] for one in alone}) == 3
    together = server.post("/v1/completions", **ASKED | {"prompt": [ASKED["prompt"]] * 2, "n": 2}).json()["choices"]
    assert len({choice["text"] for choice in together}) == len({choice["seed"] for choice in together}) == 4


@pytest.mark.sweep_but("None")
@pytest.mark.parametrize("seed", [None, 7, 2**64 - 1, -2])
def test_the_seed_that_is_told_gives_the_answer_again_alone_in_a_batch_and_offline(server, model, seed):
    first, second = server.post("/generate", **ASKED, seed=seed, n=2).json()["outputs"]
    if seed is not None:
        assert first["seed"] == seed % 2**64
    with concurrent.futures.ThreadPoolExecutor() as pool:  # in a batch with others
        others = [pool.submit(server.post, "/generate", **ASKED) for _ in range(4)]
        again = [pool.submit(server.post, "/v1/completions", **ASKED, seed=one["seed"]) for one in (first, second)]
        assert [answer.result().json()["choices"][0]["text"] for answer in again] == [first["text"], second["text"]]
        assert {other.result().status_code for other in others} == {200}
    engine = Engine.from_pretrained(str(model), block_size=8, max_model_len=128, max_slots=4)
    settings = {name: value for name, value in ASKED.items() if name != "prompt"}
    params = [SamplingParams(**settings, seed=one["seed"]) for one in (first, second)]
    outputs = engine.generate([ASKED["prompt"]] * 2, params)
    assert [output.token_ids for output in outputs] == [first["token_ids"], second["token_ids"]]
    assert first["token_ids"] != second["token_ids"]


def test_neighbouring_seeds_share_no_output(server):
    texts = [choice["text"] for seed in (5, 6, 7) for choice in server.post("/v1/completions", **ASKED, seed=seed, n=3).json()["choices"]]
    assert len(set(texts)) == 9


def test_seeds_are_in_streams_and_in_the_log(server):
    with server.client.stream("POST", "/v1/completions", json=ASKED | {"stream": True, "n": 2}) as response:
        id_ = response.headers["x-request-id"]
        choices = [chunk["choices"][0] for _, chunk in frames(response)]
    told = {choice["index"]: choice["seed"] for choice in choices if choice["finish_reason"]}
    deadline = time.monotonic() + 5
    while not (lines := [line for line in server.log if line.get("request_id") == id_]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lines[0]["seeds"] == [told[0], told[1]]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_times_come_with_each_answer_that_asks(server, path, stream):
    form = ASKED | {"stream": stream, "diffusion": {"timings": True}, "messages": [{"role": "user", "content": "x"}]}
    del form["messages" if path == "/v1/completions" else "prompt"]
    if stream:
        with server.client.stream("POST", path, json=form) as response:
            choice = [chunk["choices"][0] for _, chunk in frames(response)][-1]
    else:
        choice = server.post(path, **form).json()["choices"][0]
    timings = choice["timings"]
    assert 0 < timings["first_block_seconds"] <= timings["seconds"] and timings["queue_seconds"] >= 0
    assert 0 < timings["tokens_per_forward"] <= 8
    assert "timings" not in server.post(path, **form | {"stream": False, "diffusion": {}}).json()["choices"][0]
    record = server.post("/generate", **ASKED).json()
    assert record.keys() >= {"queue_seconds", "first_block_seconds", "seconds", "tokens_per_forward", "seed"}
