"""One file per command of `rushes`: its options, its help and its work. A new file is a new command."""
