"""What survives: killed actors, nodes and heads, scaling, long runs."""
