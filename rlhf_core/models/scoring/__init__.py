"""Models that score: heads, the reward model, an ensemble of them, the value model."""
