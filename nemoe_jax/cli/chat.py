"""`nemoe chat`: a conversation with a model in the terminal, or through a pipe."""

import argparse
import random
import sys
from pathlib import Path

from nemoe_jax.cli import model_flags, sampling_flags
from nemoe_jax.cli.model_flags import add_engine_flags, engine_from_args, generation_config
from nemoe_jax.errors import UserError
from nemoe_jax.utils.command import Command, check_numbers

DETAILS = """\
In the chat, /help shows what can be done. Where standard input is no terminal, each of its lines is a message; the
responses go to standard output and all else to standard error.
"""
CONTEXT = 16384


def add(command: Command) -> None:
    """Registers `chat`."""
    parser = command.add("chat", _chat, "talk to a model in the terminal", DETAILS)
    parser.add_argument("directory", metavar="DIR", help="a model directory with a tokenizer and a chat format")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--load", metavar="FILE.json", help="go on with the messages of a file (of /save)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="tokens of a response at most (default 1024)")
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help=f"how much of the chat the model sees; the memory grows with it (default {CONTEXT}, or the model's "
        "context if that is less)",
    )
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="text that ends a response; may be repeated"
    )
    sampling_flags.add_flags(parser, default="nemo")
    add_engine_flags(parser)


def _chat(arguments: argparse.Namespace) -> None:
    from nemoe_jax.checkpoints.reader import Checkpoint
    from nemoe_jax.serving.engine.request import Request
    from nemoe_jax.serving.request_builder import RequestBuilder
    from nemoe_jax.serving.terminal import repl
    from nemoe_jax.serving.terminal.conversation import Conversation
    from nemoe_jax.serving.terminal.session import Session
    from nemoe_jax.serving.terminal.slash_commands import COMMANDS
    from nemoe_jax.serving.terminal.terminal import PipeIO, TerminalIO
    from nemoe_jax.text.chat import render
    from nemoe_jax.text.tokenizers.load import load_tokenizer

    check_numbers(arguments, "max_new_tokens")
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(2**31)
    generation = generation_config(arguments)
    template = Request(
        prompt=(),
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling_flags.from_flags(arguments, generation),
        stop=tuple(arguments.stop),
        adapter=arguments.adapter,
    )
    checkpoint = Checkpoint(arguments.directory)
    config = generation.with_end_tokens(checkpoint.config)
    context = min(CONTEXT, config.context) if arguments.context is None else arguments.context
    if not 1 < context <= config.context:
        raise UserError(f"--context: expected 2 to the model's {config.context}, got {context}")
    template.sampling.check(config.vocab)
    tokenizer = load_tokenizer(arguments.directory)
    try:
        render.render_chat(tokenizer, [{"role": "user", "content": "Hello"}])
    except UserError as error:
        raise UserError(f"{error}; nemoe generate continues plain text") from error
    builder, conversation = RequestBuilder(config, tokenizer), Conversation(tokenizer, context)
    if arguments.load:
        conversation.load(Path(arguments.load))
    if arguments.system is not None:
        conversation.system = arguments.system

    preset = arguments.sampling_preset or (None if generation.sampling else arguments.default_preset)
    with engine_from_args(arguments, checkpoint, tokenizer, generation, max_num_seqs=1, kv_tokens=context) as engine:
        session = Session(conversation, engine, builder, template, preset)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            repl.run(session, PipeIO())
            return
        # compiles while the first message is typed
        engine.submit(Request((1, 1), 1, template.sampling), lambda piece: None)
        name = model_flags.name_of(arguments.directory)
        terminal = TerminalIO([f"/{command}" for command in COMMANDS], lambda: f"{name} · {session.status()}")
        terminal.note(f"{name}: {config.family}, {context} tokens of context. /help shows the commands, Ctrl-D ends.")
        repl.run(session, terminal)
