"""What `videoar info` forecasts."""

import re
import subprocess
import sys

import pytest
import torch

from videoar.machine import LiveBytes

GENERATE = """
from videoar.generation.pipeline import VideoPipeline
from videoar.machine import peak_bytes
pipe = VideoPipeline.from_pretrained("toy")
list(pipe.generate(["a red ball"], seeds=[0], num_frames=33, units="chunk:2"))
print(peak_bytes())
"""


def test_live_bytes_count_what_lives_at_one_time_and_compute_nothing() -> None:
    """The most is between the first and the second tensor's end, not the sum of all."""
    with LiveBytes() as live:
        one = torch.zeros(1000, device="meta")
        two = one + 1
        del one
        three = two[:500]
        del two
        four = three * 2
        assert live.now == 4000 + 2000  # a view keeps the whole
        del three, four
    assert (live.now, live.peak) == (0, 8000)


@pytest.mark.slow
def test_the_forecast_of_toy_is_within_a_tenth_of_what_it_takes() -> None:
    """Who has so much memory can make the video, and who has less is told before."""

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
        return done.stdout + done.stderr

    told = re.search(r"peak of the process .*: (\d+) MiB", run("-m", "videoar", "info", "toy"))
    assert told is not None
    taken = int(run("-c", GENERATE).split()[-1]) / 2**20
    assert abs(int(told[1]) - taken) < 0.1 * taken
