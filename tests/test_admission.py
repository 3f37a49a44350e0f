"""What an engine refuses names the field that is to blame, before anything is computed."""

from __future__ import annotations

import numpy as np
import pytest

from diffulex_jax import EngineConfig, SamplingParams, SettingError
from diffulex_jax.engine.admission import Limits, admit
from diffulex_jax.sampling_params import READ_BY_FEW
from diffulex_jax.state import Dims


MASK = 99
DIMS = Dims(slots=2, window=1, block=4, page=4, pages_per_slot=8, mask_id=MASK)
SETTINGS = EngineConfig(max_model_len=32, block_size=4, attention="block_causal", max_batched_tokens=16)


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


LIMITS = Limits(SETTINGS, DIMS, Letters(), 100, (98,), 6)


def asked(prompt, limits: Limits = LIMITS, **settings):
    ids = iter(range(7, 100))
    return admit(limits, prompt, SamplingParams(**settings).resolve(), name="prompt", trace=False, new_id=lambda: next(ids))


def test_a_prompt_becomes_int32_ids_of_a_request_for_each_output():
    one, two = asked("abc", n=2, seed=5, max_tokens=4)
    assert (one.id, two.id) == (7, 8) and one.prompt.dtype == np.int32
    assert one.prompt.tolist() == two.prompt.tolist() == [0, 1, 2]
    assert one.params.seed == 5 != two.params.seed and one.params.n == two.params.n == 1
    (again,) = asked(np.array([0, 1, 2], np.uint8), seed=two.params.seed, max_tokens=4)
    assert again.params == two.params and again.prompt.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"block_length": 5}, "block_length", "block_length=5 is more than the engine's block_size=4"),
        ({"block_length": 2, "denoising_steps": 3}, "denoising_steps", "denoising_steps=3 is more than the tokens of a block, 2"),
        ({"doubted_token_ids": range(9)}, "doubted_token_ids", "must be at most 8 ids of the vocabulary"),
        ({"doubted_token_ids": [100]}, "doubted_token_ids", "must be at most 8 ids of the vocabulary"),
        (
            {"confidence_factor": 2.0},
            "confidence_factor",
            "confidence_factor=2.0 means nothing to this engine's strategy, which reads block_",
        ),
    ],
)
def test_what_will_not_do_on_a_whole_canvas(settings, field, message):
    reads = LIMITS._replace(reads=("block_length", "doubted_token_ids"), num_pages=None)
    assert len(asked([1] * 20, reads, max_tokens=12, block_length=2, denoising_steps=2, doubted_token_ids=[3])) == 1  # more than 6 pages
    with pytest.raises(SettingError, match=message) as caught:
        asked([1], reads, max_tokens=3, **settings)
    assert caught.value.field == field


@pytest.mark.parametrize("field", READ_BY_FEW)
def test_what_a_strategy_does_not_read_is_refused_by_name(field):
    value = {"doubted_token_ids": [3], "eps": 0.5}.get(field, 2)
    with pytest.raises(SettingError, match=f"{field}=.* means nothing to this engine's strategy, which reads none of these") as caught:
        asked([1], max_tokens=3, **{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("prompt", "settings", "field", "message"),
    [
        ([], {}, "prompt", "prompt is empty"),
        ("", {}, "prompt", "prompt is empty"),
        ([100], {}, "prompt", r"holds token id 100, outside the vocabulary \[0, 100\)"),
        ([2**70], {}, "prompt", "must be text or a list of token ids"),
        ([[1], [2, 3]], {}, "prompt", r"must be text or a list of token ids, got \[\[1\], \[2, 3\]\]"),
        ({"a": 1}, {}, "prompt", "must be text or a list of token ids"),
        ([1.5] * 1000, {}, "prompt", r"got \[1.5, 1.5, 1.5, 1.5, 1.5, 1.5, ...\]$"),
        ("caf\udce9", {}, "prompt", "is not Unicode text: the character at 3 is half a surrogate pair"),
        ([1] * 32, {"max_tokens": 1}, "prompt", "has 32 tokens; with max_tokens=1 that exceeds max_model_len=32"),
        ([1] * 3, {"max_tokens": 30}, "max_tokens", "has 3 tokens; with max_tokens=30 that exceeds max_model_len=32"),
        ([1] * 3, {"max_tokens": 25}, "max_tokens", "needs 7 pages with max_tokens=25; the pool has 6$"),
        ([1] * 25, {"max_tokens": 1}, "prompt", "needs 7 pages with max_tokens=1; the pool has 6"),
        ([1], {"stop_token_ids": range(8), "max_tokens": 3}, "stop_token_ids", "at most 7 stop_token_ids beside 1 EOS ids, got 8"),
        ([1], {"denoising_steps": 5, "max_tokens": 3}, "denoising_steps", "denoising_steps=5 is more than the tokens of a block, 4"),
        ([1], {"pinned": {0: 100}, "max_tokens": 3}, "pinned", r"pinned\[0\]=100 is not a token that can be given"),
        ([1], {"init_tokens": {1: MASK}, "max_tokens": 3}, "init_tokens", r"init_tokens\[1\]=99 is not a token that can be given"),
    ],
)
def test_what_will_not_do(prompt, settings, field, message):
    with pytest.raises(SettingError, match=message) as caught:
        asked(prompt, **settings)
    assert caught.value.field == field


def test_a_request_lives_in_one_shard():
    with pytest.raises(SettingError, match="needs 7 pages with max_tokens=25; the pool has 6 in each of the mesh's data=2 parts, one of"):
        asked([1] * 3, LIMITS._replace(shards=2), max_tokens=25)


def test_a_model_without_a_tokenizer_takes_no_text():
    mute = LIMITS._replace(tokenizer=None)
    for prompt, settings, field in (("abc", {}, "prompt"), ([1], {"stop": "x", "max_tokens": 3}, "stop")):
        with pytest.raises(SettingError, match="this model has no") as caught:
            asked(prompt, mute, **settings)
        assert caught.value.field == field


def test_a_prompt_that_sees_all_of_itself_goes_through_in_one_piece():
    whole = LIMITS._replace(settings=EngineConfig(max_model_len=32, block_size=4, attention="prefix_full", max_batched_tokens=16))
    assert len(asked([1] * 16, whole, max_tokens=3)) == 1
    with pytest.raises(SettingError, match="at most max_batched_tokens=16 go through") as caught:
        asked([1] * 17, whole, max_tokens=3)
    assert caught.value.field == "prompt"
