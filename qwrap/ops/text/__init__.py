"""Operators on text, which travels as numpy arrays of ``str`` objects."""

from qwrap.ops.text import strings, tfidf

__all__ = ["strings", "tfidf"]
