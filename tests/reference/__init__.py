"""Slow, independent references: the published losses written out token by token, and random cases to try them on."""
