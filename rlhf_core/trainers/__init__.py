"""Training loops: one algorithm, one file, one loop."""
