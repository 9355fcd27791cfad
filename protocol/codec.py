"""Messages to frames and back."""

from __future__ import annotations

MAX_FRAME_BYTES = 64 << 20
"""Largest array frame: no single allocation on behalf of a peer exceeds it."""
