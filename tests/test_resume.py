"""Nothing is lost: kills, signals, damaged and unwritable checkpoints, other settings, numbers that are not finite.

What was tried                     what the user sees                                  what is kept
SIGKILL at any moment              nothing; --resume auto goes on                      all up to the last checkpoint
SIGTERM, Ctrl-C                    "stopped after epoch N ...; go on with --resume"    all finished epochs
a second Ctrl-C                    the program ends at once                            all up to the last checkpoint
newest checkpoint damaged          "checkpoint-N: damaged; going back ..."             the one before, and its log
every checkpoint damaged           the same for each, and a run from the start         the damaged folders
a full disk                        "checkpoint-N: could not be written (...)"          the checkpoints before it
another setting on resume          "lr was .. and is ..; give .. or --force true"      everything
a loss or gradient not finite      STEP SKIPPED in the epoch's line                    the weights as before the step
three of them in a row             "three steps in a row ...; see not-finite.json"     the weights, rows, times, scores
scores that failed, too many       "the judge failed on n of m edits (causes)"         a checkpoint of the last epoch
a log line cut short               nothing; the line is dropped on resume              the whole lines
"""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rule_judge import RuleJudge, log, lora

import sample
import train_nft
from data_prep import BadInput
from sample import checkpoints, read_state
from train_nft import nft_loss

ROOT = Path(__file__).parents[1]


def assert_same_end(one, other):
    """Two runs whose newest checkpoints hold the same bits."""
    ends = [checkpoints(out)[0] for out in (one, other)]
    assert ends[0].name == ends[1].name
    for name in ("", "old", "ema"):
        for key, weights in lora(ends[0], name).items():
            assert torch.equal(weights, lora(ends[1], name)[key]), (name, key)
    assert (ends[0] / "optimizer.safetensors").read_bytes() == (
        ends[1] / "optimizer.safetensors"
    ).read_bytes()
    assert [(line["epoch"], line["reward"], line["loss"]) for line in log(one)] == [
        (line["epoch"], line["reward"], line["loss"]) for line in log(other)
    ]


def test_a_resumed_run_ends_with_the_same_bits(run):
    whole = run("whole", epochs=4)
    halves = run("halves", epochs=2)
    (halves / ".checkpoint-3.part").mkdir()  # what a kill leaves behind
    with open(halves / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "rew')
    run("halves", epochs=4)
    assert_same_end(whole, halves)


@pytest.mark.parametrize("processes, kills", [(1, 8), (2, 1)])
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path, processes, kills):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "kill_train.py",
            "--kills",
            str(kills),
            "--processes",
            str(processes),
            "--epochs",
            "6",
            "--out",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"{kills} kills, the same bits" in done.stdout


class Interrupting(RuleJudge):
    """Sends this process a signal when it has been asked so many times."""

    def __init__(self, number, times):
        super().__init__()
        self.number, self.times = number, times

    def submit(self, *args):
        self.times -= 1
        if self.times == 0:
            os.kill(os.getpid(), self.number)
        return super().submit(*args)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "times, done", [(4, 0), (8, 1), (11, 2)]
)  # in a first rollout, a second, and an evaluation
def test_a_signal_ends_the_run_with_a_checkpoint_and_a_line(run, capsys, number, times, done):
    out = run("broken", judge=Interrupting(number, times), epochs=4)
    said = capsys.readouterr()
    assert (
        f"stopped after epoch {done} of 4; go on with --resume auto" in said.out
        and "finishing this step" in said.err
    )
    assert [folder.name for folder in checkpoints(out)][:1] == [f"checkpoint-{done}"] * (done > 0)
    run("broken", epochs=4)
    assert_same_end(run("whole", epochs=4), out)


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run, capsys):
    out = run(epochs=3)
    file = out / "checkpoint-3" / "old" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\0" * 7 + b"\1")
    run(epochs=4)
    assert "checkpoint-3: damaged; going back to the one before" in capsys.readouterr().err
    assert_same_end(run("whole", epochs=4), out)


def test_a_run_without_a_whole_checkpoint_begins_again(run, capsys):
    out = run(epochs=1)
    (out / "checkpoint-1" / "state.json").unlink()
    run(epochs=2)
    assert "checkpoint-1: damaged" in capsys.readouterr().err and [
        line["epoch"] for line in log(out)
    ] == [1, 2]


def test_the_newest_and_the_best_checkpoints_are_kept(run, monkeypatch):
    marks = iter([0.5, 0.9, 0.2, 0.1, 0.3])
    gain = train_nft.paired_gain
    monkeypatch.setattr(train_nft, "paired_gain", lambda *a: gain(*a) | {"now": mark[0]})
    mark, evaluate = [0], train_nft.evaluate

    def marked(editor, judge, rows, settings, name, *rest):
        if name == "new":
            mark[0] = next(marks)
        return evaluate(editor, judge, rows, settings, name, *rest)

    monkeypatch.setattr(train_nft, "evaluate", marked)
    out = run(epochs=5, eval_every=1, keep_checkpoints=2)
    assert [folder.name for folder in checkpoints(out)] == [
        "checkpoint-5",
        "checkpoint-4",
        "checkpoint-2",
    ]
    assert read_state(out / "checkpoint-2")["held-out"] == 0.9


def test_a_full_disk_leaves_the_checkpoint_before_whole(run, monkeypatch, tmp_path):
    save, (_, hard) = sample.save_lora, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_small_disk(editor, folder, name="new"):
        if "checkpoint-2" in str(folder):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        save(editor, folder, name)

    monkeypatch.setattr(sample, "save_lora", save_on_a_small_disk)
    try:
        with pytest.raises(BadInput, match="checkpoint-2: could not be written .*--resume auto"):
            run(epochs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    out = tmp_path / "run"
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-1"] and read_state(
        out / "checkpoint-1"
    )
    assert not list(out.glob(".checkpoint*"))


def test_another_setting_is_named_and_needs_force_unless_harmless(run, capsys):
    out = run(epochs=1)
    with pytest.raises(
        BadInput, match="lr was 0.01 and is 0.02; give what it was trained with, or --force"
    ):
        run(epochs=2, lr=0.02)
    run(epochs=2, eval_every=1)
    assert "resuming although eval_every was 2 and is 1" in capsys.readouterr().out
    run(epochs=3, lr=0.02, force=True)
    assert len(log(out)) == 3 and read_state(out / "checkpoint-3")["settings"]["lr"] == 0.02


def test_samples_and_log_are_bounded_by_settings(run):
    out = run(epochs=4, eval_every=1, keep_samples=2, log_every=1)
    assert sorted(file.name for file in (out / "samples").iterdir()) == [
        "epoch-0003.png",
        "epoch-0004.png",
    ]
    thin = run("thin", epochs=6, eval_every=6, log_every=3)
    assert [line["epoch"] for line in log(thin)] == [3, 6]


def test_a_step_that_is_not_finite_is_skipped_and_the_third_in_a_row_stops_the_run(
    run, monkeypatch, tmp_path
):
    calls = []
    monkeypatch.setattr(
        train_nft,
        "nft_loss",
        lambda *a: nft_loss(*a) * (torch.nan if len(calls.append(1) or calls) == 2 else 1),
    )
    out = run("once", epochs=2)
    assert [line["skipped steps"] for line in log(out)] == [1, 0] and log(out)[0][
        "optimizer steps"
    ] == 0
    assert all(
        weights.abs().sum() == 0
        for key, weights in lora(out / "checkpoint-1").items()
        if "lora_B" in key
    )
    assert all(weights.isfinite().all() for weights in lora(out / "checkpoint-2").values())
    monkeypatch.setattr(train_nft, "nft_loss", lambda *a: nft_loss(*a) * torch.nan)
    with pytest.raises(BadInput, match="three steps in a row .*not-finite.json"):
        run("ever", epochs=9)
    guilty = json.loads((tmp_path / "ever" / "not-finite.json").read_text())
    assert (
        guilty
        and set(guilty[0]) == {"row", "copy", "t", "loss", "score"}
        and guilty[0]["loss"] == "nan"
    )
    assert all(
        weights.isfinite().all() for weights in lora(tmp_path / "ever" / "checkpoint-3").values()
    )


def test_a_spike_of_the_gradient_is_logged(run, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        train_nft,
        "nft_loss",
        lambda *a: nft_loss(*a) * (100 if len(calls.append(1) or calls) > 20 else 1),
    )
    out = run(epochs=8, eval_every=9, lr=1e-6)
    spikes = [line["epoch"] for line in log(out) if line["grad spike"]]
    assert spikes and spikes[0] >= 6 and "GRADIENT SPIKE" in capsys.readouterr().out
