"""What the routes work with: the engine, its name, and the room there is."""

from __future__ import annotations

import dataclasses
import time
from types import TracebackType

from diffulex_jax.async_serving.async_engine import AsyncEngine
from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.metrics import Metrics
from diffulex_jax.async_serving.settings import ServerSettings


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
