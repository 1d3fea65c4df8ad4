"""`nemoe-train`: runs recipes, and explains them."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nemoe_jax.errors import UserError
from nemoe_jax.utils.command import Command, print_figures
from nemoe_jax.utils.distributed import add_distributed_flag, join_distributed

EXIT_DOES_NOT_FIT = 3
DESCRIPTION = """Trains a model as a recipe says: LoRA adapters, routers or every weight, on text and chats or against a
teacher, in one phase or several.

  nemoe-train recipes                     what comes with the package
  nemoe-train show nano-repair            a recipe with all its defaults
  nemoe-train keys                        every key with its meaning
  nemoe-train run my.yaml steps=500 optimizer.learning_rate=1e-3
  nemoe-train cache-teacher my.yaml       what its teacher says of the text, kept: then it trains without the teacher
  nemoe-train sweep my.yaml --output runs/sweep --learning-rates 1e-3,3e-3
  nemoe-train tokenizer text/ --vocab 32006 --output tokenizers/mine
  nemoe-train plan my.yaml --topology v5e:4x4     does it fit a TPU slice, or h100? (needs none)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = Command("nemoe-train", DESCRIPTION)
    run = command.add(
        "run",
        _run,
        "train as a recipe says",
        "Everything is checked before any work: files, keys, shapes. The output directory must not exist; it appears\n"
        "when all is done: a Hugging Face model directory (adapters merged) with train_log.jsonl, report.json,\n"
        "report.html, recipe.yaml, TensorBoard's files and an adapter of every phase in PEFT's layout.\n\n"
        "Until then the run works in .NAME.partial beside it. Interrupted (Ctrl-C, SIGTERM, even SIGKILL), it goes on\n"
        "from the last checkpoint when the same command is given again, on any mesh, as if nothing had happened.\n"
        "Relative paths are seen from the current directory. For pods: --distributed, the same command everywhere.",
        reports=True,
    )
    run.add_argument("--restart", action="store_true", help="begin anew, throwing away what an earlier attempt left")
    run.add_argument(
        "--profile", type=Path, metavar="DIR", help="trace the second step of each phase, for XProf or Perfetto"
    )
    add_distributed_flag(run, "which work on the same steps")
    show = command.add("show", _show, "print a recipe with its overrides and all defaults, as YAML")
    plan = command.add(
        "plan",
        _plan,
        "compile a recipe's step for a TPU slice or a GPU, without one, and say whether it fits",
        "Bytes per device by kind against the chip's limit, transfers between devices, FLOPs. Needs no weights:\n"
        "model and distill.teacher may be names of presets (nemoe inspect NAME shows one) instead of directories. The\n"
        "mesh is the recipe's, or auto where it has none, as is written in train/run/auto_mesh.py.\n\n"
        "Exit status 3 where it does not fit, with what to change. Wants libtpu: pip install 'nemoe-jax[tpu]';\n"
        "for GPUs JAX's plugin for CUDA. Of a card's memory three quarters count, as in JAX, or the share that\n"
        "XLA_PYTHON_CLIENT_MEM_FRACTION names.\n\n"
        "  nemoe-train plan nemoe-12b-16e-repair model=nemoe-12b-16e distill.teacher=mistral-nemo-12b \\\n"
        "      --topology v5e:4x4",
        reports=True,
    )
    plan.add_argument(
        "--topology", required=True, help="v5e:4x4, v5p:2x2x4, v6e:8x8, …, or h100, h200, rtx4090, h100:8"
    )
    plan.add_argument("--phase", metavar="NAME", help="phase of the recipe; default: that which trains most weights")
    plan.add_argument("--hlo", type=Path, metavar="FILE", help="write the compiled program's text")
    cache = command.add(
        "cache-teacher",
        _cache_teacher,
        "let a recipe's teacher read its text once, for training without it",
        "Writes what distill.offline names: of each target that counts the distill.top_k likeliest tokens with their\n"
        "log-probabilities, in shards of 64 rows. Given again, it goes on where it stopped. Training with the same\n"
        "recipe then loads no teacher; text that is not what the teacher read is an error.\n\n"
        "  nemoe-train cache-teacher nano-repair distill.offline=runs/teacher",
        reports=True,
    )
    tokenizer = command.add(
        "tokenizer",
        _tokenizer,
        "make a byte-level BPE tokenizer from text",
        "TEXT is anything that training takes: files, globs, directories, hf:NAME. Six of the tokens are control\n"
        "tokens of a ChatML chat, whose template is in the directory: it is what a recipe's tokenizer names.\n\n"
        "  nemoe-train tokenizer text/ --vocab 32006 --output tokenizers/nekomind",
        reports=True,
    )
    tokenizer.add_argument("texts", nargs="+", metavar="TEXT", help="what to learn from")
    tokenizer.add_argument("--vocab", type=int, required=True, metavar="N", help="tokens in all")
    tokenizer.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to create")
    sweep = command.add(
        "sweep",
        _sweep,
        "run a recipe at several sizes and learning rates, and compare",
        "Every run is an ordinary one in DIR, which gets a table (sweep.json) and a picture (sweep.html) of their\n"
        "held-out losses. A run that diverges is reported and the others go on. Given again, it goes on where it\n"
        "stopped.\n\n"
        "  nemoe-train sweep nekomind-nano steps=200 --output runs/sweep --learning-rates 1e-3,4e-3 \\\n"
        "      --size scratch.hidden=128,scratch.expert_ffn=96 --size scratch.hidden=256,scratch.expert_ffn=192",
        reports=True,
    )
    sweep.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the runs")
    sweep.add_argument("--learning-rates", required=True, metavar="R,R,…", help="peak learning rates")
    sweep.add_argument("--size", action="append", default=[], metavar="key=value,…", help="keys of a size; repeat it")
    for parser in (run, show, plan, cache, sweep):
        parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
        parser.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="keys to set instead of the recipe's, dotted: data.batch_size=4 lora.0.rank=8",
        )
    command.add("recipes", _recipes, "list the recipes that come with the package")
    command.add("keys", _keys, "print every recipe key with its default and its meaning")
    return command.main(argv)


def _run(arguments: argparse.Namespace) -> int | None:
    from train.recipe import read_recipe

    recipe = read_recipe(arguments.recipe, arguments.overrides)
    join_distributed(arguments.distributed)
    from train.run.loop import train  # JAX loads here, so that the other sub-commands answer at once
    from train.run.run_directory import Interrupted

    try:
        report = train(recipe, arguments.restart, arguments.profile)
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return stop.exit_status
    figures = report.figures()
    figures.pop("expert_load", None)  # a table, in report.json
    print_figures(figures, arguments.json)
    return None


def _cache_teacher(arguments: argparse.Namespace) -> None:
    from train.recipe import read_recipe

    recipe = read_recipe(arguments.recipe, arguments.overrides)
    from train.run.cache_teacher import cache_teacher

    print_figures(cache_teacher(recipe), arguments.json)


def _sweep(arguments: argparse.Namespace) -> None:
    try:
        rates = [float(rate) for rate in arguments.learning_rates.split(",")]
    except ValueError as error:
        raise UserError(f"--learning-rates: expected numbers, got {arguments.learning_rates}") from error
    from train.run.sweep import render, sweep

    rows = sweep(arguments.recipe, arguments.overrides, arguments.size, rates, arguments.output)
    print(json.dumps(rows) if arguments.json else "\n".join(render(rows)))


def _tokenizer(arguments: argparse.Namespace) -> None:
    from train.data.train_tokenizer import train_tokenizer

    print_figures(train_tokenizer(arguments.texts, arguments.output, arguments.vocab), arguments.json)


def _plan(arguments: argparse.Namespace) -> int:
    from train.plan.plan import plan, render
    from train.recipe import read_recipe

    recipe = read_recipe(arguments.recipe, arguments.overrides)
    phases = [phase.name for phase in recipe.phases]
    if arguments.phase and arguments.phase not in phases:
        raise UserError(f"--phase: expected one of {', '.join(phases)}, got {arguments.phase}")
    figures = plan(
        recipe, arguments.topology, phases.index(arguments.phase) if arguments.phase else None, arguments.hlo
    )
    print(json.dumps(figures) if arguments.json else "\n".join(render(figures)))
    return 0 if figures["fits"] else EXIT_DOES_NOT_FIT


def _show(arguments: argparse.Namespace) -> None:
    from train import recipe as recipes

    print(recipes.to_yaml(recipes.read_recipe(arguments.recipe, arguments.overrides)), end="")


def _recipes(arguments: argparse.Namespace) -> None:
    from train import recipe as recipes

    shipped = recipes.shipped_recipes()
    width = max(map(len, shipped))
    for name, text in shipped.items():
        print(f"{name:<{width}}  {text.partition(chr(10))[0].lstrip('# ')}")


def _keys(arguments: argparse.Namespace) -> None:
    from pydantic_core import PydanticUndefined

    from train import recipe as recipes

    for key, field in recipes.list_keys():
        unset = field.default in (PydanticUndefined, None) or isinstance(field.default, recipes.Section)
        default = "" if unset else f" = {json.dumps(field.default)}"
        print(f"{key}{default}\n    {field.description}{' (required)' if field.is_required() else ''}")


if __name__ == "__main__":
    sys.exit(main())
