"""How much goes through a model at once."""

CPU_PASS_TOKENS = 2048
"""Tokens of a forward pass on a CPU: more in one go are no faster there, and need memory."""
