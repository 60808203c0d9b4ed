"""Point to the new location of the export command."""

import sys

if __name__ == "__main__":
    sys.exit(
        "evaluations.export has moved: run python -m checkpointing.export with the same arguments"
    )
