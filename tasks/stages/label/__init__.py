"""Stage `label`: votes, and what they add up to."""
