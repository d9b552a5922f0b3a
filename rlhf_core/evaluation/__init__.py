"""How good a reward model or a policy is: statistics in, plain JSON-able figures out.

Every figure is a finite number or `None`; where it is `None`, the result says why under `undefined`.
"""
