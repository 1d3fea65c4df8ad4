"""Chat templates of Hugging Face directories, rendered by jinja2 in a sandbox as transformers does.

A template pastes control tokens and user text into one string, where a `</s>` that the user typed looks like the
template's own. So before rendering, every control token spelled out in a message is put between two marks,
private-use characters that occur nowhere in the chat; a message that ends or begins with a fragment of one (`<`,
`/s>`) gets a single mark, so that two neighbors cannot form one. After rendering, an unmarked control token is the
template's and becomes its id; the marks disappear and what they enclosed is text. The text itself stays in the
message, so templates that trim, split or search contents work as ever, and without look-alikes the ids are those of
transformers' `apply_chat_template`.

For training, what the assistant says is what stands in the template's `{% generation %}` blocks. A template without
them is rendered up to before and after each response, and the difference is the response; a template in which the one
is not the beginning of the other (it changes what it wrote before) is refused.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.loss_mask import marked_parts
from nemoe_jax.text.chat.tools import nine_character_ids, parsed_json, place
from nemoe_jax.text.tokenizers.base import MarkedPart, Tokenizer

PRIVATE_USE = range(0xF0000, 0xFFFFE)
BEGIN_ASSISTANT, END_ASSISTANT = (
    "__speak__",
    "__hush__",
)  # variables that hold the marks around a response; empty where none are wanted
Chat = Sequence[Mapping[str, Any]]


class Generation(Extension):
    """The block `{% generation %}…{% endgeneration %}`: prints its content, between the marks of a response."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        speak, hush = (
            nodes.Output([nodes.Name(name, "load")], lineno=line) for name in (BEGIN_ASSISTANT, END_ASSISTANT)
        )
        return [speak, *body, hush]


def template_parts(
    tokenizer: Tokenizer,
    messages: Chat,
    tools: Chat | None,
    generation_prompt: bool,
    continue_answer: bool,
    variables: Mapping[str, Any] | None = None,
) -> list[str | int]:
    """A chat rendered by the tokenizer's template, as texts interleaved with control ids."""
    marks, marked, marked_tools = prepare(tokenizer, messages, tools, variables)
    if continue_answer:
        if not isinstance(marked[-1].get("content"), str):
            raise UserError(f"{place(len(messages) - 1)}.content: expected a text to continue")
        marked[-1]["content"] += marks.cut + " "  # the space tells whether the template trims
    given = marks.put(variables or {})
    text = render(tokenizer, marked, marked_tools, generation_prompt and not continue_answer, **given)
    if continue_answer:
        text, found, rest = text.rpartition(marks.cut)
        if not found:
            raise UserError(f"{tokenizer.path}: its chat template leaves out the response to be continued")
        text = text if rest.startswith(" ") else text.rstrip()
    return marks.take(text)


def spoken_template_parts(tokenizer: Tokenizer, messages: Chat, tools: Chat | None) -> list[MarkedPart]:
    """A chat rendered by the tokenizer's template, each text and control id with whether the assistant says it."""
    marks, marked, marked_tools = prepare(tokenizer, messages, tools)
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [messages[at].get("weight") != 0 for at in answers]
    said = [[messages[at]] for at in answers]
    text = render(tokenizer, marked, marked_tools, False, **{BEGIN_ASSISTANT: marks.speak, END_ASSISTANT: marks.hush})
    spans = [match.span(1) for match in re.finditer(f"{marks.speak}(.*?){marks.hush}", text, re.DOTALL)]
    if not spans:
        spans = [answer_span(tokenizer, marked, marked_tools, at, text) for at in answers]
    elif len(spans) != len(answers):
        if not all(learned) or any(message.get("train_detail") for (message,) in said):
            raise UserError(
                f"{tokenizer.path}: chat template: {len(spans)} generation blocks for {len(answers)} responses"
            )
        learned, said = [True] * len(spans), [[] for _ in spans]
    parts: list[MarkedPart] = []
    end = 0
    for (start, stop), wanted, answer in zip(spans, learned, said, strict=True):
        parts += [(part, False) for part in marks.take(text[end:start])]
        parts += marked_parts(marks.take(text[start:stop]), wanted, answer)
        end = stop
    return parts + [(part, False) for part in marks.take(text[end:])]


def answer_span(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Any, at: int, text: str
) -> tuple[int, int]:
    """Where in the rendered chat the response `messages[at]` stands, up to its end token."""
    before = render(tokenizer, messages[:at], tools, True)
    after = render(tokenizer, messages[: at + 1], tools, False)
    if not (after.startswith(before) and text.startswith(after)):
        raise UserError(
            f"{tokenizer.path}: chat template: what it writes up to {place(at)} changes with what follows, so that its "
            "answers cannot be told apart for training; expected {% generation %} blocks in it"
        )
    core = after.rstrip()
    ends = core.endswith(tuple(tokenizer.control)) and len(core) > len(before)
    return len(before), len(core) if ends else len(after)  # white space after the end token belongs to the template


def prepare(
    tokenizer: Tokenizer, messages: Chat, tools: Chat | None, variables: Mapping[str, Any] | None = None
) -> tuple["Marks", list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as a template takes them (arguments of calls as objects), look-alikes marked."""
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if "[TOOL_CALLS]" in (tokenizer.template_for(bool(tools)) or ""):  # Mistral's, which refuse longer ids
        plain = nine_character_ids(plain)
    for message in plain:
        if message.get("tool_calls"):
            message["tool_calls"] = [with_parsed_arguments(call) for call in message["tool_calls"]]
    marks = Marks(tokenizer.control, [dict(tokenizer.chat_templates), plain, tools, variables])
    return marks, [{**marks.put(message), "role": message["role"]} for message in plain], marks.put(tools or None)


def with_parsed_arguments(call: Any) -> Any:
    """A tool call with its arguments as the object that their JSON text holds."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    arguments = parsed_json(function["arguments"])
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


class Marks:
    """Tells the control tokens that messages spell out from those that the template writes."""

    def __init__(self, control: Mapping[str, int], chat: Any):
        taken = set(json.dumps(chat, ensure_ascii=False, default=str))
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in taken)
        self.open, self.close, self.cut, self.speak, self.hush = (next(free) for _ in range(5))
        self.control = control
        self.prefixes = tuple({name[:end] for name in control for end in range(1, len(name))})
        self.suffixes = tuple({name[start:] for name in control for start in range(1, len(name))})
        longest_first = sorted(control, key=len, reverse=True)
        names = "|".join(map(re.escape, longest_first)) or "(?!)"  # which matches nothing
        self.spelled = re.compile(names)
        self.marked = re.compile(
            f"{self.open}({names}){self.close}|({names})|[{self.open}{self.close}{self.speak}{self.hush}]"
        )

    def put(self, value: Any) -> Any:
        """Marks what spells a control token in a text, or in the texts of a list or object."""
        if isinstance(value, Mapping):
            return {self.put_key(key): self.put(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.put(item) for item in value]
        if not isinstance(value, str):
            return value
        core = value.strip()
        begin = value.index(core) if core else 0
        before = self.open if core.startswith(self.suffixes) else ""
        after = self.close if core.endswith(self.prefixes) else ""
        core = before + self.spelled.sub(rf"{self.open}\g<0>{self.close}", core) + after
        return value[:begin] + core + value[begin + len(value.strip()) :]

    def put_key(self, key: Any) -> Any:
        """Marks the control tokens in an object's key; the quotes of JSON keep fragments of one apart."""
        return self.spelled.sub(rf"{self.open}\g<0>{self.close}", key) if isinstance(key, str) else key

    def take(self, text: str) -> list[str | int]:
        """Splits a rendered chat into texts, unmarked again, and the ids of the template's control tokens."""
        parts: list[str | int] = [""]
        at = 0
        for match in self.marked.finditer(text):
            typed, written = match.groups()
            parts[-1] = str(parts[-1]) + text[at : match.start()] + (typed or "")
            parts += [self.control[written], ""] if written else []
            at = match.end()
        parts[-1] = str(parts[-1]) + text[at:]
        return [part for part in parts if part != ""]


def render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    generation_prompt: bool,
    **variables: Any,
) -> str:
    """The template's text. Whatever fails in a template, its own `raise_exception` included, is a UserError."""
    template = tokenizer.template_for(bool(tools))
    try:
        return compiled(template or "").render(
            {
                **tokenizer.template_variables,
                "documents": None,
                **variables,
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": generation_prompt,
            }
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(f"{tokenizer.path}: chat template: {error or type(error).__name__}") from error


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """A template, ready to be rendered by several threads."""
    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's escapes of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """How a template refuses a chat."""
    raise jinja2.TemplateError(message)
