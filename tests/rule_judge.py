"""Training with a judge that answers by a rule instead of a model; also a script, for runs of several processes."""

import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_nft  # noqa: E402
from reward_mllm import Scores  # noqa: E402


class RuleJudge:
    """Likes some brightnesses more than others, without a jump; `flat` rows get one score, `broken` rows none for every other edit."""

    def __init__(self, mass=1.0, pitch=40.0):
        self.mass, self.pitch = mass, pitch

    def score(self, rows, sources, edits):
        score = torch.tensor([np.asarray(edit, float).mean() / 255 for edit in edits], dtype=torch.float32)
        score = ((self.pitch * score) % 2 - 1).abs()
        for i, row in enumerate(rows):
            if row.get("flat"):
                score[i] = 0.95
            if row.get("broken") and i % 2:
                score[i] = torch.nan
        causes = ["broken" if failed else "" for failed in score.isnan().tolist()]
        return Scores(score, torch.full_like(score, self.mass), {"execution": score}, causes, [""] * len(score))

    def submit(self, row, sources, edits):
        done = Future()
        done.set_result(self.score([row] * len(edits), [sources] * len(edits), edits))
        return done


if __name__ == "__main__":
    train_nft.load_judge = lambda *args: RuleJudge()
    train_nft.run_script(train_nft.main)
