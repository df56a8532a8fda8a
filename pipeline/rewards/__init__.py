"""Scorers: one file each. `load_scorer` finds them by name or in the user's own file."""
