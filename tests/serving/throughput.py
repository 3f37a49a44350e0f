"""The same work over HTTP and offline in one process, each in a fresh process."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import httpx
from running import ROOT, serving


OFFLINE = """
import json, sys, time
import jax
model, cache, settings, forms = json.load(sys.stdin)
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from diffulex_jax import Engine, SamplingParams
engine = Engine.from_pretrained(model, **settings)
params = [SamplingParams(max_tokens=form["max_tokens"]) for form in forms]
engine.generate([form["prompt"] for form in forms[:8]], params[:8])
began = time.perf_counter()
outputs = engine.generate([form["prompt"] for form in forms], params)
print(json.dumps([time.perf_counter() - began, [output.token_ids for output in outputs]]))
"""


def compare(model: str, compiled: pathlib.Path, *, settings: dict[str, int], requests: int, rounds: int) -> dict[str, Any]:
    """Decodes ``requests`` questions offline and over HTTP in turn, ``rounds`` times.

    Returns:
      ``offline`` and ``http``: tokens a second of each round. ``ratio``: of the best rounds.

    Raises:
      AssertionError: when the tokens differ.
    """
    forms = [{"prompt": f"Tom has {i % 89 + 10} pens and buys {i % 71 + 5}. How many pens?", "max_tokens": 64} for i in range(requests)]
    rates: dict[str, list[float]] = {"offline": [], "http": []}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for _ in range(rounds):
        command = [sys.executable, "-c", OFFLINE]
        given = json.dumps([model, str(compiled), settings, forms])
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, env=environment)
        offline_seconds, offline = json.loads(done.stdout.splitlines()[-1])
        http_seconds, answers = _over_http(model, compiled, settings, forms)
        assert answers == offline, "the same requests gave other tokens over HTTP"
        tokens = sum(map(len, offline))
        rates["offline"].append(tokens / offline_seconds)
        rates["http"].append(tokens / http_seconds)
    rounded = {name: [round(rate, 1) for rate in values] for name, values in rates.items()}
    return {"requests": requests} | rounded | {"ratio": round(max(rates["http"]) / max(rates["offline"]), 3)}


def _over_http(model: str, compiled: pathlib.Path, settings: dict[str, int], forms: list[dict[str, Any]]) -> tuple[float, list[list[int]]]:
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with serving(model, *options, cache=compiled) as server, httpx.Client(base_url=server.url, timeout=300) as client:

        def ask(form: dict[str, Any]) -> list[int]:
            return client.post("/generate", json=form).raise_for_status().json()["token_ids"]

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, forms[:8]))
            began = time.perf_counter()
            answers = list(pool.map(ask, forms))
            return time.perf_counter() - began, answers
