"""Tuned, not guessed: the shipped scheduler under a virtual clock, and the controller that moves its depth."""
