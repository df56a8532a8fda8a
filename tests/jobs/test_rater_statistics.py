"""Consistency of raters: the published example of Krippendorff's alpha, and small cases worked out by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from jobs.common.rater_statistics import RaterAnswer, krippendorff_alpha, print_raters, summarise_raters

# Krippendorff (2011), data set D: four observers, twelve units, nominal values, some missing.
PUBLISHED = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


def test_alpha_is_that_of_the_published_example():
    columns = zip(*(row.split() for row in PUBLISHED), strict=True)
    units = [[int(value) for value in column if value != "."] for column in columns]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_is_1_for_agreement_0_for_chance_and_unknown_without_variety():
    assert krippendorff_alpha([[1, 1], [-1, -1], [0, 0, 0]]) == 1.0
    values = np.random.default_rng(0).choice([-1, 0, 1], (4000, 2), p=[0.6, 0.1, 0.3])  # skewed: 46 % agree by chance
    assert abs(krippendorff_alpha(values.tolist())) < 0.05
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None and krippendorff_alpha([[1], [0]]) is None


def answer(rater, a, b, label, id=None, repeat_of=None, prompt="p"):
    return RaterAnswer(rater, prompt, a, b, label, id, repeat_of)


def test_raters_are_compared_by_take_whatever_the_order_and_repeats_stand_for_themselves():
    answers = [
        answer("ada", "x", "y", 1, "1"),
        answer("bob", "y", "x", -1),  # the same opinion, shown the other way round
        answer("ada", "v", "w", 0, "2", prompt="q"),
        answer("bob", "v", "w", 1, prompt="q"),
        answer("ada", "y", "x", -1, "3", "1"),  # as before
        answer("ada", "v", "w", 1, "4", "2", prompt="q"),  # another answer than before
        answer("bob", "m", "n", 1),  # nobody else's
    ]
    summary = summarise_raters(answers)
    ada, bob = summary["raters"]
    assert (ada["answers"], ada["ties"], ada["repeats"], ada["consistency"]["mean"]) == (2, 1, 2, 0.5)
    assert (bob["answers"], bob["repeats"], bob["consistency"]) == (3, 0, None)
    assert summary["shared"] == 2 and summary["agreement"]["mean"] == 0.5
    # values 1 1 | 0 1: n = 4, o_11 = 2 of n_1 = 3, o_00 = 0 of n_0 = 1
    assert summary["alpha"] == pytest.approx(1 - 3 * 2 / (3 * 1 + 1 * 3))
    console = Console(file=io.StringIO(), width=100)
    print_raters(summary, console)
    assert "50.0 %" in console.file.getvalue() and "on 2 shared pairs" in console.file.getvalue()
