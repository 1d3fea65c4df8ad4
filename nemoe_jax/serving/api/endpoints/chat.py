"""POST /v1/chat/completions: the next message of a chat, or calls of tools."""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from nemoe_jax.errors import UserError
from nemoe_jax.serving.api.api_keys import caller_of
from nemoe_jax.serving.api.errors import ApiError
from nemoe_jax.serving.api.requests import ChatRequest, ChosenTool, JsonObjectFormat, JsonSchemaFormat
from nemoe_jax.serving.api.responses import (
    AssistantMessage,
    Call,
    CallDelta,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    Finish,
    LikelyToken,
    TokenLogprob,
    finite,
)
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
from nemoe_jax.serving.engine.request import Constraint, ScoredToken
from nemoe_jax.serving.structured.validation import schema_violation
from nemoe_jax.text.chat.render import render_chat
from nemoe_jax.text.chat.tool_parser import ParsedAnswer

Plain = dict[str, Any]


async def chat(served: ServedModel, asked: ChatRequest, request: Request) -> Response:
    """The answer to one HTTP request. Raises ApiError, UserError or Busy."""
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or []] or None
    wanted = await run_in_threadpool(read, served, asked, tools)
    answers = EngineStreams(served.engine, wanted, served.metrics, caller_of(request.scope))
    writer = ChatWriter(served, asked, tools if asked.tool_choice != "none" else None, len(wanted[0].prompt))
    headers = {"Warning": '299 nemoe "reasoning_effort: no effect"'} if asked.reasoning_effort is not None else {}
    if asked.stream:
        return EventStream(writer.events(answers, request), answers, headers)
    return as_json(await cancel_on_disconnect(request, writer.whole(answers, request), answers), headers)


def read(served: ServedModel, asked: ChatRequest, tools: list[Plain] | None) -> list[engine_request.Request]:
    """The engine's requests, n of them."""
    served.adapter(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs: expected logprobs: true with it", "top_logprobs")
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens: expected one of max_tokens and max_completion_tokens", "max_tokens")
    param = "max_completion_tokens" if asked.max_tokens is None else "max_tokens"
    prompt = read_prompt(served, asked, tools)
    room = served.room(prompt, getattr(asked, param), None, param)
    make = constraint_maker(served, asked, tools)
    constraints = [make() for _ in range(asked.n or 1)]
    top = asked.top_logprobs or 0 if asked.logprobs else None
    return served.requests(asked, prompt, room, top, constraints)


def read_prompt(served: ServedModel, asked: ChatRequest, tools: list[Plain] | None) -> list[int]:
    """The chat's token ids."""
    messages = [message.model_dump(exclude_none=True) for message in asked.messages]
    for message in messages:
        if message["role"] == "developer" and served.tokenizer.chat_template is None:
            message["role"] = "system"  # its newer name in OpenAI's API
    going_on = bool(asked.continue_final_message)
    if going_on and asked.add_generation_prompt:
        raise ApiError(
            400, "add_generation_prompt: expected false with continue_final_message: true", "add_generation_prompt"
        )
    if messages[-1]["role"] == "assistant" and not going_on and served.tokenizer.chat_template is None:
        last = f"messages[{len(messages) - 1}]"
        raise ApiError(400, f"{last}: the last one is an answer; continue_final_message: true goes on with it", last)
    opening = not going_on if asked.add_generation_prompt is None else asked.add_generation_prompt
    return render_chat(
        served.tokenizer,
        messages,
        tools=tools,
        continue_answer=going_on,
        generation_prompt=opening,
        variables=asked.chat_template_kwargs,
    )


def constraint_maker(
    served: ServedModel, asked: ChatRequest, tools: list[Plain] | None
) -> Callable[[], Constraint | None]:
    """What makes the constraint of one answer, by its tools and `response_format`."""
    choice = asked.tool_choice.model_dump() if isinstance(asked.tool_choice, ChosenTool) else asked.tool_choice
    schema = response_schema(asked)

    def constraint() -> Constraint | None:
        try:
            parallel = asked.parallel_tool_calls is not False
            return served.builder.constraint(tools, choice, schema, parallel)
        except UserError as error:
            if str(error).startswith("schema: "):
                raise ApiError(400, f"response_format: {error}", "response_format") from error
            raise

    return constraint


def response_schema(asked: ChatRequest) -> Plain | None:
    """The schema of `response_format`; None for any text."""
    if isinstance(asked.response_format, JsonSchemaFormat):
        return asked.response_format.json_schema.schema_ or {}
    return {"type": "object"} if isinstance(asked.response_format, JsonObjectFormat) else None


class ChatWriter(ResponseWriter):
    """Chats, with tool calls."""

    def __init__(self, served: ServedModel, asked: ChatRequest, tools: list[Plain] | None, prompt_tokens: int):
        super().__init__(served, asked, "chatcmpl", prompt_tokens)
        self.asked = asked
        count = asked.n or 1
        self.readers = [served.builder.parser(tools) for _ in range(count)]
        self.texts = [""] * count
        self.schema = response_schema(asked)
        self.parameters = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}

    async def whole(self, answers: EngineStreams, request: Request) -> ChatCompletion:
        """All of it at once."""
        texts, reasons = self.texts, [""] * len(self.readers)
        tokens: list[list[ScoredToken]] = [[] for _ in self.readers]
        async for index, piece in answers:
            texts[index] += self.readers[index].push(piece.text, piece.token_ids)
            tokens[index] += piece.tokens
            reasons[index] = piece.finish_reason or ""
        choices = []
        for index, reader in enumerate(self.readers):
            rest = reader.finish()
            text, calls = texts[index] + rest.text, [call_of(call) for call in rest.calls]
            choices.append(
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content=text if text or not calls else None, tool_calls=calls or None),
                    logprobs=self.logprobs(tokens[index]),
                    finish_reason=finish_of(reasons[index], rest),
                    warnings=self.warnings(text, rest, reasons[index]) or None,
                )
            )
        self.answer_tokens = sum(map(len, tokens))
        usage = self.usage(request, answers)
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    async def events(self, answers: EngineStreams, request: Request) -> AsyncIterator[str]:
        """The role, a chunk for each piece, the calls, the reason why it ended."""
        for index in range(len(self.readers)):
            yield self.event(index, Delta(role="assistant", content=""))
        async for index, piece in answers:
            self.answer_tokens += len(piece.tokens)
            text = self.readers[index].push(piece.text, piece.token_ids)
            self.texts[index] += text
            if text or (piece.tokens and self.asked.logprobs):
                yield self.event(index, Delta(content=text), logprobs=self.logprobs(piece.tokens))
            if piece.finish_reason is None:
                continue
            rest = self.readers[index].finish()
            if rest.text:
                yield self.event(index, Delta(content=rest.text))
            for at, call in enumerate(rest.calls):
                yield self.event(index, Delta(tool_calls=[CallDelta(index=at, **call_of(call).model_dump())]))
            found = self.warnings(self.texts[index] + rest.text, rest, piece.finish_reason)
            warnings = {"warnings": found} if found else {}
            yield self.event(index, Delta(), finish_reason=finish_of(piece.finish_reason, rest), **warnings)
        usage = self.usage(request, answers)
        if self.counted:
            yield event(self.chunk([], usage=usage))

    def warnings(self, text: str, rest: ParsedAnswer, reason: str) -> list[str]:
        """What is odd about a response: calls that cannot be read, and what does not fit its schema after all."""
        found = list(rest.warnings)
        for at, call in enumerate(rest.calls):
            problem = schema_violation(call.arguments, self.parameters.get(call.name))
            found += [f"call {at + 1}: the arguments do not fit the parameters: {problem}"] if problem else []
        if self.schema is not None and not rest.calls and reason != "length":
            problem = schema_violation(text, self.schema)
            found += [f"the response does not fit its schema: {problem}"] if problem else []
        return found

    def event(self, index: int, delta: Delta, **fields: Any) -> str:
        """One answer's part of a chunk; only what is said is in it."""
        choice = ChatChunkChoice(index=index, delta=delta, **{"logprobs": None, "finish_reason": None, **fields})
        usage: Plain = {"usage": None} if self.counted else {}
        return event(self.chunk([choice], **usage), exclude_unset=True)

    def chunk(self, choices: list[ChatChunkChoice], **usage: Any) -> ChatChunk:
        """Choices with what stands around them."""
        return ChatChunk(
            id=self.id, object="chat.completion.chunk", created=self.created, model=self.model, choices=choices, **usage
        )

    def logprobs(self, tokens: Sequence[ScoredToken]) -> ChatLogprobs | None:
        """Those of the tokens that are text."""
        if not self.asked.logprobs:
            return None
        return chat_logprobs(
            self.served, (scored for scored in tokens if scored.token not in self.served.builder.end_tokens)
        )


def call_of(call: Any) -> Call:
    """A parsed call in the API's shape."""
    return Call(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments))


def finish_of(reason: str, rest: ParsedAnswer) -> Finish:
    """Why an answer ended."""
    if reason == "length":
        return "length"
    return "tool_calls" if rest.calls else "stop"


def chat_logprobs(served: ServedModel, tokens: Iterable[ScoredToken]) -> ChatLogprobs:
    """Those of a chat's answer; a token that is a part of a character shows as U+FFFD beside its bytes."""

    def likely(token: int, logprob: float | None) -> LikelyToken:
        data = served.builder.vocabulary.token_bytes(token)
        text = data.decode("utf-8", "replace") if data else served.tokenizer.piece(token)
        return LikelyToken(token=text, logprob=finite(logprob), bytes=list(data))

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **likely(scored.token, scored.logprob).model_dump(), top_logprobs=[likely(*one) for one in scored.top]
            )
            for scored in tokens
        ]
    )
