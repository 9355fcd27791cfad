"""What the user sees while the learner runs: readers of frozen views, never of live objects."""
