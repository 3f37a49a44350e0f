"""The fixtures and helpers of the tests of serving."""

from __future__ import annotations

import pathlib
import sys


sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "serving"))

from fixtures import compiled, model


__all__ = ["compiled", "model"]
