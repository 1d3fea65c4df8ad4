"""English text that every Python has: the language reference of `pydoc_data.topics`, and the library's docstrings.

    python -m examples.demo.python_text runs/text      # train.jsonl and held-out.jsonl

A document is a topic of the reference, or all docstrings of a module. The split is by subject: every tenth topic and
every tenth top-level module or package is held out, so that no held-out document shares its subject with a fit.
"""

import argparse
import ast
import importlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = 10  # every tenth subject
SHORTEST = 400  # characters of a document: less is a license line or nothing at all
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip"}


def topics() -> dict[str, str]:
    """{subject: text} of the language reference."""
    return dict(importlib.import_module("pydoc_data.topics").topics)


def docstrings() -> Iterator[tuple[str, str]]:
    """(top-level module or package, the docstrings of one of its modules), in order of path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts) or parts[0].startswith("_"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files of other versions, kept to be refused
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        yield parts[0], "\n\n".join(text for text in found if text)


def write_text(directory: Path) -> tuple[Path, Path]:
    """Writes train.jsonl and held-out.jsonl there; returns their paths."""
    by_subject: dict[str, list[str]] = {}
    seen = set()  # old names of modules carry the same text
    for subject, text in [*((f"topic {name}", text) for name, text in sorted(topics().items())), *docstrings()]:
        if len(text) >= SHORTEST and text not in seen:
            by_subject.setdefault(subject, []).append(text)
            seen.add(text)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "held-out.jsonl"
    with paths[0].open("w", encoding="utf-8") as train, paths[1].open("w", encoding="utf-8") as held_out:
        for number, texts in enumerate(by_subject.values()):
            file = held_out if number % HELD_OUT == HELD_OUT // 2 else train
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return paths


def main() -> None:
    """Writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for path in write_text(parser.parse_args().directory):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
