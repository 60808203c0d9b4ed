"""Images -> latent cache."""
