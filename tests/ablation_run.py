"""One run of tests/ablations.py, in a process of its own; and the judges that it is to distrust.

python tests/ablation_run.py SCRIPTS ...    # train_nft.py of the folder SCRIPTS, on one thread
"""

import os
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------- judges: --judge FILE.py:NAME


@cache
def toy_judge():
    """The toy's judge, loaded once."""
    from reward_mllm import JudgeSettings, load_judge

    return load_judge(JudgeSettings(judge="local:data/toy/judge", judge_batch=256), "cpu")


def worse(row, sources, edits):
    """The toy judge's score, moved by noise as large as scores differ; an edit has its own."""
    scores = []
    for edit, score in zip(
        edits, toy_judge().score(row, sources, edits).score.tolist(), strict=True
    ):
        noise = random.Random(edit.tobytes()).gauss(0, 0.3)
        scores.append(min(max(score + noise, 0.0), 1.0))  # a NaN stays one
    return scores


def brightness(row, sources, edits):
    """The reward that anybody can game: how bright an edit is, whatever was asked for."""
    return [np.asarray(edit).mean() / 255 for edit in edits]


# ---------------------------------------------------------------- the run


def main():
    sys.path.insert(0, sys.argv.pop(1))
    # As many runs as cores side by side: each takes one.
    os.cpu_count = lambda: 1
    import train_nft
    from data_prep import write_json_lines

    evaluate = train_nft.evaluate

    def evaluate_and_keep(run, name):
        """Keeps each row's results: variants with the same seed have the same rows and noises."""
        results = evaluate(run, name)
        kept = []
        for result in results:
            kept.append({key: result[key] for key in ("row", "judge", "oracle", "success")})
        write_json_lines(Path(run.out, f"heldout-{name}.jsonl"), kept)
        return results

    train_nft.evaluate = evaluate_and_keep
    train_nft.run_script(train_nft.main)


if __name__ == "__main__":
    main()
