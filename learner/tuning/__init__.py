"""Tuned, not guessed: the shipped scheduler under a virtual clock. No code of the run itself knows this package."""
