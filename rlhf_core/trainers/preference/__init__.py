"""Learning from pairs without a reward model: loop, losses, kept reference log-probabilities."""
