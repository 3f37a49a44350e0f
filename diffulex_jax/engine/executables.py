"""The large programs of an engine: compiled side by side, some of them while others serve, and kept on disk ready to run, so that a
second start only traces them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import pickle
import re
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable
from jax.extend import core
from jax.sharding import Mesh

import diffulex_jax
import pallas_kernels
from diffulex_jax import compile_cache
from diffulex_jax.engine import background
from diffulex_jax.parallel import hosts


logger = logging.getLogger(__name__)

_MOST_AT_ONCE = 8
_UNUSED_DAYS = 30  # after which a program is forgotten
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


Ready = Callable[..., Any]


class Programs:
    """Programs by name, each compiled when it is first asked for; they may be asked for ahead, many at once.

    ``keep``: they are kept on disk, see ``Kernels.kept_ready``.
    """

    def __init__(self, mesh: Mesh, *, keep: bool):
        self._mesh, self._keep = mesh, keep
        self._found: dict[Hashable, concurrent.futures.Future[Ready]] = {}

    def begin(self, name: Hashable, function: Any, *args: Any, **kwargs: Any) -> None:
        """Begins to compile ``function``, a ``jax.jit`` of one signature, for arguments like these, unless that was begun."""
        if name not in self._found:
            with _lowering.held(waited_for=True):
                make = self._lower(function, *_like(args, kwargs))
            self._found[name] = _threads().submit(make)

    def begin_later(self, name: Hashable, function: Any, *args: Any, **kwargs: Any) -> None:
        """As :meth:`begin`, in the background: nothing of it is done here, and not before what :meth:`begin` is given.

        A program that cannot be compiled is logged, and calls of it raise why.
        """
        if name not in self._found:
            future: concurrent.futures.Future[Ready] = concurrent.futures.Future()
            self._found[name] = future
            background.do_later(functools.partial(_make_later, weakref.ref(self), future, function, *_like(args, kwargs), name=name))

    def is_awaited(self, name: Hashable) -> bool:
        """Whether a program that was begun is not there, or never will be."""
        future = self._found.get(name)
        return future is not None and not (future.done() and future.exception() is None)

    def __call__(self, name: Hashable, function: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of the program ``name``, which is ``function`` compiled."""
        self.begin(name, function, *args, **kwargs)
        with jax.set_mesh(self._mesh):
            return self._found[name].result()(*args, **kwargs)

    def _lower(self, function: Any, args: Any, kwargs: Any) -> Callable[[], Ready]:
        """What makes the program ready, in any thread; all that is Python's is done here. Arguments are as :func:`_like` gives them."""
        with jax.set_mesh(self._mesh):
            traced = function.trace(*args, **kwargs)
            file = _file_of(traced, (args, kwargs), self._mesh) if self._keep else None
            if file is None or not file.exists():
                return functools.partial(_compiled, traced.lower(), file)
            return functools.partial(self._read, traced, file)

    def _read(self, traced: Any, file: pathlib.Path) -> Ready:
        try:
            program = serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()))
            os.utime(file)
            return program
        except Exception:  # cut short, or of another driver: the loaders of each platform have errors of their own
            with _lowering.held(waited_for=True), jax.set_mesh(self._mesh):
                lowered = traced.lower()
            return _compiled(lowered, file)


class _Turns:
    """A lock which the background does not take while somebody else waits for it.

    JAX lowers kernels for a GPU with the help of global variables: one thread at a time.
    """

    def __init__(self) -> None:
        self._changed, self._taken, self._first = threading.Condition(), False, 0

    @contextlib.contextmanager
    def held(self, *, waited_for: bool) -> Iterator[None]:
        """Holds the lock, for something that somebody waits for or not."""
        with self._changed:
            self._first += waited_for
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._taken and (waited_for or not self._first))
                self._taken = True
            try:
                yield
            finally:
                with self._changed:
                    self._taken = False
        finally:
            with self._changed:
                self._first -= waited_for
                self._changed.notify_all()


_lowering = _Turns()


def _make_later(
    of: weakref.ref[Programs], future: concurrent.futures.Future[Ready], function: Any, args: Any, kwargs: Any, *, name: Hashable
) -> None:
    """Makes a program for ``future``, unless nobody has the programs any more."""
    try:
        with _lowering.held(waited_for=False):
            if (programs := of()) is None:
                return
            make = programs._lower(function, args, kwargs)
            del programs  # so that they may go meanwhile
        future.set_result(make())
    except Exception as error:
        logger.warning("a program could not be compiled in the background, others do its work: %s: %s", name, error)
        future.set_exception(error)


def _like(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments, described where they are on a device: an array may be gone when a program is made for it."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct.like(a) if isinstance(a, jax.Array) else a, (args, kwargs))


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(_MOST_AT_ONCE, os.cpu_count() or 1), thread_name_prefix="compile")


def _compiled(lowered: Any, file: pathlib.Path | None) -> Ready:
    program = lowered.compile()
    if file is not None:
        # A full disk, or a platform that cannot write a program down (each says so in an error of its own), costs the next start its
        # time and this one nothing: the program is there.
        with contextlib.suppress(OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            _write(file, pickle.dumps(serialize_executable.serialize(program)))
    return program


def _write(file: pathlib.Path, content: bytes) -> None:
    """Writes a file that is whole from its first moment, and drops those that nobody has used for long."""
    handle, name = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as partial:
        partial.write(content)
    os.replace(name, file)
    for other in file.parent.glob("*" + file.suffix):
        with contextlib.suppress(OSError):  # another process may do the same at the same time
            if time.time() - other.stat().st_mtime > _UNUSED_DAYS * 24 * 3600:
                other.unlink()


def _file_of(traced: Any, args: Any, mesh: Mesh) -> pathlib.Path | None:
    """Where the program of ``traced`` is kept, by all that decides what it is; None where nothing is kept."""
    folder = compile_cache.in_use()
    if folder is None or hosts.several():
        return None
    device = mesh.devices.flat[0]
    told = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    on = [repr(getattr(a, "sharding", None)) for a in jax.tree.leaves(args)]
    made_by = (jax.__version__, jaxlib.__version__, device.client.platform_version, device.device_kind)
    text = repr((*made_by, told, _settings(), on, mesh, mesh.devices))
    digest = hashlib.sha256((_sources() + text + _ADDRESS.sub("", str(traced.jaxpr))).encode())
    for constant in _constants(traced.jaxpr):
        digest.update(repr((constant.shape, constant.dtype)).encode() + constant.tobytes())
    return folder / f"{digest.hexdigest()}.program"


def _settings() -> list[tuple[str, str]]:
    """All of JAX's settings as they stand here, but for those of its own caches: many change what is lowered and how it is compiled, and
    JAX has no list of them."""
    return sorted((name, str(value)) for name, value in jax.config.values.items() if "cache" not in name)


@functools.cache
def _sources() -> str:
    """A digest of this library: a kernel is more than its trace says."""
    digest = hashlib.sha256()
    for package in (diffulex_jax, pallas_kernels):
        for file in sorted(pathlib.Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _constants(jaxpr: Any) -> Iterator[np.ndarray]:
    """Arrays that a trace holds and does not spell out."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        # A kernel closes over its own arguments, too; the trace has those.
        yield from (np.asarray(constant) for constant in jaxpr.consts if not isinstance(constant, jax.core.Tracer))
        jaxpr = jaxpr.jaxpr
    if isinstance(jaxpr, core.Jaxpr):
        for equation in jaxpr.eqns:
            yield from (np.asarray(v.val) for v in equation.invars if isinstance(v, core.Literal) and np.ndim(v.val))
            yield from _constants(tuple(equation.params.values()))
    elif isinstance(jaxpr, (tuple, list)):
        for part in jaxpr:
            yield from _constants(part)
