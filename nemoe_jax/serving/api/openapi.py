"""The OpenAPI description, with what is true of this very server: its models, its vocabulary and its limits."""

import importlib.metadata
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nemoe_jax.serving.api.endpoints.responses_shapes import ResponsesEvent
from nemoe_jax.serving.api.responses import ChatChunk, ErrorResponse
from nemoe_jax.serving.api.served_model import ServedModel

ABOUT = "The OpenAI API for {name}: point any of its clients at /v1."
RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "string"}}}
WORDS: dict[int | str, str] = {
    400: "a bad request",
    401: "no API key, or another one",
    403: "the API key does not allow it",
    404: "no such model",
    413: "too large a request",
    429: "too many requests are waiting, or a limit of the API key is reached",
    500: "the engine failed",
    503: "the server is shutting down, or its engine is dead",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    answers: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": WORDS[status]} for status in statuses
    }
    for status in {429, 503} & set(statuses):
        answers[status]["headers"] = RETRY
    return answers


ERRORS = {
    "always": _errors(500, 503),
    "/v1": _errors(401, 500, 503),
    "/v1/models/": _errors(401, 404, 500, 503),
    "POST": _errors(400, 401, 403, 404, 413, 429, 500, 503),
}
REFERENCE = "#/components/schemas/"


def streamed(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The answer to a request that may want events instead; their schema is that of one event, as in OpenAPI 3.2."""
    shapes = {"anyOf": [{"$ref": REFERENCE + name} for name in (chunk.__name__, ErrorResponse.__name__)]}
    data = {
        "description": "a chunk; where the engine fails on the way, an error; at last [DONE]",
        "anyOf": [
            {"const": "[DONE]"},
            {"type": "string", "contentMediaType": "application/json", "contentSchema": shapes},
        ],
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    about = "the answer, or with `stream` its chunks as events"
    return {200: {"description": about, "content": {"text/event-stream": {"schema": event}}}}


def describe(app: FastAPI, served: ServedModel, with_key: bool) -> dict[str, Any]:
    """The description of an app, made once."""
    if app.openapi_schema:
        return app.openapi_schema
    version = importlib.metadata.version("nemoe-jax")
    description = get_openapi(
        title=app.title, version=version, description=ABOUT.format(name=served.name), routes=app.routes
    )
    for path in description["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # which FastAPI adds; ours is 400
    schemas = description["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    # the chunks of a stream are no whole answer to anything, which FastAPI would list
    kinds: list[tuple[type[BaseModel], Any]] = [(ChatChunk, "serialization"), (ResponsesEvent, "serialization")]
    _, chunks = models_json_schema(kinds, ref_template=REFERENCE + "{model}")
    schemas |= {name: schema for name, schema in chunks["$defs"].items() if name not in schemas}
    for schema in schemas.values():
        narrow(schema.get("properties", {}), served)
    if with_key:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name, path in description["paths"].items():
            for operation in path.values() if name != "/health" else ():
                operation["security"] = [{"key": []}]
    app.openapi_schema = description
    return description


def narrow(properties: dict[str, Any], served: ServedModel) -> None:
    """Says of a body's fields what this server knows: models, the vocabulary, the longest response."""
    names = [served.name, *served.adapters]
    if served.adapter_folder is not None:  # they come and go
        names = []
    if names and "anyOf" in properties.get("model", {}):  # and may be left out
        properties["model"]["anyOf"] = [{"type": "string", "enum": names}, {"type": "null"}]
    if "tokens" in properties and "model" in properties:
        properties["tokens"]["items"]["maximum"] = served.config.vocab - 1
    if "stream" not in properties:
        return
    if names:
        properties["model"]["enum"] = names
    most = served.context if served.max_tokens is None else min(served.context, served.max_tokens)
    for name in {"max_tokens", "max_completion_tokens", "max_output_tokens"} & properties.keys():
        for choice in properties[name]["anyOf"]:
            if choice["type"] == "integer":
                choice["maximum"] = most
