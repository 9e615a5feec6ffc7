"""What FSDP is told of a mode, against a table that was written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

from precision_core import MODES, Policy
from precision_fsdp import FSDPPrecision, FSDPStrategy
from precision_fsdp.policies import overridden

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

TABLE = {  # mode: param, reduce, buffer, output
    "64-true": (F64, F64, F64, F64),
    "32-true": (F32, F32, F32, F32),
    "16-true": (F16, F16, F16, F32),
    "bf16-true": (BF16, BF16, BF16, F32),
    "16-mixed": (F16, F32, F32, F32),
    "bf16-mixed": (BF16, F32, F32, F32),
    "16-master": (F16, F32, F16, F32),
    "bf16-master": (BF16, F32, BF16, F32),
    "bf16-stochastic": (BF16, BF16, BF16, F32),
    "params=float32,compute=bfloat16,reduce=bfloat16,buffers=float64": (BF16, BF16, F64, F32),
    "params=bfloat16,reduce=float32,output=bfloat16": (BF16, F32, BF16, BF16),
    "params=float32,reduce=bfloat16": (F32, BF16, F32, F32),
}


@pytest.mark.parametrize("mode", TABLE)
def test_the_policy_in_the_words_of_fsdp(mode: str) -> None:
    param, reduce, buffer, output = TABLE[mode]
    plugin = FSDPPrecision(mode)
    config = plugin.setup_mixed_precision_config()
    if mode in ("32-true", "64-true"):
        assert config is None
    else:
        assert isinstance(config, MixedPrecision)
        assert (config.param_dtype, config.reduce_dtype, config.buffer_dtype) == (param, reduce, buffer)
        assert not config.cast_forward_inputs and not config.cast_root_forward_inputs
        assert not config.keep_low_precision_grads
    assert plugin.setup_mixed_precision_policy() == MixedPrecisionPolicy(param, reduce, None, False)
    assert plugin.setup_mixed_precision_policy(root=True) == MixedPrecisionPolicy(param, reduce, output, False)


def test_the_table_has_every_mode() -> None:
    assert TABLE.keys() >= MODES.keys()


@pytest.mark.parametrize(
    ("given", "changed", "lines"),
    [
        (None, {}, []),
        (MixedPrecision(), {}, []),
        (MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32), {}, []),
        (MixedPrecision(param_dtype=BF16, reduce_dtype=BF16, buffer_dtype=BF16), {"reduce": BF16, "buffers": BF16}, 2),
        (MixedPrecisionPolicy(output_dtype=BF16, cast_forward_inputs=True), {"output": BF16}, 1),
    ],
)
def test_what_mixed_precision_says_wins_and_is_named(given: Any, changed: dict[str, Any], lines: Any) -> None:
    policy, notes = overridden(MODES["bf16-mixed"], given)
    expected = Policy("float32", "bfloat16", **changed)
    assert policy == expected
    assert len(notes) == (lines or 0)
    assert all(
        f"{key} in bfloat16 as mixed_precision says, not in float32" in notes[i] for i, key in enumerate(changed)
    )


def test_what_mixed_precision_may_not_say() -> None:
    with pytest.raises(ValueError, match=r"param_dtype=torch\.float16, and this precision computes in torch\.bfloat16"):
        overridden(MODES["bf16-mixed"], MixedPrecision(param_dtype=F16))
    with pytest.raises(ValueError, match=r"mixed_precision='bf16'\): expected torch.distributed.fsdp.MixedPrecision"):
        FSDPStrategy("bf16")  # type: ignore[arg-type]
    for given, name in (
        (MixedPrecision(reduce_dtype=torch.int8), "reduce_dtype=torch.int8"),
        (MixedPrecision(buffer_dtype="bfloat16"), "buffer_dtype=bfloat16"),  # type: ignore[arg-type]
        (MixedPrecisionPolicy(output_dtype=torch.float8_e4m3fn), "output_dtype=torch.float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=f"{name}: allowed are bfloat16, float16, float32, float64"):
            FSDPStrategy(given)
    with pytest.raises(ValueError, match="gradients have the dtype of their parameters"):
        FSDPStrategy(MixedPrecision(keep_low_precision_grads=True))
