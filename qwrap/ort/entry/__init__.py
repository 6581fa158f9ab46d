"""The entry points, and the checks of what they are asked."""
