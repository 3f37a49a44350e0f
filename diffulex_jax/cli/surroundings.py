"""Keeps what libraries have to say to themselves out of an answer."""

from __future__ import annotations

import glob
import importlib.util
import os
import warnings


_TPU_NODES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_GPU_NODES = ("/dev/nvidia[0-9]*", "/dev/kfd")


def quiet() -> None:
    """Call it before JAX is imported. What the caller's environment says stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore", FutureWarning)  # between libraries and their authors
    # libtpu, which compiling for TPUs needs, looks for one wherever it is installed, and prints errors where there is none.
    if not os.environ.get("JAX_PLATFORMS") and importlib.util.find_spec("libtpu") is not None and not _there(_TPU_NODES + _GPU_NODES):
        os.environ["JAX_PLATFORMS"] = "cpu"


def _there(patterns: tuple[str, ...]) -> bool:
    return any(glob.glob(pattern) for pattern in patterns)
