"""What is learned: reward after N takes, over seeds."""
