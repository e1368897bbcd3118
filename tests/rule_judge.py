"""Training with a judge that answers by a rule; also a script, for runs of several processes."""

import json
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_nft  # noqa: E402  the scripts lie one folder above
from data_prep import seeded  # noqa: E402
from reward_mllm import Scores  # noqa: E402

PROMPTS = ("make the red circle blue", "make the red circle blue", "remove the green square")
PROMPTS += ("add red triangle",)


class RuleJudge:
    """Likes some brightnesses more than others, without a jump.

    Rows with `flat` get one score for all edits, rows with `broken` none for every other edit.
    """

    noise = 0.0

    def __init__(self, mass=1.0, pitch=40.0):
        self.mass = mass
        self.pitch = pitch

    def score(self, row, sources, edits):
        light = [np.asarray(edit, float).mean() / 255 for edit in edits]
        score = ((self.pitch * torch.tensor(light, dtype=torch.float32)) % 2 - 1).abs()
        if row.get("flat"):
            score[:] = 0.95
        if row.get("broken"):
            score[1::2] = torch.nan
        causes = ["broken" if failed else "" for failed in score.isnan().tolist()]
        mass = torch.full_like(score, self.mass)
        return Scores(score, mass, {"execution": score}, causes, [""] * len(score))

    def submit(self, row, sources, edits):
        done = Future()
        done.set_result(self.score(row, sources, edits))
        return done

    def close(self):
        pass


def write_dataset(folder):
    """Eight training rows, two with one prompt and other pictures, and two held-out ones."""
    folder.mkdir(exist_ok=True)
    for split, number in (("train", 8), ("test", 2)):
        rows = []
        for i in range(number):
            noise = torch.rand(32, 32, 3, generator=seeded("picture", split, i))
            Image.fromarray((noise * 255).byte().numpy()).save(folder / f"{split}{i}.png")
            row = {"prompt": PROMPTS[i % 4], "image": f"{split}{i}.png"}
            if i in (1, 3, 4):
                row["flat"] = True
            rows.append(row)
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(editor, dataset, out, **changes):
    """The command line of a run of seconds on a tiny editor for 32 x 32 pictures."""
    values = {
        "base": editor,
        "data": dataset,
        "out": out,
        "judge": "local:rule",
        "resolution": 32,
        "epochs": 2,
        "groups": 4,
        "group_size": 4,
        "rollout_steps": 4,
        "train_timesteps": 2,
        "train_batch": 6,
        "rollout_batch": 4,
        "eval_rows": 2,
        "eval_steps": 2,
        "eval_every": 2,
        "save_every": 1,
        "lora_rank": 4,
        "lora_alpha": 4,
        "lr": 1e-2,
        "decay_rate": 0.3,
        "gradient_checkpointing": False,
    }
    words = []
    for name, value in (values | changes).items():
        words += [f"--{name}", str(value)]
    return words


def lora(folder, name=""):
    return load_file(folder / name / "pytorch_lora_weights.safetensors")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    train_nft.load_judge = lambda *args: RuleJudge()
    train_nft.run_script(train_nft.main)
