"""Fuzzing scripts, which `make test` does not run (docs/data.md)."""
