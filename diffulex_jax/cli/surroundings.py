"""What a command finds around itself: libraries that print, and terminals that cannot."""

from __future__ import annotations

import glob
import importlib.util
import io
import os
import sys
import warnings


_TPU_NODES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_GPU_NODES = ("/dev/nvidia[0-9]*", "/dev/kfd")


def prepare() -> None:
    """Makes libraries keep quiet, and every text printable. Call it before JAX is imported; what the environment says stays."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore", FutureWarning)  # between libraries and their authors
    # libtpu, which compiling for TPUs needs, looks for one wherever it is installed, and prints errors where there is none.
    if not os.environ.get("JAX_PLATFORMS") and importlib.util.find_spec("libtpu") is not None and not _there(_TPU_NODES + _GPU_NODES):
        os.environ["JAX_PLATFORMS"] = "cpu"
    compile_sooner()


def compile_sooner() -> None:
    """Tells XLA to leave the loops of programs for a CPU rolled. Its vectors are wide enough without: programs run as fast, give the same
    bits, and compile in three quarters of the time. Call it before JAX computes; what ``XLA_FLAGS`` says of this stays."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_extra_options=xla_cpu_disable_loop_unrolling".strip()


def _there(patterns: tuple[str, ...]) -> bool:
    return any(glob.glob(pattern) for pattern in patterns)
