"""Name patterns, each beside names that it matches and names that it does not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_core.policy.patterns import check_all_used, check_pattern, covers, matches

# pattern, names it matches, names it does not match
TABLE = [
    ("lm_head", ["lm_head", "model.lm_head", "a.b.lm_head"], ["my_lm_head", "lm_head2", "lm_head.weight", ""]),
    ("blocks.1", ["blocks.1", "model.blocks.1"], ["blocks.10", "blocks.11", "blocks.1.norm", "xblocks.1", "blocks"]),
    ("*.norm", ["norm", "blocks.0.norm"], ["norm1", "blocks.0.prenorm", "norm.weight"]),
    ("norm", ["norm", "blocks.0.norm"], ["prenorm", "norm1"]),
    ("*norm", ["norm", "prenorm", "a.prenorm"], ["norm1"]),
    ("norm*", ["norm", "norm1", "a.norm2", "norm.weight"], ["prenorm"]),
    ("blocks.*.bias", ["blocks.0.bias", "blocks.0.attn.bias"], ["blocks.bias", "blocks.0.bias2"]),
    ("blocks.*.norm.*", ["blocks.0.norm.weight"], ["blocks.0.norm", "blocks.norm.weight"]),
    ("*", ["", "anything", "a.b.c"], []),
    ("a+b", ["a+b", "x.a+b"], ["aab"]),  # no regular expression
    (".", [], ["a", "ab"]),
]


@pytest.mark.parametrize(("pattern", "yes", "no"), TABLE, ids=[row[0] for row in TABLE])
def test_matches(pattern: str, yes: list[str], no: list[str]) -> None:
    assert {name: matches(pattern, name) for name in yes + no} == {
        **dict.fromkeys(yes, True),
        **dict.fromkeys(no, False),
    }


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("blocks.1", "blocks.1.norm.weight", True),
        ("blocks.1", "blocks.10.norm.weight", False),
        ("blocks.1", "blocks.1", True),
        ("attn", "blocks.0.attn.qkv", True),
        ("attn", "attn", True),
        ("attn", "blocks.0", False),
        ("*.norm", "norm.weight", True),
        ("*", "", True),
        ("norm", "", False),
    ],
)
def test_what_is_said_of_a_module_holds_for_everything_inside_it(pattern: str, name: str, covered: bool) -> None:
    assert covers(pattern, name) is covered


NAMES = st.lists(st.text("ab1_", min_size=1, max_size=3), min_size=1, max_size=5).map(".".join)


@given(NAMES, NAMES)
@settings(deadline=None)
def test_a_name_matches_itself_and_what_ends_with_it_after_a_dot(name: str, other: str) -> None:
    assert matches(name, name)
    assert matches(name, other) == (other == name or other.endswith("." + name))
    assert covers(name, other) == (f".{name}." in f".{other}.")


@pytest.mark.parametrize("pattern", ["", " ", "a b", "a;b", "a:b", "a\nb", "\u2003", None, 3])
def test_a_bad_pattern_is_refused(pattern: object) -> None:
    with pytest.raises(ValueError, match=r"bad name pattern .*: expected a dotted name such as 'lm_head', 'blocks\.1'"):
        check_pattern(pattern)  # type: ignore[arg-type]


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name() -> None:
    names = ["", "blocks.0.norm", "blocks.1.norm", "lm_head"]
    check_all_used(["lm_head", "*.norm", "blocks.1.*"], names, "module")
    check_all_used([], names, "module")
    for pattern, hint in [
        ("lm_haed", '; did you mean "lm_head"?'),
        ("blocks.0.nrm", '; did you mean "blocks.0.norm"?'),
        ("nrm", '; did you mean "norm"?'),
        ("zzzz", ""),
    ]:
        with pytest.raises(ValueError) as error:
            check_all_used(["lm_head", pattern], names, "module")
        assert str(error.value) == f"the pattern {pattern!r} matches no module of this model{hint} [no-such-module]"


def test_a_pattern_may_be_asked_to_cover_instead_of_match() -> None:
    check_all_used(["bn"], ["layer.bn.running_mean"], "buffer", covers)
    with pytest.raises(ValueError, match="the pattern 'bn' matches no buffer"):
        check_all_used(["bn"], ["layer.bn.running_mean"], "buffer")
