"""A comparison of tokenizers as a table in the terminal and as a plot."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemoe_jax.errors import UserError
from nemoe_jax.evaluation.tokenizer_stats import Count
from nemoe_jax.utils.output_path import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#3b6ea5", "#c8553d", "#4f8a4f", "#c79a3a", "#7a5c99", "#777777")
FORMATS = (".png", ".svg")
BARS_WITH_LABELS = 40
SHORT = 6  # characters, of names that fit side by side
WIDE = 200  # columns, where standard output is no terminal


def print_table(groups: Mapping[str, Count], names: Sequence[str]) -> None:
    """A row for each tokenizer of each group; words are left out where a language has none."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("text", overflow="fold")
    table.add_column("chars", justify="right", no_wrap=True)
    table.add_column("tokenizer", overflow="fold")
    for title in ("tokens", "/char", "/word", "/byte", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    for group, count in groups.items():
        for i, (name, tokens) in enumerate(zip(names, count.tokens, strict=True)):
            text = (Text(group), f"{count.characters:,}") if i == 0 else ("", "")  # Text: no markup in a file's name
            per_unit = (_share(tokens, size) for size in (count.characters, count.words, count.bytes))
            ratio = count.ratio(i)
            table.add_row(*text, Text(name), f"{tokens:,}", *per_unit, "–" if ratio is None else f"{ratio:.2f}")
        table.add_section()
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    console.print(table)
    console.print(Text(f"tokens per character, word and byte; ratio: tokens over those of {names[0]}", style="dim"))


def _share(tokens: int, size: int | None) -> str:
    return f"{tokens / size:.3f}" if size else "–"


def draw(groups: Mapping[str, Count], names: Sequence[str]) -> "Figure":
    """Bars of the ratio: a cluster for each group, a bar in it for each tokenizer but the first (the line at 1)."""
    import matplotlib  # half a second to import
    from matplotlib.figure import Figure

    others = range(1, len(names))
    width, slant = 0.8 / len(others), 90 if len(others) > 1 else 0
    figure = Figure(figsize=(max(4.0, 1.5 + 0.45 * len(groups) * len(others) ** 0.5), 3.2), layout="constrained")
    with matplotlib.rc_context({"text.parse_math": False}):  # a file's name may hold dollars
        axes = figure.subplots()
        for i in others:
            left = [place - 0.4 + width * (i - 1) for place in range(len(groups))]
            heights = [count.ratio(i) or 0 for count in groups.values()]
            color = COLORS[(i - 1) % len(COLORS)]
            bars = axes.bar(left, heights, width, align="edge", color=color, label=names[i])
            if len(groups) * len(others) <= BARS_WITH_LABELS:
                axes.bar_label(bars, fmt="%.2f", fontsize=7, color="white", label_type="center", rotation=slant)
        axes.axhline(1, color="#222222", linewidth=1, zorder=0)
        long = max(map(len, groups)) > SHORT
        axes.set_xticks(range(len(groups)), list(groups), rotation=40 if long else 0, ha="right" if long else "center")
        axes.set_ylabel(f"tokens, times those of\n{names[0]}")
        add_legend(axes)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def add_legend(axes: "Axes") -> None:
    """Says above the bars whose they are."""
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def check_plot(path: Path) -> None:
    """Raises UserError where `write_plot` could not write, before any text is counted."""
    if path.suffix not in FORMATS:
        raise UserError(f"--plot {path}: expected a file name in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: no such directory")


def write_plot(figure: "Figure", path: Path) -> None:
    """Writes a PNG or an SVG, whole or not at all; the same figure always gives the same bytes."""
    import matplotlib

    undated = {"Date": None} if path.suffix == ".svg" else None
    # in an SVG, text stays text, and names are not random
    with atomic_write(path) as partial, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemoe"}):
        figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata=undated)
