"""No input ends in a traceback: hundreds of odd ones, the same each time."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]


def test_odd_inputs_get_a_result_or_a_sentence() -> None:
    """Commands end with 0 or 2, functions raise what they document, and all name the remedy."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    command = [sys.executable, str(HERE / "fuzz.py"), "0", "520"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 of 5" in done.stdout
