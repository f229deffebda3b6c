"""Whose run it is, and whether all nodes take part in it alike."""
