"""What a dropped group saves: seconds of the training phase with all, half and none kept.

    python tests/time_dropped.py        # on the toy, which it builds when it is not there

Each round times the three one after the other on the same edits; printed are medians over rounds.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_nft  # noqa: E402  the scripts lie one folder above
from data_prep import catch_signals  # noqa: E402
from sample import policy  # noqa: E402


def draw_epoch(run):
    """All groups of one epoch, and optimality probabilities r (G, K) with all of them kept."""
    settings = run.settings
    rows = run.rows["train"][: settings.groups]
    jobs = [train_nft.Job(row, ("time", number)) for number, row in enumerate(rows)]
    how = {"steps": settings.rollout_steps, "rollout_batch": settings.rollout_batch}
    with policy(run.editor, "old"):
        groups, verdicts = train_nft.draw(run, jobs, settings.group_size, "rollout", **how)
    scores = train_nft.await_scores(run, verdicts)
    r, _ = train_nft.group_advantages(scores.score, filter="none")
    return [group.for_training() for group in groups], r.nan_to_num(0.5)


def main():
    with TemporaryDirectory() as out:
        settings, accelerator = train_nft.set_up(["--out", out])
        settings = replace(settings, eval_rows=1)
        run = train_nft.load_all(settings, accelerator, catch_signals())
        groups, everything = draw_epoch(run)
        half = everything.clone()
        half[::2] = torch.nan
        kept = {"all": everything, "half": half, "none": torch.full_like(half, torch.nan)}
        seconds = {name: [] for name in kept}
        for turn in range(8):
            for name, r in kept.items():
                begun = time.perf_counter()
                train_nft.update(run, groups, r, turn)
                if turn > 0:  # the first warms up
                    seconds[name].append(time.perf_counter() - begun)
        run.judge.close()
    for name, times in seconds.items():
        share = median(a / b for a, b in zip(times, seconds["all"], strict=True))
        print(f"{name} of {len(groups)} groups kept: {median(times):.3f} s, {share:.2f} of all")


if __name__ == "__main__":
    main()
