"""``/v1/completions`` and ``/v1/chat/completions``: OpenAI's shapes, with diffusion's extras where they were asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diffulex_jax.async_serving import records
from diffulex_jax.async_serving.http import work
from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.native import gathered, streamed
from diffulex_jax.async_serving.http.openai_requests import Chat, Completion, Diffusion, OpenAI
from diffulex_jax.async_serving.http.service import Service
from diffulex_jax.async_serving.http.sse import frame
from diffulex_jax.async_serving.protocol import Commit, Provisional, Reply
from diffulex_jax.engine.pieces import Piece, Reader
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.sampling_params import SamplingParams


_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_PADDED_TO = 256  # bytes: lengths of encrypted frames then say little about the text in them
_FINISH_REASONS = {"max_nfe": "length", "repetition": "length"}  # OpenAI knows "stop" and "length"


async def completions(service: Service, form: Completion, request: Request) -> Response:
    """Continues texts."""
    adapter = service.adapter_of(form.model)
    form.check()
    params = form.params(
        max_tokens=_DEFAULT_COMPLETION_TOKENS if form.max_tokens is None else form.max_tokens,
        logprobs=form.logprobs is not None,
        return_step_map=form.diffusion.step_map,
        adapter_name=adapter,
    )
    prompts = await work.prompts_of(service, form.prompt, n=params.n)
    return await _answer(Shape(service, _job(service, request, form, prompts, params), form, chat=False), request)


async def chat_completions(service: Service, form: Chat, request: Request) -> Response:
    """Answers a conversation."""
    adapter = service.adapter_of(form.model)
    form.check()
    prompt = await work.conversation_of(service, form.messages)
    most = form.max_tokens if form.max_completion_tokens is None else form.max_completion_tokens
    params = form.params(
        max_tokens=max(1, service.facts["max_model_len"] - len(prompt)) if most is None else most,
        logprobs=bool(form.logprobs),
        return_step_map=form.diffusion.step_map,
        adapter_name=adapter,
    )
    return await _answer(Shape(service, _job(service, request, form, [prompt], params), form, chat=True), request)


def _job(service: Service, request: Request, form: OpenAI, prompts: Sequence[Sequence[int]], params: SamplingParams) -> work.Job:
    events = {"commits": bool(form.stream), "provisional": form.diffusion.provisional}
    return work.Job.of(request, service, form=form, prompts=prompts, params=params, **events)


async def _answer(shape: Shape, request: Request) -> Response:
    if shape.service.engine.tokenizer is None:
        raise ApiError(400, "this model has no tokenizer; use /generate with token ids")
    if shape.form.stream:
        return await streamed(shape.service, _frames(shape), request)
    replies = await gathered(shape.service, shape.job, request)
    return JSONResponse(shape.whole(replies))


async def _frames(shape: Shape) -> AsyncGenerator[bytes, None]:
    replies: list[Reply] = []
    async with contextlib.aclosing(work.events(shape.service, shape.job)) as events:
        for _ in shape.job.prompts:
            await anext(events)  # accepted
        yield b"".join(frame(shape.chunk(i, **shape.opening)) for i in range(shape.job.num_outputs)) if shape.chat else b""
        async for event in events:
            match event:
                case Commit():
                    yield frame(shape.chunk(event.index, **shape.delta(event)))
                case Provisional():
                    yield frame(shape.snapshot(event), "diffusion")
                case Reply():
                    replies.append(event)
                    yield frame(shape.chunk(event.index, **shape.closing(event)))
    if shape.form.stream_options is not None and shape.form.stream_options.include_usage:
        yield frame(shape.envelope(choices=[], usage=shape.usage(replies)))


@dataclasses.dataclass
class Shape:
    """The objects of one answer, as a chat's or a completion's.

    Attributes:
      committed: by output, the tokens its stream has given out.
      readers: by output, what its log probabilities have told of its tokens' text.
      characters: by output, the length of that text (completions' ``text_offset``).
    """

    service: Service
    job: work.Job
    form: OpenAI
    chat: bool
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    committed: dict[int, int] = dataclasses.field(default_factory=dict)
    readers: dict[int, Reader] = dataclasses.field(default_factory=dict)
    characters: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def wants(self) -> Diffusion:
        return self.form.diffusion

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.service.engine.tokenizer
        assert tokenizer is not None
        return tokenizer

    def envelope(self, **fields: Any) -> dict[str, Any]:
        """What every object has."""
        kind = ("chat.completion" + ".chunk" * bool(self.form.stream)) if self.chat else "text_completion"
        id_ = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.job.id}"
        model = self.job.params.adapter_name or self.service.model
        return {"id": id_, "object": kind, "created": self.created, "model": model, **fields}

    def chunk(self, index: int, **fields: Any) -> dict[str, Any]:
        """One chunk of a stream, of one output."""
        chunk = self.envelope(choices=[{"index": index} | fields | {name: fields.get(name) for name in ("logprobs", "finish_reason")}])
        if self.form.stream_options is not None and self.form.stream_options.include_obfuscation:
            chunk["obfuscation"] = "x" * (-len(frame(chunk)) % _PADDED_TO)
        return chunk

    @property
    def opening(self) -> dict[str, Any]:
        """A chat's first chunk: the role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, event: Commit) -> dict[str, Any]:
        """Text that became final."""
        self.committed[event.index] = event.offset + len(event.token_ids)
        fields: dict[str, Any] = {"delta": {"content": event.text}} if self.chat else {"text": event.text}
        if event.logprobs is not None:
            reader = self.readers.setdefault(event.index, self.tokenizer.reader())
            pieces = [self.tokenizer.take(reader, token) for token in event.token_ids]
            fields["logprobs"] = self.logprobs(event.index, pieces, event.logprobs)
        return fields

    def closing(self, event: Reply) -> dict[str, Any]:
        """The chunk with the finish reason."""
        empty: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return empty | self.ending(event)

    def ending(self, event: Reply) -> dict[str, Any]:
        """Why an output ended and the seed it had; its step map and times where those were asked for."""
        fields: dict[str, Any] = {"finish_reason": _FINISH_REASONS.get(event.finish_reason, event.finish_reason), "seed": event.seed}
        if self.wants.step_map:
            fields["step_map"] = event.step_map
        if self.wants.timings:
            fields["timings"] = {
                "queue_seconds": event.queue_seconds,
                "first_block_seconds": event.first_block_seconds,
                "seconds": event.seconds,
                "tokens_per_forward": records.tokens_per_forward(event),
            }
        return fields

    def snapshot(self, event: Provisional) -> dict[str, Any]:
        """A provisional patch; the record ``buffer_snapshot`` of ``records``."""
        n = self.job.params.n
        return records.buffer_snapshot(
            event,
            self.envelope()["id"],
            prompt_tokens=len(self.job.prompts[event.index // n]),
            committed=self.committed.get(event.index, 0),
            tokenizer=self.tokenizer,
        )

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The answer that is no stream."""
        choices = []
        for reply in replies:
            text = reply.text or ""
            content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            logprobs = None
            if reply.logprobs is not None:
                logprobs = self.logprobs(reply.index, self.tokenizer.pieces(reply.token_ids), reply.logprobs)
            choices.append({"index": reply.index, **content, "logprobs": logprobs, **self.ending(reply)})
        return self.envelope(choices=choices, usage=self.usage(replies))

    def logprobs(self, index: int, pieces: Sequence[Piece], logprobs: tuple[float, ...]) -> dict[str, Any]:
        """OpenAI's two shapes. A log probability is that of the token when it was accepted or last revised. A token that ends within a
        character has bytes of its own and no text: that comes with the token that completes the character."""
        values = records.finite(logprobs) or []
        if self.chat:
            content = [
                {"token": piece.text, "logprob": value, "bytes": list(piece.bytes), "top_logprobs": []}
                for piece, value in zip(pieces, values, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets, at = [], self.characters.get(index, 0)
        for piece in pieces:
            offsets.append(at)
            at += len(piece.text)
        self.characters[index] = at
        return {"tokens": [piece.text for piece in pieces], "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}

    def usage(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Tokens in and out; and what they cost, where that was asked for."""
        made, nfe = sum(len(reply.token_ids) for reply in replies), sum(reply.nfe for reply in replies)
        usage: dict[str, Any] = {
            "prompt_tokens": self.job.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.job.prompt_tokens + made,
        }
        if self.wants.usage:
            usage["completion_tokens_details"] = {
                "nfe": nfe,
                "tokens_per_forward": made / nfe if nfe else 0.0,
                "revised_tokens": sum(reply.revised_tokens for reply in replies),
                "remasked_tokens": sum(reply.remasked_tokens for reply in replies),
            }
        return usage
