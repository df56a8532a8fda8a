"""Searches by name: each file here registers one, and nothing else knows its name."""
