"""A run's report for people: report.png and report.html, drawn from the log and the figures of the phases."""

import html
from pathlib import Path
from typing import Any

from nemoe_jax.utils.html_page import html_page, picture, table, text
from train.run.results import PhaseResult, RunReport

PICTURE, PAGE = "report.png", "report.html"
BLUE, RED, GRAY = "#3b6ea5", "#b5413b", "#888888"
COLUMNS = {
    "name": "phase",
    "steps": "steps",
    "params_trained": "trained",
    "held_out_loss_before": "held-out before",
    "held_out_loss_after": "after",
    "load_max_over_mean": "load max/mean",
    "skipped": "skipped",
    "accepted": "acceptance test",
}
Line = dict[str, Any]


def write_report(directory: Path, report: RunReport, lines: list[Line]) -> None:
    """Writes both files into a directory.

    Args:
        lines: the log's lines.
    """
    png = directory / PICTURE
    _draw(png, report.phases, lines)
    phases = len(report.phases)
    rows = "".join(_row(phase) for phase in report.phases)
    head = "".join(f"<th>{name}</th>" for name in COLUMNS.values())
    whole = {name: value for name, value in report.figures().items() if isinstance(value, (int, float))}
    content = html_page(
        "Training" if phases == 1 else f"Training in {phases} phases",
        f"<table><tr>{head}</tr>{rows}</table>",
        picture(png.read_bytes(), "losses and load of the experts"),
        table("Figures", whole),
    )
    (directory / PAGE).write_text(content, "utf-8")


def _row(phase: PhaseResult) -> str:
    values = phase.as_json() | {"accepted": "accepted" if phase.accepted else "discarded"}
    cells = "".join(f"<td>{html.escape(text(values.get(name, '–')))}</td>" for name in COLUMNS)
    return f"<tr{'' if phase.accepted else ' class=discarded'}>{cells}</tr>"


def _draw(path: Path, phases: list[PhaseResult], lines: list[Line]) -> None:
    """Losses, balance of the experts, and each expert's share, over the steps of all phases."""
    from matplotlib.figure import Figure  # half a second to import

    offsets, offset = {}, 0
    for phase in phases:
        offsets[phase.name] = offset
        offset += phase.steps
    loads = [(offsets[line["phase"]] + line["step"], line) for line in lines if "held_out_expert_load" in line]
    figure = Figure(figsize=(10, 9 if loads else 4), layout="constrained")
    grid = figure.subplots(3 if loads else 1, 1, squeeze=False, sharex=True)[:, 0]

    for phase in phases:
        own = [line for line in lines if line["phase"] == phase.name]
        begin = offsets[phase.name]
        color = BLUE if phase.accepted else RED
        points = [(begin + line["step"], line["loss"]) for line in own if "loss" in line]
        held_out = [(begin + line["step"], line["held_out_loss"]) for line in own if "held_out_loss" in line]
        grid[0].plot(*_columns(points), color=color, alpha=0.35, linewidth=1)
        grid[0].plot(*_columns(held_out), color=color, marker="o", markersize=4)
        name = phase.name + ("" if phase.accepted else "\n(discarded)")
        grid[0].annotate(name, (begin, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color=color)
        for axes in grid:
            axes.axvline(begin, color=GRAY, linewidth=0.5)
    grid[0].set(ylabel="nats per token", title="loss in training (pale) and held out (dots)")
    if loads:
        points = [
            (offsets[line["phase"]] + line["step"], line["load_max_over_mean"])
            for line in lines
            if "dead_experts" in line
        ]
        grid[1].plot(*_columns(points), color=BLUE, alpha=0.35, linewidth=1)
        grid[1].plot(*_columns([(step, line["held_out_load_max_over_mean"]) for step, line in loads]), "o-", color=BLUE)
        grid[1].set(title="load of the busiest expert over the mean, averaged over layers")
        steps = [step for step, _ in loads]
        shares = [_mean_over_layers(line["held_out_expert_load"]) for _, line in loads]
        for expert in zip(*shares, strict=True):
            grid[2].plot(steps, expert, linewidth=1)
        grid[2].set(title="each expert's share of the choices on the held-out text, mean over layers", ylim=(0, None))
    grid[-1].set(xlabel="step")
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _mean_over_layers(load_LE: list[list[float]]) -> list[float]:
    return [sum(column) / len(load_LE) for column in zip(*load_LE, strict=True)]
