import numpy as np
import pytest

from precision_lab.evidence import LOOKS, weigh


def losses(values):
    return dict(enumerate(values))


def answers(difference, pairing, trials, seed=0):
    """What is said of modes that are worse by `difference` standard deviations, of losses that go together so much."""
    generator = np.random.default_rng(seed)
    said = []
    for _ in range(trials):
        base = generator.normal(size=LOOKS[-1])
        mode = difference + pairing * base + np.sqrt(1 - pairing**2) * generator.normal(size=LOOKS[-1])
        for count in LOOKS:
            answer = weigh(losses(mode[:count]), losses(base[:count])).answer
            if answer != "undecided":
                break
        said.append(answer)
    return {answer: said.count(answer) / trials for answer in ("safe", "worse", "undecided")}


def test_figures_are_those_of_the_pairs():
    found = weigh({1: 2.0, 2: 3.5, 3: 4.0, 9: 0.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert (found.seeds, found.difference, found.spread) == (3, pytest.approx(7 / 6), 1.0)
    assert found.margin == pytest.approx(4.303 * np.std([1, 1.5, 1], ddof=1) / np.sqrt(3))
    assert found.in_spreads == pytest.approx(7 / 6) and found.answer == "undecided"


def test_safe_takes_five_seeds_and_worse_three():
    base = losses([1.0, 2.0, 3.0, 4.0, 5.0])
    assert weigh(losses([1.1, 2.1, 3.1]), base).answer == "undecided"
    assert weigh(losses([1.1, 2.1, 3.1, 4.1, 5.1]), base).answer == "safe"
    assert weigh(losses([8.1, 9.1, 10.1]), base).answer == "worse"


def test_seeds_that_change_nothing_leave_no_room():
    same = losses([1.0] * 5)
    assert weigh(same, same).answer == "safe" and weigh(losses([1.01] * 5), same).answer == "worse"
    assert weigh(same, same).in_spreads is None


@pytest.mark.parametrize("pairing", [0.0, 0.9, 0.99])
def test_a_mode_at_the_bound_is_rarely_called_safe_and_one_beyond_it_hardly_ever(pairing):
    assert answers(1.0, pairing, 150)["safe"] <= 0.13
    assert answers(1.5, pairing, 150)["safe"] <= 0.02


@pytest.mark.parametrize("pairing", [0.5, 0.9])
def test_a_mode_that_does_not_differ_is_found_to_be_safe(pairing):
    said = answers(0.0, pairing, 150)
    assert said["safe"] >= 0.9 and said["worse"] <= 0.01
    assert answers(3.0, pairing, 100)["worse"] >= 0.98
