"""The config that the engine gets: what a policy adds, and what contradicts it."""

from __future__ import annotations

from typing import Any

import pytest

from precision_deepspeed import deepspeed_config

TRUE = "params=bfloat16,master=float32"


def test_it_turns_off_what_nobody_asked_for() -> None:
    config = deepspeed_config("32-true")
    assert config["gradient_clipping"] == 0.0 and config["gradient_accumulation_steps"] == 1
    assert config["communication_data_type"] == "fp32" and config["zero_allow_untested_optimizer"] is True
    assert not config.keys() & {"fp16", "bf16", "torch_autocast"}


@pytest.mark.parametrize(
    ("policy", "section", "options", "reduce"),
    [
        ("bf16-mixed", "torch_autocast", {"dtype": "bfloat16", "lower_precision_safe_modules": []}, "fp32"),
        ("16-mixed", "torch_autocast", {"dtype": "float16", "lower_precision_safe_modules": []}, "fp32"),
        ("bf16-true", "bf16", {}, "bf16"),
        (TRUE, "bf16", {}, "bf16"),
        ("params=bfloat16,reduce=float32", "bf16", {}, "fp32"),
    ],
)
def test_a_mode_is_one_section(policy: str, section: str, options: dict[str, Any], reduce: str) -> None:
    config = deepspeed_config(policy, {"zero_optimization": {"stage": 2}})
    assert config[section] == {"enabled": True, **options}
    assert len(config.keys() & {"fp16", "bf16", "torch_autocast"}) == 1
    assert config["communication_data_type"] == reduce


def test_what_the_user_says_stays() -> None:
    mine = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "fp16": {"initial_scale_power": 8, "loss_scale_window": 4, "hysteresis": 1, "min_loss_scale": 2},
        "train_batch_size": 64,
        "steps_per_print": 7,
    }
    before = {key: dict(value) if isinstance(value, dict) else value for key, value in mine.items()}
    config = deepspeed_config("params=float16,scale=true,master=float32", mine)
    assert mine == before
    assert config["fp16"] == {"enabled": True, **before["fp16"]}  # type: ignore[dict-item]
    assert config["steps_per_print"] == 7 and "train_micro_batch_size_per_gpu" not in config
    static = deepspeed_config("params=float16,scale=true", {**mine, "fp16": {"loss_scale": 128}})
    assert static["fp16"] == {"enabled": True, "loss_scale": 128}
    bf16 = {"check_grad_overflow": False, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    assert deepspeed_config("bf16-true", {**mine, "fp16": {"enabled": False}, "bf16": bf16})["bf16"] == {
        "enabled": True,
        **bf16,
    }
    accumulated = {**mine, "fp16": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert deepspeed_config("bf16-true", accumulated)["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("policy", "config", "words"),
    [
        ("bf16-mixed", {"bf16": {"enabled": True}}, ['["bf16"]["enabled"] is True', "bf16-mixed", "torch_autocast"]),
        ("bf16-true", {"bf16": {"enabled": False}}, ['["bf16"]["enabled"] is False', "bf16-true"]),
        ("bf16-true", {"fp16": {"enabled": True}}, ['["fp16"]["enabled"]', "bf16-true"]),
        ("32-true", {"torch_autocast": {"enabled": True}}, ['["torch_autocast"]', "32-true"]),
        ("16-mixed", {"torch_autocast": {"dtype": "bfloat16"}}, ["bfloat16", "float16", "16-mixed"]),
        (
            "bf16-mixed",
            {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}},
            ["torch.nn.Linear", "float32"],
        ),
        ("bf16-true", {"communication_data_type": "fp32"}, ["fp32", "bf16", "reduce="]),
        ("32-true", {"gradient_clipping": 1.0}, ["gradient_clipping", "fabric.clip_gradients"]),
        ("32-true", {"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps", "fabric.backward"]),
        ("32-true", {"optimizer": {"type": "Adam"}}, ["optimizer", "fabric.setup"]),
        ("32-true", {"scheduler": {}}, ["scheduler"]),
        ("16-mixed", {"amp": {"enabled": False}}, ["amp", "torch_autocast"]),
        ("bf16-true", {"bfloat16": {"enabled": True}}, ['"bf16"']),
        ("32-true", {"managed_gradient_accumulation": False}, ["managed_gradient_accumulation"]),
        ("32-true", {"zero_optimization": {"stage": 7}}, ["0, 1, 2 and 3", "7"]),
        ("32-true", {"zero_optimization": 2}, ["zero_optimization", "dict"]),
        ("32-true", {"zero_optimization": []}, ["zero_optimization", "dict"]),
        ("bf16-true", {"bf16": False}, ["bf16", "dict", "False"]),
        ("params=float16,scale=true", {}, ["stage=0", "does not learn"]),
        ("bf16-true", {"bf16": {"bf16_master_weights_and_grads": True}}, ["stage=0", "bf16_master_weights_and_grads"]),
        (
            "bf16-true",
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            ["grad_accum_dtype", "stage=2"],
        ),
        ("32-true", {"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype", "32-true"]),
        ("bf16-true", {"data_types": {"grad_accum_dtype": "int8"}}, ["int8", "fp32, fp16, bf16"]),
        ("bf16-true", {"data_types": {"param_dtype": "fp32"}}, ["param_dtype", "policy"]),
        ("64-true", {}, ["float64", "32-true"]),
        ("bf16-mixed; *.norm: 32-true", {}, ["exceptions"]),
        ("params=float32,compute=bfloat16,reduce=bfloat16", {}, ["reduce=float32"]),
        ("32-true", "ds.json", ["ds.json", "json.load"]),
        ("32-true", {"zero_optimisation": {"stage": 3}}, ["zero_optimisation", "did you mean 'zero_optimization'"]),
        ("32-true", {"nonsense": 1}, ["nonsense", "not a key that DeepSpeed reads"]),
        ("32-true", {"train_batch_size": "auto"}, ["train_batch_size", "leave it out"]),
        ("bf16-true", {"communication_data_type": ["fp32"]}, ["communication_data_type", "bf16"]),
        ("32-true", {"checkpoint": {"load_universal": True}}, ["load_universal", "fabric.load"]),
        ("32-true", {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, ["8-bit", "quantized"]),
        ("32-true", {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["stage=3", "stage=2"]),
        ("32-true", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "stage=0"]),
    ],
)
def test_contradictions_are_named(policy: str, config: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        deepspeed_config(policy, config)
    assert all(word in str(caught.value) for word in words)
