"""Sample images from a checkpoint and store them."""
