"""The large programs of an engine: compiled side by side, and kept on disk ready to run, so that a second start only traces them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import pathlib
import pickle
import re
import tempfile
import time
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
from diffulex_jax.parallel import hosts


_MOST_AT_ONCE = 8
_UNUSED_DAYS = 30  # after which a program is forgotten
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Programs:
    """Programs by name, each compiled when it is first asked for; they may be asked for ahead, many at once.

    ``keep``: they are kept on disk, see ``Kernels.kept_ready``.
    """

    def __init__(self, mesh: Mesh, *, keep: bool):
        self._mesh, self._keep = mesh, keep
        self._found: dict[Hashable, concurrent.futures.Future[Callable[..., Any]]] = {}

    def begin(self, name: Hashable, function: Any, *args: Any, **kwargs: Any) -> None:
        """Begins to compile ``function``, a ``jax.jit`` of one signature, for arguments like these, unless that was begun."""
        if name in self._found:
            return
        with jax.set_mesh(self._mesh):
            traced = function.trace(*args, **kwargs)
            file = _file_of(traced, (args, kwargs), self._mesh) if self._keep else None
            if file is None or not file.exists():
                lowered = traced.lower()
                self._found[name] = _threads().submit(_compiled, lowered, file)
            else:
                self._found[name] = _threads().submit(self._read, traced, file)

    def __call__(self, name: Hashable, function: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of the program ``name``, which is ``function`` compiled."""
        self.begin(name, function, *args, **kwargs)
        with jax.set_mesh(self._mesh):
            return self._found[name].result()(*args, **kwargs)

    def _read(self, traced: Any, file: pathlib.Path) -> Callable[..., Any]:
        try:
            program = serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()))
            os.utime(file)
            return program
        except Exception:  # cut short, or of another driver: the loaders of each platform have errors of their own
            with jax.set_mesh(self._mesh):
                return _compiled(traced.lower(), file)


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(_MOST_AT_ONCE, os.cpu_count() or 1), thread_name_prefix="compile")


def _compiled(lowered: Any, file: pathlib.Path | None) -> Callable[..., Any]:
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
