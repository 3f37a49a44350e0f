"""Several hosts, one engine: how their processes meet, what they tell each other, and who is still there.

JAX connects the processes and puts all their devices into one mesh (``jax.distributed``). The little that they say beside it goes through
the key-value store of JAX's coordination service, which process 0 holds. JAX has no public name for that store: :func:`_state` is the one
place that knows where it is.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils


_PART = 2**20  # bytes of a value; a gRPC message holds at most 4 MiB
_FORGET_EVERY = 64  # messages
_BEAT_SECONDS = 1.0
_NAME_SECONDS = 15.0  # a name that nobody knows so long is a wrong one
_PATIENCE_SECONDS = 10.0  # who is waited for so long is named, and then again and again
SILENCE_SECONDS = 6.0  # a host that says nothing for so long is lost
_JAX_SILENCE_SECONDS = 20  # then JAX ends those that are left, if they are still there

logger = logging.getLogger(__name__)

_listeners: list[Callable[[str], None]] = []
_agreements = itertools.count()
_ending = threading.Event()  # this process ends for a reason of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """How the processes of a job meet. What is None is taken from ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``; what those do not say either JAX finds out on TPU pods, Kubernetes, Slurm and Open MPI.

    Attributes:
      coordinator: ``"host:port"`` of process 0.
      count: processes of the job.
      index: of this one.
      meet_seconds: how long the first may wait for the last.

    Raises:
      ValueError: for what will not do.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    meet_seconds: float = 300.0

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        set_("coordinator", self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"))
        set_("count", _number("JAX_NUM_PROCESSES") if self.count is None else self.count)
        set_("index", _number("JAX_PROCESS_ID") if self.index is None else self.index)
        if self.coordinator is not None and not _is_address(self.coordinator):
            raise ValueError(f"the coordinator {self.coordinator!r} must be HOST:PORT of host 0, like 10.0.0.1:1234")
        if self.count is not None and self.index is not None and not 0 <= self.index < self.count:
            raise ValueError(f"the host index {self.index} must be one of 0 to {self.count - 1}: there are {self.count} hosts")
        if not 0 < self.meet_seconds < math.inf:
            raise ValueError(f"meet_seconds={self.meet_seconds} must be a number above 0")

    def connect(self) -> None:
        """Meets the others, and ends this process when one of them is lost: what they compute together cannot go on.

        Call it before JAX computes anything. Where process 0 is gone, or this is one too many, it is JAX that ends this process. So does
        this, with exit code 1, where the others do not come in ``meet_seconds``; meanwhile the log says who is waited for.

        Raises:
          ValueError: where the environment does not say what is left out.
          OSError: where this is host 0 and the coordinator's port is taken, or another and nobody knows the coordinator's name.
        """
        told = None not in (self.coordinator, self.count, self.index)
        if self.coordinator and self.index:
            _check_known(_place(self.coordinator)[0])
        elif self.coordinator and self.index == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            _check_free(_place(self.coordinator)[1])
        met = threading.Event()
        threading.Thread(target=self._wait, args=(met,), name="meeting", daemon=True).start()
        try:
            jax.distributed.initialize(
                self.coordinator,
                self.count,
                self.index,
                cluster_detection_method="deactivate" if told else None,  # which would leave this process one of several GPUs
                initialization_timeout=int(self.meet_seconds) + 60,  # then JAX would end this process without saying why
                heartbeat_timeout_seconds=_JAX_SILENCE_SECONDS,
            )
        except ValueError as error:
            raise ValueError(f"JAX does not find out how hosts meet here ({error}); say --coordinator, --hosts and --host-index") from error
        finally:
            met.set()
        # From here on an error is told to all: JAX finds its devices next, where each waits for the others.
        threading.Thread(target=_beat if _state().process_id else _watch, name="hosts", daemon=True).start()

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Connects for the time of a ``with``: an error in it ends the others too, otherwise all part in good order."""
        self.connect()
        try:
            yield
        except Exception as error:
            fail(" ".join(str(error).split()))
            raise
        part()

    def _wait(self, met: threading.Event) -> None:
        """Says who is waited for until all have ``met``, and ends this process where that takes too long."""
        ends = time.monotonic() + self.meet_seconds
        while not met.wait(min(_PATIENCE_SECONDS, max(0.0, ends - time.monotonic()))):
            missing = self._missing()
            if time.monotonic() > ends:
                _lose(f"the hosts have not met in {self.meet_seconds:g} s: {missing}")
            logger.warning("waiting for the other hosts: %s", missing)

    def _missing(self) -> str:
        all_ = f"all {self.count}, each with an index of its own," if self.count else "all"
        if self.coordinator is None:
            return f"not {all_} have come to the address that JAX found out"
        if self.index == 0:
            return f"not {all_} have come to {self.coordinator}, where this one, host 0, listens"
        try:
            socket.create_connection(_place(self.coordinator), timeout=5).close()
        except OSError as error:
            return f"host 0 does not answer at {self.coordinator} ({error.strerror or error})"
        return f"host 0 answers at {self.coordinator}, but not {all_} have come"


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"{variable}={text!r} must be a number")
    return int(text)


def _is_address(text: str) -> bool:
    if not re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):[0-9]{1,5}", text):
        return False
    host, port = _place(text)
    try:
        host.encode("idna")  # which looking up a name begins with
    except UnicodeError:
        return False
    return 0 < port < 2**16


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _check_known(host: str) -> None:
    """Raises OSError for a name that no resolver knows, and does not come to know: JAX would try again for minutes."""
    ends = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if error.errno != socket.EAI_NONAME:
                return  # nobody could be asked: the log says so, if it stays so
            if time.monotonic() > ends:
                raise OSError(f"nobody knows the coordinator's name {host!r} ({error.strerror}); it must be that of host 0") from error
        time.sleep(1)


def _check_free(port: int) -> None:
    """Raises OSError where the port is taken: JAX would not say which."""
    both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both).close()
    except OSError as error:
        raise OSError(
            f"the coordinator's port {port} cannot be had on host 0 ({os.strerror(error.errno or 0)}); choose another on all hosts"
        ) from error


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


def agree(facts: Mapping[str, str]) -> None:
    """Checks that all processes give the same ``facts``, names and values; all call this, in the same order.

    Raises:
      ValueError: on every one of them, naming what differs first, where, and both values.
    """
    if not several():
        return
    at, mine = f"agree/{next(_agreements)}", _state().process_id
    if mine:
        _store().key_value_set(f"{at}/{mine}", json.dumps(dict(facts)))
    else:
        _store().key_value_set(f"{at}/found", json.dumps(_difference(at, facts)))
    if found := json.loads(_heard(f"{at}/found")):
        _end()
        raise ValueError(found)


def _difference(at: str, ours: Mapping[str, str]) -> str:
    for i in range(1, _state().num_processes):
        theirs = json.loads(_heard(f"{at}/{i}"))
        for name in {**ours, **theirs}:
            if theirs.get(name) != ours.get(name):
                both = f"{theirs.get(name)} on host {i} of {_state().num_processes}, and {ours.get(name)} on host 0"
                return f"{name} is {both}; all hosts must be started alike"
    return ""


def fail(reason: str) -> None:
    """Tells the others why this process ends, which ends them, too. Nothing where it is the only one."""
    if _store() is None or _ending.is_set():
        return
    _ending.set()
    _say_fault(f"host {_state().process_id} of {_state().num_processes} ended: {reason}")
    _end()


def fail_alone(reason: str) -> None:
    """As :func:`fail`, but for what may go wrong here because another host is lost: then that is said, and this process ends meanwhile."""
    if several() and not _ending.is_set():
        time.sleep(2 * SILENCE_SECONDS)
        fail(reason)


def _end() -> None:
    """This process is to end by itself, and not to wait for the others at its exit, as JAX would, which aborts it when they are gone."""
    _ending.set()
    _let_others_read()
    atexit.register(_leave)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


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
        count = int(_heard(self._key(number, "parts")))
        return b"".join(_store().blocking_key_value_get_bytes(self._key(number, i), 60_000) for i in range(count))

    def forget(self, number: int) -> None:
        """Drops messages up to ``number``, which all others have received."""
        while self._forgotten + _FORGET_EVERY <= number:
            _store().key_value_delete(f"{self._name}/{self._forgotten // _FORGET_EVERY}/")
            self._forgotten += _FORGET_EVERY

    def _key(self, number: int, part: int | str) -> str:
        return f"{self._name}/{number // _FORGET_EVERY}/{number}/{part}"


def tell(listener: Callable[[str], None]) -> None:
    """Calls ``listener(reason)`` when another process is lost, before this one ends."""
    _listeners.append(listener)


def _watch() -> None:
    heard = {i: ("", time.monotonic()) for i in range(1, _state().num_processes)}
    while _store() is not None:
        time.sleep(_BEAT_SECONDS)
        for i, (last, since) in heard.items():
            said = _read(f"beat/{i}")
            if said != last:
                heard[i] = said, time.monotonic()
            elif last and time.monotonic() - since > SILENCE_SECONDS and _store() is not None:
                _say_fault(f"host {i} of {len(heard) + 1} has said nothing for {SILENCE_SECONDS:.0f} s")
        _end_with_others()


def _beat() -> None:
    for n in itertools.count(1):
        if _store() is None:
            return  # this one has left; where process 0 is gone, JAX ends it
        with contextlib.suppress(Exception):
            _store().key_value_set(f"beat/{_state().process_id}", str(n), allow_overwrite=True)
        _end_with_others()
        time.sleep(_BEAT_SECONDS)


def _say_fault(reason: str) -> None:
    with contextlib.suppress(Exception):  # another was first
        _store().key_value_set("fault", reason)


def _end_with_others() -> None:
    if (reason := _read("fault")) and not _ending.is_set():
        if _state().num_processes > 2:
            _let_others_read()
        _lose(reason)


def _let_others_read() -> None:
    """What was said is gone with process 0."""
    if _state().process_id == 0:
        time.sleep(2 * _BEAT_SECONDS)


def _lose(reason: str) -> NoReturn:
    logger.error("%s", reason)
    for listener in _listeners:
        listener(reason)
    os._exit(1)  # the main thread may wait in a computation that never ends


def _read(key: str) -> str:
    try:
        return _store().key_value_try_get(key)
    except Exception:  # the store raises where there is no such key yet
        return ""


def _heard(key: str) -> str:
    """Waits for the value of a key, however long."""
    while True:
        try:
            return _store().blocking_key_value_get(key, 60_000)
        except Exception as error:  # JAX's type for it is not public
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _store() -> Any:
    return _state().client


def _state() -> Any:
    """What JAX knows of the job before it has looked for devices."""
    from jax._src import distributed

    return distributed.global_state
