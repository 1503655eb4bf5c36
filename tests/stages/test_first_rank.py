"""What the first rank fails at reaches the others, which would else wait for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config.errors import UserError
from posttrain.stages.first_rank import from_first_rank

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch.distributed as dist
from posttrain.config.errors import UserError
from posttrain.stages.first_rank import from_first_rank

dist.init_process_group("gloo")

def fail(error):
    assert dist.get_rank() == 0
    raise error

assert from_first_rank(dist.get_rank) == 0
for error in (UserError("broken", where="a"), OSError(28, "No space left on device")):
    try:
        from_first_rank(lambda: fail(error))
    except (UserError, OSError) as raised:
        assert type(raised) is type(error) and str(raised) == str(error)
    else:
        raise AssertionError("nothing was raised")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_results_and_mistakes_of_the_first_rank_reach_all() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [os.environ | shared | {"WORLD_SIZE": "2", "RANK": str(rank)} for rank in range(2)]
    processes = [subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT) for environment in environments]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]


def test_alone_the_work_is_done_here() -> None:
    assert from_first_rank(lambda: 3) == 3

    def refuse() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        from_first_rank(refuse)
