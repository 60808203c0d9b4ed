"""Read latent caches from a URL."""
