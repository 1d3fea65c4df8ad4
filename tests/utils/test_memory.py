import os

import pytest

from nemoe_jax.utils import memory

GIGABYTE = 2**30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 8 GB available, and this process in a control group within another."""
    group = tmp_path / "cgroup/outer/inner"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 * 2**20} kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/outer/inner\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    return tmp_path


def limit(folder, limit, used, inactive):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_the_least_of_system_and_control_groups(system):
    inner, outer = system / "cgroup/outer/inner", system / "cgroup/outer"
    assert memory.free_memory() == 8 * GIGABYTE
    limit(inner, "max", GIGABYTE, 0)
    limit(outer, 6 * GIGABYTE, 3 * GIGABYTE, GIGABYTE)
    assert memory.free_memory() == 4 * GIGABYTE
    limit(inner, 2 * GIGABYTE, 3 * GIGABYTE, 0)
    assert memory.free_memory() == 0


@pytest.mark.parametrize("content", [None, "MemTotal: 1 kB\n", "MemAvailable: much\n", "nothing"])
def test_a_system_that_does_not_tell(system, content):
    (system / "proc/self/cgroup").unlink()
    (system / "proc/meminfo").unlink()
    if content is not None:
        (system / "proc/meminfo").write_text(content)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory.free_memory() == physical // 2
