"""One engine over several hosts: process 0 schedules, and the others repeat its calls of the device, in the same order.

Every process builds the same engines. What the scheduler asks of the device (``scheduler.Device``) is sent to all, so that all launch the
same programs; only process 0 reads what they say.
"""

from __future__ import annotations

import atexit
import io
import itertools
import pickle
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from diffulex_jax.engine.device import JaxDevice
from diffulex_jax.engine.request import Tracked
from diffulex_jax.models.base import Params
from diffulex_jax.parallel import hosts


if TYPE_CHECKING:
    from diffulex_jax.engine.engine import Engine


_calls = hosts.Messages("calls")
_numbers = itertools.count()
_lock = threading.RLock()  # what is said of different engines is done in the order in which it was said
_gone: list[int] = []  # keys of requests that process 0 forgot


class Mirror:
    """A ``scheduler.Device``: the device of one engine, whose calls the other hosts repeat.

    Attributes:
      device: this host's side of it.
      number: the engine's, the same on every host: they are built in the same order.
    """

    def __init__(self, device: JaxDevice):
        self.device, self.number = device, next(_numbers)
        self._launched = 0
        if self.number == 0 and hosts.leads():
            atexit.register(_end)

    @property
    def saved_structure(self) -> Any:
        return self.device.saved_structure

    @property
    def params(self) -> Params:
        return self.device.params

    def __getattr__(self, name: str) -> Any:
        """A call of the device that all make."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not hosts.leads():
                raise RuntimeError("this host repeats what process 0 does; call follow() here, and generate() there")
            with _lock:
                sent = _calls.send(_pickled((self.number, name, args, kwargs)))
                if name == "launch":
                    self._launched = sent
                return getattr(self.device, name)(*args, **kwargs)

        return call

    def collect(self, launched: Any) -> Any:
        """Waits for what was launched. That is over when all hosts did their part: they have received what led to it."""
        report = self.device.collect(launched)
        _calls.forget(self._launched)
        return report


def _end() -> None:
    _calls.send(pickle.dumps(None))
    hosts.part()


def follow(engines: Iterable[Engine]) -> None:
    """Repeats what process 0 does, until it ends. For all other processes, with all engines that they built. An error ends all."""
    try:
        _repeat(engines)
    except Exception as error:
        hosts.fail_alone(f"{type(error).__name__}: {error}")
        raise
    hosts.part()


def _repeat(engines: Iterable[Engine]) -> None:
    mirrors: list[Any] = [engine._device for engine in engines]
    devices: dict[int, JaxDevice] = {mirror.number: mirror.device for mirror in mirrors}
    known: dict[int, Tracked] = {}
    while (message := _Reader(_calls.receive(), known).load()) is not None:
        (number, name, args, kwargs), gone = message
        getattr(devices[number], name)(*args, **kwargs)
        for key in gone:
            del known[key]


def _pickled(call: tuple[int, str, tuple[Any, ...], dict[str, Any]]) -> bytes:
    gone = _gone[:]
    del _gone[: len(gone)]
    file = io.BytesIO()
    _Writer(file, pickle.HIGHEST_PROTOCOL).dump((call, gone))
    return file.getvalue()


class _Writer(pickle.Pickler):
    """Writes of a request what a device looks at, and only once what never changes of it."""

    _keys: weakref.WeakKeyDictionary[Tracked, int] = weakref.WeakKeyDictionary()
    _next_key = itertools.count()

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, Tracked):
            return None
        fixed = None
        if thing not in self._keys:
            self._keys[thing] = key = next(self._next_key)
            weakref.finalize(thing, _gone.append, key).atexit = False
            fixed = thing.id, thing.prompt, thing.params
        saved = None if thing.saved is None else pickle.dumps(thing.saved)
        return self._keys[thing], fixed, thing.slot, np.asarray(thing.pages, np.int32).tobytes(), thing.written, len(thing.tokens), saved


class _Reader(pickle.Unpickler):
    """Reads what :class:`_Writer` wrote: a request stays one object, and so does its list of pages as long as it only grows."""

    def __init__(self, message: bytes, known: dict[int, Tracked]):
        super().__init__(io.BytesIO(message))
        self._known = known

    def persistent_load(self, pid: Any) -> Tracked:
        key, fixed, slot, pages, written, tokens, saved = pid
        if fixed is not None:
            id_, prompt, params = fixed
            self._known[key] = Tracked(id=id_, prompt=prompt, params=params)
        request, held = self._known[key], np.frombuffer(pages, np.int32).tolist()
        if held[: len(request.pages)] == request.pages and request.pages:
            request.pages += held[len(request.pages) :]
        else:
            request.pages = held
        request.slot, request.written, request.tokens = slot, written, [0] * tokens
        request.saved = None if saved is None else pickle.loads(saved)
        return request
