"""Shared helpers: command line, files, processes, keyed random numbers and image grids."""

from common.environment import complete_environment

complete_environment()
