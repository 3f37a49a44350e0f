"""Around every route: request ids, logs and counts outside; keys, room and the size of bodies inside."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.service import Service, full


logger = logging.getLogger(__name__)

OPEN_ROUTES = ("/", "/health", "/ready")  # the page asks for a key itself
GENERATING_ROUTES = ("/v1/completions", "/v1/chat/completions", "/generate")
_REFUSALS_FIRST_SECONDS = 0.05
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


async def send_error(error: ApiError, send: Send) -> None:
    """Answers with the envelope."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that has been read, then what comes after it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return first.pop() if first else await receive()

    return receive_again


class RequestLog:
    """Gives every request an id (the client's own, if it sent a sane one), and logs and counts what became of it."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, complete = time.monotonic(), 0, False
        asked = Headers(scope=scope).get("x-request-id", "")
        id_ = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        facts: dict[str, Any] = {}
        # A copy, whose method and path are as the routes have them: a HEAD is a GET without its body (proxies ask so whether we
        # live), and slashes that are doubled or at the end mean nothing, save in the name of a model.
        head, path = scope["method"] == "HEAD", scope["path"].rstrip("/") or "/"
        if not path.startswith("/v1/models/"):
            path = re.sub("/{2,}", "/", path)
        state = scope.get("state", {}) | {"request_id": id_, "facts": facts}
        inner: dict[str, Any] = {**scope, "state": state, "path": path, "method": "GET" if head else scope["method"]}
        inner.pop("raw_path", None)

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            if head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id_
            await send(message)

        try:
            await self._app(inner, receive, send_with_id)
        except ClientDisconnect:
            status = 499
        except Exception:
            logger.exception("request %s failed", id_)
            if not status:
                await send_error(ApiError(500, "internal error"), send_with_id)
            elif not complete:
                raise  # closes the connection: an answer that was begun must not look complete
        finally:
            route = getattr(inner.get("route"), "path", "other")
            self._service.metrics.http_requests.labels(route, str(status)).inc()
            facts |= {"request_id": id_, "method": scope["method"], "path": scope["path"], "status": status}
            seconds = round(time.monotonic() - began, 6)
            # Under a flood of requests that find no room, their lines would cost more than refusing them; they are counted.
            level = logging.DEBUG if status == 429 else logging.INFO
            logger.log(level, "request", extra={"facts": facts | {"seconds": seconds}})


class Guard:
    """Lets in requests with a key, while there is room, once their body has arrived whole and is not too long."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service
        self._keys = [key.encode() for key in service.settings.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with contextlib.ExitStack() as arrival:
            try:
                if self._keys and scope["path"] not in OPEN_ROUTES:
                    self._check_key(Headers(scope=scope))
                if scope["path"] in GENERATING_ROUTES:
                    scope["state"]["arrival"] = arrival
                    await self._arrive(arrival)
                body = await self._body(scope, receive)
            except ApiError as error:
                await send_error(error, send)
                return
            await self._app(scope, _replay(body, receive), send)

    async def _arrive(self, arrival: contextlib.ExitStack) -> None:
        places = self._service.places
        if places.full:
            raise full()  # before anything is read
        arrival.enter_context(places.kept())
        if places.busy:  # it will wait for a slot in any case: those who are refused hear of it first
            await asyncio.sleep(_REFUSALS_FIRST_SECONDS)

    def _check_key(self, headers: Headers) -> None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")
        # Every key is compared, in constant time: how long it takes says nothing about them.
        matches = sum(hmac.compare_digest(given, known) for known in self._keys)
        if kind.lower() != "bearer" or not matches:
            raise ApiError(401, "send one of the server's API keys: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        settings, parts, size, more = self._service.settings, [], 0, True
        too_long = ApiError(413, f"the body is longer than {settings.max_body_bytes} bytes", code="body_too_long")
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > settings.max_body_bytes:
            raise too_long
        try:
            async with asyncio.timeout(settings.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > settings.max_body_bytes:
                        raise too_long
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {settings.body_seconds} s") from None
        return b"".join(parts)
