"""Puts load on a running server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from diffulex_jax.bench.client import HTTPError, Response, client
from diffulex_jax.bench.load import Load, Seen, arrivals, report


Prompts = Sequence[str] | int


def run(*, url: str, prompts: Prompts, settings: dict[str, Any], load: Load, api_key: str = "") -> tuple[dict[str, Any], list[Seen]]:
    """Puts the load on the server at ``url``.

    Args:
      url: of the server, without a path.
      prompts: texts, used in turn; or a number: random prompts of so many tokens.
      settings: of every request, as in ``/generate``.
      load: how requests arrive.
      api_key: sent with every request, if not empty.

    Returns:
      The report (see ``load.report``) with what the server says of itself, and every request.

    Raises:
      OSError: when there is no server.
    """
    return asyncio.run(_run(url, prompts, settings, load, api_key))


async def _run(url: str, prompts: Prompts, settings: dict[str, Any], load: Load, api_key: str) -> tuple[dict[str, Any], list[Seen]]:
    seen: list[Seen] = []
    async with client(url, api_key) as connection:
        try:
            info = (await connection.get("/server_info")).raise_for_status().json()
        except HTTPError as error:
            raise OSError(f"no server of ours at {url}: {error}") from error
        texts = _random_prompts(info["engine"], load.requests, prompts) if isinstance(prompts, int) else prompts
        began = time.perf_counter()

        async def one(number: int) -> None:
            request = Seen(time.perf_counter() - began)
            seen.append(request)
            form = settings | {"prompt": texts[number % len(texts)], "stream": True, "stream_mode": "block_append"}
            try:
                async with connection.stream("POST", "/generate", json=form) as response:
                    request.status = response.status_code
                    async for event in _events(response):
                        _note(request, event, time.perf_counter() - began)
            except HTTPError:
                request.status = 0
            request.done = time.perf_counter() - began

        numbers = iter(range(load.requests))
        if load.rate:
            tasks = []
            for number, at in zip(numbers, arrivals(load), strict=False):
                await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                tasks.append(asyncio.create_task(one(number)))
            await asyncio.gather(*tasks)
        else:

            async def client_loop(place: int) -> None:
                await asyncio.sleep(load.ramp_seconds * place / load.concurrency)
                for number in numbers:
                    await one(number)

            await asyncio.gather(*map(client_loop, range(load.concurrency)))
        seconds = time.perf_counter() - began
    return report(seen, load, seconds) | {"model": info["model"], "engine": info["engine"], "settings": settings}, seen


def _random_prompts(engine: dict[str, Any], count: int, tokens: int) -> list[list[int]]:
    ordinary = np.setdiff1d(np.arange(engine["vocab_size"]), engine["mask_token_id"])
    return np.random.default_rng(0).choice(ordinary, (count, tokens)).tolist()


async def _events(response: Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def _note(request: Seen, event: dict[str, Any], at: float) -> None:
    if "error" in event:
        request.status = int(event["error"]["code"])
    elif event["event"] == "append":
        request.blocks.append(at)
    else:
        request.tokens += len(event["token_ids"])
        request.nfe += event["nfe"]
