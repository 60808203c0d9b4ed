"""Fuzzing scripts, which `make test` does not run."""
