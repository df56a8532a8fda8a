"""The `rushes` application: imports every file of jobs/commands/ and shows their commands by group."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import jobs.commands
from jobs.common.command import COMMANDS, Group
from jobs.common.options import Debug
from pipeline.core.errors import ConfigError

RENAMED = {"plan": "size"}  # commands of earlier versions


class GroupedCommands(TyperGroup):
    """Lists the commands of each `Group` under its title."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in RENAMED:
            raise ConfigError(f"rushes {cmd_name}: is called rushes {RENAMED[cmd_name]} now; see its --help")
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        longest = max(map(len, COMMANDS))
        for group in Group:
            entries = {name: self.commands[name] for name, entry in COMMANDS.items() if entry.group is group}
            limit = formatter.width - 6 - longest
            with formatter.section(group.value):
                formatter.write_dl(
                    [(name.ljust(longest), entries[name].get_short_help_str(limit)) for name in sorted(entries)]
                )


app = typer.Typer(
    name="rushes",
    cls=GroupedCommands,
    help="Post-training of diffusers image and video generators with rewards, on Ray.",
    epilog="Start with: rushes doctor, then rushes train configs/quickstart.yaml. Each command's --help has examples.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def print_version(value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"rushes {version('rushes')}")
        except PackageNotFoundError:
            print("rushes (not installed, run from the sources)")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
    _debug: Debug = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def add_commands() -> None:
    for module in pkgutil.iter_modules(jobs.commands.__path__, "jobs.commands."):
        importlib.import_module(module.name)
    for name, entry in COMMANDS.items():
        app.command(name, rich_help_panel=entry.group.value)(entry.function)


add_commands()
