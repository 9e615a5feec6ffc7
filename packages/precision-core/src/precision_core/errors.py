"""The errors that users meet most, by the code in brackets at the end of their messages.

Each has a section of that name on the site's page of errors, with an example and the way out; a test holds the messages
of all packages, this table and that page together. Nothing imports it at run time.
"""

from __future__ import annotations

CODES: dict[str, str] = {
    # what is asked for
    "unknown-mode": "no mode of that name is here",
    "unknown-strategy": "no strategy of that name is here",
    "missing-package": "the mode or strategy comes from a package that is not installed",
    "cannot-run-here": "this precision does not run on this device or under this strategy",
    "no-such-device": "torch does not find the device that was asked for",
    "no-such-module": "a name pattern matches no module of the model",
    "tied-exception": "two names of one tensor would have different dtypes",
    "no-fp8-here": "Transformer Engine cannot run the recipe on this machine",
    "nothing-chosen": 'precision="auto" finds no file that a choice was written to',
    "chosen-elsewhere": "the precision was chosen for another model, or on another kind of machine",
    "engine-config": "DeepSpeed's config contradicts the mode, or has a key that is not read",
    # processes
    "not-launched": "the run's processes are not started yet",
    "no-script": "there is no file that launch could start again",
    "launched-otherwise": "devices and num_nodes differ from how the process was started",
    "not-on-all-ranks": "one rank called what all ranks must call",
    "ranks-differ": "ranks train, or use, different parameters",
    # setup
    "half-parameters": "a mixed mode trains float32 parameters, and the model has half ones",
    "complex-parameters": "torch's loss scaling does not take complex gradients",
    "optimizer-option": "an option of the optimizer is 0 or infinite in float16",
    "fused-optimizer": "torch's fused optimizer does not step this dtype",
    "closure-optimizer": "an optimizer evaluates the loss several times a step",
    "shared-parameter": "two optimizers hold one parameter under a loss scale",
    "foreign-optimizer": "the optimizer holds no parameter of the model",
    "sharded-optimizer": "this optimizer cannot step shards, or has state of what was not sharded",
    "set-up-twice": "the model or optimizer is set up already",
    "no-values": "parameters are on the meta device",
    "mixed-dtypes": "FSDP reduces the gradients of a module in one dtype",
    "nothing-to-convert": "the model has no layer that the mode would convert",
    "nonfinite-weights": "weights that are to be quantised are inf, NaN or too large",
    "loader-sharing": "a loader's data cannot be shared out to ranks",
    # the loop
    "not-a-loss": "backward got something that it cannot start from",
    "plain-backward": "loss.backward() where the engine needs fabric.backward(loss)",
    "step-before-backward": "the optimizer stepped before there were gradients",
    "unscaled-loss": "gradients come from loss.backward() under a loss scale",
    "scaled-gradients": "an optimizer was about to step gradients that carry the loss scale",
    "changed-gradients": "gradients were changed while they carried the loss scale",
    "unsynced-gradients": "a step would leave out gradients that were accumulated and not reduced",
    "no-finite-gradients": "too many steps in a row were skipped: gradients are inf or NaN",
    "nonfinite-loss": "the loss was inf or NaN for ten steps in a row",
    "nonfinite-norm": "the norm of the gradients is inf or NaN, and that was to be an error",
    "clip-arguments": "clip_gradients takes either max_norm or clip_val",
    "second-order": "gradients of gradients, where an engine frees what they need",
    "unmarked-method": "a method other than forward runs its layers in float32",
    "compiled-true-mode": "torch.compile before torch 2.12 with a true mode",
    "cast-after-setup": "the model was cast after setup, and trains",
    # checkpoints
    "cannot-save": "a value would be rejected when the checkpoint is loaded",
    "path-address": "a path is an address of a remote storage",
    "checkpoint-mismatch": "keys, shapes or dtypes differ from the live objects'",
    "damaged-checkpoint": "a checksum does not match, or it is no checkpoint",
    "foreign-checkpoint": "it was not written by fabric.save",
    "loader-position": "the loader cannot go on where the checkpoint's stopped",
}
"""Code -> what happened, in one line."""
