"""`rushes serve-reward`: one scorer over HTTP, for other programs and for the `http` scorer of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, RewardOptions, make_console
from pipeline.core.errors import ConfigError
from pipeline.core.files import did_you_mean


@command(Group.REWARDS)
def serve_reward(
    reward: Annotated[
        str, typer.Argument(metavar="REWARD", help="A scorer, file.py:function, or with --config a reward's name.")
    ],
    config: Annotated[
        Path | None, typer.Option("--config", help="Serve the reward of this name in a run's config.")
    ] = None,
    option: RewardOptions = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 to be reached from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8900,
    token_env: Annotated[
        str | None, typer.Option("--token-env", metavar="NAME", help="Variable that holds the token clients must send.")
    ] = None,
    max_mb: Annotated[float, typer.Option("--max-mb", min=0.001, help="Largest request accepted.")] = 64.0,
    memory_gb: Annotated[
        float,
        typer.Option("--memory-gb", min=0.001, help="Memory for all requests together, without the scorer's own."),
    ] = 4.0,
    stuck_s: Annotated[
        float, typer.Option("--stuck-s", min=1, help="Seconds after which a call of the scorer counts as stuck.")
    ] = 120.0,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help="Name by which clients may call the server, as a proxy's; repeatable."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve a scorer over HTTP.

    On this machine only, unless --host says otherwise. POST /score scores; the form of its answer is at /schema, the
    server's state at /health. Another run uses it as `scorer: http`.

    \b
    Examples:
      rushes serve-reward jpeg_compressibility
      rushes serve-reward preference --config my.yaml --port 9000
      REWARD_TOKEN=… rushes serve-reward my_rewards.py:score --host 0.0.0.0 --token-env REWARD_TOKEN
    """
    from jobs.common.reward_service import serve

    if config is not None:
        from pipeline.config.load import load_config

        if option:
            raise ConfigError("--set: does not go with --config; change the config instead")
        rewards = load_config(config, []).rewards
        if reward not in rewards:
            hint = did_you_mean(reward, list(rewards)) or f"; there are: {', '.join(rewards)}"
            raise ConfigError(f"{config}: has no reward {reward!r}{hint}")
        cfg = rewards[reward]
    else:
        from jobs.common.reward_configs import build_reward_configs

        cfg = build_reward_configs([reward], option or [])[0]
    serve(
        reward,
        cfg,
        host=host,
        port=port,
        token_env=token_env,
        max_mb=max_mb,
        memory_gb=memory_gb,
        stuck_s=stuck_s,
        allow_hosts=allow_host or [],
        console=make_console(),
    )
