"""Training: adapters around frozen weights, weights that train, bitsandbytes' optimizers, several processes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from precision_bnb import MODES, BitsandbytesPrecision, QuantizedLinear, dequantize
from precision_core import MODES as CORE_MODES
from precision_core import Fabric
from precision_core.testing import Net, loss_of, make_batch, run_in_ranks

FROZEN = [mode for mode in MODES if mode != "int8-training"]


class Body(nn.Module):
    """Two layers whose columns are no multiple of a block."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.norm, self.down = nn.Linear(48, 96), nn.LayerNorm(96), nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def with_lora(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().sum().backward()
    return {name: param.grad.double() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("mode", FROZEN)
def test_lora_gradients_are_those_of_the_dequantised_weights_in_float64(mode: str) -> None:
    plugin = BitsandbytesPrecision(mode, torch.float32)
    model = plugin.convert_module(with_lora(plugin.convert_module(Body())))
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 2
    assert "base_layer" in " ".join(name for name, _ in model.named_modules())
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))
    mine = gradients(model, x)
    model.zero_grad()
    exact = gradients(dequantize(model).double(), x.double())
    assert mine.keys() == exact.keys() and all("lora" in name for name in mine) and len(mine) == 4
    for name, gradient in mine.items():
        assert (gradient - exact[name]).norm() < 2e-5 * exact[name].norm()


@pytest.mark.parametrize("before", [True, False], ids=["peft_first", "quantised_first"])
def test_adapters_are_not_quantised_and_learn(before: bool) -> None:
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", torch.bfloat16))
    model = with_lora(Body()) if before else with_lora(fabric.precision_plugin.convert_module(Body()))
    optimizer = SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    fabric.setup(model, optimizer)
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 2
    adapters = [param for name, param in model.named_parameters() if "lora" in name]
    assert len(adapters) == 4 and all(param.requires_grad and param.is_floating_point() for param in adapters)
    packed = [layer.weight.clone() for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    x, losses = torch.randn(16, 48, generator=torch.Generator().manual_seed(3)), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = [layer.weight for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert all(torch.equal(mine, other) for mine, other in zip(packed, after, strict=True))


@pytest.mark.parametrize("kind", ["peft", "own"])
def test_every_entry_of_an_adapter_moves_at_a_small_learning_rate(kind: str) -> None:
    """In bfloat16, whose spacing is 1/256 of a value, AdamW's steps of 1e-4 are lost in three entries of four."""

    class Own(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.lora_A, self.lora_B = base, nn.Linear(48, 4, bias=False), nn.Linear(4, 96, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.lora_B(self.lora_A(x))

    moved = {}
    for base in (None, "bf16-true"):
        fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", torch.bfloat16, base=base))
        model: Any = with_lora(Body()) if kind == "peft" else Body().requires_grad_(False)
        if kind == "own":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model.up = Own(model.up)
        adapters = {name: param for name, param in model.named_parameters() if "lora_A" in name}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
        fabric.setup(model, optimizer)
        before = {name: param.detach().clone() for name, param in adapters.items()}
        x = torch.randn(16, 48, generator=torch.Generator().manual_seed(3))
        for _ in range(50):
            optimizer.zero_grad()
            fabric.backward((model(x) - x).square().mean())
            optimizer.step()
        changes = [param.detach() != before[name] for name, param in adapters.items()]
        moved[base] = sum(int(each.sum()) for each in changes) / sum(each.numel() for each in changes)
    assert moved[None] == 1.0 and moved["bf16-true"] < 0.6


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 50}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config).bfloat16()


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated")  # peft
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter")  # peft again
@pytest.mark.parametrize("prepared", [False, True], ids=["as it comes", "prepared"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_peft_prepares_and_checkpoints_and_the_losses_are_float32s(prepared: bool, checkpointing: bool) -> None:
    """A model from a bfloat16 file, its head in `modules_to_save`, beside the same with float32 compute throughout."""
    peft, losses = pytest.importorskip("peft"), {}
    for dtype in (torch.bfloat16, torch.float32):
        fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", dtype))
        model = fabric.precision_plugin.convert_module(tiny_llama())
        if prepared:
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
            )
        if checkpointing and not prepared:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)
        fabric.setup(model, optimizer)
        assert {param.dtype for param in model.parameters() if param.requires_grad} == {torch.float32}
        ids, losses[dtype] = torch.arange(16).view(2, 8), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model.train()(input_ids=ids, labels=ids).loss
            fabric.backward(loss)
            optimizer.step()
            losses[dtype].append(loss.item())
    mine, exact = losses[torch.bfloat16], losses[torch.float32]
    assert mine == pytest.approx(exact, abs=0.01) and mine[-1] < mine[0] - 0.2


def test_a_checkpoint_with_bfloat16_adapters_loads_into_float32_ones(tmp_path: Path) -> None:
    def trained(base: str | None, steps: int) -> tuple[Fabric, Any, Any]:
        fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", torch.bfloat16, base=base))
        model = with_lora(Body())
        optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
        fabric.setup(model, optimizer)
        for step in range(steps):
            optimizer.zero_grad()
            fabric.backward(model(torch.full((4, 48), 0.1 * step)).square().mean())
            optimizer.step()
        return fabric, model, optimizer

    fabric, old, optimizer = trained("bf16-true", 3)
    fabric.save(tmp_path / "old.ckpt", {"model": old, "optimizer": optimizer})
    fabric.save_module(tmp_path / "old.safetensors", old)
    fabric, new, optimizer = trained(None, 2)
    fabric.load_module(tmp_path / "old.safetensors", new)
    assert all(
        torch.equal(mine, value.to(mine.dtype)) for mine, value in zip(new.parameters(), old.parameters(), strict=True)
    )
    fabric, new, optimizer = trained(None, 1)
    fabric.load(tmp_path / "old.ckpt", {"model": new, "optimizer": optimizer})
    assert all(
        torch.equal(mine, value.to(mine.dtype)) for mine, value in zip(new.parameters(), old.parameters(), strict=True)
    )
    assert {param.dtype for param in new.parameters() if param.requires_grad} == {torch.float32}
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    fabric.backward(new(torch.ones(2, 48)).square().mean())
    optimizer.step()


@pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|past_key_values)` is deprecated")  # peft
@pytest.mark.parametrize("kind", ["PromptEncoderConfig", "PrefixTuningConfig"])
def test_prompt_encoders_stay_and_train(kind: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    options = {"encoder_hidden_size": 32} if kind == "PromptEncoderConfig" else {"prefix_projection": True}
    model = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **options))
    trains = {name for name, param in model.named_parameters() if param.requires_grad}
    BitsandbytesPrecision("nf4", torch.float32).convert_module(model)
    assert {name for name, param in model.named_parameters() if param.requires_grad} == trains
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 4
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(param.grad is not None for param in model.prompt_encoder.parameters() if param.requires_grad)


def test_what_trains_in_a_model_that_peft_froze_stays() -> None:
    model = with_lora(Body())
    model.base_model.gate = nn.Linear(64, 64)
    frozen = model.base_model.other = nn.Linear(64, 64).requires_grad_(False)
    BitsandbytesPrecision("nf4", torch.float32).convert_module(model)
    assert type(model.base_model.gate) is nn.Linear and model.base_model.gate.weight.requires_grad
    assert isinstance(model.base_model.other, QuantizedLinear) and model.base_model.other is not frozen


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_dora(mode: str) -> None:
    """peft asks for the floats of the weight, in the making and in each forward."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], use_dora=True, init_lora_weights=False)
    plugin = BitsandbytesPrecision(mode, torch.float32)
    models = []
    for floats in (False, True):
        body = plugin.convert_module(Body())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            models.append(peft.get_peft_model(dequantize(body) if floats else body, config))
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))
    mine, exact = (gradients(model, x) for model in models)
    assert mine.keys() == exact.keys() and any("magnitude" in name for name in mine) and len(mine) == 6
    assert all((mine[name] - exact[name]).norm() < 1e-4 * exact[name].norm() for name in mine)


def test_what_peft_casts_is_noticed() -> None:
    peft = pytest.importorskip("peft")
    config = {"load_in_8bit": True, "bnb_4bit_quant_storage": "bfloat16"}  # of 4 bits it knows the parameter's class
    model = peft.prepare_model_for_kbit_training(BitsandbytesPrecision(config).convert_module(Body()))
    with pytest.raises(RuntimeError, match="prepare_model_for_kbit_training casts int8 weights so"):
        model(torch.randn(2, 48))


def test_float16_adapters_get_cores_scaler() -> None:
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision("nf4", torch.float16))
    model = with_lora(fabric.precision_plugin.convert_module(Body().requires_grad_(False)))
    optimizer = SGD([param for param in model.parameters() if param.requires_grad], lr=0.05)
    fabric.setup(model, optimizer)
    x = torch.randn(8, 48, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and fabric.precision_plugin.scale > 1
    assert {param.dtype for param in model.parameters() if param.requires_grad} == {torch.float32}


def test_merging_adapters_goes_through_dequantize() -> None:
    model = with_lora(BitsandbytesPrecision("nf4", torch.float32).convert_module(Body()))
    x = torch.randn(4, 48)
    expected = model(x)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model).merge_and_unload()
    merged = dequantize(model).merge_and_unload()
    assert torch.allclose(merged(x), expected, atol=1e-5) and type(merged.up) is nn.Linear


def test_int8_training_trains_its_weights() -> None:
    """Beside float32, with SGD: the weights move, and the loss falls as there."""
    curves = {}
    for mode in ("int8-training", "32-true"):
        plugin: Any = BitsandbytesPrecision(mode, torch.float32) if mode in MODES else mode
        fabric, model = Fabric(accelerator="cpu", precision=plugin), Net()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        before = model.blocks[0].up.weight.detach().clone()  # type: ignore[union-attr]
        fabric.setup(model, optimizer)
        losses = []
        for step in range(60):
            batch, target = make_batch(step)
            optimizer.zero_grad()
            loss = loss_of(model(batch), target)
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        assert not torch.equal(model.blocks[0].up.weight, before)  # type: ignore[union-attr]
        curves[mode] = losses
    assert max(abs(a - b) for a, b in zip(*curves.values(), strict=True)) < 0.05
    assert curves["int8-training"][-1] < 0.9 * curves["int8-training"][0]


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    for mode in MODES:
        model = BitsandbytesPrecision(mode, torch.float32).convert_module(Body())
        x = torch.randn(4, 48, requires_grad=True)
        (plain,) = torch.autograd.grad(model(x).square().sum(), x)
        (again,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)
        assert torch.equal(plain, again)


# ---------------------------------------------------------------- bitsandbytes' optimizers

OPTIMIZERS = [bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.Adam8bit, bitsandbytes.optim.Lion8bit]


def train(fabric: Fabric, model: Net, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        batch, target = make_batch(step)
        optimizer.zero_grad()
        loss = loss_of(model(batch), target)
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


RESUMED = [  # each mode with one of them in the fast tier
    pytest.param(mode, kind, marks=[] if number % 3 == index else [pytest.mark.full])
    for number, mode in enumerate([*CORE_MODES, *MODES])
    for index, kind in enumerate(OPTIMIZERS)
]


@pytest.mark.parametrize(("mode", "kind"), RESUMED, ids=lambda value: getattr(value, "__name__", value))
def test_8_bit_optimizers_resume_bit_for_bit(mode: str, kind: Any, tmp_path: Path) -> None:
    """The state is quantised (`min_8bit_size` is low here), goes through fabric.save, and the run goes on with it."""

    def prepared(seed: int, state: Any = None) -> tuple[Fabric, Net, Any]:
        fabric, model = Fabric(accelerator="cpu", precision=mode), Net(seed)
        optimizer = kind(model.parameters(), lr=1e-3, min_8bit_size=16)
        if state is not None:
            optimizer.load_state_dict(state)
        fabric.setup(model, optimizer)
        return fabric, model, optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what bitsandbytes compiles
        fabric, model, optimizer = prepared(0)
        train(fabric, model, optimizer, range(8))
        fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
        expected = train(fabric, model, optimizer, range(8, 14))
        states = [state for state in optimizer.state.values() if "state1" in state]
        assert states and all(state["state1"].dtype is torch.uint8 for state in states)
        fabric, model, optimizer = prepared(1)
        fabric.load(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
        assert train(fabric, model, optimizer, range(8, 14)) == expected
        fabric, model, optimizer = prepared(2, state=fabric.load(tmp_path / "half.ckpt")["optimizer"])  # set up with it
        fabric.load(tmp_path / "half.ckpt", {"model": model})
        assert train(fabric, model, optimizer, range(8, 14)) == expected


# ---------------------------------------------------------------- several processes

STEPS = 6


def adapted(plugin: Any, seed: int = 0) -> Any:
    """Returns a quantised Net, of which norms, biases and the embedding train."""
    return plugin.convert_module(Net(seed))


def halves(step: int, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    batch, target = make_batch(step)
    rows = slice(4 * rank, 4 * rank + 4)
    return {key: value[rows] for key, value in batch.items()}, target[rows]


def in_ddp(mode: str) -> tuple[list[float], dict[str, Tensor], bool]:
    fabric = Fabric(accelerator="cpu", strategy="ddp", precision=BitsandbytesPrecision(mode, torch.float32))
    model = Net(seed=fabric.global_rank)  # ranks differ, and get rank 0's weights, packed ones too
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    fabric.setup(model, optimizer)
    losses = []
    for step in range(STEPS):
        batch, target = halves(step, fabric.global_rank)
        optimizer.zero_grad()
        loss = loss_of(model(batch), target)
        fabric.backward(loss)
        optimizer.step()
        losses.append(fabric.all_reduce(loss).item())
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return losses, state, fabric.precision_plugin.storage(model.blocks[0].up.weight) is None


def in_one_process(mode: str) -> tuple[list[float], dict[str, Tensor]]:
    fabric, model = Fabric(accelerator="cpu", precision=BitsandbytesPrecision(mode, torch.float32)), Net()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    fabric.setup(model, optimizer)
    return train(fabric, model, optimizer, range(STEPS)), model.state_dict()


@pytest.mark.parametrize("mode", ["nf4-dq", "int8", "int8-training"])
def test_two_ranks_train_like_one_process(mode: str) -> None:
    expected, state = in_one_process(mode)
    first, second = run_in_ranks(2, in_ddp, mode)
    assert first[0] == second[0] == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(first[1][key], second[1][key]) for key in state)
    for key, value in state.items():
        same = value.is_floating_point()
        assert torch.allclose(first[1][key], value, atol=1e-4) if same else torch.equal(first[1][key], value)
    assert first[2] is (mode != "int8-training")


def sharded(config: Any, policy: torch.dtype | None) -> list[float]:
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    model = adapted(BitsandbytesPrecision(config, torch.bfloat16, base="32-true"))
    options = (
        {} if policy is None else {"mp_policy": MixedPrecisionPolicy(param_dtype=policy, output_dtype=torch.float32)}
    )
    for block in model.blocks:
        fully_shard(block, **({} if policy is None else {"mp_policy": MixedPrecisionPolicy(param_dtype=policy)}))
    fully_shard(model, **options)
    packed = model.blocks[0].up.weight
    assert packed.to_local().numel() * 2 == packed.numel()  # half on each rank
    kept = packed.to_local().clone()
    frozen = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
    for layer in frozen:
        layer._apply(Tensor.half)  # what model.half() does, of the packed weights alone
        layer._apply(Tensor.float)
    packed = model.blocks[0].up.weight
    assert packed.dtype is kept.dtype and torch.equal(packed.to_local().view(torch.uint8), kept.view(torch.uint8))
    losses, rank = [], dist.get_rank()
    optimizer = SGD([param for param in model.parameters() if param.requires_grad], lr=0.05, momentum=0.9)
    for step in range(STEPS):
        batch, target = halves(step, rank)
        optimizer.zero_grad()
        loss = loss_of(model(batch).float(), target)
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
        model.eval()  # an evaluation in between changes nothing
        with torch.no_grad():
            model(batch)
        model.train()
    state = model.state_dict()["blocks.0.up.weight"].full_tensor()
    kept = adapted(BitsandbytesPrecision(config, torch.bfloat16, base="32-true")).blocks[0].up.weight
    assert torch.equal(state.view(torch.uint8), kept.view(torch.uint8))
    dist.destroy_process_group()
    return losses


@pytest.mark.parametrize("policy", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_packed_weights_shard_under_plain_fsdp2(storage: str, policy: torch.dtype | None) -> None:
    if storage == "uint8" and torch.__version__ < (2, 10):
        pytest.skip("torch 2.9 shards no integer parameters")
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": storage}
    fabric = Fabric(accelerator="cpu", precision=BitsandbytesPrecision(config, torch.bfloat16, base="32-true"))
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    fabric.setup(model, optimizer)
    expected = train(fabric, model, optimizer, range(STEPS))
    for losses in run_in_ranks(2, sharded, config, policy):
        assert losses == pytest.approx(expected, rel=2e-3 if policy is None else 2e-2)
