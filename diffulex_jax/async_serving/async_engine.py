"""``AsyncEngine``: the engine for asyncio programs, with or without HTTP."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import os
import pathlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

from diffulex_jax.async_serving import protocol
from diffulex_jax.async_serving.supervisor import Health, Supervisor
from diffulex_jax.async_serving.worker import Deliver, Factory, ProcessWorker, ThreadWorker, Worker
from diffulex_jax.engine.engine import Engine, Prompt
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.sampling_params import SamplingParams
from diffulex_jax.strategies import AnyStrategy


_SHORT_TEXT = 4000  # characters that are tokenised on the spot rather than in a thread


class RequestError(Exception):
    """A request ended without its answer; ``code``, ``message`` and ``field`` as in ``protocol.Failure``."""

    def __init__(self, code: int, message: str, *, field: str | None = None):
        super().__init__(message)
        self.code, self.message, self.field = code, message, field


class AsyncEngine:
    """Decodes requests for the coroutines of one event loop.

    ::

        async with AsyncEngine.from_pretrained("embedded", strategy="dmax") as engine:
            async for event in engine.stream("What is 12 + 30?", SamplingParams(accept_threshold=0.5)):
                ...

    ``stream`` yields the events of ``protocol``. Leaving it early, by ``break`` or cancellation, aborts the request.
    """

    def __init__(
        self,
        factory: Factory,
        *,
        isolation: Literal["thread", "process"] = "thread",
        compile_cache: str | os.PathLike[str] | None = None,
        silence_seconds: float = 3.0,
        tick_seconds: float = 120.0,
        restart: bool = True,
    ):
        """Args are those of :meth:`from_pretrained`; ``factory`` makes the engine, or several by strategy (and is pickled where that
        happens in a process). Without ``restart`` an engine that is lost stays so, and ``supervisor.lost`` is set."""
        if isolation not in ("thread", "process"):
            raise ValueError(f"isolation={isolation!r} must be 'thread' or 'process'")
        cache = None if compile_cache is None else pathlib.Path(compile_cache)

        def make_worker(deliver: Deliver) -> Worker:
            if isolation == "thread":
                return ThreadWorker(factory, deliver)
            return ProcessWorker(factory, deliver, cache=cache)

        self.supervisor = Supervisor(
            make_worker,
            on_events=self._on_events,
            on_down=self._on_down,
            silence_seconds=silence_seconds,
            tick_seconds=tick_seconds,
            restart=restart,
        )
        self.draining = False
        self._inboxes: dict[str, asyncio.Queue[protocol.RequestEvent]] = {}
        self._profiles: collections.deque[asyncio.Future[protocol.Profiled]] = collections.deque()
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        strategy: AnyStrategy | Sequence[AnyStrategy] | None = None,
        isolation: Literal["thread", "process"] = "thread",
        compile_cache: str | os.PathLike[str] | None = None,
        silence_seconds: float = 3.0,
        tick_seconds: float = 120.0,
        **engine_settings: Any,
    ) -> AsyncEngine:
        """Prepares to serve a model; :meth:`start`, or ``async with``, loads it.

        Args:
          model: as for ``Engine.from_pretrained``.
          strategy: one, or several. Each has slots and pages of its own, all share the parameters; requests choose by name, and the
            first is the default. None: the one that the model's authors decode it with.
          isolation: ``"thread"`` runs the engine in this process. ``"process"`` gives it one of its own, which is watched and, if it
            crashes, falls silent or hangs, ended and started anew; a script that asks for it needs the usual
            ``if __name__ == "__main__"``.
          compile_cache: (``"process"``) directory that keeps compiled programs; default: see ``diffulex_jax.compile_cache``.
          silence_seconds: (``"process"``) an engine that gives no sign of life for so long is taken for dead.
          tick_seconds: (``"process"``) longest time one step may take.
          **engine_settings: of ``Engine.from_pretrained``.
        """
        strategies = [strategy] if strategy is None or isinstance(strategy, AnyStrategy) else list(strategy)
        return cls(
            functools.partial(Engine.for_strategies, model, strategies, **engine_settings),
            isolation=isolation,
            compile_cache=compile_cache,
            silence_seconds=silence_seconds,
            tick_seconds=tick_seconds,
        )

    async def start(self) -> None:
        """Loads the model and compiles; returns when requests can be served.

        Raises:
          ValueError: when the model or a setting will not do.
          RuntimeError: when the engine could not be started for another reason.
        """
        await self.supervisor.start()
        if self.tokenizer is not None:
            await asyncio.to_thread(lambda: self._longest_token)  # loads it, too

    async def stop(self) -> None:
        """Ends the engine; requests in flight fail with code 503."""
        await self.supervisor.stop()
        self._on_down("the engine was stopped")

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where it has none, and before :meth:`start`."""
        if self._tokenizer is None and self.supervisor.ready is not None:
            self._tokenizer = self.supervisor.ready.tokenizer
        return self._tokenizer

    @property
    def facts(self) -> dict[str, Any]:
        """What the engine is: ``max_model_len``, ``vocab_size``, ``strategies`` and the like; empty before :meth:`start`."""
        return self.supervisor.ready.facts if self.supervisor.ready is not None else {}

    @property
    def follows(self) -> bool:
        """Whether the engine runs, and repeats what that of another host does."""
        return self.supervisor.health is Health.READY and bool(self.facts.get("host_index"))

    @property
    def in_flight(self) -> Sequence[str]:
        """Ids of requests that wait for an answer."""
        return list(self._inboxes)

    def strategy_named(self, name: str | None) -> str:
        """The name, or the default's where it is None.

        Raises:
          RequestError: (400) where there is no such strategy.
        """
        there = list(self.facts["strategies"])
        if name is not None and name not in there:
            message = f"strategy {name[:100]!r} is not served here; choose one of {', '.join(there)}"
            raise RequestError(400, message, field="strategy")
        return name or there[0]

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text. A long one is tokenised in a thread, one that could not fit is not tokenised at all.

        Raises:
          RequestError: (400) where the model has no tokenizer, or the text is longer than ``max_model_len`` tokens could hold.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError(400, "this model has no tokenizer; give the prompt as token ids", field="prompt")
        self.check_length("prompt", len(text))
        return tokenizer.encode(text) if len(text) <= _SHORT_TEXT else await asyncio.to_thread(tokenizer.encode, text)

    def check_length(self, name: str, characters: int) -> None:
        """Refuses text by its length alone, before any work is done for it.

        Raises:
          RequestError: (400) where ``max_model_len`` tokens could not hold it, were all of them the longest there is.
        """
        longest, each = self.facts["max_model_len"], self._longest_token
        if characters > longest * each:
            message = f"{name} has {characters} characters, which max_model_len={longest} tokens of at most {each} cannot hold"
            raise RequestError(400, message, field=name)

    @functools.cached_property
    def _longest_token(self) -> int:
        assert self.tokenizer is not None
        return self.tokenizer.longest_token

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        strategy: str | None = None,
        commits: bool = True,
        provisional: bool = False,
    ) -> AsyncGenerator[protocol.RequestEvent, None]:
        """Yields a request's events up to the Reply of its last output.

        Args:
          prompt: a text or token ids.
          params: the request's settings.
          id: what :meth:`abort` will call it; default: a new one.
          strategy: one of those there are; default: the first.
          commits: yield text as it becomes final; otherwise only Replies.
          provisional: yield every denoise step, too.

        Raises:
          RequestError: when the request will not do or its id is in use (400), it is aborted (499) or fails (500, 503).
        """
        params, id = params or SamplingParams(), id or uuid.uuid4().hex
        ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
        if self.supervisor.health is not Health.READY:
            raise RequestError(503, f"the engine is {self.supervisor.health.value} ({self.supervisor.reason or 'not started yet'})")
        if self.follows:
            raise RequestError(503, f"this is host {self.facts['host_index']} of {self.facts['hosts']}, which follows: ask host 0")
        if self.draining:
            raise RequestError(503, "the server is shutting down")
        if id in self._inboxes:
            raise RequestError(400, f"the request id {id!r} is in use")
        strategy = self.strategy_named(strategy)
        inbox = self._inboxes[id] = asyncio.Queue()
        outstanding = params.n
        try:
            self.supervisor.send(
                protocol.Generate(id=id, prompt=tuple(ids), params=params, strategy=strategy, commits=commits, provisional=provisional)
            )
            while outstanding:
                event = await inbox.get()
                if isinstance(event, protocol.Failure):
                    outstanding = 0
                    raise RequestError(event.code, event.message, field=event.field)
                outstanding -= isinstance(event, protocol.Reply)
                yield event
        finally:
            del self._inboxes[id]
            if outstanding:
                self.supervisor.send(protocol.Abort(id))

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, id: str | None = None, strategy: str | None = None
    ) -> list[protocol.Reply]:
        """The Replies of a request, in the order of their index.

        Raises:
          RequestError: as :meth:`stream`.
        """
        async with contextlib.aclosing(self.stream(prompt, params, id=id, strategy=strategy, commits=False)) as events:
            replies = [event async for event in events if isinstance(event, protocol.Reply)]
        return sorted(replies, key=lambda reply: reply.index)

    def abort(self, id: str) -> bool:
        """Ends a request, whose stream then raises (499); says whether there is one."""
        if id in self._inboxes:
            self.supervisor.send(protocol.Abort(id))
        return id in self._inboxes

    async def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits for those there are; what is not done in time fails (503). Says whether all were done.

        One that follows waits for the end of the one that leads: without it that could finish nothing.
        """
        self.draining = True
        self.supervisor.send(protocol.Drain())
        deadline = time.monotonic() + seconds
        while (self._inboxes or self.follows) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        done = not self._inboxes
        self._on_down("the server is shutting down")
        return done

    async def start_profile(self, directory: str) -> None:
        """Begins a JAX profiler trace of the engine's process.

        Raises:
          RequestError: where one is being taken already or the directory will not do (400), or the engine is down (503).
        """
        await self._profile(protocol.StartProfile(directory))

    async def stop_profile(self) -> None:
        """Ends the profiler trace, and returns when it is written.

        Raises:
          RequestError: where none is being taken (400), or the engine is down (503).
        """
        await self._profile(protocol.StopProfile())

    async def _profile(self, command: protocol.StartProfile | protocol.StopProfile) -> None:
        if self.supervisor.health is not Health.READY:
            raise RequestError(503, f"the engine is {self.supervisor.health.value}")
        done: asyncio.Future[protocol.Profiled] = asyncio.get_running_loop().create_future()
        self._profiles.append(done)
        self.supervisor.send(command)
        if error := (await done).error:
            raise RequestError(400, error)

    def _on_events(self, events: Sequence[protocol.RequestEvent | protocol.Profiled]) -> None:
        for event in events:
            if isinstance(event, protocol.Profiled):
                _answer(self._profiles.popleft(), event)
            elif event.id in self._inboxes:
                self._inboxes[event.id].put_nowait(event)

    def _on_down(self, reason: str) -> None:
        for id, inbox in self._inboxes.items():
            inbox.put_nowait(protocol.Failure(id=id, code=503, message=reason))
        while self._profiles:
            _answer(self._profiles.popleft(), RequestError(503, reason))


def _answer(waiting: asyncio.Future[protocol.Profiled], answer: protocol.Profiled | RequestError) -> None:
    if waiting.done():  # whoever waited has gone
        return
    if isinstance(answer, RequestError):
        waiting.set_exception(answer)
    else:
        waiting.set_result(answer)
