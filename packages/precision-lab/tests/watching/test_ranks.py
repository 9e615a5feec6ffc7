"""Several processes: the rank that went wrong first is named by each rank's file, and no rank waits for another."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import precision_lab
from precision_core.testing import run_in_ranks
from precision_lab.explaining.symptoms import symptoms

STEPS, AT = 5, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        hidden = self.body(x)
        if not factor:
            hidden = torch.sqrt(hidden * factor)  # finite, and its slope is not
        sharp = torch.exp(hidden * factor)  # the fault
        return self.head(sharp)


def train(path: str, bad: tuple[int, ...], fault: str, shard: bool, clip: bool) -> list[tuple[str, int, str, str]]:
    """Trains in a process group of its own. Returns this rank's alarms."""
    dist.init_process_group("gloo")
    found = alarms_of(path, bad, fault, shard, clip)
    gc.collect()  # DDP would take the group down with it, under the lock that the group's threads may wait for
    dist.destroy_process_group()
    return found


def alarms_of(path: str, bad: tuple[int, ...], fault: str, shard: bool, clip: bool) -> list[tuple[str, int, str, str]]:
    """Trains under DDP or FSDP2; in step `AT` the batch of the ranks `bad` has a fault."""
    torch.manual_seed(0)
    model: nn.Module = Net()
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(dist.get_rank())
    with precision_lab.watch(model, optimizer, every=2, file=path) as watched:
        for number in range(1, STEPS + 1):
            x, factor = torch.rand(8, 4), 1.0
            if number == AT and dist.get_rank() in bad:
                if fault == "data":
                    x[2, 1] = torch.nan
                else:
                    factor = {"exp": 1e4, "root": 0.0}[fault]
            loss = model(x, factor).square().mean()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return [
        (alarm.kind, alarm.step, alarm.explanation.kind if alarm.explanation else "", alarm.text)
        for alarm in watched.alarms
    ]


def test_one_rank_alone_under_ddp(tmp_path: Path) -> None:
    path = str(tmp_path / "run.jsonl")
    zero, one = run_in_ranks(2, train, path, (1,), "exp", False, False, timeout=60)
    assert one[0][:3] == ("loss", AT, "overflow in exp")
    # Rank zero sees it in the averaged gradients, and says where that came from.
    assert zero[0][:3] == ("gradients", AT, "another rank")
    assert zero[0][3].endswith(f"before that, rank 1 went wrong, in step {AT}")
    found = symptoms(path)
    assert found.first is not None and (found.first.kind, found.first.rank, found.first.step) == (
        "one rank alone",
        1,
        AT,
    )
    assert found.alarms[0]["rank"] == 1 and found.explanations[0].line is not None
    assert found.explanations[0].line.text == "sharp = torch.exp(hidden * factor)  # the fault"
    last = json.loads(Path(path).read_text().splitlines()[-1])
    assert last["first"]["rank"] == 1 and last["first"]["kind"] == "one rank alone"


@pytest.mark.full
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1)], ids=str)
def test_the_first_rank(tmp_path: Path, bad: tuple[int, ...], shard: bool) -> None:
    path = str(tmp_path / "run.jsonl")
    alarms = run_in_ranks(2, train, path, bad, "data", shard, False, timeout=60)
    assert [bool(each) and each[0][:2] == ("loss", AT) for each in alarms] == [rank in bad for rank in (0, 1)]
    for rank in bad:
        assert alarms[rank][0][2] == "bad data"
    found = symptoms(path)
    assert found.first is not None
    assert (found.first.rank, found.first.step) == (bad[0], AT)
    assert found.first.kind == ("one rank alone" if len(bad) == 1 else "all ranks at once")
    # of the files put together it is the same
    both = tmp_path / "all" / "both.jsonl"
    both.parent.mkdir()
    both.write_text("".join(each.read_text() for each in sorted(tmp_path.glob("run*.jsonl"))))
    assert symptoms(str(both)).first == found.first


@pytest.mark.full
def test_gradients_that_are_not_finite_came_from_another_rank(tmp_path: Path) -> None:
    path = str(tmp_path / "run.jsonl")
    zero, one = run_in_ranks(2, train, path, (1,), "root", False, True, timeout=60)
    assert zero[0][:3] == ("gradients", AT, "another rank") and one[0][:3] == ("gradients", AT, "infinite slope")
    found = symptoms(path)
    assert found.first is not None and (found.first.kind, found.first.rank) == ("one rank alone", 1)
    assert [each["rank"] for each in found.alarms[:2]] == [1, 0]


@pytest.mark.full
def test_fsdp2_reads_the_graph_of_the_loss(tmp_path: Path) -> None:
    path = str(tmp_path / "run.jsonl")
    _, one = run_in_ranks(2, train, path, (1,), "exp", True, False, timeout=60)
    assert one[0][:3] == ("loss", AT, "overflow in exp")
    assert "nothing was run once more" in " ".join(symptoms(path).explanations[0].notes)
