"""Runs a `rushes` command in this process."""

from jobs import cli


def run(capsys, *args):
    """(exit status, stdout, stderr) of `rushes ARGS`."""
    status = cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return status, out, err
