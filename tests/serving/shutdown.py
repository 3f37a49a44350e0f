"""A SIGTERM under load, watched."""

from __future__ import annotations

import concurrent.futures
import pathlib
import socket
import time
from typing import Any

import httpx
import psutil
from running import Server, frames, serving, still_alive


# One token a step: long enough for all streams to have begun before the first ends.
FORM = {"prompt": "hello", "max_tokens": 120, "ignore_eos": True, "stream": True, "accept_threshold": 1.0}


def stream(url: str) -> str:
    """How a stream ended: its finish reason, or the code of its error, whether it had begun or not."""
    with httpx.Client(base_url=url, timeout=60) as client, client.stream("POST", "/generate", json=FORM) as response:
        if response.status_code != 200:
            return str(response.status_code)
        last = frames(response)[-1][1]
    return str(last["error"]["code"]) if "error" in last else last["finish_reason"]


def trial(model: pathlib.Path, compiled: pathlib.Path, *options: str, clients: int, drain_seconds: float) -> dict[str, Any]:
    """Starts a server, opens streams, ends it.

    Returns:
      ``code``: of the exit. ``seconds``: from the signal to the exit. ``ends``: of the streams. ``meanwhile``: what /ready, /health and a
      new request were told after the signal, where there was time to ask. ``left``: processes and listening sockets left.
    """
    with serving(model, *options, "--drain-seconds", str(drain_seconds), cache=compiled) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        with concurrent.futures.ThreadPoolExecutor(clients + 1) as pool:
            streams = [pool.submit(stream, server.url) for _ in range(clients)]
            while server.metric("num_requests_in_flight") < clients and not any(s.done() for s in streams):
                time.sleep(0.005)
            signalled = time.monotonic()
            server.process.terminate()
            meanwhile = _ask(server) if drain_seconds else []
            code = server.process.wait(60)
            seconds = time.monotonic() - signalled
            ends = [s.result() for s in streams]
        left = [str(p) for p in still_alive(children, 1)]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", server.port)) == 0:
                left.append(f"port {server.port}")
    return {"code": code, "seconds": round(seconds, 3), "ends": ends, "meanwhile": meanwhile, "left": left}


def _ask(server: Server) -> list[int]:
    time.sleep(0.1)
    try:
        paths = [server.client.get(path).status_code for path in ("/ready", "/health")]
        return [*paths, server.post("/generate", prompt="x").status_code]
    except httpx.TransportError:
        return []
