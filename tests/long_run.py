"""Whether a long run leaks: 200 epochs of a very small setting; prints the slope of the process's peak memory.

python tests/long_run.py [--epochs 200]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import tiny_kontext
from rule_judge import RuleJudge, arguments, log, write_dataset

import train_nft


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        tiny_kontext().save_pretrained(out / "editor")
        write_dataset(out / "data")
        train_nft.load_judge = lambda *args: RuleJudge()
        train_nft.main(
            arguments(
                out / "editor",
                out / "data",
                out / "run",
                epochs=epochs,
                eval_every=10,
                save_every=10,
                lr=1e-3,
            )
        )
        lines = log(out / "run")
        peak = np.array([1000 * line["peak GB"]["update"] for line in lines])  # MB
        size = sum(file.stat().st_size for file in (out / "run").rglob("*") if file.is_file()) / 1e6
    half = len(peak) // 4
    slope = np.polyfit(np.arange(half, len(peak)), peak[half:], 1)[0]
    print(
        f"{len(lines)} epochs: peak memory {peak[half]:.0f} MB after {half}, {peak[-1]:.0f} MB at the end; slope after the first "
        f"{half}: {1000 * slope:.1f} kB an epoch; the run's folder holds {size:.1f} MB"
    )


if __name__ == "__main__":
    main()
