"""The command line: `rushes` is `jobs.cli:main`; where it is not installed, `python -m jobs.cli` does the same."""

from jobs.cli.app import app
from jobs.cli.entry import main

__all__ = ["app", "main"]
