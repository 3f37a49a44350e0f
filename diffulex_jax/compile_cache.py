"""Compiled programs, kept on disk: one cache for the library, the command line, the bench and the server.

It is in ``$XDG_CACHE_HOME/diffulex-jax/compiled`` (``~/.cache`` where that is not set), in a folder for each JAX and each kind of
processor. The environment variable ``DIFFULEX_JAX_CACHE`` moves it; ``off``, or nothing, turns it off. Where JAX has been told of a
cache of its own (``jax_compilation_cache_dir``), that one is used, as it is set. Several processes may use it at once. Whoever may
write to it may run code here: keep it to yourself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import warnings


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
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


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

    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]


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
