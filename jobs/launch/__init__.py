"""The driver of a run: starts the controller and keeps it running."""
