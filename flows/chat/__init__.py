"""Talking with versions in a terminal: with one, or with two blind, whose votes are kept as data."""
