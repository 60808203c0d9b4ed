"""Bundled data for runs without downloads, and the script that built it."""
