"""Policy: which dtype each part of training has, as one frozen value with a grammar.

mode       one of MODES or ALIASES                      "bf16-mixed", "16", 32
spelled    key=value, comma separated, any of the keys  "params=float32,compute=bfloat16"
exception  pattern: mode or spelled                     "*.norm: 32-true"

policy  =  (mode | spelled) { ";" exception }           the first exception that matches a module wins
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from precision_core.policy.dtypes import dtype_name, parse_dtype
from precision_core.policy.hints import hint
from precision_core.policy.messages import nearest
from precision_core.policy.patterns import check_pattern, covers
from precision_core.policy.stored import check_stored

_KEYS = ("params", "compute", "reduce", "output", "buffers", "master", "state", "grads", "rounding", "scale")
_BOOLS = {"true": True, "false": False}

Dtype = torch.dtype | str


@dataclass(frozen=True, init=False, repr=False)
class Policy:
    """The dtypes of one training run, and the modules that are exceptions to them.

    Every field may be left out; what it then follows is said below. dtypes are float64, float32, bfloat16, float16.
    Raises `ValueError` for anything unknown or contradictory. The idea of a policy as a value is from
    google-deepmind/jmp.
    """

    params: torch.dtype
    """Parameters. Default float32."""
    compute: torch.dtype
    """Matrix products and the like. Default: as params."""
    reduce: torch.dtype
    """Gradient reduction over ranks. Default: the widest of params, compute and grads."""
    output: torch.dtype
    """What the model returns. Default float32, float64 when params is."""
    buffers: torch.dtype
    """Floating buffers. Default: as params."""
    master: torch.dtype | None
    """What the optimizer steps on where params are half: float32, exactly; None: on the params."""
    state: torch.dtype
    """The optimizer's moments; its counters stay as they are. Default: as master, else params."""
    grads: torch.dtype
    """What gradients accumulate in, params' dtype or float32. Default: as params."""
    rounding: str
    """How half params without a master, and bfloat16 state, are written: "nearest" or "stochastic"."""
    scale: bool
    """Whether the loss is scaled. Default: exactly when compute is float16 over float32 params or master."""
    exceptions: tuple[tuple[str, Policy], ...]
    """(module name pattern, flat policy) pairs; the first that matches wins."""

    def __init__(
        self,
        params: Dtype = torch.float32,
        compute: Dtype | None = None,
        reduce: Dtype | None = None,
        output: Dtype | None = None,
        buffers: Dtype | None = None,
        master: Dtype | None = None,
        scale: bool | None = None,
        exceptions: Mapping[str, Policy | str | int] | Iterable[tuple[str, Policy | str | int]] = (),
        *,
        state: Dtype | None = None,
        grads: Dtype | None = None,
        rounding: str = "nearest",
    ) -> None:
        params = _dtype("params", params)
        compute = params if compute is None else _dtype("compute", compute)
        master = None if master is None else _dtype("master (a dtype or none)", master)
        grads = params if grads is None else _dtype("grads", grads)
        is_float64 = params is torch.float64
        widest = torch.promote_types(torch.promote_types(params, compute), grads)
        fields = {
            "params": params,
            "compute": compute,
            "reduce": widest if reduce is None else _dtype("reduce", reduce),
            "output": (torch.float64 if is_float64 else torch.float32) if output is None else _dtype("output", output),
            "buffers": params if buffers is None else _dtype("buffers", buffers),
            "master": master,
            "state": (master or params) if state is None else _dtype("state", state),
            "grads": grads,
            "rounding": rounding,
            "scale": ((master or params), compute) == (torch.float32, torch.float16) if scale is None else scale,
            "exceptions": _exceptions(exceptions),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if not isinstance(self.scale, bool):
            raise ValueError(f"scale={self.scale!r}: allowed are True and False")
        check_stored(self)
        for pattern, policy in self.exceptions:
            if policy.scale and not self.scale:
                raise ValueError(
                    f"contradictory policy: the exception {pattern!r} wants the loss scaled, the policy around it "
                    f"does not; the loss is scaled for the whole model or not at all: say {pattern}: "
                    f"{replace(policy, scale=False)}, or choose a base that scales such as 16-mixed"
                )

    @classmethod
    def parse(cls, value: Policy | str | int) -> Policy:
        """Returns the policy that a mode, an alias (16, 32, 64, "16", "bf16", ...) or the grammar above spells.

        Raises:
            ValueError: unknown or contradictory input, with what is allowed and the nearest match.
        """
        if isinstance(value, Policy):
            return value
        if type(value) is int and value in ALIASES:
            return MODES[ALIASES[value]]
        if not isinstance(value, str):
            meant = hint(str(value), MODES) if value is None or isinstance(value, torch.dtype) else ""
            raise ValueError(f"precision={value!r} is no mode: {_allowed()}{meant}")
        base, *exceptions = (part.strip() for part in value.split(";"))
        return replace(_parse_flat(base), exceptions=tuple(_parse_exception(text) for text in exceptions))

    @property
    def mixed(self) -> bool:
        """Whether compute differs from params."""
        return self.params is not self.compute

    def for_module(self, name: str) -> Policy:
        """Returns the flat policy of the module with that name: the first exception that covers it, or itself."""
        for pattern, policy in self.exceptions:
            if covers(pattern, name):
                return policy
        return self.flat

    @property
    def flat(self) -> Policy:
        """This policy without its exceptions."""
        return replace(self, exceptions=()) if self.exceptions else self

    def __str__(self) -> str:
        parts = [_NAMES.get(self.flat) or ",".join(f"{key}={_value_name(getattr(self, key))}" for key in _KEYS)]
        return "; ".join(parts + [f"{pattern}: {policy}" for pattern, policy in self.exceptions])

    def __repr__(self) -> str:
        return f"Policy.parse({str(self)!r})"


def _dtype(key: str, value: Dtype) -> torch.dtype:
    try:
        return parse_dtype(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _value_name(value: torch.dtype | bool | None) -> str:
    return dtype_name(value) if isinstance(value, torch.dtype) else str(value).lower()


def _exceptions(
    given: Mapping[str, Policy | str | int] | Iterable[tuple[str, Policy | str | int]],
) -> tuple[tuple[str, Policy], ...]:
    pairs = tuple(given.items() if isinstance(given, Mapping) else given)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ValueError(f'exceptions={given!r}: expected (pattern, mode) pairs, for example {{"*.norm": "32-true"}}')
    exceptions = tuple((check_pattern(pattern), Policy.parse(policy)) for pattern, policy in pairs)
    seen: set[str] = set()
    for pattern, policy in exceptions:
        if policy.exceptions:
            raise ValueError(
                f"the exception {pattern!r} has exceptions of its own: list them beside it, narrowest first"
            )
        if pattern in seen:
            raise ValueError(f"contradictory policy: the pattern {pattern!r} is given twice, the second is never used")
        seen.add(pattern)
    return exceptions


def _parse_exception(text: str) -> tuple[str, Policy]:
    pattern, colon, policy = text.partition(":")
    if not colon:
        raise ValueError(f"bad exception {text!r}: expected 'pattern: mode', for example '*.norm: 32-true'")
    return check_pattern(pattern.strip()), _parse_flat(policy.strip())


def _parse_flat(text: str) -> Policy:
    if "=" not in text:
        name = ALIASES.get(text, text)
        if name in MODES:
            return MODES[name]
        raise ValueError(f"precision={text!r} is no mode: {_allowed()}{hint(text, MODES)}")
    fields: dict[str, str | bool | None] = {}
    for item in text.split(","):
        key, equals, raw = (part.strip() for part in item.partition("="))
        if not equals or key not in _KEYS:
            raise ValueError(
                f"unknown part {item.strip()!r} of the policy {text!r}: allowed keys are {', '.join(_KEYS)}"
                f"{nearest(key, _KEYS)}"
            )
        if key in fields:
            raise ValueError(f"contradictory policy {text!r}: {key} is given twice")
        fields[key] = _parse_value(key, raw)
    return Policy(**fields)  # type: ignore[arg-type]


def _parse_value(key: str, raw: str) -> str | bool | None:
    if key == "master" and raw == "none":
        return None
    if key != "scale":
        return raw
    if raw not in _BOOLS:
        raise ValueError(f"scale={raw!r}: allowed are true and false{nearest(raw, _BOOLS)}")
    return _BOOLS[raw]


def _allowed() -> str:
    modes = ", ".join(MODES)
    aliases = ", ".join(repr(alias) for alias in ALIASES)
    return (
        f"allowed are {modes}, their aliases {aliases}, and policies such as "
        '"params=float32,compute=bfloat16" or "bf16-mixed; *.norm: 32-true"'
    )


MODES: dict[str, Policy] = {
    "64-true": Policy(torch.float64),
    "32-true": Policy(torch.float32),
    "16-true": Policy(torch.float16),
    "bf16-true": Policy(torch.bfloat16),
    "16-mixed": Policy(torch.float32, torch.float16),
    "bf16-mixed": Policy(torch.float32, torch.bfloat16),
    "16-master": Policy(torch.float16, reduce=torch.float32, master=torch.float32),
    "bf16-master": Policy(torch.bfloat16, reduce=torch.float32, master=torch.float32),
    "bf16-stochastic": Policy(torch.bfloat16, rounding="stochastic"),
}
"""The modes by name: `-true` has params and compute alike, `-mixed` has float32 params under a narrower compute,
`-master` has half params and exact float32 master weights, `-stochastic` rounds half params by chance."""

ALIASES: dict[str | int, str] = {
    64: "64-true",
    32: "32-true",
    16: "16-mixed",
    "64": "64-true",
    "32": "32-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
}

_NAMES = {policy: name for name, policy in MODES.items()}
