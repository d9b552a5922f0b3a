"""Where preferences come from: votes of annotators, and what they add up to."""
