"""Requests made up by schemathesis from the server's own description of itself."""

from __future__ import annotations

import collections
import threading
import time
from typing import Any

import httpx
import hypothesis
import schemathesis
from running import Server


GOOD = {"prompt": "good", "max_tokens": 24, "ignore_eos": True}
SLOW_SECONDS = 20.0


def fuzz(server: Server, *, examples: int) -> dict[str, Any]:
    """Puts ``examples`` requests, right and wrong, to every operation, while a good one runs again and again.

    Returns:
      Answers by operation and status; ``good``: how often the good request was answered, and ``good_wrong``: how often differently
      from before; ``slowest``: seconds.

    Raises:
      AssertionError: for an answer of 500 and above, or none in time.
    """
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    slowest, stop, good = 0.0, threading.Event(), [server.post("/generate", **GOOD).json()["token_ids"]]

    def keep_asking() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                good.append(client.post("/generate", json=GOOD).json().get("token_ids"))

    beside = threading.Thread(target=keep_asking)
    beside.start()
    try:
        for operation in (result.ok() for result in schema.get_all_operations()):
            counts = statuses[f"{operation.method.upper()} {operation.path}"]
            modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
            strategy = hypothesis.strategies.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

            @hypothesis.given(case=strategy)
            @hypothesis.settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
            def one(counts: collections.Counter[int], case: schemathesis.Case) -> None:
                nonlocal slowest
                began = time.monotonic()
                response = case.call(base_url=server.url, timeout=SLOW_SECONDS)
                slowest = max(slowest, time.monotonic() - began)
                counts[response.status_code] += 1
                assert response.status_code < 500, f"{case}: {response.status_code} {response.text[:300]}"

            one(counts)
    finally:
        stop.set()
        beside.join()
    return {
        "statuses": {name: {str(k): v for k, v in sorted(counts.items())} for name, counts in statuses.items()},
        "good": len(good),
        "good_wrong": sum(tokens != good[0] for tokens in good),
        "slowest": round(slowest, 3),
    }
