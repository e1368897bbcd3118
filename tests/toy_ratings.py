"""Writes FOLDER/ratings.jsonl for `python evaluate.py agree`: edits of the toy's held-out rows by
its base editor, rated by the oracle.

    python tests/toy_ratings.py [data/toy]
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_prep import (  # noqa: E402
    Example,
    Scene,
    draw_edits,
    oracle_scores,
    read_rows,
    scenes_of,
    to_pil,
)


def write_ratings(folder, rows=120, copies=4, editor="editor"):
    """`copies` edits of each of the first `rows` rows of test.jsonl, scored by the oracle."""
    pipe = FluxKontextPipeline.from_pretrained(folder / editor)
    pipe.set_progress_bar_config(disable=True)
    asked = read_rows(folder, "test")[:rows]
    examples = []
    for row in asked:
        scenes = Scene(*row["source_scene"]), Scene(*row["target_scene"])
        examples += copies * [Example(*scenes, row["task"], row["prompt"])]
    edits = draw_edits(pipe, examples, "ratings")
    scores, _ = oracle_scores(edits, *scenes_of(examples))
    (folder / "ratings").mkdir(exist_ok=True)
    lines = [
        {key: row[key] for key in ("prompt", "image", "task")} | {"edits": [], "scores": []}
        for row in asked
    ]
    for i, (edit, score) in enumerate(zip(edits, scores.tolist(), strict=True)):
        to_pil(edit).save(folder / "ratings" / f"{i:04}.png")
        lines[i // copies]["edits"].append(f"ratings/{i:04}.png")
        lines[i // copies]["scores"].append(round(score, 4))
    file = folder / "ratings.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(write_ratings(Path(sys.argv[1] if len(sys.argv) > 1 else "data/toy")))
