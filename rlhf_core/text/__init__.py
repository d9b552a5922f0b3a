"""Texts: what of them is seen, what a dialogue is, when two are the same, and how they become tokens."""
