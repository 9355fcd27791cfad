"""The base model under an adapter: whether it is the one that the learner trains on."""

from __future__ import annotations

from pathlib import Path

from protocol.errors import ConfigError, WeightsError
from protocol.weights.adapters import AdapterSpec
from protocol.weights.base_model import base_digest


class BaseModel:
    """The files that an adapter must have been trained on; hashed once, and only when there is an adapter.

    Args:
        directory: of the model that is served.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._digest = ""

    def check(self, adapter: AdapterSpec) -> None:
        """See that the adapter is of this base model.

        Raises:
            ConfigError: it is of another one: nothing that this server serves can be right.
        """
        try:
            self._digest = self._digest or base_digest(self._directory)
        except WeightsError as error:
            raise ConfigError(str(error)) from error
        if self._digest != adapter.base_digest:
            raise ConfigError(
                f"model {self._directory}: the learner's adapter is of a base model with other weights (files hash to"
                f" {adapter.base_digest[:12]}, these to {self._digest[:12]}): give both the same --model"
            )
