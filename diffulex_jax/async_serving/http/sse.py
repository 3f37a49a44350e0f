"""Answers that end when their client goes away: server-sent events, and plain ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from diffulex_jax.async_serving.async_engine import RequestError
from diffulex_jax.async_serving.http.errors import ApiError


logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


# Characters that many clients take for the end of a line, which JSON lets stand: they must not cut a frame in two.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x7f\x85\u2028\u2029"}


def frame(data: dict[str, Any], event: str | None = None) -> bytes:
    """One server-sent event, of ``data:`` on one line by everybody's idea of a line."""
    named = f"event: {event}\n" if event else ""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"{named}data: {text}\n\n".encode()


def as_api_error(error: BaseException) -> ApiError:
    """What a failed request tells its client."""
    match error:
        case ApiError():
            return error
        case RequestError(code=code, message=message, field=field):
            return ApiError(code, message, param=field)
        case TimeoutError():
            return ApiError(504, "the request took longer than the server allows")
        case _:
            logger.error("a request failed", exc_info=error)
            return ApiError(500, f"internal error: {type(error).__name__}")


async def gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Any], *, seconds: float) -> Any:
    """The result of ``work``, which is cancelled when the client goes away or the time is over.

    Raises:
      ClientDisconnect: when the client went away.
      TimeoutError: when the time was over.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({task, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect if watch.done() else TimeoutError
    finally:
        await _cancel(task, watch)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends frames as they come, those that are there together; a comment when there were none for a while."""

    def __init__(self, first: bytes, frames: AsyncGenerator[bytes, None], *, seconds: float, ping_seconds: float):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._frames, self._seconds, self._ping_seconds = first, frames, seconds, ping_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        tasks = [asyncio.ensure_future(c) for c in (self._produce(queue), self._send(queue, send), gone(receive))]
        try:
            await asyncio.wait(tasks[1:], return_when=asyncio.FIRST_COMPLETED)
            if not tasks[1].done():
                raise ClientDisconnect
        finally:
            await _cancel(*tasks)
            await self._frames.aclose()

    async def _produce(self, queue: asyncio.Queue[bytes | None]) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                async for data in self._frames:
                    queue.put_nowait(data)
        except Exception as error:
            queue.put_nowait(frame(as_api_error(error).body))
        queue.put_nowait(DONE)
        queue.put_nowait(None)

    async def _send(self, queue: asyncio.Queue[bytes | None], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        more = True
        while more:
            try:
                parts = [await asyncio.wait_for(queue.get(), self._ping_seconds)]
            except TimeoutError:
                parts = [_PING]
            with contextlib.suppress(asyncio.QueueEmpty):
                while parts[-1] is not None:
                    parts.append(queue.get_nowait())
            more = parts[-1] is not None
            await send({"type": "http.response.body", "body": b"".join(p for p in parts if p is not None), "more_body": more})
