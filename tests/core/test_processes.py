"""How a process of several ends: nothing of its groups is left for the interpreter, which their threads would abort."""

import subprocess
import sys

PROGRAM = """
import os, sys, weakref
import torch
from lissom.core import processes

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
torch.distributed.init_process_group("gloo")

class Spread:  # what holds a group and itself, as weights that are spread do
    def __init__(self):
        self.me, self.group = self, torch.distributed.group.WORLD

left = weakref.ref(Spread())
assert left() is not None
processes.end()
assert left() is None and not torch.distributed.is_initialized()
processes.end()  # and again, where nothing is left
print("ended")
"""


def test_groups_end_with_what_holds_them() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "ended" and done.returncode == 0, done.stderr
