"""What looks at configs, checkpoints and runs from outside. Never imported by actors."""
