"""The end of a server, and the beginnings that fail."""

from __future__ import annotations

import logging
import signal
import socket
import threading

import httpx
import pytest
import running
import shutdown
from running import SMALL
from typer.testing import CliRunner

from diffulex_jax import cli


@pytest.fixture
def logging_as_before():
    """Undoes what a command run in this process makes of its logging."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_sigterm_lets_streams_finish(model, compiled):
    seen = shutdown.trial(model, compiled, *SMALL, clients=8, drain_seconds=30)  # of which four wait for a slot
    assert (seen["code"], seen["ends"], seen["left"]) == (0, ["length"] * 8, [])
    assert seen["meanwhile"] in ([503, 200, 503], [])


@pytest.mark.sweep
def test_sigterm_without_patience_cuts_streams_off(model, compiled):
    seen = shutdown.trial(model, compiled, *SMALL, clients=20, drain_seconds=0)
    assert (seen["code"], seen["left"]) == (0, [])
    assert set(seen["ends"]) <= {"length", "503"} and "503" in seen["ends"]
    assert seen["seconds"] < 5


@pytest.mark.sweep
def test_a_second_signal_ends_at_once(model, compiled):
    with running.serving(model, *SMALL, "--drain-seconds", "1000", cache=compiled) as server:

        def endless():
            with pytest.raises(httpx.TransportError):
                while True:
                    httpx.post(f"{server.url}/generate", json={"prompt": "x", "n": 100, "max_tokens": 120}, timeout=60)

        thread = threading.Thread(target=endless)
        thread.start()
        while not server.metric("num_requests_in_flight"):
            pass
        server.process.send_signal(signal.SIGTERM)
        while server.post("/generate", prompt="y", max_tokens=1).status_code != 503:  # the first signal counts once it was seen
            pass
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0
        thread.join()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-queue", "-1"], "max_queue=-1 must be at least 0"),
        (["--request-seconds", "nan"], "request_seconds=nan"),
        (["--api-key", " "], "api_key"),
        (["--host", "256.0.0.1"], ""),
        (["--isolation", "thread", "--model", "/no/such/model"], "'/no/such/model'"),
        (["--isolation", "thread", "--max-slots", "0"], "max_slots=0"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(logging_as_before, args, message):
    result = CliRunner().invoke(cli.app, ["serve", "--port", "0", *args])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ") and message in result.stderr


def test_a_port_that_is_taken_is_one_line_and_exit_code_2(logging_as_before):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(cli.app, ["serve", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2 and "in use" in result.stderr
