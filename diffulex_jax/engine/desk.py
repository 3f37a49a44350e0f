"""Where requests of all threads meet one scheduler, and outputs find whoever waits for them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffulex_jax.engine.outputs import make_output
from diffulex_jax.engine.request import Ended, Tracked
from diffulex_jax.engine.results import Output
from diffulex_jax.engine.scheduler import Scheduler
from diffulex_jax.engine.snapshot import Snapshot
from diffulex_jax.engine.stops import Cut, find_cut
from diffulex_jax.engine.tokenizer import Tokenizer
from diffulex_jax.engine.turns import Turns
from diffulex_jax.errors import UnknownRequest
from diffulex_jax.state import FINISH_REASONS


class Desk:
    """Takes requests in and gives outputs out, from any thread.

    An output goes to the call that waits for it (:meth:`finish`), else it is kept for the next :meth:`step`. Whoever works on the
    batch works on the requests of all.

    Attributes:
      requests: those queued or running, by id.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | None):
        self.requests: dict[int, Tracked] = {}
        self._scheduler, self._tokenizer = scheduler, tokenizer
        self._turns = Turns()
        self._ids, self._last_id = itertools.count(), -1
        self._kept: dict[int, Output] = {}
        # By id, where the output of a request goes that a call waits for; an error of its own goes there too.
        self._waiting: dict[int, dict[int, Output | Exception]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self._kept)

    def new_id(self) -> int:
        """A number that no other request has."""
        self._last_id = next(self._ids)
        return self._last_id

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Keeps requests out for the time of a ``with``.

        Raises:
          RuntimeError: when some are queued or running.
        """
        with self._turns.mine():
            if self.requests:
                raise RuntimeError(f"{len(self.requests)} requests are queued or running; this needs an engine that has none")
            yield

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Has the device between two steps of the batch, for the time of a ``with``."""
        with self._turns.mine():
            yield

    def add(self, requests: Sequence[Tracked]) -> list[int]:
        """Queues requests for :meth:`step`; returns their ids."""
        with self._turns.mine():
            self._queue(requests)
        return [request.id for request in requests]

    def resume(self, request: Tracked) -> int:
        """Queues a request ahead of others; returns its id."""
        with self._turns.mine():
            self.requests[request.id] = request
            self._scheduler.waiting.appendleft(request)
        return request.id

    def step(self) -> dict[int, Output]:
        """Works on the batch once; returns the outputs that no other call waits for, by id."""
        with self._turns.mine():
            self._work()
            kept, self._kept = self._kept, {}
        return kept

    def finish(self, requests: Sequence[Tracked]) -> Generator[tuple[int, Output], None, None]:
        """Queues requests and works until all have finished; yields each output with its id as it comes.

        Closed before that, it drops those that are left.
        """
        box: dict[int, Output | Exception] = {}
        left = {request.id for request in requests}
        try:
            with self._turns.mine():
                self._waiting |= dict.fromkeys(left, box)
                self._queue(requests)
            while left:
                with self._turns.mine():
                    if not box:  # another thread may have worked for this one
                        self._work()
                    came = dict(box)
                    box.clear()
                left -= came.keys()
                for id_, output in came.items():
                    if isinstance(output, Exception):
                        raise output
                    yield id_, output
        finally:
            with self._turns.mine():
                for id_ in left:
                    if request := self.requests.pop(id_, None):
                        self._scheduler.drop(request)
                    self._waiting.pop(id_, None)

    def find(self, id_: int) -> Tracked:
        """The request of a number.

        Raises:
          UnknownRequest: when it is not queued or running.
        """
        # No lock: this must not wait for a dispatch, and what it reads only grows.
        try:
            return self.requests[id_]
        except (KeyError, TypeError):
            raise UnknownRequest(id_, self._why_unknown(id_)) from None

    def end(self, id_: int) -> Output:
        """Ends a request at once, wherever it is; returns what it had.

        Raises:
          UnknownRequest: when it is not queued or running.
        """
        with self._turns.mine():
            return self._abort(self.find(id_))

    def discard(self, id_: int) -> None:
        """Ends a request at once, or forgets the output that is kept for it. One that has finished or was ended is no error.

        Raises:
          UnknownRequest: for a number that no request ever had.
        """
        with self._turns.mine():
            if isinstance(id_, int) and 0 <= id_ <= self._last_id and id_ not in self.requests:
                self._kept.pop(id_, None)
                return
            request = self.find(id_)
            if id_ in self._waiting:  # somebody waits for it: they get what there is
                self._abort(request)
            else:
                del self.requests[id_]
                self._scheduler.drop(request)

    def snapshot(self, id_: int, fingerprint: Mapping[str, str]) -> Snapshot:
        """What a request is between two steps.

        Raises:
          UnknownRequest: when it is not queued or running any more.
        """
        with self._turns.mine():
            self._scheduler.settle()
            request = self.find(id_)
            if self._scheduler.has_ended(request):
                raise UnknownRequest(id_, f"request {id_} has finished; the next step() gives its output")
            saved = self._scheduler.device.save(request) if request in self._scheduler.running.values() else request.saved
            return Snapshot(fingerprint, request.prompt, request.params, list(request.tokens), request.start, saved)

    def _abort(self, request: Tracked) -> Output:
        try:
            output = self._end_early(request, Cut("abort", len(request.tokens)))
        except Exception as error:
            self._deliver(request, error)  # it is out all the same
            raise
        if request.id in self._waiting:
            self._deliver(request, output)
        else:
            del self.requests[request.id]
        return output

    def _queue(self, requests: Sequence[Tracked]) -> None:
        for request in requests:
            self.requests[request.id] = request
            self._scheduler.add(request)

    def _work(self) -> None:
        """One step of the scheduler; what finished is delivered. An error of one request keeps no other from its output."""
        ended = {e.request: e for e in self._scheduler.step()}
        errors = []
        for request in (*ended, *self._scheduler.running.values()):
            output = self._conclude(request, ended.get(request))
            if output is not None:
                errors += self._deliver(request, output)
        if errors:
            raise errors[0]

    def _conclude(self, request: Tracked, ended: Ended | None) -> Output | Exception | None:
        """The output of a request that has ended by itself or at a stop text; None where it goes on, the error where there is one."""
        try:
            cut = find_cut(request, self._tokenizer)
            if ended is not None:
                cut = cut or Cut(FINISH_REASONS[ended.status], len(request.tokens))
                return make_output(request, cut, ended.sequence, self._tokenizer)
            return None if cut is None else self._end_early(request, cut)
        except Exception as error:
            if request.slot is not None:
                self._scheduler.drop(request)
            return error

    def _end_early(self, request: Tracked, cut: Cut) -> Output:
        """Takes out a request that would go on."""
        sequence = None
        if request.wants_sequence:
            if request.saved is not None:
                sequence = request.saved.row.sequence
            elif request in self._scheduler.running.values():
                sequence = self._scheduler.device.read(request)
        self._scheduler.drop(request)
        return make_output(request, cut, sequence, self._tokenizer)

    def _deliver(self, request: Tracked, output: Output | Exception) -> list[Exception]:
        """Lets go of a request; returns an error that no call waits for."""
        del self.requests[request.id]
        if (box := self._waiting.pop(request.id, None)) is not None:
            box[request.id] = output
        elif isinstance(output, Exception):
            return [output]
        else:
            self._kept[request.id] = output
        return []

    def _why_unknown(self, id_: Any) -> str:
        if isinstance(id_, (list, tuple)):
            return f"one id is wanted, got {id_!r}; add() returns a list of them, one for each of the n outputs"
        if not isinstance(id_, (int, np.integer)):
            return f"a request's id is an integer that add() gave, got {id_!r}"
        if id_ in self._kept:
            return f"request {id_} has finished; the next step() gives its output"
        if 0 <= id_ <= self._last_id:
            return f"request {id_} is not queued or running any more"
        return f"there is no request {id_}; add() gives the ids"
