"""What evaluations, phases and whole runs come to; `as_json` gives what report.json holds.

L layers, E experts.
"""

import dataclasses
from typing import Any

from train.data.packing import Figures


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """An evaluation on the held-out text."""

    loss: float  # nats per token; of pairs the mean of their loss
    perplexity: float | None = None  # of text
    load_max_over_mean: float | None = None  # of a mixture of experts: 1 is perfect balance
    expert_load: list[list[float]] | None = None  # (L, E): share of each layer's choices
    accuracy: float | None = None  # of pairs: share whose chosen response has the larger reward

    def as_json(self) -> dict[str, Any]:
        return _known(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class PhaseResult:
    """What a phase came to."""

    name: str
    accepted: bool  # by its acceptance test
    steps: int
    skipped: int  # steps whose loss or gradient was not finite
    params_trained: int
    tokens_per_second: float | None  # None where no step was timed: the first compiles
    data: list[Figures]  # of each source
    before: HeldOut | None = None
    after: HeldOut | None = None
    adapter: str | None = None  # where it is kept, in the output
    chosen_step: int | None = None  # whose weights the phase ended with

    def as_json(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        before, after, adapter = (plain.pop(name) for name in ("before", "after", "adapter"))
        plain["data"] = [figures._asdict() for figures in self.data]
        return _known(plain) | _losses(before, after) | _known({"adapter": adapter})


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What a run came to; the held-out figures are those of the last accepted phase.

    Where every phase was discarded, the model is what it was, and so is its loss.
    """

    steps: int
    tokens: int
    tokens_per_second: float | None  # as a phase's
    params_total: int
    params_trained: int
    phases: list[PhaseResult]
    seconds: float
    before: HeldOut | None = None
    after: HeldOut | None = None

    def as_json(self) -> dict[str, Any]:
        return self.figures() | {"phases": [phase.as_json() for phase in self.phases]}

    def figures(self) -> dict[str, Any]:
        """All of it but the phases."""
        counts = ("steps", "tokens", "tokens_per_second", "params_total")
        plain = {name: getattr(self, name) for name in counts} | _losses(self.before, self.after)
        return _known(plain) | {"params_trained": self.params_trained, "seconds": self.seconds}


def _losses(before: HeldOut | None, after: HeldOut | None) -> dict[str, Any]:
    losses = {"held_out_loss_before": before and before.loss, "held_out_loss_after": after and after.loss}
    others = after.as_json() if after else {}
    others.pop("loss", None)
    return _known(losses) | others


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
