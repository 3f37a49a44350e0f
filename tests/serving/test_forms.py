"""What asks for nothing is accepted and changes nothing; what an answer holds may be sent back."""

from __future__ import annotations

from typing import Any

import pytest

from diffulex_jax import SamplingParams
from diffulex_jax.async_serving.http.messages import Message
from diffulex_jax.async_serving.http.openai_requests import Chat, Completion


TOOL = {"type": "function", "function": {"name": "f"}}
QUESTION = [{"role": "user", "content": "x"}]

BOTH: list[dict[str, Any]] = [
    {"store": False},
    {"metadata": {}},
    {"metadata": {"run": "7"}},
    {"service_tier": "auto"},
    {"user": "me", "safety_identifier": "me", "prompt_cache_key": "mine"},
    {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
    {"logit_bias": {}},
    {"logit_bias": {"50256": 0}},
    {"min_p": 0.0, "use_beam_search": False, "skip_special_tokens": True},
    {"top_k": -1, "seed": -1},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False, "include_obfuscation": False}},
    {"stream_options": {"continuous_usage_stats": False}},
    {"stream_options": None, "never_heard_of": None},
    {"echo": False},
]
CHATS: list[dict[str, Any]] = [
    {"tools": None, "tool_choice": None, "functions": None, "function_call": None},
    {"tools": [], "functions": []},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tool_choice": "none", "parallel_tool_calls": False},
    {"tool_choice": "auto", "parallel_tool_calls": True},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"], "audio": None, "prediction": None, "web_search_options": None},
    {"logprobs": False, "top_logprobs": 0},
    {"reasoning_effort": "none", "verbosity": "medium"},
    {"thinking": {"type": "disabled"}, "enable_thinking": False},
    {"chat_template_kwargs": {}, "add_generation_prompt": True, "continue_final_message": False},
]
COMPLETIONS: list[dict[str, Any]] = [{"suffix": ""}, {"suffix": None}, {"best_of": 1}, {"logprobs": False}, {"logprobs": None}]


@pytest.mark.parametrize("asked", [*BOTH, *CHATS], ids=str)
def test_a_chat_that_asks_for_nothing_more_is_a_plain_one(asked):
    form = Chat.model_validate({"messages": QUESTION} | asked)
    form.check()
    assert form.params() == SamplingParams()


@pytest.mark.parametrize("asked", [*BOTH, *COMPLETIONS], ids=str)
def test_a_completion_that_asks_for_nothing_more_is_a_plain_one(asked):
    form = Completion.model_validate({"prompt": "x"} | asked)
    form.check()
    assert form.params() == SamplingParams() and form.logprobs is None


def test_as_many_outputs_as_are_returned_are_not_a_choice_among_more():
    form = Completion.model_validate({"prompt": "x", "best_of": 3, "n": 3})
    form.check()
    assert form.params().n == 3


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        ({"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "function_call": None, "audio": None}, "a"),
        ({"role": "assistant", "content": "a", "annotations": [], "tool_calls": [], "reasoning_content": None}, "a"),
        ({"role": "assistant", "content": "a", "provider_specific_fields": {"refusal": None}}, "a"),
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": None, "refusal": "no"}, "no"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": None}]}, "ab"),
        ({"role": "developer", "content": "a"}, "a"),
    ],
)
def test_messages_as_clients_send_them(message, plain):
    (parsed,) = Chat.model_validate({"messages": [message]}).messages
    assert parsed.plain() == {"role": message["role"], "content": plain}


def test_the_name_of_who_speaks_goes_to_the_template():
    assert Message(role="user", content="a", name="Ada").plain() == {"role": "user", "content": "a", "name": "Ada"}


@pytest.mark.parametrize(("given", "seed"), [(-1, None), (7, 7), (2**64 - 1, 2**64 - 1), (-2, 2**64 - 2), (-(2**63), 2**63)])
def test_seeds_of_64_bits_as_other_apis_write_them(given, seed):
    assert Completion.model_validate({"prompt": "x", "seed": given}).params().seed == seed
