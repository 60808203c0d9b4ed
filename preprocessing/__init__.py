"""Conversion of images, and of REPA's files, to latent caches."""
