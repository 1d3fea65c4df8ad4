"""The packages import in one direction: convert and train stand on nemoe_jax, and know nothing of each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"nemoe_jax": {"nemoe_jax"}, "convert": {"convert", "nemoe_jax"}, "train": {"train", "nemoe_jax"}}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} & set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported_packages(path) <= ALLOWED[package], path


def test_importing_starts_no_backend():
    program = (
        "import nemoe_jax.cli.main, convert.cli, train.cli, train.run.loop, convert.carve.carve\n"
        "import nemoe_jax.inference.generate\n"
        "import jax._src.xla_bridge as bridge\n"
        "raise SystemExit(bool(bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
