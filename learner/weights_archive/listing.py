"""The table of `headway-learner weights`: one line per version, the worst server of each column. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

from learner.weights_archive.archive import LiveRow, PublishedRow
from protocol.versions import Version

COLUMNS = (
    "version", "changed", "MB", "delta MB", "snapshot", "hash", "delta", "servers", "by", "fetched MB", "transfer",
    "verify", "pause", "restores",
)  # fmt: skip


def render(rows: Iterable[PublishedRow | LiveRow], restorable: Set[Version]) -> str:
    """Return the table: seconds for stages, the worst server's where several took the version.

    Args:
        rows: of versions.jsonl.
        restorable: versions that --restore can write.
    """
    published: dict[Version, PublishedRow] = {}
    live: dict[Version, list[LiveRow]] = {}
    for row in rows:
        if isinstance(row, PublishedRow):
            published[row.version] = row
        else:
            live.setdefault(row.version, []).append(row)
    lines: list[tuple[str, ...]] = [COLUMNS]
    lines += [_line(published[version], live.get(version, []), version in restorable) for version in sorted(published)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(text)


def _line(row: PublishedRow, live: Sequence[LiveRow], restores: bool) -> tuple[str, ...]:
    def worst(of: Callable[[LiveRow], float]) -> str:
        return _seconds(max(map(of, live))) if live else "-"

    return (
        str(row.version),
        "-" if row.density is None else f"{100 * row.density:.2f} %",
        _megabytes(row.bytes),
        "-" if row.delta_bytes is None else _megabytes(row.delta_bytes),
        _seconds(row.snapshot_s),
        _seconds(row.hash_s),
        _seconds(row.delta_s),
        str(len({report.server for report in live})),
        "+".join(sorted({report.path for report in live})) or "-",
        _megabytes(max(report.bytes for report in live)) if live else "-",
        worst(lambda report: report.transfer_s),
        worst(lambda report: report.verify_s),
        worst(lambda report: report.pause_s),
        "yes" if restores else "no",
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g}" if num_bytes < 1e6 else f"{num_bytes / 1e6:.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}"
