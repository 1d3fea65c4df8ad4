"""The command `nemoe`: looks into models, tokenises, runs and scores them."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemoe_jax import chat, checkpoint, hf, sharding
from nemoe_jax.command import Command, report
from nemoe_jax.config import PRESETS, preset
from nemoe_jax.describe import describe, print_description
from nemoe_jax.errors import UserError
from nemoe_jax.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, text_from_bytes

DESCRIPTION = """\
Looks into Hugging Face model directories of the NeMo family (Mistral, Llama, Mixtral, NekoMind) and runs them.

Three commands share one kind of file, the Hugging Face model directory:
  nemoe-convert carve DENSE MOE          takes a dense model apart into experts
  nemoe-train run RECIPE model=MOE …     repairs or fine-tunes it (LoRA, distillation), or trains from scratch
  nemoe generate MOE --prompt "…"        runs it; this command also inspects, scores and tokenises
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    command = Command("nemoe", DESCRIPTION)
    mesh_help = (
        "devices as axes, such as fsdp=4,expert=2 (axes: data, fsdp, expert, tensor, sequence); default: one device"
    )

    parser = command.add(
        "inspect",
        _inspect,
        "show every array of a model: shape, dtype, axes, sharding, bytes",
        f"Presets: {', '.join(PRESETS)}. No weights are read; --mesh needs no devices.",
        reports=True,
    )
    parser.add_argument("model", metavar="PRESET|DIR", help="a preset's name or a model directory")
    parser.add_argument("--mesh", help="show the sharding on a mesh, such as fsdp=4,expert=4")

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
    parser.add_argument(
        "--kv-cache",
        metavar="DTYPE",
        help="how keys and values are kept: float32, bfloat16, or in 8 bits, float8_e4m3fn (what TPUs read fastest) or "
        "int8 (with scales, more exact); by default as the weights are",
    )
    _add_running(parser, mesh_help)

    parser = command.add(
        "logits",
        _logits,
        "write the logits of a token sequence, to compare with anything else",
        "The file holds float32 of shape (tokens, vocabulary).",
    )
    parser.add_argument("directory", metavar="DIR", help="a model directory")
    parser.add_argument("--tokens", required=True, metavar="1,2,3", help="token ids, separated by commas")
    parser.add_argument("--out", required=True, metavar="FILE.npy", help="where to write them, a NumPy file")
    _add_running(parser, mesh_help)

    parser = command.add(
        "perplexity",
        _perplexity,
        "loss and perplexity on text, and how evenly the experts are used",
        "Text is cut into evenly spaced windows; every token after a window's first is scored.",
        reports=True,
    )
    parser.add_argument("directory", metavar="DIR", help="a model directory with a tokenizer")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="text or .jsonl files, directories or globs")
    parser.add_argument(
        "--sequence-length", type=int, help="tokens scored in a window (default 256, or the context if less)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="windows computed together (default 8)")
    parser.add_argument("--batches", type=int, default=16, help="batches at most (default 16)")
    _add_running(parser, mesh_help)

    parser = command.add(
        "tokenize",
        _tokenize,
        "print the token ids of text as a JSON list",
        "Control tokens that the text spells out, such as [INST], stay plain text.",
    )
    parser.add_argument(
        "tokenizer", metavar="DIR|FILE", help="a model directory, tekken.json, tokenizer.json or tokenizer.model"
    )
    parser.add_argument(
        "file", nargs="?", default="-", metavar="FILE|-", help="text to tokenise (default: standard input)"
    )
    parser.add_argument(
        "--chat", metavar="FILE", help="tokenise a JSON list of messages in the model's chat format instead"
    )
    parser.add_argument("--pieces", action="store_true", help="print the text of each token instead of its id")
    return command.main(argv)


def _add_running(parser: argparse.ArgumentParser, mesh_help: str) -> None:
    parser.add_argument("--mesh", help=mesh_help)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="dtype to compute in (default: the weights' own)"
    )


def _chat_ids(tokenizer: Tokenizer, path: str) -> list[int]:
    return chat.render_chat(tokenizer, chat.read_messages(path), tools=chat.read_tools(path))


def _load(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(config, params, mesh) of a command that runs a model."""
    mesh = sharding.make_mesh(sharding.parse_mesh(arguments.mesh)) if arguments.mesh else None
    config, params = hf.load(arguments.directory, mesh=mesh, dtype=arguments.dtype, progress=True)
    return config, params, mesh


def _inspect(arguments: argparse.Namespace) -> None:
    is_directory = Path(arguments.model).is_dir()
    config = checkpoint.read_config(arguments.model) if is_directory else preset(arguments.model)
    description = describe(config, sharding.parse_mesh(arguments.mesh) if arguments.mesh else {})
    if arguments.json:
        print(json.dumps(description))
    else:
        print_description(arguments.model, description)


def _generate(arguments: argparse.Namespace) -> None:
    from nemoe_jax.generate import Sampling, generate

    sampling = Sampling(arguments.temperature, arguments.min_p, arguments.seed)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: wanted a positive number, got {arguments.max_new_tokens}")
    tokenizer = load_tokenizer(arguments.directory)
    chatting = arguments.chat is not None
    prompt = _chat_ids(tokenizer, arguments.chat) if chatting else tokenizer.encode(arguments.prompt, bos=True)
    config, params, mesh = _load(arguments)
    stop = {tokenizer.eos_id} if tokenizer.eos_id is not None else set()
    stop |= set(config.eos_token_id if isinstance(config.eos_token_id, tuple) else [config.eos_token_id]) - {None}

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


def _logits(arguments: argparse.Namespace) -> None:
    import jax

    from nemoe_jax.transformer import forward

    try:
        tokens = np.array([[int(token) for token in arguments.tokens.split(",")]], np.int32)
    except ValueError as error:
        raise UserError(f"--tokens: wanted numbers separated by commas, got {arguments.tokens!r}") from error
    config = checkpoint.read_config(arguments.directory)
    if tokens.min() < 0 or tokens.max() >= config.vocab:
        raise UserError(f"--tokens: wanted ids from 0 to {config.vocab - 1}, got {arguments.tokens}")
    if tokens.shape[1] > config.context:
        raise UserError(f"--tokens: {tokens.shape[1]} tokens exceed the context of {config.context}")
    _, params, mesh = _load(arguments)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        logits = jax.jit(lambda params, tokens: forward(config, params, tokens).logits)(params, tokens)
    _write_array(Path(arguments.out), np.asarray(logits[0]))
    print(f"{arguments.out}: float32 {logits.shape[1]} × {logits.shape[2]}")


def _write_array(path: Path, array: np.ndarray) -> None:
    """Whole or not at all, under the very name that was asked for."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: {error.strerror}") from error


def _perplexity(arguments: argparse.Namespace) -> None:
    from nemoe_jax.evaluate import evaluate
    from nemoe_jax.text import find_files, spaced_batches, tokenize

    config = checkpoint.read_config(arguments.directory)
    length = min(256, config.context) if arguments.sequence_length is None else arguments.sequence_length
    if not 1 <= length <= config.context:
        raise UserError(f"--sequence-length: wanted 1 to the context of {config.context}, got {length}")
    for name in ("batch_size", "batches"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: wanted a positive number, got {getattr(arguments, name)}")
    stream = tokenize(find_files(arguments.texts), load_tokenizer(arguments.directory), vocab=config.vocab)
    batches = spaced_batches(stream, length, arguments.batch_size, arguments.batches)
    _, params, mesh = _load(arguments)
    result = evaluate(config, params, batches, mesh)
    figures: dict[str, Any] = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "seconds": result.seconds,
    }
    if result.load_LE is not None:
        figures["load_max_over_mean"] = result.load_max_over_mean
        if arguments.json:
            figures["expert_load"] = result.load_LE.tolist()
    report(figures, arguments.json)


def _tokenize(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.tokenizer)
    if arguments.chat:
        ids = _chat_ids(tokenizer, arguments.chat)
    else:
        try:
            data = sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file).read_bytes()
        except OSError as error:
            raise UserError(f"{arguments.file}: {error.strerror}") from error
        ids = tokenizer.encode(text_from_bytes(data))
    print(json.dumps([tokenizer.piece(token) for token in ids] if arguments.pieces else ids, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
