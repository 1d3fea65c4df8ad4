"""JAX's persistent compilation cache for the commands: what one run compiles, the next one reads.

It is set up through JAX's environment variables, before JAX is imported, so that a command that needs no JAX does not
load it; where the user has set `JAX_COMPILATION_CACHE_DIR` himself, that holds. It is off where one host plays several
devices: a program that XLA:CPU reads from the cache no longer keeps the order of its collectives, and hangs.
"""

import hashlib
import os
import platform
import re
from pathlib import Path

from nemoe_jax.errors import UserError

VARIABLE = "NEMOE_COMPILATION_CACHE"
NONE = "none"
MAX_BYTES = 2 * 10**9  # the programs used longest ago make room
_MIN_COMPILE_SECONDS = 0.05  # what compiles faster is not worth a file


def cache_home() -> Path:
    """Where this project keeps what it can make again: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemoe-jax"


def use_compilation_cache(wanted: str | None = None) -> None:
    """Configures the cache of this process, in which JAX is not imported yet.

    Args:
        wanted: a directory, or "none"; by default NEMOE_COMPILATION_CACHE, or a directory in the user's cache.

    Raises:
        UserError: a directory that was asked for cannot be made.
    """
    asked = wanted or os.environ.get(VARIABLE)
    if asked == NONE:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or _has_virtual_devices():
        return
    directory = Path(asked) if asked else cache_home() / "compiled" / _machine()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if asked:
            raise UserError(f"compilation cache: {directory}: {error.strerror}") from error
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(_MIN_COMPILE_SECONDS))


def _has_virtual_devices() -> bool:
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    counts = (forced.group(1) if forced else "1", os.environ.get("JAX_NUM_CPU_DEVICES", "1"))
    return any(count not in ("-1", "0", "1") for count in counts)


def _machine() -> str:
    """A name for the processor: programs for one may hold instructions that another lacks, in a shared home too."""
    try:
        words = Path("/proc/cpuinfo").read_text().split("\n\n")[0].split("\n")
    except OSError:
        words = [platform.processor()]
    known = [line for line in words if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return hashlib.sha256("\n".join([platform.machine(), *known]).encode()).hexdigest()[:12]
