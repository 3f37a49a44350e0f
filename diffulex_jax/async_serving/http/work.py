"""One HTTP request as requests to the engine: a prompt or several, each with n outputs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request

from diffulex_jax.async_serving.async_engine import RequestError
from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.messages import Message
from diffulex_jax.async_serving.http.metrics import Watch
from diffulex_jax.async_serving.http.requests import Sampling
from diffulex_jax.async_serving.http.service import Service
from diffulex_jax.async_serving.protocol import Commit, Provisional, Reply, RequestEvent
from diffulex_jax.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Prompts to decode alike.

    Attributes:
      id: of the answer; the server's own, like no other's.
      form: what was asked.
      client_id: the ``X-Request-Id``, which other requests may have, too.
      prompts: token ids.
      params: for each prompt.
      strategy: the one that decodes them.
      facts: what the log will say of the request: its ``id``, and ``seeds`` by output, null where it got none done.
      arrival: holds the place that was kept for the request since it arrived.
      commits, provisional: which events are wanted beside Replies.
    """

    id: str
    form: Sampling
    client_id: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    strategy: str
    facts: dict[str, Any]
    arrival: contextlib.ExitStack
    commits: bool = False
    provisional: bool = False

    @classmethod
    def of(cls, request: Request, service: Service, *, form: Sampling, **fields: Any) -> Job:
        """The job of a request that has arrived; ``fields`` are the rest."""
        state, id_ = request.state, uuid.uuid4().hex
        state.facts["id"] = id_
        strategy = service.engine.strategy_named(form.strategy)
        return cls(id=id_, form=form, client_id=state.request_id, facts=state.facts, arrival=state.arrival, strategy=strategy, **fields)

    @property
    def num_outputs(self) -> int:
        return len(self.prompts) * self.params.n

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


async def events(service: Service, job: Job) -> AsyncGenerator[RequestEvent, None]:
    """The events of all prompts, outputs numbered through: output j of prompt i is ``i * n + j``. First comes one Accepted a
    prompt, when the engine has accepted them all. Leaving aborts what is not done.

    Raises:
      ApiError: 429 where the server has no room.
      RequestError: as ``AsyncEngine.stream``.
    """
    job.arrival.close()
    with service.places.take(job.strategy, job.num_outputs, job.prompt_tokens), service.known_as(job.id, job.client_id):
        async with contextlib.AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(
                    contextlib.aclosing(
                        service.engine.stream(
                            prompt,
                            job.params,
                            id=f"{job.id}/{i}",
                            strategy=job.strategy,
                            commits=job.commits,
                            provisional=job.provisional,
                        )
                    )
                )
                for i, prompt in enumerate(job.prompts)
            ]
            watch = Watch(service.metrics, job.strategy)
            accepted = await asyncio.gather(*(anext(stream) for stream in streams), return_exceptions=True)
            for outcome in accepted:
                if isinstance(outcome, RequestError):
                    raise RequestError(outcome.code, outcome.message, field=job.form.blamed(outcome.field)) from outcome
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
            service.metrics.prompt_tokens.inc(job.prompt_tokens)
            seeds: list[int | None] = [None] * job.num_outputs
            job.facts["seeds"] = seeds
            async for event in _merge(streams, job.params.n) if len(streams) > 1 else streams[0]:
                match event:
                    case Commit():
                        watch.commit(event)
                    case Reply():
                        watch.reply(event)
                        seeds[event.index] = event.seed
                yield event


async def _merge(streams: Sequence[AsyncGenerator[RequestEvent, None]], n: int) -> AsyncGenerator[RequestEvent, None]:
    """What several streams yield, as it comes, with the outputs numbered through."""
    queue: asyncio.Queue[RequestEvent | Exception | None] = asyncio.Queue()

    async def pump(first: int, stream: AsyncGenerator[RequestEvent, None]) -> None:
        try:
            async for event in stream:
                if isinstance(event, (Commit, Provisional, Reply)):
                    queue.put_nowait(dataclasses.replace(event, index=first + event.index))
        except Exception as error:
            queue.put_nowait(error)
        queue.put_nowait(None)

    tasks = [asyncio.ensure_future(pump(i * n, stream)) for i, stream in enumerate(streams)]
    try:
        ended = 0
        while ended < len(streams):
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                ended += 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def prompts_of(service: Service, prompt: str | list[int] | list[str | list[int]], *, n: int = 1) -> list[list[int]]:
    """Token ids of every prompt of a request, each to be decoded ``n`` times.

    Raises:
      ApiError, RequestError: 400, before anything is tokenised that could never be served.
    """
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    service.places.check(outputs=len(several) * n, blamed="prompt" if n == 1 else "n")
    longest = service.facts["max_model_len"]
    for one in several:
        if isinstance(one, list) and len(one) >= longest:
            message = f"prompt has {len(one)} tokens; that leaves no room for an answer within max_model_len={longest}"
            raise ApiError(400, message, param="prompt")
    return [await service.engine.encode(p) if isinstance(p, str) else p for p in several]


async def conversation_of(service: Service, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation, through the model's chat template."""
    tokenizer = service.engine.tokenizer
    if tokenizer is None:
        raise ApiError(400, "this model has no tokenizer; use /generate with token ids", param="messages")
    longest = service.facts["max_model_len"]
    if len(messages) > longest:  # each is a token at the least
        raise ApiError(400, f"{len(messages)} messages do not fit within max_model_len={longest}", param="messages")
    service.engine.check_length("messages", sum(message.characters for message in messages))
    try:
        return await asyncio.to_thread(tokenizer.apply_chat_template, [message.plain() for message in messages])
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error
