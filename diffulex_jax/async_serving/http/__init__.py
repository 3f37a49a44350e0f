"""The HTTP server. It needs FastAPI, uvicorn and prometheus_client: ``pip install "diffulex-jax[serve]"``."""

try:
    from diffulex_jax.async_serving.http.app import create_app
    from diffulex_jax.async_serving.http.server import build_engines, log_as_json, serve
except ModuleNotFoundError as error:
    raise ImportError('diffulex_jax.async_serving.http needs FastAPI and uvicorn: pip install "diffulex-jax[serve]"') from error


__all__ = ["build_engines", "create_app", "log_as_json", "serve"]
