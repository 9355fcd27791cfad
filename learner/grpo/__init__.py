"""The algorithm as tensor functions, one equation each. Start with loss.py."""
