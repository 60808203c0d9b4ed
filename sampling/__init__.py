"""From a checkpoint to stored samples."""
