"""Checkpoint files: writing, loading, converting and exporting them."""
