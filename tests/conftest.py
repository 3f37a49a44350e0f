"""Test-wide settings, and engines shared by the whole session: building one costs seconds of compilation."""

from __future__ import annotations

import functools
import os
import pathlib


os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import hypothesis
import jax
import pytest

from diffulex_jax import Engine


# The same examples in every run: a failure is there for whoever looks.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("tests")

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_configure(config: pytest.Config) -> None:
    """What one worker compiled the others, and the next run, read from disk. The key holds program, flags and versions."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def engine_of():
    """``engine_of(model, strategy=..., ...)``: the engine of a golden checkpoint or "embedded"; one each for the whole session."""

    @functools.cache
    def build(checkpoint: str, **settings) -> Engine:
        return Engine.from_pretrained("embedded" if checkpoint == "embedded" else str(GOLDEN / checkpoint), **settings)

    return build


@pytest.fixture(scope="session")
def golden_model() -> str:
    """A small trained model without a tokenizer: 1024 tokens, EOS 1020, mask 1021."""
    return str(GOLDEN / "tiny-llada2-trained")
