"""What the tests measured, as a table and as one line of JSON, with date and hardware."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

PACKAGES = ("sglang", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    value: float
    unit: str
    note: str = ""
    """How it was measured: of how many, median or mean, worst."""


@dataclass(slots=True)
class Figures:
    rows: list[Figure] = field(default_factory=list)

    def record(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.rows.append(Figure(name, value, unit, note))

    def record_median(self, name: str, values: Sequence[float], unit: str, *, worst: float) -> None:
        self.record(name, statistics.median(values), unit, f"median of {len(values)}, worst {worst:.4g}")

    def table(self) -> str:
        """Columns as wide as they must be; four digits."""
        cells = [(row.name, f"{row.value:.4g}", row.unit, row.note) for row in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {value:>{widths[1]}} {unit:<{widths[2]}}  {note}".rstrip()
            for name, value, unit, note in cells
        )

    def line(self, *, date: str, hardware: dict[str, Any]) -> str:
        """One line of JSON: what a log keeps."""
        figures = {row.name: {"value": row.value, "unit": row.unit, "note": row.note} for row in self.rows}
        return json.dumps({"date": date, **hardware, "figures": figures})


def describe_hardware(device: str) -> dict[str, Any]:
    """Name the device and the versions of what ran on it."""
    if device == "cpu":
        name, memory_gib = "CPU", 0.0
    else:
        import torch

        properties = torch.cuda.get_device_properties(0)
        name, memory_gib = properties.name, round(properties.total_memory / 2**30, 1)
    versions = {package: metadata.version(package) for package in PACKAGES}
    return {"device": name, "device_memory_gib": memory_gib, "cpus": os.cpu_count(), **versions}
