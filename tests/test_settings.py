"""Settings that will not do are refused by name, of requests and of engines."""

from __future__ import annotations

import dataclasses
import pathlib
import pickle

import numpy as np
import pytest

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.errors import SettingError, UnknownRequest
from diffulex_jax.sampling_params import LEFT_TO_STRATEGY, seeds


GOLDEN = pathlib.Path(__file__).parent / "golden"
MODEL = "tiny-llada2-trained"


def test_unknown_settings_are_errors():
    with pytest.raises(TypeError, match="unexpected keyword argument 'edit_treshold'"):
        SamplingParams(edit_treshold=0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'enable_torch_compile'"):
        Engine.from_pretrained(str(GOLDEN / MODEL), enable_torch_compile=True)
    with pytest.raises(TypeError):
        SamplingParams(64)  # which of the settings would that be?


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"max_tokens": -5}, "max_tokens=-5 must be at least 1"),
        ({"max_tokens": 2.0}, "max_tokens=2.0 must be an integer"),
        ({"max_tokens": True}, "max_tokens=True must be an integer"),
        ({"max_tokens": None}, "max_tokens=None must be an integer"),
        ({"temperature": -0.1}, "temperature=-0.1 must be finite and at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"temperature": "1"}, "temperature='1' must be a number"),
        ({"accept_threshold": float("inf")}, "accept_threshold=inf must be finite"),
        ({"accept_threshold": False}, "accept_threshold=False must be a number"),
        ({"edit_threshold": -1}, "edit_threshold=-1 must be finite and at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01 must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be at least 0 and below"),
        ({"seed": 10**5000}, "seed=a number of 16610 bits must be at least 0"),
        ({"temperature": 10**5000}, "temperature=a number of 16610 bits must be finite"),
        ({"max_nfe": 0}, "max_nfe=0 must be at least 1"),
        ({"num_to_transfer": 0}, "num_to_transfer=0 must be at least 1"),
        ({"denoising_steps": -1}, "denoising_steps=-1 must be at least 0"),
        ({"sub_block": -1}, "sub_block=-1 must be at least 0"),
        ({"entropy_bound": -0.1}, "entropy_bound=-0.1 must be finite and at least 0"),
        ({"max_post_edit_steps": -1}, "max_post_edit_steps=-1 must be at least 0"),
        ({"ignore_eos": 1}, "ignore_eos=1 must be True or False"),
        ({"cache_salt": 1}, "cache_salt=1 must be text"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(SettingError, match=message) as caught:
        SamplingParams(**bad)
    assert [caught.value.field] == list(bad)


@pytest.mark.parametrize(
    "bad", [{"pinned": {"0": 3}}, {"pinned": {0: -1}}, {"init_tokens": {64: 1}}, {"stop": ("",)}, {"stop_token_ids": "a"}]
)
def test_an_error_within_a_setting_names_the_setting(bad):
    with pytest.raises(SettingError) as caught:
        SamplingParams(**bad)
    assert [caught.value.field] == list(bad)


def test_errors_survive_pickling():
    for error in (SettingError("top_p", "top_p=2 is too much"), UnknownRequest(3, "no request 3")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_settings_left_to_the_strategy():
    params = SamplingParams(accept_threshold=0.0, max_tokens=3)
    assert params.edit_threshold is None
    resolved = params.resolve({"edit_threshold": 0.25, "accept_threshold": 0.7, "top_k": None})
    assert (resolved.accept_threshold, resolved.edit_threshold, resolved.top_k, resolved.temperature) == (0.0, 0.25, 0, 0.0)
    assert resolved.resolve({"edit_threshold": 0.5}) is resolved
    assert {name: getattr(SamplingParams().resolve(), name) for name in LEFT_TO_STRATEGY} == LEFT_TO_STRATEGY


def test_every_output_has_a_seed_that_gives_it_again():
    given = seeds(SamplingParams(seed=5, n=3))
    asked = SamplingParams(seed=5, n=3, pinned={0: 7}, temperature=1)
    assert asked.alone(given[1]) == dataclasses.replace(asked, n=1, seed=given[1]) != asked
    assert given[0] == 5 and given == seeds(SamplingParams(seed=5, n=3)) and given[:2] == seeds(SamplingParams(seed=5, n=2))
    assert seeds(SamplingParams(seed=2**64 - 1)) == [2**64 - 1]
    many = [seed for first in range(100) for seed in seeds(SamplingParams(seed=first, n=100))]
    assert len(set(many)) == len(many) == 10_000
    fresh = [seed for _ in range(1000) for seed in seeds(SamplingParams(n=2))]
    assert len(set(fresh)) == 2000 and all(0 <= seed < 2**53 for seed in fresh) and max(fresh) > 2**50


def test_numpy_numbers_are_numbers():
    assert SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5)) == SamplingParams(max_tokens=3, temperature=0.5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"block_size": 0}, "block_size=0 must be a positive integer"),
        ({"max_slots": True}, "max_slots=True must be a positive integer"),
        ({"buffer_size": 1.0}, "buffer_size=1.0 must be a positive integer"),
        ({"max_model_len": 5000}, "max_model_len=5000 exceeds the model's max_position_embeddings=4096"),
        ({"dtype": "float16"}, "dtype='float16' must be one of float32, bfloat16"),
        (
            {"strategy": "mdlm"},
            "unknown strategy 'mdlm'; choose one of llada2, multi_bd, d2f, llada2_edit, llada2_levenshtein, dmax, ",
        ),
    ],
)
def test_bad_engine_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(str(GOLDEN / MODEL), **bad)
