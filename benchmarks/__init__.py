"""Measurements that anyone can rerun; their results are recorded in docs/."""
