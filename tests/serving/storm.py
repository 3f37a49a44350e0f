"""Streams that are cut at a random point of their life, by many clients at once."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import httpx
import psutil
from running import Server


FORM = {"max_tokens": 100, "ignore_eos": True, "stream": True}


def storm(server: Server, *, clients: int, streams: int, seed: int) -> dict[str, Any]:
    """Opens ``streams`` streams, ``clients`` at a time, and cuts each after a share of its tokens that is drawn from U(0, 1). Half of
    them sample, without a seed.

    Returns:
      ``cut`` and ``whole``: streams by how they ended; ``refused``; ``seconds``; ``idle_after``: seconds until no page was held and
      nothing in flight; ``rss``: resident bytes of server and engine, before and after.
    """
    before = resident(server)
    ends = {"cut": 0, "whole": 0, "refused": 0}
    began = time.monotonic()
    asyncio.run(_storm(server.url, clients, streams, random.Random(seed), ends))
    seconds, stopped = time.monotonic() - began, time.monotonic()
    while server.metric("kv_pages_used") or server.metric("num_requests_in_flight"):
        assert time.monotonic() - stopped < 10, "pages or requests are left"
        time.sleep(0.01)
    idle_after = time.monotonic() - stopped
    return ends | {"seconds": round(seconds, 2), "idle_after": round(idle_after, 3), "rss": [before, resident(server)]}


def resident(server: Server) -> int:
    """Bytes of memory of the server's process and the engine's."""
    pids = {server.process.pid, server.client.get("/server_info").json()["engine"]["pid"]}  # one, where it is a thread
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def _ids(rng: random.Random) -> list[int]:
    return [rng.randrange(256) for _ in range(rng.randint(1, 25))]


async def _storm(url: str, clients: int, streams: int, rng: random.Random, ends: dict[str, int]) -> None:
    plans = iter([({"prompt": _ids(rng), "temperature": rng.choice([0.0, 1.0])}, rng.random()) for _ in range(streams)])
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:

        async def one() -> None:
            for asked, share in plans:
                tokens = 0
                async with client.stream("POST", "/generate", json=FORM | asked | {"stream_mode": "block_append"}) as response:
                    if response.status_code != 200:
                        ends["refused"] += 1
                        continue
                    if share < 0.1:  # before anything has come
                        ends["cut"] += 1
                        continue
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            event = json.loads(line.removeprefix("data: "))
                            tokens += len(event["token_ids"]) if event["event"] == "append" else 0
                            if tokens > share * FORM["max_tokens"]:
                                ends["cut"] += 1
                                break
                    else:
                        ends["whole"] += 1

        await asyncio.gather(*(one() for _ in range(clients)))
