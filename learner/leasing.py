"""Who is leased what, and when: grants to free slots, and leases to whoever has room.

Reads and moves the coordinator's parts (ledger, fleet, stock of rows, evaluation). On the event loop, never waits.
"""

from __future__ import annotations

from learner.coordinator import Coordinator
from learner.evaluation import Evaluation
from learner.journal_records import EndRecord
from learner.leases import eval_lease, train_lease
from learner.ledger import End

ROWS_AHEAD, ROWS_AT_ONCE = 32, 4
"""Rows kept ready for the next grants, and made in one go: some data sets take seconds a row."""


def pump(coordinator: Coordinator) -> None:
    """Grant free slots and lease what is pending. An evaluation has first call on its reserve, training on the rest."""
    evaluation = coordinator.evaluation
    if coordinator.training:
        grant(coordinator)
    if evaluation is not None:
        lease_evaluation(coordinator, evaluation, reserve=True)
    if coordinator.training:
        lease_pending(coordinator)
    if evaluation is not None:
        lease_evaluation(coordinator, evaluation, reserve=False)


def missing_rows(coordinator: Coordinator) -> list[int]:
    """The next ordinals whose rows are still to be made, some at a time."""
    if not coordinator.training:
        return []
    cursor = coordinator.ledger.cursor
    ahead = range(cursor, cursor + ROWS_AHEAD)
    return [ordinal for ordinal in ahead if ordinal not in coordinator.stock][:ROWS_AT_ONCE]


def grant(coordinator: Coordinator) -> None:
    """Fill free slots with the rows in stock."""
    ledger = coordinator.ledger
    while ledger.can_grant() and ledger.cursor in coordinator.stock:
        row = coordinator.stock.pop(ledger.cursor)
        if row is None:
            filter_row(coordinator)
            continue
        entry = ledger.grant()
        coordinator.rows[entry.ordinal] = row
        coordinator.ids[coordinator.train_id(entry.ordinal)] = entry.ordinal
        coordinator.granted(entry)


def filter_row(coordinator: Coordinator) -> None:
    """End the next ordinal, whose row is too long, without a lease."""
    ordinal = coordinator.ledger.filter_unleased()
    coordinator.counters["rows_too_long"] += 1
    coordinator.unjournaled.append(
        EndRecord(
            incarnation=coordinator.identity.incarnation, ordinal=ordinal, sequence=-1, end=End.FILTERED.value,
            step=coordinator.ledger.policy_version,
            reason=f"prompt longer than {coordinator.config.max_prompt_length} tokens",
        )
    )  # fmt: skip


def lease_pending(coordinator: Coordinator) -> None:
    """Lease what waits for a server, oldest first, to the admissible server with most room.

    Nothing is queued where all seats are taken while a server with free ones will be admissible soon: whoever swaps
    first would take all that others have seats for.
    """
    config, ledger, fleet = coordinator.config, coordinator.ledger, coordinator.fleet
    coordinator.unplaced, coordinator.swap_awaited = None, False
    for entry in ledger.pending():
        oldest = ledger.min_policy_version(entry.sequence)
        server = fleet.choose(
            min_policy_version=oldest, samples=config.num_generations, now_s=coordinator.clock(),
            most_training=coordinator.knobs.concurrency,
        )  # fmt: skip
        if server is not None and server.load >= server.hello.room:
            coordinator.swap_awaited = coordinator.weights.brings_seats(oldest)
        if server is None or server.live is None or coordinator.swap_awaited:
            coordinator.unplaced = entry
            return  # those behind it need the same room and at least the same version
        ledger.dispatched(entry.sequence, server.name, server.live.policy_version)
        held_id = coordinator.train_id(entry.ordinal)
        fleet.assign(server, held_id, config.num_generations)
        coordinator.spans.begin(held_id, server.name, "groups", f"group {entry.ordinal}", coordinator.clock())
        if coordinator.first_lease_s is None:
            coordinator.first_lease_s = coordinator.clock()
            coordinator.begun()
        row, min_version = coordinator.rows[entry.ordinal], coordinator.lineage.at(oldest)
        coordinator.send(server, train_lease(config, coordinator.identity, row, entry, min_version=min_version))


def lease_evaluation(coordinator: Coordinator, evaluation: Evaluation, *, reserve: bool) -> None:
    """Lease evaluation rows, from the room kept for them or from any."""
    config, fleet = coordinator.config, coordinator.fleet
    while evaluation.pending:
        index = evaluation.pending[0]
        row = coordinator.eval_rows[index]
        if row is None:
            evaluation.pending.popleft()
            coordinator.counters["rows_too_long"] += 1
            coordinator.changed.notify()  # it may have been the last one
            continue
        samples, held_id = config.eval_num_generations, coordinator.eval_id(index)
        server = fleet.choose(
            min_policy_version=evaluation.policy_version, samples=samples, now_s=coordinator.clock(),
            exact=evaluation.pinned, reserve=reserve,
        )  # fmt: skip
        if server is None:
            return
        attempt = evaluation.dispatched(index)
        fleet.assign(server, held_id, samples, evaluation=True)
        coordinator.spans.begin(held_id, server.name, "evaluation", f"row {index}", coordinator.clock())
        min_version = coordinator.lineage.at(evaluation.policy_version)
        lease = eval_lease(config, coordinator.identity, row, held_id, attempt=attempt, min_version=min_version)
        coordinator.send(server, lease)
