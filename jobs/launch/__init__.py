"""Starts the controller and keeps it running."""
