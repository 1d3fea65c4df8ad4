"""The command `nemoe`: looks into models, tokenizes, runs and scores them."""

import sys
from collections.abc import Sequence

from nemoe_jax.cli import chat, generate, inspect_model, logits, serve, tokenize_text
from nemoe_jax.cli import evaluate as evaluation_commands
from nemoe_jax.utils.command import Command

# Each registers its sub-commands with `add(command)`, in the order of `nemoe --help`.
MODULES = (inspect_model, generate, chat, serve, logits, evaluation_commands, tokenize_text)

DESCRIPTION = """\
Looks into Hugging Face model directories of the NeMo family (Mistral, Llama, Mixtral, NekoMind) and runs them.

Three commands share one kind of file, the Hugging Face model directory:
  nemoe-convert carve DENSE MOE          takes a dense model apart into experts
  nemoe-train run RECIPE model=MOE …     repairs or fine-tunes it (LoRA, distillation), or trains from scratch
  nemoe generate MOE --prompt "…"        runs it; this command also inspects, scores and tokenizes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    command = Command("nemoe", DESCRIPTION)
    for module in MODULES:
        module.add(command)
    return command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
