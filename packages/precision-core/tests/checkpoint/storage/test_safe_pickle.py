"""Pickles that are read without executing them: hostile ones are refused, the real ones of torch come out equal."""

from __future__ import annotations

import collections
import copyreg
import functools
import io
import logging
import operator
import os
import pickle
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from precision_core.checkpoint.error import CheckpointError
from precision_core.checkpoint.storage.chunks import ALLOWED, parse
from precision_core.checkpoint.storage.safe_pickle import Call, Record, loads

METADATA = "torch.distributed.checkpoint.metadata"

# ---------------------------------------------------------------- hostile ones


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def stock(path: Path) -> Metadata:
    """Returns what torch itself writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {
            "model": {"weight": torch.ones(2, 3, dtype=torch.bfloat16), "scale": torch.tensor(1.0)},
            "image": torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last),
            "groups": [{"lr": 0.1, "values": [torch.ones(1)]}],
            "mask": torch.ones(2, dtype=torch.bool),
        }
        dcp.save(state, checkpoint_id=path, no_dist=True)
    return pickle.loads((path / ".metadata").read_bytes())


def replaced(metadata: Metadata, **fields: Any) -> bytes:
    vars(metadata).update(fields)
    return pickle.dumps(metadata)


PROTO4, PROTO2, STOP = b"\x80\x04", b"\x80\x02", b"."


def write_call(path: str) -> bytes:
    """Pushes what `open(path, "w")` returns."""
    return name("io", "open") + text(path) + text("w") + b"\x86R"


def torch_file(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


# Each makes a file at `path` when Python's pickle reads it.
HOSTILE: dict[str, Callable[[str], bytes]] = {
    **{
        f"reduce, protocol {number}": lambda path, number=number: pickle.dumps(Calls(open, path, "w"), number)
        for number in range(6)
    },
    **{
        function.__qualname__ + f" of {function.__module__}": lambda path, function=function, args=args: pickle.dumps(
            Calls(function, *[path if argument == "PATH" else argument.replace("PATH", path) for argument in args])
        )
        for function, args in [
            (os.system, ["touch PATH"]),
            (os.mkdir, ["PATH"]),
            (eval, ["open('PATH', 'w').close()"]),
            (exec, ["open('PATH', 'w').close()"]),
            (io.FileIO, ["PATH", "w"]),
            (os.makedirs, ["PATH"]),
            (shutil.copyfile, [__file__, "PATH"]),
            (os.mkfifo, ["PATH"]),
            (logging.FileHandler, ["PATH"]),
            (sqlite3.connect, ["PATH"]),
            (torch.save, ["x", "PATH"]),
        ]
    },
    "protocol 0 by hand": lambda path: b"cos\nsystem\n(S'touch " + path.encode() + b"'\ntR.",
    "INST": lambda path: b"(S'" + path.encode() + b"'\nS'w'\niio\nopen\n.",
    "OBJ": lambda path: b"(cio\nopen\nS'" + path.encode() + b"'\nS'w'\no.",
    "NEWOBJ of partial, then called": lambda path: (
        PROTO4 + name("functools", "partial") + name("io", "open") + text(path) + text("w") + b"\x87\x81)R."
    ),
    "NEWOBJ_EX": lambda path: (
        PROTO4
        + name("functools", "partial")
        + name("io", "open")
        + text(path)
        + b"\x86}"
        + text("mode")
        + text("w")
        + b"s\x92)R."
    ),
    "NEWOBJ of map": lambda path: (
        PROTO4
        + name("builtins", "list")
        + name("builtins", "map")
        + name("io", "open")
        + b"]"
        + text(path)
        + b"a]"
        + text("w")
        + b"a\x87\x81\x85R."
    ),
    "getattr of a module": lambda path: (
        PROTO4
        + name("builtins", "getattr")
        + name("importlib", "import_module")
        + text("os")
        + b"\x85R"
        + text("mkdir")
        + b"\x86R"
        + text(path)
        + b"\x85R."
    ),
    "__import__": lambda path: (
        PROTO4
        + name("builtins", "getattr")
        + name("builtins", "__import__")
        + text("os")
        + b"\x85R"
        + text("mkdir")
        + b"\x86R"
        + text(path)
        + b"\x85R."
    ),
    "methodcaller": lambda path: (
        PROTO4
        + name("operator", "methodcaller")
        + text("touch")
        + b"\x85R"
        + name("pathlib", "Path")
        + text(path)
        + b"\x85R\x85R."
    ),
    "functools.reduce": lambda path: pickle.dumps(Calls(functools.reduce, open, [path, "w"])),
    "a name from the memo": lambda path: (
        PROTO4 + text("open") + b"\x94" + text("io") + b"\x9400h\x01h\x00\x93" + text(path) + text("w") + b"\x86R."
    ),
    "a computed name": lambda path: (
        PROTO4
        + text("io")
        + name("builtins", "str")
        + b"C\x04open"
        + text("ascii")
        + b"\x86R\x93"
        + text(path)
        + text("w")
        + b"\x86R."
    ),
    "a dotted name under an allowed module": lambda path: PROTO4 + name(METADATA, "os.mkdir") + text(path) + b"\x85R.",
    "a dotted name under torch": lambda path: PROTO4 + name("torch", "os.mkdir") + text(path) + b"\x85R.",
    "a method of an allowed class": lambda path: (
        PROTO4 + name("pathlib", "PosixPath.touch") + name("pathlib", "PosixPath") + text(path) + b"\x85R\x85R."
    ),
    "called, then popped": lambda path: PROTO4 + write_call(path) + b"0" + pickle.dumps(Metadata({}))[2:],
    "called, then under the value": lambda path: PROTO4 + write_call(path) + pickle.dumps(Metadata({}))[2:],
    "below a mark that is popped": lambda path: (
        PROTO4 + b"(" + write_call(path) + b"1" + pickle.dumps(Metadata({}))[2:]
    ),
    "__setstate__ set by BUILD": lambda path: (
        PROTO4
        + name(METADATA, "Metadata")
        + b")\x81}"
        + text("__setstate__")
        + name("os", "mkdir")
        + b"sb"
        + text(path)
        + b"b."
    ),
    "slots set by BUILD": lambda path: (
        PROTO4
        + name(METADATA, "StorageMeta")
        + b")\x81N}"
        + text("__setstate__")
        + name("os", "mkdir")
        + b"s\x86b"
        + text(path)
        + b"b."
    ),
    "append that is a function": lambda path: (
        PROTO4
        + name(METADATA, "StorageMeta")
        + b")\x81}("
        + text("append")
        + name("os", "mkdir")
        + b"ub"
        + text(path)
        + b"a."
    ),
    "an extension code": lambda path: PROTO4 + b"\x82\xf0" + text(path) + text("w") + b"\x86R.",
    "an extension code, two bytes": lambda path: PROTO4 + b"\x83\xf0\x00" + text(path) + text("w") + b"\x86R.",
    "an extension code, four bytes": lambda path: PROTO4 + b"\x84\xf0\x00\x00\x00" + text(path) + text("w") + b"\x86R.",
    "a pickle in a pickle": lambda path: pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(open, path, "w")))),
    "torch.load": lambda path: pickle.dumps(
        Calls(functools.partial(torch.load, weights_only=False), Calls(io.BytesIO, torch_file(Calls(open, path, "w"))))
    ),
    "in the planner's data": lambda path: replaced(Metadata({}), planner_data={"x": Calls(open, path, "w")}),
    "in the storage's data": lambda path: replaced(Metadata({}), storage_data={"x": Calls(open, path, "w")}),
    "as the folder's name": lambda path: replaced(
        Metadata({}),
        storage_meta=StorageMeta(Calls(open, path, "w")),  # type: ignore[arg-type]
    ),
    "as a dict's key": lambda path: replaced(Metadata({}), planner_data={Calls(open, path, "w"): 1}),
    "in an ordered dict": lambda path: pickle.dumps(collections.OrderedDict(a=Calls(open, path, "w"))),
}


@pytest.fixture
def extension() -> Any:
    copyreg.add_extension("io", "open", 0xF0)
    pickle.loads(PROTO4 + b"\x82\xf0.")  # from now on the code is in a cache, and find_class never hears of it
    yield
    copyreg.remove_extension("io", "open", 0xF0)
    copyreg.clear_extension_cache()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_and_not_executed(kind: str, tmp_path: Path, extension: None) -> None:
    victim = tmp_path / "x"
    data = HOSTILE[kind](str(victim))
    for allowed in (ALLOWED, {}):
        with pytest.raises(CheckpointError, match="pickle"):
            loads(data, allowed)
        assert not victim.exists()
    try:
        loads(data, ALLOWED, trust=True)
    except Exception as error:
        print(error)  # some have done their harm before they fail
    assert victim.exists(), "this variant does no harm to Python's pickle, and tests nothing"


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 45


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "none|damaged"),
        (b"Pabc\n.", "the opcode PERSID"),
        (PROTO4 + text("x") + b"Q.", "the opcode BINPERSID"),
        (torch_file({"x": 1}), "damaged pickle, or none|opcode"),
        (torch_file({"x": 1}, _use_new_zipfile_serialization=False), "more in it than one value"),
        (PROTO4 + b"N.N.", "more in it than one value"),
        (PROTO4 + b"NN.", "more in it than one value"),
        (PROTO4 + b"(N.", "more in it than one value"),
        (PROTO4 + b"N", "damaged pickle"),
        (PROTO4 + b".", "more in it than one value"),
        (PROTO4 + b"]h\x00.", "IndexError"),
        (PROTO4 + b"(\x94.", "IndexError"),
        (PROTO4 + b"](a.", "IndexError: the stack is empty"),
        (PROTO4 + name("torch", "Size") + b"N\x85R.", "TypeError"),
        (PROTO4 + name("torch", "Size") + text("x") + b"R.", "calls a Call"),
        (PROTO4 + name("torch", "float32") + b")R.", "calls a dtype"),
        (PROTO4 + name(METADATA, "Metadata") + b")R.", "calls a Record"),
        (PROTO4 + name(METADATA, "Metadata") + b"N\x85\x81.", "makes an object of a Record"),
        (PROTO4 + name("torch", "Size") + b")\x81.", "makes an object of a Call"),
        (
            PROTO4 + name(METADATA, "Metadata") + b")\x81}b.",
            "'state_dict_metadata' is missing, unknown or of another type",
        ),
        (PROTO4 + name(METADATA, "StorageMeta") + b")\x81]b.", "sets the attributes of a StorageMeta to a list"),
        (PROTO4 + b"N}b.", "sets attributes of a NoneType"),
        (PROTO4 + name(METADATA, "StorageMeta") + b"N}" + text("x") + b"Ns\x86b.", "sets attributes of a Record"),
        (PROTO4 + name(METADATA, "StorageMeta") + text("x") + b"a.", "appends to a Record"),
        (PROTO4 + b"]" + text("x") + b"Ns.", "sets items of something else"),
        (PROTO4 + b"})Ns.", "sets items of something else"),
        (PROTO4 + b"NN\x93.", "a global whose name is none"),
        (PROTO4 + name("torch", "float33") + b".", "asks for torch.float33, which is not allowed"),
        (PROTO4 + name("torch.serialization", "_get_layout") + text("torch.jagged") + b"\x85R.", ""),
    ],
)
def test_what_is_no_record_is_refused(data: bytes, message: str) -> None:
    if not message:
        assert loads(data, ALLOWED) is None
        return
    with pytest.raises(CheckpointError, match=message):
        loads(data, ALLOWED)


def test_classes_stay_as_they_are() -> None:
    """Python's pickle sets attributes of the very class, for the whole process, with nothing but allowed names."""
    data = PROTO4 + name(METADATA, "StorageMeta") + b"N}" + text("save_id") + text("changed") + b"s\x86b."
    with pytest.raises(CheckpointError, match="sets attributes of a Record"):
        loads(data, ALLOWED)
    assert StorageMeta.save_id is None


def test_what_never_ends_is_refused_at_once() -> None:
    """The hash, the text and the comparison of a tuple that holds itself twice, 60 levels deep, take years."""
    bomb = b"N\x94" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(60))
    head = PROTO4 + bomb
    for data in (
        head + b"}h\x3cNs.",
        head + name("torch", "Size") + b"h\x3c\x85R.",
        head + name("pathlib", "PosixPath") + b"h\x3c\x85R.",
        head + name("torch.serialization", "_get_layout") + b"h\x3c\x85R0.",
        head + name(METADATA, "_MEM_FORMAT_ENCODING") + b"h\x3c\x85R.",
        head + name("torch", "Size") + b"h\x3c\x93.",
        head + name(METADATA, "MetadataIndex") + b")\x81}" + text("fqn") + b"h\x3csb.",
        head + b".",
    ):
        with pytest.raises(CheckpointError):
            loads(data, ALLOWED)


# ---------------------------------------------------------------- real ones


def test_the_metadata_that_torch_writes_comes_out_equal(tmp_path: Path) -> None:
    expected = stock(tmp_path)
    read = parse((tmp_path / ".metadata").read_bytes())
    assert read.state_dict_metadata == expected.state_dict_metadata
    assert read.storage_data == expected.storage_data and read.planner_data == expected.planner_data
    assert read.version == expected.version and read.storage_meta is not None
    assert read.storage_meta.save_id == expected.storage_meta.save_id
    assert type(read.state_dict_metadata["model.weight"].size) is torch.Size
    assert read.state_dict_metadata["image"].properties.memory_format is torch.contiguous_format


def test_every_protocol_from_4_on_and_every_dtype() -> None:
    for value in vars(torch).values():
        if isinstance(value, torch.dtype):
            for protocol in range(4, pickle.HIGHEST_PROTOCOL + 1):
                assert loads(pickle.dumps([value], protocol), ALLOWED) == [value]


def test_plain_values_come_out_equal() -> None:
    value = {
        "a": [1, -5, 2**40, -(2**900), "ä" * 300, None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        7: {},
    }
    assert loads(pickle.dumps(value), {}) == value
    twice = loads(pickle.dumps([value, value]), {})
    assert twice[0] is twice[1]


def test_a_table_of_ones_own() -> None:
    index = MetadataIndex("x", (1, 2))
    table = {
        f"{METADATA}.MetadataIndex": Record(MetadataIndex, {"fqn": (str,), "offset": (tuple,), "index": (type(None),)})
    }
    table["torch.Size"] = Call(tuple)
    table[f"{_StorageInfo.__module__}._StorageInfo"] = 5
    read = loads(pickle.dumps({index: _StorageInfo}), table)
    assert list(read.values()) == [5]
    assert type(next(iter(read)).offset) is tuple


def test_another_type_than_metadata() -> None:
    with pytest.raises(CheckpointError, match=r"a list is not what \.metadata holds"):
        parse(pickle.dumps([1]))


def test_trust_is_plain_pickle() -> None:
    assert loads(pickle.dumps(operator.add), {}, trust=True) is operator.add
