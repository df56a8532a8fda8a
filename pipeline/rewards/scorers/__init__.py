"""One file per scorer; each registers itself under its name."""
