"""Chat templates of Hugging Face directories, rendered by jinja2 in a sandbox as transformers does.

A template pastes control tokens and user text into one string, where a `</s>` that the user typed looks like the
template's own. So before rendering, every control token spelled out in a message is put between two marks,
private-use characters that occur nowhere in the chat; a message that ends or begins with a fragment of one (`<`,
`/s>`) gets a single mark, so that two neighbours cannot form one. After rendering, an unmarked control token is the
template's and becomes its id; the marks disappear and what they enclosed is text. The text itself stays in the
message, so templates that trim, split or search contents work as ever, and without look-alikes the ids are those of
transformers' `apply_chat_template`.
"""

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
from nemoe_jax.tokenizer_base import Tokenizer

PRIVATE_USE = range(0xF0000, 0xFFFFE)


class Generation(Extension):
    """The block `{% generation %}…{% endgeneration %}` that marks answers for training; here it prints its content."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_parts(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], generation_prompt: bool, continue_answer: bool
) -> list[str | int]:
    """A chat rendered by the tokenizer's template, as texts interleaved with control ids."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    marks = Marks(tokenizer.control, [tokenizer.chat_template, messages])
    marked = [{**marks.put(message), "role": message["role"]} for message in messages]
    if continue_answer:
        if not isinstance(messages[-1].get("content"), str):
            raise UserError(f"messages[{len(messages) - 1}]: content: wanted a text to continue")
        marked[-1]["content"] += marks.cut + " "  # the space tells whether the template trims
    text = render(tokenizer, marked, generation_prompt and not continue_answer)
    if continue_answer:
        text, found, rest = text.rpartition(marks.cut)
        if not found:
            raise UserError(f"{tokenizer.path}: its chat template leaves out the answer to be continued")
        text = text if rest.startswith(" ") else text.rstrip()
    return marks.take(text)


class Marks:
    """Tells the control tokens that messages spell out from those that the template writes."""

    def __init__(self, control: Mapping[str, int], chat: Any):
        taken = set(json.dumps(chat, ensure_ascii=False, default=str))
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in taken)
        self.open, self.close, self.cut = next(free), next(free), next(free)
        self.control = control
        self.prefixes = tuple({name[:end] for name in control for end in range(1, len(name))})
        self.suffixes = tuple({name[start:] for name in control for start in range(1, len(name))})
        longest_first = sorted(control, key=len, reverse=True)
        names = "|".join(map(re.escape, longest_first)) or "(?!)"  # which matches nothing
        self.spelled = re.compile(names)
        self.marked = re.compile(f"{self.open}({names}){self.close}|({names})|[{self.open}{self.close}]")

    def put(self, value: Any) -> Any:
        """Marks what spells a control token in a text, or in the texts of a list or object."""
        if isinstance(value, Mapping):
            return {key: self.put(item) for key, item in value.items()}
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


def render(tokenizer: Tokenizer, messages: list[dict[str, Any]], generation_prompt: bool) -> str:
    """The template's text. Whatever fails in a template, its own `raise_exception` included, is a UserError."""
    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(tokenizer.chat_template or "").render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=generation_prompt,
            **tokenizer.template_variables,
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(f"{tokenizer.path}: chat template: {error or type(error).__name__}") from error


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
