"""What every section of the configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and every key must be known."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
