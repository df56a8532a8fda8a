"""One file per command of `rushes`."""
