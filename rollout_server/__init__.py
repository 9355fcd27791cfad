"""The rollout server: leases in, scored groups out. Must not know the data set, the optimizer, or other servers."""
