"""The commands that the documentation shows: `nemoe…` lines of its code blocks, as lists of words."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r"(<!-- run -->\n)?^```(?:sh|console)\n(.*?)^```|((?:^ {4}.*\n)+)", re.MULTILINE | re.DOTALL)


class ShownCommand(NamedTuple):
    """A command of a page."""

    page: str
    words: tuple[str, ...]
    runs: bool  # whether its block is marked to be run

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def shown_commands(page: Path) -> list[ShownCommand]:
    """The commands of a page, in order. Lines go on behind a backslash; `#` begins a comment."""
    commands = []
    for marked, fenced, indented in _BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in (fenced or indented).replace("\\\n", " ").splitlines():
            if re.match(r"\s*nemoe(-convert|-train)? ", line):
                words = tuple(shlex.split(line, comments=True))
                commands.append(ShownCommand(page.relative_to(ROOT).as_posix(), words, bool(marked)))
    return commands
