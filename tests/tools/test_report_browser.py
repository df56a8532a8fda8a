"""A run's report and the page of two runs in a real headless Chromium, on a phone's screen and a desk's."""

from __future__ import annotations

import pytest
from made_up_run import make_run

from benchmarks.browser import CHROMIUM, Browser
from pipeline.tools.report.compare import build_comparison
from pipeline.tools.report.follow import write_followed
from pipeline.tools.report.report import build_report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
LOADED = "document.readyState === 'complete' && location.protocol === 'file:'"
# What reaches beyond the page's right edge; tables and configs scroll in boxes of their own.
BEYOND = """[...document.querySelectorAll('main *')].filter(part => !part.closest('.scroll > *, pre, svg')
  && part.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(part => part.outerHTML.slice(0, 90))"""
WIDTH = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
PICTURES = "[...document.querySelectorAll('.take video')].map(clip => clip.getBoundingClientRect().width)"
TIMES = "[...document.querySelectorAll('.pair')][0].querySelectorAll('video')"
APART = f"""new Promise(done => {{ const [one, two] = {TIMES}; let most = 0; two.playbackRate = 0.25;
  const watch = setInterval(() => {{ most = Math.max(most, Math.abs(one.currentTime - two.currentTime)); }}, 20);
  setTimeout(() => {{ clearInterval(watch); done(most); }}, 1600); }})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    names = ["a_run_whose_name_is_one_long_word_of_sixty_letters_or_even_more", "two"]
    runs = [make_run(root, name=name) for name in names]
    for run in runs:
        (run / "metrics.jsonl").unlink()  # plots take most of the time
    return {"report": build_report(runs[0]), "comparison": build_comparison(runs, root / "page.html")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_and_pictures_have_their_size(pages, browser, name, width):
    page = browser.open(pages[name].as_uri(), width=width, dark=width == 390)
    page.wait(LOADED)
    scrolled, visible = page.value(WIDTH)
    assert scrolled <= visible <= width and page.value(BEYOND) == []
    widths = page.value(PICTURES)
    assert len(widths) == 12 and min(widths) >= 48  # the real size, or larger
    page.value("document.querySelector('.take').click()")
    opened = page.value("document.querySelector('.take video').getBoundingClientRect().width")
    assert opened >= min(width, 800) * 0.69 and page.value(BEYOND) == []
    assert page.problems() == [] and all(url.startswith(("file:", "data:", "about:")) for url in page.addresses())
    page.close()


def test_clips_of_a_row_play_in_step(pages, browser):
    page = browser.open(pages["comparison"].as_uri())
    page.wait(LOADED)
    page.wait("document.querySelector('.pair').scrollIntoView() || document.querySelector('video').currentTime > 0.2")
    assert page.value(APART) < 0.45  # though one is four times as slow: it would be 0.8 s behind
    page.value("""(() => { const slider = document.querySelector('.player input');
      slider.value = 500; slider.dispatchEvent(new Event('input')); })()""")
    times = page.wait(
        f"[...{TIMES}].every(clip => clip.paused && !clip.seeking) && [...{TIMES}].map(c => c.currentTime)"
    )
    assert len(times) == 2 and times[0] == times[1] > 0.4
    page.close()


def test_a_followed_report_renews_itself_from_a_file(tmp_path, browser):
    run = make_run(tmp_path, steps=0, finished=False)
    report = write_followed(run, ended=False)
    html = report.read_text("utf-8")
    assert html.count("}, 10000);") == 1
    report.write_text(html.replace("}, 10000);", "}, 200);"), "utf-8")  # asks more often
    page = browser.open(report.as_uri())
    page.wait(LOADED)
    page.value("window.old = true")
    page.wait("window.rushesReport")
    page.value("new Promise(done => setTimeout(done, 500))")  # it has asked again, and stays
    assert page.value("window.old") and "no step done yet" in page.value("document.body.innerText")
    write_followed(run, ended=True)
    page.wait("!window.old && document.readyState === 'complete'", 20)
    assert page.value("document.querySelector('script') === null") and page.problems() == []
    page.close()
