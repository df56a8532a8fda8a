"""The typed config: its schema, how it is read, and how its errors are worded."""
