"""`nemoe-train sweep`: a recipe at several sizes and learning rates, one after another; a table and a picture.

Every run is an ordinary one, in a directory of its own. One that diverges is reported and the others go on; given
again, the command takes finished runs as they are and goes on with the rest.
"""

import html
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from nemoe_jax.errors import ResumableError, UserError
from nemoe_jax.utils.html_page import html_page, picture
from nemoe_jax.utils.output_path import atomic_write
from train.recipe import Recipe, read_recipe
from train.run.loop import REPORT, train
from train.run.prepare import resolve

TABLE, PAGE = "sweep.json", "sweep.html"
Row = dict[str, Any]


def sweep(name: str, overrides: Sequence[str], sizes: Sequence[str], rates: Sequence[float], output: Path) -> list[Row]:
    """Runs all of them; returns the table.

    Args:
        name: a recipe, which has data.held_out to compare by.
        sizes: of each size its overrides, with commas between; none is the recipe's own.
        rates: peak learning rates.

    Raises:
        UserError: bad keys or input of any of the runs, found before the first one begins.
    """
    planned: list[tuple[str, float, Recipe]] = []
    for number, size in enumerate(sizes or [""]):
        for rate in rates:
            own = [f"output={output / f'{number}-{rate:g}'}", f"optimizer.learning_rate={rate!r}"]
            planned.append((size, rate, read_recipe(name, [*overrides, *filter(None, size.split(",")), *own])))
    for _, _, recipe in planned:
        if not recipe.phases[-1].data.held_out:
            raise UserError(f"{name}: data.held_out: expected one for a sweep to compare by")
        if not recipe.output.exists():
            resolve(recipe)
    rows = [_row(size, rate, recipe) for size, rate, recipe in planned]
    if jax.process_index() == 0:
        _write(output, rows)
    return rows


def _row(size: str, rate: float, recipe: Recipe) -> Row:
    row: Row = {"size": size or "recipe", "learning_rate": rate, "directory": recipe.output.name}
    try:
        if not recipe.output.exists():
            train(recipe)
        report = json.loads((recipe.output / REPORT).read_text("utf-8"))
    except ResumableError as error:
        return row | {"diverged": str(error)}
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{recipe.output}: not a finished run: {error}") from error
    row["params_total"] = report["params_total"]
    before, after = (report.get(f"held_out_loss_{when}", math.nan) for when in ("before", "after"))
    if not after <= before:  # NaN as well
        return row | {"diverged": f"held-out loss {before:.4f} -> {after:.4f}"}
    return row | {"held_out_loss": after}


def render(rows: Sequence[Row]) -> Iterator[str]:
    """The table as lines to read."""
    yield f"{'held-out loss':>13}  {'learning rate':>13}  size"
    for row in rows:
        loss = f"{row['held_out_loss']:.4f}" if "held_out_loss" in row else "diverged"
        yield f"{loss:>13}  {row['learning_rate']:>13g}  {row['size']}"


def _write(output: Path, rows: list[Row]) -> None:
    from matplotlib.figure import Figure  # half a second to import

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for size in dict.fromkeys(row["size"] for row in rows):
        own = [row for row in rows if row["size"] == size]
        points = sorted((row["learning_rate"], row.get("held_out_loss", math.nan)) for row in own)
        axes.plot(*zip(*points, strict=True), marker="o", label=size)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss, nats per token")
    axes.legend()
    lines = "\n".join(render(rows))
    with atomic_write(output / "sweep.png") as png:
        figure.savefig(png, format="png", dpi=100)
        content = html_page(
            "Sweep", f"<pre>{html.escape(lines)}</pre>", picture(png.read_bytes(), "loss by learning rate")
        )
    with atomic_write(output / TABLE) as table, atomic_write(output / PAGE) as page:
        table.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
        page.write_text(content, "utf-8")
