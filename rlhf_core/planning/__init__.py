"""What a run would take before it is started: bytes by formula, seconds from a short measured probe."""
