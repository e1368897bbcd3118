"""What a toy is worth: its base editor's edits of the held-out rows, scored by oracle and judge.

    python tests/toy_ratings.py [data/toy]

Prints the editor's success and the rank correlation of judge and oracle, and fails where either is
not what the reinforcement learning needs. The edits and the oracle's scores stay, as
FOLDER/ratings.jsonl, for `python evaluate.py agree`.
"""

import sys
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_prep import (  # noqa: E402
    SIZE,
    TEXT_TOKENS,
    BadInput,
    load_image,
    oracle,
    read_json,
    read_rows,
    run_script,
    seeded,
    to_pil,
    write_json_lines,
)
from evaluate import spearman  # noqa: E402
from reward_mllm import JudgeSettings, load_judge  # noqa: E402

COPIES = 4  # edits a row


@torch.no_grad()
def draw_edits(folder, rows, *key):
    """COPIES edits of each row in 6 Euler steps: float (COPIES x n, 3, 32, 32) in [0, 1]."""
    pipe = FluxKontextPipeline.from_pretrained(folder / "editor")
    pipe.set_progress_bar_config(disable=True)
    repeated = [row for row in rows for _ in range(COPIES)]
    return pipe(
        image=[load_image(row["images"][0]) for row in repeated],
        prompt=[row["prompt"] for row in repeated],
        height=SIZE,
        width=SIZE,
        max_area=SIZE * SIZE,
        _auto_resize=False,
        num_inference_steps=6,
        max_sequence_length=TEXT_TOKENS,
        guidance_scale=2.5,
        output_type="pt",
        generator=[seeded(*key, i) for i in range(len(repeated))],
    ).images


def write_ratings(folder):
    """Draws, scores and writes; returns the share of successes and the rank correlation."""
    rows = read_rows(folder, "test")
    judge = load_judge(JudgeSettings(judge=f"local:{folder}/judge"), dtype=torch.float32)
    edits = draw_edits(folder, rows, read_json(folder / "toy.json")["seed"], "check")
    (folder / "ratings").mkdir(exist_ok=True)
    lines = []
    judged = []
    truth = []
    successes = []
    for row, copies in zip(rows, edits.split(COPIES), strict=True):
        pictures = [to_pil(edit) for edit in copies]
        names = [f"ratings/{row['id']}-{copy}.png" for copy in range(COPIES)]
        scores = []
        for name, picture in zip(names, pictures, strict=True):
            picture.save(folder / name)
            score, success = oracle(row, picture)
            scores.append(round(score, 4))
            truth.append(score)
            successes.append(success)
        judged.append(judge.score(row, [load_image(row["images"][0])], pictures).score)
        line = {key: row[key] for key in ("prompt", "image", "task")}
        lines.append(line | {"edits": names, "scores": scores})
    write_json_lines(folder / "ratings.jsonl", lines)
    success = sum(successes) / len(successes)
    return success, spearman(torch.cat(judged).double(), torch.tensor(truth))


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/toy")
    success, agreement = write_ratings(folder)
    number = COPIES * len(read_rows(folder, "test"))
    print(
        f"the base editor succeeds on {success:.1%} of {number} held-out edits with 6 steps "
        f"(wanted 25-60 %); Spearman correlation of judge and oracle on them {agreement:.3f} "
        "(wanted 0.75)"
    )
    if success < 0.25 or success > 0.60 or agreement < 0.75:
        raise BadInput("no good start for RL; change --wrong_share or raise --judge_steps")


if __name__ == "__main__":
    run_script(main)
