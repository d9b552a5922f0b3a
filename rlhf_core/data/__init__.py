"""From files to what a step learns from: reading them, cleaning what was read, and gathering batches."""
