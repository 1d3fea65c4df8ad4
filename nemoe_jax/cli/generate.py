"""`nemoe generate`: continues a text, answers a chat, or works through a file of them."""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemoe_jax.cli import sampling_flags
from nemoe_jax.cli.model_flags import add_engine_flags, engine_from_args, generation_config
from nemoe_jax.errors import UserError
from nemoe_jax.utils.command import Command, check_numbers, print_figures, read_text, rename_flags

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from nemoe_jax.serving.engine.engine import Engine
    from nemoe_jax.serving.engine.request import Request
    from nemoe_jax.serving.request_builder import RequestBuilder

DETAILS = """\
A batch is a file of JSON lines, each {"prompt": …} or {"messages": […], "tools": […]}; a line may have an "id", and
fields of its own: "preset", "temperature" and the like, "max_new_tokens", "stop", "logprobs", "tool_choice", "schema".
The responses come in the same order, a line each. Lines that OUT.jsonl holds already are not done again.
"""


def add(command: Command) -> None:
    """Registers `generate`."""
    parser = command.add(
        "generate", _generate, "continue a prompt or answer a chat, streaming the text", DETAILS, reports=True
    )
    parser.add_argument("directory", metavar="DIR", help="a model directory with a tokenizer")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("input", nargs="?", choices=("-",), metavar="-", help="continue the text of standard input")
    source.add_argument("--prompt", metavar="TEXT", help="text to continue")
    source.add_argument("--file", help="file of the text to continue (without the line end at its end)")
    source.add_argument(
        "--chat", metavar="FILE", help="JSON list of messages to answer, or an object of messages and tools"
    )
    source.add_argument("--batch", metavar="IN.jsonl", help="many prompts and chats (- is standard input)")
    parser.add_argument("--output", metavar="OUT.jsonl", help="where a batch's responses go (- is standard output)")
    parser.add_argument(
        "--max-num-seqs", type=int, default=8, metavar="N", help="requests of a batch that run together (default 8)"
    )
    rename_flags(parser, {"--rows": "--max-num-seqs"})
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to generate at most (default 128)")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="string that ends the response; may be repeated"
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probabilities of the tokens and of the N likeliest, in the JSON"
    )
    parser.add_argument(
        "--tool-choice", metavar="auto|none|required|NAME", help="whether to call the chat's tools (default auto)"
    )
    parser.add_argument("--schema", metavar="FILE.json", help="a JSON schema: the response is JSON that it describes")
    sampling_flags.add_flags(parser)
    add_engine_flags(parser)


def _generate(arguments: argparse.Namespace) -> None:
    from nemoe_jax.checkpoints.reader import Checkpoint
    from nemoe_jax.cli import batch
    from nemoe_jax.serving.engine.request import Request
    from nemoe_jax.serving.request_builder import RequestBuilder
    from nemoe_jax.text.tokenizers.load import load_tokenizer

    _check(arguments)
    generation = generation_config(arguments)
    template = Request(
        prompt=(),
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling_flags.from_flags(arguments, generation),
        stop=tuple(arguments.stop),
        top_logprobs=arguments.logprobs,
        adapter=arguments.adapter,
    )
    checkpoint = Checkpoint(arguments.directory)
    builder = RequestBuilder(generation.with_end_tokens(checkpoint.config), load_tokenizer(arguments.directory))
    start = functools.partial(engine_from_args, arguments, checkpoint, builder.tokenizer, generation)
    if arguments.batch is not None:
        batch.run(arguments, builder, template, start)
    else:
        _respond(arguments, builder, template, start)


def _check(arguments: argparse.Namespace) -> None:
    check_numbers(arguments, "max_new_tokens", "max_num_seqs")
    check_numbers(arguments, "logprobs", least=0)
    if (arguments.batch is None) != (arguments.output is None):
        raise UserError("--batch IN.jsonl and --output OUT.jsonl go together (- is standard input and output)")
    if arguments.tool_choice is not None and arguments.chat is None:
        raise UserError("--tool-choice: needs --chat (a batch's lines have their own)")
    if arguments.schema is not None and arguments.batch is not None:
        raise UserError("--schema: not with --batch (its lines have their own)")
    if arguments.logprobs is not None and not arguments.json and arguments.batch is None:
        raise UserError("--logprobs: needs --json or --batch, which can show them")


def _respond(
    arguments: argparse.Namespace,
    builder: "RequestBuilder",
    template: "Request",
    start: "Callable[..., AbstractContextManager[Engine]]",
) -> None:
    """Shows one response as it comes."""
    from nemoe_jax.serving.engine.completion import collect, shown
    from nemoe_jax.text.chat import render

    if arguments.chat is not None:
        messages, tools = render.read_messages(arguments.chat), render.read_tools(arguments.chat)
        request = builder.of_chat(template, messages, tools, _tool_choice(arguments.tool_choice), _schema(arguments))
    else:
        tools, text = None, arguments.prompt
        if text is None:
            text = read_text(arguments.input or arguments.file).removesuffix("\n").removesuffix("\r")
        request = builder.of_text(template, text, _schema(arguments))
    prompt_tokens = len(request.prompt)
    show = (lambda text: None) if arguments.json else shown
    parser = builder.parser(tools) if tools else None
    with start(max_num_seqs=1, kv_tokens=prompt_tokens + template.max_new_tokens) as engine:
        completion = collect(engine.submit(request), builder.end_tokens, show, parser)
    if arguments.json:
        figures = completion.figures(builder.tokenizer, prompt_tokens, template.top_logprobs is not None)
        print_figures({**figures, "prefill_seconds": completion.prefill_seconds, "seconds": completion.seconds}, True)
        return
    print()
    for call in completion.parsed.calls if completion.parsed else ():
        print(json.dumps(call.as_message(), ensure_ascii=False))
    for warning in completion.parsed.warnings if completion.parsed else ():
        print(f"warning: {warning}", file=sys.stderr)
    rate = "" if completion.rate is None else f", {completion.rate:.1f} tokens/s"
    print(f"{len(completion.tokens)} tokens in {completion.seconds:.1f} s{rate}", file=sys.stderr)


def _tool_choice(words: str | None) -> Any:
    """OpenAI's form of it: what is no mode is a function's name."""
    if words in (None, "none", "auto", "required"):
        return words
    return {"type": "function", "function": {"name": words}}


def _schema(arguments: argparse.Namespace) -> Any:
    from nemoe_jax.utils.json_file import read_json

    return None if arguments.schema is None else read_json(Path(arguments.schema))
