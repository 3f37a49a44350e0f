"""Keeps a worker running: one that ends, falls silent or hangs is replaced, and whoever waited for it is told."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from diffulex_jax.async_serving import protocol
from diffulex_jax.async_serving.worker import Deliver, Worker


logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.25
_MOST_SECONDS_BETWEEN_STARTS = 30.0
_LAST_TICK_SECONDS = 5.0  # for a worker to notice that it should end


class Health(enum.Enum):
    """``STARTING`` (again, perhaps), ``READY``, ``DOWN`` (waiting for its next start), ``STOPPED`` (for good)."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    STOPPED = "stopped"


class Supervisor:
    """Owns one worker at a time. All methods belong to the event loop that :meth:`start` ran on.

    Attributes:
      health: see :class:`Health`.
      reason: why the last worker ended; empty if none did.
      stage: what it is doing while it starts: ``"loading"`` or ``"compiling"``.
      restarts: workers started in place of another.
      lost: set when a worker was lost that is not replaced.
      ready: what the running worker said of itself.
      stats: the engine's counters, as last heard.
    """

    def __init__(
        self,
        make_worker: Callable[[Deliver], Worker],
        *,
        on_events: Callable[[list[protocol.RequestEvent | protocol.Profiled]], None],
        on_down: Callable[[str], None],
        silence_seconds: float,
        tick_seconds: float,
        restart: bool = True,
    ):
        """Watches what ``make_worker`` makes.

        Args:
          make_worker: starts a worker that delivers to its argument.
          on_events: takes everything that concerns requests and profiles, in order.
          on_down: told why, at once, when the worker is lost with all it was doing.
          silence_seconds: a watched worker that says nothing for so long is ended.
          tick_seconds: so is one whose loop takes so long for one tick.
          restart: a worker that was lost is replaced; else that is the end, and ``lost`` says so.
        """
        self.health, self.reason, self.restarts = Health.STOPPED, "", 0
        self.stage = "loading"
        self.ready: protocol.Ready | None = None
        self.stats: dict[str, int] = {}
        self._make_worker, self._on_events, self._on_down = make_worker, on_events, on_down
        self._silence_seconds, self._tick_seconds, self._may_restart = silence_seconds, tick_seconds, restart
        self.lost = asyncio.Event()
        self._worker: Worker | None = None
        self._number = self._failed_starts = 0
        self._heard = self._busy = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Starts the first worker and waits until it is ready.

        Raises:
          ValueError: when the engine's settings or its model will not do.
          RuntimeError: when it could not be started for another reason.
        """
        self._loop = asyncio.get_running_loop()
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._launch()
        await self._first
        self._spawn(self._watch())

    def send(self, command: protocol.Command) -> None:
        """Hands a command to the worker; lost where there is none, as all it was doing is."""
        if self._worker is not None and self.health is Health.READY:
            self._worker.send(command)

    async def stop(self) -> None:
        """Ends the worker for good. One that is still starting in a thread is not waited for: it may be minutes in the compiler.

        One that leads others may end by itself first, so that those end in good order.
        """
        was, self.health = self.health, Health.STOPPED
        for task in self._tasks:
            task.cancel()
        if self._worker is not None:
            if was is Health.READY and self._leads_others:
                self._worker.send(protocol.Stop())
                await asyncio.to_thread(self._worker.join, _LAST_TICK_SECONDS)
            self._worker.kill()
            await asyncio.to_thread(self._worker.join, _LAST_TICK_SECONDS if was is Health.READY else 0.1)

    @property
    def _leads_others(self) -> bool:
        facts = self.ready.facts if self.ready is not None else {}
        return facts.get("hosts", 1) > 1 and facts["host_index"] == 0

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _launch(self) -> None:
        self._number += 1
        number = self._number

        def deliver(events: list[protocol.Event]) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._receive, number, events, time.monotonic())

        self.health, self.stage = Health.STARTING, "loading"
        self._worker = self._make_worker(deliver)

    def _receive(self, number: int, events: list[protocol.Event], at: float) -> None:
        if number != self._number or self.health in (Health.DOWN, Health.STOPPED):
            return  # the last words of one that was given up
        self._heard = at
        rest: list[protocol.RequestEvent | protocol.Profiled] = []
        for event in events:
            match event:
                case protocol.Beat(busy):
                    self._busy = busy
                case protocol.Status(stats):
                    self.stats = stats
                case protocol.Starting(stage, what):
                    self.stage = stage
                    logger.info(stage, extra={"facts": {"what": what}})
                case protocol.Ready():
                    self.ready, self.health, self._failed_starts = event, Health.READY, 0
                    if not self._first.done():
                        self._first.set_result(None)
                case protocol.Stopped(reason, refused):
                    if not self._first.done():
                        self.health = Health.STOPPED
                        self._first.set_exception(ValueError(reason) if refused else RuntimeError(reason))
                    else:
                        self._fall(reason)
                case _:
                    rest.append(event)
        if rest:
            self._on_events(rest)

    async def _watch(self) -> None:
        while True:
            slept_at = time.monotonic()
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            if now - slept_at > 1 + _WATCH_SECONDS:
                continue  # it was this process that stood still; the worker's words are waiting to be read
            if self.health is not Health.READY or self._worker is None or not self._worker.watched:
                continue
            if now - self._heard > self._silence_seconds:
                self._fall(f"the engine was silent for {now - self._heard:.1f} s")
            elif self._busy > self._tick_seconds:
                self._fall(f"the engine spent {self._busy:.1f} s on one step")

    def _fall(self, reason: str) -> None:
        """Without a ``reason`` it has ended in good order, as the one that it follows has."""
        if self.health is Health.STARTING:
            self._failed_starts += 1
        self.health, self.reason, self.stats = Health.DOWN, reason, {}
        logger.log(logging.ERROR if reason else logging.INFO, "the engine is down: %s", reason or "host 0 has ended")
        self._on_down(reason)
        if self._may_restart:
            self._spawn(self._restart())
        else:
            self.health = Health.STOPPED
            self.lost.set()

    async def _restart(self) -> None:
        assert self._worker is not None
        self._worker.kill()
        await asyncio.to_thread(self._worker.join, _LAST_TICK_SECONDS)
        await asyncio.sleep(_backoff(self._failed_starts))
        self.restarts += 1
        self._launch()


def _backoff(failed_starts: int) -> float:
    """Seconds to wait before the next start."""
    return min(2.0**failed_starts, _MOST_SECONDS_BETWEEN_STARTS) if failed_starts else 0.0
