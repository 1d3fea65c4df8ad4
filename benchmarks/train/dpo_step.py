"""A step of DPO with LoRA against TRL + PEFT, on the same weights, adapters and pairs.

    python -m benchmarks.train.dpo_step --model runs/demo/calibrated --text runs/demo/text/train.jsonl

Pairs are cut from texts: a prompt, what follows it, and what follows another pair's. We pack them into rows of
`--length` tokens; TRL pads each of its sequences to the longest, as it does in a run: its `padding_free` is disabled in
1.16. Both have the reference's log-probabilities ready, by the adapters off, so a step is one pass forward and back,
clipping and AdamW; the peer's loss is TRL's own, with its fused head. Limit: 1.3 times TRL's speed, by CPU time.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib.results import add_keep, keep, machine
from benchmarks.lib.sides import AGREEMENT, Step, Worker, measure, serve, show
from benchmarks.train import train_step
from benchmarks.train.train_step import PACKAGES, our_side, peer_side

SPEED_LIMIT = 1.3
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL calls them


def prepare(directory: Path, options: argparse.Namespace) -> None:
    """Writes adapters and the pairs' tokens: of each prompt, chosen and rejected response."""
    import numpy as np

    lengths = np.random.default_rng(0).integers([20, 40, 40], [60, 120, 120], (options.pairs, 3))
    options.length, options.counts = int(lengths.sum()), 1.0
    train_step.prepare(directory, options)
    tokens = np.load(directory / "tokens.npy").ravel()[: lengths.sum()]
    np.savez(directory / "pairs.npz", tokens=tokens, lengths=lengths)


def sequences(directory: Path) -> list[tuple[list[int], int]]:
    """(tokens, tokens of the prompt): chosen and rejected in turn; a rejected response is another pair's."""
    import numpy as np

    saved = np.load(directory / "pairs.npz")
    pieces = np.split(saved["tokens"], np.cumsum(saved["lengths"].ravel())[:-1])
    prompts, chosen, rejected = (pieces[n::3] for n in range(3))
    rejected = [*rejected[1:], rejected[0]]
    return [
        (np.concatenate([prompt, response]).tolist(), len(prompt))
        for prompt, *responses in zip(prompts, chosen, rejected, strict=True)
        for response in responses
    ]


def ours(directory: Path, options: argparse.Namespace) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """Our step on packed pairs."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from train.data.preference_packing import PackedPairs
    from train.data.token_cache import Tokens
    from train.step.preference import make_objective

    documents = sequences(directory)
    packed = PackedPairs(
        Tokens(
            np.concatenate([tokens for tokens, _ in documents]),
            np.packbits(np.concatenate([np.arange(len(tokens)) >= prompt for tokens, prompt in documents])),
            np.cumsum([0] + [len(tokens) for tokens, _ in documents]),
            np.ones(len(documents)),
            {},
        ),
        options.length,
        "pairs",
    )
    options.rows = len(packed)
    recipe, config, state, frozen, make_update = our_side(directory, options, preference={"loss": "dpo"})
    batch = jax.tree.map(lambda *arrays: jnp.asarray(np.stack(arrays)), *map(packed.__getitem__, range(options.rows)))
    objective = make_objective(recipe, recipe.phases[0], config, None)
    batch = dataclasses.replace(batch, reference=jax.jit(objective.response_logprobs)(state.trainable, frozen, batch))
    update = make_update(objective)

    def step() -> float:
        nonlocal state
        state, figures = update(state, frozen, None, batch)
        return float(figures["loss"])

    return step, lambda: {"tokens_with_padding": options.rows * options.length}


def peer(directory: Path, options: argparse.Namespace) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """The step of TRL on padded sequences."""
    import datasets
    import torch
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model, optimizer, trained = peer_side(directory, options)
    documents = sequences(directory)
    documents = documents[0::2] + documents[1::2]  # as TRL collates: all chosen ones first
    longest = max(len(tokens) for tokens, _ in documents)
    tokens, attention, response = (torch.zeros(len(documents), longest, dtype=torch.long) for _ in range(3))
    for row, (ids, prompt) in enumerate(documents):
        tokens[row, : len(ids)], attention[row, : len(ids)] = torch.tensor(ids), 1
        response[row, prompt : len(ids)] = 1
    nothing = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    arguments = DPOConfig(
        str(directory / "trl"),
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
        router_aux_loss_coef=0.0,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = DPOTrainer(model, args=arguments, train_dataset=nothing, processing_class=tokenizer)
    batch = {"input_ids": tokens, "attention_mask": attention, "completion_mask": response}
    batch |= dict(zip(REFERENCE, trainer.compute_ref_log_probs(model, batch), strict=True))
    trainer.precompute_ref_logps = True
    model.train()

    def step() -> float:
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, lambda: {"tokens_with_padding": tokens.numel()}


def main() -> None:
    """Prepares, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an MoE model's directory with a tokenizer")
    parser.add_argument("--text", type=Path, required=True, help=".jsonl of texts that pairs are cut from")
    parser.add_argument("--pairs", type=int, default=5, help="in a step; default: 5")
    parser.add_argument("--length", type=int, default=1024, help="tokens of one of our rows; default: 1024")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each, after two to warm up; default: 4")
    add_keep(parser)
    parser.add_argument("--role", choices=("prepare", "ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device, options.remat, options.rows = "cpu", False, 1
    if options.role == "prepare":
        return prepare(options.directory, options)
    if options.role:
        return serve(*{"ours": ours, "peer": peer}[options.role](options.directory, options))
    for name in ("torch", "transformers", "peft", "trl"):
        if importlib.util.find_spec(name) is None:
            return print(f"skipped: {name} is not installed")
    with tempfile.TemporaryDirectory() as name:
        directory, module = Path(name), __spec__.name
        if Worker("prepare", directory, sys.argv[1:], module).process.wait():
            raise SystemExit("the pairs could not be written")
        options.length = sum(len(ids) for ids, _ in sequences(directory))
        figures = {**measure(directory, options, sys.argv[1:], module), **machine((*PACKAGES, "trl"))}
    show(figures, SPEED_LIMIT)
    padded = ", ".join(f"{name} {figures[name]['tokens_with_padding']:,}" for name in ("ours", "peer"))
    print(f"{options.length:,} tokens in a step; with padding: {padded}")
    if options.keep:
        keep("dpo_step-cpu", figures)
    sys.exit(figures["cpu_ratio"] < SPEED_LIMIT or figures["first_losses_differ_by"] > AGREEMENT)


if __name__ == "__main__":
    main()
