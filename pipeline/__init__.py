"""The method as a plain library: everything here runs and is tested without Ray."""
