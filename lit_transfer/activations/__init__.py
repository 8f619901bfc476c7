"""Outputs of the frozen prefix, computed once and kept on disk."""
