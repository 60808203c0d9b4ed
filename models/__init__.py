"""The networks: backbone, alignment head, autoencoder, and what a block is aligned to."""
