"""Mixed work for a long time."""

from __future__ import annotations

import concurrent.futures
import random
import time
from typing import Any

import httpx
import numpy as np
from running import Server
from storm import resident


def endure(server: Server, *, seconds: float, clients: int, seed: int) -> dict[str, Any]:
    """Clients that ask for answers and streams of all lengths, and abort one in ten.

    Returns:
      ``answers``, ``aborts``, ``errors``; ``recompiles``; ``rss_mb``: resident memory through time, twenty readings;
      ``growth_mb_per_10_min``: its slope over the second half; ``p99_ms``: of whole answers in each quarter.
    """
    began = time.monotonic()
    readings: list[tuple[float, int]] = []
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(_client, server.url, began, seconds, random.Random(seed + i)) for i in range(clients)]
        while time.monotonic() - began < seconds:
            readings.append((time.monotonic() - began, resident(server)))
            time.sleep(seconds / 40)
        seen = [future.result() for future in futures]
    latencies = np.array(sum((s["latencies"] for s in seen), []))
    quarters = [latencies[(latencies[:, 0] >= q * seconds / 4) & (latencies[:, 0] < (q + 1) * seconds / 4), 1] for q in range(4)]
    at, rss = np.array(readings).T
    half = at > seconds / 2
    return {
        "seconds": seconds,
        "answers": sum(s["answers"] for s in seen),
        "aborts": sum(s["aborts"] for s in seen),
        "errors": sum((s["errors"] for s in seen), []),
        "recompiles": server.metric("recompiles_total"),
        "rss_mb": [round(float(v) / 2**20, 1) for v in rss[:: max(1, len(rss) // 20)]],
        "growth_mb_per_10_min": round(float(np.polyfit(at[half], rss[half], 1)[0]) * 600 / 2**20, 2),
        "p99_ms": [round(1000 * float(np.percentile(q, 99)), 1) if len(q) else None for q in quarters],
    }


def _client(url: str, began: float, seconds: float, rng: random.Random) -> dict[str, Any]:
    seen: dict[str, Any] = {"answers": 0, "aborts": 0, "errors": [], "latencies": []}
    with httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() - began < seconds:
            prompt = [rng.randrange(256) for _ in range(rng.choice([1, 5, 20, 60]))]
            form = {
                "prompt": prompt,
                "max_tokens": rng.choice([4, 16, 60]),
                "seed": rng.choice([-1, rng.randrange(2**64)]),
                "temperature": rng.choice([0.0, 1.0]),
            }
            sent = time.monotonic()
            if rng.random() < 0.1:
                with client.stream("POST", "/generate", json=form | {"stream": True}) as response:
                    next(response.iter_lines())
                seen["aborts"] += 1
                continue
            answer = client.post(rng.choice(["/generate", "/v1/completions"]), json=form)
            if answer.status_code != 200:
                seen["errors"].append(answer.text[:200])
            seen["answers"] += 1
            seen["latencies"].append((sent - began, time.monotonic() - sent))
    return seen
