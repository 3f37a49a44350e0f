"""What ``bench e2e`` measures: an engine of this process, or any server that speaks OpenAI's completions."""

from __future__ import annotations

import asyncio
import collections
import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from diffulex_jax.engine.engine import Engine
from diffulex_jax.sampling_params import SamplingParams


if TYPE_CHECKING:
    from httpx import AsyncClient


ALL = 2**15
"""Masks that a step fills where it is to fill all there are."""


class Flood(NamedTuple):
    """Prompts given beside others, for one token each: the next as soon as one is answered, until the others are.

    Attributes:
      prompts: without an end.
      at_once: how many are under way at any time.
    """

    prompts: Iterator[list[int]]
    at_once: int


class Answers(NamedTuple):
    """What came of prompts.

    Attributes:
      seconds: until all were answered.
      tokens: of all answers.
      forwards: of all requests, prefill not counted; None where nobody says.
      came: for each request, when tokens of it came, in seconds since it was to be asked for.
      beside: for each prompt of a flood that was answered meanwhile, the seconds it took.
    """

    seconds: float
    tokens: int
    forwards: int | None
    came: list[list[float]]
    beside: list[float]

    @property
    def first(self) -> list[float]:
        """For each request, the seconds until its first tokens."""
        return [moments[0] for moments in self.came if moments]

    @property
    def gaps(self) -> list[float]:
        """The seconds between tokens that came and the next of the same request: a block, or several at once."""
        return [gap for moments in self.came for gap in np.diff(moments).tolist()]


class Answering(Protocol):
    """Answers prompts.

    Attributes:
      vocabulary: ids that a random prompt may have.
    """

    @property
    def vocabulary(self) -> np.ndarray: ...

    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        output: int,
        tokens_per_forward: int | None,
        moments: Sequence[float] = (),
        flood: Flood | None = None,
    ) -> Answers:
        """Answers prompts with ``output`` tokens each.

        Args:
          prompts: token ids.
          output: tokens of each answer.
          tokens_per_forward: so many masks are filled a step; None: as the model likes best.
          moments: when each is asked for, in seconds from now, rising; empty: all at once.
          flood: what is asked for beside them.
        """


class InProcess(NamedTuple):
    """An engine of this process, which nobody else uses."""

    engine: Engine

    @property
    def vocabulary(self) -> np.ndarray:
        spec = self.engine.model.spec
        return np.setdiff1d(np.arange(spec.vocab_size), (spec.mask_id, *spec.eos_ids))

    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        output: int,
        tokens_per_forward: int | None,
        moments: Sequence[float] = (),
        flood: Flood | None = None,
    ) -> Answers:
        """See :class:`Answering`. Tokens come when ``Engine.step`` has returned."""
        engine, params = self.engine, SamplingParams(max_tokens=output, **_settings(tokens_per_forward))
        one = SamplingParams(max_tokens=1, **_settings(tokens_per_forward and ALL))
        due = collections.deque(zip(moments or [0.0] * len(prompts), prompts, strict=True))
        asked: dict[int, tuple[float, list[float]]] = {}  # by id: when, and when tokens came
        made: dict[int, int] = {}  # tokens of those under way
        flooding: dict[int, float] = {}
        beside: list[float] = []
        tokens = forwards = 0
        began = time.perf_counter()
        while due or made:
            now = time.perf_counter() - began
            while due and due[0][0] <= now:
                at, prompt = due.popleft()
                (id_,) = engine.add(prompt, params)
                asked[id_], made[id_] = (at, []), 0
            while flood and len(flooding) < flood.at_once:
                (id_,) = engine.add(next(flood.prompts), one)
                flooding[id_] = now
            if not engine.has_work:
                time.sleep(due[0][0] - now)
                continue
            ended = engine.step()
            now = time.perf_counter() - began
            for id_, before in list(made.items()):
                made[id_] = len(ended[id_].token_ids if id_ in ended else engine.progress(id_).tokens)
                if made[id_] > before:
                    asked[id_][1].append(now - asked[id_][0])
                if id_ in ended:
                    del made[id_]
                    tokens, forwards = tokens + len(ended[id_].token_ids), forwards + ended[id_].nfe
            beside += [now - flooding.pop(id_) for id_ in ended if id_ in flooding]
        seconds = time.perf_counter() - began
        for id_ in flooding:
            engine.discard(id_)
        return Answers(seconds, tokens, forwards, [came for _, came in asked.values()], beside)


class OverHTTP(NamedTuple):
    """A server that speaks OpenAI's completions, streams, and takes prompts as token ids: ours, vLLM's, SGLang's.

    Attributes:
      url: of the server, without a path.
      model: its name there.
      ids: random prompts are made of ids below this one.
      api_key: sent with every request, if not empty.
    """

    url: str
    model: str
    ids: int
    api_key: str = ""

    @property
    def vocabulary(self) -> np.ndarray:
        return np.arange(self.ids)

    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        output: int,
        tokens_per_forward: int | None,
        moments: Sequence[float] = (),
        flood: Flood | None = None,
    ) -> Answers:
        """See :class:`Answering`. Without ``tokens_per_forward`` no request has a field that is not OpenAI's but ``ignore_eos``.

        Raises:
          OSError: when there is no server.
          ValueError: with what the server says against a request.
        """
        from diffulex_jax.bench.client import HTTPError  # needs an extra

        try:
            return asyncio.run(self._answer(prompts, output, tokens_per_forward, moments or [0.0] * len(prompts), flood))
        except HTTPError as error:
            raise OSError(f"no server answers at {self.url}: {error!r}") from error

    async def _answer(
        self, prompts: Sequence[list[int]], output: int, tokens_per_forward: int | None, moments: Sequence[float], flood: Flood | None
    ) -> Answers:
        from diffulex_jax.bench.client import client

        asked: dict[str, Any] = {"model": self.model, "max_tokens": output, "temperature": 0, "stream": True, "ignore_eos": True}
        asked["stream_options"] = {"include_usage": True}
        if tokens_per_forward:  # which nobody else's servers know, nor ours how to say what it took without being asked
            asked |= _settings(tokens_per_forward) | {"diffusion": {"usage": True}}
        briefly = asked | {"max_tokens": 1} | (_settings(ALL) if tokens_per_forward else {})
        beside: list[float] = []
        async with client(self.url, self.api_key) as connection:

            async def one(prompt: list[int], at: float) -> tuple[list[float], dict[str, Any]]:
                await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                came, usage = await self._stream(connection, asked | {"prompt": prompt})
                return [moment - began - at for moment in came], usage

            async def go_on(flood: Flood) -> None:
                for prompt in flood.prompts:
                    sent = time.perf_counter()
                    await self._stream(connection, briefly | {"prompt": prompt})
                    beside.append(time.perf_counter() - sent)

            began = time.perf_counter()
            floods = [asyncio.create_task(go_on(flood)) for _ in range(flood.at_once)] if flood else []
            answers = await asyncio.gather(*map(one, prompts, moments))
            seconds = time.perf_counter() - began
            for task in floods:
                task.cancel()
            for ended in await asyncio.gather(*floods, return_exceptions=True):
                if isinstance(ended, Exception):  # which a task that was cancelled has none of
                    raise ended
        nfe = [usage.get("completion_tokens_details", {}).get("nfe") for _, usage in answers]
        tokens = sum(usage.get("completion_tokens", 0) for _, usage in answers)
        return Answers(seconds, tokens, None if None in nfe else sum(nfe), [came for came, _ in answers], beside)

    async def _stream(self, connection: AsyncClient, form: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
        """When tokens came, as ``time.perf_counter()`` has it, and what the server says they took."""
        came: list[float] = []
        usage: dict[str, Any] = {}
        async with connection.stream("POST", "/v1/completions", json=form) as response:
            if response.status_code != 200:
                raise ValueError(f"{self.url} says {response.status_code}: {(await response.aread()).decode()[:500]}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ValueError(f"{self.url} says {event['error']}")
                    if any(choice.get("text") or not choice.get("finish_reason") for choice in event.get("choices", ())):
                        came.append(time.perf_counter())
                    usage = event.get("usage") or usage
        return came, usage


def _settings(tokens_per_forward: int | None) -> dict[str, Any]:
    """No prediction is above a threshold of 2: every step fills as many masks as it must."""
    always = {"ignore_eos": True, "max_repetition_run": 2**30}
    return always if tokens_per_forward is None else always | {"num_to_transfer": tokens_per_forward, "accept_threshold": 2.0}
