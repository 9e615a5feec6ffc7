import pytest
import torch
from torch import nn

from precision_lab import Task
from precision_lab.loop import Job, Refused, Training
from precision_lab.lora import LoRA
from precision_lab.modes import modes_to_compare, parse_modes
from precision_lab.variants import split_variants, varied


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nf4", ("nf4", ())),
        ("nf4+lora", ("nf4", ("lora",))),
        ("bf16-mixed; *.norm: 32-true + adam8bit + lora", ("bf16-mixed; *.norm: 32-true", ("lora", "adam8bit"))),
    ],
)
def test_split(text, found):
    assert split_variants(text) == found


@pytest.mark.parametrize(
    ("text", "said"), [("nf4+dora", "'dora'; expected one of lora, adam8bit"), ("32-true+lora+lora", "given twice")]
)
def test_what_is_no_variant(text, said):
    with pytest.raises(ValueError, match=said):
        split_variants(text)


def test_a_list_may_name_variants_and_all_has_those_of_installed_modes(install):
    assert modes_to_compare("32+adam8bit+lora,bf16") == ["32-true+lora+adam8bit", "bf16-mixed"]
    assert [mode for mode in modes_to_compare("all") if "+" in mode] == [
        "32-true+lora", "32-true+adam8bit", "bf16-mixed+adam8bit"
    ]  # fmt: skip
    install("mine", "[precision.plugins]\nnf4 = no_such_module:make\n")
    assert "nf4+lora" in modes_to_compare("all")
    assert not any("+" in mode for mode in modes_to_compare(None))


def test_who_takes_precisions_alone_says_what_to_do():
    with pytest.raises(ValueError, match="make the task so, and say '32-true'"):
        parse_modes("32-true+lora")


def make():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    return Task(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda seed: [torch.ones(2, 4)], lambda m, b: m(b).sum()
    )


def test_a_task_is_changed_after_it_is_made():
    assert isinstance(varied(make, ["lora"])().model[0], LoRA)
    assert varied(make, []) is make


def events_of(mode, made=make):
    training = Training(Job(mode, 2, 0, "cpu"), lambda device: made)
    return {
        key: value
        for event in [*training.start(), *training.advance(2), *training.finish()]
        for key, value in event.items()
    }


def test_the_share_that_trains_and_the_bytes_are_those_of_the_adapters():
    plain, lora = events_of("32-true"), events_of("32-true+lora")
    adapters = 8 * (4 + 4) + 8 * (4 + 1)
    assert plain["trains"] == 1.0 and lora["trains"] == adapters / (adapters + 25)
    assert lora["gradient_bytes"] == 4 * adapters and lora["parameter_bytes"] == 4 * (adapters + 25)
    assert [name for name, *_ in lora["noise"]] == ["0", "1"]  # the layers of the plain task


def test_what_the_task_does_not_allow_is_refused_before_the_training():
    def conv():
        model = nn.Conv1d(1, 1, 1)
        return Task(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda seed: [torch.ones(1, 1, 1)],
            lambda m, b: m(b).sum(),
        )

    with pytest.raises(Refused, match="this task trains none"):
        next(Training(Job("32-true+lora", 1, 0, "cpu"), lambda device: conv).start())
