"""What requests may hold, field by field. Unknown fields, and values that would be ignored, are errors that name them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from diffulex_jax.async_serving.http.errors import ApiError, bad_setting
from diffulex_jax.sampling_params import SamplingParams


class Strict(BaseModel):
    """No unknown fields, no strings for numbers, no NaN, no text that cannot be encoded."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _encodable(cls, value: Any) -> Any:
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair is no character") from None
        return value


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0, le=0)]
Given = Annotated[dict[str, TokenId], Field(description='token ids by offset: {"0": 17}')]


class Sampling(Strict):
    """``strategy``, one of those the server has, and the fields of ``SamplingParams``, where each is explained; null means the
    default. They go beside OpenAI's own."""

    strategy: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[TokenId] | None = None
    max_repetition_run: int | None = None
    pinned: Given | None = None
    init_tokens: Given | None = None
    max_nfe: int | None = None
    accept_threshold: float | None = None
    num_to_transfer: int | None = None
    denoising_steps: int | None = None
    edit_threshold: float | None = None
    max_post_edit_steps: int | None = None
    remask_threshold: float | None = None
    settle_threshold: float | None = None
    penalty_lambda: float | None = None
    add_block_threshold: float | None = None
    token_stability_threshold: float | None = None
    semi_complete_threshold: float | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

    def params(self, **settings: Any) -> SamplingParams:
        """The engine's settings, ``settings`` going first.

        Raises:
          ApiError: 400, naming the field.
        """
        given: dict[str, Any] = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(SamplingParams)} | settings
        for name in ("pinned", "init_tokens"):
            if given[name] is not None:
                given[name] = _offsets(name, given[name])
        try:
            return SamplingParams(**{name: value for name, value in given.items() if value is not None})
        except ValueError as error:
            raise bad_setting(error) from error


def _offsets(name: str, tokens: dict[str, int]) -> dict[int, int]:
    for offset in tokens:
        if not (offset.isascii() and offset.isdecimal() and len(offset) <= 10):
            raise ApiError(400, f"{name}: {offset[:50]!r} is no offset; give an integer from 0 on", param=name)
    return {int(offset): token for offset, token in tokens.items()}


class Generate(Sampling):
    """The server's own form. ``block_append`` streams text as it becomes final; ``denoise`` streams the window after every step."""

    model: str | None = None
    prompt: Text | Ids
    logprobs: bool | None = None
    return_step_map: bool | None = None
    stream: bool = False
    stream_mode: Literal["block_append", "denoise"] = "denoise"


class StreamOptions(Strict):
    """OpenAI's; ``include_usage`` asks for a last chunk with the usage."""

    include_usage: bool = False


class Diffusion(Strict):
    """What only a diffusion model can tell; none of it is sent unless asked for.

    ``provisional``: (streams) ``event: diffusion`` frames with the window after every step. ``step_map``: for every token the forwards that
    first and last wrote it. ``usage``: forwards, tokens per forward, revised tokens in ``usage.completion_tokens_details``.
    """

    provisional: bool = False
    step_map: bool = False
    usage: bool = False


class OpenAI(Sampling):
    """What both of OpenAI's forms share. Fields that could not be honoured may only hold the value that asks for nothing."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    diffusion: Diffusion = Diffusion()

    def check(self) -> None:
        """What concerns several fields at once."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        if self.diffusion.provisional and not self.stream:
            raise ApiError(400, "diffusion.provisional needs stream=true", param="diffusion.provisional")


class Completion(OpenAI):
    """``/v1/completions``. ``logprobs`` may be 0: the log probability of each token when it was accepted, and no alternatives."""

    prompt: Text | Ids | Annotated[list[Text | Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    type: Literal["text"] = "text"

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(Strict):
    """The only format there is."""

    type: Literal["text"]


class Chat(OpenAI):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None

    def check(self) -> None:
        super().check()
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise ApiError(400, "give max_completion_tokens or max_tokens, not two values", param="max_tokens")


class Tokenize(Strict):
    """A text, or a conversation as the model would see it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None


class Detokenize(Strict):
    """Token ids."""

    model: str | None = None
    tokens: list[TokenId]


class Abort(Strict):
    """The ``X-Request-Id`` of a request, or the ``id`` of its answer."""

    request_id: Text
