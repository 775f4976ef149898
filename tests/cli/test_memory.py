"""Commands keep freed memory: pages of the next layer's tensors need not be made anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from lopro_fx.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()

def layers():
    return [torch.empty(700, 1536).fill_(1.0) for _ in range(60)]

layers()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    layers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own")
def test_freed_memory_is_kept() -> None:
    def faults(kind: str) -> int:
        done = subprocess.run([sys.executable, "-c", COUNT, kind], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < faults("given back") / 10
