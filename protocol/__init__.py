"""The contract between the rollout server and the learner: messages, their bytes, the channels, the weights.

Importing this package loads nothing else; its modules load numpy, msgspec and, for channels, zmq. Nothing here may
import torch, an engine, or either process. README.md beside this file specifies the wire.
"""
