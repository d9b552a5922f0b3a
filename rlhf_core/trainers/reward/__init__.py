"""Reward models from labelled pairs: plan, step, loss, teacher."""
