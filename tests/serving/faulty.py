"""A server whose engine fails when a request asks it to; run as a script. ``trial`` makes it fail and watches what its clients see."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import httpx
import jax.numpy as jnp
from running import Server, frames

from diffulex_jax import Engine
from diffulex_jax.async_serving import AsyncEngine, http
from diffulex_jax.async_serving.settings import ServerSettings
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.weights import checkpoint


# Tokens that do harm: no text can be made of the first; the second's embedding is not a number; the third in a prompt makes a step raise.
MUTE, POISON, CRASH = 1019, 1022, 1023
BOOM = "boom"  # text that cannot be tokenised
SILENCE_SECONDS = 2.0
KINDS = ("tokenizer", "detokenizer", "nan", "step", "kill", "stop")


class FaultyTokenizer(Tokenizer):
    def encode(self, text: str) -> list[int]:
        if BOOM in text:
            raise RuntimeError("the tokenizer broke")
        return super().encode(text)

    def decode(self, ids) -> str:
        if MUTE in list(ids):
            raise RuntimeError("the detokenizer broke")
        return super().decode(ids)


class FaultyEngine(Engine):
    def add(self, prompt, params=None, *, trace=False):
        self.crashes = CRASH in list(prompt)
        return super().add(prompt, params, trace=trace)

    def step(self):
        if getattr(self, "crashes", False):
            raise RuntimeError("the step broke")
        return super().step()


def build(model: str) -> Engine:
    http.log_as_json()
    path, mesh = pathlib.Path(model), make_mesh()
    network, params = checkpoint.load(path, mesh, dtype=jnp.dtype("float32"))
    poisoned = params | {"embed": params["embed"].at[POISON].set(jnp.nan)}
    settings: dict[str, Any] = {"block_size": 8, "max_model_len": 128, "max_slots": 4}
    return FaultyEngine(network, poisoned, tokenizer=FaultyTokenizer(path), eos_ids=checkpoint.load_end_ids(path), mesh=mesh, **settings)


GOOD = {"prompt": "hello", "max_tokens": 24, "ignore_eos": True}
LONG = {"prompt": "hello", "max_tokens": 120, "ignore_eos": True, "n": 8}  # not done before the fault, however busy the machine


def ask(url: str, **form) -> tuple[int, str, float]:
    """Status (that of an error in a stream, if there is one), text, and when the answer was complete."""
    with httpx.Client(base_url=url, timeout=60) as client:
        if not form.get("stream"):
            answer = client.post("/generate", json=form)
            return answer.status_code, answer.text, time.monotonic()
        with client.stream("POST", "/generate", json=form) as response:
            if response.status_code != 200:
                return response.status_code, response.read().decode(), time.monotonic()
            last = frames(response)[-1][1]
        return last.get("error", {"code": 200})["code"], str(last), time.monotonic()


def trial(server: Server, kind: str, good: list[int]) -> dict[str, Any]:
    """One fault, with four clients beside it.

    Returns:
      ``code``: what the request that did it was told. ``others``: what the clients beside it were told. ``answered``: seconds from the
      fault (for "stop": from when it could be known) until the last of them was. ``recovery``: seconds until the next right answer.
    """
    pid = server.client.get("/server_info").json()["engine"]["pid"]
    harmful: dict[str, dict[str, Any]] = {
        "tokenizer": {"prompt": BOOM},
        "detokenizer": GOOD | {"pinned": {"3": MUTE}, "stream": True, "stream_mode": "block_append"},
        "nan": GOOD | {"prompt": [5, POISON]},
        "step": GOOD | {"prompt": [5, CRASH]},
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        beside = [pool.submit(ask, server.url, **LONG, stream=i % 2 == 0) for i in range(4)]
        while server.metric("num_requests_in_flight") < 4 and not any(f.done() for f in beside):
            time.sleep(0.002)
        at, code = time.monotonic(), None
        if kind in harmful:
            code = ask(server.url, **harmful[kind])[0]
        else:
            os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            if kind == "stop":
                threading.Timer(5, _resume, [pid]).start()
                at += SILENCE_SECONDS
        answers = [future.result() for future in beside]
    while (answer := ask(server.url, **GOOD))[0] == 503:
        time.sleep(0.05)
    assert answer[0] == 200 and httpx.Response(200, text=answer[1]).json()["token_ids"] == good, answer
    return {
        "kind": kind,
        "code": code,
        "others": sorted(status for status, _, _ in answers),
        "answered": round(max(when for _, _, when in answers) - at, 3),
        "recovery": round(time.monotonic() - at, 3),
    }


def _resume(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--port", "--compile-cache"):
        parser.add_argument(name)
    options = parser.parse_args()
    import faulty  # not __main__: the engine's process imports it by this name

    http.log_as_json()
    engine = AsyncEngine(
        functools.partial(faulty.build, options.model),
        isolation="process",
        compile_cache=options.compile_cache,
        silence_seconds=SILENCE_SECONDS,
    )
    http.serve(engine, model=options.model, host="127.0.0.1", port=int(options.port), settings=ServerSettings())


COMMAND = [sys.executable, str(pathlib.Path(__file__))]


if __name__ == "__main__":
    main()
