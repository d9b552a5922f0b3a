"""Records and how they become batches: reading, identity, splits, duplicates, balance."""
