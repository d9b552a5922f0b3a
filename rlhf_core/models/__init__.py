"""Policy, reward and value models: building, loading from local folders, saving."""
