"""Rewards fitted to labelled pairs."""
