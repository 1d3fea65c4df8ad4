"""The packages import in one direction, without circles, and help costs no JAX."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ("nemoe_jax", "convert", "train")
# Each package may import what stands in the rows above its own, and itself.
LEVELS = (
    ("nemoe_jax.errors",),
    ("nemoe_jax.utils", "nemoe_jax.spec"),
    ("nemoe_jax.checkpoints", "nemoe_jax.kernels"),
    ("nemoe_jax.text",),  # reads tokenizers out of model files
    ("nemoe_jax.adapters",),
    ("nemoe_jax.model",),
    ("nemoe_jax.inference",),
    ("convert", "train"),  # a carve may have the model write its own calibration text
    ("nemoe_jax.serving",),
    ("nemoe_jax.evaluation",),
    ("nemoe_jax.cli",),
)
MOST_MODULES = 13  # in a folder


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for top in TOP for path in (ROOT / top).rglob("*.py")}


def imported_modules(name: str) -> set[str]:
    """The project's modules that a module imports anywhere in it, also within functions and for the type checker."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else node.module or "" for member in members}
    return {module for module in found if module.partition(".")[0] in TOP}


def package_of(module: str) -> str:
    return next((package for level in LEVELS for package in level if f"{module}.".startswith(f"{package}.")), module)


def test_every_import_goes_down_a_level():
    level_of = {package: number for number, level in enumerate(LEVELS) for package in level}
    wrong = []
    for name in MODULES:
        package = package_of(name)
        if package == "nemoe_jax":  # the public API names what lies in all of them
            continue
        for module in imported_modules(name):
            other = package_of(module)
            if other != package and level_of.get(other, 99) >= level_of[package]:
                wrong.append(f"{name} imports {module}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imported_modules(name) for name in MODULES if name != "nemoe_jax"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_folder_holds_too_many_modules():
    folders = {path.parent for path in MODULES.values()}
    for folder in folders:
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, f"{folder}: {len(modules)} modules"


def test_importing_starts_no_backend_and_reads_no_gguf_package():
    program = (
        "import nemoe_jax.cli.main, convert.cli, train.cli, train.run.loop, convert.carve.carve\n"
        "import nemoe_jax.inference.generate, nemoe_jax.serving.request_builder, nemoe_jax.text.tokenizers.load\n"
        "import sys, jax._src.xla_bridge as bridge\n"
        "raise SystemExit(bool(bridge._backends) or 'gguf' in sys.modules)"  # slow to import, for .gguf files alone
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("module", ["nemoe_jax.cli.main", "convert.cli", "train.cli"])
def test_help_imports_no_numerical_library(module):
    program = f"""
import contextlib, io, re, sys
from {module} import main

def help_of(*words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return text.getvalue()

names = re.findall(r"^    ([a-z-]+(?: compare)?)(?: |$)", help_of(), re.MULTILINE)
assert len(names) >= 5, names
for name in names:
    assert help_of(*name.split()).startswith("usage: "), name
heavy = {{"jax", "jaxlib", "flax", "torch", "transformers", "numpy"}} & sys.modules.keys()
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
