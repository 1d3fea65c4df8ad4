"""POST /tokenize and /detokenize: a prompt as token ids and back, with vLLM's fields."""

from pydantic import BaseModel, Field

from nemoe_jax.serving.api.endpoints.chat import read_prompt
from nemoe_jax.serving.api.errors import ApiError
from nemoe_jax.serving.api.requests import ChatRequest, Json, Message, StrictModel, TokenId, Tool
from nemoe_jax.serving.api.served_model import ServedModel
from nemoe_jax.text.chat.tools import MOST_TOOLS


class TokenizePrompt(StrictModel):
    """Body of POST /tokenize: a prompt."""

    model: str | None = Field(None, description="a name that GET /v1/models lists")
    prompt: str
    add_special_tokens: bool = Field(True, description="with what the tokenizer puts around a text")
    return_token_strs: bool = Field(False, description="the tokens as strings, too")


class TokenizeChat(StrictModel):
    """Body of POST /tokenize: messages, as in /v1/chat/completions."""

    model: str | None = Field(None, description="a name that GET /v1/models lists")
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None
    return_token_strs: bool = Field(False, description="the tokens as strings, too")


class Tokenized(BaseModel):
    """Token ids, as a completion would read them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(StrictModel):
    """Body of POST /detokenize."""

    model: str | None = Field(None, description="a name that GET /v1/models lists")
    tokens: list[TokenId]


class Detokenized(BaseModel):
    """The text, with control tokens by name."""

    prompt: str


def tokenize(served: ServedModel, asked: TokenizePrompt | TokenizeChat) -> Tokenized:
    """Raises ApiError or UserError."""
    served.adapter(served.name if asked.model is None else asked.model)
    if isinstance(asked, TokenizeChat):
        fields = ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        chat = ChatRequest.model_construct(model=served.name, **{name: getattr(asked, name) for name in fields})
        tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or []]
        ids = read_prompt(served, chat, tools or None)
    elif asked.add_special_tokens:
        ids = served.tokenizer.encode_prompt(asked.prompt)
    else:
        ids = served.tokenizer.encode(asked.prompt)
    strings = [served.tokenizer.piece(token) for token in ids] if asked.return_token_strs else None
    return Tokenized(count=len(ids), max_model_len=served.context, tokens=ids, token_strs=strings)


def detokenize(served: ServedModel, asked: DetokenizeRequest) -> Detokenized:
    """Raises ApiError."""
    served.adapter(served.name if asked.model is None else asked.model)
    wrong = next((token for token in asked.tokens if token >= served.config.vocab), None)
    if wrong is not None:
        message = f"tokens: expected token ids from 0 to {served.config.vocab - 1}, got {wrong}"
        raise ApiError(400, message, "tokens", "invalid_value")
    return Detokenized(prompt=served.tokenizer.decode(asked.tokens, skip_special=False))
