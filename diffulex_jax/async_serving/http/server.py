"""The server as a process: a socket, JSON logs, and an end in good order."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import logging
import signal
import socket
import sys
import time
import types
from collections.abc import Sequence
from typing import Any

import uvicorn

from diffulex_jax.async_serving.async_engine import AsyncEngine
from diffulex_jax.async_serving.http.app import create_app
from diffulex_jax.async_serving.settings import ServerSettings
from diffulex_jax.engine.engine import Engine
from diffulex_jax.parallel.hosts import Hosts


logger = logging.getLogger(__name__)

_LAST_ANSWERS_SECONDS = 2  # for answers on their way when the drain is over


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: not ready any more, finish what there is or what fits the time, then end. A second signal ends at once."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, *, drain_seconds: float):
        super().__init__(config)
        self._engine, self._drain_seconds = engine, drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self.first_signal = 0
        self.opened = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.opened.set()

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """A signal came: called by Python between two bytecodes of the main thread."""
        self.first_signal = self.first_signal or sig
        self._loop.call_soon_threadsafe(self._signalled)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def _signalled(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        logger.info("draining", extra={"facts": {"in_flight": len(self._engine.in_flight), "seconds": self._drain_seconds}})
        done = await self._engine.drain(self._drain_seconds)
        logger.info("drained", extra={"facts": {"complete": done}})
        self.should_exit = True


def log_as_json() -> None:
    """Sends this process's logs to stderr, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def build_engines(model: str, strategies: Sequence[str | None], *, hosts: Hosts | None = None, **settings: Any) -> dict[str, Engine]:
    """``Engine.for_strategies`` in the engine's process, whose logs are JSON, too, and which may be one of several ``hosts``."""
    log_as_json()
    if hosts is not None:
        hosts.connect()
    return Engine.for_strategies(model, strategies, **settings)


def serve(engine: AsyncEngine, *, model: str, host: str, port: int, settings: ServerSettings) -> int:
    """Starts the engine, serves until a signal, and stops it. The port is open from the beginning: until the engine has started,
    ``/health`` says what it does, and requests are told to come again.

    Args:
      engine: not started yet.
      model: what it was loaded from.
      host: address to listen on.
      port: port to listen on; 0 for any that is free. The log lines "starting" and, once requests are served, "listening" have the one
        taken.
      settings: how to behave.

    Returns:
      The exit code: 130 where SIGINT was the first signal, 1 where the engine was lost for good, else 0, also where the host that this one
      followed has ended in good order. In a thread the engine may still be compiling, which no one can end.

    Raises:
      ValueError: when the model or a setting will not do.
      OSError: when the address cannot be had.
    """
    listening = socket.create_server((host, port), backlog=2048)  # first: that an address is taken should not cost a load
    configure = functools.partial(
        uvicorn.Config,
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
    )

    async def run() -> int:
        facts = {"host": host, "port": listening.getsockname()[1], "model": model}
        server = DrainingServer(configure(create_app(engine, model=model, settings=settings)), engine, drain_seconds=settings.drain_seconds)

        async def start() -> None:
            await server.opened.wait()
            began = time.monotonic()
            logger.info("starting", extra={"facts": facts})
            try:
                await engine.start()
                # What is there now stays; looking through it for garbage would make everybody wait for a tenth of a second.
                gc.collect()
                gc.freeze()
                logger.info("listening", extra={"facts": facts | {"seconds": round(time.monotonic() - began, 1)}})
            except BaseException:
                server.should_exit = True
                raise

        async def end_with_engine() -> None:
            await engine.supervisor.lost.wait()
            server.should_exit = True

        starting, ending = asyncio.ensure_future(start()), asyncio.ensure_future(end_with_engine())
        try:
            await server.serve([listening])
            if starting.done():
                starting.result()  # what was wrong with it, if something was
        finally:
            starting.cancel()
            ending.cancel()
            listening.close()
            await engine.stop()
            await asyncio.gather(starting, return_exceptions=True)
        if engine.supervisor.lost.is_set() and engine.supervisor.reason:
            return 1
        return 128 + signal.SIGINT if server.first_signal == signal.SIGINT else 0

    with asyncio.Runner(loop_factory=configure("").get_loop_factory()) as runner:
        return runner.run(run())
