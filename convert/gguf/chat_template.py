"""Mistral's chat format as a Jinja template, for readers of GGUF files that know no other way to say it.

It renders what `nemoe_jax.chat` encodes, for chats that start with a user or system message and end in a question.
"""

from nemoe_jax.text.chat.render import NEWEST_VERSION

_TEMPLATE = """\
{{- bos_token -}}
{%- set found = namespace(system='', into=-1) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and message['content'] -%}
        {%- set found.system = found.system + message['content'] + '\\n\\n' -%}
    {%- elif message['role'] == 'user' and INTO -%}
        {%- set found.into = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set role = message['role'] -%}
    {%- set continues = not loop.first and messages[loop.index0 - 1]['role'] == role -%}
    {%- set ends = loop.last or messages[loop.index0 + 1]['role'] != role -%}
    {%- if role == 'system' -%}
        SYSTEM
    {%- elif role == 'user' -%}
        {{- '\\n\\n' if continues else 'OPEN' -}}
        {{- found.system if FOLDED and loop.index0 == found.into else '' -}}
        {{- message['content'] + ('CLOSE' if ends else '') -}}
    {%- elif role == 'assistant' -%}
        {{- ('\\n\\n' if continues else 'ANSWER') + message['content'] + (eos_token if ends else '') -}}
    {%- else -%}
        {{- raise_exception('the role ' + role + ' is not supported') -}}
    {%- endif -%}
{%- endfor -%}
"""


def mistral_template(version: str | None) -> str | None:
    """The template of a tokenizer's chat format (`v1`, `v3`, `v7`, …); None where the format is not known."""
    number = int(version[1:]) if version else 0
    if not 1 <= number <= NEWEST_VERSION:
        return None
    opens = "(loop.first or messages[loop.index0 - 1]['role'] != 'user')"  # a run of user messages is one question
    own = "{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' -}}"
    words = {
        "INTO": f"found.into < 0 and {opens}" if number == 1 else opens,
        "SYSTEM": own if number >= 7 else "",
        "FOLDED": "false" if number >= 7 else "true",
        "OPEN": "[INST] " if number == 1 else "[INST]",
        "CLOSE": " [/INST]" if number == 1 else "[/INST]",
        "ANSWER": " " if number == 1 else "",  # SentencePiece would begin an answer of its own with a space
    }
    template = _TEMPLATE
    for word, text in words.items():
        template = template.replace(word, text)
    return template
