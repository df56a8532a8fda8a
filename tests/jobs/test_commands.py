"""The `rushes` application: its help, its options, completion, and one file per command."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import typer
from command import run

import jobs.commands
from jobs.cli import app
from jobs.common.command import COMMANDS, Command, Group, command

CLICK_COMMANDS = typer.main.get_command(app).commands


def help_at(columns, *args):
    """(exit status, stdout) of `rushes ARGS` in a terminal of that width."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *args],
        capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": str(columns)},
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_bare_rushes_prints_its_help(capsys):
    status, out, err = run(capsys)
    assert status == 0 and err == "" and out.startswith("Usage: rushes [OPTIONS] COMMAND")
    assert out == run(capsys, "--help")[1]


def test_help_groups_the_commands_and_cuts_no_line_at_80_columns():
    status, out = help_at(80)
    assert status == 0 and max(map(len, out.splitlines())) <= 80
    sections = dict(re.findall(r"^(\S[^\n]*):\n((?:  .*\n)+)", out, re.MULTILINE))
    listed = {}
    for group in Group:
        for line in sections[group.value].splitlines():
            name, text = line.split(maxsplit=1)
            listed[name] = group
            assert text == CLICK_COMMANDS[name].help.split("\n\n")[0].strip() and text.endswith("."), line
    assert listed == {name: entry.group for name, entry in COMMANDS.items()}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_help_has_examples(capsys, name):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0 and "Example" in out and f"rushes {name}" in out


def test_each_file_is_one_command():
    files = {path.stem for path in Path(jobs.commands.__path__[0]).glob("*.py")} - {"__init__"}
    modules = [entry.function.__module__.removeprefix("jobs.commands.") for entry in COMMANDS.values()]
    assert sorted(modules) == sorted(files)


def test_a_new_file_is_a_new_command(monkeypatch):
    """What a file of jobs/commands/ does when it is imported."""
    monkeypatch.setattr("jobs.common.command.COMMANDS", registered := {})

    @command(Group.LOOK)
    def count_takes(folder: Path) -> None:
        """Count the takes in a folder."""

    assert registered == {"count-takes": Command("count-takes", Group.LOOK, count_takes)}


def test_an_option_letter_has_one_meaning():
    meanings = defaultdict(set)
    for parsed in CLICK_COMMANDS.values():
        for parameter in parsed.params:
            for letter in [name for name in parameter.opts if re.fullmatch("-[a-zA-Z]", name)]:
                meanings[letter].add(max(parameter.opts, key=len))
    assert meanings == {
        "-a": {"--address"},
        "-c": {"--checkpoint"},
        "-f": {"--follow"},
        "-o": {"--out"},
        "-p": {"--prompt"},
        "-r": {"--reward"},
        "-s": {"--set"},
    }


def test_earlier_names_are_refused_with_the_new_ones(capsys):
    status, _, err = run(capsys, "plan", "runs/try")
    assert status == 2 and "rushes size" in err and err.count("\n") == 1
    status, _, err = run(capsys, "inspect", "--plan", "configs/quickstart.yaml")
    assert status == 2 and "--plan: is called --memory now" in err and err.count("\n") == 1


def test_an_unknown_command_is_one_line_with_the_nearest(capsys):
    status, _, err = run(capsys, "trian", "my.yaml")
    assert status == 2 and "train" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words, expected", [("rushes s", {"score", "scale", "size"}), ("rushes train --res", {"--resume"})]
)
def test_the_shell_completes(words, expected):
    environment = {"_RUSHES_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli"],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0 and all(f'"{word}"' in done.stdout for word in expected), done.stdout


def test_the_completion_script_calls_rushes():
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "_RUSHES_COMPLETE": "source_bash"},
    )  # fmt: skip
    assert done.returncode == 0 and "_RUSHES_COMPLETE=complete_bash" in done.stdout and "rushes" in done.stdout
