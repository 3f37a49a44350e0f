"""The HTTP client of what measures servers."""

from __future__ import annotations


try:
    from httpx import AsyncClient, HTTPError, Limits, Response, Timeout
except ImportError as error:
    raise ImportError('measuring a server needs httpx: pip install "diffulex-jax[serve]"') from error


__all__ = ["HTTPError", "Response", "client"]

_CONNECT_SECONDS = 10.0


def client(url: str, api_key: str) -> AsyncClient:
    """A client of the server at ``url``: any number of requests at once, which may take as long as they do; the key goes with each."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = Limits(max_connections=None, max_keepalive_connections=None)
    return AsyncClient(base_url=url, headers=headers, limits=limits, timeout=Timeout(None, connect=_CONNECT_SECONDS))
