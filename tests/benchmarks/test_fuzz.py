"""A sample of the fuzz (`benchmarks.resilience.fuzz` runs all of it): no internal error, no hang, nothing written
outside of the working folder, nothing accepted that must be refused; and the fuzz notices each of these."""

import itertools
import os
import random
import time

import pytest

from benchmarks.resilience import fuzz, fuzz_areas
from pipeline.core.errors import RushesError

SAMPLE = {
    "config": 0.01,
    "text": 0.15,
    "command line": 0.05,
    "request bodies": 0.15,
    "media": 0.2,
    "checkpoints": 0.15,
    "run folders": 0.04,
    "endpoint answers": 0.15,
}


@pytest.mark.parametrize("area", SAMPLE)
def test_a_sample_of_each_area(area, monkeypatch):
    monkeypatch.setattr(fuzz_areas, "DRY_SHARE", 0.0)
    findings, rng = fuzz.Findings(), random.Random(f"sample {area}")
    with fuzz.Sandbox() as box:
        cases = (case for case in fuzz.areas()[area](box.work, random.Random(area)) if rng.random() < SAMPLE[area])
        fuzz.run_cases(itertools.islice(cases, 60), box, findings)
    assert findings.findings == [] and sum(findings.counts[area].values()) >= 5


def test_the_fuzz_notices_what_it_looks_for(capsys):
    outside = os.path.abspath("never-written")

    def refuse():
        raise RushesError("one line")

    def two_lines():
        raise RushesError("one line\nand another")

    def fail():
        raise KeyError("step")

    def leave():
        raise SystemExit(3)

    def write_outside():
        with pytest.raises(OSError):
            open(f"{outside}/x", "w")

    outcomes = {
        "accepted": [("fine", lambda: None, False)],
        "refused": [("refused", refuse, True)],
        "wrong": [("must be refused", lambda: None, True)],
        "internal": [("bug", fail, False), ("exit", leave, False), ("two lines", two_lines, False)],
        "hang": [("endless", lambda: time.sleep(9), False)],
        "outside": [("elsewhere", write_outside, False)],
    }
    findings = fuzz.Findings()
    with fuzz.Sandbox() as box:
        for outcome, inputs in outcomes.items():
            cases = (fuzz.Case(area=outcome, name=name, run=run, must_refuse=refuse) for name, run, refuse in inputs)
            fuzz.run_cases(cases, box, findings, ends_s=0.2)
    assert {area: dict(counts) for area, counts in findings.counts.items()} == {
        outcome: {outcome: len(inputs)} for outcome, inputs in outcomes.items()
    }


def test_a_command_that_ends_in_an_internal_error_is_a_finding(monkeypatch):
    from jobs import cli

    monkeypatch.setattr(cli, "main", lambda arguments: 70)
    with pytest.raises(AssertionError):
        fuzz.rushes("list")
