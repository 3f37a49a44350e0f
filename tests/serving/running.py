"""A server in a process of its own, as a user would start it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import psutil


ROOT = pathlib.Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-c", "from diffulex_jax.cli import app; app()", "serve"]
START_SECONDS = 120
SMALL = ["--block-size", "8", "--max-model-len", "128", "--max-slots", "4"]
# Of all servers of the embedded model, so that one reads what another compiled; they are single processes, which start sooner.
EMBEDDED = ["--max-slots", "2", "--max-model-len", "512", "--steps-per-dispatch", "2", "--isolation", "thread"]


class Server:
    """A running server, its log, and a client for it."""

    def __init__(self, command: list[str], *, until: str = "listening", cwd: str | pathlib.Path = "/"):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "serving")])}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd)
        self.log: list[dict] = []
        self.noise: list[str] = []
        self._until, self._there = until, threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._there.wait(START_SECONDS) or self.process.poll() is not None:
            self.process.kill()
            raise RuntimeError(f"the server did not start: {self.noise[-20:]} {self.log[-5:]}")
        self.port = next(line["port"] for line in self.log if line["message"] == until)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.noise.append(line)
                continue
            if self.log[-1]["message"] == self._until:
                self._there.set()
        self._there.set()

    def post(self, path: str, **form) -> httpx.Response:
        return self.client.post(path, json=form)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"diffulex:{name} "))

    def stop(self, sig: int = signal.SIGTERM, seconds: float = 30) -> int:
        self.client.close()
        self.process.send_signal(sig)
        return self.process.wait(seconds)


def still_alive(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended in time; what nobody has asked for the exit code of (a zombie) has ended."""
    deadline = time.monotonic() + seconds
    while True:
        alive = [p for p in processes if _is_alive(p)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def serving(
    model: str | pathlib.Path,
    *options: str,
    cache: pathlib.Path | None = None,
    command: list[str] = COMMAND,
    until: str = "listening",
    cwd: str | pathlib.Path = "/",
) -> Iterator[Server]:
    """A server for the time of a ``with``, which begins when it logs ``until``."""
    cached = ["--compile-cache", str(cache)] if cache else []
    server = Server([*command, "--model", str(model), "--port", "0", *cached, *options], until=until, cwd=cwd)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(10)


def frames(response: httpx.Response) -> list[tuple[str, dict]]:
    """The events of a stream, (name, data); it must end with [DONE]."""
    found, name = [], ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            found.append((name, line.removeprefix("data: ")))
            name = ""
    assert found.pop() == ("", "[DONE]")
    return [(name, json.loads(data)) for name, data in found]
