"""The `rushes` command. Each sub-command parses its options here and does its work in a module of its own.

Errors a user can act on are one line on stderr and their exit code; a traceback appears only with --debug (or
RUSHES_DEBUG=1). Heavy packages are imported by the commands that need them, so that help and config errors are quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.agree_cli import agree
from jobs.commands.bench import bench
from jobs.commands.cluster_cli import add_cluster_commands
from jobs.commands.inspect_cli import inspect
from jobs.commands.serve_cli import serve_reward
from jobs.common.options import ConfigPath, Debug, Ema, Overrides, console
from pipeline.core.errors import ConfigError, RushesError
from pipeline.core.files import describe_os_error

app = typer.Typer(
    name="rushes",
    help="GRPO post-training of diffusers image and video generators, on Ray.",
    epilog="Start with: rushes doctor, then rushes train configs/quickstart.yaml. Each command's --help has examples.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def version(value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            print(f"rushes {installed('rushes')}")
        except PackageNotFoundError:
            print("rushes (not installed, run from the sources)")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
    _debug: Debug = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with run.name, or the newest unfinished run of CONFIG.")
    ] = False,
    resume_or_start: Annotated[
        bool,
        typer.Option("--resume-or-start", help="Go on with run.name if it is there, else start it (for retried jobs)."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; load no model.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a generator with rewards; ends with the path of a report.

    Ctrl-C saves a checkpoint and stops; a second one stops at once.

    \b
    Examples:
      rushes train configs/quickstart.yaml
      rushes train configs/quickstart.yaml run.steps=20 optimizer.lr=3e-4 run.name=try
      rushes train configs/quickstart.yaml --dry-run
      rushes train configs/quickstart.yaml --resume run.name=try
      rushes train my.yaml --resume-or-start run.name=try
      rushes train my.yaml rewards.mine.scorer=my_rewards.py:score rewards.mine.weight=0.5
    """
    from pipeline.config.load import load_config

    cfg = load_config(config, overrides or [])
    if dry_run:
        from jobs.common.dry_run import print_plan

        print_plan(cfg, console())
        return
    from jobs.commands.train import train as run

    raise typer.Exit(run(cfg, config, resume=resume, or_start=resume_or_start, debug=debug, console=console()))


@app.command()
def generate(
    config: ConfigPath,
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A prompts file (.txt, .jsonl, .parquet).")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", help="A run, one of its checkpoints, or an export; default: untrained."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the png / mp4 files and takes.parquet.")] = Path(
        "generated"
    ),
    takes: Annotated[int, typer.Option("--takes", min=1, help="Takes per prompt.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same takes.")] = 0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Sampler steps; default: evaluation.steps.")
    ] = None,
    ema: Ema = True,
    debug: Debug = False,
) -> None:
    """Write takes of prompts as png or mp4, with the deterministic sampler.

    \b
    Examples:
      rushes generate configs/quickstart.yaml --prompt "a red circle moving left slowly" --takes 4
      rushes generate configs/quickstart.yaml --prompts my_prompts.txt --checkpoint runs/try --out after
      rushes generate configs/quickstart.yaml -p "two blue squares" -c runs/try/export generator.guidance_scale=3
    """
    from jobs.commands.generate import generate as run
    from pipeline.config.load import load_config

    cfg = load_config(config, overrides or [])
    raise typer.Exit(
        run(
            cfg,
            texts=prompt or [],
            prompts_file=prompts,
            checkpoint=checkpoint,
            out=out,
            takes=takes,
            seed=seed,
            steps=steps,
            ema=ema,
            console=console(),
        )  # fmt: skip
    )


@app.command()
def score(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="PATH", help="A folder, a file, or a parquet with a column 'path'."),
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", "-r", help="Scorer, or file.py:function; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Parquet to write; existing scores are kept.")] = Path(
        "scores.parquet"
    ),
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt of all files.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of a reward: NAME.args.KEY=VALUE or NAME.segments.KEY=VALUE."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the scorers and exit.")] = False,
    debug: Debug = False,
) -> None:
    """Score images and videos with any rewards, to a parquet table.

    One row per file and reward: path, prompt, reward, score, error. A file that cannot be read is a row with an error,
    and the exit status is 1. Stopped or failed calls go on where they were when repeated. Prompts come from --prompt,
    from the parquet's column 'prompt' (also a folder's takes.parquet), or from NAME.txt beside each file; the source
    of an edit comes from the column 'image'.

    \b
    Examples:
      rushes score --list
      rushes score my_videos/ --reward jpeg_compressibility --out scores.parquet
      rushes score generated/ -r scene -r my_rewards.py:score
      rushes score clip.mp4 -r jpeg_compressibility --set jpeg_compressibility.segments.count=8
    """
    if list_:
        _print_scorers()
        return
    if path is None:
        raise ConfigError(
            "score: give a folder, a file or a parquet to score, such as: rushes score generated/ -r scene"
        )
    from jobs.commands.score import score as run
    from jobs.common.reward_options import reward_configs

    raise typer.Exit(
        run(
            path,
            rewards=reward_configs(reward or [], option or []),
            out=out,
            prompt=prompt,
            console=console(),
        )
    )


def _print_scorers() -> None:
    from rich.table import Table

    from pipeline.rewards.registry import list_scorers

    table = Table("scorer", "reads", "tested with", "what it is")
    for row in list_scorers():
        table.add_row(row.name, row.reads, row.tested_with, row.description)
    console().print(table)
    console().print("or your own: file.py:function (see docs/rewards.md)", highlight=False)


@app.command()
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", "-c", help="A run, a checkpoint or an export; may be repeated."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Prompts file; default: prompts.heldout.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for results.json and the takes.")] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Also evaluate the generator before training.")] = True,
    ema: Ema = True,
    debug: Debug = False,
) -> None:
    """Compare checkpoints on the same prompts and seeds: means, 95 % confidence intervals, win rates.

    \b
    Examples:
      rushes evaluate configs/quickstart.yaml --checkpoint runs/try
      rushes evaluate configs/quickstart.yaml -c runs/a -c runs/b/export evaluation.takes_per_prompt=4
      rushes evaluate configs/quickstart.yaml -c runs/try/checkpoints/step-000050 --prompts mine.txt --out eval
    """
    from jobs.commands.evaluate import evaluate as run
    from pipeline.config.load import load_config

    cfg = load_config(config, overrides or [])
    raise typer.Exit(
        run(
            cfg,
            checkpoints=checkpoint or [],
            prompts_file=prompts,
            out=out,
            ema=ema,
            base=base,
            console=console(),
        )
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, or one of its checkpoints.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; default: RUN/exports/step-N-FORMAT.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="Checkpoint of this step; default: the newest.")
    ] = None,
    format_: Annotated[str | None, typer.Option("--format", help="lora or full; default: what was trained.")] = None,
    ema: Ema = True,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the folder.")] = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint in a format that plain diffusers loads.

    \b
    Examples:
      rushes export runs/try
      rushes export runs/try --step 50 --format full --out my-generator
    """
    from jobs.commands.export import export as run_export

    raise typer.Exit(run_export(run, out=out, step=step, format_=format_, ema=ema, force=force, console=console()))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder; it may still be going on.")],
    debug: Debug = False,
) -> None:
    """Write RUN/report.html: curves, diagnostics, takes before and after. Needs no network to look at.

    \b
    Example:
      rushes report runs/try
    """
    from pipeline.runs.remote_sync import local_run
    from pipeline.tools.report.report import build_report

    console().print(str(build_report(local_run(run))), highlight=False, soft_wrap=True)


app.command()(inspect)


@app.command()
def doctor(
    run_dir: Annotated[Path, typer.Option("--dir", help="Where runs will be written.")] = Path("runs"),
    debug: Debug = False,
) -> None:
    """Check the installation, devices, codecs, disk and memory, and say what to do.

    \b
    Example:
      rushes doctor
    """
    from jobs.commands.doctor import doctor as run

    raise typer.Exit(run(console(), run_dir))


@app.command()
def config(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file.")] = None,
    overrides: Overrides = None,
    docs: Annotated[bool, typer.Option("--docs", help="Print the reference of all keys (docs/config.md).")] = False,
    debug: Debug = False,
) -> None:
    """Print the full resolved config, with every default.

    \b
    Examples:
      rushes config configs/quickstart.yaml
      rushes config configs/quickstart.yaml run.steps=20 > my.yaml
      rushes config --docs
    """
    from pipeline.config.load import docs_markdown, load_config, to_yaml

    if docs:
        print(docs_markdown(), end="")
        return
    if config is None:
        raise ConfigError("config: give a config file, such as configs/quickstart.yaml, or --docs")
    print(to_yaml(load_config(config, overrides or [])), end="")


app.command()(agree)
add_cluster_commands(app)
app.command()(serve_reward)
app.command()(bench)


# ------------------------------------------------------------------------------------------------- the entry point


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status; never raises. `rushes = "jobs.cli:main"` in pyproject.toml."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv or os.environ.get("RUSHES_DEBUG", "") not in ("", "0")
    try:
        result = app(args=argv, prog_name="rushes", standalone_mode=False)
        if result == 130:  # typer turns Ctrl-C into this status without a word
            return _fail("stopped", 130, KeyboardInterrupt(), debug)
        return result if isinstance(result, int) else 0
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
    command = getattr(getattr(error, "ctx", None), "command_path", None)
    if not message:
        return f"give a command; see: {command or 'rushes'} --help"
    end = "" if message.endswith("?") else ";"
    return f"{message.rstrip('.')}{end} see: {command or 'rushes'} --help"


def _fail(message: str, status: int, error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
