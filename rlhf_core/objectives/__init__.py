"""Losses, advantages, KL and masked statistics: tensors in, tensors out.

Nothing here reads a configuration, logs, moves a device or keeps state. Shape suffixes used by every module:
B = rows, R = response tokens, N = pairs. A mask is 1.0 where a token counts and 0.0 elsewhere; whatever stands
under a zero, NaN included, changes neither a value nor a gradient.
"""
