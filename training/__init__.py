"""Components of train.py other than the update: settings, state, logging, previews, evaluation."""
