"""Memory of every role, estimated before any weights are loaded."""
