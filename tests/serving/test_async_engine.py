"""``AsyncEngine`` without HTTP, its engine in a thread: what is streamed is what is answered, and failures find their owner."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random

import numpy as np
import pytest
from jax._src import monitoring

from diffulex_jax import Engine, SamplingParams
from diffulex_jax.async_serving import Accepted, AsyncEngine, Commit, Provisional, Reply, RequestError, loop, protocol


SETTINGS = {"block_size": 8, "max_model_len": 128, "max_slots": 4}
MULTIBYTE = dict(enumerate("naïve 你好 😀👍🏽 done".encode()))


@pytest.fixture(scope="module")
def engines(model):
    return {strategy: Engine.from_pretrained(str(model), strategy=strategy, **SETTINGS) for strategy in ("llada2_edit", "dmax")}


@pytest.fixture
def engine(engines):
    return engines["llada2_edit"]


def run(engine, use, **settings):
    """The result of ``use(AsyncEngine)``, within 60 s; nothing may be left of its requests."""

    async def main():
        async with asyncio.timeout(60), AsyncEngine(lambda: engine, **settings) as served:
            result = await use(served)
            while engine.has_work:
                await asyncio.sleep(0.01)
            return result

    result = asyncio.run(main())
    assert engine.stats["pages_held"] == 0
    return result


async def collect(served, prompt, params, **wanted):
    return [event async for event in served.stream(prompt, params, **wanted)]


def replay(patches, length):
    """The first ``length`` cells of the canvas."""
    cells = [None] * 200
    for patch in patches:
        cells[patch.offset : patch.offset + len(patch.token_ids)] = patch.token_ids
    return cells[:length]


def some_requests(count, seed):
    rng = random.Random(seed)
    for i in range(count):
        pinned = {offset: token for offset, token in MULTIBYTE.items() if rng.random() < 0.8} if i % 2 else None
        yield (
            [rng.randrange(256) for _ in range(rng.randint(1, 30))],
            SamplingParams(
                max_tokens=rng.randint(40, 60),
                temperature=rng.choice([0.0, 1.0]),
                seed=i,
                accept_threshold=rng.choice([0.0, 0.3, 0.9]),
                remask_threshold=rng.choice([0.0, 0.2]),
                pinned=pinned,
                ignore_eos=rng.random() < 0.5,
                stop=rng.choice([(), ("好 ", "on"), ("ï", "👍", "zzz")]),
                logprobs=rng.random() < 0.5,
                n=rng.choice([1, 1, 2]),
            ),
        )


@pytest.mark.sweep_but("llada2_edit")
@pytest.mark.parametrize("strategy", ["llada2_edit", "dmax"])
def test_streams_answers_and_replays_agree(engines, strategy):
    requests = list(some_requests(30, seed=1))

    async def use(served):
        streams = [collect(served, prompt, params, provisional=i % 3 == 0) for i, (prompt, params) in enumerate(requests)]
        answers = [served.generate(prompt, params) for prompt, params in requests]
        return await asyncio.gather(*streams), await asyncio.gather(*answers)

    streams, answers = run(engines[strategy], use)
    texts = set()
    for number, ((_, params), events, replies) in enumerate(zip(requests, streams, answers, strict=True)):
        assert isinstance(events[0], Accepted)
        for reply in replies:
            commits = [e for e in events if isinstance(e, Commit) and e.index == reply.index]
            (ended,) = [e for e in events if isinstance(e, Reply) and e.index == reply.index]
            assert "".join(c.text for c in commits) == reply.text == ended.text
            assert sum((c.token_ids for c in commits), ()) == reply.token_ids == ended.token_ids
            assert [c.offset for c in commits] == np.cumsum([0, *(len(c.token_ids) for c in commits)]).tolist()[: len(commits)]
            assert reply.finish_reason == ended.finish_reason
            assert reply.nfe == ended.nfe or params.stop  # how soon the host sees a stop text depends on what else it does
            if params.logprobs:
                streamed = sum((c.logprobs for c in commits), ())
                assert np.exp(streamed) == pytest.approx(np.exp(reply.logprobs), abs=1e-6)
            if number % 3 == 0:
                steps = [e for e in events if isinstance(e, Provisional) and e.index == reply.index]
                assert [s.nfe for s in steps] == list(range(1, ended.nfe + 1))
                assert replay(steps, len(reply.token_ids)) == list(reply.token_ids)
            texts.add(reply.text)
    assert any("你好" in text for text in texts) and any("�" in text for text in texts)


def test_commits_come_as_the_text_grows(engine):
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    events = run(engine, lambda served: collect(served, [65, 66], params))
    assert sum(isinstance(e, Commit) for e in events) >= 3


def test_text_and_its_tokens_are_one_prompt(engine):
    async def use(served):
        return await served.generate("hello"), await served.generate(list(b"hello"))

    by_text, by_ids = run(engine, use)
    assert by_text[0].token_ids == by_ids[0].token_ids


def test_leaving_a_stream_aborts_it(engine):
    async def use(served):
        async with contextlib.aclosing(served.stream([65], SamplingParams(max_tokens=100, ignore_eos=True))) as events:
            async for event in events:
                if isinstance(event, Commit):
                    break
        return list(served.in_flight)

    assert run(engine, use) == []


def test_cancelling_a_task_aborts_its_request(engine):
    async def use(served):
        task = asyncio.create_task(served.generate([65], SamplingParams(max_tokens=100, ignore_eos=True), id="mine"))
        while "mine" not in served.in_flight:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return list(served.in_flight)

    assert run(engine, use) == []


def test_abort_answers_the_one_who_waits(engine):
    async def use(served):
        task = asyncio.create_task(served.generate([65], SamplingParams(max_tokens=100, ignore_eos=True), id="mine"))
        while not served.abort("mine"):
            await asyncio.sleep(0.001)
        with pytest.raises(RequestError) as caught:
            await task
        return caught.value.code, served.abort("mine")

    assert run(engine, use) == (499, False)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "prompt is empty"),
        ([5000], SamplingParams(), "prompt holds token id 5000"),
        ([1], SamplingParams(max_tokens=500), "exceeds max_model_len=128"),
        ([5000], SamplingParams(), "outside the vocabulary"),
    ],
)
def test_a_request_that_will_not_do_is_told_why_and_hurts_nobody(engine, prompt, params, message):
    async def use(served):
        good = asyncio.create_task(served.generate([65], SamplingParams(max_tokens=20)))
        with pytest.raises(RequestError, match=message) as caught:
            await served.generate(prompt, params)
        return caught.value.code, (await good)[0].finish_reason

    code, reason = run(engine, use)
    assert code == 400 and reason in ("stop", "length")


def test_a_text_that_cannot_be_made_fails_one_request_alone(engine, monkeypatch):
    decode = engine.tokenizer.decode

    def failing(ids):
        if 7 in list(ids):
            raise RuntimeError("no text for 7")
        return decode(ids)

    monkeypatch.setattr(engine.tokenizer, "decode", failing)
    bad = SamplingParams(max_tokens=100, ignore_eos=True, pinned={3: 7})

    async def use(served):
        good = asyncio.create_task(served.generate([65], SamplingParams(max_tokens=40, ignore_eos=True, pinned={3: 8})))
        with pytest.raises(RequestError, match="no text for 7") as caught:
            await collect(served, [66], bad)
        return caught.value.code, (await good)[0].finish_reason, served.supervisor.restarts

    assert run(engine, use) == (500, "length", 0)


def test_an_output_that_is_no_number_fails_one_request_alone(engine, monkeypatch):
    step = engine.step

    def failing():
        return {
            id_: output if 7 not in output.token_ids else type(output)(**vars(output) | {"finish_reason": "error"})
            for id_, output in step().items()
        }

    monkeypatch.setattr(engine, "step", failing)
    sick = SamplingParams(max_tokens=40, ignore_eos=True, pinned={0: 7}, n=2)

    async def use(served):
        good = asyncio.create_task(served.generate([65], SamplingParams(max_tokens=40, ignore_eos=True, pinned={0: 8})))
        with pytest.raises(RequestError, match="not finite") as caught:
            await served.generate([66], sick)
        return caught.value.code, (await good)[0].finish_reason

    assert run(engine, use) == (500, "length")


def test_a_failing_step_fails_all_at_once_and_the_engine_comes_back(engine, engines, monkeypatch):
    broken = iter([True])
    step = Engine.step

    def failing(self):
        if self is engine and next(broken, False):
            raise RuntimeError("device lost")
        return step(self)

    monkeypatch.setattr(Engine, "step", failing)

    async def main():
        replacements = iter([engine, engines["dmax"]])
        async with asyncio.timeout(60), AsyncEngine(lambda: next(replacements)) as served:
            tasks = [asyncio.create_task(served.generate([65 + i])) for i in range(3)]
            failed = await asyncio.gather(*tasks, return_exceptions=True)
            assert served.supervisor.health.value == "down"
            with pytest.raises(RequestError, match="engine is .*device lost") as caught:
                await served.generate([65])
            assert caught.value.code == 503
            while served.supervisor.health.value != "ready":
                await asyncio.sleep(0.01)
            (reply,) = await served.generate([65])
            return failed, reply, served.supervisor.restarts

    failed, reply, restarts = asyncio.run(main())
    for id_ in list(engine._desk.requests):
        engine.abort(id_)
    assert [(e.code, "device lost" in e.message) for e in failed] == [(503, True)] * 3
    assert reply.token_ids and restarts == 1


@pytest.mark.parametrize("fault", [False, True])
def test_a_loop_that_ends_leaves_no_listener_behind(engine, monkeypatch, fault):
    def broken():
        raise RuntimeError("the step broke")

    listeners = list(monitoring.get_event_duration_listeners())
    commands = [[protocol.Generate(id="a", prompt=(5,), params=SamplingParams(), strategy=engine.strategy)], [protocol.Stop()]]
    if fault:
        monkeypatch.setattr(engine, "step", broken)
    with pytest.raises(RuntimeError, match="broke") if fault else contextlib.nullcontext():
        loop.run({engine.strategy: engine}, lambda wait: commands.pop(0), lambda events: None)
    assert monitoring.get_event_duration_listeners() == listeners
    monkeypatch.undo()
    engine.generate([[5]], SamplingParams(max_tokens=1))
    while engine.has_work:
        engine.step()


def test_an_engine_that_cannot_be_built_says_why():
    async def main(factory):
        async with AsyncEngine(factory):
            pass

    def refused():
        raise ValueError("max_slots=0 must be a positive integer")

    def crashed():
        raise KeyError("weights")

    with pytest.raises(ValueError, match="max_slots=0"):
        asyncio.run(main(refused))
    with pytest.raises(RuntimeError, match="KeyError"):
        asyncio.run(main(crashed))
    with pytest.raises(ValueError, match="isolation='fork'"):
        AsyncEngine(refused, isolation="fork")


def test_draining_finishes_what_there_is_and_takes_no_more(engine):
    async def use(served):
        task = asyncio.create_task(served.generate([65], SamplingParams(max_tokens=40, ignore_eos=True)))
        await asyncio.sleep(0.02)
        draining = asyncio.create_task(served.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="shutting down") as caught:
            await served.generate([66])
        return caught.value.code, (await task)[0].finish_reason, await draining

    assert run(engine, use) == (503, "length", True)


def test_what_a_drain_has_no_time_for_is_cut_off(engine):
    async def use(served):
        task = asyncio.create_task(served.generate([65], SamplingParams(max_tokens=100, ignore_eos=True)))
        await asyncio.sleep(0.02)
        done = await served.drain(0)
        with pytest.raises(RequestError) as caught:
            await task
        return done, caught.value.code

    assert run(engine, use) == (False, 503)


def test_a_profile_can_be_taken(engine, tmp_path):
    async def use(served):
        await served.start_profile(str(tmp_path))
        await served.generate([65], SamplingParams(max_tokens=8))
        await served.stop_profile()
        assert list(tmp_path.rglob("*.xplane.pb"))
        with pytest.raises(RequestError, match="No profile") as caught:  # and the engine goes on
            await served.stop_profile()
        return caught.value.code, len((await served.generate([65], SamplingParams(max_tokens=8, ignore_eos=True)))[0].token_ids)

    assert run(engine, use) == (400, 8)


def test_settings_travel_between_processes():
    params = SamplingParams(pinned={3: 7}, init_tokens={1: 2}, stop="x", n=2)
    assert pickle.loads(pickle.dumps(params)) == params
