"""Errors in the shape of the OpenAI API: {"error": {"message", "type", "param", "code"}}, with the status."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nemoe_jax.errors import UserError
from nemoe_jax.serving.api.responses import ErrorDetail, ErrorResponse, ErrorType
from nemoe_jax.serving.engine.engine import Busy, Closed
from nemoe_jax.text.tokenizers.base import replace_surrogates

CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
SHOWN = 80  # characters of a wrong value


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def answer(self) -> ErrorResponse:
        """The body."""
        kind: ErrorType = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status, kind)  # type: ignore[assignment]
        message = replace_surrogates(" ".join(str(self).split()))
        return ErrorResponse(error=ErrorDetail(message=message, type=kind, param=self.param, code=self.code))

    @property
    def response(self) -> Response:
        """The whole answer."""
        return Response(self.answer.model_dump_json(), self.status, self.headers, "application/json")


def from_user_error(error: UserError) -> ApiError:
    """Bad input that another module found; its message begins with the place, as in `messages[2]: …`."""
    place = str(error).partition(":")[0]
    return ApiError(400, str(error), place if place.isascii() and " " not in place and "/" not in place else None)


def from_busy(busy: Busy) -> ApiError:
    """A full queue."""
    seconds = max(1, round(busy.retry_after))
    message = f"too many requests are waiting; try again in {seconds} s"
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def shutting_down() -> ApiError:
    """A server that is about to end."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


def from_validation(errors: Sequence[Any], body: Any) -> ApiError:
    """A body that is not what the OpenAPI description says."""
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {errors[0]['ctx']['error']}", code="invalid_json")
    if not isinstance(body, dict):
        return ApiError(400, "expected a JSON object as the body, with Content-Type: application/json")
    places = [path_of(error["loc"][1:], body, error["type"] == "missing") for error in errors]
    # of a field that can have several forms, the one that fits furthest is meant
    # and of those at one place, one that is not of another type altogether, or else a wrong value
    place, error = max(
        zip(places, errors, strict=True),
        key=lambda pair: (
            pair[0].count(".") + pair[0].count("["),
            not pair[1]["type"].endswith("_type"),
            pair[1]["type"] != "missing",
        ),
    )
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"{place}: no such parameter", place, "unknown_parameter")
    if error["type"] == "missing":
        return ApiError(400, f"{place}: missing", place, "missing_required_parameter")
    reason = error["msg"][:1].lower() + error["msg"][1:]
    return ApiError(400, f"{place}: {reason}, got {error['input']!r:.{SHOWN}}", place, "invalid_value")


def path_of(location: Sequence[str | int], body: Any, missing: bool) -> str:
    """Where in the body: `messages[0].content`; what pydantic says of the types that it tried is left out."""
    path, value = "", body
    for at, part in enumerate(location):
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and part in value:
            path, value = f"{path}.{part}" if path else str(part), value[part]
        elif missing and at == len(location) - 1:
            path = f"{path}.{part}" if path else str(part)
    return path


def add_error_handlers(app: FastAPI) -> None:
    """Whatever goes wrong is answered in the API's shape."""

    @app.exception_handler(ApiError)
    def api_error(request: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(UserError)
    def user_error(request: Request, error: UserError) -> Response:
        return from_user_error(error).response

    @app.exception_handler(Busy)
    def busy(request: Request, error: Busy) -> Response:
        return from_busy(error).response

    @app.exception_handler(Closed)
    def closed(request: Request, error: Closed) -> Response:
        return ApiError(503, str(error), code="engine_closed").response

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors(), error.body).response

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, code=CODES.get(error.status_code), headers=error.headers).response

    @app.exception_handler(Exception)
    def unforeseen(request: Request, error: Exception) -> Response:
        return ApiError(500, f"internal error ({type(error).__name__})", code="internal_error").response
