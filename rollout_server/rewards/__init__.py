"""Reward functions, and the pool of killable processes they run in."""
