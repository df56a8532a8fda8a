"""Makes the models that ship with the repository."""
