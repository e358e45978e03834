"""`verl-hpt data`: files of demonstrations, before a GPU hour is spent."""
