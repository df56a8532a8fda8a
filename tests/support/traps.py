"""Names that lead out of a folder, or to what is no regular file, for the tests of what reads names from outside."""

import os
import signal
import socket
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, level: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(path)
    return path


def traps(root: Path, outside: Path) -> dict[str, str]:
    """Name of the kind -> a name that must not be read from `root`. `outside`: a file that is none of root's."""
    up = os.path.relpath(outside, root)
    (root / "link.png").symlink_to(outside)
    (root / "linked").symlink_to(outside.parent)
    os.mkfifo(root / "fifo.png")
    (root / "device.png").symlink_to("/dev/zero")
    (root / "folder.png").mkdir()
    (root / "short").mkdir()
    here = os.getcwd()
    os.chdir(root)  # a socket's path may have 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind("socket.png")
    finally:
        os.chdir(here)
    return {
        "absolute": str(outside),
        "up": up,
        "up and down": f"short/../{up}",
        "link": "link.png",
        "linked folder": f"linked/{outside.name}",
        "FIFO": "fifo.png",
        "device": "device.png",
        "socket": "socket.png",
        "folder": "folder.png",
        "absolute device": "/dev/zero",
    }


KINDS = (
    "absolute", "up", "up and down", "link", "linked folder", "FIFO", "device", "socket", "folder", "absolute device",
)  # fmt: skip


@contextmanager
def within(seconds: int):
    """A FIFO or device that is opened after all fails the test instead of holding it."""

    def late(*_):
        raise TimeoutError("something was opened that blocks")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
