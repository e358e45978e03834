"""How much of a demonstration a rollout starts from, and numbers that change over steps. Knows nothing of verl."""
