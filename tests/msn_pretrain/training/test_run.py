import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from msn_eval.errors import DistributedError
from msn_pretrain.training.run import lock_run

_HOLD = "import sys, time; from pathlib import Path; from msn_pretrain.training.run import lock_run\n"
_HOLD += "with lock_run(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_lock_names_its_holder_and_is_released_when_that_process_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DistributedError, match=f"process {holder.pid}"), lock_run(tmp_path):
            pass

        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lock_run(tmp_path):
            assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
