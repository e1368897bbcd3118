"""What a dropped group saves: seconds of the training phase with all, half and none of an epoch's groups kept.

    python tests/time_dropped.py        # on the toy, which it builds when it is not there

Each round times the three one after the other on the same edits; printed are medians over the rounds.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_nft  # noqa: E402
from data_prep import ToySettings, build_toy  # noqa: E402
from sample import policy  # noqa: E402


def main():
    torch.set_num_threads(os.cpu_count())
    settings = train_nft.Settings(
        base="data/toy/editor", **train_nft.TOY | {"judge": "local:data/toy/judge"}
    )
    settings = replace(settings, eval_rows=1)
    build_toy(ToySettings(out=settings.data))
    accelerator, bar = Accelerator(cpu=True), tqdm(disable=True)
    rows, editor, judge, optimizer = train_nft.load_all(settings, accelerator)
    numbers = list(range(settings.groups))
    keys = [[("time", number, copy) for copy in range(settings.group_size)] for number in numbers]
    with policy(editor, "old"):
        groups, verdicts = train_nft.draw(
            editor, judge, rows["train"], keys, settings, [], bar, settings.rollout_steps, None
        )
    r, _ = train_nft.group_advantages(
        torch.stack([verdict.result().score for verdict in verdicts]), filter="none"
    )
    r = r.nan_to_num(0.5)
    kept = {"all": r, "half": r.clone(), "none": torch.full_like(r, torch.nan)}
    kept["half"][::2] = torch.nan
    seconds = {name: [] for name in kept}
    for turn in range(8):
        for name, part in kept.items():
            begun = time.perf_counter()
            train_nft.update(
                editor, optimizer, groups, numbers, part, settings, turn, accelerator, bar
            )
            seconds[name] += [time.perf_counter() - begun] * (turn > 0)
    for name, times in seconds.items():
        ratio = median(t / whole for t, whole in zip(times, seconds["all"]))
        print(
            f"{name} of {len(groups)} groups kept: {median(times):.3f} s, {ratio:.2f} of the time with all"
        )


if __name__ == "__main__":
    main()
