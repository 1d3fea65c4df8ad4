"""A model behind the OpenAI API: its routes, as one ASGI application."""

from collections.abc import Callable, Collection
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from nemoe_jax.serving.api.api_keys import Account, ApiKey, caller_of
from nemoe_jax.serving.api.endpoints import lora_adapters
from nemoe_jax.serving.api.endpoints.chat import chat
from nemoe_jax.serving.api.endpoints.completions import complete
from nemoe_jax.serving.api.endpoints.lora_adapters import LoadLoraAdapter, UnloadLoraAdapter
from nemoe_jax.serving.api.endpoints.responses import respond
from nemoe_jax.serving.api.endpoints.responses_shapes import ResponseObject, ResponsesEvent, ResponsesRequest
from nemoe_jax.serving.api.endpoints.tokenization import (
    Detokenized,
    DetokenizeRequest,
    TokenizeChat,
    Tokenized,
    TokenizePrompt,
    detokenize,
    tokenize,
)
from nemoe_jax.serving.api.errors import ApiError, add_error_handlers
from nemoe_jax.serving.api.middleware import RequestMiddleware
from nemoe_jax.serving.api.openapi import ERRORS, describe, streamed
from nemoe_jax.serving.api.requests import ChatRequest, CompletionRequest
from nemoe_jax.serving.api.responses import ChatChunk, ChatCompletion, Completion, Health, ModelCard, ModelList
from nemoe_jax.serving.api.served_model import ServedModel
from nemoe_jax.serving.api.streaming import as_json
from nemoe_jax.serving.engine.request import MAX_REQUEST_BYTES


def create_app(
    served: ServedModel,
    *,
    api_key: str | Collection[str | ApiKey] | None = None,
    max_request_bytes: int = MAX_REQUEST_BYTES,
    log_requests: bool = False,
    closing: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The application; no other origin's pages may read its answers (no CORS).

    Args:
        api_key: what clients must send as bearer token, one of them, with its limits; none: anybody may ask.
        max_request_bytes: a longer body is refused.
        log_requests: a line on standard error for each request.
        closing: says whether the server is about to end; requests are then refused.
    """
    # documentation pages would load scripts from elsewhere
    app = FastAPI(title="nemoe serve", docs_url=None, redoc_url=None, redirect_slashes=False)
    accounts = [
        Account(ApiKey.model_construct(name=f"key {number}", key=key, adapters=True) if isinstance(key, str) else key)
        for number, key in enumerate([api_key] if isinstance(api_key, str) else [*(api_key or ())], 1)
    ]
    app.openapi = lambda: describe(app, served, bool(accounts))  # type: ignore[method-assign]
    add_error_handlers(app)

    @app.get("/health", summary="Whether requests are taken", response_model=Health, responses=ERRORS["always"])
    async def health() -> Response:
        if served.engine.failure is not None:
            raise ApiError(503, f"the engine is dead: {served.engine.failure}", code="engine_dead")
        return as_json(Health())

    @app.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse, responses=ERRORS["/v1"])
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", summary="The model and its adapters", response_model=ModelList, responses=ERRORS["/v1"])
    async def models() -> Response:
        return as_json(ModelList(data=[card(served, name) for name in (served.name, *served.adapters)]))

    @app.get(
        "/v1/models/{model:path}", summary="One of them", response_model=ModelCard, responses=ERRORS["/v1/models/"]
    )
    async def model(model: str) -> Response:
        served.adapter(model)
        return as_json(card(served, model))

    @app.post(
        "/v1/completions",
        summary="Texts or token ids, continued",
        response_model=Completion,
        responses=ERRORS["POST"] | streamed(Completion),
    )
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await complete(served, asked, request)

    @app.post(
        "/v1/chat/completions",
        summary="The next message of a chat",
        response_model=ChatCompletion,
        responses=ERRORS["POST"] | streamed(ChatChunk),
    )
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await chat(served, asked, request)

    @app.post(
        "/v1/responses",
        summary="A response to messages, which is not stored",
        response_model=ResponseObject,
        responses=ERRORS["POST"] | streamed(ResponsesEvent),
    )
    async def responses(asked: ResponsesRequest, request: Request) -> Response:
        return await respond(served, asked, request)

    @app.post("/tokenize", summary="A prompt's token ids", response_model=Tokenized, responses=ERRORS["POST"])
    async def to_tokens(asked: TokenizePrompt | TokenizeChat) -> Response:
        return as_json(await run_in_threadpool(tokenize, served, asked))

    @app.post("/detokenize", summary="The text of token ids", response_model=Detokenized, responses=ERRORS["POST"])
    async def to_text(asked: DetokenizeRequest) -> Response:
        return as_json(await run_in_threadpool(detokenize, served, asked))

    shown = served.adapter_folder is not None
    with_adapters: dict[str, Any] = {"include_in_schema": shown, "response_class": PlainTextResponse}

    @app.post("/v1/load_lora_adapter", summary="One more adapter", responses=ERRORS["POST"], **with_adapters)
    async def load_adapter(asked: LoadLoraAdapter, request: Request) -> Response:
        return PlainTextResponse(await run_in_threadpool(lora_adapters.load, served, asked, caller_of(request.scope)))

    @app.post("/v1/unload_lora_adapter", summary="One adapter less", responses=ERRORS["POST"], **with_adapters)
    async def unload_adapter(asked: UnloadLoraAdapter, request: Request) -> Response:
        return PlainTextResponse(lora_adapters.unload(served, asked, caller_of(request.scope)))

    @app.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        raise ApiError(404, "this server generates text; it has no embeddings", code="unsupported_endpoint")

    options: dict[str, Any] = {"metrics": served.metrics, "accounts": accounts, "max_bytes": max_request_bytes}
    paths = {route.path for route in app.routes if hasattr(route, "path") and "{" not in route.path}
    app.add_middleware(RequestMiddleware, paths=paths, log=log_requests, closing=closing, **options)
    return app


def card(served: ServedModel, name: str) -> ModelCard:
    """What /v1/models says of a model."""
    parent = None if name == served.name else served.name
    return ModelCard(id=name, created=served.created, parent=parent, max_model_len=served.context)
