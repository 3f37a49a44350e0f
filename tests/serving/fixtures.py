"""Fixtures that the short and the long tests of serving share."""

from __future__ import annotations

import pathlib

import byte_model
import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny model with a tokenizer of multi-byte pieces."""
    return byte_model.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> pathlib.Path:
    """Where compiled programs are kept from run to run."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("jax")
