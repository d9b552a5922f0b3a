"""Sampling responses, and the log-probabilities of what was sampled."""
