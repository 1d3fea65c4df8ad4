"""POST /v1/responses: OpenAI's Responses API, translated to chats and back; nothing is stored."""

import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from nemoe_jax.errors import UserError
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.serving.api.api_keys import caller_of
from nemoe_jax.serving.api.endpoints.chat import ChatWriter, Plain, read
from nemoe_jax.serving.api.endpoints.responses_shapes import (
    InputCall,
    InputMessage,
    ResponseObject,
    ResponsesEvent,
    ResponsesRequest,
    TextItem,
)
from nemoe_jax.serving.api.errors import ApiError, from_user_error
from nemoe_jax.serving.api.requests import ChatRequest
from nemoe_jax.serving.api.served_model import ServedModel
from nemoe_jax.serving.api.streaming import EngineStreams, EventStream, as_json, cancel_on_disconnect, event, new_id

NAMES = {  # of chats' parameters, as errors give them
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "tool_choice.function": "tool_choice",
}


async def respond(served: ServedModel, asked: ResponsesRequest, request: Request) -> Response:
    """The answer to one HTTP request. Raises ApiError, UserError or Busy."""
    chat, places = to_chat(asked)
    tools = [tool.model_dump(exclude_none=True) for tool in chat.tools or []] or None
    try:
        wanted = await run_in_threadpool(read, served, chat, tools)
    except (ApiError, UserError) as error:
        raise renamed(error, places) from error
    answers = EngineStreams(served.engine, wanted, served.metrics, caller_of(request.scope))
    writer = ChatWriter(served, chat, tools if asked.tool_choice != "none" else None, len(wanted[0].prompt))
    response = Responder(asked, writer, wanted[0].sampling)
    headers = {"Warning": '299 nemoe "reasoning: no effect"'} if asked.reasoning is not None else {}
    if asked.stream:
        return EventStream(response.events(answers, request), answers, headers, end="")
    return as_json(await cancel_on_disconnect(request, response.whole(answers, request), answers), headers)


def to_chat(asked: ResponsesRequest) -> tuple[ChatRequest, list[str]]:
    """The same as a chat; and for each of its messages, which parameter it came from."""
    messages: list[Plain] = []
    places: list[str] = []

    def add(place: str, role: str, content: str | list[TextItem] | None, **more: Any) -> None:
        blocks = content if not isinstance(content, list) else [{"type": "text", "text": part.text} for part in content]
        messages.append({"role": role, "content": blocks, **more})
        places.append(place)

    if asked.instructions is not None:
        add("instructions", "system", asked.instructions)
    if isinstance(asked.input, str):
        add("input", "user", asked.input)
    for at, item in enumerate([] if isinstance(asked.input, str) else asked.input):
        place = f"input[{at}]"
        if isinstance(item, InputMessage):
            add(place, item.role, item.content)
        elif isinstance(item, InputCall):
            if not messages or messages[-1]["role"] != "assistant":
                add(place, "assistant", None)
            call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            add(place, "tool", item.output, tool_call_id=item.call_id)
    body = asked.model_dump(include={"model", "temperature", "top_p", "parallel_tool_calls"})
    body |= {"messages": messages, "max_completion_tokens": asked.max_output_tokens, "tool_choice": asked.tool_choice}
    if asked.tools is not None:
        body["tools"] = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in asked.tools]
    if asked.tool_choice is not None and not isinstance(asked.tool_choice, str):
        body["tool_choice"] = {"type": "function", "function": {"name": asked.tool_choice.name}}
    if asked.text is not None and asked.text.format is not None:
        wanted = asked.text.format.model_dump(by_alias=True)
        body["response_format"] = {"type": wanted.pop("type")} | ({"json_schema": wanted} if wanted else {})
    return ChatRequest.model_validate(body), places


def renamed(error: ApiError | UserError, places: Sequence[str]) -> ApiError:
    """An error about a chat, with the names of this API."""
    if isinstance(error, UserError):
        error = from_user_error(error)
    names = NAMES | {f"messages[{at}]": place for at, place in enumerate(places)}

    def own(text: str) -> str:
        old = next((name for name in names if text.startswith(name)), "")
        return names.get(old, "") + text.removeprefix(old)

    message = own(str(error)).partition("; continue_final_message")[0]  # which is of chats alone
    return ApiError(error.status, message, error.param and own(error.param), error.code, error.headers)


class Responder:
    """Puts the engine's outputs into this API's shape."""

    def __init__(self, asked: ResponsesRequest, chat: ChatWriter, sampling: SamplingParams):
        self.chat, self.numbers, self.text = chat, itertools.count(), ""
        given = asked.model_dump(by_alias=True, exclude_none=True)
        self.response = ResponseObject(
            id=new_id("resp"),
            created_at=chat.created,
            model=asked.model,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            metadata=asked.metadata,
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            text={"format": {"type": "text"}} | given.get("text", {}),
            tool_choice=given.get("tool_choice", "auto"),
            tools=given.get("tools", []),
        )
        self.message: Plain = {"type": "message", "id": new_id("msg"), "role": "assistant"}

    async def whole(self, answers: EngineStreams, request: Request) -> ResponseObject:
        """All of it at once."""
        async for _ in self.steps(answers, request):
            pass
        return self.response

    async def events(self, answers: EngineStreams, request: Request) -> AsyncIterator[str]:
        """As typed events; also where it fails on the way."""
        try:
            async for one in self.steps(answers, request):
                yield f"event: {one.type}\n{event(one)}"
        except ApiError as error:
            self.response.status = "failed"
            self.response.error = {"code": "server_error", "message": str(error)}
            failed = self.event("failed", response=self.response)
            yield f"event: {failed.type}\n{event(failed)}"

    async def steps(self, answers: EngineStreams, request: Request) -> AsyncIterator[ResponsesEvent]:
        """The response's beginning, its text as it comes, its calls, and all of it once more."""
        for kind in ("created", "in_progress"):
            yield self.event(kind, response=self.response)
        reader, reason = self.chat.readers[0], ""
        async for _, piece in answers:
            self.chat.answer_tokens += len(piece.tokens)
            for one in self.say(reader.push(piece.text, piece.token_ids)):
                yield one
            reason = piece.finish_reason or reason
        rest = reader.finish()
        status = self.response.status = "incomplete" if reason == "length" else "completed"
        for one in self.say(rest.text, whole=not rest.calls):
            yield one
        if "content" in self.message:
            for one in self.close(status):
                yield one
        for call in rest.calls:
            item = {"type": "function_call", "id": new_id("fc"), "call_id": call.id, "name": call.name}
            place = {"output_index": len(self.response.output)}
            yield self.event("output_item.added", **place, item={**item, "arguments": "", "status": "in_progress"})
            arguments, own = call.arguments, {**place, "item_id": item["id"]}
            yield self.event("function_call_arguments.delta", **own, delta=arguments)
            yield self.event("function_call_arguments.done", **own, arguments=arguments)
            self.response.output.append({**item, "arguments": arguments, "status": "completed"})
            yield self.event("output_item.done", **place, item=self.response.output[-1])
        usage = self.chat.usage(request, answers)
        self.response.usage = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {**usage.prompt_tokens_details.model_dump(), "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }
        self.response.warnings = self.chat.warnings(self.text, rest, reason) or None
        if status == "incomplete":
            self.response.incomplete_details = {"reason": "max_output_tokens"}
        yield self.event(status, response=self.response)

    def say(self, text: str, whole: bool = False) -> Iterator[ResponsesEvent]:
        """Some more text of the message, which begins with the first; `whole`: or here at the latest."""
        if "content" not in self.message and (text or whole):
            self.message["content"] = []
            yield self.event("output_item.added", output_index=0, item={**self.message, "status": "in_progress"})
            yield self.text_event("content_part.added", part=self.part())
        if text:
            self.text += text
            yield self.text_event("output_text.delta", delta=text, logprobs=[])

    def close(self, status: str) -> Iterator[ResponsesEvent]:
        """The end of the message."""
        yield self.text_event("output_text.done", text=self.text, logprobs=[])
        yield self.text_event("content_part.done", part=self.part())
        self.response.output.append({**self.message, "content": [self.part()], "status": status})
        yield self.event("output_item.done", output_index=0, item=self.response.output[-1])

    def part(self) -> Plain:
        """The message's text so far."""
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def text_event(self, kind: str, **fields: Any) -> ResponsesEvent:
        """An event about the message's text."""
        return self.event(kind, item_id=self.message["id"], output_index=0, content_index=0, **fields)

    def event(self, kind: str, **fields: Any) -> ResponsesEvent:
        """The next event."""
        return ResponsesEvent(type=f"response.{kind}", sequence_number=next(self.numbers), **fields)
