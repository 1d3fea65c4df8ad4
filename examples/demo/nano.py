"""The main job on a model of 4 million parameters that is trained here, in a minute or two: `make demo-nano`.

    python -m examples.demo.nano --output runs/demo-nano

Every step is a public command, printed before it runs. Text: the sources of the Python standard library. Vocabulary:
the first ranks of the real Tekken. What it shows of quality carries over to no real model: see demo.py.
"""

import argparse
import importlib.util
import json
import random
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from examples.demo.report import write_report
from examples.demo.steps import Steps, print_table, row
from nemoe_jax.text.tokenizers.load import cut_tekken

VOCABULARY = 4096
EXPERTS, TOP_K = 16, 4
CALIBRATION_TOKENS = "32768"
PROMPT = 'def read(path):\n    """Read'
STAGES = ("dense", "control", "weights_only", "calibrated", "repaired")


def main() -> None:
    """Runs every step and writes report.json, report.html and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo-nano"), help="directory to make")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="key=value", help="recipe keys for the dense training (steps=1000)"
    )
    parser.add_argument("--set-repair", nargs="*", default=[], metavar="key=value", help="recipe keys for the repair")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if output.exists():
        parser.error(f"{output}: exists already; remove it or choose another --output")
    started = time.monotonic()
    text = output / "text"
    write_corpus(text, tekken_file())
    train, held_out = text / "train.jsonl", text / "held-out.jsonl"
    data = [f"data.train={train}", f"data.held_out={held_out}"]
    models = {name: output / name for name in STAGES}
    step = Steps()

    dense = models["dense"]
    step(
        "dense",
        "nemoe-train",
        "run",
        "nano-dense",
        f"output={dense}",
        f"tokenizer={text / 'tekken.json'}",
        *data,
        *arguments.set,
    )
    carve = ("nemoe-convert", "carve", str(dense))
    shape = ("--experts", str(EXPERTS), "--top-k", str(TOP_K))
    calibration = ("--calibration", str(train), "--calibration-tokens", CALIBRATION_TOKENS)
    step("control", *carve, str(models["control"]), *shape, *calibration, "--control")
    step("weights_only", *carve, str(models["weights_only"]), *shape)
    step("calibrated", *carve, str(models["calibrated"]), *shape, *calibration)
    step(
        "repaired",
        "nemoe-train",
        "run",
        "nano-repair",
        f"model={models['calibrated']}",
        f"distill.teacher={dense}",
        f"output={models['repaired']}",
        *data,
        *arguments.set_repair,
    )

    # the windows that the recipes, too, evaluate on
    measured = step.measure(models, held_out, "--batch-size", "8", "--batches", "8")
    sampling = ("--max-new-tokens", "64", "--temperature", "0.7", "--min-p", "0.1")
    samples = {
        name: step(name, "nemoe", "generate", str(models[name]), "--prompt", PROMPT, *sampling)["text"]
        for name in ("dense", "weights_only", "calibrated", "repaired")
    }
    report: dict[str, Any] = {
        name: row(directory, measured[name], step.seconds[name]) for name, directory in models.items()
    }
    report |= {"samples": samples, "prompt": PROMPT, "loss_unigram": measured["dense"]["loss_unigram"]}
    report["seconds"] = time.monotonic() - started
    write_report(output, report, {name: one["expert_load"] for name, one in measured.items() if "expert_load" in one})
    print_table(report, output)


def tekken_file() -> Path:
    """The real Tekken vocabulary, which comes with mistral-common."""
    package = importlib.util.find_spec("mistral_common")
    if package is None or package.origin is None:
        sys.exit("the Tekken vocabulary comes with mistral-common: pip install 'nemoe-jax[demo]'")
    return Path(package.origin).parent / "data" / "tekken_240718.json"


def write_corpus(directory: Path, tekken: Path) -> None:
    """The standard library's sources as train.jsonl and, of every twentieth file, held-out.jsonl; and a cut Tekken."""
    directory.mkdir(parents=True)
    cut_tekken(tekken, directory / "tekken.json", VOCABULARY)
    root = Path(sysconfig.get_paths()["stdlib"])
    # tables of character codes, and files of hundreds of kilobytes, are little like text
    sources = [
        path
        for path in sorted(root.rglob("*.py"))
        if not {"site-packages", "encodings"} & set(path.parts) and path.stat().st_size < 300_000
    ]
    random.Random(0).shuffle(sources)
    held_out = len(sources) // 20
    for name, paths in (("held-out", sources[:held_out]), ("train", sources[held_out:])):
        documents = (path.read_bytes().decode("utf-8", "ignore") for path in paths)
        lines = (json.dumps({"text": document}) + "\n" for document in documents if document.strip())
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"text: {len(sources)} files of {root}, {held_out} of them held out; vocabulary: Tekken's first {VOCABULARY}")


if __name__ == "__main__":
    main()
