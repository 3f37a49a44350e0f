"""The same request four ways: answered, streamed, streamed with patches, and through OpenAI's route."""

from __future__ import annotations

import concurrent.futures
import random
from typing import Any

import byte_model
import httpx
from running import frames


TEXTS = ["naïve 你好 😀👍🏽 done", "Ελληνικά и русский, ASCII", "日本語テキスト🇯🇵!", "plain text and more"]


def some_form(rng: random.Random) -> dict[str, Any]:
    """A request whose output is some text, some of the model's own making, cut into tokens anywhere."""
    text = rng.choice(TEXTS).encode()
    pinned = {str(i): token for i, token in enumerate(text) if rng.random() < 0.85}
    stops = rng.choice([[], [], ["你好 "], ["done", "и р"], ["é", "zzz", "キス"]])
    return {
        "prompt": [rng.randrange(256) for _ in range(rng.randint(1, 20))],
        "max_tokens": rng.randint(len(text), 80),
        "temperature": rng.choice([0.0, 0.0, 1.0]),
        "seed": rng.randrange(1000),
        "accept_threshold": rng.choice([0.0, 0.3, 0.9]),
        "remask_threshold": rng.choice([0.0, 0.2]),
        "ignore_eos": rng.random() < 0.5,
        "pinned": pinned,
    } | ({"stop": stops} if stops else {})


def check(client: httpx.Client, form: dict[str, Any]) -> str:
    """The text; an AssertionError where two ways differ."""
    whole = client.post("/generate", json=form).raise_for_status().json()
    with client.stream("POST", "/generate", json=form | {"stream": True, "stream_mode": "block_append"}) as response:
        *parts, last = [data for _, data in frames(response)]
    assert "".join(p["text"] for p in parts) == last["text"] == whole["text"]
    assert sum((p["token_ids"] for p in parts), []) == last["token_ids"] == whole["token_ids"]
    with client.stream("POST", "/generate", json=form | {"stream": True, "stream_mode": "denoise"}) as response:
        *steps, last = [data for _, data in frames(response)]
    cells: list[int | None] = [None] * 200
    for step in steps:
        assert cells[: step["committed"]] == last["token_ids"][: step["committed"]], "committed tokens changed"
        cells[step["token_offset"] : step["token_offset"] + len(step["token_ids"])] = step["token_ids"]
    assert cells[: len(last["token_ids"])] == last["token_ids"] == whole["token_ids"]
    with client.stream("POST", "/v1/completions", json=form | {"stream": True}) as response:
        assert "".join(data["choices"][0]["text"] for _, data in frames(response)) == whole["text"]
    assert byte_model.MASK not in whole["token_ids"]
    return whole["text"]


def run(url: str, *, requests: int, seed: int, clients: int) -> dict[str, Any]:
    """Checks that many random requests, several at a time."""
    rng = random.Random(seed)
    forms = [some_form(rng) for _ in range(requests)]
    with httpx.Client(base_url=url, timeout=120) as client, concurrent.futures.ThreadPoolExecutor(clients) as pool:
        texts = list(pool.map(lambda form: check(client, form), forms))
    multibyte = sum(any(ord(c) > 127 and c != "\ufffd" for c in text) for text in texts)
    return {
        "requests": requests,
        "equal": len(texts),
        "with multi-byte text": multibyte,
        "with broken bytes": sum("\ufffd" in t for t in texts),
    }
