"""Stage `regressions`: what a policy lost that no judge speaks of."""
