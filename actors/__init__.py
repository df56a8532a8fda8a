"""The roles as Ray actors. `pipeline/` holds what they do, this package who does it, where, and what if it dies."""
