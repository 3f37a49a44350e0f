"""The command line: ``diffulex-jax generate``, ``trace``, ``serve``, ``train``, ``bench``, ``eval``, ``plan`` and ``doctor``.

What a command needs beyond its options is imported inside the command: help and usage errors come at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffulex_jax.cli import interrupt


if TYPE_CHECKING:
    from diffulex_jax.cli.commands import app as app


def main() -> None:
    """Runs the command line of this process. From here on Ctrl-C ends it at once with exit code 130."""
    interrupt.watch()
    from diffulex_jax.cli.commands import app

    app()


def __getattr__(name: str) -> Any:
    if name == "app":
        from diffulex_jax.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
