"""Several processes, one for each host: joining them, and waiting for one another."""

import argparse

from nemoe_jax.errors import UserError


def barrier(name: str) -> None:
    """Waits until every process of a `jax.distributed` job is here; nothing for a single process."""
    import jax  # commands print their help without it

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def add_distributed_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """Gives a sub-command `--distributed`, for `join_distributed`; `what` says what each process does."""
    parser.add_argument(
        "--distributed",
        nargs="*",
        metavar="ARG",
        help=f"this is one of several processes with a shared file system, {what}; nothing more to say on a TPU pod or "
        "under Slurm, elsewhere: COORDINATOR_HOST:PORT PROCESSES PROCESS_NUMBER",
    )


def join_distributed(words: list[str] | None) -> None:
    """Becomes a process of a `jax.distributed` job, where `--distributed` was given.

    Raises:
        UserError: words that jax.distributed cannot use, or nobody there to meet.
    """
    if words is None:
        return
    import jax

    try:
        if words:
            coordinator, processes, number = words
            jax.distributed.initialize(coordinator, int(processes), int(number))
        else:
            jax.distributed.initialize()
        if jax.default_backend() == "cpu":  # as with virtual devices (compilation_cache.py)
            jax.config.update("jax_enable_compilation_cache", False)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed {' '.join(words)}: {error}") from error
