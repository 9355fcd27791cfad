"""Training again what a run has trained: from its journal, bit for bit, without a rollout server."""
