"""What train.py needs around the method: settings, state, logging, previews, evaluation."""
