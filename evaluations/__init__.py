"""Metrics of generated images (FID and related) and reports of runs. Independent of training."""
