"""POST /v1/completions: texts or token ids, continued."""

from collections.abc import AsyncIterator, Sequence

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from nemoe_jax.serving.api.api_keys import caller_of
from nemoe_jax.serving.api.errors import ApiError
from nemoe_jax.serving.api.requests import CompletionRequest
from nemoe_jax.serving.api.responses import Completion, CompletionChoice, CompletionLogprobs, Usage, finite
from nemoe_jax.serving.api.served_model import ServedModel
from nemoe_jax.serving.api.streaming import (
    EngineStreams,
    EventStream,
    ResponseWriter,
    as_json,
    cancel_on_disconnect,
    event,
)
from nemoe_jax.serving.engine import request as engine_request
from nemoe_jax.serving.engine.request import RequestOutput, ScoredToken

DEFAULT_TOKENS = 16  # as in OpenAI's API


async def complete(served: ServedModel, asked: CompletionRequest, request: Request) -> Response:
    """The answer to one HTTP request. Raises ApiError, UserError or Busy."""
    wanted, echoes = await run_in_threadpool(read, served, asked)
    answers = EngineStreams(served.engine, wanted, served.metrics, caller_of(request.scope))
    writer = CompletionWriter(served, asked, echoes, sum(len(one.prompt) for one in wanted[:: asked.n or 1]))
    if asked.stream:
        return EventStream(writer.events(answers, request), answers)
    return as_json(await cancel_on_disconnect(request, writer.whole(answers, request), answers))


def read(served: ServedModel, asked: CompletionRequest) -> tuple[list[engine_request.Request], list[str]]:
    """The engine's requests, n for each prompt, and what each answer's text begins with."""
    count = asked.n or 1
    served.adapter(asked.model)
    if asked.best_of not in (None, count):
        raise ApiError(400, f"best_of: expected n ({count}) or nothing, got {asked.best_of}", "best_of")
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError(400, "max_tokens: expected at least 1 without echo, got 0", "max_tokens", "invalid_value")
    prompts = prompt_ids(served, asked)
    if len(prompts) * count > served.max_answers:
        most = served.max_answers
        raise ApiError(400, f"prompt: expected at most {most} answers, got {len(prompts)} times n = {count}", "prompt")
    requests, echoes = [], []
    for given, ids in prompts:
        # one token is the least that the engine generates; of max_tokens: 0 it is left out again
        wanted = None if asked.max_tokens is None else max(asked.max_tokens, 1)
        room = served.room(ids, wanted, DEFAULT_TOKENS, "max_tokens")
        scored = bool(asked.echo and asked.logprobs is not None)
        requests += served.requests(asked, ids, room, asked.logprobs, [None] * count, scored)
        echoes += [(given or served.tokenizer.decode(ids)) if asked.echo else ""] * count
    return requests, echoes


def prompt_ids(served: ServedModel, asked: CompletionRequest) -> list[tuple[str, list[int]]]:
    """The prompts: text (empty where ids were given) and token ids."""
    prompt = asked.prompt
    several = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    return [(one, served.tokenizer.encode_prompt(one)) if isinstance(one, str) else ("", list(one)) for one in several]


class CompletionWriter(ResponseWriter):
    """Continued prompts."""

    def __init__(self, served: ServedModel, asked: CompletionRequest, echoes: list[str], prompt_tokens: int):
        super().__init__(served, asked, "cmpl", prompt_tokens)
        self.asked = asked
        self.echoes = echoes  # what is still to be said before an answer's own text
        self.offsets = [0] * len(echoes)

    async def whole(self, answers: EngineStreams, request: Request) -> Completion:
        """All of it at once."""
        pieces = [RequestOutput("", ()) for _ in self.echoes]
        async for index, piece in answers:
            before = pieces[index]
            pieces[index] = RequestOutput(
                before.text + piece.text,
                before.tokens + piece.tokens,
                piece.finish_reason,
                prompt=before.prompt + piece.prompt,
            )
        choices = [self.choice(index, piece) for index, piece in enumerate(pieces)]
        return self.chunk(choices, self.usage(request, answers))

    async def events(self, answers: EngineStreams, request: Request) -> AsyncIterator[str]:
        """A chunk for each piece."""
        leave_out = None if self.counted else {"usage"}
        async for index, piece in answers:
            yield event(self.chunk([self.choice(index, piece)]), exclude=leave_out)
        usage = self.usage(request, answers)
        if self.counted:
            yield event(self.chunk([], usage))

    def choice(self, index: int, piece: RequestOutput) -> CompletionChoice:
        """What an output says of its response."""
        if self.asked.max_tokens == 0:
            piece = piece._replace(text="", tokens=(), finish_reason=piece.finish_reason and "length")
        self.answer_tokens += len(piece.tokens)
        echo, self.echoes[index] = self.echoes[index], ""
        logprobs = None
        if self.asked.logprobs is not None:
            tokens = [
                *piece.prompt,
                *(one for one in piece.tokens if self.asked.echo or one.token not in self.served.builder.end_tokens),
            ]
            logprobs = completion_logprobs(self.served, tokens, self.offsets[index])
            self.offsets[index] += sum(len(completion_text(self.served, scored.token)) for scored in tokens)
        return CompletionChoice(
            index=index,
            text=echo + piece.text,
            logprobs=logprobs,
            finish_reason=piece.finish_reason,  # type: ignore[arg-type]  # the others were raised
        )

    def chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        """Choices with what stands around them."""
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


def completion_logprobs(served: ServedModel, tokens: Sequence[ScoredToken], offset: int) -> CompletionLogprobs:
    """Those of a completion whose tokens begin `offset` characters into its text.

    A token that is a part of a character shows as `bytes:\\xe2`, as in OpenAI's API.
    """
    texts = [completion_text(served, scored.token) for scored in tokens]
    offsets = [offset]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[None if one.logprob is None else finite(one.logprob) for one in tokens],
        top_logprobs=[None if one.logprob is None else likeliest(served, one) for one in tokens],
        text_offset=offsets[:-1],
    )


def likeliest(served: ServedModel, scored: ScoredToken) -> dict[str, float]:
    """The likeliest tokens by text; of several with one text, the likeliest counts."""
    top: dict[str, float] = {}
    for token, logprob in scored.top:
        top.setdefault(completion_text(served, token), finite(logprob))
    return top


def completion_text(served: ServedModel, token: int) -> str:
    """A token as completions name it."""
    data = served.builder.vocabulary.token_bytes(token)
    try:
        return data.decode() or served.tokenizer.piece(token)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
