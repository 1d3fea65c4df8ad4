"""Reports as one self-contained HTML page: a title, tables, pictures."""

import base64
import html
from collections.abc import Mapping
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem } img { max-width: 100% }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } .discarded { color: #b5413b }
"""


def html_page(title: str, *parts: str) -> str:
    """A page of parts that are HTML already."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{STYLE}</style>
<h1>{html.escape(title)}</h1>
{"".join(parts)}
</html>
"""


def table(title: str, figures: Mapping[str, Any]) -> str:
    """A heading and a table of names and values; nothing where there are none."""
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(text(value))}</td></tr>"
        for name, value in figures.items()
    )
    return f"<h2>{title}</h2><table>{rows}</table>" if rows else ""


def picture(png: bytes, name: str) -> str:
    """A picture within the page."""
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def text(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:,.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
