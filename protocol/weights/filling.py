"""A shipment that arrives block by block while it is already passed on: which bytes others may have now. Pure.

What is verified is passed on, nothing else: what this side has not checked itself would spread a neighbor's damage
down the whole tree, and nobody could say whose it was.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from protocol.weights.manifest import Shipment


class Filling:
    """Which blocks are here. One thread tells what has arrived, another one asks; neither waits for the other.

    Example:
        >>> from protocol.versions import Version
        >>> from protocol.weights.manifest import Block
        >>> blocks = [Block("a", 8, 4, ""), Block("b", 12, 4, "")]
        >>> filling = Filling(Shipment(Version(1, 7), None, "blake3", 16, blocks))
        >>> filling.arrived(0)
        >>> filling.has(8, 4), filling.has(10, 4)
        (True, False)
    """

    def __init__(self, shipment: Shipment) -> None:
        self._begins = [block.offset for block in shipment.blocks]
        self._ends = [block.offset + block.nbytes for block in shipment.blocks]
        self._here = bytearray(len(self._ends))

    def arrived(self, block: int) -> None:
        """Note a block that is here and verified, by its index in the shipment."""
        self._here[block] = True

    def all_arrived(self) -> None:
        """Note that every block is here and verified."""
        self._here[:] = b"\1" * len(self._here)

    def has(self, offset: int, nbytes: int) -> bool:
        """Whether every block with bytes in that stretch is here."""
        first, last = bisect_right(self._ends, offset), bisect_left(self._begins, offset + nbytes)
        return all(self._here[first:last])
