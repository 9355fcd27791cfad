"""What a run keeps of its published weights, and the command that reads it.

weights/
  versions.jsonl   every version published and what became of it at each server
  1.7/             of the newest `keep_versions` versions: what each must hash to (manifest.json), and what leads
                   to it from the version before (delta.json, delta.bin)

archive.py   writes it, on the publisher's thread
restore.py   any kept version from a checkpoint and the deltas between
command.py   headway-learner weights
listing.py   its table
"""
