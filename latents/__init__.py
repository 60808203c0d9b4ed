"""The latent cache: its manifest and its reader."""
