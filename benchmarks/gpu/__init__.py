"""What a GPU has to show (`make gpu-check`), section by section."""
