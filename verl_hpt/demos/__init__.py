"""What a demonstration is, from a dataset's cell to tokens. Knows nothing of verl."""
