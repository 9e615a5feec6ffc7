"""Lightning Fabric's names: what those that are not here are called, and which parameters differ where they are.

A script ports by its import line where it uses no name in these tables. They make what Fabric says of a missing name,
and the page LIGHTNING.md; a test walks Lightning's class and finds each difference in them.
"""

from __future__ import annotations

ABSENT: dict[str, str] = {
    "accelerator": "`fabric.device.type` says which accelerator it is",
    "call": "there are no callbacks: call your own functions",
    "load_raw": "`fabric.load_module(path, model)` reads safetensors, `model.load_state_dict(torch.load(path))` others",
    "log": "there are no loggers: call your own where `fabric.is_global_zero`",
    "log_dict": "there are no loggers: call your own where `fabric.is_global_zero`",
    "logger": "there are no loggers: call your own where `fabric.is_global_zero`",
    "loggers": "there are no loggers: call your own where `fabric.is_global_zero`",
    "run": "Fabric is not made for subclasses: `fabric.launch(train)` calls `train(fabric)` in each process",
    "sharded_model": "`fabric.init_module()` builds a model for a strategy that shards",
}
"""Names of Lightning's that Fabric does not have, and what to use."""

DIFFERENT: dict[str, dict[str, str]] = {
    "__init__": {
        "plugins": "pass a precision plugin as `precision=`; cluster environments and checkpoint plugins are not here",
        "callbacks": "not here: call your own functions",
        "loggers": "not here: call your own where `fabric.is_global_zero`",
    },
    "all_gather": {
        "group": "not here: it gathers over all processes",
        "sync_grads": "not here: what is gathered has no gradient",
    },
    "all_reduce": {"group": "not here: it reduces over all processes"},
    "broadcast": {"obj": "`data`"},
    "clip_gradients": {"module": "`model`; `max_norm` and `clip_val` are passed by name"},
    "load": {"weights_only": "`trust=True` is `weights_only=False`; without it nothing in the file is executed"},
    "no_backward_sync": {"module": "`model`"},
    "seed_everything": {
        "workers": "not here: torch seeds the workers of a loader from the seed",
    },
    "setup": {
        "module": "`model`",
        "scheduler": "`fabric.setup_schedulers(scheduler)`, where steps may be skipped (16-mixed, 16-true)",
        "move_to_device": "not here: the model is moved to `fabric.device`",
    },
    "setup_dataloaders": {"dataloaders": "`loaders`"},
    "setup_module": {
        "module": "`model`",
        "move_to_device": "not here: the model is moved to `fabric.device`",
    },
    "to_device": {"obj": "`data`"},
}
"""By method, the parameters of Lightning's that ours does not have; `backquoted` alone is the name here."""

BEHAVIOUR: tuple[str, ...] = (
    "`setup` returns the very objects that it was given, not wrappers: no `.module`, no `_forward_module`, and "
    "`isinstance` of your own class holds.",
    "`Fabric(precision=...)` knows the same mode strings; without one it is `32-true` as there. `transformer-engine` "
    "and bitsandbytes' modes come from packages of their own.",
    "`16-mixed` scales the loss under every strategy and on every device; call `fabric.unscale_gradients(optimizer)` "
    "before your own code reads gradients.",
    "`error_if_nonfinite` of `clip_gradients` is False unless you say so: a step that overflowed is skipped.",
    "`init_module(empty_init=True)` leaves values out under FSDP alone, and a forward before a file has filled them "
    "raises.",
    "`setup_dataloaders` returns a tuple where it was given several, not a list.",
    "`save` adds the precision's and the random generators' state, and `load(path, state)` brings all back or nothing; "
    "plain values of `state` are written back into it.",
    "`seed_everything` wants a seed, and is a method; `from lightning.fabric import seed_everything` has no other home "
    "here.",
    'Strategies are called `"ddp"`, `"fsdp"`, `"deepspeed"`, `"xla"`; options go to `DDPStrategy(...)` and its like.',
)
"""What runs under the same name and does something else."""


def missing(name: str) -> str:
    """Returns what Fabric says of an attribute that it does not have."""
    word = ABSENT.get(name)
    return f"'Fabric' object has no attribute {name!r}" + (f", as Lightning's has: {word}" if word else "")
