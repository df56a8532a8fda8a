"""Finds out how a pipeline works as a policy by running it on small batches."""
