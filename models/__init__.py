"""Networks: backbone, alignment heads, alignment targets, image encoders and autoencoder."""
