"""Look-ups and edits in graphs, and the names that quantizing gives."""
