"""Benchmarks of the stages of training and sampling, with results as JSON."""
