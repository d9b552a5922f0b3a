"""Registered versions as folders that other tools read, checked against the version, described, listed and signed."""
