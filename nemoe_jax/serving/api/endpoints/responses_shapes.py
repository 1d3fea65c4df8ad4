"""What POST /v1/responses takes and gives: OpenAI's Responses API as far as it goes where nothing is stored."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from nemoe_jax.serving.api.requests import (
    ChosenFunction,
    FunctionCall,
    FunctionSpec,
    Json,
    JsonObjectFormat,
    JsonSchema,
    Part,
    StrictModel,
    TextFormat,
)
from nemoe_jax.text.chat.tools import MOST_TOOLS

NOT_STORED = "nothing is stored here; send the whole conversation as input, with store: false"


class TextItem(Part):
    """A part of a message's content; other types than text are refused."""

    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(Part):
    """One message of the conversation so far."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextItem]


class InputCall(FunctionCall):
    """A call in the conversation so far."""

    type: Literal["function_call"]
    call_id: str


class CallOutput(Part):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextItem]


class FunctionTool(FunctionSpec):
    """A function that may be called."""

    type: Literal["function"]


class ChosenFunctionTool(ChosenFunction):
    """The one function to call."""

    type: Literal["function"]


class NamedSchemaFormat(JsonSchema):
    """JSON that fits a schema."""

    type: Literal["json_schema"]


class TextOptions(StrictModel):
    """The form of the response's text."""

    format: TextFormat | JsonObjectFormat | NamedSchemaFormat | None = Field(None, discriminator="type")
    verbosity: str | None = Field(None, description="no effect")


class ResponsesRequest(StrictModel):
    """Body of POST /v1/responses."""

    model: str = Field(description="a name that GET /v1/models lists: the model, or one of its adapters")
    input: str | list[InputMessage | InputCall | CallOutput] = Field(
        min_length=1, description="a user's message, or the conversation so far"
    )
    instructions: str | None = Field(None, description="a system message before it")
    max_output_tokens: int | None = Field(None, ge=1, description="tokens of the response at most")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1, description="the likeliest tokens of this share together")
    stream: bool | None = Field(None, description="send the response as typed events")
    stream_options: Json | None = Field(None, description="no effect")
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ChosenFunctionTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="whether there may be several calls; true by default")
    metadata: Json | None = Field(None, description="given back")
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    truncation: Literal["disabled"] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = Field(None, description="no effect")
    reasoning: Json | None = Field(None, description="no effect, which a Warning header says")
    user: str | None = Field(None, description="no effect")
    service_tier: str | None = Field(None, description="no effect")
    safety_identifier: str | None = Field(None, description="no effect")
    prompt_cache_key: str | None = Field(None, description="no effect")

    @field_validator("store", "background", "previous_response_id", "conversation", mode="before")
    @classmethod
    def not_stored(cls, value: Any) -> Any:
        """Says why, where something would have to be stored."""
        if value is None or value is False:
            return value
        raise PydanticCustomError("unsupported", NOT_STORED)


class ResponseObject(BaseModel):
    """Answer of /v1/responses."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: Json | None = None
    incomplete_details: Json | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: Json | None
    model: str
    output: list[Json] = Field(default=[], description="a message, calls of functions, or both")
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    top_p: float
    text: Json
    tool_choice: str | Json
    tools: list[Json]
    truncation: Literal["disabled"] = "disabled"
    usage: Json | None = None
    warnings: list[str] | None = Field(default=None, description="as in /v1/chat/completions")


class ResponsesEvent(BaseModel):
    """An event of a response's stream; what else it holds depends on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
