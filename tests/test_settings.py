"""Settings that will not do are refused by name, of requests and of engines."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from diffulex_jax import Engine, SamplingParams


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
        ({"seed": 2**31}, "seed=2147483648 must be at least 0 and below"),
        ({"max_nfe": 0}, "max_nfe=0 must be at least 1"),
        ({"num_to_transfer": 0}, "num_to_transfer=0 must be at least 1"),
        ({"denoising_steps": -1}, "denoising_steps=-1 must be at least 0"),
        ({"max_post_edit_steps": -1}, "max_post_edit_steps=-1 must be at least 0"),
        ({"ignore_eos": 1}, "ignore_eos=1 must be True or False"),
        ({"cache_salt": 1}, "cache_salt=1 must be text"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**bad)


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
        ({"strategy": "mdlm"}, "unknown strategy 'mdlm'; choose one of llada2, multi_bd, d2f, llada2_edit, llada2_levenshtein, dmax"),
    ],
)
def test_bad_engine_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(str(GOLDEN / MODEL), **bad)
