"""Serving: an owner loop around the engine, an ``AsyncEngine`` for asyncio programs, and an HTTP server (``http``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffulex_jax import lazy


if TYPE_CHECKING:
    from diffulex_jax.async_serving.async_engine import AsyncEngine, RequestError
    from diffulex_jax.async_serving.protocol import Accepted, Commit, Provisional, Reply


__all__ = ["Accepted", "AsyncEngine", "Commit", "Provisional", "Reply", "RequestError"]

__getattr__ = lazy.names(
    __name__,
    {
        "Accepted": "diffulex_jax.async_serving.protocol",
        "AsyncEngine": "diffulex_jax.async_serving.async_engine",
        "Commit": "diffulex_jax.async_serving.protocol",
        "Provisional": "diffulex_jax.async_serving.protocol",
        "Reply": "diffulex_jax.async_serving.protocol",
        "RequestError": "diffulex_jax.async_serving.async_engine",
    },
)
