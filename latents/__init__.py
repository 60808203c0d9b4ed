"""The latent cache: manifest and reader."""
