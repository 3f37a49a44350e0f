"""Errors, limits and the routes of our own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import re
import threading
import time

import byte_model
import httpx
import pytest
from corpus import CORPUS
from prometheus_client.parser import text_string_to_metric_families
from running import SMALL, frames, serving

from diffulex_jax import SamplingParams
from diffulex_jax.async_serving.http.openai_requests import Chat, Completion
from diffulex_jax.async_serving.http.requests import Generate


TYPES = {400: "invalid_request_error", 404: "not_found_error", 413: "invalid_request_error", 405: "invalid_request_error"}
LONG = {"max_tokens": 100, "ignore_eos": True}
KEY = {"authorization": "Bearer first"}


def check_error(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(("path", "body", "status", "says"), [case[1:] for case in CORPUS], ids=[case[0] for case in CORPUS])
def test_a_bad_request_is_told_why(server, path, body, status, says):
    response = server.client.post(path, content=body, headers={"content-type": "application/json"})
    error = check_error(response, status)
    assert error["type"] == TYPES[status]
    assert says in error["message"] + str(error["param"])
    assert response.elapsed.total_seconds() < 5


def test_a_good_request_beside_bad_ones_is_unaffected(server):
    alone = server.post("/generate", prompt="good", **LONG).json()["token_ids"]
    beside: list[list[int]] = []

    def good():
        with httpx.Client(base_url=server.url, timeout=60) as client:
            beside.extend(client.post("/generate", json={"prompt": "good"} | LONG).json()["token_ids"] for _ in range(5))

    thread = threading.Thread(target=good)
    thread.start()
    while thread.is_alive():
        for _, path, body, status, _ in CORPUS:
            assert server.client.post(path, content=body, headers={"content-type": "application/json"}).status_code == status
    assert beside == [alone] * 5


def test_a_form_that_is_not_json_is_told_what_is_wanted(server):
    response = server.client.post("/generate", data={"prompt": "x"})
    assert "content-type: application/json" in check_error(response, 400)["message"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_json_in_every_encoding_that_json_may_have(server, encoding):
    body = json.dumps({"prompt": "héllo", "max_tokens": None, "stop": [], "n": None}, ensure_ascii=False).encode(encoding)
    answer = server.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.json()["usage"]["prompt_tokens"] == 6


def test_usage_of_a_stream_of_several_prompts_and_outputs_is_counted_once(server):
    form = {"prompt": ["a", "bc"], "n": 2, "max_tokens": 4, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    with server.client.stream("POST", "/v1/completions", json=form) as response:
        chunks = [data for _, data in frames(response)]
    (usage,) = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 16)


def test_a_wrong_method_is_an_error_too(server):
    assert check_error(server.client.get("/generate"), 405)["message"] == "/generate takes POST, not GET"


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/metrics", "/version", "/server_info", "/openapi.json"])
def test_a_head_is_a_get_without_its_body(server, path):
    asked, whole = server.client.head(path), server.client.get(path)
    assert (asked.status_code, asked.content, asked.headers["content-type"]) == (200, b"", whole.headers["content-type"])
    if path != "/metrics":
        assert asked.headers["content-length"] == str(len(whole.content))


def test_a_slash_at_the_end_means_nothing(server, model):
    for path in ("/health/", "/v1/models/", f"/v1/models/{model}/"):
        assert server.client.get(path).status_code == 200
    forms = {"/v1/completions/": {"prompt": "x"}, "/v1/chat/completions/": {"messages": [{"role": "user", "content": "x"}]}}
    for path, form in (forms | {"/generate/": {"prompt": "x"}}).items():
        assert server.post(path, **form, max_tokens=2).status_code == 200
    assert server.client.head("/v1/completions/").status_code == 405
    assert server.post("/v1//completions", prompt="x", max_tokens=2).status_code == 200


def test_refusing_texts_that_are_too_long_holds_nobody_up(server):
    form = json.dumps({"prompt": "x" * 3_900_000}).encode()

    def post(path):
        return httpx.post(server.url + path, content=form, headers={"content-type": "application/json"}, timeout=60)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        refusals = [pool.submit(post, path) for path in ("/v1/completions", "/tokenize", "/generate") * 3]
        beside = [server.client.get("/health").elapsed.total_seconds() for _ in range(20)]
        assert {refusal.result().status_code for refusal in refusals} == {400}
    assert max(refusal.result().elapsed.total_seconds() for refusal in refusals) < 5 and sorted(beside)[10] < 0.5


@pytest.mark.parametrize(
    ("path", "says"),
    [("/v1/responses", "use /v1/chat/completions"), ("/v1/embeddings", "embeddings are not supported"), ("/v2/chat", "/v1/completions")],
)
def test_what_is_not_there_is_named(server, path, says):
    message = check_error(server.post(path, input="x"), 404)["message"]
    assert path in message and says in message


def test_generate_answers_with_what_the_engine_made(server):
    answer = server.post("/generate", prompt=list(b"hello"), logprobs=True, return_step_map=True, **LONG).json()
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == len(answer["step_map"]) == 100
    assert answer["finish_reason"] == "length" and answer["finished"] is True and answer["prompt_tokens"] == 5
    assert answer["tokens_per_forward"] == 100 / answer["nfe"]
    assert answer["token_ids"] == server.post("/generate", prompt="hello", **LONG).json()["token_ids"]
    several = server.post("/generate", prompt="hello", n=3, temperature=1.0, max_tokens=8).json()["outputs"]
    assert [o["index"] for o in several] == [0, 1, 2]


def test_block_append_streams_text_as_it_becomes_final(server):
    whole = server.post("/generate", prompt="hello", **LONG).json()
    with server.client.stream(
        "POST", "/generate", json={"prompt": "hello", "stream": True, "stream_mode": "block_append"} | LONG
    ) as response:
        *parts, last = [data for _, data in frames(response)]
    assert {p["event"] for p in parts} == {"append"} and last["event"] == "final"
    assert "".join(p["text"] for p in parts) == last["text"] == whole["text"]
    assert sum((p["token_ids"] for p in parts), []) == last["token_ids"] == whole["token_ids"]
    assert [p["token_offset"] for p in parts] == [sum(len(q["token_ids"]) for q in parts[:i]) for i in range(len(parts))]


def test_denoise_streams_every_step(server):
    with server.client.stream("POST", "/generate", json={"prompt": "hello", "stream": True} | LONG) as response:
        *steps, last = [data for _, data in frames(response)]
    assert {s["event"] for s in steps} == {"buffer_snapshot"}
    assert [s["nfe"] for s in steps] == list(range(1, last["nfe"] + 1))
    cells: list[int | None] = [None] * 200
    for s in steps:
        assert s["absolute_start"] == s["token_offset"] + 5 and s["absolute_end"] - s["absolute_start"] == len(s["token_ids"])
        assert [t is None for t in s["tokens"]] == [t is None for t in s["token_ids"]]
        assert cells[: s["committed"]] == last["token_ids"][: s["committed"]]
        cells[s["token_offset"] : s["token_offset"] + len(s["token_ids"])] = s["token_ids"]
    assert cells[:100] == last["token_ids"]
    assert None in steps[0]["token_ids"] and 0 < steps[-1]["committed"] < 100


def test_tokens_and_text(server):
    tokens = server.post("/tokenize", prompt="héllo 😀").json()
    assert (tokens["tokens"], tokens["count"], tokens["max_model_len"]) == (list("héllo 😀".encode()), 11, 128)
    assert server.post("/detokenize", tokens=tokens["tokens"]).json() == {
        "prompt": "héllo 😀",
        "parts": [{"text": "héllo 😀", "special": False}],
    }
    chat = server.post("/tokenize", messages=[{"role": "user", "content": "hi"}]).json()["tokens"]
    assert bytes(chat) == b"user: hi\nassistant: "


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_can_be_aborted_by_its_id(server, stream):
    answers = []

    def ask():
        with httpx.Client(base_url=server.url, timeout=60) as client:
            form = {"prompt": "x", "max_tokens": 120, "ignore_eos": True, "stream": stream, "n": 8}
            with client.stream("POST", "/v1/completions", json=form, headers={"x-request-id": "mine"}) as response:
                answers.append((response.status_code, response.read().decode(), response.headers["x-request-id"]))

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 10
    while server.post("/abort", request_id="mine").status_code == 404 and time.monotonic() < deadline:
        pass
    thread.join(10)
    ((status, text, id_),) = answers
    assert id_ == "mine" and '"code":499' in text.replace(" ", "")
    assert status == (200 if stream else 499)


def test_request_ids_go_in_and_out(server):
    assert server.client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = server.client.get("/health", headers={"x-request-id": "no spaces"}).headers["x-request-id"]
    assert len(made) == 32
    answer = server.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers={"x-request-id": "abc-2"})
    assert answer.headers["x-request-id"] == "abc-2" and "abc-2" not in answer.text
    time.sleep(0.2)
    (line,) = [line for line in server.log if line.get("request_id") == "abc-2"]
    assert (line["path"], line["status"], line["method"], line["level"]) == ("/v1/completions", 200, "POST", "info")
    assert answer.json()["id"] == f"cmpl-{line['id']}"


def test_requests_of_the_same_client_id_are_served_and_aborted_each_for_itself(server):
    asked = [{"prompt": "x", "stream": True, "n": 2} | LONG, {"prompt": "y", "stream": True} | LONG]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=60)) for _ in asked]
        streams = [
            stack.enter_context(client.stream("POST", "/generate", json=form, headers={"x-request-id": "the-same"}))
            for client, form in zip(clients, asked, strict=True)
        ]
        lines = [stream.iter_lines() for stream in streams]
        ids = [json.loads(next(line).removeprefix("data: "))["id"] for line in lines]
        assert ids[0] != ids[1] and "the-same" not in ids
        assert server.post("/abort", request_id=ids[0]).json() == {"aborted": ids[0]}
        assert any('"code":499' in line for line in lines[0]) and not any('"code":499' in line for line in lines[1])


def test_the_docs_load_nothing_and_explain_every_field(server):
    answer, schemas = server.client.get("/docs"), server.client.get("/openapi.json").json()["components"]["schemas"]
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.findall(r"<script|src=|@import|url\(|href=.(?!#|openapi)", answer.text)
    for form in ("Chat", "Completion", "Generate", "Tokenize"):
        assert f'<h2 id="{form}">' in answer.text
        assert all(f"<code>{field}</code>" in answer.text for field in schemas[form]["properties"])
    assert "softmax(logits / temperature)" in schemas["Chat"]["properties"]["temperature"]["description"]
    assert "POST /v1/chat/completions" in answer.text and server.client.get("/redoc").status_code == 404


def test_what_the_server_says_of_itself(server, model):
    assert server.client.get("/health").json()["status"] == server.client.get("/ready").json()["status"] == "ready"
    info = server.client.get("/server_info").json()
    assert info["engine"]["block_size"] == 8 and info["model"] == str(model) and info["server"]["max_queue"] == 256
    assert server.client.get("/version").json() == {"version": info["version"]}


def test_metrics(server):
    before = {name: server.metric(name) for name in ("generation_tokens_total", "denoise_steps_total", "prompt_tokens_total")}
    answer = server.post("/v1/completions", prompt="abc", max_tokens=24, ignore_eos=True, diffusion={"usage": True}).json()["usage"]
    after = {name: server.metric(name) - value for name, value in before.items()}
    nfe = answer["completion_tokens_details"]["nfe"]
    assert after == {"generation_tokens_total": 24, "denoise_steps_total": nfe, "prompt_tokens_total": 3}
    families = {f.name: f for f in text_string_to_metric_families(server.client.get("/metrics").text)}
    for name in ("num_requests_running", "kv_cache_usage_perc", "request_success", "time_to_first_block_seconds", "tokens_per_forward"):
        assert f"diffulex:{name}" in families
    assert server.metric("recompiles_total") == server.metric("kv_pages_used") == 0
    assert server.metric("engine_up") == 1


def test_a_server_that_may_not_write_profiles_says_how_it_could(server):
    for path in ("/start_profile", "/stop_profile"):
        answer = server.client.post(path)
        assert answer.status_code == 400 and "--profile-directory" in answer.json()["error"]["message"]


@pytest.fixture
def strict(server_of):
    """A server with keys, CORS, no queue, and little patience with silence."""
    options = {"--cors-origin": "https://example.org", "--max-queue": "0", "--ping-seconds": "0.001"}
    return server_of("--api-key", "first", "--api-key", "second", *itertools.chain(*options.items()))


def test_keys_guard_everything_but_health(strict):
    server = strict
    for path in ("/health", "/ready"):
        assert server.client.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/version", "/server_info", "/docs", "/openapi.json", "/nothing"):
        assert check_error(server.client.get(path), 401)["type"] == "authentication_error"
    for key, status in (("first", 200), ("second", 200), ("third", 401), ("firs", 401), ("fïrst", 401)):
        given = {"authorization": b"Bearer " + key.encode()}
        assert server.client.get("/v1/models", headers=given).status_code == status
    assert "first" not in server.client.get("/server_info", headers={"authorization": "Bearer first"}).text
    check_error(server.post("/generate", prompt="x"), 401)
    # A browser asks before it sends the key.
    asked = {"origin": "https://example.org", "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = server.client.options("/v1/completions", headers=asked)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://example.org")
    assert server.client.options("/v1/completions", headers=asked | {"origin": "https://else.example"}).status_code == 400


def test_a_full_server_says_so_at_once(strict):
    with httpx.Client(base_url=strict.url, timeout=60, headers=KEY) as client, httpx.Client(base_url=strict.url, headers=KEY) as other:
        filling = {"prompt": "x", "stream": True, "n": 4} | LONG
        with client.stream("POST", "/v1/completions", json=filling) as response:
            lines = response.iter_lines()
            next(lines)
            refused = other.post("/v1/completions", json={"prompt": "y"})
            assert check_error(refused, 429)["type"] == "rate_limit_error" and refused.headers["retry-after"] == "1"
            assert other.get("/health").status_code == 200
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert client.post("/v1/completions", json={"prompt": "y"}).status_code == 200
        assert "room for 4" in check_error(client.post("/v1/completions", json={"prompt": "y", "n": 5}), 400)["message"]


def test_time_runs_out(server_of):
    server = server_of("--request-seconds", "0.05", "--body-seconds", "0.2")
    check_error(server.post("/v1/completions", prompt="x", max_tokens=120, n=40), 504)
    with server.client.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 120, "n": 40, "stream": True}) as response:
        if response.status_code == 200:  # it was accepted in time
            assert frames(response)[-1][1]["error"]["code"] == 504
        else:
            assert response.status_code == 504

    def slowly():
        yield b'{"prompt":'
        time.sleep(1)
        yield b'"x"}'

    check_error(server.client.post("/generate", content=slowly()), 408)
    assert server.metric("num_requests_in_flight") == 0


def test_a_silent_stream_gets_comments(strict):
    form = {"prompt": "x", "stream": True, "n": 4, "max_tokens": 120, "ignore_eos": True}
    with strict.client.stream("POST", "/v1/completions", json=form, headers=KEY) as response:
        lines = list(response.iter_lines())
    assert ": ping" in lines and lines[-2:] == ["data: [DONE]", ""]


def test_a_model_without_a_tokenizer_serves_token_ids(compiled):
    with serving(byte_model.GOLDEN / "tiny-llada2-trained", *SMALL, "--isolation", "thread", cache=compiled) as server:
        answer = server.post("/generate", prompt=[5, 6], max_tokens=8, ignore_eos=True).json()
        assert len(answer["token_ids"]) == 8 and answer["text"] is None
        assert "no tokenizer" in check_error(server.post("/generate", prompt="x"), 400)["message"]
        assert "no tokenizer" in check_error(server.post("/v1/completions", prompt=[5]), 400)["message"]
        with server.client.stream(
            "POST", "/generate", json={"prompt": [5, 6], "max_tokens": 8, "ignore_eos": True, "stream": True}
        ) as response:
            assert frames(response)[-1][1]["token_ids"] == answer["token_ids"]


def test_every_setting_of_a_request_is_a_field():
    settings = {field.name for field in dataclasses.fields(SamplingParams)} - {"adapter_name"}  # which is chosen by "model"
    assert settings == Generate.model_fields.keys() - {"model", "prompt", "strategy", "stream", "stream_mode"}
    for form in (Completion, Chat):
        assert settings - {"return_step_map"} <= form.model_fields.keys()
