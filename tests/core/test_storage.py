"""A URL and the scratch folder in which its files are written name each other."""

import os
import tempfile

import pytest

from pipeline.core.storage import display_path, local_folder, own_folder, url_of


def test_a_url_and_its_scratch_folder_name_each_other(monkeypatch, tmp_path):
    monkeypatch.setenv("RUSHES_SCRATCH", str(tmp_path / "scratch"))
    for url in ("s3://bucket/runs", "gs://b/a%20b", "s3://b/r?region=eu-west-1&scheme=http", "file:///data/runs"):
        folder = local_folder(url + "/" if "?" not in url else url)
        assert folder.is_absolute() and url_of(folder) == url
    below = url_of(local_folder("s3://b/r?region=x") / "try" / "checkpoints")
    assert below == "s3://b/r/try/checkpoints?region=x"
    assert url_of(tmp_path) is None and display_path(tmp_path) == str(tmp_path) and local_folder("runs") == "runs"


@pytest.mark.parametrize("trouble", ["another user's", "anyone may write it", "a link", "a file"])
@pytest.mark.parametrize("named", [True, False])
def test_a_scratch_folder_that_is_not_this_users_own_is_refused(monkeypatch, tmp_path, trouble, named):
    """In the temporary folder anyone can create the name first, with checkpoints of their own."""
    if named:
        monkeypatch.setenv("RUSHES_SCRATCH", str(tmp_path / "scratch"))
        folder = tmp_path / "scratch" / "s3%3A%2F%2Fb%2Fr"
    else:
        monkeypatch.delenv("RUSHES_SCRATCH", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        folder = tmp_path / f"rushes-scratch-{os.getuid()}"
    folder.parent.mkdir(exist_ok=True)
    if trouble == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    elif trouble == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        if trouble == "anyone may write it":
            folder.chmod(0o777)
        else:
            owner = os.getuid()
            monkeypatch.setattr(os, "getuid", lambda: owner + 1)
            if not named:
                folder.rename(folder.with_name(f"rushes-scratch-{owner + 1}"))
    with pytest.raises(ValueError, match="RUSHES_SCRATCH"):
        local_folder("s3://b/r")


def test_a_new_scratch_folder_is_closed_to_others(tmp_path):
    assert own_folder(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
