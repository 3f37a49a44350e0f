"""Where the owner loop runs: a thread of this process, or a process of its own.

Both are a :class:`Worker`: commands go in, lists of events come out through ``deliver``, which is called on a thread of the worker's.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import jax
from tqdm import tqdm

from diffulex_jax import compile_cache
from diffulex_jax.async_serving import loop, protocol
from diffulex_jax.engine import mirror, startup
from diffulex_jax.engine.engine import Engine
from diffulex_jax.parallel import hosts


logger = logging.getLogger(__name__)

Engines = Mapping[str, Engine]
Factory = Callable[[], Engine | Engines]
Deliver = Callable[[list[protocol.Event]], None]

BEAT_SECONDS = 0.25
ENGINE_THREAD = "engine"  # name of the thread that cannot be ended


class Worker(Protocol):
    """Runs an engine. ``watched``: it sends Beats, and :meth:`kill` ends it whatever it does."""

    watched: bool

    def send(self, command: protocol.Command) -> None:
        """Hands over a command; one sent to a worker that has ended is lost."""

    def kill(self) -> None:
        """Ends it at once. A thread cannot be ended: it is left to itself, and nothing more is heard of it."""

    def join(self, seconds: float) -> bool:
        """Waits for its end; says whether it came."""


def build(factory: Factory, emit: Deliver) -> Engines | None:
    """Makes the engines, by strategy, and says so; None where that failed."""
    try:
        with startup.told_to(lambda stage, what: emit([protocol.Starting(stage, what)])):
            made = factory()
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        hosts.fail(reason)
        emit([protocol.Stopped(reason, refused=True)])
        return None
    except Exception as error:
        logger.exception("the engine could not be built")
        hosts.fail(f"{type(error).__name__}: {error}")
        emit([protocol.Stopped(f"{type(error).__name__}: {error}")])
        return None
    engines = made if isinstance(made, Mapping) else {made.strategy: made}
    tokenizer = next(iter(engines.values())).tokenizer
    unloaded = copy.copy(tokenizer)  # cheap to send
    for engine in engines.values():
        if engine.tokenizer is not None:
            engine.tokenizer.decode([0])  # load it now, not in the first request's time
    emit([protocol.Ready(unloaded, facts_of(engines)), protocol.Status(loop.stats_of(engines))])
    return engines


def facts_of(engines: Engines) -> dict[str, Any]:
    """What is true of all engines, and under ``strategies`` what is of each; the first is the default."""
    first = next(iter(engines.values()))
    own = ("buffer_size", "attention", "num_pages")
    settings = {name: dataclasses.asdict(engine.settings) | {"num_pages": engine.stats["pages"]} for name, engine in engines.items()}
    return {
        **{name: value for name, value in dataclasses.asdict(first.settings).items() if name not in own},
        "strategies": {strategy: {name: values[name] for name in own} for strategy, values in settings.items()},
        "vocab_size": first.model.spec.vocab_size,
        "mask_token_id": first.model.spec.mask_id,
        "platform": jax.default_backend(),
        "host_index": jax.process_index(),
        "hosts": jax.process_count(),
        "pid": os.getpid(),
    }


def own(factory: Factory, receive: Callable[[bool], list[protocol.Command]], emit: Deliver) -> None:
    """A worker's life: builds the engines and runs their loop until a Stop or a fault."""
    hosts.tell(lambda reason: emit([protocol.Stopped(reason)]))
    engines = build(factory, emit)
    if engines is None:
        return
    try:
        if hosts.leads():
            loop.run(engines, receive, emit)
        else:
            mirror.follow(engines.values())
    except Exception as error:
        logger.exception("the engine failed")
        hosts.fail_alone(f"{type(error).__name__}: {error}")
        emit([protocol.Stopped(f"{type(error).__name__}: {error}")])
    else:
        emit([protocol.Stopped("")])


@dataclasses.dataclass
class ThreadWorker:
    """The owner loop in a thread of this process: nothing to copy, nothing to start; a hung step cannot be ended."""

    factory: Factory
    deliver: Deliver
    watched: bool = False

    def __post_init__(self) -> None:
        self._commands: queue.SimpleQueue[protocol.Command] = queue.SimpleQueue()
        self._abandoned = False
        self._thread = threading.Thread(target=own, args=(self.factory, self._receive, self._emit), name=ENGINE_THREAD, daemon=True)
        self._thread.start()

    def send(self, command: protocol.Command) -> None:
        self._commands.put(command)

    def kill(self) -> None:
        self._abandoned = True
        self._commands.put(protocol.Stop())

    def join(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _emit(self, events: list[protocol.Event]) -> None:
        if not self._abandoned:
            self.deliver(events)

    def _receive(self, wait: bool) -> list[protocol.Command]:
        commands = [self._commands.get()] if wait else []
        with contextlib.suppress(queue.Empty):
            while True:
                commands.append(self._commands.get_nowait())
        return commands


class ProcessWorker:
    """The owner loop in a process of its own: it may be killed, stop, or hang, and this process lives on."""

    watched = True

    def __init__(self, factory: Factory, deliver: Deliver, *, cache: pathlib.Path | None):
        self._deliver = deliver
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._outbox: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self.process = context.Process(target=_process_main, args=(factory, theirs, cache), name="engine", daemon=True)
        self.process.start()
        theirs.close()
        for target in (self._read, self._write):
            threading.Thread(target=target, name=f"engine{target.__name__}", daemon=True).start()

    def send(self, command: protocol.Command) -> None:
        self._outbox.put(ForkingPickler.dumps(command))  # here: what cannot be sent is the sender's error

    def kill(self) -> None:
        self.process.kill()

    def join(self, seconds: float) -> bool:
        self.process.join(seconds)
        return self.process.exitcode is not None

    def _read(self) -> None:
        said_so = False
        with contextlib.suppress(EOFError, OSError):
            while True:
                events = self._pipe.recv()
                said_so |= any(isinstance(event, protocol.Stopped) for event in events)
                self._deliver(events)
        if not said_so:
            self.process.join(5)
            self._deliver([protocol.Stopped(f"the engine's process ended with exit code {self.process.exitcode}")])
        self._outbox.put(None)

    def _write(self) -> None:
        # A thread of its own: the pipe may be full while the process is stopped, and nobody here should wait for that.
        while (pickled := self._outbox.get()) is not None:
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(pickled)


def _process_main(factory: Factory, pipe: multiprocessing.connection.Connection, cache: pathlib.Path | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore of the system's, which outlives a process that is killed
    compile_cache.enable(cache)  # so that a restart only reads
    lock, ticking_since = threading.Lock(), collections.deque([0.0], maxlen=1)

    def emit(events: list[protocol.Event]) -> None:
        try:
            with lock:
                pipe.send(events)
        except OSError:
            os._exit(1)  # nobody is left to hear

    def beat() -> None:
        while True:
            since = ticking_since[0]
            emit([protocol.Beat(time.monotonic() - since if since else 0.0)])
            time.sleep(BEAT_SECONDS)

    def receive(wait: bool) -> list[protocol.Command]:
        ticking_since.append(0.0)
        commands: list[protocol.Command] = []
        try:
            while pipe.poll(None if wait and not commands else 0):
                commands.append(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone
        ticking_since.append(time.monotonic())
        return commands

    def build_and_freeze() -> Engines | Engine:
        made = factory()
        gc.collect()
        gc.freeze()  # as the server does: no search for garbage goes through what stays
        return made

    threading.Thread(target=beat, name="beat", daemon=True).start()
    own(build_and_freeze, receive, emit)
