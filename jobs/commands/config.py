"""`rushes config`: a config with every default filled in, or the reference or the JSON schema of all keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, Overrides
from pipeline.core.errors import ConfigError


@command(Group.LOOK)
def config(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file.")] = None,
    overrides: Overrides = None,
    docs: Annotated[bool, typer.Option("--docs", help="Print the reference of all keys (docs/config.md).")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of configs, for editors (configs/schema.json).")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print a config with every default filled in.

    An editor with a YAML language server completes and checks a config whose first line is
    `# yaml-language-server: $schema=PATH`, where PATH is what --schema printed.

    \b
    Examples:
      rushes config configs/quickstart.yaml
      rushes config configs/quickstart.yaml run.steps=20 > my.yaml
      rushes config --docs
      rushes config --schema > schema.json
    """
    import json

    from pipeline.config.load import load_config, to_yaml
    from pipeline.tools.config_docs import config_docs

    if schema:
        from pipeline.config.json_schema import config_schema

        print(json.dumps(config_schema(), indent=1, ensure_ascii=False))
        return
    if docs:
        print(config_docs(), end="")
        return
    if config is None:
        raise ConfigError("config: give a config file, such as configs/quickstart.yaml, --docs or --schema")
    print(to_yaml(load_config(config, overrides or [])), end="")
