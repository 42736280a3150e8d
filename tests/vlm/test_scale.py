"""Memory and time of a run with many samples, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vlm.tiny import tiny_photograph

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import json, resource, sys, time
from dataclasses import replace
from pathlib import Path
import pytest
from vlm.training_models import SETTINGS, Models, options
from visproj.progress import Progress
from visproj.vlm.training import run_training

begin = time.perf_counter()

class First(Progress):
    seconds = None

    def advance(self, note=""):
        self.seconds = self.seconds or time.perf_counter() - begin

data, out, cache = map(Path, sys.argv[1:])
Models(pytest.MonkeyPatch(), cache)
progress = First()
settings = replace(SETTINGS, max_steps=20, save_steps=20, workers=2, by_length=True)
run_training(options(out, data, held_out=None), settings, progress=progress)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak += resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # the largest loader worker
print(json.dumps({"peak": peak / 1024, "seconds": progress.seconds}))
"""


def measured(folder, count):
    (folder / str(count)).mkdir()
    with (folder / str(count) / "llava.jsonl").open("w") as lines:
        for number in range(count):
            tiny_photograph(number, (12, 12)).save(folder / str(count) / f"{number}.png")
            turns = [
                {"from": "human", "value": f"<image>\nwhat is red {number}?"},
                {"from": "gpt", "value": f"a red cat at a dog {number}"},
            ]
            row = {"id": number, "image": f"{number}.png", "conversations": turns}
            lines.write(f"{json.dumps(row)}\n")
    paths = [folder / str(count) / "llava.jsonl", folder / f"out{count}", folder / "cache"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *paths],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_and_time_of_many_samples(tmp_path, record_property):
    few, many = measured(tmp_path, 200), measured(tmp_path, 20_000)
    record_property("few", few)
    record_property("many", many)
    print(f"200 samples: {few}; 20,000 samples: {many}")
    assert many["peak"] <= 1.1 * few["peak"]
    assert many["seconds"] < 60
