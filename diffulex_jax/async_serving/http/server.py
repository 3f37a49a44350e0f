"""The server as a process: a socket, JSON logs, and an end in good order."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
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

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """A signal came: called by Python between two bytecodes of the main thread."""
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


def build_engines(model: str, strategies: Sequence[str], **settings: Any) -> dict[str, Engine]:
    """``Engine.for_strategies`` in the engine's process, whose logs are JSON, too."""
    log_as_json()
    return Engine.for_strategies(model, strategies, **settings)


def serve(engine: AsyncEngine, *, model: str, host: str, port: int, settings: ServerSettings) -> None:
    """Starts the engine, serves until a signal, and stops it.

    Args:
      engine: not started yet.
      model: what it was loaded from.
      host: address to listen on.
      port: port to listen on; 0 for any that is free. The log line "listening" has the one taken.
      settings: how to behave.

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

    async def run() -> None:
        try:
            await engine.start()
            app = create_app(engine, model=model, settings=settings)
            logger.info("listening", extra={"facts": {"host": host, "port": listening.getsockname()[1], "model": model}})
            await DrainingServer(configure(app), engine, drain_seconds=settings.drain_seconds).serve([listening])
        finally:
            listening.close()
            await engine.stop()

    with asyncio.Runner(loop_factory=configure("").get_loop_factory()) as runner:
        runner.run(run())
