"""The other commands of `verl-hpt`."""
