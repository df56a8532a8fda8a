"""Rubrics of VLM judges: the question and how the answer is read, in a YAML file that is checked when loaded.

    mode: likert            # likert: numbers found by patterns; rating: a digit, by its probability; yes_no:
                            # probability of yes; pairwise: which is better
    system: You are …       # optional; the same for every take, before the pictures: vLLM caches it
    prompt: |               # {prompt} is the take's prompt; {frames} and {fps} describe a clip; {metadata.key} a column
      Rate how well the picture shows "{prompt}".  Alignment (1-5): X
    axes:                   # likert: one pattern each, whose first group is the number
      alignment: 'Alignment \\(1-5\\): ([0-9.]+)'
    range: [1, 5]           # likert: numbers outside are not accepted
    source: false           # also show the prompt's conditioning image, first (for edits)
    max_tokens: 256

yes_no has `yes` and `no` (lists of answers; default [yes] and [no]). rating has `range` (of digits): the judge answers
with one of them, and the score is the mean digit under the probabilities of the answer's first token, which tells takes
apart that would all get a 4. pairwise has `first` and `second` (patterns) and
may have `tie`, or has `axes` whose numbers are the first one's share (0 to 1); `labels: false` shows a pair without the
words "Image 1:" and "Image 2:".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.config.messages import show
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.files import did_you_mean
from pipeline.core.reading import MAX_YAML, parse_yaml, read_text, yaml_keys
from pipeline.core.types import PromptItem

MODES = ("likert", "rating", "yes_no", "pairwise")
_KEYS = {
    "likert": {"axes", "range", "weights"},
    "rating": {"range"},
    "yes_no": {"yes", "no"},
    "pairwise": {"first", "second", "tie", "axes", "labels"},
}
_PLACE = re.compile(r"\{(prompt|frames|fps|metadata\.[A-Za-z0-9_]+)\}")
_COMMON = {"mode", "system", "prompt", "source", "max_tokens"}


class Unparseable(Exception):
    """The judge's answer does not follow the rubric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rubric:
    mode: str
    prompt: str
    system: str | None = None
    source: bool = False
    max_tokens: int = 512
    axes: dict[str, re.Pattern] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    low: float = 1.0
    high: float = 5.0
    answers: dict[str, float] = field(default_factory=dict)  # yes_no, rating: what the first token may say -> score
    first: re.Pattern | None = None
    second: re.Pattern | None = None
    tie: re.Pattern | None = None
    labels: bool = True

    def fill(self, prompt: PromptItem, frames: int, fps: float) -> str:
        """The question about one take. Other text in braces is left unchanged."""

        def value(match: re.Match) -> str:
            name = match.group(1)
            if name.startswith("metadata."):
                if name[9:] not in prompt.metadata:
                    raise RewardError(f"the rubric wants {{{name}}}, which prompt {prompt.index} has no metadata for")
                return str(prompt.metadata[name[9:]])
            return {"prompt": prompt.text, "frames": str(frames), "fps": f"{fps:g}"}[name]

        return _PLACE.sub(value, self.prompt)

    def read_likert(self, text: str) -> dict[str, float]:
        """{"score": weighted mean of the axes on 0..1, axis: number}. Raises `Unparseable`."""
        values = {}
        for axis, pattern in self.axes.items():
            numbers = {match.group(1) for match in pattern.finditer(text)}
            if len(numbers) != 1:
                problem = "is there more than once" if numbers else "is not in the answer"
                raise Unparseable(f"{axis} {problem}: {text!r:.120}")
            try:
                values[axis] = float(numbers.pop())
            except (TypeError, ValueError):
                raise Unparseable(f"{axis} is no number: {text!r:.120}") from None
            if not self.low <= values[axis] <= self.high:
                raise Unparseable(f"{axis} = {values[axis]:g} is outside {self.low:g} to {self.high:g}")
        weights = [self.weights.get(axis, 1.0) for axis in values]
        mean = sum(w * v for w, v in zip(weights, values.values(), strict=True)) / sum(weights)
        return {"score": (mean - self.low) / (self.high - self.low), **values}

    def read_first(self, top: Sequence[tuple[str, float]]) -> float:
        """Mean of the answers' scores by the first token's (text, log-probability) candidates, the others left out:
        with yes and no, P(yes) / (P(yes) + P(no)). Raises `Unparseable`."""
        mass = total = 0.0
        for token, log_prob in top:
            value = self.answers.get(bare(token))
            if value is not None and not math.isnan(log_prob):
                mass += math.exp(log_prob)
                total += math.exp(log_prob) * value
        if mass <= 0.0:
            raise Unparseable(f"none of {', '.join(self.answers)} is among the candidates {[t for t, _ in top][:8]}")
        return total / mass

    def read_preference(self, text: str) -> float:
        """How far the first of a pair is better: 1, 0, 0.5 for a tie; or the mean of its shares. Raises `Unparseable`
        unless exactly one verdict is said."""
        if self.axes:
            return self.read_likert(text)["score"]
        patterns = ((1.0, self.first), (0.0, self.second), (0.5, self.tie))
        verdicts = [value for value, pattern in patterns if pattern is not None and pattern.search(text)]
        if len(verdicts) != 1:
            raise Unparseable(f"the answer names {'neither' if not verdicts else 'both'}: {text[-120:]!r}")
        return verdicts[0]


def bare(token: str) -> str:
    """The word that a token says, whatever its case and punctuation."""
    return token.strip().strip(".,:!\"'").lower()


def builtin_rubrics() -> list[str]:
    folder = resources.files("pipeline") / "rewards" / "models" / "rubrics"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_rubric(source: str) -> Rubric:
    """A rubric from a YAML file or one of those that ship. Raises `ConfigError` naming file, key and fix."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        shipped = builtin_rubrics()
        if source not in shipped:
            hint = did_you_mean(source, shipped)
            raise ConfigError(
                f"rubric: found {show(source)}{hint}; expected a .yaml file or one of {', '.join(shipped)}"
            )
        text = (resources.files("pipeline") / "rewards" / "models" / "rubrics" / f"{source}.yaml").read_text(
            encoding="utf-8"
        )
    else:
        text = read_text(path, MAX_YAML, ConfigError)
    data, node = parse_yaml(text, f"rubric {source}", ConfigError)
    yaml_keys(node, f"rubric {source}", ConfigError)
    return parse_rubric(data, source)


def parse_rubric(data: Any, source: str) -> Rubric:
    def fail(message: str) -> ConfigError:
        return ConfigError(f"rubric {source}: {message}")

    if not isinstance(data, dict):
        raise fail("expected keys such as mode and prompt")
    mode = data.get("mode")
    if mode not in MODES:
        raise fail(f"mode: found {show(mode)}{did_you_mean(mode or '', MODES)}; expected one of {', '.join(MODES)}")
    for key in data:
        if key not in _COMMON | _KEYS[mode]:
            allowed = sorted(_COMMON | _KEYS[mode])
            raise fail(f"unknown key {key!r}{did_you_mean(key, allowed) or '; the keys are ' + ', '.join(allowed)}")
    if not isinstance(data.get("prompt"), str) or not data["prompt"].strip():
        raise fail("prompt: the text of the question is missing")
    fields: dict[str, Any] = {"mode": mode, "prompt": data["prompt"], "system": data.get("system")}
    if not isinstance(data.get("system"), str | None):
        raise fail(f"system: found {data['system']!r}; expected a text")
    if _PLACE.search(data.get("system") or ""):
        raise fail("system: it is the same for every take and sent as it is; {prompt} and the like go into prompt")
    if not isinstance(data.get("source", False), bool):
        raise fail(f"source: found {data['source']!r}; expected true or false")
    fields["source"] = data.get("source", False)
    if "max_tokens" in data:
        if not isinstance(data["max_tokens"], int) or data["max_tokens"] < 1:
            raise fail(f"max_tokens: found {data['max_tokens']!r}; expected a whole number of at least 1")
        fields["max_tokens"] = data["max_tokens"]
    if mode == "likert":
        fields |= _likert(data, fail)
    elif mode == "rating":
        low, high = _range(data.get("range"), fail)
        if not (low.is_integer() and high.is_integer() and 0 <= low and high <= 9):
            raise fail(f"range: found {data['range']!r}; expected two digits, since the answer is one token")
        fields["answers"] = {str(n): (n - low) / (high - low) for n in range(int(low), int(high) + 1)}
    elif mode == "yes_no":
        fields["answers"] = _yes_no(data, fail)
    else:
        fields |= _pairwise(data, fail)
    return Rubric(**fields)


def _likert(data: dict, fail: Any) -> dict[str, Any]:
    axes = data.get("axes")
    if not isinstance(axes, dict) or not axes or "score" in axes:
        raise fail("axes: expected one pattern per axis (and none called score)")
    low, high = _range(data.get("range", [1, 5]), fail)
    weights = data.get("weights") or {}
    positive = isinstance(weights, dict) and all(isinstance(w, int | float) and w > 0 for w in weights.values())
    if not positive or not set(weights) <= set(axes):
        raise fail(f"weights: found {show(weights)}; expected a number above 0 for some of {', '.join(map(str, axes))}")
    patterns = {str(axis): _pattern(pattern, f"axes.{axis}", 1, fail) for axis, pattern in axes.items()}
    return {"axes": patterns, "weights": weights, "low": low, "high": high}


def _range(bounds: Any, fail: Any) -> tuple[float, float]:
    numeric = isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)
    if not numeric or not bounds[0] < bounds[1]:
        raise fail(f"range: found {show(bounds)}; expected [lowest, highest]")
    return float(bounds[0]), float(bounds[1])


def _yes_no(data: dict, fail: Any) -> dict[str, float]:
    answers: dict[str, float] = {}
    for key, score in (("yes", 1.0), ("no", 0.0)):
        words = data.get(key, [key])
        if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
            raise fail(f"{key}: expected a list of answers, quoted (YAML reads a bare {key} as a truth value)")
        if {word.lower() for word in words} & set(answers):
            raise fail("yes and no share an answer")
        answers |= {word.lower(): score for word in words}
    return answers


def _pairwise(data: dict, fail: Any) -> dict[str, Any]:
    if not isinstance(data.get("labels", True), bool):
        raise fail(f"labels: found {data['labels']!r}; expected true or false")
    fields: dict[str, Any] = {"labels": data.get("labels", True)}
    if "axes" in data:
        if {"first", "second", "tie"} & set(data):
            raise fail("axes: the verdict is read from the axes or by first, second and tie, not by both")
        return fields | _likert({"axes": data["axes"], "range": [0, 1]}, fail)
    for key in ("first", "second", *(["tie"] if "tie" in data else [])):
        fields[key] = _pattern(data.get(key), key, 0, fail)
    return fields


def _pattern(value: Any, key: str, groups: int, fail: Any) -> re.Pattern:
    if not isinstance(value, str) or not value:
        raise fail(f"{key}: expected a regular expression")
    try:
        pattern = re.compile(value, flags=re.IGNORECASE)
    except re.error as error:
        raise fail(f"{key}: {value!r} is not a regular expression ({error})") from error
    if pattern.groups < groups:
        raise fail(f"{key}: {value!r} needs a group, (…), around the number")
    return pattern
