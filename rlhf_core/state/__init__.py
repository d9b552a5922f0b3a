"""What makes a run survive: addressed randomness, training state, atomic files, verified checkpoints."""
