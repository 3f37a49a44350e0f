"""The supervisor, with workers that do as they are told."""

from __future__ import annotations

import asyncio

import pytest

from diffulex_jax.async_serving import supervisor as module
from diffulex_jax.async_serving.protocol import Abort, Accepted, Beat, Ready, Status, Stopped
from diffulex_jax.async_serving.supervisor import Health, Supervisor


class FakeWorker:
    watched = True

    def __init__(self, deliver):
        self.deliver, self.sent, self.killed = deliver, [], False

    def send(self, command):
        self.sent.append(command)

    def kill(self):
        self.killed = True

    def join(self, seconds):
        return True


class Watched:
    """A supervisor of fake workers and what it was told."""

    def __init__(self, **settings):
        self.workers, self.events, self.down = [], [], []
        limits = {"silence_seconds": 0.5, "tick_seconds": 1000.0} | settings
        self.supervisor = Supervisor(self._make, on_events=self.events.extend, on_down=self.down.append, **limits)

    def _make(self, deliver):
        self.workers.append(FakeWorker(deliver))
        return self.workers[-1]

    async def start(self):
        started = asyncio.create_task(self.supervisor.start())
        await asyncio.sleep(0)
        self.workers[-1].deliver([Ready(None, {}), Status({"pages": 3})])
        await started

    async def next_worker(self):
        there = len(self.workers)
        while len(self.workers) == there:
            await asyncio.sleep(0.01)
        return self.workers[-1]


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(module, "_WATCH_SECONDS", 0.05)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_events_and_commands_pass():
    async def main():
        w = Watched()
        await w.start()
        assert w.supervisor.health is Health.READY and w.supervisor.stats == {"pages": 3}
        w.supervisor.send(Abort("a"))
        w.workers[0].deliver([Accepted(id="a")])
        await asyncio.sleep(0.01)
        assert w.workers[0].sent == [Abort("a")] and w.events == [Accepted(id="a")]
        await w.supervisor.stop()
        assert w.workers[0].killed and w.supervisor.health is Health.STOPPED

    run(main())


@pytest.mark.parametrize(
    ("settings", "last_words", "reason"),
    [
        ({}, [Stopped("device lost")], "device lost"),
        ({}, [], "silent for"),
        ({"tick_seconds": 3.0, "silence_seconds": 1000.0}, [Beat(4.0)], "4.0 s on one step"),
    ],
)
def test_a_lost_worker_is_replaced(settings, last_words, reason):
    async def main():
        w = Watched(**settings)
        await w.start()
        if last_words:
            w.workers[0].deliver(last_words)
        second = await w.next_worker()
        assert len(w.down) == 1 and reason in w.down[0] and reason in w.supervisor.reason
        assert w.workers[0].killed and w.supervisor.restarts == 1 and w.supervisor.health is Health.STARTING
        w.supervisor.send(Abort("lost"))
        w.workers[0].deliver([Accepted(id="a ghost")])
        second.deliver([Ready(None, {})])
        await asyncio.sleep(0.01)
        assert w.supervisor.health is Health.READY and second.sent == [] and w.events == []
        await w.supervisor.stop()

    run(main())


def test_beats_keep_a_worker_alive():
    async def main():
        w = Watched(silence_seconds=0.3)
        await w.start()
        for _ in range(12):
            w.workers[0].deliver([Beat(0.0)])
            await asyncio.sleep(0.05)
        assert w.down == []
        await w.supervisor.stop()

    run(main())


def test_workers_that_do_not_start_are_tried_again_more_and_more_slowly(monkeypatch):
    waits = []
    monkeypatch.setattr(module, "_backoff", lambda failures: waits.append(failures) or 0.0)

    async def main():
        w = Watched()
        await w.start()
        w.workers[0].deliver([Stopped("lost")])
        for _ in range(3):
            (await w.next_worker()).deliver([Stopped("no device")])
        (await w.next_worker()).deliver([Ready(None, {})])
        await asyncio.sleep(0.01)
        assert w.supervisor.health is Health.READY and w.supervisor.restarts == 4
        w.workers[-1].deliver([Stopped("lost again")])
        await w.next_worker()
        await w.supervisor.stop()

    run(main())
    assert waits == [0, 1, 2, 3, 0]


def test_backoff_doubles_up_to_a_limit():
    assert [module._backoff(n) for n in (0, 1, 2, 3, 10)] == [0.0, 2.0, 4.0, 8.0, 30.0]
