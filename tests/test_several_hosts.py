"""How hosts meet, agree and end: what is wrong with one is said on all, by name, and soon."""

from __future__ import annotations

import pathlib
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from diffulex_jax.engine import alike, mirror
from diffulex_jax.engine.config import EngineConfig
from diffulex_jax.parallel import hosts
from diffulex_jax.parallel.hosts import Hosts
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.strategies import STRATEGIES


GOLDEN = pathlib.Path(__file__).parent / "golden"
HOST = """
import sys
from diffulex_jax.parallel import hosts
hosts._PATIENCE_SECONDS = float(sys.argv[5])
address, count, index, meet, job = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[6]
this = hosts.Hosts(coordinator=address, count=count, index=index, meet_seconds=meet)
if job == "no devices":
    this.connect()
    if index:
        hosts.fail("there is no device")
        raise SystemExit
    hosts.several()  # where JAX asks the others for their devices
with this.joined():
    hosts.agree({"slots": "4", "mesh": "data=2"})
    if job == "differ":
        hosts.agree({"slots": str(4 + index), "mesh": f"data={2 + index}"})
    if job == "fail" and index:
        raise ValueError("there is no\\nsuch model")
    hosts._heard("what nobody says")
"""


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(address: str, index: int, job: str, *, count: int = 2, meet: float = 60, patience: float = 30) -> subprocess.Popen[str]:
    arguments = [address, str(count), str(index), str(meet), str(patience), job]
    return subprocess.Popen([sys.executable, "-c", HOST, *arguments], stderr=subprocess.PIPE, text=True)


@pytest.fixture
def job(address):
    """``job(what, count)``: what so many hosts that do ``what`` write to stderr, and their exit codes."""
    started: list[subprocess.Popen[str]] = []

    def run(what: str, count: int) -> tuple[list[str], list[int]]:
        started.extend(start(address, index, what, count=count) for index in range(count))
        return [host.communicate(timeout=60)[1] for host in started], [host.returncode for host in started]

    yield run
    for host in started:
        host.kill()


def test_what_differs_is_named_on_all_hosts(job):
    said, codes = job("differ", 2)
    assert codes == [1, 1]
    for each in said:
        assert each.rstrip().endswith("ValueError: slots is 5 on host 1 of 2, and 4 on host 0; all hosts must be started alike")


def test_what_is_wrong_with_one_host_ends_the_others_and_is_named_there(job):
    began = time.monotonic()
    said, codes = job("fail", 3)
    assert codes == [1, 1, 1] and time.monotonic() - began < 30
    assert re.search("host [12] of 3 ended: there is no such model", said[0])


def test_a_host_without_devices_ends_the_others(job):
    """These wait for it while JAX looks for devices."""
    said, codes = job("no devices", 2)
    assert codes == [1, 1] and "host 1 of 2 ended: there is no device" in said[0]


def test_an_error_of_a_host_that_follows_is_told_to_the_others(monkeypatch):
    """Without it JAX would wait for them at the end of that process, and they for it."""
    said: list[str] = []
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(hosts, "fail", said.append)
    monkeypatch.setattr(mirror._calls, "receive", lambda: b"no message")
    with pytest.raises(pickle.UnpicklingError):
        mirror.follow([])
    assert len(said) == 1 and said[0].startswith("UnpicklingError: ")


def test_who_is_waited_for_is_said_and_not_for_ever(address):
    host = start(address, 1, "nothing", meet=1, patience=0.4)
    said = host.communicate(timeout=60)[1]
    assert host.returncode == 1
    assert f"waiting for the other hosts: host 0 does not answer at {address} (Connection refused)" in said
    assert f"the hosts have not met in 1 s: host 0 does not answer at {address}" in said


def test_a_host_waits_no_longer_than_it_is_told(address):
    """Shorter than the time after which it would first say for whom."""
    host, began = start(address, 1, "nothing", meet=0.5), time.monotonic()
    said = host.communicate(timeout=60)[1]
    assert host.returncode == 1 and time.monotonic() - began < 25
    assert f"the hosts have not met in 0.5 s: host 0 does not answer at {address} (Connection refused)" in said


@pytest.fixture
def resolver(monkeypatch):
    """``resolver(error)``: no name is found, for that reason."""
    asked: list[str] = []

    def fails(number: int) -> list[str]:
        def getaddrinfo(host, *_):
            asked.append(host)
            raise socket.gaierror(number, "so it is")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        return asked

    return fails


def test_a_name_that_nobody_knows(resolver, monkeypatch):
    monkeypatch.setattr(hosts, "_NAME_SECONDS", 0.05)
    asked = resolver(socket.EAI_NONAME)
    with pytest.raises(OSError, match=re.escape("nobody knows the coordinator's name 'frist' (so it is); it must be that of host 0")):
        Hosts(coordinator="frist:80", count=2, index=1).connect()
    assert len(asked) > 1 and set(asked) == {"frist"}  # a pod's name is known some seconds after the pod is there


def test_where_no_name_can_be_looked_up_hosts_wait(resolver):
    asked = resolver(socket.EAI_AGAIN)
    hosts._check_known("first")
    assert asked == ["first"]


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"the coordinator's port {port} cannot be had on host 0 \\(Address already in use\\); choose"):
            Hosts(coordinator=f"127.0.0.1:{port}", count=2, index=0).connect()


def test_what_is_not_said_is_in_the_environment(monkeypatch):
    for name, value in {"JAX_COORDINATOR_ADDRESS": "[::1]:77", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}.items():
        monkeypatch.setenv(name, value)
    assert Hosts() == Hosts(coordinator="[::1]:77", count=3, index=2)
    assert (Hosts(index=0).index, Hosts(coordinator="first:80").coordinator) == (0, "first:80")
    with pytest.raises(ValueError, match="the host index 2 must be one of 0 to 1: there are 2 hosts"):
        Hosts(count=2)
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID='two' must be a number"):
        Hosts()


@pytest.mark.parametrize(
    "wrong", ["10.0.0.1", "first:", ":80", "first:0", "first:65536", "http://first:80", "::1:80", "a b:80", "a..b:80", f"{'a' * 64}:80"]
)
def test_addresses_that_are_none(wrong):
    with pytest.raises(ValueError, match="the coordinator .* must be HOST:PORT of host 0"):
        Hosts(coordinator=wrong)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_times_to_wait_that_are_none(wrong):
    with pytest.raises(ValueError, match=f"meet_seconds={wrong} must be a number above 0"):
        Hosts(meet_seconds=wrong)


def test_what_hosts_compare(monkeypatch, tmp_path):
    """Each setting, the strategies, the mesh and the files; not where those lie."""
    monkeypatch.setattr(hosts, "several", lambda: True)
    one, same, other = (shutil.copytree(GOLDEN / "tiny-llada2", tmp_path / name) for name in ("one", "same", "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)

    def facts(path=one, strategy="llada2", **settings):
        found: dict[str, str] = {}
        with monkeypatch.context() as patch:
            patch.setattr(hosts, "agree", found.update)
            alike.check(EngineConfig(**settings), [STRATEGIES[strategy]], make_mesh(), path=path)
        return found

    def differ(**changed):
        return {name for name, value in facts(**changed).items() if value != facts()[name]}

    assert differ(path=same) == set()
    assert differ(path=other) == {"the digest of the model's files"}
    assert differ(strategy="dmax") == {"strategy"}
    assert differ(max_slots=4, dtype="bfloat16") == {"max_slots", "dtype"}
    assert differ(adapter=str(other)) == {"the digest of the adapter's files"} and facts(adapter=str(one)) == facts(adapter=str(same))
    assert facts()["mesh"] == "data=1,expert=1,tensor=1"
