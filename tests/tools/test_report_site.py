"""A report as a folder for static hosts."""

import pytest
from made_up_run import make_run

from pipeline.core.errors import ConfigError, InputError
from pipeline.tools.report.follow import follow
from pipeline.tools.report_site import publish


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "eval/step 1").mkdir(parents=True)
    (folder / "eval/step 1/a.mp4").write_bytes(b"clip")
    (folder / "report.html").write_text('<img src="data:image/png;base64,AA"><video src="eval/step%201/a.mp4"></video>')
    return folder


def test_it_holds_the_page_and_what_it_links(run, tmp_path):
    site = tmp_path / "site"
    assert publish(run / "report.html", site).read_bytes() == (run / "report.html").read_bytes()
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert files == {"index.html", ".nojekyll", ".rushes-report", "eval/step 1/a.mp4"}
    (site / "old.mp4").touch()
    publish(run / "report.html", site)  # again, and nothing old stays
    assert not (site / "old.mp4").exists()


def test_other_folders_and_links_that_lead_out_are_refused(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(ConfigError, match="holds something else than a published report"):
        publish(run / "report.html", tmp_path / "mine")
    (tmp_path / "secret.png").touch()
    (run / "report.html").write_text('<img src="../secret.png">')
    with pytest.raises(InputError, match="leads out of"):
        publish(run / "report.html", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_followed_report_is_written_when_something_was_recorded(tmp_path):
    run = make_run(tmp_path, steps=0, finished=False)
    written, looks = [], []

    def find_run():
        looks.append(1)
        if len(looks) == 3:
            (run / "evals.jsonl").write_text("")
        if len(looks) == 5:
            (run / "summary.json").write_text('{"status": "finished"}')
        return run

    follow(find_run, lambda report: written.append((len(looks), "<script>" in report.read_text())), every_s=0.0)
    assert written == [(1, True), (3, True), (5, False)]
    site = publish(run / "report.html", tmp_path / "site").parent
    assert (site / "report.js").read_text().startswith("window.rushesReport = ")
