"""A run's report as a folder that any static host serves: index.html and the media that it links."""

from __future__ import annotations

import re
import shutil
from html import unescape
from pathlib import Path
from urllib.parse import unquote

from pipeline.core.errors import ConfigError
from pipeline.core.files import atomic_write
from pipeline.core.safe_paths import file_inside
from pipeline.tools.report.follow import STAMP_FILE
from pipeline.tools.report.record import COPY_IT

MARK = ".rushes-report"  # in folders that this module wrote, which it may write again


def publish(report: Path, folder: Path) -> Path:
    """Copies `report` (report.html in its run's folder) to `folder`/index.html, with what it links.

    Returns index.html. Raises ConfigError for a folder that holds anything else, and InputError for a link that leads
    out of the run.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"--publish {folder}: is a file or a link; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ConfigError(f"--publish {folder}: holds something else than a published report; choose another folder")
    run, html = report.parent, report.read_text("utf-8")
    links = {unquote(unescape(link)) for link in re.findall(r'\ssrc="(?!data:)([^"]+)"', html)}
    media = {link: file_inside(run, link, f"{report}: src", COPY_IT) for link in sorted(links)}
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    (folder / ".nojekyll").touch()  # GitHub's pages would leave out names that begin with _
    for link, file in media.items():
        copy = folder / link
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    atomic_write(folder / "index.html", html.encode("utf-8"))
    if (run / STAMP_FILE).is_file():  # last: whoever reads a new stamp finds the new page
        shutil.copyfile(file_inside(run, STAMP_FILE, str(report), COPY_IT), folder / STAMP_FILE)
    return folder / "index.html"
