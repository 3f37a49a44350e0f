"""The version of this package."""

from __future__ import annotations

import importlib.metadata
import pathlib
import tomllib


def _find() -> str:
    """Returns the installed version; in a checkout that is not installed, the one in ``pyproject.toml``."""
    try:
        return importlib.metadata.version("diffulex-jax")
    except importlib.metadata.PackageNotFoundError:
        project = pathlib.Path(__file__).parent.parent / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]


__version__ = _find()
