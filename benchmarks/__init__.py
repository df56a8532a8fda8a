"""Speed measurements: `rushes bench`, `make bench`. Not needed for training."""
