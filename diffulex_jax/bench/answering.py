"""What ``bench e2e`` measures: an engine of this process, or any server that speaks OpenAI's completions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from diffulex_jax.engine.engine import Engine
from diffulex_jax.sampling_params import SamplingParams


class Answers(NamedTuple):
    """What came of prompts that were given at once.

    Attributes:
      seconds: until all were answered.
      tokens: of all answers.
      forwards: of all requests, prefill not counted; None where nobody says.
      first: for each request, the seconds until its first tokens: of a server since they were asked for, of an engine since it had a slot.
    """

    seconds: float
    tokens: int
    forwards: int | None
    first: list[float]


class Answering(Protocol):
    """Answers prompts.

    Attributes:
      vocabulary: ids that a random prompt may have.
    """

    @property
    def vocabulary(self) -> np.ndarray: ...

    def answer(self, prompts: Sequence[list[int]], *, output: int, tokens_per_forward: int | None) -> Answers:
        """Answers all prompts with ``output`` tokens each, whose masks are filled so many a step; None: as the model likes best."""


class InProcess(NamedTuple):
    """An engine of this process."""

    engine: Engine

    @property
    def vocabulary(self) -> np.ndarray:
        spec = self.engine.model.spec
        return np.setdiff1d(np.arange(spec.vocab_size), (spec.mask_id, *spec.eos_ids))

    def answer(self, prompts: Sequence[list[int]], *, output: int, tokens_per_forward: int | None) -> Answers:
        began = time.perf_counter()
        outputs = self.engine.generate(prompts, SamplingParams(max_tokens=output, **_settings(tokens_per_forward)))
        seconds = time.perf_counter() - began
        first = [o.first_block_seconds or 0.0 for o in outputs]
        return Answers(seconds, sum(len(o.token_ids) for o in outputs), sum(o.nfe for o in outputs), first)


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

    def answer(self, prompts: Sequence[list[int]], *, output: int, tokens_per_forward: int | None) -> Answers:
        """See :class:`Answering`. Without ``tokens_per_forward`` no request has a field that is not OpenAI's but ``ignore_eos``.

        Raises:
          OSError: when there is no server.
          ValueError: with what the server says against a request.
        """
        return asyncio.run(self._answer(prompts, output, tokens_per_forward))

    async def _answer(self, prompts: Sequence[list[int]], output: int, tokens_per_forward: int | None) -> Answers:
        from diffulex_jax.bench.client import HTTPError, client  # needs an extra

        asked: dict[str, Any] = {"model": self.model, "max_tokens": output, "temperature": 0, "stream": True, "ignore_eos": True}
        asked["stream_options"] = {"include_usage": True}
        if tokens_per_forward:  # which nobody else's servers know, nor ours how to say what it took without being asked
            asked |= _settings(tokens_per_forward) | {"diffusion": {"usage": True}}
        async with client(self.url, self.api_key) as connection:

            async def one(prompt: list[int]) -> tuple[float, dict[str, Any]]:
                sent, first = time.perf_counter(), 0.0
                usage: dict[str, Any] = {}
                async with connection.stream("POST", "/v1/completions", json=asked | {"prompt": prompt}) as response:
                    if response.status_code != 200:
                        raise ValueError(f"{self.url} says {response.status_code}: {(await response.aread()).decode()[:500]}")
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            event = json.loads(line.removeprefix("data: "))
                            if "error" in event:
                                raise ValueError(f"{self.url} says {event['error']}")
                            first = first or (time.perf_counter() - sent if event.get("choices") else 0.0)
                            usage = event.get("usage") or usage
                return first, usage

            began = time.perf_counter()
            try:
                answers = await asyncio.gather(*map(one, prompts))
            except HTTPError as error:
                raise OSError(f"no server answers at {self.url}: {error!r}") from error
            seconds = time.perf_counter() - began
        nfe = [usage.get("completion_tokens_details", {}).get("nfe") for _, usage in answers]
        tokens = sum(usage.get("completion_tokens", 0) for _, usage in answers)
        return Answers(seconds, tokens, None if None in nfe else sum(nfe), [first for first, _ in answers])


def _settings(tokens_per_forward: int | None) -> dict[str, Any]:
    """No prediction is above a threshold of 2: every step fills as many masks as it must."""
    always = {"ignore_eos": True, "max_repetition_run": 2**30}
    return always if tokens_per_forward is None else always | {"num_to_transfer": tokens_per_forward, "accept_threshold": 2.0}
