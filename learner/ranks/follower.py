"""The ranks that follow: one synchronous loop, no sockets of their own, no run directory, no event loop.

rank 0   event loop, sockets, journal -> compute thread: LeadingTrainer.forward_backward(batch)
                                            |  one broadcast: the command, and the batch as bytes
others   follow(): receive a command -----> RankTrainer.forward_backward(batch) ... receive the next
"""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

from learner.config import LearnerConfig
from learner.model.host_memory import keep_freed_memory
from learner.ranks.commands import Save, Start, Stay, Stop, Train, Update, batch_of, from_bytes
from learner.ranks.trainer import RankTrainer
from learner.ranks.world import World
from protocol.logs import configure_logging, event

log = logging.getLogger(__name__)


def follow(config: LearnerConfig, world: World) -> int:
    """Do what rank 0 says, to the end; return the exit code.

    Signals are for rank 0 alone to act on (Ctrl-C and torchrun send them to all): it needs the others to save.

    Raises:
        RankLost: rank 0, or another rank, is gone.
    """
    keep_freed_memory()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with world.watched("loading"):
        start, _ = from_bytes(world.broadcast())
        if not isinstance(start, Start):
            return 0  # rank 0 ended before it had anything to train, and has said why
        checkpoint = Path(start.checkpoint) if start.checkpoint else None
        trainer = RankTrainer(config, world, checkpoint=checkpoint)
    event(log, "following", rank=world.place.rank, pid=os.getpid(), policy_version=trainer.policy_version)
    log_file: Path | None = Path(start.logs_dir) / f"rank-{world.place.rank}.log"
    while True:
        with world.watched("a command"):
            command, frames = from_bytes(world.broadcast())
            if log_file is not None and not isinstance(command, Stop):
                configure_logging("learner", log_file, stderr=False)  # rank 0 has begun the run, and made the place
                log_file = None
            match command:
                case Train():
                    trainer.forward_backward(batch_of(command, frames))
                case Update():
                    trainer.fixed_learning_rate = command.learning_rate
                    trainer.optimizer_step()
                case Save():
                    trainer.save(Path(command.directory))
                case Stay():
                    pass
                case Start() | Stop():
                    return 0
