"""One engine, many threads: everybody gets their own outputs, nobody waits for ever, and an interrupted call harms no other."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.engine.turns import Turns
from diffulex_jax.errors import UnknownRequest


PROMPTS = [[10 * i + j for j in range(1 + 3 * (i % 4))] for i in range(12)]


def params(i: int, **settings) -> SamplingParams:
    return SamplingParams(max_tokens=10 + 3 * (i % 5), ignore_eos=True, temperature=0.8 * (i % 2), seed=i, **settings)


@pytest.fixture(scope="module")
def engine(engine_of) -> Engine:
    return engine_of("tiny-llada2-trained", strategy="llada2", block_size=8, max_slots=4, max_model_len=64, steps_per_dispatch=2)


@pytest.fixture(scope="module")
def alone(engine) -> list[list[int]]:
    return [engine.generate([p], params(i))[0].token_ids for i, p in enumerate(PROMPTS)]


def together(*jobs, seconds: float = 120) -> None:
    """Runs jobs in threads of their own; raises what one of them raised, or if one has not ended in time."""
    errors = []

    def run(job) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_four_threads_generate_at_once(engine, alone):
    outputs, spans = {}, {}

    def job(first: int):
        def run() -> None:
            mine = range(first, len(PROMPTS), 4)
            began = time.perf_counter()
            for i, output in zip(mine, engine.generate([PROMPTS[i] for i in mine], [params(i) for i in mine]), strict=True):
                outputs[i] = output.token_ids
            spans[first] = began, time.perf_counter()

        return run

    most = 0

    def watch() -> None:
        nonlocal most
        while len(spans) < 4:
            most = max(most, engine.stats["running"])
            time.sleep(0.001)

    together(*map(job, range(4)), watch)
    assert [outputs[i] for i in range(len(PROMPTS))] == alone
    assert most == 4  # in one batch, not one call after the other
    assert not engine.has_work and engine.stats["pages_held"] == 0


def test_adding_stepping_and_generating_are_mixed(engine, alone):
    """Two threads generate, one adds, one steps and looks on: outputs come out where they belong, each once."""
    ids, generated, stepped, seen = {}, {}, {}, []
    done = threading.Event()

    def generate(first: int):
        def run() -> None:
            for i in range(first, 8, 2):
                generated[i] = engine.generate([PROMPTS[i]], params(i))[0].token_ids

        return run

    def add() -> None:
        for i in range(8, 12):
            ids[engine.add(PROMPTS[i], params(i))[0]] = i
            time.sleep(0.005)
        done.set()

    def step() -> None:
        while not (done.is_set() and len(stepped) == 4):
            stepped.update(engine.step())
            for id_ in list(ids):
                try:
                    seen.append((id_, list(engine.progress(id_).tokens)))
                except UnknownRequest:
                    pass

    together(generate(0), generate(1), add, step)
    assert [generated[i] for i in range(8)] == alone[:8]
    assert {ids[id_]: output.token_ids for id_, output in stepped.items()} == {i: alone[i] for i in range(8, 12)}
    assert all(alone[ids[id_]][: len(tokens)] == tokens for id_, tokens in seen)
    assert not engine.has_work and engine.stats["pages_held"] == 0


def test_generate_keeps_what_was_added_before(engine, alone):
    (first,) = engine.add(PROMPTS[1], params(1))
    (second,) = engine.add(PROMPTS[2], params(2))
    assert engine.generate([PROMPTS[3]], params(3))[0].token_ids == alone[3]
    with pytest.raises(UnknownRequest, match=f"request {first} has finished; the next step\\(\\) gives its output"):
        while True:  # until it has, at the latest with the requests of this call
            engine.progress(first)
            engine.generate([PROMPTS[3]], params(3))
    outputs = {}
    while engine.has_work:
        outputs |= engine.step()
    assert {id_: output.token_ids for id_, output in outputs.items()} == {first: alone[1], second: alone[2]}


@pytest.mark.parametrize("end", ["abort", "discard"])
def test_a_request_that_another_thread_ends_does_not_leave_its_caller_waiting(engine, end):
    got = []

    def generate() -> None:
        got.extend(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=60, ignore_eos=True, accept_threshold=1.0)))

    def interfere() -> None:
        while not (ids := list(engine._desk.requests)):
            time.sleep(0.001)
        getattr(engine, end)(ids[0])

    together(generate, interfere)
    assert got[0].finish_reason == "abort" and len(got[0].token_ids) < 60
    assert not engine.has_work and engine.stats["pages_held"] == 0


def test_control_c_ends_the_call_it_hits_and_no_other(engine, alone):
    """SIGINT reaches the main thread again and again while it generates; another thread's outputs are right all the same."""
    usual, others, interrupted = signal.getsignal(signal.SIGINT), [], 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = threading.Thread(target=lambda: others.extend(engine.generate(PROMPTS, [params(i) for i in range(12)])), daemon=True)
        thread.start()
        while thread.is_alive() and interrupted < 20:
            timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                while True:
                    engine.generate([PROMPTS[0]], SamplingParams(max_tokens=40, ignore_eos=True, accept_threshold=1.0))
            except KeyboardInterrupt:
                interrupted += 1
        thread.join(120)
        assert not thread.is_alive() and interrupted > 0
    finally:
        signal.signal(signal.SIGINT, usual)
    assert [output.token_ids for output in others] == alone
    assert engine.generate(PROMPTS, [params(i) for i in range(12)])[5].token_ids == alone[5]
    assert not engine.has_work and engine.stats["pages_held"] == 0


@pytest.mark.sweep
def test_an_error_of_one_request_reaches_its_own_caller(engine_of, monkeypatch):
    """A tokenizer that fails on one answer: its caller hears of it, whichever thread was working; the other gets its output."""
    engine = engine_of("embedded", strategy="llada2", max_slots=4, max_model_len=64)
    fine = engine.generate(["Hi"], SamplingParams(max_tokens=8, ignore_eos=True))[0].text
    decode, got = engine.tokenizer.decode, []

    def fails(ids, *args, **kwargs):
        if len(ids) == 9:
            raise RuntimeError("no text for this")
        return decode(ids, *args, **kwargs)

    def bad() -> None:
        with pytest.raises(RuntimeError, match="no text for this"):
            engine.generate(["Ho"], SamplingParams(max_tokens=9, ignore_eos=True))

    monkeypatch.setattr(engine.tokenizer, "decode", fails, raising=False)
    together(bad, lambda: got.extend(engine.generate(["Hi"], SamplingParams(max_tokens=8, ignore_eos=True))))
    assert got[0].text == fine
    assert not engine.has_work and engine.stats["pages_held"] == 0


def test_turns_are_taken_in_turn():
    """A thread in a tight loop lets another in after at most a few of its own turns."""
    turns, counts, stop = Turns(), [0, 0], threading.Event()

    def loop(i: int):
        def run() -> None:
            while not stop.is_set():
                with turns.mine():
                    counts[i] += 1
                    time.sleep(1e-4)

        return run

    together(loop(0), loop(1), lambda: time.sleep(0.5) or stop.set())
    assert min(counts) > 0.2 * max(counts) > 10


def test_an_interrupt_waits_for_the_end_of_a_turn_and_a_second_does_not():
    usual, turns, steps = signal.getsignal(signal.SIGINT), Turns(), []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with turns.mine():
                signal.raise_signal(signal.SIGINT)
                steps.append("went on")
        with pytest.raises(KeyboardInterrupt):
            with turns.mine():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                steps.append("never here")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with turns.mine():  # it is free
            pass
    finally:
        signal.signal(signal.SIGINT, usual)
    assert steps == ["went on"]


def test_numbers_that_are_no_request_are_told_apart(engine):
    (id_,) = ids = engine.add(PROMPTS[0], params(0))
    for method in (engine.progress, engine.abort, engine.snapshot, engine.discard):
        with pytest.raises(UnknownRequest, match=r"one id is wanted, got \[\d+\]; add\(\) returns a list"):
            method(ids)
        with pytest.raises(UnknownRequest, match=r"there is no request 10000000; add\(\) gives the ids"):
            method(10_000_000)
        with pytest.raises(UnknownRequest, match="a request's id is an integer that add\\(\\) gave, got 'a'"):
            method("a")
    engine.abort(id_)
    for method in (engine.progress, engine.abort, engine.snapshot):
        with pytest.raises(KeyError, match=f"^request {id_} is not queued or running any more"):
            method(id_)


def test_discard_makes_no_output(engine, monkeypatch):
    monkeypatch.setattr("diffulex_jax.engine.desk.make_output", lambda *_: pytest.fail("nobody asked for an output"))
    for steps in (0, 1, 3):
        (id_,) = engine.add([1, 2, 3], SamplingParams(max_tokens=60, ignore_eos=True, accept_threshold=1.0))
        for _ in range(steps):
            assert not engine.step()
        engine.discard(id_)
        engine.discard(id_)  # it may just have ended
        assert not engine.has_work and engine.stats["pages_held"] == engine.stats["running"] == 0


def test_discard_drops_a_kept_output(engine):
    (id_,) = engine.add([1], SamplingParams(max_tokens=1, ignore_eos=True))
    engine.generate([[1, 2]], SamplingParams(max_tokens=60, ignore_eos=True, accept_threshold=1.0))
    assert engine.has_work
    engine.discard(id_)
    assert not engine.has_work and engine.step() == {}


def test_a_request_whose_text_cannot_be_made_is_out_all_the_same(engine_of, monkeypatch):
    engine = engine_of("embedded", strategy="llada2", max_slots=4, max_model_len=64)
    (id_,) = engine.add("Hi", SamplingParams(max_tokens=9, ignore_eos=True))
    with monkeypatch.context() as patch:
        patch.setattr(engine.tokenizer, "decode", lambda ids: 1 / 0, raising=False)
        with pytest.raises(ZeroDivisionError):
            engine.abort(id_)
    assert not engine.has_work and engine.stats["waiting"] == 0
