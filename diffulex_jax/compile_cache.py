"""Compiled programs, kept on disk: one cache for the library, the command line, the bench and the server.

It is in ``$XDG_CACHE_HOME/diffulex-jax/compiled`` (``~/.cache`` where that is not set), in a folder for each JAX and each kind of
processor. The environment variable ``DIFFULEX_JAX_CACHE`` moves it; ``off``, or nothing, turns it off. Where JAX has been told of a
cache of its own (``jax_compilation_cache_dir``), that one is used, as it is set. Several processes may use it at once. Whoever may
write to it may run code here: keep it to yourself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import time
import warnings
import zlib
from typing import Any


VARIABLE = "DIFFULEX_JAX_CACHE"


def enable(directory: str | os.PathLike[str] | None = None) -> pathlib.Path | None:
    """Makes JAX keep what it compiles from now on, and read what it finds.

    Args:
      directory: where, whatever the environment says; default: as above.

    Returns:
      The folder in use; None where there is none, or JAX has been told of another one.
    """
    import jax  # late: the command line looks at this module without JAX

    chosen = _chosen() if directory is None else pathlib.Path(directory)
    if chosen is None or (directory is None and _told() not in (None, "", str(chosen / _machine()))):
        return None
    folder = chosen / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"compiled programs are not kept: {error}; set {VARIABLE} to a folder, or to 'off'", stacklevel=2)
        return None
    global _folder
    _folder = folder
    _drop_broken(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


_folder: pathlib.Path | None = None


def in_use() -> pathlib.Path | None:
    """The folder that :func:`enable` made JAX keep its programs in; None before, and where it is another."""
    return _folder if _folder is not None and _told() == str(_folder) else None


def _chosen() -> pathlib.Path | None:
    named = os.environ.get(VARIABLE)
    if named is not None:
        return None if named.strip().lower() in ("", "off") else pathlib.Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (pathlib.Path(home) if home else pathlib.Path.home() / ".cache") / "diffulex-jax" / "compiled"
    except RuntimeError:  # nobody's home
        return None


def _told() -> str | None:
    """The folder that JAX uses so far."""
    import jax

    return jax.config.values["jax_compilation_cache_dir"]


def _drop_broken(folder: pathlib.Path) -> None:
    """Removes what a process that was killed left half written: JAX would complain of it, and never write it anew."""
    stamp = folder / ".checked"
    with contextlib.suppress(OSError):  # another process may do the same at the same time
        checked = stamp.stat().st_mtime if stamp.exists() else 0.0
        began = time.time()
        for entry in folder.glob("*-cache"):
            if entry.stat().st_mtime >= checked and not _is_whole(entry.read_bytes()):
                entry.unlink()
        stamp.touch()
        os.utime(stamp, (began, began - _CLOCKS_DIFFER))


_CLOCKS_DIFFER = 60.0  # seconds, between this machine and one that keeps its files


def _is_whole(entry: bytes) -> bool:
    """Whether a compressed entry has an end; JAX compresses with zlib, or with zstd, which not every Python reads."""
    if entry.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError:
            return True
        stream: Any = zstandard.ZstdDecompressor().decompressobj()
    else:
        stream = zlib.decompressobj()
    try:
        stream.decompress(entry)
    except Exception:  # each library has an error of its own for what it cannot read
        return False
    return stream.eof


@functools.cache
def _machine() -> str:
    """A name for what compiled programs depend on beside what JAX asks itself: its version, and a processor's instructions."""
    instructions = platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        instructions += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    kind = hashlib.sha256(instructions.encode()).hexdigest()[:8]
    return f"jax-{importlib.metadata.version('jax')}-{platform.machine()}-{kind}"
