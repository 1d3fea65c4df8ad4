"""A model that is being served, and how a request's common fields become an engine's request."""

import dataclasses
import functools
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.inference.sampling_fields import SAMPLING_FIELDS, from_fields
from nemoe_jax.serving.api.errors import ApiError
from nemoe_jax.serving.api.metrics import Metrics
from nemoe_jax.serving.api.requests import GenerationParams
from nemoe_jax.serving.engine.engine import Engine
from nemoe_jax.serving.engine.request import Constraint, Request
from nemoe_jax.serving.request_builder import RequestBuilder
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.text.tokenizers.base import Tokenizer

SEEDS = 2**63
LEAST_SHARE = 256  # tokens of an answer whose prompt is longer than its share of the cache


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model behind its engine.

    name: what `model` must say; adapters are asked for by names of their own.
    adapter_folder: from which adapters are loaded while it runs; None: they are not.
    sampling: what holds where a request says nothing.
    max_tokens: of an answer, whatever a request says.
    max_answers: what one request may ask for at a time: more never finds room.
    """

    engine: Engine
    config: ModelConfig
    tokenizer: Tokenizer
    name: str
    adapter_folder: Path | None = None
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    max_answers: int = 64
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def metrics(self) -> Metrics:
        """Figures of this server."""
        return Metrics(self.engine.statistics, self.name)

    @functools.cached_property
    def builder(self) -> RequestBuilder:
        """Makes the engine's requests."""
        return RequestBuilder(self.config, self.tokenizer)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters, as they are now."""
        return self.engine.adapters

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that there is room for."""
        return self.engine.context

    def adapter(self, model: str) -> str | None:
        """The adapter that a request's `model` means; None: the model itself.

        Raises:
            ApiError: there is no such model.
        """
        if model == self.name:
            return None
        if model not in self.adapters:
            known = ", ".join([self.name, *self.adapters])
            raise ApiError(404, f"model: no model {model!r:.80} here; there are: {known}", "model", "model_not_found")
        return model

    def requests(
        self,
        asked: GenerationParams,
        prompt: Sequence[int],
        max_tokens: int,
        top_logprobs: int | None,
        constraints: Sequence[Constraint | None],
        prompt_logprobs: bool = False,
    ) -> list[Request]:
        """The engine's requests for the answers to one prompt, one for each constraint.

        Raises:
            ApiError: a value that does not fit this model.
            UserError: as `SamplingParams` does.
        """
        vocab = self.config.vocab
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        for param, tokens in {"prompt": prompt, "stop_token_ids": asked.stop_token_ids or ()}.items():
            wrong = next((token for token in tokens if token >= vocab), None)
            if wrong is not None:
                message = f"{param}: expected token ids from 0 to {vocab - 1}, got {wrong}"
                raise ApiError(400, message, param, "invalid_value")
        fields = asked.model_dump(include=set(SAMPLING_FIELDS))
        sampling = from_fields(self.sampling, fields | ({"top_k": 0} if asked.top_k == -1 else {}))
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        template = Request(
            (),
            max_tokens,
            stop=tuple(stop),
            stop_tokens=tuple(asked.stop_token_ids or ()),
            ignore_eos=bool(asked.ignore_eos),
            top_logprobs=top_logprobs,
            adapter=self.adapter(asked.model),
            prompt_logprobs=prompt_logprobs,
        )
        requests = []
        for at, constraint in enumerate(constraints):
            seeded = dataclasses.replace(sampling, seed=(seed + at) % SEEDS)
            one = dataclasses.replace(template, sampling=seeded)
            requests.append(self.builder.of_tokens(one, prompt, constraint))
        return requests

    def room(self, prompt: Sequence[int], wanted: int | None, default: int | None, param: str) -> int:
        """How many tokens an answer may have.

        Args:
            wanted: what the request says; `default` where it says nothing; None: what is left of a row's share of the
                cache, which is set aside for the answer while it is made.

        Raises:
            ApiError: the prompt leaves no room for so many, or the server allows fewer.
        """
        limit = self.max_tokens
        if wanted is not None and limit is not None and wanted > limit:
            raise ApiError(400, f"{param}: expected at most {limit}, the limit here, got {wanted}", param)
        room = self.context - len(prompt)
        if room < max(1, wanted or 0):
            length = f"{len(prompt)} tokens" + (f" and {wanted} of answer" if wanted else "")
            message = f"prompt: {length} exceed the context of {self.context}"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        if wanted is not None:
            return wanted
        if default is None:
            statistics = self.engine.statistics()
            default = max(LEAST_SHARE, statistics.tokens // statistics.slots - len(prompt))
        return min(room, default, limit or default)
