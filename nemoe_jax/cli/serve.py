"""`nemoe serve`: the OpenAI API for a model directory."""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nemoe_jax.cli import model_flags, sampling_flags
from nemoe_jax.errors import UserError
from nemoe_jax.serving.engine.request import MAX_REQUEST_BYTES
from nemoe_jax.utils.command import Command, check_numbers, rename_flags

if TYPE_CHECKING:
    from nemoe_jax.serving.api.api_keys import ApiKey
    from nemoe_jax.serving.api.served_model import ServedModel

KEY = "NEMOE_API_KEY"
DETAILS = f"""\
Any client of the OpenAI API can talk to it: give it http://127.0.0.1:8000/v1 as base URL.

  nemoe serve models/nemo &
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "nemo", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'

/v1/models, /v1/completions and /v1/chat/completions stream or not, with tools, response_format, logprobs, n, stop and
seed; top_k, min_p and repetition_penalty are extensions. /health says whether it is up, /metrics is for Prometheus,
/openapi.json describes it all. Requests join a running batch and leave it as they are done; while its queue is full,
clients get status 429 and try again. Where there is an API key (--api-key, or the environment's {KEY}), every path
but /health wants it.
Only this machine can reach it unless --host says otherwise (0.0.0.0: everybody who reaches this machine).
"""


def add(command: Command) -> None:
    """Registers `serve`."""
    parser = command.add("serve", _serve, "answer requests of the OpenAI API", DETAILS)
    parser.add_argument("directory", metavar="DIR", help="a model directory with a tokenizer")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000; 0: any free one, which is printed)")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="what requests call the model (default: the directory's name)"
    )
    parser.add_argument(
        "--lora-modules",
        metavar="NAME=DIR",
        nargs="+",
        action="extend",
        default=[],
        help="LoRA adapters in Hugging Face PEFT's form, for requests whose model is NAME; may be repeated",
    )
    parser.add_argument(
        "--adapter-folder",
        metavar="DIR",
        help="adapters are loaded from this folder, and from nowhere else, while the server runs: POST "
        "/v1/load_lora_adapter and /v1/unload_lora_adapter as in vLLM, from whoever may ask, or with a key that may; "
        "off by default",
    )
    parser.add_argument(
        "--max-loras", type=int, metavar="N", help="with --adapter-folder: adapters loaded at a time (default 4)"
    )
    parser.add_argument(
        "--max-lora-rank", type=int, metavar="R", help="with --adapter-folder: their rank at most (default 16)"
    )
    parser.add_argument(
        "--lora-targets",
        metavar="GLOB",
        nargs="+",
        help="with --adapter-folder: the weights that they may change, for which room is kept (default 'blocks/*')",
    )
    parser.add_argument(
        "--max-num-seqs", type=int, default=8, metavar="N", help="requests that run at a time (default 8)"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="every step takes all slots: a response is the same to the last bit whatever else runs, and a lone "
        "request several times slower",
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of a prompt and its response at most (default: the model's context)",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        action="append",
        default=[],
        help=f"what clients must send as bearer token; may be repeated; other users of this machine can see it: better "
        f"have it in the environment's {KEY}, several separated by commas",
    )
    parser.add_argument(
        "--api-keys-file",
        metavar="FILE",
        help="more API keys, YAML or JSON: a list of {name, key, max_requests, tokens_per_minute, priority, adapters}: "
        "responses in flight, tokens per minute, whether X-Priority is obeyed, whether adapters may be loaded",
    )
    parser.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="guess several tokens from what the prompt and the response hold, and check them at a time, where that is "
        "faster: for responses that repeat much of their prompt (not with --deterministic)",
    )
    parser.add_argument(
        "--no-prefix-cache",
        action="store_true",
        help="compute every prompt anew, also where the cache still has what it begins with",
    )
    parser.add_argument(
        "--kv-cache-tokens", type=int, metavar="N", help="size of the KV cache in tokens, of all requests together"
    )
    parser.add_argument(
        "--max-queued", type=int, default=64, metavar="N", help="requests that may wait for a slot (default 64)"
    )
    parser.add_argument("--max-tokens-limit", type=int, help="tokens of a response at most, whatever a request says")
    parser.add_argument(
        "--max-request-bytes",
        type=int,
        default=MAX_REQUEST_BYTES,
        help=f"a request's size at most (default {MAX_REQUEST_BYTES:,})",
    )
    parser.add_argument(
        "--drain-seconds", type=int, default=30, help="how long responses may take to end at SIGTERM (default 30)"
    )
    sampling_flags.add_preset_flag(parser, default="nemo")
    parser.add_argument("--log-requests", action="store_true", help="a line on standard error for each request")
    model_flags.add_model_flags(parser)
    parser.add_argument(
        "--tensor-parallel-size", type=int, metavar="N", help="the same as --mesh tensor=N: the model over N devices"
    )
    model_flags.add_cache_flag(parser)
    model_flags.add_generation_config_flag(parser)
    rename_flags(
        parser,
        {
            "--name": "--served-model-name",
            "--adapter": "--lora-modules",
            "--rows": "--max-num-seqs",
            "--kv-tokens": "--kv-cache-tokens",
            "--queue": "--max-queued",
        },
    )


def _serve(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    adapters, keys = _check(arguments), _api_keys(arguments)
    from nemoe_jax.serving.api.app import create_app
    from nemoe_jax.serving.api.http_server import HttpServer, bind, url

    with bind(arguments.host, arguments.port) as bound:
        served = _load(arguments, adapters)
        server = HttpServer(arguments.drain_seconds, abort=lambda: served.engine.close(drain=False))
        try:
            _warm_up(served, started)
            app = create_app(
                served,
                api_key=keys,
                max_request_bytes=arguments.max_request_bytes,
                log_requests=arguments.log_requests,
                closing=lambda: server.closing,
            )
            _say(f"ready: {', '.join([served.name, *served.adapters])} at {url(bound)}/v1")
            server.serve_app(app, bound)
        except BaseException:
            served.engine.close(drain=False)
            served.engine.programs.wait()  # the interpreter does not end well while a program is being compiled
            raise
    served.engine.close(drain=False)
    if not served.engine.programs.wait(0):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # compiling takes minutes, and cannot be interrupted


def _check(arguments: argparse.Namespace) -> dict[str, str]:
    """The adapters by name. Raises UserError on flags that make no sense, before anything is loaded."""
    check_numbers(
        arguments,
        "max_num_seqs",
        "max_model_len",
        "tensor_parallel_size",
        "kv_cache_tokens",
        "max_queued",
        "max_tokens_limit",
        "max_request_bytes",
        "drain_seconds",
        "max_loras",
        "max_lora_rank",
    )
    for flag in ("max_loras", "max_lora_rank", "lora_targets"):
        if getattr(arguments, flag) is not None and arguments.adapter_folder is None:
            raise UserError(f"--{flag.replace('_', '-')}: only together with --adapter-folder")
    if arguments.adapter_folder is not None and not Path(arguments.adapter_folder).is_dir():
        raise UserError(f"--adapter-folder {arguments.adapter_folder}: no such directory")
    if arguments.tensor_parallel_size is not None:
        if arguments.mesh:
            raise UserError("--tensor-parallel-size: not together with --mesh")
        arguments.mesh = f"tensor={arguments.tensor_parallel_size}"
    if arguments.prompt_lookup and arguments.deterministic:
        raise UserError("--prompt-lookup: not together with --deterministic")
    if not 0 <= arguments.port < 2**16:
        raise UserError(f"--port: expected 0 to 65535, got {arguments.port}")
    name_of_model = arguments.served_model_name or model_flags.name_of(arguments.directory)
    arguments.served_model_name = name_of_model
    adapters: dict[str, str] = {}
    for word in arguments.lora_modules:
        name, _, directory = word.partition("=")
        if not name or not directory:
            raise UserError(f"--lora-modules: expected NAME=DIR, got {word!r}")
        if name in adapters or name == name_of_model:
            raise UserError(f"--lora-modules {word}: the name {name} is taken")
        adapters[name] = directory
    return adapters


def _api_keys(arguments: argparse.Namespace) -> "list[str | ApiKey]":
    """All keys. Raises UserError."""
    given = [*arguments.api_key, *os.environ.get(KEY, "").split(",")]
    keys: list[str | ApiKey] = [key.strip() for key in given if key.strip()]
    if arguments.api_keys_file:
        from nemoe_jax.serving.api.api_keys import read_api_keys

        for key in read_api_keys(arguments.api_keys_file):
            if key.key in keys:
                raise UserError(f"{arguments.api_keys_file}: {key.name}: --api-key or {KEY} has the same key")
            keys.append(key)
    return keys


def _load(arguments: argparse.Namespace, adapters: dict[str, str]) -> "ServedModel":
    from nemoe_jax.adapters import peft_load
    from nemoe_jax.adapters.loaded import AdapterPlaces
    from nemoe_jax.checkpoints.reader import Checkpoint
    from nemoe_jax.serving.api.served_model import ServedModel
    from nemoe_jax.serving.engine.engine import Engine
    from nemoe_jax.text.tokenizers.load import load_tokenizer

    tokenizer, generation = load_tokenizer(arguments.directory), model_flags.generation_config(arguments)
    checkpoint = Checkpoint(arguments.directory)
    for path in adapters.values():  # before the weights are loaded
        peft_load.read_targets(path, checkpoint.config)
    _say(f"loading {arguments.directory}")
    config, params, mesh = model_flags.load_model_from_args(arguments, checkpoint)
    config = generation.with_end_tokens(config)
    trees = {name: peft_load.load_adapters(path, config, mesh, progress=True)[1] for name, path in adapters.items()}
    places = None
    if arguments.adapter_folder is not None:
        given = {"number": arguments.max_loras, "rank": arguments.max_lora_rank, "targets": arguments.lora_targets}
        places = AdapterPlaces(**{name: value for name, value in given.items() if value is not None})
    engine = Engine(
        config,
        params,
        tokenizer,
        max_num_seqs=arguments.max_num_seqs,
        kv_tokens=arguments.kv_cache_tokens,
        max_queued=arguments.max_queued,
        max_model_len=arguments.max_model_len,
        mesh=mesh,
        cache_dtype=arguments.kv_cache,
        adapters=trees or None,
        adapter_places=places,
        deterministic=arguments.deterministic,
        prompt_lookup=arguments.prompt_lookup,
        prefix_cache=not arguments.no_prefix_cache,
    )
    return ServedModel(
        engine,
        config,
        tokenizer,
        arguments.served_model_name,
        None if arguments.adapter_folder is None else Path(arguments.adapter_folder),
        sampling_flags.from_flags(arguments, generation),
        arguments.max_tokens_limit,
        arguments.max_num_seqs + arguments.max_queued,
    )


def _warm_up(served: "ServedModel", started: float) -> None:
    """Compiles what the first request needs; a thread goes on with the rest.

    Raises:
        UserError: the model cannot respond.
    """
    from nemoe_jax.serving.engine.request import Request
    from nemoe_jax.serving.structured.grammar import json_object

    constraints = False
    with contextlib.suppress(UserError):  # a tokenizer that no grammar can be made of
        json_object(served.builder.vocabulary)
        constraints = True
    compiled = served.engine.programs.seconds
    first: list[str] = []

    def done() -> None:
        rest = [name for name in list(compiled) if name not in first]
        _say(f"compiled {len(rest)} more programs in {sum(map(compiled.__getitem__, rest)):.1f} s: {', '.join(rest)}")

    served.engine.compile(constraints, at_once=False, done=done)
    first += served.engine.programs.first
    seconds = sum(map(compiled.__getitem__, first))
    left = served.engine.programs.left
    _say(f"compiled {len(first)} programs in {seconds:.1f} s: {', '.join(first)}; {left} others follow while it serves")
    for output in served.engine.submit(Request((served.tokenizer.bos_id or 0,), 1)):
        if output.error:
            raise UserError(f"the model cannot answer: {output.error}")
    _say(f"first token {time.monotonic() - started:.1f} s after the start")


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
