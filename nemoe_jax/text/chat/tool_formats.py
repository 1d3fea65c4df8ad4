"""How a model's response spells the calls of tools: the form that its chat format, or its chat template, teaches.

    list    [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Graz"}}, …]            Mistral up to v7
    marked  [TOOL_CALLS]weather[ARGS]{"city": "Graz"}[TOOL_CALLS]…                         Mistral from v11 on
    tagged  <tool_call>\\n{"name": "weather", "arguments": {"city": "Graz"}}\\n</tool_call>  many chat templates

Templates that write `[TOOL_CALLS]` or `[ARGS]` have Mistral's forms. The words in brackets are control tokens, of
which no text is read; the tags are control tokens where the tokenizer has such, and text otherwise.
"""

import dataclasses

from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.render import version_number
from nemoe_jax.text.chat.tools import OLDEST_WITH_TOOLS
from nemoe_jax.text.tokenizers.base import TOOL_USE, Tokenizer
from nemoe_jax.text.tokenizers.hf_tokenizer import template_text

OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"


@dataclasses.dataclass(frozen=True)
class ToolCallFormat:
    """A form of calls; control tokens by id.

    kind: `list`, `marked` or `tagged`.
    start: what calls begin with: a control id, or the text of a tag.
    end: what a tagged call ends with, likewise.
    arguments: the id of `[ARGS]`, in marked calls.
    call_id: the id of `[CALL_ID]`, in marked calls that may have ids.
    after_text: whether a response may have both text and calls.
    """

    kind: str
    start: int | str
    end: int | str = CLOSE_TAG
    arguments: int | None = None
    call_id: int | None = None
    after_text: bool = True


def call_form(tokenizer: Tokenizer) -> ToolCallFormat | None:
    """The form of calls that a tokenizer's chat format or template has; None where it has none that is known here."""
    try:
        return known_call_form(tokenizer)
    except UserError:
        return None


def known_call_form(tokenizer: Tokenizer) -> ToolCallFormat:
    """The form of calls that a tokenizer's chat format or template has. Raises UserError where none is known here."""
    control = tokenizer.control
    if tokenizer.chat_template is None:
        number = version_number(tokenizer)
        if number < OLDEST_WITH_TOOLS:
            raise UserError(
                f"{tokenizer.path}: chat format v{number} has no tools; v{OLDEST_WITH_TOOLS} and newer have"
            )
        start = tokenizer.control_id("[TOOL_CALLS]")
        if number < 11:
            return ToolCallFormat("list", start, after_text=number >= 7)
        call_id = control.get("[CALL_ID]") if number < 13 else None
        return ToolCallFormat("marked", start, arguments=tokenizer.control_id("[ARGS]"), call_id=call_id)
    written = template_text(tokenizer.chat_templates.get(TOOL_USE) or tokenizer.chat_template)
    if "[TOOL_CALLS]" in written and "[TOOL_CALLS]" in control:
        if "[ARGS]" in written and "[ARGS]" in control:
            call_id = control.get("[CALL_ID]") if "[CALL_ID]" in written else None
            return ToolCallFormat("marked", control["[TOOL_CALLS]"], arguments=control["[ARGS]"], call_id=call_id)
        return ToolCallFormat("list", control["[TOOL_CALLS]"])
    if OPEN_TAG in written and "<function=" not in written:  # which would be another form between the same tags
        return ToolCallFormat("tagged", control.get(OPEN_TAG, OPEN_TAG), end=control.get(CLOSE_TAG, CLOSE_TAG))
    raise UserError(
        f"{tokenizer.path}: its chat template writes calls of tools in no known form "
        f"(expected [TOOL_CALLS] or {OPEN_TAG} with JSON)"
    )
