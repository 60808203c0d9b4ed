"""The networks: backbone, alignment head, autoencoder and alignment targets."""
