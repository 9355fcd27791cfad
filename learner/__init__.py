"""The learner: prompt order, leases, journal, policy version, weights, checkpoints, the staleness bound."""
