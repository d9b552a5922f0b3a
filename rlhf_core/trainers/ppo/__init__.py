"""PPO and its relatives: rollout, scores, credit, update, guard."""
