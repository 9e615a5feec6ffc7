"""Policy: the modes and their defaults, the grammar there and back, and what is said to bad input."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_core import ALIASES, MODES, Policy

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)

# given, then params, compute, reduce, output, buffers, master, scale
TABLE = [
    ("64-true", F64, F64, F64, F64, F64, None, False),
    ("32-true", F32, F32, F32, F32, F32, None, False),
    ("16-true", F16, F16, F16, F32, F16, None, False),
    ("bf16-true", BF16, BF16, BF16, F32, BF16, None, False),
    ("16-mixed", F32, F16, F32, F32, F32, None, True),
    ("bf16-mixed", F32, BF16, F32, F32, F32, None, False),
    ("16-master", F16, F16, F32, F32, F16, F32, True),
    ("bf16-master", BF16, BF16, F32, F32, BF16, F32, False),
    ("bf16-stochastic", BF16, BF16, BF16, F32, BF16, None, False),
    (64, F64, F64, F64, F64, F64, None, False),
    (32, F32, F32, F32, F32, F32, None, False),
    (16, F32, F16, F32, F32, F32, None, True),
    ("64", F64, F64, F64, F64, F64, None, False),
    ("32", F32, F32, F32, F32, F32, None, False),
    ("16", F32, F16, F32, F32, F32, None, True),
    ("bf16", F32, BF16, F32, F32, F32, None, False),
    ("params=float64", F64, F64, F64, F64, F64, None, False),
    ("compute=bfloat16", F32, BF16, F32, F32, F32, None, False),
    ("params=bf16,compute=f32", BF16, F32, F32, F32, BF16, None, False),
    ("params=bfloat16,compute=float16", BF16, F16, F32, F32, BF16, None, False),  # neither holds the other
    ("params=float64,compute=float32", F64, F32, F64, F64, F64, None, False),
    ("params=float16,buffers=float32,reduce=float32,output=float16", F16, F16, F32, F16, F32, None, False),
    ("params=bfloat16,master=float32", BF16, BF16, BF16, F32, BF16, F32, False),
    ("params=float16,scale=true", F16, F16, F16, F32, F16, None, True),
    ("params=float32,compute=float16,scale=false", F32, F16, F32, F32, F32, None, False),
    (" params = float32 , compute = bfloat16 , master = none ", F32, BF16, F32, F32, F32, None, False),
    ("params=float16,master=float32", F16, F16, F16, F32, F16, F32, True),
    (
        "params=float32,compute=bfloat16,reduce=float32,output=float32,buffers=float32,master=none,state=float32,"
        "grads=float32,rounding=nearest,scale=false",
        *(F32, BF16, F32, F32, F32, None, False),
    ),
]

# spelled, then master, state, grads, rounding
STORED = [
    ("params=bfloat16,state=float32", None, F32, BF16, "nearest"),
    ("params=bfloat16,grads=float32", None, BF16, F32, "nearest"),
    ("params=bfloat16,rounding=stochastic", None, BF16, BF16, "stochastic"),
    ("params=bfloat16,master=float32,state=bfloat16,rounding=stochastic", F32, BF16, BF16, "stochastic"),
    ("params=float32,state=bfloat16", None, BF16, F32, "nearest"),
    ("bf16-master", F32, F32, BF16, "nearest"),
    ("16-master", F32, F32, F16, "nearest"),
    ("params=float16,master=float32,state=bfloat16", F32, BF16, F16, "nearest"),
]


@pytest.mark.parametrize("row", STORED, ids=lambda row: row[0])
def test_what_is_stored_follows_params_and_master(row: tuple[object, ...]) -> None:
    policy = Policy.parse(row[0])  # type: ignore[arg-type]
    assert (policy.master, policy.state, policy.grads, policy.rounding) == row[1:]


@pytest.mark.parametrize(
    ("spelled", "reduce"),
    [
        ("params=bfloat16", BF16),
        ("params=bfloat16,grads=float32", F32),  # what was added up in float32 is not rounded on its way
        ("params=float16,grads=float32,reduce=float16", F16),
        ("params=float32,compute=bfloat16", F32),
    ],
)
def test_reduction_is_as_wide_as_what_it_reduces(spelled: str, reduce: torch.dtype) -> None:
    assert Policy.parse(spelled).reduce is reduce


def test_the_master_mode_is_spelled_as_documented() -> None:
    spelled = "params=bfloat16,compute=bfloat16,reduce=float32,output=float32,buffers=bfloat16,master=float32,"
    assert Policy.parse(f"{spelled}state=float32,grads=bfloat16,rounding=nearest,scale=false") == MODES["bf16-master"]
    spelled = "params=float16,compute=float16,reduce=float32,output=float32,buffers=float16,master=float32,"
    assert Policy.parse(f"{spelled}state=float32,grads=float16,rounding=nearest,scale=true") == MODES["16-master"]
    spelled = "params=bfloat16,compute=bfloat16,reduce=bfloat16,output=float32,buffers=bfloat16,master=none,"
    stored = "state=bfloat16,grads=bfloat16,rounding=stochastic,scale=false"
    assert Policy.parse(spelled + stored) == MODES["bf16-stochastic"]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: repr(row[0]))
def test_modes_aliases_and_defaults(row: tuple[object, ...]) -> None:
    policy = Policy.parse(row[0])  # type: ignore[arg-type]
    params, compute, reduce, output, buffers, master, scale = row[1:]
    rounding = "stochastic" if row[0] == "bf16-stochastic" else "nearest"
    stored = (master or params, params, rounding)  # the defaults of state, grads and rounding
    assert dataclasses.astuple(policy) == (params, compute, reduce, output, buffers, master, *stored, scale, ())
    assert policy.mixed == (row[1] is not row[2])
    assert Policy.parse(policy) is policy


def test_the_tables_above_are_all_modes_and_aliases() -> None:
    assert {row[0] for row in TABLE[:16]} == {*MODES, *ALIASES}
    assert all(str(policy) == name for name, policy in MODES.items())
    assert Policy() == MODES["32-true"] and str(Policy.parse("params=float32,compute=bfloat16")) == "bf16-mixed"


FLAT = [
    Policy(params, compute, reduce, output, buffers, master, scale)
    for params, compute, reduce, output, buffers in itertools.product(DTYPES, repeat=5)
    for master in ((None, F32) if params in (BF16, F16) else (None,))
    for scale in (False, True)
]


def test_every_policy_without_exceptions_parses_as_it_prints() -> None:
    assert len(set(FLAT)) == len(FLAT) == 4**4 * 2 * (1 + 1 + 2 + 2)  # half params may have a master
    for policy in FLAT:
        assert Policy.parse(str(policy)) == policy


PATTERNS = st.text(st.characters(exclude_characters=";:"), min_size=1).filter(
    lambda text: not any(character.isspace() for character in text)
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    base = draw(st.sampled_from(FLAT))
    allowed = FLAT if base.scale else [policy for policy in FLAT if not policy.scale]
    pairs = st.tuples(PATTERNS, st.sampled_from(allowed))
    exceptions = draw(st.lists(pairs, max_size=4, unique_by=lambda pair: pair[0]))
    return dataclasses.replace(base, exceptions=tuple(exceptions))


@given(policies())
@settings(deadline=None, max_examples=30)
def test_a_policy_is_a_value(policy: Policy) -> None:
    is_a_value(policy)


@pytest.mark.full
@given(policies())
@settings(deadline=None, max_examples=300)
def test_many_policies_are_values(policy: Policy) -> None:
    is_a_value(policy)


def is_a_value(policy: Policy) -> None:
    assert Policy.parse(str(policy)) == policy
    for same in (
        Policy.parse(str(policy)),
        copy.deepcopy(policy),
        pickle.loads(pickle.dumps(policy)),
        eval(repr(policy)),
    ):
        assert same == policy and hash(same) == hash(policy) and repr(same) == repr(policy)
    assert policy != dataclasses.replace(policy, exceptions=(*policy.exceptions, ("other.name", MODES["32-true"])))
    assert policy.flat == dataclasses.replace(policy, exceptions=())


def test_frozen() -> None:
    for change in ("params", "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(Policy(), change, BF16)
    assert {Policy(): 1}[Policy.parse("32")] == 1


def test_exceptions_are_read_in_every_form_and_the_first_that_covers_wins() -> None:
    policy = Policy.parse("bf16-mixed; blocks.0.norm: 64-true;*.norm:32-true ; blocks.0: 32 ; lm_head: params=bf16")
    norms, head = MODES["32-true"], Policy(BF16)
    pairs = (("blocks.0.norm", MODES["64-true"]), ("*.norm", norms), ("blocks.0", norms), ("lm_head", head))
    assert policy.exceptions == pairs
    assert Policy(compute=BF16, exceptions=pairs) == Policy(compute="bf16", exceptions=dict(pairs)) == policy
    assert Policy(compute=BF16, exceptions=[[name, str(each)] for name, each in pairs]) == policy
    expected = {
        "blocks.0.norm": MODES["64-true"],
        "blocks.0.norm.inner": MODES["64-true"],
        "blocks.1.norm": norms,
        "blocks.0.attn": norms,
        "blocks.01": MODES["bf16-mixed"],
        "lm_head": head,
        "": MODES["bf16-mixed"],
    }
    assert {name: policy.for_module(name) for name in expected} == expected


# what is given, and what the message must hold
BAD = [
    ("", "precision='' is no mode: allowed are 64-true, 32-true, 16-true, bf16-true, 16-mixed, bf16-mixed"),
    ("16-mixd", 'did you mean "16-mixed"?'),
    ("BF16-Mixed", 'did you mean "bf16-mixed"?'),
    ("bf16_true", 'did you mean "bf16-true"?'),
    ("fp16", 'did you mean "16-mixed"?'),
    ("Half", 'did you mean "16-true"?'),
    ("32-mixed", "precision='32-mixed' is no mode"),
    (8, "their aliases 64, 32, 16, '64', '32', '16', 'bf16'"),
    (True, "precision=True is no mode"),
    (16.0, "precision=16.0 is no mode"),
    (None, 'policies such as "params=float32,compute=bfloat16" or "bf16-mixed; *.norm: 32-true"'),
    (["16"], "precision=['16'] is no mode"),
    (torch.bfloat16, "precision=torch.bfloat16 is no mode"),
    ("params=float32,comput=bfloat16", "unknown part 'comput=bfloat16'"),
    ("params=float32,comput=bfloat16", "allowed keys are params, compute, reduce, output, buffers, master, state, "),
    ("params=float32,comput=bfloat16", 'did you mean "compute"?'),
    ("params=float32,bfloat16", "unknown part 'bfloat16' of the policy 'params=float32,bfloat16'"),
    ("params=float32,", "unknown part ''"),
    ("compute=bfloat17", "compute: unknown dtype 'bfloat17': allowed are float64, float32, bfloat16, float16; did"),
    ("compute=bfloat17", 'did you mean "bfloat16"?'),
    ("reduce=int8", "reduce: unknown dtype 'int8'"),
    ("master=no", "master (a dtype or none): unknown dtype 'no'"),
    ("scale=True", "scale='True': allowed are true and false; did you mean \"true\"?"),
    ("scale=1", "scale='1': allowed are true and false"),
    ("params=float32,params=float32", "params is given twice"),
    ("params=float32,master=bfloat16", "only half params have a master, the optimizer steps on others themselves; say"),
    ("params=float32,master=float32", "master=float32 beside params=float32: only half params have a master"),
    ("params=bfloat16,master=float16", "master=float16: allowed are float32 and none"),
    ("params=bfloat16,master=float64", "master=float64: allowed are float32 and none"),
    ("params=bfloat16,state=float16", "state=float16 under params=bfloat16: allowed are float32, bfloat16, and"),
    ("params=float64,state=float32", "state=float32 under params=float64: allowed are float64; leave it out"),
    ("params=float32,grads=bfloat16", "grads=bfloat16 under params=float32: gradients accumulate in their parameters'"),
    ("params=float64,grads=float32", "leave it out, or say grads=float32"),
    ("rounding=up", "rounding='up': allowed are nearest and stochastic"),
    ("rounding=stochastik", 'did you mean "stochastic"?'),
    ("params=float32,rounding=stochastic", "nothing is stored in a half dtype that it could round"),
    ("params=bfloat16,master=float32,rounding=stochastic", "for half params without a master, and for state=bfloat16"),
    ("bf16-mixed;", "bad exception '': expected 'pattern: mode', for example '*.norm: 32-true'"),
    ("bf16-mixed; norm", "bad exception 'norm': expected 'pattern: mode'"),
    ("bf16-mixed; norm: 32-tru", "precision='32-tru' is no mode"),
    ("bf16-mixed; a norm: 32-true", "bad name pattern 'a norm'"),
    ("bf16-mixed; : 32-true", "bad name pattern ''"),
    ("bf16-mixed; norm: 32-true; norm: 64-true", "the pattern 'norm' is given twice, the second is never used"),
    ("bf16-mixed; norm: 16-mixed", "the exception 'norm' wants the loss scaled, the policy around it does not"),
    ("bf16-mixed; norm: 16-mixed", "or choose a base that scales such as 16-mixed"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_input_is_refused_with_what_is_allowed(given: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Policy.parse(given)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_the_way_out_of_a_scaled_exception_is_a_valid_policy() -> None:
    with pytest.raises(ValueError) as error:
        Policy.parse("bf16-mixed; norm: 16-mixed")
    advice = str(error.value).partition("say ")[2].partition(", or choose")[0]
    assert Policy.parse(f"bf16-mixed; {advice}").for_module("norm") == Policy(F32, F16, scale=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": None}, "params: unknown dtype None"),
        ({"compute": 16}, "compute: unknown dtype 16"),
        ({"scale": "true"}, "scale='true': allowed are True and False"),
        ({"exceptions": "norm: 32-true"}, 'expected (pattern, mode) pairs, for example {"*.norm": "32-true"}'),
        ({"exceptions": ["norm: 32-true"]}, "expected (pattern, mode) pairs"),
        ({"exceptions": {"norm": "32-tru"}}, "precision='32-tru' is no mode"),
        ({"exceptions": {"": "32-true"}}, "bad name pattern ''"),
        ({"exceptions": {"a": "32-true; b: 64-true"}}, "the exception 'a' has exceptions of its own: list them beside"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Policy(**arguments)  # type: ignore[arg-type]
    assert message in str(error.value)
