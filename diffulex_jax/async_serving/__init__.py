"""Serving: an owner loop around the engine, an ``AsyncEngine`` for asyncio programs, and an HTTP server (``http``)."""

from diffulex_jax.async_serving.async_engine import AsyncEngine, RequestError
from diffulex_jax.async_serving.protocol import Accepted, Commit, Provisional, Reply


__all__ = ["Accepted", "AsyncEngine", "Commit", "Provisional", "Reply", "RequestError"]
