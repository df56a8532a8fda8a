"""The run's HTML report."""
