"""Configurations of accelerate for weights that are spread over processes: `--accelerate NAME`."""
