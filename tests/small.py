"""Small engines and their prompts, for several files of tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scripted import MODEL as SCRIPTED

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.models.base import init


MODEL = "tiny-llada2-trained"
VOCAB, EOS, MASK = 1024, 1020, 1021
BLOCK, LONGEST, SLOTS = 8, 256, 4
SIZES = {"block_size": BLOCK, "max_slots": SLOTS, "max_model_len": LONGEST}


def tiny_engine(*, dtype: str = "float32", **settings) -> Engine:
    """An engine of 16 tokens at most over a model with random weights, which is quickly compiled and seldom sure."""
    params = init(SCRIPTED, jax.random.key(0), jnp.dtype(dtype), scale=0.5)
    return Engine(SCRIPTED, params, dtype=dtype, block_size=4, max_slots=2, max_model_len=16, warm_up=False, **settings)


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([n, seed]).integers(0, EOS, n).tolist()


def full(n: int, **settings) -> SamplingParams:
    return SamplingParams(max_tokens=n, ignore_eos=True, **settings)
