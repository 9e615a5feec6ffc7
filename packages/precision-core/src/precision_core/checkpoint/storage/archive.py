"""The zip file around a checkpoint: every byte that torch would read of it is verified before torch reads.

torch.load checks no checksum: of 1,000 single flipped bits 914 loaded silently wrong. torch writes plain records, one
after another from the first byte to the directory, each stored as it is; whatever differs from that is refused, which
leaves two readers of one file (Python's here, torch's later) nothing to disagree about.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from precision_core.policy.casting import map_tensors

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_HAS_DESCRIPTOR = 0x08
_FLAGS = _HAS_DESCRIPTOR | 0x800  # sizes repeated after the data; names in UTF-8
_CHUNK = 1 << 20


class Damaged(Exception):
    """The file is not what torch.save wrote; says where."""


def verify(file: BinaryIO) -> dict[int, int]:
    """Raises `Damaged`, or what zipfile raises, unless the file is whole; returns offset -> bytes of the records' data.

    It is read in pieces of 1 MiB, not mapped: a file that someone truncates meanwhile ends in an exception here, not in
    a SIGBUS.
    """
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        if len({record.filename.lower() for record in records}) < len(records):
            raise Damaged("two of its records have one name")
        if archive.comment:
            raise Damaged("something follows its directory")
        position, sizes = 0, {}
        for record in records:
            start, position = _verify_record(file, record, position)
            sizes[start] = record.file_size
        if position != archive.start_dir:
            raise Damaged("its records do not fill it")
    return sizes


def verify_storages(content: Any, sizes: dict[int, int]) -> None:
    """Raises `Damaged` unless the tensors in `content`, mapped from the file, have storages that are whole records.

    The pickle says how large they are, and torch takes its word: one with another dtype or number of elements would be
    given a part of its record, or its neighbours.
    """
    storages: set[tuple[int, int]] = set()

    def take(tensor: Tensor) -> Tensor:
        is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if is_plain and tensor.untyped_storage().nbytes():
            storages.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        return tensor

    map_tensors(content, take)
    first = min(storages, default=(0, 0))[0]
    for start in sizes:  # where the file begins in memory is not known, but all storages lie alike from there
        if all(sizes.get(address - first + start) == size for address, size in storages):
            return
    raise Damaged("a tensor is not as large as its record")


def _verify_record(file: BinaryIO, record: zipfile.ZipInfo, position: int) -> tuple[int, int]:
    """Verifies the record that begins at `position`; returns where its data does, and where the next one does."""
    name = record.filename
    plain = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
    # External attributes are the one field that no checksum covers and torch reads: a "folder" is taken for empty.
    if not plain or record.external_attr or record.flag_bits & ~_FLAGS or record.header_offset != position:
        raise Damaged(f"the record {name} does not match its checksum")
    file.seek(position)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size:
        raise Damaged(f"the record {name} is cut off")
    signature, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    same_name = file.read(name_length) == record.orig_filename.encode()
    if signature != b"PK\3\4" or method or flags != record.flag_bits or not same_name:
        raise Damaged(f"the record {name} has another header than the directory says")
    start = file.seek(extra_length, 1)
    checksum, left = 0, record.file_size
    buffer = memoryview(bytearray(min(_CHUNK, left)))
    while left:
        read = file.readinto(buffer[: min(_CHUNK, left)])  # type: ignore[attr-defined]
        if not read:
            raise Damaged(f"the record {name} is cut off")
        checksum = zlib.crc32(buffer[:read], checksum)
        left -= read
    if checksum != record.CRC:
        raise Damaged(f"the record {name} does not match its checksum")
    return start, file.tell() + _descriptor_size(file, record)


def _descriptor_size(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Returns the bytes of the sizes that are repeated after the data: of 32 bits, or of 64 in a large file."""
    if not record.flag_bits & _HAS_DESCRIPTOR:
        return 0
    found = file.read(24)
    file.seek(-len(found), 1)
    for size in ("<2Q", "<2L") if record.file_size < 2**32 else ("<2Q",):
        expected = struct.pack("<4sL", b"PK\7\10", record.CRC) + struct.pack(size, *[record.file_size] * 2)
        if found.startswith(expected):
            return len(expected)
    raise Damaged(f"the record {record.filename} ends with other sizes than the directory says")
