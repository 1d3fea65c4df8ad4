"""A conversion's manifest as a page for people: what was done, and each figure over the layers."""

import dataclasses
import html
import io
from typing import Any

from convert.manifest import Manifest
from nemoe_jax.utils.html_page import html_page, picture, table

PLOT_SIZE = (4.4, 2.6)  # inches
COLUMNS = 3


def page(manifest: Manifest) -> str:
    """One self-contained HTML page."""
    options = dict(manifest.options)
    title = f"{options.pop('command')} {manifest.source}"
    whole = {name: value for name, value in manifest.figures.items() if isinstance(value, (int, float))}
    series = layer_series(manifest.layers)
    plots = picture(_plots(series), "figures by layer") if series else ""
    tables = table("Options", options), table("Result", dataclasses.asdict(manifest.result))
    return html_page(title, table("Figures", whole), plots, _layer_table(series), *tables)


def layer_series(layers: list[dict[str, Any]]) -> dict[str, list[tuple[int, list[float]]]]:
    """{figure: [(layer, its values)]} of the figures that are numbers or lists of numbers."""
    series: dict[str, list[tuple[int, list[float]]]] = {}
    for row in layers:
        for name, value in row.items():
            values = value if isinstance(value, list) else [value]
            if name != "layer" and values and all(isinstance(part, (int, float)) for part in values):
                series.setdefault(name, []).append((row["layer"], values))
    return series


def _plots(series: dict[str, list[tuple[int, list[float]]]]) -> bytes:
    """A PNG: a panel for each figure, lists as a band between their extremes."""
    from matplotlib.figure import Figure  # half a second to import

    rows = -(-len(series) // COLUMNS)
    figure = Figure(figsize=(PLOT_SIZE[0] * COLUMNS, PLOT_SIZE[1] * rows), layout="constrained")
    for place, (name, points) in enumerate(series.items(), 1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        layers = [layer for layer, _ in points]
        axes.plot(layers, [sum(values) / len(values) for _, values in points], color="#3b6ea5", marker=".")
        if any(len(values) > 1 for _, values in points):
            low, high = ([extreme(values) for _, values in points] for extreme in (min, max))
            axes.fill_between(layers, low, high, color="#3b6ea5", alpha=0.2, linewidth=0)
        axes.set(title=name.replace("_", " "), xlabel="layer")
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _layer_table(series: dict[str, list[tuple[int, list[float]]]]) -> str:
    numbers = sorted({layer for points in series.values() for layer, _ in points})
    if not numbers:
        return ""
    by_layer = {name: dict(points) for name, points in series.items()}
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in ("layer", *series))
    body = "".join(
        f"<tr><td>{number}</td>{''.join(f'<td>{_shown(by_layer[name].get(number))}</td>' for name in series)}</tr>"
        for number in numbers
    )
    return f"<h2>By layer</h2><table><tr>{head}</tr>{body}</table>"


def _shown(values: list[float] | None) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{min(values):.3g} … {max(values):.3g}"
