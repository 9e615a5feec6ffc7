"""What was seen while a loop ran: operations, added up, and the calls that matter, in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from precision_lab.auditing.where import Line

FORWARD, BACKWARD, STEP, LOOP = "forward", "backward", "step", "loop"
"""Where an operation ran: in a module's forward, in backward, in an optimizer's step, in the loop itself."""


@dataclass
class Op:
    """All calls of one operation from one line, in one module and phase, with operands of the same dtypes."""

    name: str  # "aten.addmm"
    kind: str  # of kinds.py
    module: str  # path in the model, "" outside of it
    phase: str
    inputs: tuple[torch.dtype, ...]  # of tensors, in order
    output: torch.dtype | None  # of the first tensor
    line: Line | None  # in backward: of the forward operation
    autocast: bool
    count: int = 0
    elements: int = 0  # of the outputs, added up
    bytes: int = 0
    width: int = 0  # softmax: classes; sums and losses: elements that one output was made of; the largest
    grad: bool = False  # whether an input had a gradient to get
    under: bool = False  # in backward: whether the forward operation ran under autocast; else as `autocast`
    via: str = ""  # the installed package, other than torch, whose code made the call; "" is the user's own
    operand: str = ""  # of a cast: the parameter that was cast
    promoted: str = ""  # why half inputs gave a float32 output: "constant" (made in forward, or a buffer), "other";
    # of a cast: "quantised", where weights that are stored in 8 bits or less were cast, and "cast", where activations
    # were cast to float32 and used
    meant: bool = False  # of a float32 result: a norm, sum, product or the like needed it, or residuals are added to it
    after_bytes: int = 0  # what was computed in float32 from such outputs, or from casts, until a cast, norm or loss
    after_modules: set[str] = field(default_factory=set)
    by_hand: str = ""  # "norm", "softmax": what a square, or an exponential, in half became
    back: int = 0  # bytes of a cast to float32 that was cast back at once


@dataclass(frozen=True)
class Context:
    """An autocast context that is open."""

    device: str
    dtype: torch.dtype
    asked: bool  # False where enabled=False was passed
    enabled: bool  # False also where torch disabled it, with a warning
    library: str = ""  # that entered it for the user


@dataclass
class Event:
    """One call that a loop makes: forward, backward, step, ..., with what was seen of it.

    kind            data
    forward         root, params, autocast (device type -> dtype), grad, training, recompute, device, inputs, outputs,
                    contexts (open ones, innermost last), within (device type -> dtype of autocast that was entered in
                    it), ids (of parameters that train), cache (number of autocast's
                    weight cache in use, or None)
    autocast        device, dtype, enabled, asked (False where enabled=False was), cache, inside: a context was entered,
                    in that module's forward
    backward        dtype, device, factor (what the loss was multiplied with), scaler (whose scale that is), partly
                    (scaled), autocast (device types), contexts (open ones), graph, ids (of parameters that got a
                    gradient), fresh (of those that had none before), products (dtypes of backward's products)
    autograd_grad   torch.autograd.grad was called, create_graph
    assigned        ids (of parameters whose gradient is what torch.autograd.grad returned), factor, scaler
    scale           scaler, scale
    scale_read      scaler: scaler.get_scale()
    scaler_off      a scaler that is not enabled was asked to scale
    unscale         scaler, optimizer, within (scaler.step, which unscales if nobody did), ran (None: it raised), ids,
                    without, dtypes (of its parameters that train)
    unscaled        ids (of parameters whose gradients torch's unscaling wrote), inverse, found (inf or NaN)
    gradients       ids, how (the operation), functions (the callers' names): gradients changed, by clipping mostly;
                    by (the number they were multiplied with, or None), computed (whether an operand was computed from
                    gradients), degree (its power of their scale), others (tensors among the operands),
                    limit (of a clip_grad_ function of torch)
    gradients_read  ids: a number that was computed from gradients was read
    cleared         ids: gradients set to zero; those set to None are `fresh` at the next backward
    scaler_step     scaler, optimizer, ran (None: it raised), ids, without, dtypes
    scaler_update   scaler, ran (None: it raised)
    step            optimizer, name (of its class), ids (of its parameters), without (those that train and have no
                    gradient), dtypes, lrs (of its groups), closure, scaler (whose step made this one), grad_scale
                    (left to a fused step), cache
    hand_step       ids: parameters were written by the loop itself, with what was computed from their gradients
    added           ids, dtype: gradients were added up in half, in tensors of the loop's own
    stepped         as step, of one with a closure, when it has ended
    recast          names (of parameters), old and new dtype: they had another one at the step before
    scheduler       scheduler, optimizer
    saved           file, tensors (key path -> dtype), scaler and optimizer: whether their state is in it, numbers
    reduce          op, dtype, elements, phase
    module_cast     root (class), path, ids (of its parameters), of, to: model.bfloat16(), model.to(...) changed
                    dtypes, the first that changed
    made_half       dtype: of the first parameter that a module got in half without a cast of a model
    comm_hook       name: a hook of DDP's that reduces gradients in its own way
    switches        one of torch's switches for float32 products was set: name, value, tf32, of (matmul, conv, all)
    default_dtype   dtype: a half one was set as torch's default
    cast_without_gradients  name (of a parameter that was cast to half under no_grad)

    Scalers and optimizers are ids, equal for the same object.
    """

    kind: str
    line: Line | None
    library: str
    step: int  # training steps that had ended
    data: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Stored:
    """Tensors of one dtype that live on from step to step."""

    kind: str  # params, frozen, buffers, grads, state, master
    name: str  # of the parameter or buffer
    key: str  # of the state: "exp_avg"
    dtype: torch.dtype
    bytes: int
    elements: int
    holds: str = ""  # of a half buffer, by value: "frequencies", "positions", "angles", "statistics"
    zeros: float = 0.0  # of a half state: the share of its elements that are zero
    finite: bool = True  # of a half state: no inf, no NaN


@dataclass
class Updates:
    """What sampled steps did to one parameter: of `seen` elements with a gradient, not zero, `unchanged` stayed."""

    name: str
    dtype: torch.dtype
    seen: int = 0
    unchanged: int = 0


@dataclass
class Saved:
    """Activations that backward will need, of one module and dtype."""

    module: str
    dtype: torch.dtype
    bytes: int = 0


@dataclass(frozen=True)
class Asked:
    """A precision that the script asked a library for."""

    library: str
    text: str  # the call
    compute: torch.dtype | None  # in which products then run; None: as they come
    true: bool  # whether parameters are in it, too
    line: Line | None = None  # of the script, that makes the library's object, as far as its text shows


@dataclass
class Record:
    """All that was seen."""

    ops: list[Op] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    updates: list[Updates] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    integers: list[Event] = field(default_factory=list)  # integers that a half dtype does not hold: kind "rounded"
    unseen: list[str] = field(default_factory=list)  # what could not be observed, as sentences
    micro_batches: dict[str, int] = field(default_factory=dict)  # parameter -> backwards before a step, at most
    modules: dict[str, str] = field(default_factory=dict)  # path -> class
    tied: dict[str, list[str]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    untied: list[tuple[str, str, str]] = field(default_factory=list)  # two parameters, and why they should be one
    angles: list[Event] = field(default_factory=list)  # sines and cosines of half numbers without gradients
    engines: list[str] = field(default_factory=list)  # engines whose own named mode made the parameters half
    steps: int = 0
    devices: list[str] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)  # that were seen to run the loop
    trained: dict[str, torch.dtype] = field(default_factory=dict)  # name of a parameter -> dtype at its last step
    params: dict[int, str] = field(default_factory=dict)  # id of a parameter -> name, empty where no model has it
    cast_lines: dict[str, Line] = field(default_factory=dict)  # half parameter -> where what it holds was cast
    rate_line: Line | None = None  # of the script, that sets a learning rate, as far as its text shows
    backends: dict[str, Any] = field(default_factory=dict)  # torch's own switches: matmul precision, TF32

    @property
    def host(self) -> str:
        """The class of the library by which the script asks for its precision: "Trainer", "SFTConfig"."""
        return self.asked[0].text.partition("(")[0] if self.asked else ""

    def count(self, kind: str) -> int:
        """How many events of the kind there are."""
        return len(self.of(kind))

    def of(self, *kinds: str) -> list[Event]:
        """The events of these kinds, in order."""
        return [event for event in self.events if event.kind in kinds]
