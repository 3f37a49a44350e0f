"""Clients drive a conversation of two turns unmodified: OpenAI's own, and what others really send, recorded."""

from __future__ import annotations

import json
import pathlib

import openai
import pytest
from running import frames
from sweep import sweep


RECORDED = json.loads((pathlib.Path(__file__).parent / "recorded_clients.json").read_text("utf-8"))


@pytest.fixture
def server(server_of):
    return server_of("--max-model-len", "512")  # bytes are tokens here: a conversation takes hundreds


@pytest.mark.parametrize("client", sweep(RECORDED, but=[name for name in RECORDED if name.startswith(("openai", "litellm"))]))
def test_what_clients_send_is_answered(server, client):
    turns = [len(request["body"]["messages"]) for request in RECORDED[client]]
    assert max(turns) >= 3 and any(request["body"].get("stream") for request in RECORDED[client])
    for request in RECORDED[client]:
        body = request["body"] | {"model": server.client.get("/v1/models").json()["data"][0]["id"]}
        with server.client.stream("POST", request["path"], json=body, headers=request["headers"]) as response:
            assert response.status_code == 200, response.read()
            if not body.get("stream"):
                assert json.loads(response.read())["choices"][0]["message"]["role"] == "assistant"
                continue
            chunks = [data for _, data in frames(response)]
        usage = body.get("stream_options", {}).get("include_usage", False)
        assert (chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] > 0) == usage
        assert chunks[-1 - usage]["choices"][0]["finish_reason"] in ("stop", "length")


def test_openai_python_sends_the_answer_back_as_it_came(server, model):
    with openai.OpenAI(base_url=f"{server.url}/v1/", api_key="unused", max_retries=0, timeout=30) as client:
        messages: list = [{"role": "user", "content": "hello", "name": "Ada"}]
        first = client.chat.completions.create(model=str(model), messages=messages, max_tokens=8)
        messages.append(first.choices[0].message)
        messages.append({"role": "user", "content": [{"type": "text", "text": "and now?"}]})
        second = client.chat.completions.create(model=str(model), messages=messages, max_tokens=8)
        messages[1] = first.choices[0].message.model_dump()  # with every null there is
        assert client.chat.completions.create(model=str(model), messages=messages, max_tokens=8).usage == second.usage
        with client.chat.completions.stream(model=str(model), messages=messages, max_tokens=8) as stream:
            assert stream.get_final_completion().choices[0].message.content == second.choices[0].message.content
