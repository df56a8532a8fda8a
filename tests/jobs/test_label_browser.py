"""`rushes label` in a real headless Chromium, by keyboard alone: a script looks at the page as a person would."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.browser import CHROMIUM, Browser
from pipeline.core.takes_table import save_takes
from pipeline.core.types import Media, PromptItem

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
# Mean brightness of what is shown now, left and right.
LOOK = """[...document.querySelectorAll('#takes > *')].map(shown => {
  const canvas = document.createElement('canvas'); canvas.width = canvas.height = 8;
  const brush = canvas.getContext('2d'); brush.drawImage(shown, 0, 0, 8, 8);
  return brush.getImageData(0, 0, 8, 8).data.filter((_, i) => i % 4 < 3).reduce((a, b) => a + b) / 192; })"""
READY = """document.getElementById('skip')?.disabled === false
  && [...document.querySelectorAll('video')].every(video => video.readyState > 1 && !video.seeking)
  && document.body.dataset.task"""
COUNT = "document.getElementById('count').textContent"


class Labelling:
    """The command, running."""

    def __init__(self, folder, port=0):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "label", str(folder), "--port", str(port), "--repeats", "0.25"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self.lines = []
        while not (self.lines and self.lines[-1].startswith("open ")):
            self.lines.append(self.process.stdout.readline())
            assert self.lines[-1], "".join(self.lines)
        self.url = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", self.lines[-1]).group()
        self.port = int(self.url.split(":")[2].split("/")[0])

    def end(self, number):
        self.process.send_signal(number)
        return "".join(self.lines) + self.process.communicate(timeout=30)[0]


@pytest.fixture
def folder(tmp_path):
    """Takes of constant grey, 4 clips of one prompt and 4 pictures of another, one of which is corrupt; take k of each
    has the level 40 + 50 k."""
    for index, (prompt, frames) in enumerate((("a clip", 6), ("a picture", 1))):
        pixels = np.zeros((4, frames, 32, 32, 3), np.uint8) + (40 + 50 * np.arange(4, dtype=np.uint8)).reshape(
            4, 1, 1, 1, 1
        )
        save_takes(
            tmp_path / "takes",
            Media(frames=pixels, fps=8.0),
            [PromptItem(index=index, text=prompt)] * 4,
            range(4),
            0,
            {},
        )
    (tmp_path / "takes" / "prompt-00001-take-03.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return tmp_path / "takes"


def level(name):
    return int(re.search(r"take-(\d+)", name).group(1))


def judge(page, choose):
    """Answers what is shown with the key that `choose(left, right)` names; waits for the next pair or the end."""
    page.call("Page.bringToFront")  # a browser paints no videos of a hidden window
    before = page.wait(READY)
    count = page.value(COUNT)
    page.key(choose(*page.value(LOOK)))
    page.wait(f"{COUNT} != {count!r} && document.getElementById('status').textContent == ''")
    return before


def brighter(left, right):
    assert min(left, right) > 20 and abs(left - right) > 20, f"seen: {left}, {right}"  # nothing shown is 0
    return "ArrowLeft" if left > right else "ArrowRight"


def test_two_people_label_by_keyboard_through_a_killed_server(folder, tmp_path):
    serving = Labelling(folder)
    with Browser(tmp_path / "profile") as browser:
        ada = browser.open(serving.url, width=390, height=844, dark=True)  # a phone
        ada.wait("document.activeElement && document.activeElement.id == 'name'")
        for letter in "Ada":
            ada.key(letter)
        ada.key("Enter")
        ada.wait(READY)
        boxes = ada.value(
            "[...document.querySelectorAll('#takes > *, #buttons button')].map(x => x.getBoundingClientRect().toJSON())"
        )
        assert all(0 <= box["left"] < box["right"] <= 390 and box["bottom"] <= 844 for box in boxes)
        assert abs(boxes[0]["width"] - boxes[1]["width"]) < 1 and boxes[0]["right"] <= boxes[1]["left"]
        assert all(box["height"] >= 44 for box in boxes[2:])
        assert ada.value("document.documentElement.scrollWidth") == 390
        assert max(map(int, re.findall(r"\d+", ada.value("getComputedStyle(document.body).backgroundColor")))) < 60
        assert "take-" not in ada.value("document.documentElement.outerHTML")  # no name tells which is which

        # Clips play in step, and begin again together.
        while not ada.value("document.querySelectorAll('video').length"):
            judge(ada, brighter)
        times = []
        for _ in range(12):
            times.append(ada.value("[...document.querySelectorAll('video')].map(video => video.currentTime)"))
            time.sleep(0.1)
        assert max(abs(left - right) for left, right in times) < 0.25
        lefts = [left for left, _ in times]
        assert any(later < earlier for earlier, later in zip(lefts, lefts[1:], strict=False)), lefts

        # An answer is undone and given again; a pair is skipped; one is a tie.
        task = judge(ada, lambda left, right: "ArrowRight" if left > right else "ArrowLeft")  # a slip
        count = ada.value(COUNT)
        ada.key("u")
        ada.wait(f"{COUNT} != {count!r}")
        assert ada.wait(READY) == task
        judge(ada, brighter)
        skipped = judge(ada, lambda *_: "ArrowDown")
        tied = judge(ada, lambda *_: " ")

        # Bob begins at the same time; the server dies before an answer of each.
        bob = browser.open(serving.url + "?rater=Bob")
        judge(bob, brighter)
        killed = serving.end(signal.SIGKILL)
        for page in (ada, bob):
            page.call("Page.bringToFront")
            page.wait(READY)
            page.key(brighter(*page.value(LOOK)))
        ada.wait("document.getElementById('status').textContent.startsWith('Not saved yet')")
        serving = Labelling(folder, serving.port)
        for page in (ada, bob):
            page.wait(f"{READY} && document.getElementById('status').textContent == ''")
        while "judged" not in bob.value("document.getElementById('prompt').textContent"):
            judge(bob, brighter)
        assert skipped != tied
        addresses = ada.addresses()
        assert addresses and all(
            url.startswith((serving.url, "data:", "about:", f"blob:http://127.0.0.1:{serving.port}/"))
            for url in addresses
        )
        assert not ada.problems()
    output = serving.end(signal.SIGTERM)  # the browser is closed before that; Ada has not finished

    assert output.count("left out: ") == 1 and "prompt-00001-take-03.png" in output
    assert "Traceback" not in killed + output
    rows = pq.read_table(folder / "labels.parquet").to_pylist()
    by_rater = {name: [row for row in rows if row["rater"] == name] for name in ("Ada", "Bob")}
    firsts = [{row["path_a"], row["path_b"]} for row in by_rater["Bob"] if row["repeat_of"] is None]
    assert len(firsts) == 6 + 3 == len(set(map(frozenset, firsts)))  # all pairs of clips, and of whole pictures
    assert len(by_rater["Bob"]) > len(firsts)  # some were shown again
    assert [row["label"] for row in by_rater["Ada"]].count("tie") == 1
    for row in rows:
        if row["label"] != "tie":
            better, worse = ("path_a", "path_b") if row["label"] == "a" else ("path_b", "path_a")
            assert level(row[better]) > level(row[worse]), row
    assert re.search(r"Bob.*100\.0 %", output) and "raters agree with each other" in output
