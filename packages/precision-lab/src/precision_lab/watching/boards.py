"""TensorBoard and Weights & Biases: the same values as curves, where those are installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from precision_lab.watching.alarms import Alarm


class Board(Protocol):
    """Takes what is written into the file."""

    def step(self, line: dict[str, Any]) -> None:
        """A step's line."""

    def sample(self, line: dict[str, Any]) -> None:
        """A sample's line."""

    def alarm(self, alarm: Alarm) -> None:
        """An alarm."""

    def close(self) -> None:
        """The watch ends."""


class TensorBoard:
    """Writes into a folder by torch's SummaryWriter."""

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "watch(tensorboard=...) needs tensorboard: pip install tensorboard, or leave it out"
            ) from error
        self._writer: Any = SummaryWriter(folder)

    def step(self, line: dict[str, Any]) -> None:
        """Adds loss, norm, scale and skips."""
        for name, value in _of_step(line):
            self._writer.add_scalar(name, value, line["step"])

    def sample(self, line: dict[str, Any]) -> None:
        """Adds each share."""
        for name, value in _of_sample(line):
            self._writer.add_scalar(name, value, line["sample"])

    def alarm(self, alarm: Alarm) -> None:
        """Adds its text."""
        self._writer.add_text("watch/alarm", alarm.text, alarm.step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the writer."""
        self._writer.close()


class WeightsAndBiases:
    """Logs into a run of wandb, which stays open: it is the user's."""

    def __init__(self, run: Any) -> None:
        if run is True:
            try:
                import wandb
            except ImportError as error:
                raise ImportError("watch(wandb=True) needs wandb: pip install wandb, or leave it out") from error
            run = wandb.run
            if run is None:
                raise ValueError("watch(wandb=True): no run is open. Call wandb.init() before, or give the run itself")
        self._run = run
        run.define_metric("watch/step")
        run.define_metric("watch/*", step_metric="watch/step")

    def step(self, line: dict[str, Any]) -> None:
        """Logs loss, norm, scale and skips."""
        self._run.log({"watch/step": line["step"], **dict(_of_step(line))})

    def sample(self, line: dict[str, Any]) -> None:
        """Logs each share."""
        self._run.log({"watch/step": line["sample"], **dict(_of_sample(line))})

    def alarm(self, alarm: Alarm) -> None:
        """Alerts."""
        self._run.alert(title=f"precision watch: {alarm.kind}", text=alarm.text)

    def close(self) -> None:
        """Leaves the run open."""


def _of_step(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key in ("loss", "norm", "scale", "skipped", "seconds"):
        if line.get(key) is not None:
            yield f"watch/{key}", float(line[key])


def _of_sample(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for part in ("modules", "parameters"):
        for name, kinds in line[part].items():
            for kind, seen in kinds.items():
                values = seen if isinstance(seen, dict) else {"share": seen}
                for key, value in values.items():
                    if isinstance(value, float):
                        yield f"watch/{part}/{name or 'model'}/{kind}/{key}", value
