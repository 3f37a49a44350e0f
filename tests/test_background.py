"""Programs that are compiled in the background, while requests are served by others that do the same."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from scripted import MODEL
from test_warm_up import PARAMS

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.async_serving import loop, protocol
from diffulex_jax.engine import background, build, device, engine, executables
from diffulex_jax.engine.packing import Shape
from diffulex_jax.parallel.mesh import make_mesh
from diffulex_jax.strategies import resolve
from pallas_kernels import choose


PROMPTS = [np.random.default_rng(n).integers(0, 8, n).tolist() for n in (3, 40, 70)]
MIXED = [SamplingParams(max_tokens=9, seed=3, temperature=t, ignore_eos=True) for t in (0.0, 0.7, 0.0)]
ANY = [("denoise", False, 4), ("prefill", Shape(1, 8))]  # what does for any request
ALL = {*ANY, ("denoise", True, 4), ("denoise", False, 2), ("denoise", True, 2), ("prefill", Shape(2, 8))}


@pytest.fixture
def engine_of_a_gpu(monkeypatch):
    """Makes engines with the programs that a GPU has beside those that do for any request."""
    kinds = {"few_rows": (2,), "host_drives_loops": True, "prefill_tokens": (32, 64), "free_tokens": 32}
    monkeypatch.setattr(build, "choose", lambda device: choose(device)._replace(**kinds))
    return lambda **settings: Engine(MODEL, PARAMS, block_size=4, max_slots=4, max_model_len=128, prefix_cache=False, **settings)


@pytest.fixture
def later(monkeypatch):
    """What was left to the background, which does nothing by itself."""
    tasks: list = []
    monkeypatch.setattr(background, "do_later", tasks.append)
    return tasks


@pytest.fixture
def used(monkeypatch):
    return names_called(monkeypatch)


def names_called(monkeypatch):
    """Names of the programs that engines called since ``clear()``."""
    names, call = [], executables.Programs.__call__

    def noted(self, name, *args):
        names.append(name)
        return call(self, name, *args)

    monkeypatch.setattr(executables.Programs, "__call__", noted)
    return names


def ids(outputs):
    return [output.token_ids for output in outputs]


def test_requests_are_served_by_what_is_there(engine_of_a_gpu, later, used):
    built = engine_of_a_gpu()
    assert set(used) == set(ANY) and len(later) == len(ALL) - len(ANY)
    used.clear()
    answers = built.generate(PROMPTS, MIXED)
    assert set(used) == set(ANY)
    for task in later[:2]:  # of loops over few rows
        task()
    used.clear()
    assert ids(built.generate(PROMPTS[:1], MIXED[:1])) == ids(answers[:1]) and set(used) == {("denoise", True, 2)}
    for task in later[2:]:
        task()
    used.clear()
    for chosen in ([0, 1, 2], [1], [2], [0, 2, 0]):  # all rows or few, one of them sampled or none, prompts of one row or of several
        assert ids(built.generate([PROMPTS[i] for i in chosen], [MIXED[i] for i in chosen])) == [answers[i].token_ids for i in chosen]
    assert set(used) == ALL


def test_several_hosts_have_all_programs_from_the_start(engine_of_a_gpu, monkeypatch):
    """Which of them are there must not differ between hosts."""
    waits = []
    monkeypatch.setattr(device.JaxDevice, "warm_up", lambda _, wait: waits.append(wait))
    monkeypatch.setattr(build, "Mirror", lambda device: device)
    for several in (False, True):
        monkeypatch.setattr(build, "hosts", types.SimpleNamespace(several=lambda answer=several: answer, least=lambda n: n))
        engine_of_a_gpu()
    assert waits == [False, True]


def test_warm_up_waits_for_the_background_and_then_nothing_is_compiled(engine_of_a_gpu, used):
    built = engine_of_a_gpu()
    used.clear()
    built.warm_up()
    assert set(used) == ALL
    compiled = []

    def note(event: str, _seconds: float, **about) -> None:
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        built.generate(PROMPTS * 2, MIXED * 2)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not [event for event in compiled if "compile" in event]
    while background._threads:  # they end by themselves
        time.sleep(0.01)


def test_warm_up_says_that_params_need_prompts(engine_of_a_gpu, later):
    with pytest.raises(ValueError, match="give warm_up\\(\\) the prompts, too"):
        engine_of_a_gpu(warm_up=False).warm_up(params=SamplingParams())


def test_what_the_background_cannot_compile_is_done_by_others(engine_of_a_gpu, later, used, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no room left")

    built = engine_of_a_gpu()
    with monkeypatch.context() as broken:
        broken.setattr(executables.Programs, "_lower", fail)
        for task in later:
            task()
    assert len(caplog.records) == len(later) and "no room left" in caplog.text and "('denoise', True, 2)" in caplog.text
    used.clear()
    assert len(built.generate(PROMPTS[:1], MIXED[:1])[0].token_ids) == 9
    assert set(used) == {ANY[0]}
    with pytest.raises(RuntimeError, match="no room left"):
        built.warm_up()
    assert len(built.generate(PROMPTS[:1], MIXED[:1])[0].token_ids) == 9


def test_nothing_is_compiled_for_an_engine_that_is_gone(later):
    traced = []
    for kept in (True, False):
        programs = executables.Programs(make_mesh(), keep=False)
        programs.begin_later("note", jax.jit(lambda x: traced.append(x) or x), np.zeros(3))
        if not kept:
            del programs
            gc.collect()
        later.pop()()
        assert len(traced) == 1


def test_who_waits_goes_first():
    turns, order = executables._Turns(), []

    def take(name, waited_for):
        with turns.held(waited_for=waited_for):
            order.append(name)

    with turns.held(waited_for=True):
        for name, waited_for in [("later", False), ("first", True)]:
            threading.Thread(target=take, args=(name, waited_for)).start()
            time.sleep(0.1)
    while len(order) < 2:
        time.sleep(0.01)
    assert order == ["first", "later"]


def test_the_background_rests_while_an_engine_is_built(engine_of_a_gpu, monkeypatch):
    """Also between the engines of several strategies."""
    done, usual = [], sys.getswitchinterval()

    def warm_up(*_, **__):
        background.do_later(lambda: done.append(sys.getswitchinterval()))
        time.sleep(0.1)
        assert not done

    monkeypatch.setattr(device.JaxDevice, "warm_up", warm_up)
    network = build.Network(MODEL, PARAMS, None, (), "", make_mesh())
    monkeypatch.setattr(engine, "load", lambda *_: (network, [resolve("llada2"), resolve("dmax")]))
    Engine.for_strategies("any", [None], block_size=4, max_slots=4, max_model_len=128)
    while background._threads or len(done) < 2:
        time.sleep(0.01)
    assert max(done) < usual == sys.getswitchinterval()  # then a thread that has Python's lock gives it away sooner


def test_a_process_that_ends_does_what_was_begun_and_no_more():
    program = """
import time
from diffulex_jax.engine import background
background._at_once = lambda: 1
def task(n):
    print("begins", n, flush=True)
    time.sleep(0.3)
    print("ends", n, flush=True)
for n in range(20):
    background.do_later(lambda n=n: task(n))
time.sleep(0.1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n") == ["begins 0", "ends 0", ""] and not done.stderr


def test_a_server_that_ends_leaves_the_background_to_itself():
    program = """
import time
from diffulex_jax.async_serving import http
from diffulex_jax.cli import app
from diffulex_jax.engine import background
def serve(*_, **__):
    background.do_later(lambda: time.sleep(600))
    return 3
http.serve = serve
app(["serve"])
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 3


def test_a_server_counts_no_program_of_the_background():
    """``recompiles_total`` is of those that requests wait for."""
    idle = types.SimpleNamespace(stats={"waiting": 0}, has_work=False)
    seen: list[int] = []

    def compile_one() -> None:
        jax.jit(lambda x: x + time.monotonic()).lower(np.zeros(3)).compile()

    def in_background() -> None:
        done = threading.Event()
        background.do_later(lambda: (compile_one(), done.set()))
        assert done.wait(60)

    turns = iter([lambda: None, in_background, compile_one])

    def receive(wait: bool) -> list[protocol.Command]:
        if (act := next(turns, None)) is None:
            return [protocol.Stop()]
        act()
        return []

    loop.run({"one": idle}, receive, lambda events: seen.extend(event.stats["recompiles"] for event in events))
    assert seen == [0, 1]
