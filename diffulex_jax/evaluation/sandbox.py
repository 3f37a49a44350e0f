"""Runs programs that a model wrote, each in a process of its own with little time and memory. It is no protection against malice."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import tempfile


SECONDS, BYTES = 10.0, 1 << 30


def passes(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends with exit code 0 in time.

    It runs in an empty folder, without this environment's variables, packages of the user and input, as a process group that is killed
    when time is up. It may still read files, write them and use the network, as the user may: run what you do not trust in a container.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "program.py"
        file.write_text(_LIMITS + program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(file)],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # whatever it started, too
            except ProcessLookupError:
                pass
            process.wait()


_LIMITS = f"""import resource
for kind, most in ((resource.RLIMIT_AS, {BYTES}), (resource.RLIMIT_FSIZE, {BYTES >> 6}), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(kind, (most, most))
del resource, kind, most
"""
