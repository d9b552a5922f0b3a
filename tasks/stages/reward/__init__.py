"""Stage `reward`: the reward model, trained and judged."""
