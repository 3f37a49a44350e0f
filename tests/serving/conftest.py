"""Models and servers shared by the tests of serving."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import byte_model
import pytest
import running


SMALL = ["--block-size", "8", "--max-model-len", "128", "--max-slots", "4"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny model with a tokenizer of multi-byte pieces."""
    return byte_model.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> pathlib.Path:
    """Where compiled programs are kept from run to run."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("jax")


@pytest.fixture(scope="session")
def server_of(model: pathlib.Path, compiled: pathlib.Path) -> Iterator[Callable[..., running.Server]]:
    """``server_of("--option", ...)``: a server of the tiny model; one for the session for each choice of options."""
    servers: dict[tuple[str, ...], running.Server] = {}
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> running.Server:
            if options not in servers:
                servers[options] = stack.enter_context(running.serving(model, *SMALL, *options, cache=compiled))
            return servers[options]

        yield start


@pytest.fixture
def server(server_of: Callable[..., running.Server]) -> running.Server:
    """The server with default settings."""
    return server_of()
