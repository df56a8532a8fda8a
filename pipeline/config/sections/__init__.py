"""The larger sections of the config, one file each; `pipeline.config.schema` has the others and the whole."""
