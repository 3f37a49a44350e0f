"""The server's settings and what it hands to its routes."""

from __future__ import annotations

import dataclasses
import math
import time
from types import TracebackType

from diffulex_jax.async_serving.async_engine import AsyncEngine
from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.metrics import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How the server behaves. Each is an option of ``diffulex-jax serve``.

    Attributes:
      served_model_name: what clients call the model; default: as it was given.
      api_key: keys that clients must send one of (``Authorization: Bearer KEY``), on every route but /health and /ready. None: open.
      cors_origin: origins that browsers may call from; ``*`` for any.
      max_queue: outputs that may wait for a slot; further requests are refused (429).
      max_queue_tokens: prompt tokens of all requests in the server, at the most; further requests are refused (429).
      max_body_bytes: longest request body (413).
      body_seconds: longest time a body may take to arrive (408).
      request_seconds: longest time until a request's answer is complete (504).
      drain_seconds: how long requests may go on after SIGTERM before they are cut off.
      ping_seconds: a stream that is silent for so long gets a comment, so that nothing on the way closes it.
    """

    served_model_name: str = ""
    api_key: tuple[str, ...] = ()
    cors_origin: tuple[str, ...] = ()
    max_queue: int = 256
    max_queue_tokens: int = 1_000_000
    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    ping_seconds: float = 15.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = {"max_queue": 0, "drain_seconds": 0}.get(field.name, 1 if field.type == "int" else 1e-3)
            if field.type in ("int", "float") and not (math.isfinite(value) and value >= least):
                raise ValueError(f"{field.name}={value} must be at least {least}")
        if any(not key.strip() or not key.isascii() for key in self.api_key):
            raise ValueError("api_key must be non-empty ASCII text")


class Places:
    """Room in the server, taken before any work is done for a request."""

    def __init__(self, *, outputs: int, tokens: int):
        self.outputs, self.tokens = outputs, tokens
        self._outputs = self._tokens = 0

    @property
    def full(self) -> bool:
        """Whether not even one more output has room."""
        return self._outputs >= self.outputs

    def take(self, outputs: int, tokens: int) -> Taken:
        """Room for a request, given back at the end of a ``with``.

        Raises:
          ApiError: 429 where there is none now, 400 where there could never be.
        """
        if outputs > self.outputs:
            raise ApiError(400, f"the request asks for {outputs} outputs; the server has room for {self.outputs}", param="n")
        if tokens > self.tokens:
            raise ApiError(400, f"the prompts have {tokens} tokens; the server has room for {self.tokens}", param="prompt")
        if self._outputs + outputs > self.outputs or self._tokens + tokens > self.tokens:
            raise full()
        self._outputs, self._tokens = self._outputs + outputs, self._tokens + tokens
        return Taken(self, outputs, tokens)

    def give_back(self, outputs: int, tokens: int) -> None:
        """The opposite of :meth:`take`."""
        self._outputs, self._tokens = self._outputs - outputs, self._tokens - tokens


@dataclasses.dataclass
class Taken:
    """Room that a request has taken; leaving the ``with`` gives it back."""

    places: Places
    outputs: int
    tokens: int

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.places.give_back(self.outputs, self.tokens)


def full() -> ApiError:
    """What a request gets that finds no room."""
    return ApiError(429, "the server is at capacity; try again later", code="queue_full")


@dataclasses.dataclass
class Service:
    """What the routes work with: one engine under one name."""

    engine: AsyncEngine
    model: str
    settings: ServerSettings
    places: Places
    metrics: Metrics
    began: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Refuses a request for another model (404)."""
        if name is not None and name != self.model:
            raise ApiError(404, f"the model {name!r} does not exist; this server has {self.model!r}", param="model", code="model_not_found")
