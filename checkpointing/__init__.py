"""Write, load, convert and export checkpoints."""
