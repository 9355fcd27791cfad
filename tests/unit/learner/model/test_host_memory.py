"""Freed memory stays with the process: a second block of the same size costs no page faults, on any thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

BLOCK_BYTES = 64 << 20
FAULTS = f"""
import json, resource, sys
from concurrent.futures import ThreadPoolExecutor
from learner.model.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray({BLOCK_BYTES})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    keep_freed_memory()
with ThreadPoolExecutor(1) as thread:
    print(json.dumps([[run().result() if thread_ else run() for _ in range(2)] for thread_, run in
                      ((False, faults), (True, lambda: thread.submit(faults)))]))
"""


@pytest.mark.skipif("glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="needs glibc")
@pytest.mark.parametrize("how", ["kept", "as it is"])
def test_a_block_of_the_same_size_is_there_already(how):
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    pages = BLOCK_BYTES // os.sysconf("SC_PAGE_SIZE")
    (_, again), (_, again_in_thread) = json.loads(done.stdout)
    for count in (again, again_in_thread):
        assert count < pages / 50 if how == "kept" else count > pages / 2
