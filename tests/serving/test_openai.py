"""OpenAI's own client against the server, and the exact shapes it relies on."""

from __future__ import annotations

import asyncio
import time

import openai
import pytest
from running import frames


QUESTION = [{"role": "user", "content": "hello, 你好"}]
LONG = {"max_tokens": 64, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client


def test_the_model_is_listed(client, model):
    (card,) = client.models.list().data
    assert card.id == str(model)
    assert client.models.retrieve(str(model)).owned_by == "diffulex-jax"


def test_a_completion(client, model):
    answer = client.completions.create(model=str(model), prompt="hello", **LONG)
    (choice,) = answer.choices
    assert choice.text and choice.finish_reason == "length" and choice.index == 0
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 64, 69)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")


def test_several_prompts_and_outputs_are_numbered_through(client, model):
    settings = {"max_tokens": 12, "temperature": 1.0, "seed": 3}
    together = client.completions.create(model=str(model), prompt=["one", "three"], n=2, **settings)
    alone = [client.completions.create(model=str(model), prompt=p, n=2, **settings).choices for p in ("one", "three")]
    assert [c.index for c in together.choices] == [0, 1, 2, 3]
    assert [c.text for c in together.choices] == [c.text for choices in alone for c in choices]
    assert len({c.text for c in together.choices}) == 4


def test_token_ids_are_a_prompt_too(client, model):
    by_text = client.completions.create(model=str(model), prompt="abc", max_tokens=8)
    by_ids = client.completions.create(model=str(model), prompt=[97, 98, 99], max_tokens=8)
    assert by_text.choices[0].text == by_ids.choices[0].text


@pytest.mark.parametrize("prompt", ["hello", "hello again, 你好"])
def test_a_streamed_completion_is_the_whole_one(client, model, prompt):
    whole = client.completions.create(model=str(model), prompt=prompt, **LONG)
    chunks = list(client.completions.create(model=str(model), prompt=prompt, stream=True, stream_options={"include_usage": True}, **LONG))
    *parts, usage = chunks
    assert "".join(c.choices[0].text for c in parts) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in parts] == [None] * (len(parts) - 1) + ["length"]
    assert len(parts) > 3
    assert usage.choices == [] and usage.usage == whole.usage


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason(client, model):
    whole = client.chat.completions.create(model=str(model), messages=QUESTION, **LONG)
    assert whole.choices[0].message.role == "assistant"
    first, *parts, last = client.chat.completions.create(model=str(model), messages=QUESTION, stream=True, **LONG)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert all(p.choices[0].delta.role is None for p in parts)
    assert "".join(p.choices[0].delta.content for p in parts) == whole.choices[0].message.content
    assert last.choices[0].finish_reason == "length" and last.choices[0].delta.content is None
    assert first.object == "chat.completion.chunk" and len({c.id for c in (first, *parts, last)}) == 1


def test_a_chat_fills_the_room_there_is_by_default(client, model):
    answer = client.chat.completions.create(model=str(model), messages=QUESTION, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 128
    answer = client.chat.completions.create(model=str(model), messages=QUESTION, max_completion_tokens=7, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 7


def test_stop_texts_end_streams_and_answers_alike(client, model):
    pinned = {"pinned": {str(i): token for i, token in enumerate(b"one two STOP three")}, "ignore_eos": True}
    settings = {"model": str(model), "prompt": "x", "max_tokens": 40, "stop": ["never", " STOP"], "extra_body": pinned}
    whole = client.completions.create(**settings)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("one two", "stop")
    assert "".join(c.choices[0].text for c in client.completions.create(stream=True, **settings)) == "one two"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(client, model, stream):
    settings = {"model": str(model), "messages": QUESTION, "max_tokens": 20, "logprobs": True, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**settings).choices[0].logprobs.content
    assert len(whole) == 20 and all(t.logprob <= 0 for t in whole)
    if stream:
        chunks = client.chat.completions.create(stream=True, **settings)
        parts = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        assert [t.token for t in parts] == [t.token for t in whole]
        assert [t.logprob for t in parts] == pytest.approx([t.logprob for t in whole], abs=1e-5)


def test_log_probabilities_of_a_completion(client, model):
    logprobs = client.completions.create(model=str(model), prompt="x", max_tokens=6, logprobs=0).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert logprobs.text_offset[0] == 0


SPLIT = "é😀b".encode()  # the tiny model's first ids are bytes


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_pieces_of_characters_have_the_pieces_bytes(client, model, stream):
    pinned = {str(i): byte for i, byte in enumerate(SPLIT)}
    settings = {"model": str(model), "max_tokens": len(SPLIT), "stream": stream, "extra_body": {"pinned": pinned, "ignore_eos": True}}
    answer = client.chat.completions.create(messages=QUESTION, logprobs=True, **settings)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in told] == ["", "é", "", "", "", "😀", "b"]
    assert [bytes(token.bytes) for token in told] == [bytes([byte]) for byte in SPLIT]
    answer = client.completions.create(prompt="x", logprobs=0, **settings)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    told = [choice.logprobs for choice in choices if choice.logprobs]
    assert [offset for part in told for offset in part.text_offset] == [0, 0, 1, 1, 1, 1, 2]
    assert "".join(token for part in told for token in part.tokens) == "é😀b" == "".join(choice.text for choice in choices)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_no_character_of_a_text_ends_a_line_of_a_stream(server, path):
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj\nk\r\nl\x7fm"
    pinned = {str(i): token for i, token in enumerate(text.encode())}
    form = {"max_tokens": len(pinned), "pinned": pinned, "stream": True, "ignore_eos": True}
    form |= {"prompt": "x", "stream_mode": "block_append"} if path == "/generate" else {"messages": QUESTION}
    with server.client.stream("POST", path, json=form) as response:
        records = [data for _, data in frames(response)]  # iter_lines() splits as str.splitlines() does
    parts = [r["choices"][0]["delta"].get("content", "") if "choices" in r else r["text"] * (r["event"] == "append") for r in records]
    assert "".join(parts) == text


def test_diffusion_extras_come_only_when_asked_for(client, server, model):
    plain = client.chat.completions.create(model=str(model), messages=QUESTION, max_tokens=20)
    assert plain.usage.completion_tokens_details is None and not hasattr(plain.choices[0], "step_map")
    extras = {"diffusion": {"usage": True, "step_map": True}, "ignore_eos": True}
    answer = client.chat.completions.create(model=str(model), messages=QUESTION, max_tokens=20, extra_body=extras)
    details = answer.usage.completion_tokens_details
    assert details.tokens_per_forward == 20 / details.nfe and details.revised_tokens == details.remasked_tokens == 0
    assert len(answer.choices[0].step_map) == 20
    form = {"messages": QUESTION, "max_tokens": 20, "stream": True, "ignore_eos": True}
    with server.client.stream("POST", "/v1/chat/completions", json=form) as response:
        assert {name for name, _ in frames(response)} == {""}
    with server.client.stream("POST", "/v1/chat/completions", json=form | {"diffusion": {"provisional": True}}) as response:
        named = frames(response)
    steps = [data for name, data in named if name == "diffusion"]
    assert len(steps) == details.nfe and {s["event"] for s in steps} == {"buffer_snapshot"}


def test_chunks_are_padded_where_that_is_asked_for(client, server, model):
    form = {"messages": QUESTION, "max_tokens": 40, "stream": True, "ignore_eos": True}
    with server.client.stream("POST", "/v1/chat/completions", json=form | {"stream_options": {"include_obfuscation": True}}) as response:
        padded = [line for line in response.read().decode().split("\n\n") if "obfuscation" in line]
    base = len('data: ,"obfuscation":""') - len("data: ")
    assert len(padded) > 3 and {(len(line.encode()) + len("\n\n") - base) % 256 for line in padded} == {0}
    with server.client.stream("POST", "/v1/chat/completions", json=form) as response:
        assert "obfuscation" not in response.read().decode()


def test_errors_are_openai_errors(client, model):
    with pytest.raises(openai.NotFoundError, match="'nope' does not exist") as caught:
        client.completions.create(model="nope", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens=1000 that exceeds max_model_len=128"):
        client.completions.create(model=str(model), prompt="x", max_tokens=1000)


def test_many_at_once(server, model):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=30) as client:

            async def one(i):
                stream = await client.completions.create(model=str(model), prompt=f"number {i}", stream=True, max_tokens=16)
                return "".join([c.choices[0].text async for c in stream])

            async def whole(i):
                return (await client.completions.create(model=str(model), prompt=f"number {i}", max_tokens=16)).choices[0].text

            return await asyncio.gather(*map(one, range(12))), await asyncio.gather(*map(whole, range(12)))

    streamed, answered = asyncio.run(run())
    assert streamed == answered


def test_closing_a_stream_aborts_it(server, client, model):
    stream = client.completions.create(model=str(model), prompt="x", stream=True, max_tokens=120, extra_body={"ignore_eos": True})
    next(stream)
    stream.close()
    deadline = time.monotonic() + 2
    while server.metric("kv_pages_used") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("kv_pages_used") == server.metric("num_requests_in_flight") == 0
