"""How a pipeline is called: argument names, conditions, and what is special about single classes."""
