"""What requests may hold, field by field: the server's own forms, and the settings that every form shares."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.fields import Given, Prompt, StopText, Strict, Text, TokenId
from diffulex_jax.async_serving.http.messages import Messages
from diffulex_jax.errors import SettingError
from diffulex_jax.sampling_params import SamplingParams


def _explain(schema: dict[str, Any]) -> None:
    """Adds to the fields of a form what ``SamplingParams`` says of them."""
    for name, text in re.findall(r"^  (\w+): (.+(?:\n    .+)*)", inspect.getdoc(SamplingParams) or "", re.MULTILINE):
        if name in schema["properties"]:
            schema["properties"][name].setdefault("description", " ".join(text.split()))


class Sampling(Strict):
    """``strategy``, one of those the server has, and the fields of ``SamplingParams``, where each is explained; null means the
    default. They go beside OpenAI's own. ``seed`` and ``top_k`` take the values of other APIs, too: -1 asks for a seed of the
    server's choice, and for no limit; any other negative seed of 64 bits stands for the one that has the same bits."""

    model_config = ConfigDict(json_schema_extra=_explain)

    strategy: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    n: int | None = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    max_repetition_run: int | None = None
    pinned: Given | None = None
    init_tokens: Given | None = None
    max_nfe: int | None = None
    min_tokens_per_forward: float | None = None
    accept_threshold: float | None = None
    num_to_transfer: int | None = None
    denoising_steps: int | None = None
    sub_block: int | None = None
    block_length: int | None = None
    cfg_scale: float | None = None
    confidence_factor: float | None = None
    eps: float | None = None
    alg_temp: float | None = None
    doubted_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    entropy_bound: float | None = None
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
        if given["seed"] is not None:
            given["seed"] = None if given["seed"] == -1 else given["seed"] % 2**64
        if given["top_k"] == -1:
            given["top_k"] = None
        try:
            return SamplingParams(**{name: value for name, value in given.items() if value is not None})
        except SettingError as error:
            raise ApiError(400, str(error), param=self.blamed(error.field)) from error

    def blamed(self, field: str | None) -> str | None:
        """The field of this form that fills a setting of the engine's."""
        return field


def _offsets(name: str, tokens: dict[str, int]) -> dict[int, int]:
    for offset in tokens:
        if not (offset.isascii() and offset.isdecimal() and len(offset) <= 10):
            raise ApiError(400, f"{name}: {offset[:50]!r} is no offset; give an integer from 0 on", param=name)
    return {int(offset): token for offset, token in tokens.items()}


class Generate(Sampling):
    """The server's own form. ``model`` is the server's, or the name of one of its adapters. ``block_append`` streams text as it becomes
    final; ``denoise`` streams the window after every step."""

    model: str | None = None
    prompt: Prompt
    logprobs: bool | None = None
    return_step_map: bool | None = None
    stream: bool = False
    stream_mode: Literal["block_append", "denoise"] = "denoise"


class Tokenize(Strict):
    """A text, or a conversation as the model would see it."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None


class Detokenize(Strict):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class Abort(Strict):
    """The ``X-Request-Id`` of a request, or the ``id`` of its answer."""

    request_id: Text
