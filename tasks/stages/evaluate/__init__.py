"""Stage `evaluate`: every policy against the SFT model."""
