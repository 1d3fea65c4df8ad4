"""How much memory of the host is free."""

import os
from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that this process may still take: what the system has available, or its control group if that is less.

    Where the system does not tell, half of what the machine has.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        fields = dict(line.split(":", 1) for line in (_PROC / "meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        (own,) = [line[3:] for line in (_PROC / "self/cgroup").read_text().splitlines() if line.startswith("0::")]
        group = (_CGROUP / own.lstrip("/")).resolve()
        for folder in (group, *group.parents):
            if not folder.is_relative_to(_CGROUP):
                break
            limit = (folder / "memory.max").read_text().strip() if (folder / "memory.max").exists() else "max"
            if limit != "max":
                free = min(free, max(int(limit) - _unreclaimable(folder), 0))
    except (OSError, ValueError):
        pass
    return free


def _unreclaimable(folder: Path) -> int:
    """Bytes that a control group uses but for file pages that can be dropped."""
    used = int((folder / "memory.current").read_text())
    fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return used - int(fields.get("inactive_file", 0))
