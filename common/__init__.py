"""Helpers that every package uses: command line, files, processes, keyed random numbers, image grids."""
