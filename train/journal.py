"""What a run tells while it runs: the progress bar, lines where there is no terminal, and train_log.jsonl.

The figures of a step are fetched only when the next one has been started, so that the device never waits for the log.
"""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from nemoe_jax.command import progress_bar

SECONDS_BETWEEN_LINES = 10.0


class Journal:
    """Records steps and evaluations; a context manager around the training loop."""

    def __init__(self, path: Path, steps: int, tokens_per_step: int, log_every: int):
        self.steps, self.tokens_per_step, self.log_every = steps, tokens_per_step, log_every
        self.started = time.monotonic()
        self._log = path.open("w", encoding="utf-8", buffering=1)  # a line is on disk as soon as it is written
        self._bar = progress_bar("loss", "speed", "held_out")
        self._task = self._bar.add_task("train", total=steps, loss="", speed="", held_out="")
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._clock: float | None = None  # when the last step ended; None while compiling or evaluating
        self._timed_steps, self._timed_seconds = 0, 0.0
        self._last_line = self.started

    def __enter__(self) -> "Journal":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._log.close()

    @property
    def seconds(self) -> float:
        """Wall time since the journal was opened."""
        return time.monotonic() - self.started

    @property
    def tokens_per_second(self) -> float:
        """Training speed without the first step (which compiles) and without evaluations; 0 while unknown."""
        return self._timed_steps * self.tokens_per_step / self._timed_seconds if self._timed_steps else 0.0

    def step(self, done: int, figures: dict[str, Any]) -> None:
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

    def evaluated(self, done: int, held_out: dict[str, Any]) -> None:
        """Records a held-out evaluation after `done` steps."""
        self._write(done, {f"held_out_{name}": value for name, value in held_out.items()})
        text = f"held-out {held_out['loss']:.4f}"
        self._bar.update(self._task, held_out=text)
        self._say(f"step {done}/{self.steps}  {text}", now=True)

    def _record(self, done: int, figures: dict[str, Any]) -> None:
        fetched = jax.device_get(figures)  # waits for the step
        values = {name: float(fetched[name]) for name in sorted(fetched, key=lambda name: name != "loss")}  # loss first
        now = time.monotonic()
        if self._clock is not None:
            self._timed_steps += 1
            self._timed_seconds += now - self._clock
        self._clock = now
        if done % self.log_every == 0 or done == self.steps:
            self._write(done, values)
        loss, speed, left = f"loss {values['loss']:.4f}", "", ""
        if self._timed_steps:
            speed = f"{self.tokens_per_second:,.0f} tokens/s"
            left = f"{(self.steps - done) * self._timed_seconds / self._timed_steps:.0f} s left"
        self._bar.update(self._task, completed=done, loss=loss, speed=speed)
        self._say("  ".join(filter(None, (f"step {done}/{self.steps}", loss, speed, left))), now=done == self.steps)

    def _write(self, done: int, values: dict[str, Any]) -> None:
        line = {"step": done, "tokens": done * self.tokens_per_step, "seconds": round(self.seconds, 3), **values}
        self._log.write(json.dumps(line) + "\n")

    def _say(self, line: str, now: bool) -> None:
        """A line on standard error now and then, where there is no progress bar."""
        if self._bar.disable and (now or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            print(line, file=sys.stderr, flush=True)
