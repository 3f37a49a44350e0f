"""The routes."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp

from diffulex_jax.async_serving import page
from diffulex_jax.async_serving.async_engine import AsyncEngine, RequestError
from diffulex_jax.async_serving.http import docs, native, openai, openai_requests, requests
from diffulex_jax.async_serving.http.errors import ApiError
from diffulex_jax.async_serving.http.metrics import Metrics
from diffulex_jax.async_serving.http.middleware import Guard, RequestLog
from diffulex_jax.async_serving.http.service import Service
from diffulex_jax.async_serving.http.sse import as_api_error
from diffulex_jax.async_serving.settings import ServerSettings
from diffulex_jax.async_serving.supervisor import Health


_TYPES = ("str", "int", "float", "bool")
# Of APIs that clients may try; what they are told by name.
_ABSENT = {
    "/v1/responses": "the Responses API is not supported; use /v1/chat/completions",
    "/v1/messages": "Anthropic's API is not supported; use /v1/chat/completions",
    "/v1/embeddings": "embeddings are not supported; this server generates text",
    "/v1/audio": "audio is not supported; this server generates text",
    "/v1/images": "images are not supported; this server generates text",
    "/v1/moderations": "moderation is not supported; this server generates text",
    "/v1/rerank": "ranking is not supported; this server generates text",
    "/v1/score": "ranking is not supported; this server generates text",
    "/v1/assistants": "assistants are not supported; use /v1/chat/completions",
    "/v1/threads": "assistants are not supported; use /v1/chat/completions",
    "/v1/batches": "batches of files are not supported; send requests side by side",
    "/v1/files": "files are not supported",
    "/v1/fine_tuning": "training is not done by the server",
}

VERSION = importlib.metadata.version("diffulex-jax")


def create_app(engine: AsyncEngine, *, model: str, settings: ServerSettings) -> ASGIApp:
    """The ASGI application around an engine; starting and stopping it is the caller's. What needs the engine is 503 until it has started.

    Args:
      engine: the engine.
      model: what it was loaded from.
      settings: how to behave.
    """
    service = Service(engine=engine, model=settings.served_model_name or model, settings=settings, metrics=Metrics(engine))
    app = FastAPI(
        title="diffulex-jax",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        responses={400: {"description": "The request will not do; the error says why."}},
    )
    _generation(app, service)
    _administration(app, service)
    _profiling(app, service)
    for kind in (ApiError, RequestError, TimeoutError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    # Around the application, not in it: what is refused should not go through its layers.
    guarded: ASGIApp = Guard(app, service)
    if settings.cors_origin:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=list(settings.cors_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return RequestLog(guarded, service)


def _generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(form: openai_requests.Completion, request: Request) -> Response:
        return await openai.completions(service, form, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(form: openai_requests.Chat, request: Request) -> Response:
        return await openai.chat_completions(service, form, request)

    @app.post("/generate", response_model=None)
    async def generate(form: requests.Generate, request: Request) -> Response:
        return await native.generate(service, form, request)

    @app.post("/tokenize")
    async def tokenize(form: requests.Tokenize) -> dict[str, Any]:
        return await native.tokenize(service, form)

    @app.post("/detokenize")
    async def detokenize(form: requests.Detokenize) -> dict[str, Any]:
        return await native.detokenize(service, form)

    @app.post("/abort")
    async def abort(form: requests.Abort) -> dict[str, Any]:
        return await native.abort(service, form)


def _administration(app: FastAPI, service: Service) -> None:
    engine = service.engine
    html, policy = page.document()

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
        return HTMLResponse(html, headers=headers | {"cache-control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def show_docs() -> Response:
        return HTMLResponse(docs.document(app.openapi()), headers={"content-security-policy": docs.POLICY})

    def model_card(name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": service.began, "owned_by": "diffulex-jax"}
        card |= {"max_model_len": service.facts["max_model_len"], "strategies": list(service.facts["strategies"])}
        return card if name == service.model else card | {"parent": service.model}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(name) for name in (service.model, *service.adapters)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model_card(name)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the engine works; what it does instead, where it does not."""
        supervisor, status = engine.supervisor, service.status
        if supervisor.health is Health.READY:
            return JSONResponse({"status": status, "restarts": supervisor.restarts})
        reason = f": {supervisor.reason}" if supervisor.reason else ""
        return _not_well(status, ApiError(503, f"the engine is {status}{reason}", code="engine_down"))

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether new requests are taken."""
        if service.status == "following":
            return _not_well("following", ApiError(503, "this host follows: ask host 0", code="following"))
        if engine.draining:
            return _not_well("draining", ApiError(503, "the server is shutting down", code="draining"))
        return await health()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @app.get("/server_info")
    async def server_info() -> dict[str, Any]:
        limits = {name: value for name, value in vars(service.settings).items() if name != "api_key"}
        state = {"health": engine.supervisor.health.value, "restarts": engine.supervisor.restarts, "stats": engine.supervisor.stats}
        return {"model": service.model, "version": VERSION, "engine": service.facts, "server": limits, **state}


def _profiling(app: FastAPI, service: Service) -> None:
    def directory() -> str:
        if not service.settings.profile_directory:
            message = "this server takes no profiles; start it with --profile-directory DIRECTORY, where it may write them"
            raise ApiError(400, message, code="profiling_off")
        return service.settings.profile_directory

    @app.post("/start_profile")
    async def start_profile() -> dict[str, str]:
        """Begins a JAX profiler trace of the engine."""
        into = directory()
        await service.engine.start_profile(into)
        return {"profile_directory": into}

    @app.post("/stop_profile")
    async def stop_profile() -> dict[str, str]:
        """Ends the trace; answers when it is written."""
        into = directory()
        await service.engine.stop_profile()
        return {"profile_directory": into}


def _not_well(status: str, error: ApiError) -> JSONResponse:
    return JSONResponse({"status": status} | error.body, error.status, error.headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    told = as_api_error(error)
    return JSONResponse(told.body, told.status, told.headers)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        told = ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}")
        return await _answer_error(request, told)
    # Locations name the member of a union that was tried, too ("as-text"); fields and positions are what a client knows.
    where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, int) or (part.isidentifier() and part not in _TYPES))
    if first["type"] == "model_attributes_type" and not where:
        message = "send a JSON object, with the header content-type: application/json"
    elif first["type"] == "extra_forbidden":
        message = f"the field {where!r} is unknown or not supported"
    else:
        message = f"{where}: {first['msg']}" if where else first["msg"]
    return await _answer_error(request, ApiError(400, message, param=where or None))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and isinstance(error.__cause__, ClientDisconnect):
        raise error.__cause__
    message, allowed = str(error.detail), (error.headers or {}).get("Allow")
    if error.status_code == 404:
        message = _there_is_no(request)
    elif error.status_code == 405:
        message = f"{request.url.path} takes {allowed}, not {request.method}"
    told = ApiError(error.status_code, message)
    return JSONResponse(told.body, told.status, dict(error.headers or {}))


def _there_is_no(request: Request) -> str:
    path = request.url.path
    for prefix, says in _ABSENT.items():
        if path.startswith(prefix):
            return f"{path}: {says}"
    routes = sorted({route.path for route in request.app.routes if route.include_in_schema})
    return f"there is no {path[:200]} here; there are {', '.join(routes)}"
