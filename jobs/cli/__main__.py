"""`python -m jobs.cli`: what `rushes` runs, from the sources."""

import sys

from jobs.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
