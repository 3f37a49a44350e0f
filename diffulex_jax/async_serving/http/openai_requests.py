"""OpenAI's forms. What asks for nothing is accepted; what asks for something that is not here is an error that names it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.fields import Lacking, Prompts, Strict, unsupported
from diffulex_jax.async_serving.http.messages import Messages
from diffulex_jax.async_serving.http.requests import Sampling


_NO_PENALTIES = "penalties are not supported (penalty_lambda is against repetition)"
_NO_ALTERNATIVES = "alternatives to the chosen tokens are not supported"


class StreamOptions(Strict):
    """``include_usage`` asks for a last chunk with the usage; ``include_obfuscation`` pads chunks to lengths that tell less of the text."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Annotated[Any, Lacking("usage comes once, with include_usage", (False,))] = None


class Diffusion(Strict):
    """What only a diffusion model can tell; none of it is sent unless asked for.

    ``provisional``: (streams) ``event: diffusion`` frames with the window after every step. ``step_map``: for every token the forwards that
    first and last wrote it. ``usage``: forwards, tokens per forward, revised tokens in ``usage.completion_tokens_details``.
    ``timings``: for every choice the engine's seconds in the queue, to the first block and in all, and tokens per forward.
    """

    provisional: bool = False
    step_map: bool = False
    usage: bool = False
    timings: bool = False


class OpenAI(Sampling):
    """What both of OpenAI's forms share. ``user``, ``safety_identifier``, ``prompt_cache_key`` and ``metadata`` are for the client's own
    books: they are accepted and not kept."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    diffusion: Diffusion = Diffusion()
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = None
    store: Annotated[Any, Lacking("answers are not stored", (False,))] = None
    service_tier: Annotated[Any, Lacking("there are no service tiers", ("auto", "default"))] = None
    presence_penalty: Annotated[Any, Lacking(_NO_PENALTIES, (0,))] = None
    frequency_penalty: Annotated[Any, Lacking(_NO_PENALTIES, (0,))] = None
    repetition_penalty: Annotated[Any, Lacking(_NO_PENALTIES, (1,))] = None
    length_penalty: Annotated[Any, Lacking(_NO_PENALTIES, (1,))] = None
    logit_bias: Annotated[Any, Lacking("biases of logits are not supported", ({},))] = None
    min_p: Annotated[Any, Lacking("min_p is not supported (top_p and top_k are)", (0,))] = None
    use_beam_search: Annotated[Any, Lacking("beam search is not supported", (False,))] = None
    bad_words: Annotated[Any, Lacking("forbidden words are not supported", ([],))] = None
    skip_special_tokens: Annotated[Any, Lacking("special tokens are always left out of the text", (True,))] = None
    include_stop_str_in_output: Annotated[Any, Lacking("stop texts are always left out of the text", (False,))] = None
    echo: Annotated[Any, Lacking("a prompt is not repeated or scored", (False,))] = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _zero_is_no_bias(cls, biases: Any) -> Any:
        if isinstance(biases, dict) and all(bias == 0 and not isinstance(bias, bool) for bias in biases.values()):
            return {}
        return biases

    def check(self) -> None:
        """What concerns several fields at once."""
        if self.stream_options is not None and any(self.stream_options.model_dump().values()) and not self.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        if self.diffusion.provisional and not self.stream:
            raise ApiError(400, "diffusion.provisional needs stream=true", param="diffusion.provisional")


class Completion(OpenAI):
    """``/v1/completions``. ``logprobs`` may be 0: the log probability of each token when it was accepted, and no alternatives."""

    prompt: Prompts
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Annotated[Any, Lacking("text after the answer is not supported (pinned fixes tokens of it)", ("",))] = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _no_alternatives(cls, logprobs: Any) -> Any:
        if isinstance(logprobs, int) and not isinstance(logprobs, bool) and logprobs > 0:
            raise unsupported(f"{_NO_ALTERNATIVES}; logprobs may be 0")
        return None if logprobs is False else logprobs

    @field_validator("logprobs")
    @classmethod
    def _not_negative(cls, logprobs: int | None) -> int | None:
        if logprobs is not None and logprobs < 0:
            raise ValueError("logprobs may be 0")
        return logprobs

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of: choosing among more outputs than are returned is not supported; use n", param="best_of")


class Chat(OpenAI):
    """``/v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Any, Lacking(_NO_ALTERNATIVES, (0,))] = None
    response_format: Annotated[Any, Lacking("JSON mode and schemas are not supported; only text", ({"type": "text"},))] = None
    tools: Annotated[Any, Lacking("tool calls are not supported", ([],))] = None
    tool_choice: Annotated[Any, Lacking("tool calls are not supported", ("none", "auto"))] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, Lacking("function calls are not supported", ([],))] = None
    function_call: Annotated[Any, Lacking("function calls are not supported", ("none", "auto"))] = None
    modalities: Annotated[Any, Lacking("answers are text only", (["text"],))] = None
    reasoning_effort: Annotated[Any, Lacking("these models do not reason before they answer", ("none",))] = None
    thinking: Annotated[Any, Lacking("these models do not reason before they answer", ({"type": "disabled"},))] = None
    enable_thinking: Annotated[Any, Lacking("these models do not reason before they answer", (False,))] = None
    verbosity: Annotated[Any, Lacking("the length of answers is not steered", ("medium",))] = None
    chat_template_kwargs: Annotated[Any, Lacking("arguments of the chat template are not supported", ({},))] = None
    add_generation_prompt: Annotated[Any, Lacking("a conversation is always answered in a new turn", (True,))] = None
    continue_final_message: Annotated[Any, Lacking("a conversation is always answered in a new turn", (False,))] = None

    @model_validator(mode="before")
    @classmethod
    def _tools_that_must_not_be_called(cls, form: Any) -> Any:
        """Tools beside ``tool_choice: "none"`` ask for nothing."""
        if not isinstance(form, dict):
            return form
        unused = [of for of, choice in (("tools", "tool_choice"), ("functions", "function_call")) if form.get(choice) == "none"]
        return {name: value for name, value in form.items() if name not in unused}

    def blamed(self, field: str | None) -> str | None:
        newer = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {"prompt": "messages", "max_tokens": newer}.get(field or "", field)

    def check(self) -> None:
        super().check()
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise ApiError(400, "give max_completion_tokens or max_tokens, not two values", param="max_tokens")
