"""The command that offers a scorer over HTTP; the work is in `jobs.commands.serve_reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.options import Debug, console
from pipeline.core.errors import ConfigError
from pipeline.core.files import did_you_mean


def serve_reward(
    reward: Annotated[
        str, typer.Argument(metavar="REWARD", help="A scorer, file.py:function, or with --config a name.")
    ],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Serve the reward of this name in a run's config.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="REWARD.KEY=VALUE", help="An option, such as jpeg_compressibility.args.quality=80."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than this machine's need 0.0.0.0.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0: a free one.")] = 8900,
    token_env: Annotated[
        str | None, typer.Option("--token-env", metavar="NAME", help="Variable that holds the token clients must send.")
    ] = None,
    max_mb: Annotated[float, typer.Option("--max-mb", min=0.001, help="Largest request accepted.")] = 64.0,
    debug: Debug = False,
) -> None:
    """Offer a scorer over HTTP, on this machine only unless --host says otherwise.

    The answer's form is at /schema, the state at /health. Another run uses it as `scorer: http`.

    \b
    Examples:
      rushes serve-reward jpeg_compressibility
      rushes serve-reward preference --config my.yaml --port 9000
      REWARD_TOKEN=… rushes serve-reward my_rewards.py:score --host 0.0.0.0 --token-env REWARD_TOKEN
    """
    from jobs.commands.serve_reward import serve_reward as run

    if config is not None:
        from pipeline.config.load import load_config

        if option:
            raise ConfigError("--set: does not go with --config; change the config instead")
        rewards = load_config(config, []).rewards
        if reward not in rewards:
            known = did_you_mean(reward, list(rewards)) or f"; there are: {', '.join(rewards)}"
            raise ConfigError(f"{config}: has no reward {reward!r}{known}")
        cfg = rewards[reward]
    else:
        from jobs.common.reward_options import reward_configs

        cfg = reward_configs([reward], option or [])[0]
    raise typer.Exit(run(reward, cfg, host=host, port=port, token_env=token_env, max_mb=max_mb, console=console()))
