"""From rows to what a step learns from: examples, pairs by prompt, passes over the data."""
