"""`rushes submit`: a run as a Ray job on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Address, ConfigPath, Debug, Overrides, Resume, ResumeOrStart, make_console, say
from pipeline.core.errors import ConfigError, RunInterrupted


@command(Group.CLUSTER)
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    resume: Resume = False,
    resume_or_start: ResumeOrStart = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log and return the exit code.")] = True,
    working_dir: Annotated[Path, typer.Option("--working-dir", help="Folder to upload.")] = Path("."),
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Name or pattern not to upload; may be repeated.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train on a Ray cluster, as a Ray job.

    Checks the config, uploads this folder, runs `rushes train` there and follows its log. .git, .venv, runs, caches and
    what .gitignore names are not uploaded, nor are key files (.env, *.pem, id_rsa, .netrc, ...). Ctrl-C leaves the log;
    the run continues. The exit status is that of the run (130 when it was stopped).

    \b
    Examples:
      rushes submit configs/quickstart.yaml run.dir=/data/runs --address http://127.0.0.1:8265
      rushes submit my.yaml run.name=try run.dir=/data/runs -a http://127.0.0.1:8265 --no-wait
      rushes submit my.yaml run.name=try run.dir=/data/runs -a http://127.0.0.1:8265 --resume
      rushes submit my.yaml run.name=try run.dir=/data/runs -a http://127.0.0.1:8265 --resume-or-start
    """
    from jobs.cluster import client as cluster
    from jobs.cluster import submission
    from pipeline.config.load import load_config

    overrides, exclude, console = overrides or [], exclude or [], make_console()
    cfg = load_config(config, overrides)
    resume_flag = submission.resume_option(resume, resume_or_start)
    name = submission.run_name(cfg, config, resume_flag)
    uploaded_config = submission.path_inside(config, working_dir)
    submission.check_storage(cfg)
    keys = submission.key_files(working_dir, [*submission.EXCLUDES, *exclude])
    if uploaded_config.as_posix() in keys:
        raise ConfigError(f"submit: {config} has a name of key files, which are not uploaded; rename it")
    submission.check_size(working_dir, [*submission.EXCLUDES, *exclude, *submission.KEY_FILES])
    where = cluster.reachable(cluster.find_address(address))
    client = cluster.jobs_client(where)
    submission.refuse_running(client, name, where)
    entrypoint = submission.entrypoint(cfg, uploaded_config, overrides, name, resume_flag)
    job = submission.submit_job(client, where, entrypoint, name, working_dir, exclude, keys)

    at = f" --address {address}" if address else ""
    if keys:
        others = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
        say(console, f"not uploaded, since such files hold keys: {', '.join(keys[:10])}{others}")
    say(console, f"submitted run {name} as job {job}")
    if not wait:
        say(console, f"follow: rushes logs {name} -f{at}    stop: rushes stop {name}{at}")
        return
    try:
        for piece in cluster.tail(client, job):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        say(
            console,
            f"\nleft the log; the run continues. follow: rushes logs {name} -f{at}    stop: rushes stop {name}{at}",
        )
        raise typer.Exit(RunInterrupted.exit_code) from None
    raise typer.Exit(submission.exit_code(client, job, lambda text: say(console, text)))
