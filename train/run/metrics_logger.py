"""What a run tells while it runs: the progress bar, lines where there is no terminal, train_log.jsonl, TensorBoard.

The figures of a step are fetched only when the next one has been started, so that the device never waits for the log.
train_log.jsonl is also the run's memory of what was measured: a run that is taken up again reads it back and goes on
behind its last checkpoint.
"""

import dataclasses
import json
import math
import resource
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from nemoe_jax.errors import UserError
from nemoe_jax.utils.progress import progress_bar
from train.recipe import Recipe
from train.run.results import HeldOut

LOG = "train_log.jsonl"
TENSORBOARD = "tensorboard"
HELD_OUT = "held_out_"
SECONDS_BETWEEN_LINES = 10.0
Line = dict[str, Any]


class MetricsLogger:
    """Records the steps and evaluations of all phases; use it as a context around the run."""

    def __init__(self, directory: Path, recipe: Recipe):
        """Opens the log in a directory, which may hold that of an earlier attempt. Only one process writes."""
        self._path, self._writes = directory / LOG, jax.process_index() == 0
        self.lines = read_log(self._path)
        self._earlier = max((line["seconds"] for line in self.lines), default=0.0)  # of earlier attempts
        self._started = time.monotonic()
        self.recipe, self._phase, self.steps, self.tokens_per_step = recipe, "", 0, 0
        self.skipped_in_row = 0
        self._bar = progress_bar("loss", "speed", "held_out", lines=False)
        self._pending: tuple[int, Line] | None = None
        self._clock: float | None = None  # when the last step ended; None while compiling or evaluating
        self._timed_steps, self._timed_seconds = 0, 0.0
        self._last_line = self._started
        self._boards = _boards(directory, recipe) if self._writes else []

    def __enter__(self) -> "MetricsLogger":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        for _, close in self._boards:
            close()

    def begin(self, phase: str, done: int, offset: int, tokens_per_step: int, seconds_per_token: float | None) -> None:
        """Starts a phase, or takes it up again behind step `done`; what the log says of later steps is dropped.

        Args:
            offset: steps of the phases before.
            seconds_per_token: what a token takes the devices at their peak, for the MFU; None where that is not known.
        """
        order = [other.name for other in self.recipe.phases]
        self._phase, self.steps = phase, self.recipe.phases[order.index(phase)].steps
        self.tokens_per_step, self._offset, self._seconds_per_token = tokens_per_step, offset, seconds_per_token
        now, self.skipped_in_row = order.index(phase), 0
        self._pending = self._clock = None
        self._timed_steps, self._timed_seconds = 0, 0.0

        def stays(line: Line) -> bool:
            at = order.index(line["phase"])
            return at < now or (done > 0 and at == now and line["step"] <= done) or (at > now and done == self.steps)

        self.lines = [line for line in self.lines if stays(line)]
        if self._writes:
            new = self._path.with_suffix(".new")  # the log is whole at any time
            new.write_text("".join(json.dumps(line) + "\n" for line in self.lines), "utf-8")
            new.replace(self._path)
        self._task = self._bar.add_task(phase, total=self.steps, completed=done, loss="", speed="", held_out="")

    @property
    def seconds(self) -> float:
        """Wall time of the run, with that of earlier attempts."""
        return self._earlier + time.monotonic() - self._started

    @property
    def tokens_per_second(self) -> float:
        """The phase's speed without the first step (which compiles) and without evaluations; 0 while unknown."""
        return self._timed_steps * self.tokens_per_step / self._timed_seconds if self._timed_steps else 0.0

    def evaluations(self, phase: str) -> dict[int, HeldOut]:
        """{step: held-out figures} of a phase."""
        names = [field.name for field in dataclasses.fields(HeldOut)]
        return {
            line["step"]: HeldOut(**{name: line[HELD_OUT + name] for name in names if HELD_OUT + name in line})
            for line in self.lines
            if line["phase"] == phase and f"{HELD_OUT}loss" in line
        }

    def step(self, done: int, figures: Line) -> None:
        """Takes the figures, still on the device, of the step that makes `done` steps."""
        previous, self._pending = self._pending, (done, figures)
        if previous:
            self._record(*previous)

    def flush(self) -> None:
        """Waits for the last step and records it; the clock of the training speed stands until `resume`."""
        if self._pending:
            self._record(*self._pending)
        self._pending = self._clock = None

    def resume(self) -> None:
        """Starts the clock of the training speed again."""
        self._clock = time.monotonic()

    def evaluated(self, done: int, held_out: HeldOut) -> None:
        """Records a held-out evaluation after `done` steps."""
        self._write(done, {HELD_OUT + name: value for name, value in held_out.as_json().items()})
        text = f"held-out {held_out.loss:.4f}"
        self._bar.update(self._task, held_out=text)
        self.say(f"{self._phase}: step {done}/{self.steps}  {text}", now=True)

    def say(self, line: str, now: bool = True) -> None:
        """A line on standard error; in the midst of steps only now and then, and not beside a progress bar."""
        if not self._writes:
            return
        if not self._bar.disable:
            if now:
                self._bar.console.print(line, highlight=False)
        elif now or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def _record(self, done: int, figures: Line) -> None:
        fetched = jax.device_get(figures)  # waits for the step
        values = {name: float(fetched[name]) for name in sorted(fetched, key=lambda name: name != "loss")}  # loss first
        skipped = bool(values.pop("skipped"))
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        now = time.monotonic()
        if self._clock is not None:
            self._timed_steps += 1
            self._timed_seconds += now - self._clock
        self._clock = now
        loss, speed, left = f"loss {values['loss']:.4f}", "", ""
        rate = self.tokens_per_second
        if rate:
            values["tokens_per_second"] = round(rate, 1)
            speed = f"{rate:,.0f} tokens/s"
            left = f"{(self.steps - done) * self._timed_seconds / self._timed_steps:.0f} s left"
            if self._seconds_per_token:
                values["mfu"] = round(rate * self._seconds_per_token, 4)
                speed += f"  MFU {values['mfu']:.0%}"
        values["memory_gb"] = round(memory_bytes() / 1e9, 3)
        if skipped:
            self._write(done, values | {"skipped": True})
            self.say(f"warning: {self._phase}: step {done}: gradient not finite; skipped")
        elif done % self.recipe.log_every == 0 or done == self.steps:
            self._write(done, values)
        self._bar.update(self._task, completed=done, loss=loss, speed=speed)
        self.say("  ".join(filter(None, (f"{self._phase}: step {done}/{self.steps}", loss, speed, left))), now=False)

    def _write(self, done: int, values: Line) -> None:
        line = {"phase": self._phase, "step": done, "seconds": round(self.seconds, 3), **values}
        self.lines.append(line)
        if self._writes:
            with self._path.open("a", encoding="utf-8") as log:  # on its way to the disk as soon as it is written
                log.write(json.dumps(line) + "\n")
        numbers = {f"{self._phase}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        for write, _ in self._boards:
            write(self._offset + done, numbers)


def read_log(path: Path) -> list[Line]:
    """The lines of a log, but for one that was cut short."""
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def memory_bytes() -> int:
    """Peak memory of the first local device, or of the process where devices do not tell (CPU)."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return statistics.get("peak_bytes_in_use", resident)


def _boards(directory: Path, recipe: Recipe) -> list[tuple[Callable[[int, Line], None], Callable[[], None]]]:
    """(write, close) of TensorBoard, and of Weights & Biases where the recipe names a project."""
    from tensorboardX import SummaryWriter

    tensorboard = SummaryWriter(str(directory / TENSORBOARD))

    def write(step: int, numbers: Line) -> None:
        for name, value in numbers.items():
            if math.isfinite(value):
                tensorboard.add_scalar(name, value, step)

    boards: list[tuple[Callable[[int, Line], None], Callable[[], None]]] = [(write, tensorboard.close)]
    if recipe.wandb:
        try:
            import wandb
        except ImportError as error:
            raise UserError("wandb: expected the package wandb, which is not installed: pip install wandb") from error
        name = directory / "wandb-run"  # the same one when the training goes on
        if not name.exists():
            name.write_text(uuid.uuid4().hex, "utf-8")
        run = wandb.init(
            project=recipe.wandb,
            name=recipe.output.name,
            dir=str(directory),
            id=name.read_text("utf-8"),
            resume="allow",
        )
        boards.append((lambda step, numbers: run.log(numbers, step=step), run.finish))
    return boards
