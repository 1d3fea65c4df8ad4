"""The command `nemoe`: looks into models, tokenises, runs and scores them."""

import sys
from collections.abc import Sequence

from nemoe_jax import inspect_command, logits_command
from nemoe_jax.command import Command
from nemoe_jax.evaluation import commands as evaluation_commands
from nemoe_jax.evaluation import tokenize_command
from nemoe_jax.serving import chat_command, generate_command, serve_command

# Each registers its sub-commands with `add(command)`, in the order of `nemoe --help`.
MODULES = (
    inspect_command,
    generate_command,
    chat_command,
    serve_command,
    logits_command,
    evaluation_commands,
    tokenize_command,
)

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
    for module in MODULES:
        module.add(command)
    return command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
