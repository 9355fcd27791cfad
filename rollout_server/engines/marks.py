"""Which version sampled which tokens of one sample, noted only when it changes."""

from __future__ import annotations

from protocol.versions import Version

Spans = tuple[tuple[Version, int], ...]
"""(version, number of tokens it sampled), in order: `Completion.spans`."""


class VersionMarks:
    """Begins with the version live when the sample got its place.

    Example:
        >>> marks = VersionMarks(Version(1, 3))
        >>> marks.switch(Version(1, 4), drawn=2)
        >>> marks.spans(drawn=5)
        ((Version(incarnation=1, policy_version=3), 2), (Version(incarnation=1, policy_version=4), 3))
    """

    __slots__ = ("_marks",)

    def __init__(self, version: Version) -> None:
        self._marks = [(version, 0)]

    def switch(self, version: Version, drawn: int) -> None:
        """Every token after the first `drawn` is sampled by `version` (perhaps the same one, loaded again)."""
        if version != self._marks[-1][0]:
            self._marks.append((version, drawn))

    def spans(self, drawn: int) -> Spans:
        """Spans of a sample that has drawn so many tokens; versions that sampled none are left out."""
        ends = [start for _, start in self._marks[1:]] + [drawn]
        return tuple(
            (version, end - start) for (version, start), end in zip(self._marks, ends, strict=True) if end > start
        )
