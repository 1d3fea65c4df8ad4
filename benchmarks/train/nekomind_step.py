"""A step of pretraining the small NekoMind, all weights, against transformers and torch's AdamW, on the same weights.

    python -m benchmarks.train.nekomind_step        (CPU, float32; two minutes)

The model is that of the recipe nekomind-nano: 256 wide, 2 dense and 4 MoE layers, 16 experts, top-4, and a shared one.
Named peer: transformers, which opens the directory by the code beside its weights, with torch's AdamW and clipping;
each in a process of its own, taking steps in turn. Limit: 1.3 times its tokens per second, by CPU time with `--cpu`;
the first two losses agree. Beside other work neither ratio says anything: the peer's threads wait for each other
actively.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib.results import add_keep, keep, machine
from benchmarks.lib.sides import AGREEMENT, Step, Worker, batch_of, measure, serve, show

SPEED_LIMIT, LEARNING_RATE = 1.3, 1e-3
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


def prepare(directory: Path, options: argparse.Namespace) -> None:
    """Writes the model and tokens."""
    import jax
    import numpy as np

    from nemoe_jax.checkpoints import pretrained
    from nemoe_jax.spec import schema
    from nemoe_jax.spec.config import ModelConfig
    from train.recipe import read_recipe

    scratch = read_recipe("nekomind-nano", ["tokenizer=-"]).scratch
    assert scratch is not None
    config = ModelConfig(**scratch.model_dump(exclude_none=True), vocab=options.vocab, dtype="float32")
    pretrained.save_pretrained(directory / "model", config, schema.initialize(config, jax.random.key(0), config.dtype))
    tokens = np.random.default_rng(0).integers(0, config.vocab, (options.rows, options.length + 1))
    np.save(directory / "tokens.npy", tokens.astype(np.int32))


def ours(directory: Path, options: argparse.Namespace) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """Our step."""
    import numpy as np

    from nemoe_jax.checkpoints import pretrained
    from train.recipe import Recipe
    from train.step.optimizer import learning_rate_schedule, make_optimizer
    from train.step.step import Objective, initial_state, make_update, split

    config, params = pretrained.load_pretrained(directory / "model")
    recipe = Recipe.model_validate(
        {
            "output": directory / "out",
            "model": directory / "model",
            "dtype": "float32",
            "remat": False,
            "phases": [
                {
                    "trainable": "all",
                    "balance_loss_weight": 0,
                    "z_loss_weight": 0,
                    "data": {"train": "-", "sequence_length": options.length, "batch_size": options.rows},
                    "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
                    "steps": 1,
                }
            ],
        }
    )
    phase = recipe.phases[0]
    trained, frozen = split(params, lambda path: True, config.dtype)
    optimizer = make_optimizer(phase.optimizer, phase.steps)
    state = initial_state({"params": trained, "adapters": {}}, optimizer, 0)
    update = make_update(
        Objective(recipe, phase, config, None), optimizer, learning_rate_schedule(phase.optimizer, phase.steps), state
    )
    tokens = np.load(directory / "tokens.npy")
    batch = batch_of(tokens, np.ones((options.rows, options.length), np.float32))

    def step() -> float:
        nonlocal state
        state, figures = update(state, frozen, None, batch)
        return float(figures["loss"])

    return step, dict


def peer(directory: Path, options: argparse.Namespace) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """The step of transformers."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory / "model", trust_remote_code=True, dtype="auto", experts_implementation=options.experts
    )
    model.config.use_cache = False
    model.train()
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    tokens = torch.from_numpy(np.load(directory / "tokens.npy")).long()

    def step() -> float:
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, dict


def main() -> None:
    """Prepares, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each, after two to warm up; default: 7")
    parser.add_argument("--rows", type=int, default=16, help="rows of tokens; default: 16")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row; default: 256")
    parser.add_argument("--vocab", type=int, default=4096, help="default: 4096")
    parser.add_argument("--experts", default="grouped_mm", help="the peer's implementation of experts; or eager")
    parser.add_argument("--cpu", action="store_true", help="judge by CPU time")
    add_keep(parser)
    parser.add_argument("--role", choices=("prepare", "ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = "cpu"
    if options.role == "prepare":
        return prepare(options.directory, options)
    if options.role:
        return serve(*{"ours": ours, "peer": peer}[options.role](options.directory, options))
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return print(f"skipped: {name} is not installed")
    with tempfile.TemporaryDirectory() as name:
        directory, module = Path(name), __spec__.name
        if Worker("prepare", directory, sys.argv[1:], module).process.wait():
            raise SystemExit("the model could not be written")
        figures = {**measure(directory, options, sys.argv[1:], module), **machine(PACKAGES)}
    show(figures, SPEED_LIMIT)
    if options.keep:
        keep("nekomind_step-cpu", figures)
    ratio = figures["cpu_ratio" if options.cpu else "ratio"]
    sys.exit(ratio < SPEED_LIMIT or figures["first_losses_differ_by"] > AGREEMENT)


if __name__ == "__main__":
    main()
