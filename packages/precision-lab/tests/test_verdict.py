import pytest

from precision_lab.results import Comparison, Row
from precision_lab.verdict import judge


def row(mode, held_out, size, seconds=0.1, seed=0):
    figures = (held_out, size, size, 2 * size, 10 * size, 0)
    return Row(mode, "done", "", [2.0], [seconds], *figures, seed=seed, repeat=seed > 0)


def compared(*rows, spread=(1.9, 2.0, 2.1)):
    baseline = row("32-true", spread[0], 100)
    repeats = [row("32-true", loss, 100, seed=seed) for seed, loss in enumerate(spread[1:], 1)]
    return Comparison(1, 0, [row("64-true", 1.9, 200, 0.2), baseline, *rows], repeats=repeats)


def test_the_cheapest_within_the_spread_is_taken():
    mixed, true = row("bf16-mixed", 1.95, 100, 0.05), row("bf16-true", 1.99, 50, 0.08)
    comparison = compared(mixed, true, row("16-true", 2.6, 40))
    assert comparison.spread() == pytest.approx(0.1)
    assert comparison.in_spreads(true) == pytest.approx(0.9)
    verdict = judge(comparison)
    assert verdict.take == "bf16-true" and verdict.headline == "Take bf16-true"
    assert verdict.modes == dict.fromkeys(("64-true", "32-true", "bf16-mixed", "bf16-true"), "safe") | {
        "16-true": "worse"
    }
    assert "held-out +0.0900, 0.9 standard deviations" in verdict.sentences[0]
    assert "0.80 x its time, 0.50 x its bytes" in verdict.sentences[0]
    assert verdict.sentences[1].startswith("Faster: bf16-mixed")
    assert verdict.sentences[2] == ("Worse: 16-true, held-out +0.7000, 7.0 standard deviations of 32-true over seeds.")


def test_where_32_true_is_faster_the_mode_to_take_says_its_time_and_nothing_is_faster_than_itself():
    verdict = judge(compared(row("bf16-true", 1.99, 50, 0.12)))
    assert verdict.take == "bf16-true" and "1.20 x its time" in verdict.sentences[0]
    assert not any(sentence.startswith("Faster") for sentence in verdict.sentences)


def test_a_mode_that_is_worse_by_more_than_the_spread_is_not_taken():
    verdict = judge(compared(row("bf16-true", 2.01, 50)))
    assert verdict.headline == "Stay with 32-true" and verdict.modes["bf16-true"] == "worse"


def test_a_mode_whose_updates_round_to_nothing_is_not_taken_although_its_loss_is_as_good():
    half = row("bf16-true", 1.9, 50)
    half.unchanged = [("weight", 21, 100)]
    verdict = judge(compared(half))
    assert verdict.headline == "Stay with 32-true" and verdict.modes["bf16-true"] == "swallows"
    assert any(
        each.startswith("Not taken: bf16-true, held-out +0.0000 in these steps, but 21%") for each in verdict.sentences
    )
    half.unchanged = [("weight", 20, 100)]
    assert judge(compared(half)).take == "bf16-true"


def test_a_variant_says_what_its_precision_alone_costs_and_how_much_trains():
    comparison = compared(row("32-true+lora", 2.4, 30), row("nf4+lora", 2.45, 20), row("nf4", 1.92, 15))
    for each in comparison.rows:
        each.trains = 0.0625 if each.mode.startswith("nf4") else 1.0
    verdict = judge(comparison)
    assert verdict.take == "nf4" and "it trains 6.2% of the parameters" in verdict.sentences[0]
    assert verdict.sentences[2].endswith("5.5 standard deviations of 32-true over seeds (+0.0500 beside 32-true+lora).")


def test_a_mode_with_several_seeds_is_judged_by_their_mean():
    comparison = compared(row("bf16-true", 1.8, 50))
    comparison.repeats += [row("bf16-true", 2.3, 50, seed=1), row("bf16-true", 2.4, 50, seed=2)]
    bf16 = comparison.rows[-1]
    assert comparison.difference(bf16) == pytest.approx((-0.1 + 0.3 + 0.3) / 3)
    assert judge(comparison).modes["bf16-true"] == "worse"


def test_without_a_spread_nothing_is_said_to_be_safe():
    comparison = Comparison(1, 0, [row("32-true", 2.0, 100), row("bf16-true", 2.0, 50)])
    verdict = judge(comparison)
    assert verdict.take is None and verdict.modes["bf16-true"] == "unknown"
    assert "One seed of 32-true" in verdict.sentences[0] and "--seeds 3" in verdict.sentences[0]
    assert "No finished 32-true" in judge(Comparison(1, 0, [row("bf16-true", 2.0, 50)])).sentences[0]
