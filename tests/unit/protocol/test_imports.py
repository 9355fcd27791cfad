from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "sglang", "rollout_server", "learner")


def modules_after(imports: str) -> set[str]:
    """Return the top-level modules loaded in a fresh process by `imports`."""
    program = f"{imports}; import json, sys; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_nothing_of_weight():
    assert modules_after("import protocol").isdisjoint({*HEAVY, "zmq", "numpy", "msgspec"})


@pytest.mark.parametrize(
    "module", ["protocol.channel", "protocol.testing", "protocol.weights.fetching", "protocol.settings"]
)
def test_no_module_of_the_contract_loads_torch_or_a_process(module):
    assert modules_after(f"import {module}").isdisjoint(HEAVY)


def test_messages_and_codec_need_no_sockets():
    assert "zmq" not in modules_after("import protocol.codec, protocol.parts, protocol.validation, protocol.addresses")
