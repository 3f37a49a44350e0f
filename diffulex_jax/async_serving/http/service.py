"""What the routes work with: the engine, its name, and the room there is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator
from typing import Any

from diffulex_jax.async_serving.async_engine import AsyncEngine
from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.metrics import Metrics
from diffulex_jax.async_serving.settings import ServerSettings
from diffulex_jax.async_serving.supervisor import Health


class Places:
    """Room in the server, taken before any work is done for a request. Every strategy has ``slots`` of its own; ``queue`` outputs may
    wait, and there may be ``tokens`` of prompts, of all strategies together."""

    def __init__(self, strategies: Iterable[str], *, slots: int, queue: int, tokens: int):
        self.slots, self.queue, self.tokens = slots, queue, tokens
        self._outputs, self._tokens = dict.fromkeys(strategies, 0), 0
        self._kept = 0

    def _waiting(self, strategy: str = "", outputs: int = 0) -> int:
        """Outputs that have no slot, were there ``outputs`` more of a strategy."""
        return sum(max(0, there + outputs * (name == strategy) - self.slots) for name, there in self._outputs.items())

    @property
    def full(self) -> bool:
        """Whether not even one more output of any strategy has room."""
        return all(self._waiting(strategy, self._kept + 1) > self.queue for strategy in self._outputs)

    @property
    def busy(self) -> bool:
        """Whether every strategy has an output for each of its slots."""
        return all(there + self._kept > self.slots for there in self._outputs.values())

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """A place kept for a request that has arrived, until its outputs are counted and it can :meth:`take` its own."""
        self._kept += 1
        try:
            yield
        finally:
            self._kept -= 1

    def check(self, *, outputs: int, blamed: str) -> None:
        """Refuses a request that could never have room (400), ``blamed`` for it."""
        if outputs > self.slots + self.queue:
            message = f"the request asks for {outputs} outputs; the server has room for {self.slots + self.queue}"
            raise ApiError(400, message, param=blamed)

    @contextlib.contextmanager
    def take(self, strategy: str, outputs: int, tokens: int) -> Iterator[None]:
        """Room for a request for the time of a ``with``.

        Raises:
          ApiError: 429 where there is none now, 400 where there could never be.
        """
        self.check(outputs=outputs, blamed="n")
        if tokens > self.tokens:
            raise ApiError(400, f"the prompts have {tokens} tokens; the server has room for {self.tokens}", param="prompt")
        if self._waiting(strategy, outputs) > self.queue or self._tokens + tokens > self.tokens:
            raise full()
        self._outputs[strategy], self._tokens = self._outputs[strategy] + outputs, self._tokens + tokens
        try:
            yield
        finally:
            self._outputs[strategy], self._tokens = self._outputs[strategy] - outputs, self._tokens - tokens


def full() -> ApiError:
    """What a request gets that finds no room."""
    return ApiError(429, "the server is at capacity; try again later", code="queue_full")


@dataclasses.dataclass
class Service:
    """What the routes work with: one engine under one name, and its adapters under theirs. The engine may not have started yet."""

    engine: AsyncEngine
    model: str
    settings: ServerSettings
    metrics: Metrics
    began: int = dataclasses.field(default_factory=lambda: int(time.time()))
    client_ids: dict[str, str] = dataclasses.field(default_factory=dict)  # of requests in flight, by the id of their answer

    @property
    def status(self) -> str:
        """What ``/health`` says of the engine; one that repeats what another host does is ``"following"``."""
        supervisor = self.engine.supervisor
        if self.engine.follows:
            return "following"
        return supervisor.stage if supervisor.health is Health.STARTING else supervisor.health.value

    @property
    def facts(self) -> dict[str, Any]:
        """``AsyncEngine.facts``.

        Raises:
          ApiError: 503 until the engine has started for the first time.
        """
        if not self.engine.facts:
            raise ApiError(503, f"the engine is {self.status}; try again when /health says ready", code="starting")
        return self.engine.facts

    @functools.cached_property
    def places(self) -> Places:
        """The room there is."""
        limits = {"slots": self.facts["max_slots"], "queue": self.settings.max_queue, "tokens": self.settings.max_queue_tokens}
        return Places(self.facts["strategies"], **limits)

    @contextlib.contextmanager
    def known_as(self, id: str, client_id: str) -> Iterator[None]:
        """For the time of a ``with`` a request can be found by its client's id for it, which need not be its alone."""
        self.client_ids[id] = client_id
        try:
            yield
        finally:
            del self.client_ids[id]

    @property
    def adapters(self) -> tuple[str, ...]:
        """What clients may call models beside ``model``: each is that with an adapter."""
        return tuple(self.facts["adapters"] or ())

    def check_model(self, name: str | None) -> None:
        """Refuses a request for another model (404)."""
        if name is not None and name != self.model and name not in self.adapters:
            there = ", ".join(map(repr, (self.model, *self.adapters)))
            raise ApiError(404, f"the model {name!r} does not exist; this server has {there}", param="model", code="model_not_found")

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that the name of a model stands for; None for the model as it is. Refuses other models (404)."""
        self.check_model(name)
        return None if name == self.model else name
