"""Makes the two generators that ship with the repository."""
