"""Public names of a package, imported when they are first used (PEP 562), so that importing the package costs nothing.

A package lists its names once, as ordinary imports that type checkers and editors follow:

    if TYPE_CHECKING:
        from nemoe_jax.model.transformer import forward
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
"""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__`, `__dir__` and `__all__` for the imports under `if TYPE_CHECKING` in its file."""
    origins = {
        alias.asname or alias.name: (statement.module, alias.name)
        for block in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom) and statement.module
        for alias in statement.names
    }

    def get(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = origins[name]
        value = getattr(importlib.import_module(module), attribute)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *origins})

    return get, names, sorted(origins)
