"""The routes of the server, as an ASGI application."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deepseek_jax.serving import tokens
from deepseek_jax.serving.answering import Answer
from deepseek_jax.serving.body import read_object
from deepseek_jax.serving.chat import read_chat
from deepseek_jax.serving.completions import read_completion
from deepseek_jax.serving.door import Door
from deepseek_jax.serving.errors import ApiError, answer_api_error, answer_fault, answer_http_exception
from deepseek_jax.serving.fields import told
from deepseek_jax.serving.page import page_files
from deepseek_jax.serving.service import Service

Endpoint = Callable[[Request], Awaitable[Response]]
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(
    service: Service,
    *,
    keys: Collection[str] = (),
    hosts: Collection[str] | None = None,
    origins: Collection[str] = (),
    log: Callable[[str], None] = print,
) -> Door:
    """Return the application.

    Args:
        service: the model, and the limits.
        keys: of which every request must have one; none lets everybody in.
        hosts: names that the Host header may have; None for any.
        origins: pages of other servers that may call this one from a browser (CORS).
        log: takes a line for every request.
    """
    page = {path: Response(file.body, headers=file.headers) for path, file in page_files().items()}
    routes = [
        Route("/v1/completions", _posted(service, read_completion), methods=["POST"]),
        Route("/v1/chat/completions", _posted(service, read_chat), methods=["POST"]),
        Route("/v1/models", _told(lambda _: {"object": "list", "data": [service.model.described()]})),
        Route("/v1/models/{name:path}", _told(lambda request: _model(service, request.path_params["name"]))),
        Route("/tokenize", _computed(service, tokens.tokenize), methods=["POST"]),
        Route("/detokenize", _computed(service, tokens.detokenize), methods=["POST"]),
        Route("/tokenizer_info", _told(lambda _: tokens.tokenizer_info(service.model))),
        Route("/health", _told(lambda _: _health(service))),
        Route("/metrics", _metrics(service)),
        *(Route(path, _static(response)) for path, response in page.items()),
    ]
    handlers: Mapping[Any, Any] = {
        ApiError: answer_api_error,
        HTTPException: answer_http_exception,
        Exception: answer_fault,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    # RFC 9110: a path with another slash is another path; a redirect would lose the body of a POST
    app.router.redirect_slashes = False
    return Door(app, service, keys, {"/health", *page}, hosts, origins, log)


def _posted(service: Service, read: Callable[[Service, dict[str, Any]], Answer]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        limits = service.limits
        body = await read_object(request, limits.body_bytes, limits.body_seconds)
        # long texts are encoded and schemas compiled beside the loop, which goes on with the streams of others
        answer = await asyncio.to_thread(read, service, body)
        return await answer.respond(request)

    return endpoint


def _computed(service: Service, compute: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        limits = service.limits
        body = await read_object(request, limits.body_bytes, limits.body_seconds)
        return JSONResponse(await asyncio.to_thread(compute, service.model, body))

    return endpoint


def _told(tell: Callable[[Request], dict[str, Any]]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        return JSONResponse(tell(request))

    return endpoint


def _static(response: Response) -> Endpoint:
    async def endpoint(_: Request) -> Response:
        return response

    return endpoint


def _metrics(service: Service) -> Endpoint:
    async def endpoint(_: Request) -> Response:
        text = service.metrics.text(service.model.engine.stats())
        return Response(text, media_type=METRICS_TYPE, headers={"Content-Type": METRICS_TYPE})

    return endpoint


def _model(service: Service, name: str) -> dict[str, Any]:
    if name != service.model.name:
        message = f"the model {told(name)} does not exist; GET /v1/models names the one that does"
        raise ApiError(404, message, param="model", code="model_not_found")
    return service.model.described()


def _health(service: Service) -> dict[str, Any]:
    if service.model.engine.stats().error is not None:
        raise ApiError(503, "the engine has stopped", code="engine_stopped")
    return {"status": "ok"}
