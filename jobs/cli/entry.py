"""The entry point of `rushes`: runs the command and turns what it raises into one line on stderr and an exit status.

A traceback appears only with --debug, or RUSHES_DEBUG=1.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import traceback
from typing import Any

import typer

from jobs.cli.app import app
from pipeline.core.errors import RushesError, one_line
from pipeline.core.files import describe_os_error
from pipeline.core.secrets import masked_streams

MAX_LINE = 2000  # characters of an error: a message may quote what a file or a command line holds
RENAMED_OPTIONS = {"--plan": "--memory"}  # of earlier versions


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status; never raises. `rushes = "jobs.cli:main"` in pyproject.toml."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are not UTF-8
    with masked_streams():
        return _run(sys.argv[1:] if argv is None else argv)


@functools.cache
def _command() -> Any:
    """All commands, which typer would read from their signatures again at each call."""
    return typer.main.get_command(app)


def _run(argv: list[str]) -> int:
    if any("\0" in argument for argument in argv):
        return _fail("an argument holds a NUL character, which no path or text may", 2, ValueError(), False)
    debug = "--debug" in argv or os.environ.get("RUSHES_DEBUG", "") not in ("", "0")
    try:
        result = _command()(args=argv, prog_name="rushes", standalone_mode=False)
        if result == 130:  # typer turns Ctrl-C into this status without a message
            return _fail("stopped", 130, KeyboardInterrupt(), debug)
        return result if isinstance(result, int) else 0
    except SystemExit as ended:  # shell completion ends this way
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail("stopped", 130, error, debug)
    except RushesError as error:
        return _fail(str(error), error.exit_code, error, debug)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the reader, such as `head`, is gone: leave quietly)
        return 141
    except OSError as error:
        return _fail(describe_os_error(error), 1, error, debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of click, which typer may carry a copy of
            return _fail(_usage(error, error.format_message()), getattr(error, "exit_code", 2), error, debug)
        text = f"internal error: {type(error).__name__}: {error}; run again with --debug and report it"
        return _fail(text, 70, error, debug)


def _usage(error: Exception, message: str) -> str:
    command = getattr(getattr(error, "ctx", None), "command_path", None) or "rushes"
    renamed = RENAMED_OPTIONS.get(getattr(error, "option_name", None) or "")
    if renamed:
        return f"{error.option_name}: is called {renamed} now; see: {command} --help"  # type: ignore[attr-defined]
    end = "" if message.endswith("?") else ";"
    return f"{message.rstrip('.')}{end} see: {command} --help"


def _fail(message: str, status: int, error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {one_line(message, MAX_LINE)}", file=sys.stderr)
    return status
