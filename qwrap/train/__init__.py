"""Training of prepared models: what helps in a loop of one's own, and one for those without."""
