"""A demo's report: report.json, a picture of the experts' load, and one HTML file that holds everything."""

import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.demo.steps import COLUMNS
from nemoe_jax.utils.html_page import html_page, picture

INTRODUCTION = """\
<p>Losses in nats per token on held-out text. "above dense" is the loss above the dense model's, KL the divergence of
its next token, agreement the share of tokens after which both find the same one likeliest, accuracy the share of
tokens that are found likeliest. The control has no experts: the neurons that are most active on the calibration text,
as many as the experts of a token have together, with the same refit. Experts are worth what they gain over it.</p>"""


def write_report(output: Path, report: dict[str, Any], loads: dict[str, Any]) -> None:
    """Writes report.json, load.png and report.html.

    Args:
        report: a row of figures for each stage, the samples, the prompt and the seconds in all.
        loads: {stage: each expert's share of the choices, (layers, experts)}.
    """
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    png = draw_load({name: np.array(load) for name, load in loads.items()})
    (output / "load.png").write_bytes(png)
    (output / "report.html").write_text(page(report, png), encoding="utf-8")


def draw_load(loads: dict[str, np.ndarray]) -> bytes:
    """A PNG: each expert's share of the tokens' choices, layer by layer, against an even share."""
    relative = {name: load * load.shape[1] for name, load in loads.items()}
    figure = Figure(figsize=(3.6 * len(loads), 3.4), layout="constrained")
    axes = figure.subplots(1, len(loads), squeeze=False)[0]
    top = max(float(load.max()) for load in relative.values())
    for axis, (name, load) in zip(axes, relative.items(), strict=True):
        image = axis.imshow(load, aspect="auto", cmap="cividis", vmin=0, vmax=top)
        axis.set(title=f"{name}: experts' load", xlabel="expert", ylabel="layer")
        axis.set_yticks(range(0, len(load), -(-len(load) // 10)))
        axis.set_xticks(range(0, load.shape[1], 5))
    figure.colorbar(image, ax=list(axes), label="load / even share")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def page(report: dict[str, Any], png: bytes) -> str:
    """One self-contained page."""

    def cell(value: Any) -> str:
        return f"<td>{'–' if value is None else f'{value:,}' if isinstance(value, int) else f'{value:.3f}'}</td>"

    rows = "".join(
        f"<tr><th>{name}{' (destroyed)' if figures['destroyed'] else ''}</th>"
        + "".join(cell(figures[column]) for column in COLUMNS)
        + "</tr>"
        for name, figures in report.items()
        if isinstance(figures, dict) and "loss" in figures
    )
    head = "".join(f"<th>{title}</th>" for title in COLUMNS.values())
    samples = "".join(
        f"<h3>{name}</h3><pre><b>{html.escape(asked)}</b>{html.escape(text)}</pre>"
        for asked, texts in ((report["prompt"], report["samples"]), (report.get("question"), report.get("chat", {})))
        for name, text in texts.items()
    )
    return html_page(
        "A dense model, carved into experts and repaired",
        INTRODUCTION,
        f"<p>A model that knows nothing but how often each token comes has a loss of {report['loss_unigram']:.3f}; "
        f"{report['seconds']:.0f} seconds in all.</p>",
        f"<table><tr><th></th>{head}</tr>{rows}</table>",
        picture(png, "load"),
        f"<h2>What each stage writes</h2>{samples}",
    )
