"""Shared helpers: command line, files, processes, keyed random numbers and image grids."""
