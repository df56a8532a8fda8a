"""A run's folder: paths, lock, log, checkpoints, its copy in a store, and trackers."""
