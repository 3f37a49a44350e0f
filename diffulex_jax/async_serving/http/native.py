"""``/generate``, and ``/tokenize``, ``/detokenize``, ``/abort``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diffulex_jax.async_serving import records
from diffulex_jax.async_serving.http import work
from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.requests import Abort, Detokenize, Generate, Tokenize
from diffulex_jax.async_serving.http.service import Service
from diffulex_jax.async_serving.http.sse import EventStream, frame, while_connected
from diffulex_jax.async_serving.protocol import Commit, Provisional, Reply


async def generate(service: Service, form: Generate, request: Request) -> Response:
    """Decodes one prompt; answers with the record ``final`` of ``records`` (``{"outputs": [...]}`` of them where n is above 1)."""
    params = form.params(adapter_name=service.adapter_of(form.model))
    denoise = form.stream and form.stream_mode == "denoise"
    prompts = await work.prompts_of(service, form.prompt, n=params.n)
    job = work.Job.of(request, service, form=form, prompts=prompts, params=params, commits=form.stream, provisional=denoise)
    if form.stream:
        return await streamed(service, _frames(service, job, denoise=denoise), request)
    replies = await gathered(service, job, request)
    outputs = [records.final(reply, job.id, prompt_tokens=job.prompt_tokens) for reply in replies]
    return JSONResponse(outputs[0] if params.n == 1 else {"outputs": outputs})


async def _frames(service: Service, job: work.Job, *, denoise: bool) -> AsyncGenerator[bytes, None]:
    committed: dict[int, int] = {}
    async with contextlib.aclosing(work.events(service, job)) as events:
        async for event in events:
            match event:
                case Commit() if denoise:
                    committed[event.index] = event.offset + len(event.token_ids)
                case Commit():
                    yield frame(records.append(event, job.id))
                case Provisional():
                    yield frame(
                        records.buffer_snapshot(
                            event,
                            job.id,
                            prompt_tokens=job.prompt_tokens,
                            committed=committed.get(event.index, 0),
                            tokenizer=service.engine.tokenizer,
                        )
                    )
                case Reply():
                    yield frame(records.final(event, job.id, prompt_tokens=job.prompt_tokens))
                case _:
                    yield b""  # accepted


async def streamed(service: Service, frames: AsyncGenerator[bytes, None], request: Request) -> Response:
    """A stream that has begun: the first item of ``frames`` is there once the engine has accepted the request, and what fails
    until then has a status of its own.
    """
    settings = service.settings
    first = await while_connected(request.receive, anext(frames), seconds=settings.request_seconds)
    return EventStream(first, frames, seconds=settings.request_seconds, ping_seconds=settings.ping_seconds)


async def gathered(service: Service, job: work.Job, request: Request) -> list[Reply]:
    """The Replies of a job in order, unless its client goes away first."""

    async def collect() -> list[Reply]:
        async with contextlib.aclosing(work.events(service, job)) as events:
            return sorted([e async for e in events if isinstance(e, Reply)], key=lambda reply: reply.index)

    replies: list[Reply] = await while_connected(request.receive, collect(), seconds=service.settings.request_seconds)
    return replies


async def tokenize(service: Service, form: Tokenize) -> dict[str, Any]:
    """Token ids of a text or a conversation."""
    service.check_model(form.model)
    longest = service.facts["max_model_len"]
    if (form.prompt is None) == (form.messages is None):
        raise ApiError(400, "give exactly one of prompt and messages", param="prompt")
    ids = await service.engine.encode(form.prompt) if form.prompt is not None else await work.conversation_of(service, form.messages or [])
    return {"tokens": ids, "count": len(ids), "max_model_len": longest}


async def detokenize(service: Service, form: Detokenize) -> dict[str, Any]:
    """The text of token ids, special tokens left out; and its ``parts``, where they are spelled."""
    service.check_model(form.model)
    size, tokenizer = service.facts["vocab_size"], service.engine.tokenizer
    if tokenizer is None:
        raise ApiError(400, "this model has no tokenizer", param="tokens")
    if len(form.tokens) > service.facts["max_model_len"]:
        message = f"tokens has {len(form.tokens)} ids; no output has more than max_model_len={service.facts['max_model_len']}"
        raise ApiError(400, message, param="tokens")
    if outside := [token for token in form.tokens if token >= size]:
        raise ApiError(400, f"token id {outside[0]} is outside the vocabulary [0, {size})", param="tokens")
    text = await asyncio.to_thread(tokenizer.decode, form.tokens)
    parts = await asyncio.to_thread(tokenizer.spelled, form.tokens)
    return {"prompt": text, "parts": [part._asdict() for part in parts]}


async def abort(service: Service, form: Abort) -> dict[str, Any]:
    """Ends the request whose answer has this id, or every request that came with it as ``X-Request-Id``: their clients get a 499."""
    own = form.request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
    jobs = {id_ for id_, client_id in service.client_ids.items() if own == id_ or form.request_id == client_id}
    engine_ids = [engine_id for engine_id in service.engine.in_flight if engine_id.rpartition("/")[0] in jobs]
    if not engine_ids:
        raise ApiError(404, f"no request {form.request_id!r} is in flight", param="request_id")
    for engine_id in engine_ids:
        service.engine.abort(engine_id)
    return {"aborted": form.request_id}
