"""Several learner processes under torchrun: rank 0 leads, the others follow. Start with follower.py."""
