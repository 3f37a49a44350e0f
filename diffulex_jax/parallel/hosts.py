"""Several hosts, one engine: how their processes meet, what they tell each other, and who is still there.

JAX connects the processes and puts all their devices into one mesh (``jax.distributed``). The little that they say beside it goes through
the key-value store of JAX's coordination service, which process 0 holds. JAX has no public name for that store: :func:`_store` is the one
place that knows where it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


_PART = 2**20  # bytes of a value; a gRPC message holds at most 4 MiB
_FORGET_EVERY = 64  # messages
_BEAT_SECONDS = 1.0
SILENCE_SECONDS = 6.0  # a host that says nothing for so long is lost
_JAX_SILENCE_SECONDS = 20  # then JAX ends those that are left, if they are still there

logger = logging.getLogger(__name__)

_listeners: list[Callable[[str], None]] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """How the processes of a job meet. What is None JAX takes from its environment variables (``JAX_COORDINATOR_ADDRESS``,
    ``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``), or finds out on TPU pods, Kubernetes, Slurm and Open MPI.

    Attributes:
      coordinator: ``"host:port"`` of process 0.
      count: processes of the job.
      index: of this one.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def connect(self) -> None:
        """Meets the others, and ends this process when one of them is lost: what they compute together cannot go on.

        Call it before JAX computes anything. Where process 0 is gone, it is JAX that ends the others.

        Raises:
          ValueError: for what will not do, or where the environment does not say what is left out.
          RuntimeError: when the others do not come.
        """
        told = None not in (self.coordinator, self.count, self.index)
        jax.distributed.initialize(
            self.coordinator,
            self.count,
            self.index,
            cluster_detection_method="deactivate" if told else None,  # which would leave this process one of several GPUs
            heartbeat_timeout_seconds=_JAX_SILENCE_SECONDS,
        )
        threading.Thread(target=_watch if leads() else _beat, name="hosts", daemon=True).start()


def part() -> None:
    """Leaves the others in good order; all call this."""
    jax.distributed.shutdown()


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def leads() -> bool:
    """Whether this process schedules; the others repeat what it does."""
    return jax.process_index() == 0


def least(mine: int) -> int:
    """The smallest of the numbers that the processes give, all of which call this."""
    return int(multihost_utils.process_allgather(np.int64(mine)).min()) if several() else mine


class Messages:
    """What process 0 says to all others, in order."""

    def __init__(self, name: str):
        self._name, self._numbers, self._forgotten = name, itertools.count(), 0

    def send(self, message: bytes) -> int:
        """Says it, and gives its number."""
        number = next(self._numbers)
        parts = [message[at : at + _PART] for at in range(0, max(1, len(message)), _PART)]
        for i, part in enumerate(parts):
            _store().key_value_set_bytes(self._key(number, i), part)
        _store().key_value_set(self._key(number, "parts"), str(len(parts)))
        return number

    def receive(self) -> bytes:
        """Waits for the next message. Where process 0 is gone, JAX ends this one."""
        number = next(self._numbers)
        count = int(_wait(lambda: _store().blocking_key_value_get(self._key(number, "parts"), 60_000)))
        return b"".join(_store().blocking_key_value_get_bytes(self._key(number, i), 60_000) for i in range(count))

    def forget(self, number: int) -> None:
        """Drops messages up to ``number``, which all others have received."""
        while self._forgotten + _FORGET_EVERY <= number:
            _store().key_value_delete(f"{self._name}/{self._forgotten // _FORGET_EVERY}/")
            self._forgotten += _FORGET_EVERY

    def _key(self, number: int, part: int | str) -> str:
        return f"{self._name}/{number // _FORGET_EVERY}/{number}/{part}"


def tell(listener: Callable[[str], None]) -> None:
    """Calls ``listener(reason)`` when another process is lost, before this one, process 0, ends."""
    _listeners.append(listener)


def _watch() -> None:
    heard = {i: ("", time.monotonic()) for i in range(1, jax.process_count())}
    while _store() is not None:
        time.sleep(_BEAT_SECONDS)
        for i, (last, since) in heard.items():
            said = _last_beat(i)
            if said != last:
                heard[i] = said, time.monotonic()
            elif last and time.monotonic() - since > SILENCE_SECONDS and _store() is not None:
                reason = f"host {i} of {jax.process_count()} has said nothing for {SILENCE_SECONDS:.0f} s"
                logger.error("%s", reason)
                for listener in _listeners:
                    listener(reason)
                os._exit(1)  # the main thread may wait in a computation that never ends


def _beat() -> None:
    with contextlib.suppress(Exception):  # process 0 is gone, or this one has left
        for n in itertools.count(1):
            _store().key_value_set(f"beat/{jax.process_index()}", str(n), allow_overwrite=True)
            time.sleep(_BEAT_SECONDS)


def _last_beat(index: int) -> str:
    try:
        return _store().key_value_try_get(f"beat/{index}")
    except Exception:  # the store raises where there is no such key yet
        return ""


def _wait(ask: Callable[[], str]) -> str:
    """What ``ask`` gives, however often it runs out of time."""
    while True:
        try:
            return ask()
        except Exception as error:  # JAX's type for it is not public
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _store() -> Any:
    from jax._src import distributed

    return distributed.global_state.client
