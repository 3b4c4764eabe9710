"""Time and memory for reading a folder of images before training, compared with decoding only."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

READ = """
import resource, sys, time
from pathlib import Path
import numpy as np
from PIL import Image
from losswatch.data.folder import FolderImages
import monai.transforms

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

begin, before = time.perf_counter(), peak()
if sys.argv[2] == "survey":
    FolderImages(sys.argv[1])
else:
    for path in sorted(Path(sys.argv[1]).rglob("*.png")):
        np.asarray(Image.open(path))
print(time.perf_counter() - begin, peak() - before)
"""


def measure(rounds: int) -> None:
    """Print a row for many small images and for a few large ones."""
    with tempfile.TemporaryDirectory() as place:
        print(
            "images               decoding   first survey     second survey    memory of the survey"
        )
        for count, side in ((2000, 128), (20, 4000)):
            folder = Path(place, str(side))
            draw(folder, count, side)
            decode, first, second, memory = [], [], [], []
            for k in range(rounds):
                cache = str(Path(place, f"cache {side} {k}"))
                decode.append(_run(folder, "decode", cache)[0])
                seconds, used = _run(folder, "survey", cache)
                first.append(seconds)
                memory.append(used)
                second.append(_run(folder, "survey", cache)[0])
            plain, one, two = (float(np.median(x)) for x in (decode, first, second))
            print(
                f"{count:4} of {side:4} x {side:4}  {plain:6.2f} s"
                f"  {one:6.2f} s x{one / plain:4.2f}  {two:6.2f} s x{two / plain:4.2f}"
                f"  {np.median(memory):6.0f} MB"
            )


def draw(folder: Path, count: int, side: int) -> None:
    """Write `count` square images of random colours with masks."""
    from PIL import Image

    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (side, side, 3), np.uint8)
    for i in range(count):
        mask = np.zeros((side, side), np.uint8)
        mask[side // 4 : side // 2 + i % 9, side // 5 : side // 2] = 1
        for kind, array in (("images", image), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / kind / f"{i:04}.png", compress_level=1)


def _run(folder: Path, what: str, cache: str) -> tuple[float, float]:
    """Seconds and MB of one survey, or of decoding each file once, in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder), what], check=True, capture_output=True,
        text=True, env=os.environ | {"XDG_CACHE_HOME": cache},
    )  # fmt: skip
    seconds, used = map(float, done.stdout.split())
    return seconds, used
