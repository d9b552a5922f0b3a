"""How good a reward model or a policy is: what models say of responses, and plain JSON-able figures made of it.

Every figure is a finite number or `None`; where it is `None`, the result says why under `undefined`.
"""
