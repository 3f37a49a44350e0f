"""The HTTP server's settings, apart from the server, which not every installation has."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How the server behaves. Each is an option of ``diffulex-jax serve``.

    Attributes:
      served_model_name: what clients call the model; default: as it was given.
      api_key: keys that clients must send one of (``Authorization: Bearer KEY``), on every route but /, /health and /ready. None: open.
      cors_origin: origins that browsers may call from; ``*`` for any.
      max_queue: outputs that may wait for a slot; further requests are refused (429).
      max_queue_tokens: prompt tokens of all requests in the server, at the most; further requests are refused (429).
      max_body_bytes: longest request body (413).
      body_seconds: longest time a body may take to arrive (408).
      request_seconds: longest time until a request's answer is complete (504).
      drain_seconds: how long requests may go on after SIGTERM before they are cut off.
      ping_seconds: a stream that is silent for so long gets a comment, so that nothing on the way closes it.
      profile_directory: where /start_profile writes JAX profiler traces of the engine. Empty: the route refuses, as it writes files.
    """

    served_model_name: str = ""
    api_key: tuple[str, ...] = ()
    cors_origin: tuple[str, ...] = ()
    max_queue: int = 256
    max_queue_tokens: int = 1_000_000
    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    ping_seconds: float = 15.0
    profile_directory: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = {"max_queue": 0, "drain_seconds": 0}.get(field.name, 1 if field.type == "int" else 1e-3)
            if field.type in ("int", "float") and not (math.isfinite(value) and value >= least):
                raise ValueError(f"{field.name}={value} must be at least {least}")
        if any(not key.strip() or not key.isascii() for key in self.api_key):
            raise ValueError("api_key must be non-empty ASCII text")
