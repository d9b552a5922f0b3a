"""What runs a stage: its process, several of them, DVC around it, locks, and nobody left behind."""
