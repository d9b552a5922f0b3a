"""From records to a data set: splits, leakage, duplicates, contradictions, balance."""
