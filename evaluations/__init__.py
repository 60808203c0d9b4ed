"""Samples -> numbers. Reads .npz files and images; knows nothing of training."""
