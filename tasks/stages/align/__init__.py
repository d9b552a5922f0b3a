"""Stage `align`: a policy by PPO, DPO or a chain of them."""
