"""Where the Ray cluster is: one answer for runs, the preflight checks, `rushes doctor` and the cluster commands.

Reads variables and a file and tries a port; Ray itself is not imported.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

CLUSTER_FILE = Path("/tmp/ray/ray_current_cluster")  # written by `ray start`, not by a Ray that a program started
CONNECT_TIMEOUT_S = 3.0
_DEFAULT_PORTS = {"http": 80, "https": 443, "ray": 10001}


def cluster_address(*configured: str | None) -> str | None:
    """The first of `configured` (an option, a config key) and RAY_ADDRESS that is set; with none, or "auto": the
    cluster that `ray start` runs on this machine. None: there is no cluster, or "local" says not to use one.

    An address that was set is not tried here; a left-over of a cluster that has ended is no answer. "auto" without a
    cluster here is returned as it is: Ray then searches further, and its error is the user's answer.
    """
    addresses = [address for address in (*configured, os.environ.get("RAY_ADDRESS")) if address]
    for address in addresses:
        if address == "local":
            return None
        if address != "auto":
            return address.rstrip("/")
    return cluster_of_this_machine() or ("auto" if "auto" in addresses else None)


def cluster_of_this_machine() -> str | None:
    """HOST:PORT of the cluster that `ray start` runs here, if it answers. A file that another user has put there is not
    believed: whoever runs a cluster runs the code that is sent to it."""
    try:
        if CLUSTER_FILE.stat().st_uid not in (os.getuid(), 0):
            return None
        address = CLUSTER_FILE.read_text().strip()
    except OSError:
        return None
    with contextlib.suppress(ValueError):
        return address if address and is_listening(address) else None
    return None


def is_listening(address: str) -> bool:
    """Whether a process listens at HOST:PORT, ray://HOST:PORT or http(s)://HOST:PORT. (Ray would try for a minute.)
    Raises ValueError when the port is no number."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    target = (parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme, 8265))
    with contextlib.suppress(OSError), socket.create_connection(target, timeout=CONNECT_TIMEOUT_S):
        return True
    return False
