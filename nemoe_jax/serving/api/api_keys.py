"""API keys: who asks, how much they may ask for at a time and per minute, and what else they may do.

A file of keys (YAML or JSON) is a list:

    - name: search
      key: sk-1f0c…
      max_requests: 4           # responses in flight, n of them for a request that wants n
      tokens_per_minute: 60000  # of prompts and responses
      priority: true            # may send X-Priority
      adapters: true            # may load and unload adapters

Tokens are counted as they come. A key that has used more than a minute allows is refused until that is made up for: a
long response may go beyond the limit once.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nemoe_jax.errors import UserError, listed
from nemoe_jax.serving.api.errors import ApiError
from nemoe_jax.serving.engine.engine import LONGEST_RETRY

PRIORITIES = 100
CALLER = "nemoe.caller"  # where in an ASGI scope a request's caller is


class ApiKey(BaseModel):
    """A key with its limits; None: as much as there is."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    key: str = Field(pattern=r"^[!-~]+$")  # what a header can hold, without spaces
    max_requests: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    priority: bool = False
    adapters: bool = False


def read_api_keys(path: str | Path) -> list[ApiKey]:
    """The keys of a file.

    Raises:
        UserError: it cannot be read, is no list of keys, or has a name or a key twice.
    """
    try:
        keys = TypeAdapter(list[ApiKey]).validate_python(yaml.safe_load(Path(path).read_text()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: expected YAML or JSON") from error
    except ValidationError as error:
        raise UserError(listed([f"{path}: {_place(one['loc'])}{one['msg']}" for one in error.errors()])) from error
    if not keys:
        raise UserError(f"{path}: expected a list of keys, got none")
    for what in ("name", "key"):
        values = [getattr(key, what) for key in keys]
        twice = next((at for at, value in enumerate(values) if value in values[:at]), None)
        if twice is not None:
            raise UserError(f"{path}: entry {twice + 1} ({keys[twice].name}): another one has the same {what}")
    return keys


def _place(location: tuple[int | str, ...]) -> str:
    """Where in the file, without what stands there: it may be a key."""
    words = [f"entry {part + 1}" if isinstance(part, int) else str(part) for part in location]
    return f"{', '.join(words)}: " if words else ""


class Account:
    """What one key has in flight, and its tokens of the last minute.

    Args:
        now: the time in seconds.
    """

    def __init__(self, key: ApiKey, now: Callable[[], float] = time.monotonic):
        self.key, self._now = key, now
        self.running = 0
        self._tokens = float(key.tokens_per_minute or 0)  # that may be used now; below 0 where more were
        self._since = now()
        self._lock = threading.Lock()

    def enter(self, requests: int, prompt_tokens: int) -> None:
        """So many responses begin, to prompts of so many tokens; `leave` has to follow.

        Raises:
            ApiError: a limit is reached (429), or can never hold so many (400).
        """
        most, of_minute = self.key.max_requests, self.key.tokens_per_minute
        with self._lock:
            if most is not None and requests > most:
                raise ApiError(400, f"expected at most {most} responses, the limit of this API key, got {requests}")
            if most is not None and self.running + requests > most:
                raise _refused(f"this API key may have {most} responses in flight", 1)
            if of_minute is not None:
                self._earn(of_minute)
                if self._tokens < 1:
                    seconds = (1 - self._tokens) * 60 / of_minute
                    raise _refused(f"this API key may use {of_minute} tokens per minute", seconds)
            self.running += requests
            self._tokens -= prompt_tokens

    def spend(self, tokens: int) -> None:
        """So many tokens came."""
        with self._lock:
            self._tokens -= tokens

    def leave(self, requests: int) -> None:
        """So many responses have ended."""
        with self._lock:
            self.running -= requests

    def _earn(self, of_minute: int) -> None:
        now = self._now()
        self._tokens = min(self._tokens + (now - self._since) * of_minute / 60, of_minute)
        self._since = now


def _refused(what: str, seconds: float) -> ApiError:
    retry = max(1, round(min(seconds, LONGEST_RETRY)))
    headers = {"Retry-After": str(retry)}
    return ApiError(429, f"{what}; try again in {retry} s", code="rate_limit_exceeded", headers=headers)


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who sent a request, and the priority that it wants."""

    account: Account
    priority: int = 0

    @property
    def name(self) -> str:
        """Of the key."""
        return self.account.key.name


ANYBODY = ApiKey(name="anybody", key="none", adapters=True)


def caller_of(scope: Any) -> Caller:
    """The caller that the middleware found."""
    caller: Caller = scope[CALLER]
    return caller


def read_priority(text: str | None, key: ApiKey) -> int:
    """The value of X-Priority.

    Raises:
        ApiError: not an integer in range, or the key may not set one.
    """
    if text is None:
        return 0
    if not key.priority:
        raise ApiError(403, "X-Priority: this API key may not set a priority", "X-Priority", "permission_denied")
    digits = text.strip().removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 3 and abs(int(text)) <= PRIORITIES):
        message = f"X-Priority: expected an integer from -{PRIORITIES} (first) to {PRIORITIES}, got {text!r:.20}"
        raise ApiError(400, message, "X-Priority", "invalid_value")
    return int(text)
