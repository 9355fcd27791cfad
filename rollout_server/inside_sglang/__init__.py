"""What runs inside SGLang's schedulers: the hook through which few changed weights get in without all the others.

SGLang calls `load` where `--custom-weight-loader rollout_server.inside_sglang.load` names it, in every scheduler, with
the model and one named tensor; the name is an order of ours (engines/sglang/sparse.py), the tensor is empty. An order
(orders.py) names a private directory; the answer is written there, in a file that ends with the process's id.

Nothing else of headway is imported here, and torch only by `load`: an SGLang that somebody else runs needs no more than
to find this package. The hook does not raise: an exception in it would be the end of SGLang.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def load(model: Any, named_tensors: Iterable[tuple[str, Any]]) -> None:
    """SGLang's hook: do what the order says, and answer in its directory."""
    for text, _ in named_tensors:
        order = json.loads(text)
        directory = Path(order["directory"])
        try:
            import torch

            from rollout_server.inside_sglang.orders import ORDERS

            _check_private(directory)
            with torch.no_grad():
                answer = ORDERS[order["do"]](model, directory)
        except Exception as error:  # noqa: BLE001 - see the package's text; whoever ordered it is told
            answer = {"failed": f"{type(error).__name__}: {error}"}
        _write(answer_file(directory, order["do"], os.getpid()), json.dumps(answer))


def answer_file(directory: Path, order: str, pid: int | str) -> Path:
    """Where a scheduler answers an order; with "*" for the process id, a pattern for all of them."""
    return directory / f"{order}-{pid}.json"


def changes_file(directory: Path, pid: int | str) -> Path:
    """Where the elements are that a scheduler is to set, or a pattern. Named otherwise than what SGLang loads."""
    return directory / f"changes-{pid}.few"


def _check_private(directory: Path) -> None:
    found = os.stat(directory)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{directory} is not a private directory of this user")


def _write(file: Path, text: str) -> None:
    """Write an answer whole; where that cannot be, there is none, and whoever waits for it sees that."""
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        print(f"headway: {file} cannot be written: {error}", flush=True)  # into SGLang's log
