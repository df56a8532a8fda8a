"""Access to a Ray cluster and to the runs on it."""
