"""The training loop: a task, through `Fabric`, in one precision; some steps at a time, and it can be saved and go on.

The same seed means the same start for every mode: weights are drawn in float32 and cast afterwards, batches come from
the seed, and generators start anew once everything is set up, whatever a mode drew meanwhile. What then differs between
two modes is the precision and nothing else.
"""

from __future__ import annotations

import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from precision_core import Fabric, Precision
from precision_core.support import is_core_mode, model_fingerprint
from precision_lab.memory import PeakMemory
from precision_lab.results import policy_as_dict
from precision_lab.task import Task, share
from precision_lab.updates import Unchanged
from precision_lab.variants import split_variants, varied

Event = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The arguments of one training run."""

    mode: str
    steps: int
    seed: int
    accelerator: str = "auto"
    devices: int = 1
    """Processes, one a device, that share each batch."""
    strategy: str = "auto"
    task: str = ""
    """The user's, task.py:make; "": the built-in GPT."""
    size: str = "1m"
    """Of the GPT."""
    resume: str = ""
    """A checkpoint to go on from."""
    look: str = "layers"
    """What else to find out: "updates", how many of them round to nothing; "layers", that, and the signal to noise of
    each when it has trained; "": nothing."""


class Refused(Exception):
    """The mode, or a variant, does not go with this task: nothing was trained. The message says why."""


class Training:
    """One run of a job: `start`, `advance` as often as wanted, `finish`; each yields figures as plain values.

    Args:
        prepare: device -> the function that makes the task. What `prepare` itself takes does not count as memory.

    Raises:
        TaskError: from `start`: the user's code raised.
    """

    def __init__(self, job: Job, prepare: Callable[[torch.device], Callable[[], Task]]) -> None:
        self.job = job
        precision, variants = split_variants(job.mode)
        self.fabric = Fabric(job.accelerator, job.strategy, job.devices, precision)
        self.make = varied(prepare(self.fabric.device), variants)
        self.step = 0
        # One thread's CPU time is what its step takes on an idle machine, however many others share this one.
        self._alone = self.fabric.device.type == "cpu" and torch.get_num_threads() == 1 and job.devices == 1
        self._clock = time.process_time if self._alone else time.perf_counter

    def start(self) -> Iterator[Event]:
        """Makes the task and sets it up; yields what runs where, and the policy.

        Raises:
            Refused: it cannot be set up so.
        """
        fabric, job = self.fabric, self.job
        self._memory = PeakMemory(fabric.device)
        fabric.seed_everything(job.seed)
        try:
            self.task = task = self.make()
            self._rates = [float(group["lr"]) for group in task.optimizer.param_groups]
            description = run_metadata(fabric.device, task.model)  # of the whole model, which setup may shard or pack
            self.model, self.optimizer = fabric.setup(task.model, task.optimizer)
        except (ValueError, TypeError, ImportError, NotImplementedError) as error:
            raise Refused(str(error) or type(error).__name__) from error
        trained = sum(param.numel() for param in self.model.parameters() if param.requires_grad)
        # A package's mode may keep elsewhere what rounding takes; and an engine's parameters are not the model's.
        looked_at = job.look and is_core_mode(split_variants(job.mode)[0])
        watched = job.steps if looked_at and job.devices == 1 and job.strategy == "auto" else 0
        self._unchanged = Unchanged(self.model, fabric.precision_plugin.policy, watched) if watched else None
        fabric.seed_everything(job.seed)
        if job.resume:
            rest = fabric.load(job.resume, {"model": self.model, "optimizer": self.optimizer})
            self.step = rest["step"]
            if self._unchanged is not None:
                self._unchanged.sums = rest["unchanged"]
        self._batches = itertools.islice(task.stream(job.seed), self.step, None)
        yield description | {"devices": fabric.world_size, "clock": "cpu" if self._alone else "wall"}
        yield {"policy": policy_as_dict(fabric.precision_plugin.policy)}
        yield {"trains": trained / max(1, description["parameters"])}

    def advance(self, steps: int) -> Iterator[Event]:
        """Trains for so many steps, to the job's last one at most; yields each one's loss and seconds.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        for _ in range(min(steps, self.job.steps - self.step)):
            start = self._clock()
            value = self._one_step()  # waits for the device, so that the time is the step's
            seconds = self._clock() - start
            self.step += 1
            if not math.isfinite(value):
                raise FloatingPointError(f"the training loss is {value} at step {self.step}")
            yield {"step": self.step, "loss": value, "seconds": seconds}

    def _one_step(self) -> float:
        fabric, task, model, optimizer = self.fabric, self.task, self.model, self.optimizer
        batch = share(next(self._batches), fabric.global_rank, fabric.world_size)  # all draw it, each takes its part
        if task.schedule is not None:
            factor = task.schedule(self.step, self.job.steps)
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
        optimizer.zero_grad()
        loss = task.compute_loss(model, fabric.to_device(batch))
        fabric.backward(loss)
        if task.clip_norm is not None:
            fabric.clip_gradients(model, optimizer, max_norm=task.clip_norm)
        with nullcontext() if self._unchanged is None else self._unchanged.sampling(self.step):
            optimizer.step()
        return fabric.all_reduce(loss).item()

    def save(self, path: str) -> None:
        """Writes what `Job.resume` needs."""
        state = {"model": self.model, "optimizer": self.optimizer, "step": self.step}
        self.fabric.save(path, state | {"unchanged": {} if self._unchanged is None else self._unchanged.sums})

    def finish(self) -> Iterator[Event]:
        """Yields bytes, skipped steps, and the held-out loss.

        Raises:
            FloatingPointError: the held-out loss is not finite.
        """
        figures = self._memory_figures()  # read before evaluation, which is not part of training
        # on every rank: each may hold a shard
        held_out_loss = self.task.held_out(self.model, self.fabric.to_device)
        if not math.isfinite(held_out_loss):
            raise FloatingPointError(f"the held-out loss is {held_out_loss} after training")
        yield figures | {"held_out_loss": held_out_loss}
        if self._unchanged is not None:
            yield {"unchanged": [list(each) for each in self._unchanged.counts()]}
        if self.job.look == "layers" and self.job.devices == 1 and self.job.strategy == "auto":
            from precision_lab.probe import noise

            del self.model, self.optimizer, self.task  # two more models come, one after the other
            try:
                yield {"noise": [list(each) for each in noise(self.job, self.make)]}  # lists: events are JSON
            except Exception as error:  # float64 that the device lacks, or has no memory for: the training is done
                yield {"noise": [], "no_noise": f"{type(error).__name__}: {error}".splitlines()[0]}

    def _memory_figures(self) -> Event:
        params = [part for part in map(local_shard, self.model.parameters()) if part.numel()]
        gradients = [local_shard(param.grad) for param in self.model.parameters() if param.grad is not None]
        return {  # of this process; None where an engine does not show what it holds
            "parameter_bytes": sum(param.nbytes for param in params) or None,
            "gradient_bytes": sum(gradient.nbytes for gradient in gradients) or None,
            "optimizer_bytes": optimizer_bytes(self.optimizer) + plugin_bytes(self.fabric.precision_plugin),
            "peak_memory_bytes": self._memory.read(),
            "skipped_steps": self.fabric.precision_plugin.skipped_steps,
        }


def run_metadata(device: torch.device, model: nn.Module) -> dict[str, Any]:
    """Returns device, versions, and the number of parameters."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "parameters": sum(param.numel() for param in model.parameters()),
        "model": model_fingerprint(model),
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of all tensors in the optimizer's state that are in this process; those of shared ones once."""
    values = (value for state in optimizer.state.values() for value in state.values())
    tensors = {id(value): value for value in values if isinstance(value, Tensor)}
    return sum(local_shard(tensor).nbytes for tensor in tensors.values())


def plugin_bytes(precision: Precision) -> int:
    """Returns the bytes of the tensors that a plugin keeps for its steps besides: compensations, for example."""
    return sum(leaf.nbytes for leaf in tree_leaves(precision.state_dict()) if isinstance(leaf, Tensor))


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a tensor, all of a plain one."""
    to_local = getattr(tensor, "to_local", None)  # of a DTensor
    return tensor if to_local is None else to_local()
