"""Create latent caches from images or from the files of REPA."""
