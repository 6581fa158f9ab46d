"""Inputs and attributes for every operator and revision, and what else answers for it."""
