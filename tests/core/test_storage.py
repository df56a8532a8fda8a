"""A URL and the scratch folder in which its files are written name each other."""

from pipeline.core.storage import display_path, local_folder, url_of


def test_a_url_and_its_scratch_folder_name_each_other(monkeypatch, tmp_path):
    monkeypatch.setenv("RUSHES_SCRATCH", str(tmp_path / "scratch"))
    for url in ("s3://bucket/runs", "gs://b/a%20b", "s3://b/r?region=eu-west-1&scheme=http", "file:///data/runs"):
        folder = local_folder(url + "/" if "?" not in url else url)
        assert folder.is_absolute() and url_of(folder) == url
    below = url_of(local_folder("s3://b/r?region=x") / "try" / "checkpoints")
    assert below == "s3://b/r/try/checkpoints?region=x"
    assert url_of(tmp_path) is None and display_path(tmp_path) == str(tmp_path) and local_folder("runs") == "runs"
