"""The demo's report: report.json, two pictures, and one HTML file that holds everything."""

import base64
import html
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

STAGES = ("dense", "reference", "carved", "calibrated", "repaired")
COLORS = {
    "dense": "#3b6ea5",
    "reference": "#9a9a9a",
    "carved": "#c8553d",
    "calibrated": "#c79a3a",
    "repaired": "#4f8a4f",
}


def write_report(output: Path, report: dict[str, Any], measured: dict[str, dict[str, Any]]) -> None:
    """Writes report.json, loss.png, load.png and report.html.

    Args:
        report: a row of figures for each stage, the generated samples, the prompt and the seconds in all.
        measured: the figures of `nemoe perplexity` for each stage, with the experts' load.
    """
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    pictures = {"loss.png": draw_losses(report), "load.png": draw_load(measured)}
    for name, figure in pictures.items():
        figure.savefig(output / name, dpi=110)
        plt.close(figure)
    (output / "report.html").write_text(page(output, report), encoding="utf-8")


def draw_losses(report: dict[str, Any]) -> plt.Figure:
    """Training and held-out loss of the dense model, and of the repair with the carved models' losses as lines."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name, title in zip(axes, ("dense", "repaired"), ("dense training", "repair"), strict=True):
        log = (Path(report[name]["model_dir"]) / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in log]
        steps = [row for row in rows if "cross_entropy" in row]
        axis.plot(
            [row["step"] for row in steps],
            [row["cross_entropy"] for row in steps],
            color=COLORS[name],
            alpha=0.35,
            linewidth=1,
            label="training batches",
        )
        held_out = [row for row in rows if "held_out_loss" in row]
        axis.plot(
            [row["step"] for row in held_out],
            [row["held_out_loss"] for row in held_out],
            color=COLORS[name],
            marker="o",
            label="held-out text",
        )
        axis.set(title=title, xlabel="step", ylabel="cross-entropy, nats per token")
    for name in ("dense", "calibrated", "carved", "reference"):
        axes[1].axhline(
            report[name]["loss"], color=COLORS[name], linestyle="--", linewidth=1, label=f"{name}, held-out"
        )
    for axis in axes:
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_load(measured: dict[str, dict[str, Any]]) -> plt.Figure:
    """Each expert's share of the tokens' choices, layer by layer, against an even share."""
    names = [name for name in STAGES if "expert_load" in measured[name]]
    loads = [np.array(measured[name]["expert_load"]) for name in names]
    relative = [load * load.shape[1] for load in loads]
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3), layout="constrained", squeeze=False)
    top = max(float(load.max()) for load in relative)
    for axis, name, load in zip(axes[0], names, relative, strict=True):
        image = axis.imshow(load, aspect="auto", cmap="cividis", vmin=0, vmax=top)
        axis.set(title=f"{name}: experts' load", xlabel="expert", ylabel="layer")
        axis.set_yticks(range(len(load)))
        axis.set_xticks(range(0, load.shape[1], 5))
    figure.colorbar(image, ax=axes, label="load / even share")
    return figure


def page(output: Path, report: dict[str, Any]) -> str:
    """One self-contained page."""
    columns = ("loss", "perplexity", "r", "load_max_over_mean", "params_total", "params_active", "seconds")
    titles = ("held-out loss", "perplexity", "R", "load max/mean", "parameters", "active", "seconds")

    def cell(value: Any) -> str:
        text = "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
        return f"<td>{text}</td>"

    rows = "".join(
        f"<tr><th>{name}</th>{''.join(cell(report[name][column]) for column in columns)}</tr>" for name in STAGES
    )
    head = "".join(f"<th>{title}</th>" for title in titles)
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode((output / name).read_bytes()).decode()}">'
        for name in ("loss.png", "load.png")
    )
    samples = "".join(
        f"<h3>{name}</h3><pre><b>{html.escape(report['prompt'])}</b>{html.escape(text)}</pre>"
        for name, text in report["samples"].items()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Carving a dense model</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }}
td, th {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child {{ text-align: left }} img {{ max-width: 100%; display: block; margin: 1.5rem 0 }}
pre {{ background: #f5f5f3; padding: 1rem; overflow-x: auto; white-space: pre-wrap }}
</style>
<h1>A dense model, carved into experts and repaired</h1>
<p>R = 1 − (loss − dense) / (reference − dense): 1 is the dense model, 0 a careless carve (contiguous neurons, random
router, least-squares output scale). Losses are in nats per token on held-out text.
{report["seconds"]:.0f} seconds in all.</p>
<table><tr><th></th>{head}</tr>{rows}</table>
{images}
<h2>What each stage writes</h2>
{samples}
</html>
"""
