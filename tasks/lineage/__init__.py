"""Where a model came from, and building it again."""
