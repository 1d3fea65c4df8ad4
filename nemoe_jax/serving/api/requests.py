"""What clients of the OpenAI API may ask for, checked field by field; the OpenAPI description is made from it.

Types are strict (a text is no number), and a key that is not listed is refused, since a misspelt one would silently do
nothing. What has no effect here is listed all the same where clients send it as a matter of course (`user`). Sampling
goes by vLLM's names beyond what OpenAI's API has: top_k, min_p, repetition_penalty.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemoe_jax.inference.sampling import MAX_BIASES
from nemoe_jax.serving.engine.request import MAX_TOP_LOGPROBS
from nemoe_jax.text.chat.tools import MOST_TOOLS, NAME

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_STOPS = 64
MAX_STOP_LENGTH = 256  # characters
WHOLE_NAME = f"^{NAME.pattern}$"

TokenId = Annotated[int, Field(ge=0)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Json = dict[str, Any]


class StrictModel(BaseModel):
    """An object whose keys are all known."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Part(BaseModel):
    """An object that may hold more than is looked at here, which goes to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(StrictModel):
    """How a stream is sent."""

    include_usage: bool | None = Field(None, description="send a last chunk with the numbers of tokens")
    include_obfuscation: bool | None = Field(None, description="no effect")


class GenerationParams(StrictModel):
    """What both kinds of request have in common."""

    model: str = Field(description="a name that GET /v1/models lists: the model, or one of its adapters")
    n: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="answers; the seed grows by one from each to the next"
    )
    stream: bool | None = Field(None, description="send the answer in pieces, as server-sent events")
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="texts that end the answer, and are no part of it"
    )
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64, description="tokens that end the answer")
    ignore_eos: bool | None = Field(None, description="go on behind end tokens; without effect under a grammar")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="the same seed gives the same answer")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1, description="the likeliest tokens of this share together")
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="so many of the likeliest; 0 or -1: all")
    min_p: float | None = Field(None, ge=0, le=1, description="tokens of at least this share of the likeliest's")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="above 1: fewer tokens a second time")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(None, max_length=MAX_BIASES, description="by token id, what is added to its logit")
    )
    user: str | None = Field(None, description="no effect")
    metadata: Json | None = Field(None, description="no effect")


class CompletionRequest(GenerationParams):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="a text, texts, token ids, or lists of token ids; ids are taken as they are")
    max_tokens: int | None = Field(
        None, ge=0, description="tokens of the response at most; 16 by default; 0 together with echo"
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="of so many likeliest tokens as well; with echo, of the prompt's too",
    )
    echo: bool | None = Field(None, description="the response begins with the prompt")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="no other number than n")
    suffix: None = Field(None, description="not supported")


class TextBlock(Part):
    """A part of a message's content; other types than text are refused."""

    type: Literal["text"]
    text: str


class FunctionCall(Part):
    """Which function an answer calls, and with what."""

    name: str = Field(pattern=WHOLE_NAME)
    arguments: str | Json = Field(description="JSON, as a text or as an object")


class ToolCall(Part):
    """A call in an answer of the chat so far."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextBlock] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionSpec(Part):
    """A function that may be called."""

    name: str = Field(pattern=WHOLE_NAME)
    description: str | None = None
    parameters: Json | None = Field(None, description="a JSON schema of the arguments")
    strict: bool | None = None


class Tool(Part):
    """What may be called."""

    type: Literal["function"]
    function: FunctionSpec


class ChosenFunction(StrictModel):
    """The name of a function of `tools`."""

    name: str = Field(pattern=WHOLE_NAME)


class ChosenTool(StrictModel):
    """The one function to call."""

    type: Literal["function"]
    function: ChosenFunction


class TextFormat(StrictModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(StrictModel):
    """A JSON schema with a name."""

    name: str = Field(pattern=WHOLE_NAME)
    description: str | None = None
    # `schema` is a method of every pydantic model
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = Field(
        None,
        description="no effect: a grammar holds each token to JSON and to the keywords that it can express; others are "
        "refused, or checked in the end: a response that is complete and without `warnings` fits the schema",
    )


class JsonSchemaFormat(StrictModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(GenerationParams):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="tokens of the answer at most")
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="wants logprobs")
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required", "any"] | ChosenTool | None = Field(
        None, description="any is another word for required"
    )
    parallel_tool_calls: bool | None = Field(None, description="whether there may be several calls; true by default")
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    continue_final_message: bool | None = Field(
        None, description="the last message is the beginning of the answer, and stays open"
    )
    add_generation_prompt: bool | None = Field(
        None, description="whether the template opens the response; true by default, and false to continue a message"
    )
    chat_template_kwargs: Json | None = Field(None, description="variables for the chat template")
    reasoning_effort: str | None = Field(None, description="no effect, which a Warning header says")
    store: bool | None = Field(None, description="no effect: nothing is stored")
    service_tier: str | None = Field(None, description="no effect")
    safety_identifier: str | None = Field(None, description="no effect")
    prompt_cache_key: str | None = Field(None, description="no effect")
