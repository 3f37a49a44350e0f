"""LoRA adapters over HTTP, without a process: each is a model of its own name."""

from __future__ import annotations

import asyncio
import json
import pathlib

import httpx
import jax
import pytest

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.async_serving import AsyncEngine
from diffulex_jax.async_serving.http.app import create_app
from diffulex_jax.async_serving.settings import ServerSettings
from diffulex_jax.weights import adapters, checkpoint
from diffulex_jax.weights.adapters import Lora


PROMPT = [5, 6, 7, 8, 9]
SIZES = {"strategy": "llada2", "block_size": 8, "max_model_len": 64, "max_slots": 2, "warm_up": False}


@pytest.fixture(scope="module")
def engine(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    network, lora, folders = checkpoint.load_model(model), Lora(2, 4.0, ("qkv", "out")), {}
    fresh = adapters.init(network, lora, jax.random.key(0))
    for seed, name in enumerate(("math", "code/v2")):
        folders[name] = str(tmp_path_factory.mktemp("adapter"))
        some = jax.tree.map(lambda a, seed=seed: jax.random.normal(jax.random.key(a.size + seed), a.shape) * 0.3, fresh)
        adapters.save(folders[name], network, lora, some)
    return Engine.from_pretrained(str(model), adapters=folders, **SIZES)


def asked(engine: Engine, *requests: tuple[str, str, dict]) -> list[httpx.Response]:
    """The answers to requests, one after the other: method, path, and body or parameters."""

    async def main():
        async with AsyncEngine(lambda: engine) as served:
            app = create_app(served, model="base", settings=ServerSettings())
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://here") as client:
                return [await client.request(method, path, json=form or None) for method, path, form in requests]

    return asyncio.run(main())


def test_a_model_is_listed_for_each_adapter(engine):
    listed, one, absent = asked(engine, ("GET", "/v1/models", {}), ("GET", "/v1/models/code/v2", {}), ("GET", "/v1/models/physics", {}))
    cards = listed.json()["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [("base", None), ("math", "base"), ("code/v2", "base")]
    assert one.json() == cards[2]
    assert absent.status_code == 404


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_the_name_of_a_model_chooses_its_adapter(engine, path):
    names, chat = ("base", "math", "code/v2"), path.endswith("chat/completions")
    told = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": PROMPT}
    form = told | {"max_tokens": 12, "ignore_eos": True}
    *found, streamed, unknown = asked(
        engine,
        *(("POST", path, form | {"model": name}) for name in names),
        ("POST", path, form | {"model": "math", "stream": True}),
        ("POST", path, form | {"model": "physics"}),
    )
    prompt = engine.tokenizer.apply_chat_template(told["messages"]) if chat else PROMPT
    settings = [SamplingParams(max_tokens=12, ignore_eos=True, adapter_name=name) for name in (None, *names[1:])]
    want = [output.text for output in engine.generate([prompt] * 3, settings)]
    assert len(set(want)) == 3
    if path == "/generate":
        assert [answer.json()["text"] for answer in found] == want
    else:
        choices = [answer.json()["choices"][0] for answer in found]
        assert [choice["message"]["content"] if chat else choice["text"] for choice in choices] == want
        assert [answer.json()["model"] for answer in found] == list(names)
        chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
        assert {chunk["model"] for chunk in chunks} == {"math"}
    assert unknown.status_code == 404
    said = unknown.json()["error"]
    assert (said["code"], said["param"]) == ("model_not_found", "model")
    assert said["message"] == "the model 'physics' does not exist; this server has 'base', 'math', 'code/v2'"


def test_what_a_request_says_of_an_adapter_is_said_by_its_model(engine):
    (refused,) = asked(engine, ("POST", "/generate", {"prompt": PROMPT, "adapter_name": "math"}))
    assert refused.status_code == 400 and "adapter_name" in refused.json()["error"]["message"]
