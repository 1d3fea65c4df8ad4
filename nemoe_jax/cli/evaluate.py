"""`nemoe perplexity`: loss and perplexity of a model on text; `nemoe eval`: its scores in benchmarks."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemoe_jax.cli import model_flags
from nemoe_jax.errors import UserError
from nemoe_jax.utils.command import EXIT_BAD_INPUT, Command, check_numbers, print_figures

if TYPE_CHECKING:
    from nemoe_jax.evaluation.perplexity import PerplexityResult

BATCHES = 16
DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)


def add(command: Command) -> None:
    """Registers `perplexity` and `eval`."""
    parser = command.add(
        "perplexity",
        _perplexity,
        "loss and perplexity on text, and how evenly the experts are used",
        """\
Text is cut into evenly spaced windows; every token after a window's first is scored. accuracy is the share of tokens
that the model finds likeliest; loss_unigram is the loss of a model that knows nothing but how often each token comes:
a model above it is destroyed. With --reference, the dense model of a carved one, say, the report tells what was lost:
loss_above_reference and kl_divergence (of the reference's next token from the model's) in nats, and argmax_agreement,
the share of tokens after which both find the same one likeliest. --also measures more models on the same text, each
when the one before it has left the memory; with --json a line for each.
With --window, windows slide over the whole text, and each token is scored once with much before it.
With --needle, the text is the haystack: a line that tells a number is inserted, and its end asks for the number.""",
        reports=True,
    )
    parser.add_argument("directory", metavar="DIR", help="a model directory with a tokenizer")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="text or .jsonl files, directories or globs")
    parser.add_argument(
        "--sequence-length", type=int, help="tokens scored in a window (default 256, or the context if less)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="windows computed together (default 8)")
    parser.add_argument(
        "--batches", type=int, help=f"batches at most (default {BATCHES}; with --window the whole text)"
    )
    parser.add_argument("--window", type=int, metavar="TOKENS", help="slide windows of so many tokens over the text")
    parser.add_argument(
        "--stride", type=int, metavar="TOKENS", help="how far the window moves each time (default half of it)"
    )
    parser.add_argument(
        "--reference", metavar="DIR", help="a model of the same vocabulary to compare with, as the dense one of a carve"
    )
    parser.add_argument(
        "--also", nargs="+", metavar="DIR", help="more models to measure, of the same vocabulary and tokenizer"
    )
    parser.add_argument("--needle", action="store_true", help="look for an inserted line instead of scoring the text")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="with --needle: lengths of the text (default a quarter, a half and all of the context)",
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        metavar="PERCENT",
        help=f"with --needle: where the line is inserted (default {' '.join(f'{depth:g}' for depth in DEPTHS)})",
    )
    parser.add_argument("--seed", type=int, help="with --needle: of the numbers (default 0)")
    model_flags.add_cache_flag(parser)
    model_flags.add_model_flags(parser)

    parser = command.add(
        "eval",
        _eval,
        "benchmarks of EleutherAI's lm-evaluation-harness, beside published results",
        """\
The suite `nemo` is that of Mistral NeMo's announcement. Their data come from the Hugging Face hub or its cache; set
HF_HUB_OFFLINE=1 where there is no network. Needs nemoe-jax[eval].""",
        reports=True,
    )
    parser.add_argument("directory", metavar="DIR", help="a model directory with a tokenizer")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="names of the harness's tasks or groups")
    what.add_argument("--suite", choices=("nemo",), help="tasks and numbers of shots of an announcement")
    parser.add_argument("--include-path", metavar="DIR", help="a directory with task files (YAML) of your own")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question of --tasks")
    parser.add_argument("--limit", type=float, metavar="N", help="only so many questions of a task; below 1, a share")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences computed together (default 8)")
    parser.add_argument("--apply-chat-template", action="store_true", help="put questions as chats")
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        help="keep results here after each task; those that it has of the same weights and tasks are not run again",
    )
    model_flags.add_cache_flag(parser)
    model_flags.add_model_flags(parser)


def _perplexity(arguments: argparse.Namespace) -> None:
    _check_flags(arguments)
    if arguments.needle:
        _needle(arguments)
        return
    from nemoe_jax.checkpoints.reader import Checkpoint
    from nemoe_jax.evaluation.perplexity import check_window, evaluate, reference_predictions, sliding_loss
    from nemoe_jax.text.corpus import spaced_batches, tokenize_corpus
    from nemoe_jax.text.tokenizers.load import load_tokenizer

    checkpoints = [Checkpoint(directory) for directory in (arguments.directory, *(arguments.also or ()))]
    reference = Checkpoint(arguments.reference) if arguments.reference else None
    vocab = checkpoints[0].config.vocab
    for other in (*checkpoints[1:], *([reference] if reference else [])):
        if other.config.vocab != vocab:
            raise UserError(
                f"{other.path}: expected {arguments.directory}'s vocabulary of {vocab}, got {other.config.vocab}"
            )
    context = min(checkpoint.config.context for checkpoint in checkpoints)
    length = min(256, context) if arguments.sequence_length is None else arguments.sequence_length
    if not 1 <= length <= context:
        raise UserError(f"--sequence-length: expected 1 to the context of {context}, got {length}")
    window, batches = arguments.window, arguments.batches
    stride = window // 2 if window and arguments.stride is None else arguments.stride
    if window is not None:
        check_window(window, stride, context)
    stream = tokenize_corpus(arguments.texts, load_tokenizer(arguments.directory), vocab=vocab)
    spaced, compared = [], None
    if window is None:
        spaced = spaced_batches(stream, length, arguments.batch_size, BATCHES if batches is None else batches)
    if reference:
        dtype = None if arguments.dtype in ("fp8", "nf4") else arguments.dtype  # the reference is as it is
        as_it_is = argparse.Namespace(**vars(arguments) | {"dtype": dtype})
        config, params, mesh = model_flags.load_model_from_args(as_it_is, reference)
        compared = reference_predictions(config, params, spaced, mesh)
        del params
    windows = None if batches is None else batches * arguments.batch_size
    for checkpoint in checkpoints:
        config, params, mesh = model_flags.load_model_from_args(arguments, checkpoint)
        if window is None:
            result = evaluate(config, params, spaced, mesh, reference=compared, corpus=stream)
        else:
            result = sliding_loss(
                config, params, stream, window, stride, batch_size=arguments.batch_size, windows=windows, mesh=mesh
            )
        del params  # before the next ones come
        _print_perplexity(result, arguments.json, {"model": str(checkpoint.path)} if arguments.also else {})


def _print_perplexity(result: "PerplexityResult", as_json: bool, model: dict[str, Any]) -> None:
    figures: dict[str, Any] = {
        **model,
        "loss": result.loss,
        "perplexity": result.perplexity,
        **result.figures.as_dict(),
        "tokens": result.tokens,
        "seconds": result.seconds,
    }
    if result.load_LE is not None:
        figures["load_max_over_mean"] = result.load_max_over_mean
        if as_json:
            figures["expert_load"] = result.load_LE.tolist()
    if as_json:
        figures["destroyed"] = result.figures.destroyed
    print_figures(figures, as_json)
    if verdict := result.figures.verdict():
        print("warning:", verdict, file=sys.stderr)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises UserError on a number that is not positive, and on flags that say nothing together."""
    check_numbers(arguments, "batch_size", "batches")
    of_way = {
        "--needle": ("lengths", "depths", "seed", "kv_cache"),
        "--window": ("stride",),
        "neither --window nor --needle": ("sequence_length", "reference"),
        "no --needle": ("window", "batches", "also"),
    }
    holds = {
        "--needle": arguments.needle,
        "--window": arguments.window is not None,
        "neither --window nor --needle": arguments.window is None and not arguments.needle,
        "no --needle": not arguments.needle,
    }
    for way, names in of_way.items():
        for name in names:
            if getattr(arguments, name) is not None and not holds[way]:
                raise UserError(f"--{name.replace('_', '-')}: only with {way}")


def _needle(arguments: argparse.Namespace) -> None:
    import numpy as np

    from nemoe_jax.checkpoints.reader import Checkpoint
    from nemoe_jax.evaluation.needle import find_needles, print_findings
    from nemoe_jax.text.corpus import tokenize_corpus
    from nemoe_jax.text.tokenizers.load import load_tokenizer

    checkpoint = Checkpoint(arguments.directory)
    context = checkpoint.config.context
    lengths = arguments.lengths or [context // 4, context // 2, context]
    tokenizer = load_tokenizer(arguments.directory)
    config, params, mesh = model_flags.load_model_from_args(arguments, checkpoint)
    stream = tokenize_corpus(arguments.texts, tokenizer, vocab=config.vocab)
    findings = find_needles(
        config,
        params,
        tokenizer,
        stream[~np.isin(stream, [*tokenizer.before, *tokenizer.after, *tokenizer.closed([])])],
        lengths,
        arguments.depths or DEPTHS,
        seed=arguments.seed or 0,
        mesh=mesh,
        cache_dtype=arguments.kv_cache,
    )
    if arguments.json:
        found = sum(one.found for one in findings)
        print(json.dumps({"found": found, "of": len(findings), "findings": [one._asdict() for one in findings]}))
    else:
        print_findings(findings)


def _eval(arguments: argparse.Namespace) -> int:
    from nemoe_jax.checkpoints.fingerprint import model_fingerprint
    from nemoe_jax.evaluation import lm_eval_suites

    if arguments.suite and arguments.num_fewshot is not None:
        raise UserError("--num-fewshot: a suite has its own; only with --tasks")
    check_numbers(arguments, "num_fewshot", least=0)
    check_numbers(arguments, "batch_size")
    limit = arguments.limit
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise UserError(f"--limit: expected a whole number of questions or a share between 0 and 1, got {limit:g}")
    lm_eval_suites.prepare_harness()

    def load() -> Any:
        from nemoe_jax.evaluation.lm_eval_model import NemoeLM

        return NemoeLM(
            arguments.directory,
            dtype=arguments.dtype,
            mesh=arguments.mesh,
            batch_size=arguments.batch_size,
            cache_dtype=arguments.kv_cache,
        )

    names = dict.fromkeys(name for text in arguments.tasks or () for name in text.split(",") if name)
    benchmarks = (
        lm_eval_suites.SUITES[arguments.suite]
        if arguments.suite
        else [lm_eval_suites.Benchmark(name, arguments.num_fewshot) for name in names]
    )
    settings = lm_eval_suites.Settings(
        str(Path(arguments.directory).resolve()),
        limit if limit is None or limit < 1 else int(limit),
        arguments.apply_chat_template,
        arguments.dtype,
        arguments.kv_cache,
    )
    output = Path(arguments.output) if arguments.output else None
    weights = model_fingerprint(arguments.directory) if output else ""
    document, problems = lm_eval_suites.run(load, benchmarks, settings, output, arguments.include_path, weights)
    rows = lm_eval_suites.compare(document, benchmarks)
    if arguments.json:
        print(json.dumps(document | {"comparison": rows}))
    elif rows:
        lm_eval_suites.print_rows(rows)
    for problem in problems:
        print("error:", problem, file=sys.stderr)
    return EXIT_BAD_INPUT if problems else 0
