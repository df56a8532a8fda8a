"""How fast: against the bare arithmetic and a plain loop."""
