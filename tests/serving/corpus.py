"""Requests that will not do: (name, path, raw body, status, what the message must hold)."""

from __future__ import annotations

import json

import byte_model


def _form(**fields) -> bytes:
    return json.dumps({"prompt": "x", "max_tokens": 4} | fields).encode()


def _chat(content: object = "x", **fields) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 4} | fields).encode()


def _turn(**message) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}, message], "max_tokens": 4}).encode()


def _many_turns(count: int) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": ""}] * count}).encode()


COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TOOL = {"type": "function", "function": {"name": "f"}}

CORPUS: list[tuple[str, str, bytes, int, str]] = [
    ("not JSON", COMPLETIONS, b"{", 400, "the body is not JSON: Expecting property name enclosed in double quotes at character 1None"),
    ("no body", COMPLETIONS, b"", 400, ""),
    ("a list", COMPLETIONS, b"[]", 400, ""),
    ("null", GENERATE, b"null", 400, ""),
    ("bad UTF-8", COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400, ""),
    ("half a surrogate pair", COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "prompt"),
    ("half a surrogate pair in a stop text", COMPLETIONS, b'{"prompt": "x", "stop": "\\udfff"}', 400, "stop"),
    ("half a surrogate pair in a message", CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "content"),
    (
        "half a surrogate pair in a part",
        CHAT,
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]}',
        400,
        "",
    ),
    ("half a surrogate pair as a model", COMPLETIONS, b'{"prompt": "x", "model": "\\ud800"}', 400, "model"),
    ("half a surrogate pair as salt", COMPLETIONS, b'{"prompt": "x", "cache_salt": "\\ud800"}', 400, "cache_salt"),
    ("half a surrogate pair as a strategy", COMPLETIONS, b'{"prompt": "x", "strategy": "\\ud800"}', 400, "strategy"),
    ("half a surrogate pair to tokenise", "/tokenize", b'{"prompt": "\\ud800"}', 400, "prompt"),
    ("half a surrogate pair to abort", "/abort", b'{"request_id": "\\ud800"}', 400, "request_id"),
    ("half a surrogate pair in a name", COMPLETIONS, b'{"prompt": "x", "a\\ud800": 1}', 400, ""),
    ("deep JSON", COMPLETIONS, b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, ""),
    ("deep objects", CHAT, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, ""),
    ("NaN", COMPLETIONS, b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
    ("infinity", COMPLETIONS, b'{"prompt": "x", "top_p": -Infinity}', 400, "top_p"),
    ("1e308 tokens", COMPLETIONS, b'{"prompt": "x", "max_tokens": 1e308}', 400, "max_tokens"),
    ("1e400", COMPLETIONS, b'{"prompt": "x", "temperature": 1e400}', 400, "temperature"),
    ("1e308", COMPLETIONS, b'{"prompt": "x", "temperature": 1e308}', 400, "temperature"),
    ("ten thousand digits", COMPLETIONS, b'{"prompt": "x", "max_tokens": ' + b"9" * 10_000 + b"}", 400, ""),
    ("a huge seed", COMPLETIONS, _form(seed=10**30), 400, "seed"),
    ("a negative temperature", COMPLETIONS, _form(temperature=-1), 400, "temperature"),
    ("no tokens", COMPLETIONS, _form(max_tokens=0), 400, "max_tokens"),
    ("a number as text", COMPLETIONS, _form(max_tokens="4"), 400, "max_tokens"),
    ("true as a number", COMPLETIONS, _form(max_tokens=True), 400, "max_tokens"),
    ("no steps", COMPLETIONS, _form(max_nfe=0), 400, "max_nfe"),
    ("an empty prompt", COMPLETIONS, _form(prompt=""), 400, "prompt"),
    ("no prompt tokens", COMPLETIONS, _form(prompt=[]), 400, "prompt"),
    ("an empty prompt among others", COMPLETIONS, _form(prompt=["x", ""]), 400, "prompt"),
    ("a huge id", COMPLETIONS, _form(prompt=[2**40]), 400, "prompt"),
    ("a negative id", COMPLETIONS, _form(prompt=[-1]), 400, "prompt"),
    ("an id outside the vocabulary", COMPLETIONS, _form(prompt=[5000]), 400, "outside the vocabulary"),
    ("a prompt that is too long", COMPLETIONS, _form(prompt="x" * 200), 400, "max_model_len=128prompt"),
    ("a chat that is too long", CHAT, _chat("x" * 200), 400, "max_model_len=128messages"),
    ("more tokens than there is room", COMPLETIONS, _form(max_tokens=10_000), 400, "max_model_len=128max_tokens"),
    ("more tokens than a chat leaves room for", CHAT, _chat(max_tokens=10_000), 400, "max_model_len=128max_tokens"),
    ("more tokens by their newer name", CHAT, _chat(max_completion_tokens=10_000, max_tokens=None), 400, "=128max_completion_tokens"),
    ("a million outputs", COMPLETIONS, _form(n=1_000_000), 400, "n"),
    ("an unknown field", COMPLETIONS, _form(surprise=1), 400, "'surprise'"),
    ("an unsupported field", COMPLETIONS, _form(echo=True), 400, "echo"),
    ("alternatives", COMPLETIONS, _form(logprobs=3), 400, "alternatives to the chosen tokens are not supported; logprobs may be 0"),
    ("a negative number of alternatives", COMPLETIONS, _form(logprobs=-1), 400, "logprobs may be 0"),
    ("the best of several", COMPLETIONS, _form(best_of=3, n=2), 400, "best_of: choosing among more outputs"),
    ("text after the answer", COMPLETIONS, _form(suffix="!"), 400, "suffix: text after the answer is not supported"),
    ("a penalty", COMPLETIONS, _form(presence_penalty=0.5), 400, "presence_penalty: penalties are not supported"),
    ("a penalty that is a word", COMPLETIONS, _form(frequency_penalty=False), 400, "frequency_penalty"),
    ("min_p", COMPLETIONS, _form(min_p=0.1), 400, "min_p is not supported"),
    ("a seed of 65 bits", COMPLETIONS, _form(seed=2**64), 400, "seed"),
    ("a seed of less than 64 bits below 0", COMPLETIONS, _form(seed=-(2**63) - 1), 400, "seed"),
    ("another top_k", COMPLETIONS, _form(top_k=-2), 400, "top_k"),
    ("a million bad ids", COMPLETIONS, _form(prompt=[[]] * 1_000_000), 400, "prompt.0"),
    ("a million unknown fields", COMPLETIONS, _form(**{f"f{i}": 1 for i in range(200_000)}), 400, "an object of 200002 fields"),
    ("offsets without end", COMPLETIONS, _form(pinned={str(i): -1 for i in range(200_000)}), 400, "at most 65536 offsets"),
    ("more prompts than there is room", COMPLETIONS, _form(prompt=["x"] * 1000), 400, "1000 outputs"),
    ("a text no prompt can hold", COMPLETIONS, _form(prompt="x" * 3_900_000), 400, "has 3900000 characters, which max_model_len=128"),
    ("a prompt in a list in a list", COMPLETIONS, _form(prompt=[["x"]]), 400, "a prompt is a text or a list of token ids"),
    ("several prompts for a route of one", GENERATE, _form(prompt=["x"]), 400, "a prompt is a text or a list of token ids"),
    (
        "more messages than tokens",
        CHAT,
        json.dumps({"messages": [{"role": "user", "content": ""}] * 90_000}).encode(),
        400,
        "90000 messages",
    ),
    ("more ids than an output has", "/detokenize", json.dumps({"tokens": [5] * 1_000_000}).encode(), 400, "tokens has 1000000 ids"),
    ("reasoning by another name", CHAT, _chat(enable_thinking=True), 400, "enable_thinking: these models do not reason"),
    ("ids no prompt can hold", COMPLETIONS, _form(prompt=[5] * 1_000_000), 400, "prompt has 1000000 tokens"),
    ("a text no prompt can hold to tokenise", "/tokenize", json.dumps({"prompt": "x" * 3_900_000}).encode(), 400, "3900000 characters"),
    ("a chat no prompt can hold", CHAT, _chat("x" * 3_900_000), 400, "messages has 3900000 characters"),
    ("a bias", COMPLETIONS, _form(logit_bias={"5": 1.0}), 400, "logit_bias"),
    ("usage without a stream", COMPLETIONS, _form(stream_options={"include_usage": True}), 400, "stream_options"),
    ("patches without a stream", COMPLETIONS, _form(diffusion={"provisional": True}), 400, "diffusion.provisional"),
    ("an empty stop text", COMPLETIONS, _form(stop=""), 400, "stop"),
    ("a hundred stop texts", COMPLETIONS, _form(stop=["x"] * 100), 400, "stop"),
    ("too many stop tokens", COMPLETIONS, _form(stop_token_ids=list(range(50))), 400, "stop_token_ids"),
    ("a pinned mask", COMPLETIONS, _form(pinned={"0": byte_model.MASK}), 400, "pinned"),
    ("a pinned nowhere", COMPLETIONS, _form(pinned={"-1": 5}), 400, "pinned"),
    ("another model", COMPLETIONS, _form(model="gpt-4"), 404, "gpt-4"),
    ("no messages", CHAT, b'{"messages": []}', 400, "messages"),
    ("an unknown role", CHAT, b'{"messages": [{"role": "wizard", "content": "x"}]}', 400, "messages.0.role"),
    ("a picture", CHAT, _chat([{"type": "text", "text": "x"}, IMAGE]), 400, "images are not supported; send textmessages.0.content.1"),
    ("sound", CHAT, _chat([{"type": "input_audio", "input_audio": {}}]), 400, "sounds are not supported"),
    ("a part of an unknown type", CHAT, _chat([{"type": "smell"}]), 400, "parts of type 'smell' are not supported"),
    ("a part of no type", CHAT, _chat([{"text": "x"}]), 400, "messages.0.content.0.type"),
    ("a part without its text", CHAT, _chat([{"type": "text"}]), 400, "the field text is missing"),
    ("content of no kind", CHAT, _chat({"text": "x"}), 400, "messages.0.content: Input should be a valid string"),
    ("no content", CHAT, _chat(None), 400, "a message of role 'user' needs content"),
    ("a tool's answer", CHAT, _turn(role="tool", content="4", tool_call_id="1"), 400, "role 'tool' are not supported"),
    ("calls of tools", CHAT, _turn(role="assistant", content=None, tool_calls=[TOOL]), 400, "messages.1.tool_calls"),
    ("tools", CHAT, _chat(tools=[TOOL]), 400, "tools: tool calls are not supportedtools"),
    ("tools that must be called", CHAT, _chat(tools=[TOOL], tool_choice="required"), 400, "tool"),
    ("functions", CHAT, _chat(functions=[{"name": "f"}]), 400, "functions: function calls are not supported"),
    ("a spoken answer", CHAT, _chat(modalities=["text", "audio"]), 400, "modalities: answers are text only"),
    ("a voice", CHAT, _chat(audio={"voice": "alloy", "format": "wav"}), 400, "audio"),
    ("a JSON schema", CHAT, _chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}), 400, "JSON mode and schemas"),
    ("reasoning", CHAT, _chat(reasoning_effort="high"), 400, "reasoning_effort: these models do not reason"),
    ("a stored answer", CHAT, _chat(store=True), 400, "store: answers are not stored"),
    ("a service tier", CHAT, _chat(service_tier="priority"), 400, "service_tier"),
    ("a prediction", CHAT, _chat(prediction={"type": "content", "content": "x"}), 400, "'prediction'"),
    ("alternatives in a chat", CHAT, _chat(logprobs=True, top_logprobs=2), 400, "top_logprobs: alternatives"),
    ("arguments of the template", CHAT, _chat(chat_template_kwargs={"enable_thinking": True}), 400, "chat_template_kwargs"),
    ("a repetition penalty", CHAT, _chat(repetition_penalty=1.1), 400, "repetition_penalty: penalties are not supported"),
    (
        "two limits",
        CHAT,
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "max_completion_tokens": 3}',
        400,
        "max_tokens",
    ),
    (
        "another format",
        CHAT,
        b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}',
        400,
        "format",
    ),
    ("an unknown mode", GENERATE, _form(stream=True, stream_mode="fast"), 400, "stream_mode"),
    ("a body of 10 MB", GENERATE, b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413, "4194304 bytes"),
    ("nothing to tokenise", "/tokenize", b"{}", 400, "prompt"),
    ("an id that is none", "/detokenize", b'{"tokens": [1048576]}', 400, "outside the vocabulary"),
    ("a request that is not there", "/abort", b'{"request_id": "nobody"}', 404, "nobody"),
    ("no such route", "/v1/embeddings", b"{}", 404, ""),
]
