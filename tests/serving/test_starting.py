"""A server that has not started yet, and its end at any moment."""

from __future__ import annotations

import signal
import time

import httpx
import pytest
from running import SMALL, serving


STRATEGIES = ["llada2_edit", "dmax"]


def test_the_port_is_open_while_the_engine_loads_and_compiles(model, compiled):
    options = [part for name in STRATEGIES for part in ("--strategy", name)]
    with serving(model, *SMALL, *options, cache=compiled, until="starting") as server:
        seen: list[str] = []
        for path in ("/v1/models", "/server_info"):
            early = server.client.get(path)
            assert (early.status_code, early.json()["error"]["code"], early.headers["retry-after"]) == (503, "starting", "1")
        for path in ("/generate", "/v1/completions", "/tokenize"):
            assert "the engine is loading" in server.post(path, prompt="x").json()["error"]["message"]
        assert server.client.get("/").status_code == server.client.get("/version").status_code == 200
        assert server.metric("engine_up") == 0
        while (health := server.client.get("/health")).status_code == 503 and server.process.poll() is None:
            assert health.json()["error"]["message"].startswith(f"the engine is {health.json()['status']}")
            seen += [health.json()["status"]] * (seen[-1:] != [health.json()["status"]])
            time.sleep(0.01)
        assert seen == ["loading", "compiling"] and health.json()["status"] == "ready"
        assert server.client.get("/ready").status_code == 200
        assert server.post("/generate", prompt="x", max_tokens=2).status_code == 200
        told = [(line["message"], line.get("what")) for line in server.log if line["message"] in ("loading", "compiling", "listening")]
    assert told == [("loading", str(model)), *(("compiling", name) for name in STRATEGIES), ("listening", None)]


@pytest.mark.sweep_but("compiling-2-130-process")
@pytest.mark.parametrize("isolation", ["process", "thread"])
@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
@pytest.mark.parametrize("until", ["starting", "compiling"])
def test_a_signal_while_it_starts_ends_it_promptly(model, isolation, sig, code, until):
    with serving(model, *SMALL, "--isolation", isolation, until="starting") as server:  # nothing compiled: that takes a while
        while until not in [line["message"] for line in server.log]:
            time.sleep(0.01)
        began = time.monotonic()
        assert server.stop(sig, seconds=10) == code
        assert time.monotonic() - began < 3
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_ctrl_c_ends_a_server_with_130(model, compiled):
    with serving(model, *SMALL, cache=compiled) as server:
        assert server.stop(signal.SIGINT, seconds=10) == 130
        assert server.noise == []  # nothing but the log


def test_profiles_are_taken_where_that_was_asked_for(server_of, tmp_path_factory):
    directory = tmp_path_factory.mktemp("profiles") / "new"
    server = server_of("--profile-directory", str(directory))
    assert "No profile" in server.post("/stop_profile").json()["error"]["message"]
    assert server.client.post("/start_profile").json() == {"profile_directory": str(directory)}
    again = server.client.post("/start_profile")
    assert again.status_code == 400 and "already" in again.json()["error"]["message"]
    assert server.post("/generate", prompt="x", max_tokens=8).status_code == 200
    assert server.client.post("/stop_profile").status_code == 200
    assert list(directory.rglob("*.xplane.pb"))
