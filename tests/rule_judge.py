"""Training with a judge that answers by a rule instead of a model; also a script, for runs of several processes."""

import json
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_nft  # noqa: E402
from data_prep import seeded  # noqa: E402
from reward_mllm import Scores  # noqa: E402


class RuleJudge:
    """Likes some brightnesses more than others, without a jump; `flat` rows get one score, `broken` rows none for every other edit."""

    def __init__(self, mass=1.0, pitch=40.0):
        self.mass, self.pitch = mass, pitch

    def score(self, rows, sources, edits):
        score = torch.tensor(
            [np.asarray(edit, float).mean() / 255 for edit in edits], dtype=torch.float32
        )
        score = ((self.pitch * score) % 2 - 1).abs()
        for i, row in enumerate(rows):
            if row.get("flat"):
                score[i] = 0.95
            if row.get("broken") and i % 2:
                score[i] = torch.nan
        causes = ["broken" if failed else "" for failed in score.isnan().tolist()]
        return Scores(
            score,
            torch.full_like(score, self.mass),
            {"execution": score},
            causes,
            [""] * len(score),
        )

    def submit(self, row, sources, edits):
        done = Future()
        done.set_result(self.score([row] * len(edits), [sources] * len(edits), edits))
        return done


def write_dataset(folder):
    """Eight training rows, two with one prompt and other pictures, and two held-out ones; the folder."""
    folder.mkdir(exist_ok=True)
    prompts = [
        "make the red circle blue",
        "make the red circle blue",
        "remove the green square",
        "add red triangle",
    ]
    for split, number in (("train", 8), ("test", 2)):
        lines = []
        for i in range(number):
            noise = torch.rand(32, 32, 3, generator=seeded("picture", split, i))
            Image.fromarray((noise * 255).byte().numpy()).save(folder / f"{split}{i}.png")
            lines.append(
                {"prompt": prompts[i % 4], "image": f"{split}{i}.png"}
                | ({"flat": True} if i in (1, 3, 4) else {})
            )
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def arguments(editor, dataset, out, **changes):
    """The command line of a run of seconds on a tiny editor for 32 x 32 pictures."""
    values = (
        dict(
            base=editor,
            data=dataset,
            out=out,
            judge="local:rule",
            resolution=32,
            epochs=2,
            groups=4,
            group_size=4,
            rollout_steps=4,
            train_timesteps=2,
            train_steps_from=4,
            train_batch=6,
            rollout_batch=4,
            eval_rows=2,
            eval_steps=2,
            eval_every=2,
            save_every=1,
            lora_rank=4,
            lora_alpha=4,
            lr=1e-2,
            decay_rate=0.3,
            gradient_checkpointing=False,
        )
        | changes
    )
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def lora(folder, name=""):
    return load_file(folder / name / "pytorch_lora_weights.safetensors")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    train_nft.load_judge = lambda *args: RuleJudge()
    train_nft.run_script(train_nft.main)
