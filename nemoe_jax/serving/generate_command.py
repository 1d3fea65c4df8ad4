"""`nemoe generate`: continues a text or answers a chat."""

import argparse
import sys
import time

from nemoe_jax import running
from nemoe_jax.command import Command, report
from nemoe_jax.errors import UserError


def add(command: Command) -> None:
    """Registers `generate`."""
    parser = command.add("generate", _generate, "continue a prompt, streaming the text", reports=True)
    parser.add_argument("directory", metavar="DIR", help="a model directory with a tokenizer")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument(
        "--chat", metavar="FILE", help="JSON list of messages to answer, or an object of messages and tools"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to generate at most (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy (default); NeMo's makers advise 0.3"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest (0 to 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    running.add_model_flags(parser)
    running.add_cache_flag(parser)


def _generate(arguments: argparse.Namespace) -> None:
    from nemoe_jax import chat
    from nemoe_jax.generate import Sampling, generate
    from nemoe_jax.tokenizer import StreamDecoder, load_tokenizer

    sampling = Sampling(arguments.temperature, arguments.min_p, arguments.seed)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: wanted a positive number, got {arguments.max_new_tokens}")
    tokenizer = load_tokenizer(arguments.directory)
    if arguments.chat is not None:
        messages, tools = chat.read_messages(arguments.chat), chat.read_tools(arguments.chat)
        prompt = chat.render_chat(tokenizer, messages, tools=tools)
    else:
        prompt = tokenizer.encode(arguments.prompt, bos=True)
    config, params, mesh = running.load(arguments)
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    stop = {token for token in (tokenizer.eos_id, *ends) if token is not None}

    decoder = StreamDecoder(tokenizer)
    text, tokens, first_token_at = "", [], 0.0
    started = time.monotonic()
    made = generate(
        config, params, [prompt], arguments.max_new_tokens, sampling, sorted(stop), mesh, arguments.kv_cache
    )
    for (token,) in made:
        first_token_at = first_token_at or time.monotonic()
        if int(token) in stop:
            break
        tokens.append(int(token))
        piece = decoder.push(token)
        text += piece
        if not arguments.json:
            print(piece, end="", flush=True)
    finished = time.monotonic()
    text += (rest := decoder.flush())
    if arguments.json:
        figures = {"text": text, "tokens": tokens, "prompt_tokens": len(prompt)}
        report({**figures, "prefill_seconds": first_token_at - started, "seconds": finished - started}, True)
        return
    print(rest)
    if len(tokens) > 1:
        rate = (len(tokens) - 1) / (finished - first_token_at)
        print(f"{len(tokens)} tokens, {rate:.1f} tokens/s after the first", file=sys.stderr)
