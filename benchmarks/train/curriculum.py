"""The six-phase curriculum on a small model: files in the datasets' own formats, gates, a phase made to overfit.

    make demo && python -m benchmarks.train.curriculum --model runs/demo/calibrated

Chats are questions about the functions of the Python standard library, answered by their documentation strings; the
general text is their sources. Each file has the columns of the dataset that it stands for. The fifth phase trains on
eight chats over and over, at ten times the learning rate. Prints each phase's held-out loss before and after, whether
its gate let it pass, and the whole run's gain; exit status 1 where the gate let the fifth phase pass, or no other.
"""

import argparse
import ast
import importlib.util
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from train.recipe import read_recipe
from train.run.loop import train

HELD_OUT_CHATS, HELD_OUT_TEXTS = 160, 20
PLANTED = "role-play"


def main() -> int:
    """Writes the files, runs the recipe, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/calibrated"), help="model to train")
    parser.add_argument("--output", type=Path, default=Path("runs/curriculum"), help="directory to make")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="recipe keys (steps=10)")
    arguments = parser.parse_args()
    data = arguments.output / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_datasets(data)
    recipe = read_recipe("nano-curriculum")
    moved = json.loads(recipe.model_dump_json().replace("runs/curriculum/data", str(data)))
    keys = [f"phases={json.dumps(moved['phases'])}", f"model={arguments.model}", f"output={arguments.output / 'model'}"]
    report = train(read_recipe("nano-curriculum", [*keys, *arguments.set]))
    print_table(report)
    wrong = [phase["name"] for phase in report["phases"] if phase["accepted"] == (phase["name"] == PLANTED)]
    return 1 if PLANTED in wrong or len(wrong) == len(report["phases"]) - 1 else 0


def documented_functions() -> Iterator[tuple[str, str, str]]:
    """(name, source, documentation) of the standard library's functions that have some."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")):
        try:
            tree = ast.parse(text := path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (documentation := ast.get_docstring(node)):
                source = ast.get_source_segment(text, node) or ""
                yield f"{path.stem}.{node.name}", source[:600], documentation[:400]


def write_datasets(place: Path) -> None:
    """Files in the formats of OpenHermes-2.5, FineTome-100k, MetaMathQA, Stheno, Open-Platypus and Magpie-Pro."""
    rng = random.Random(0)
    functions = list(documented_functions())
    rng.shuffle(functions)
    held_out, functions = functions[:HELD_OUT_CHATS], functions[HELD_OUT_CHATS:]
    fifth = len(functions) // 5
    parts = [functions[at * fifth : (at + 1) * fifth] for at in range(5)]

    def turns(name: str, answer: str, system: str = "") -> list[dict[str, str]]:
        chat = [{"from": "human", "value": f"What does {name} do?"}, {"from": "gpt", "value": answer}]
        return [{"from": "system", "value": system}, *chat] if system else chat

    def parquet(name: str, rows: list[dict[str, Any]]) -> None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / name)

    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    sources = [path.read_text("utf-8", "ignore") for path in sorted(library_packages())]
    lines("held-out-text.jsonl", [{"text": text[:1200]} for text in sources[:HELD_OUT_TEXTS]])
    lines("general.jsonl", [{"text": text} for text in sources[HELD_OUT_TEXTS:]])
    lines("held-out-chats.jsonl", [{"conversations": turns(name, answer)} for name, _, answer in held_out])
    hermes = [
        {"conversations": turns(name, answer, "You know Python."), "source": "stdlib", "category": None, "id": name}
        for name, _, answer in parts[0]
    ]
    (place / "openhermes.json").write_text(json.dumps(hermes), "utf-8")
    parquet("finetome.parquet", [{"conversations": turns(n, a), "source": "x", "score": 4.5} for n, _, a in parts[1]])
    sums = [(rng.randrange(100), rng.randrange(100)) for _ in range(600)]
    math = [
        {
            "type": "GSM_Rephrased",
            "query": f"Ann has {a} books and gets {b} more. How many are there?",
            "original_question": f"{a} + {b}?",
            "response": f"Ann has {a} + {b} = {a + b} books.\n#### {a + b}\nThe answer is: {a + b}",
        }
        for a, b in sums
    ]
    (place / "metamathqa.json").write_text(json.dumps(math), "utf-8")
    persona = "You are an old librarian. Stay in your role."
    lines(
        "stheno.jsonl", [{"id": n, "conversations": turns(n, f"*turns a page* {a}", persona)} for n, _, a in parts[2]]
    )
    platypus = [
        {"instruction": "Explain this function.", "input": source, "output": answer, "data_source": "stdlib"}
        for _, source, answer in parts[3]
    ]
    lines("platypus.jsonl", platypus)
    magpie = [
        {"uuid": n, "instruction": f"What does {n} do?", "response": a, "conversations": turns(n, a)}
        for n, _, a in parts[4]
    ]
    parquet("magpie.parquet", magpie)


def library_packages() -> list[Path]:
    """Sources of the standard library's packages; the functions of the chats come from its single modules."""
    names = ("email", "json", "logging", "http", "xml", "asyncio", "importlib", "unittest", "concurrent", "collections")
    specs = [importlib.util.find_spec(name) for name in names]
    roots = [Path(place) for spec in specs if spec for place in spec.submodule_search_locations or []]
    return [path for root in roots for path in root.rglob("*.py") if path.stat().st_size > 500]


def print_table(report: dict[str, Any]) -> None:
    """Phases with their gates."""
    print(f"{'phase':<16}{'documents':>10}{'bad rows':>9}{'before':>9}{'after':>9}{'load':>7}  gate")
    for phase in report["phases"]:
        documents, bad = (sum(source[name] for source in phase["data"]) for name in ("documents", "bad_rows"))
        before, after = phase["held_out_loss_before"], phase["held_out_loss_after"]
        print(
            f"{phase['name']:<16}{documents:>10,}{bad:>9}{before:>9.4f}{after:>9.4f}"
            f"{phase.get('load_max_over_mean', 0):>7.2f}  {'passed' if phase['accepted'] else 'discarded'}"
        )
    before, after = report["held_out_loss_before"], report["held_out_loss_after"]
    print(f"held-out loss {before:.4f} -> {after:.4f}, {before - after:.4f} nats less")
    print(f"{report['tokens']:,} tokens in {report['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
