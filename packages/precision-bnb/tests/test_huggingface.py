"""What was written for bitsandbytes' own layers, by peft, transformers, accelerate and scripts, on ours.

Versions: bitsandbytes 0.50.2, transformers 5.24, peft 0.21, accelerate 1.15. Their own layers are beside ours.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from precision_bnb import BitsandbytesPrecision, QuantizedLinear, bitsandbytes_state_dict, dequantize
from precision_core import Fabric

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*erge lora module to .-bit linear may get different"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config` or equivalent"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]

MODES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])


def llama() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 50}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config).eval()


def ours(mode: str, **options: Any) -> Any:
    return BitsandbytesPrecision(mode, torch.float32, **options).convert_module(llama())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float model's files."""
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


def theirs(folder: Path, mode: str) -> Any:
    """Returns the model with bitsandbytes' own layers, which do not repack themselves."""
    config = transformers.BitsAndBytesConfig(**MODES[mode])
    return unrepacked(transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config))


def unrepacked(model: Any) -> Any:
    for layer in model.modules():
        if type(layer) is bitsandbytes.nn.Linear4bit:
            layer.support_avx512bf16_for_cpu = False
    return model.eval()


def loaded(folder: Path, **options: Any) -> Any:
    return unrepacked(transformers.LlamaForCausalLM.from_pretrained(folder, **options))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
        return result


def adapted(model: Any, **options: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        for name, param in model.named_parameters():
            if "lora_B" in name and "init_lora_weights" not in options:
                nn.init.normal_(param, std=0.1)
    return model.eval()


# ---------------------------------------------------------------- scripts


def linear_names(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    """What most QLoRA scripts begin with, to have `target_modules`."""
    names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, kind)}
    return names - {"lm_head"}


@pytest.mark.parametrize("mode", MODES)
def test_recipes_that_look_for_bitsandbytes_layers_find_ours(mode: str) -> None:
    kind = bitsandbytes.nn.Linear8bitLt if mode == "int8" else bitsandbytes.nn.Linear4bit
    other = bitsandbytes.nn.Linear4bit if mode == "int8" else bitsandbytes.nn.Linear8bitLt
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert linear_names(ours(mode), kind) == names and not linear_names(ours(mode), other)
    assert linear_names(adapted(ours(mode)), kind) == {"base_layer"}


# ---------------------------------------------------------------- peft


@pytest.mark.parametrize("mode", MODES)
def test_peft_merges_as_on_bitsandbytes_own_layers(mode: str, folder: Path) -> None:
    results = []
    for model in (adapted(ours(mode)), adapted(theirs(folder, mode))):
        kinds = {type(each).__name__ for each in model.modules() if type(each).__module__ == "peft.tuners.lora.bnb"}
        assert kinds == {"Linear8bitLt" if mode == "int8" else "Linear4bit"}
        before = logits(model)
        model.merge_adapter()
        merged = logits(model)
        model.unmerge_adapter()
        back = logits(model)
        plain = model.merge_and_unload()
        results.append([before, merged, back, logits(plain)])
        assert not torch.equal(before, merged) and type(plain) is transformers.LlamaForCausalLM
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_merged_layer_is_still_packed(mode: str) -> None:
    model = adapted(ours(mode)).merge_and_unload()
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantizedLinear) and layer.weight.shape == layer.layout.shape
    other = ours(mode)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model)) and not torch.equal(logits(ours(mode)), logits(model))
    assert BitsandbytesPrecision(mode).storage(layer.weight) is None


@pytest.mark.parametrize("mode", MODES)
def test_peft_and_transformers_dequantize_a_weight(mode: str, folder: Path) -> None:
    from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight as of_transformers

    mine, other = (each.model.layers[0].mlp.up_proj for each in (ours(mode), theirs(folder, mode)))
    expected = dequantize_bnb_weight(other.weight, getattr(other, "state", None))
    for function in (dequantize_bnb_weight, of_transformers):
        assert torch.equal(function(mine.weight, getattr(mine, "state", None)), expected)
    assert torch.allclose(dequantize_module_weight(mine), expected, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_olora_begins_as_on_bitsandbytes_own_layers(mode: str, folder: Path) -> None:
    mine, other = (adapted(each, init_lora_weights="olora") for each in (ours(mode), theirs(folder, mode)))
    adapters = [{name: value for name, value in each.state_dict().items() if "lora_" in name} for each in (mine, other)]
    assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) == 14
    for name, value in adapters[0].items():  # of int8, peft asks our layer, whose product is rounded otherwise
        assert torch.allclose(value, adapters[1][name], rtol=1e-4, atol=1e-5)
    mine_logits, expected = logits(mine), logits(other)
    # inputs that differ in their last bit are rounded to another of int8's 255 values, here and there
    assert (mine_logits - expected).abs().max() <= (expected.abs().max() / 255 if mode == "int8" else 0.0)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_prepare_model_for_kbit_training_prepares(storage: str) -> None:
    config = {**MODES["nf4"], "bnb_4bit_quant_storage": storage}
    model = ours(config)  # type: ignore[arg-type]
    layer = model.model.layers[0].mlp.up_proj
    packed = layer.weight.detach().clone().view(torch.uint8)
    expected = logits(model)
    prepared = peft.prepare_model_for_kbit_training(model)
    assert prepared.is_gradient_checkpointing and not any(param.requires_grad for param in model.parameters())
    assert prepared.get_input_embeddings()(IDS).requires_grad  # by a hook
    assert torch.equal(layer.weight.detach().view(torch.uint8), packed) and torch.equal(logits(model), expected)
    trained = peft.get_peft_model(prepared, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    trained(input_ids=IDS, labels=IDS).loss.backward()
    assert all(param.grad is not None for name, param in trained.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_are_counted_as_weights(mode: str, folder: Path) -> None:
    count = llama().num_parameters()
    model = ours(mode)
    assert model.num_parameters() == count == theirs(folder, mode).num_parameters()
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    tables = ours(mode, embeddings=True)
    assert tables.num_parameters() == count
    assert adapted(model).get_nb_trainable_parameters() == adapted(theirs(folder, mode)).get_nb_trainable_parameters()
    packed = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, QuantizedLinear))
    rest = sum(param.nbytes for name, param in model.named_parameters() if param.is_floating_point())
    assert model.get_memory_footprint(return_buffers=False) == packed + rest


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("mode", MODES)
def test_flags_are_those_of_transformers_own_quantiser(mode: str, folder: Path) -> None:
    mine, other = ours(mode), theirs(folder, mode)
    for name in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert getattr(mine, name, None) == getattr(other, name, None)
    assert mine.hf_quantizer.is_serializable() and mine.hf_quantizer.is_trainable
    assert isinstance(mine.hf_quantizer, type(other.hf_quantizer)) and mine.config._is_quantized
    want, found = (each.config.quantization_config.to_dict() for each in (other, mine))
    assert found == {**want, "llm_int8_skip_modules": ["lm_head"]}
    assert accelerate.utils.has_4bit_bnb_layers(mine) is accelerate.utils.has_4bit_bnb_layers(other) is (mode != "int8")
    for cast in (lambda model: model.to(torch.float16), lambda model: model.half(), lambda model: model.float()):
        with pytest.raises(ValueError, match=r"not supported for quantized model|cannot cast a bitsandbytes model"):
            cast(mine)


def test_a_model_in_training_that_keeps_floats_has_no_flags() -> None:
    model = ours("int8-training")
    assert not hasattr(model, "is_loaded_in_8bit") and not getattr(model, "is_quantized", False)
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_is_loaded_by_transformers_and_by_us(mode: str, tmp_path: Path) -> None:
    model = ours(mode)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    config = transformers.BitsAndBytesConfig(**MODES[mode])
    for other in (loaded(tmp_path), loaded(tmp_path, quantization_config=config)):
        assert isinstance(other.model.layers[0].mlp.up_proj, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
        assert torch.equal(logits(other), logits(model))
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision(mode, torch.float32))
    with fabric.init_module():
        again = transformers.LlamaForCausalLM(llama().config)
    fabric.load_module(tmp_path / "model.safetensors", again)
    assert torch.equal(logits(fabric.setup(again).eval()), logits(model))


@pytest.mark.parametrize("comes", ["floats", "packed by them"])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_loaded_quantised_and_taken_over_is_saved(mode: str, comes: str, folder: Path, tmp_path: Path) -> None:
    """transformers itself cannot save a model again that it loaded from its own quantised files."""
    model = theirs(folder, mode)
    expected = logits(model)
    if comes != "floats":
        theirs(folder, mode).save_pretrained(tmp_path / "theirs")
        model = loaded(tmp_path / "theirs")
        with pytest.raises(NotImplementedError):
            model.save_pretrained(tmp_path / "again")
    Fabric(accelerator="cpu", precision=BitsandbytesPrecision(mode, torch.float32)).setup(model)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(loaded(tmp_path / "ours")), expected) and torch.equal(logits(model), expected)


def test_a_state_dict_that_is_handed_over_is_converted(tmp_path: Path) -> None:
    """As Trainer does; transformers itself drops it where the model is quantised."""
    model = ours("nf4")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["model.norm.weight"] += 1.0
    for handed in (state, bitsandbytes_state_dict(model, state)):
        model.save_pretrained(tmp_path, state_dict=dict(handed))
        other = loaded(tmp_path)
        assert torch.equal(other.model.norm.weight, model.model.norm.weight + 1.0)
        other.model.norm.weight.data -= 1.0
        assert torch.equal(logits(other), logits(model))
    assert model.hf_quantizer.handed is None
    with pytest.raises(ValueError, match=r"distributed_checkpoint=True\) would write packed weights"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)


@pytest.mark.parametrize("change", ["ignored", "embeddings", "conv1d"])
def test_what_transformers_does_not_replace_is_saved_as_floats(change: str, tmp_path: Path) -> None:
    if change == "conv1d":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=100, n_positions=32)
            model = transformers.GPT2LMHeadModel(config).eval()
        BitsandbytesPrecision("nf4", torch.float32).convert_module(model)
        other_kind: Any = transformers.GPT2LMHeadModel
    else:
        options = {"ignore_modules": {"*.up_proj", "lm_head"}} if change == "ignored" else {"embeddings": True}
        model, other_kind = ours("nf4", **options), transformers.LlamaForCausalLM
    model.save_pretrained(tmp_path)
    other = unrepacked(other_kind.from_pretrained(tmp_path))
    counts = [sum(isinstance(each, bitsandbytes.nn.Linear4bit) for each in m.modules()) for m in (model, other)]
    assert counts[0] == counts[1] > 3
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by", ["transformers", "precision_bnb"])
def test_a_dequantised_model_is_a_float_model_again(mode: str, by: str, tmp_path: Path) -> None:
    model = ours(mode)
    expected = logits(dequantize(copy.deepcopy(model)))
    model.save_pretrained(tmp_path / "quantised")  # after which transformers' own dequantize takes a str for a device
    plain = model.dequantize() if by == "transformers" else dequantize(model)
    assert plain is model and type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(logits(model), expected)
    names = ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "save_pretrained")
    assert not set(names) & set(vars(model)) and not model.is_quantized
    assert not hasattr(model.config, "quantization_config") and not hasattr(model.config, "_is_quantized")
    model.half().float()
    model.save_pretrained(tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    assert type(loaded(tmp_path / "floats").model.layers[0].mlp.up_proj) is nn.Linear


def test_copies_and_pickles_save_themselves(tmp_path: Path) -> None:
    model = ours("nf4")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.model.norm.weight += 1.0
        other.save_pretrained(tmp_path)
        assert torch.equal(logits(loaded(tmp_path)), logits(other))


# ---------------------------------------------------------------- our own, on a model with these flags


def trained(fabric: Fabric, model: Any) -> Tensor:
    params = [param for name, param in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.SGD(params, lr=0.1)
    fabric.setup(model, optimizer)
    fabric.backward(model(input_ids=IDS, labels=IDS).loss)
    optimizer.step()
    return params[0].detach().clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_flags_do_not_hit_our_own_setup_save_and_load(mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plugin = BitsandbytesPrecision(mode, dtype)
    fabric, model = Fabric(accelerator="cpu", precision=plugin), llama()
    fabric.save_module(tmp_path / "floats.safetensors", model)
    with fabric.init_module():
        model = transformers.LlamaForCausalLM(model.config)
    fabric.load_module(tmp_path / "floats.safetensors", model)
    assert model.is_quantized  # before it is set up: peft is next
    model = adapted(peft.prepare_model_for_kbit_training(model)).train()
    trained(fabric, model)
    fabric.save(tmp_path / "model.ckpt", {"model": model})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    again = adapted(ours(mode))
    other = Fabric(accelerator="cpu", precision=BitsandbytesPrecision(mode, dtype))
    other.setup(again)
    other.load(tmp_path / "model.ckpt", {"model": again})
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    BitsandbytesPrecision(mode, dtype).convert_module(model)  # a second time
    assert dequantize(model) is model and not model.base_model.model.is_quantized


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_trainer_takes_adapters_and_refuses_a_base_without(mode: str, folder: Path, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[], max_steps=1, save_strategy="no")
    for model in (ours(mode), theirs(folder, mode)):
        with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
            transformers.Trainer(model, arguments)
        transformers.Trainer(adapted(model), arguments)
