"""Progress bars; in a log, where no bar can be drawn, a line now and then."""

import datetime
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 30.0


def progress_bar(*extra_columns: str, visible: bool = True, lines: bool = True) -> Progress:
    """A progress bar on standard error; where that is no terminal, a line for what takes longer than half a minute.

    Args:
        extra_columns: names of task fields.
        lines: False where the caller prints lines of its own.
    """
    console = Console(stderr=True)
    kind = ProgressLines if visible and lines and not console.is_terminal else Progress
    return kind(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(f"{{task.fields[{name}]}}") for name in extra_columns),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (visible and console.is_terminal),
    )


class ProgressLines(Progress):
    """Prints how far a task is, at most once in `SECONDS_BETWEEN_LINES`."""

    def __init__(self, *columns: Any, **settings: Any):
        super().__init__(*columns, **settings)
        self._begun: dict[TaskID, tuple[float, float]] = {}  # when, and what was done then
        self._last_line: dict[TaskID, float] = {}

    def add_task(self, description: str, *args: Any, **settings: Any) -> TaskID:
        task = super().add_task(description, *args, **settings)
        self._last_line[task] = time.monotonic()
        self._begun[task] = self._last_line[task], self._tasks[task].completed
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._print(task_id)

    def _print(self, task_id: TaskID) -> None:
        now, task = time.monotonic(), self._tasks[task_id]
        (begun, done), whole = self._begun[task_id], f" of {task.total:,.0f}" if task.total is not None else ""
        if now - self._last_line[task_id] < SECONDS_BETWEEN_LINES:
            return
        self._last_line[task_id] = now
        line = f"{task.description}: {task.completed:,.0f}{whole}, {_clock(now - begun)} so far"
        if task.total is not None and task.completed > done:
            line += f", {_clock((now - begun) * (task.total - task.completed) / (task.completed - done))} left"
        print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
