"""The demo world: simulated customers of a small shop, simulated replies, and a gold scorer of them.

Nothing in it was written or judged by people; every place that shows it calls it simulated.
"""
