"""Codes and scales against bitsandbytes' own call on the whole weight; floats against the definition."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from precision_bnb import quantize as package_quantize
from precision_bnb.packed import Format, Layout, layout_of
from precision_bnb.quantizing import dequantize, quantize

SHAPES = [(32, 64), (24, 48), (7, 5), (64, 1008), (3, 130), (16, 32), (700, 512), (1, 1), (130, 2048)]
"""Whole blocks in a row, blocks across rows, odd numbers of weights, several chunks."""


def weights(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def defined(layout: Layout, packed: Tensor) -> Tensor:
    """Returns the floats by the definition: value of the code times scale of its block."""
    parts, count = layout.parts(packed), layout.rows * layout.columns
    codes = torch.stack([parts.codes >> 4, parts.codes & 15], 1).flatten()[:count].long()
    scales = parts.scales
    if parts.nested is not None:
        nested = parts.nested.repeat_interleave(256)[: len(scales)]
        scales = bnb.create_dynamic_map()[scales.long()] * nested + parts.offset
    values = bnb.get_4bit_type(layout.format.quant_type, device="cpu")[codes]
    return (values * scales.repeat_interleave(layout.format.block_size)[:count]).view(layout.rows, layout.columns)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["", "dq"])
def test_4_bits_equal_bitsandbytes(shape: tuple[int, int], kind: str, double: bool) -> None:
    for block_size, dtype in ((64, torch.float32), (32, torch.bfloat16), (2048, torch.float16)):
        weight = weights(shape, dtype)
        layout = Layout(Format(kind, block_size, double), *shape)
        packed = quantize(weight, layout.format)
        codes, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=kind, compress_statistics=double)
        parts = layout.parts(packed)
        assert torch.equal(parts.codes, codes.flatten()) and torch.equal(parts.scales, state.absmax)
        if double:
            assert parts.nested is not None and parts.offset is not None
            assert torch.equal(parts.nested, state.state2.absmax) and parts.offset == state.offset
        assert layout_of(packed) == layout
        for floats in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(dequantize(packed, layout, floats), defined(layout, packed).to(floats))


def near(floats: Tensor, weight: Tensor) -> bool:
    return bool((floats - weight).norm() < 0.12 * weight.norm())


TRAPS = [(24, 48), (64, 1008), (16, 32)]
"""Shapes that bitsandbytes' AVX-512 kernel dequantises wrong; on other CPUs it has another."""


@pytest.mark.parametrize("shape", [(32, 64), (7, 5), *TRAPS], ids=str)
def test_where_bitsandbytes_dequantises_right_ours_is_its_own(shape: tuple[int, int]) -> None:
    weight, layout = weights(shape), Layout(Format("nf4"), *shape)
    ours = dequantize(quantize(weight, layout.format), layout, torch.float32)
    theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))
    assert near(ours, weight)
    assert torch.equal(ours, theirs) is near(theirs, weight) and (near(theirs, weight) or shape in TRAPS)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU runs no AVX-512 kernels")
@pytest.mark.parametrize("shape", TRAPS, ids=str)
def test_elsewhere_bitsandbytes_is_wrong(shape: tuple[int, int]) -> None:
    """The second trap. When this fails, bitsandbytes has been mended."""
    weight = weights(shape)
    assert not near(bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4")), weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_8_bits_equal_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = weights(shape)
    layout = Layout(Format("int8"), *shape)
    packed = quantize(weight, layout.format)
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    parts = layout.parts(packed)
    assert torch.equal(parts.codes, codes) and torch.equal(parts.scales, scales)
    floats = dequantize(packed, layout, torch.float32)
    assert torch.allclose(floats, codes * scales[:, None] / 127, rtol=1e-6)
    assert ((floats - weight.half()).abs() <= scales[:, None] / 127 * 0.501).all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_transposed_floats(kind: str) -> None:
    weight = weights((40, 72))
    assert torch.equal(quantize(weight.t(), Format(kind), transposed=True), quantize(weight, Format(kind)))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_storage_dtype_changes_no_byte(kind: str, storage: torch.dtype) -> None:
    weight = weights((7, 5))
    packed, stored = quantize(weight, Format(kind)), quantize(weight, Format(kind, storage=storage))
    assert stored.dtype is storage and torch.equal(stored.view(torch.uint8).flatten(), packed.flatten())
    layout = Layout(Format(kind, storage=storage), 7, 5)
    assert torch.equal(dequantize(stored, layout, torch.float32), dequantize(packed, layout, torch.float32))


def test_bits_per_weight() -> None:
    for kind, double, limit in (("nf4", False, 4.51), ("nf4", True, 4.14), ("int8", False, 8.1)):
        assert quantize(weights((384, 384)), Format(kind, 64, double)).numel() * 8 / 384**2 < limit


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_zeros_stay_zeros(kind: str) -> None:
    weight = weights((8, 64))
    weight[3] = 0
    layout = Layout(Format(kind), 8, 64)
    assert (dequantize(quantize(weight, layout.format), layout, torch.float32)[3] == 0).all()


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_no_numbers_are_refused(kind: str, value: float) -> None:
    weight = weights((8, 64))
    weight[3, 5] = value
    with pytest.raises(ValueError, match="infinite"):
        quantize(weight, Format(kind.removesuffix("-dq"), double_quant="-" in kind))


def test_what_float16_cannot_hold_is_refused_for_int8() -> None:
    with pytest.raises(ValueError, match="at most 65504 in magnitude"):
        quantize(weights((8, 64)) * 1e6, Format("int8"))
    with pytest.raises(ValueError, match="two dimensions"):
        quantize(torch.ones(3), Format("nf4"))


def test_the_footer_tells_packed_weights_from_others() -> None:
    packed = quantize(weights((8, 64)), Format("fp4", 128, True))
    assert layout_of(packed) == Layout(Format("fp4", 128, True), 8, 64)
    for other in (torch.randn(8, 64), packed[:-1], packed[1:], torch.zeros(3, dtype=torch.uint8), packed.to("meta")):
        assert layout_of(other) is None


def test_meta_weights_become_meta_weights() -> None:
    packed = quantize(torch.empty(8, 64, device="meta"), Format("nf4"))
    assert packed.is_meta and packed.shape == quantize(weights((8, 64)), Format("nf4")).shape


def test_the_package_function_is_the_models() -> None:
    assert package_quantize.__module__ == "precision_bnb.convert"
