"""Whether a long run leaks: 200 epochs of a very small setting, and the slope of its peak memory.

python tests/long_run.py [--epochs 200]
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import tiny_kontext
from rule_judge import RuleJudge, arguments, write_dataset

import train_nft


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)
    peaks = []  # MB
    say = train_nft.say

    def measure(text):
        say(text)
        if text.startswith("epoch"):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peaks.append(peak / (1e6 if sys.platform == "darwin" else 1e3))  # bytes, or kilobytes

    train_nft.say = measure
    train_nft.load_judge = lambda *args: RuleJudge()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        tiny_kontext().save_pretrained(out / "editor")
        write_dataset(out / "data")
        how = {"epochs": epochs, "eval_every": 10, "save_every": 10, "lr": 1e-3}
        train_nft.main(arguments(out / "editor", out / "data", out / "run", **how))
        files = [file for file in (out / "run").rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files) / 1e6
    first = len(peaks) // 4
    slope = np.polyfit(np.arange(first, len(peaks)), peaks[first:], 1)[0]
    print(f"{len(peaks)} epochs: peak memory {peaks[first]:.0f} MB after {first}")
    print(f"{peaks[-1]:.0f} MB at the end, {1000 * slope:.1f} kB an epoch after the first {first}")
    print(f"the run's folder holds {size:.1f} MB")


if __name__ == "__main__":
    main()
