"""One engine over two hosts: two processes of four devices each, a server in front."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import time

import psutil
import pytest
from running import SMALL, Server, serving, still_alive


PROMPTS = ["hello", "x" * 30, "ab " * 15, "é" * 9, "last one", "more"]


@contextlib.contextmanager
def pair(model, compiled, monkeypatch, *options: str):
    """The servers of both hosts, over ``data=2,tensor=2,expert=2``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")

    def host(index: int) -> contextlib.AbstractContextManager[Server]:
        told = ["--coordinator", address, "--hosts", "2", "--host-index", str(index), "--mesh", "data=4,tensor=2"]
        return serving(model, *SMALL, *told, *options, cache=compiled)

    with concurrent.futures.ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        yield list(pool.map(lambda index: stack.enter_context(host(index)), range(2)))


def processes(server: Server) -> list[psutil.Process]:
    """The server's, and its engine's."""
    own = psutil.Process(server.process.pid)
    return [own, *own.children(recursive=True)]


def engine_of(server: Server) -> psutil.Process:
    return psutil.Process(server.client.get("/server_info").json()["engine"]["pid"])


def ask(server: Server, prompt: str, **more) -> dict:
    return server.post("/generate", prompt=prompt, max_tokens=40, ignore_eos=True, **more).json()


@pytest.mark.sweep
def test_two_hosts_answer_as_one_and_end_together(model, compiled, monkeypatch):
    with serving(model, *SMALL, cache=compiled) as server:
        wanted = [ask(server, prompt)["token_ids"] for prompt in PROMPTS]
    with pair(model, compiled, monkeypatch) as (first, second):
        with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert [answer["token_ids"] for answer in pool.map(lambda prompt: ask(first, prompt), PROMPTS)] == wanted
        assert first.client.get("/health").json()["status"] == "ready"
        assert second.client.get("/health").json()["status"] == "following"
        assert second.client.get("/ready").status_code == 503
        assert "this is host 1 of 2, which follows: ask host 0" in ask(second, "hello")["error"]["message"]
        both = processes(first) + processes(second)
        engine_of(second).suspend()
        lost = ask(first, "hello")["error"]
        assert lost["code"] == "engine_down" or "host 1 of 2" in lost["message"]
        assert first.process.wait(15) == 1 and second.process.wait(15) == 1
        assert any("host 1 of 2 has said nothing for 6 s" in line["message"] for line in first.log)
        assert still_alive(both, 5) == []


@pytest.mark.sweep
def test_sigterm_to_all_hosts_ends_them_in_good_order(model, compiled, monkeypatch):
    """The leader answers what it was asked, for which it needs the others."""
    with pair(model, compiled, monkeypatch) as (first, second), concurrent.futures.ThreadPoolExecutor(4) as pool:
        both = processes(first) + processes(second)
        answers = [pool.submit(ask, first, f"question {i}", n=3) for i in range(4)]
        while not first.metric("num_requests_running"):
            time.sleep(0.005)
        for server in (second, first):
            server.process.terminate()
        assert [len(answer.result(20)["outputs"]) for answer in answers] == [3] * 4
        assert (first.process.wait(15), second.process.wait(15)) == (0, 0)
        assert [line for server in (first, second) for line in server.log if line["level"] == "error"] == []
        assert still_alive(both, 5) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "10.0.0.1", "--hosts", "2", "--host-index", "0"], "the coordinator '10.0.0.1' must be HOST:PORT of host 0"),
        (["--coordinator", "10.0.0.1:80", "--hosts", "2", "--host-index", "2"], "the host index 2 must be one of 0 to 1"),
        (["--hosts", "2"], "--coordinator, --hosts and --host-index go together"),
        (["--meet-seconds", "5"], "--coordinator, --hosts and --host-index go together"),
        (["--coordinator", "10.0.0.1:80", "--hosts", "2", "--host-index", "1", "--meet-seconds", "0"], "meet_seconds=0.0 must be a number"),
        (["--distributed", "--isolation", "thread"], "--isolation thread is not for several hosts"),
    ],
)
def test_what_will_not_do(options, message):
    from typer.testing import CliRunner

    from diffulex_jax.cli import app

    result = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert result.exit_code == 2 and message in result.stderr
