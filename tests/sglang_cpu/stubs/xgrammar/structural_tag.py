"""See __init__.py."""

from __future__ import annotations

from xgrammar import StructuralTag, __getattr__

__all__ = ["StructuralTag", "__getattr__"]
