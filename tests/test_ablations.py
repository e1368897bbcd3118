"""The ablations: their variants are what they say, their runs go on, their table adds up."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from types import SimpleNamespace

import ablation_run
import ablations
import numpy as np
import pytest
import torch
from PIL import Image
from rule_judge import log
from test_data_prep import tiny

import train_nft
from data_prep import BadInput, ToySettings, build_toy, parse_settings

# A judge of two training steps knows nothing: another takes its place.
SMALL = "--groups 2 --group_size 2 --eval_rows 2 --judge_check false"
SMALL += " --judge tests/ablation_run.py:brightness"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in, with a toy of few steps that takes itself for the whole one."""
    folder = tmp_path_factory.mktemp("place")
    build_toy(tiny(folder / "data" / "toy", vae_steps=30))
    (folder / "data" / "toy" / "toy.json").write_text(json.dumps(asdict(ToySettings())))
    before = os.getcwd()
    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in caught}
    os.chdir(folder)
    yield folder
    os.chdir(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def study(place):
    """Three calls: a variant with one epoch; with two, and a second variant; the same again.

    -> the folder, and what each call drew pictures of.
    """
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "curves", drawn.append)
        words = ["--seeds", "0", "--flags", SMALL, "--jobs", "1", "--out", "study"]
        ablations.main([*words, "--epochs", "1", "--only", "default"])
        words += ["--only", "default", "no-negative"]
        ablations.main([*words, "--epochs", "2"])
        patch.setattr(ablations.subprocess, "Popen", lambda *a, **k: pytest.fail("ran again"))
        ablations.main([*words, "--epochs", "2"])
    return place / "study", drawn


# ---------------------------------------------------------------- variants


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_a_variant_is_flags_that_exist_or_a_patch_of_three_lines_that_fits(name):
    variant = ablations.VARIANTS[name]
    parse_settings(train_nft.Settings, variant.flags.split(), **train_nft.TOY)
    if variant.patch:
        text = (ablations.HERE.parent / variant.patch.script).read_text()
        compile(ablations.patched(text, variant.patch), "patched", "exec")
        assert variant.patch.new.strip().count("\n") < 3
    assert name == "default" or variant != ablations.VARIANTS["default"]


@pytest.mark.parametrize("text", ["nothing", "old old"])
def test_a_patch_whose_old_text_is_not_there_once_is_refused(text):
    with pytest.raises(BadInput, match="train_nft.py: has . times 'old', not once"):
        ablations.patched(text, ablations.Patch("train_nft.py", "old", "new"))


def test_the_hacked_judge_sees_how_bright_an_edit_is_and_nothing_else():
    edits = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    assert ablation_run.brightness({}, [], edits) == [0, 1]


def test_the_worse_judge_moves_each_score_by_noise_of_the_edits_own(monkeypatch):
    edits = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(100)]
    scores = SimpleNamespace(score=torch.full((100,), 0.5))
    judge = SimpleNamespace(score=lambda *args: scores)
    monkeypatch.setattr(ablation_run, "toy_judge", lambda: judge)
    worse = ablation_run.worse({}, [], edits)
    assert worse == ablation_run.worse({}, [], edits)
    assert 0.2 < np.std(worse) < 0.3 and min(worse) >= 0 and max(worse) <= 1
    scores.score[0] = torch.nan
    assert np.isnan(ablation_run.worse({}, [], edits)[0])


# ---------------------------------------------------------------- runs


def test_a_run_goes_on_where_it_was_and_a_finished_one_is_not_run_again(study):
    for name in ("default", "no-negative"):
        records = log(study[0] / name / "seed-0")
        assert [record["epoch"] for record in records] == [1, 2]


def test_a_variants_flags_come_last_and_its_judge_is_found_from_any_folder(monkeypatch):
    monkeypatch.setattr(ablations, "HERE", "/a place")
    settings = ablations.Settings(flags="--groups 2 --lr 1")
    variant = ablations.Variant("--groups 3 --judge tests/mine.py:f")
    words = ablations.Run("x", 0, variant, settings).words()
    found = parse_settings(train_nft.Settings, words, **train_nft.TOY)
    assert (found.groups, found.lr, found.judge) == (3, 1, "/a place/mine.py:f")
    assert found.out == "runs/ablations/x/seed-0" and found.resume == "auto"


def test_a_patch_changes_the_variants_own_scripts_alone(study):
    patch = ablations.VARIANTS["no-negative"].patch
    texts = {}
    for name in ("default", "no-negative"):
        texts[name] = (study[0] / name / "scripts" / "train_nft.py").read_text()
    assert texts["default"] == (ablations.HERE.parent / "train_nft.py").read_text()
    assert texts["no-negative"] == ablations.patched(texts["default"], patch)


def test_variants_share_their_first_draws_and_differ_after_the_first_step(study):
    first, second = [], []
    for name in ("default", "no-negative"):
        records = log(study[0] / name / "seed-0")
        first.append(records[0]["reward/mean"])
        second.append(records[1]["update/loss"])
    assert first[0] == first[1] and second[0] != second[1]


def test_the_table_has_a_line_for_each_variant_and_names_what_is_missing(study):
    lines = (study[0] / "table.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| default |", "| no-negative |"))]
    assert len(rows) == 2
    assert all(row.count("|") == len(ablations.COLUMNS) + 2 for row in rows)
    assert "`return r * pos / beta`" in rows[1] and "| 8 |" in rows[1]  # 2 epochs of 2 x 2 edits
    assert "- missing: filter-released, seed 0; " in "\n".join(lines)


def test_curves_draws_each_variant_with_its_seeds(study):
    folder, drawn = study
    assert ["study/no-negative/seed-0", "--out", "study/no-negative.png"] in drawn


def test_the_table_alone_runs_nothing(study, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "curves", lambda words: None)
    monkeypatch.setattr(ablations, "train_all", lambda *args: pytest.fail("trained"))
    ablations.main(["--table", "--epochs", "2", "--seeds", "0", "--out", "study", "--flags", SMALL])
    assert capsys.readouterr().out.startswith("| variant | change |")


def test_a_variant_that_was_begun_with_other_flags_is_refused(study, monkeypatch):
    variants = {"default": ablations.Variant("--lr 1e-3")}
    monkeypatch.setattr(ablations, "VARIANTS", variants)
    with pytest.raises(BadInput, match="study/default: was begun as .*; move it away"):
        ablations.main(["--seeds", "0", "--out", "study", "--flags", SMALL])


def test_what_stops_a_run_is_said_and_kept_beside_it(place, capsys):
    settings = ablations.Settings(out="broken", flags="--lr 7")
    run = ablations.Run("default", 0, ablations.VARIANTS["default"], settings)
    ablations.write_scripts(run)
    ablations.train(run, threading.Event())
    said = capsys.readouterr().out
    assert "default, seed 0: 0 of 40 epochs" in said and "see broken/default/seed-0.txt" in said
    assert "error: --lr 7" in (place / "broken/default/seed-0.txt").read_text()


@pytest.mark.parametrize(
    "last, is_over",
    [
        ("error: nothing was kept for 10 epochs in a row (of the last one: {})", True),
        ("error: three steps in a row were not finite", True),
        ("error: no space for a whole line", False),
        ("stopped after epoch 3 of 4", False),
    ],
)
def test_a_run_that_stopped_itself_is_over_and_another_is_run_again(tmp_path, last, is_over):
    run = ablations.Run("x", 0, ablations.Variant(), ablations.Settings(out=str(tmp_path)))
    assert not run.is_finished()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "seed-0.txt").write_text(f"epoch 3\nerror: another time\n{last}\n")
    assert run.is_finished() == is_over


def test_a_run_takes_one_core(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["ablation_run.py", str(ablations.HERE.parent), "--lr", "1"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(train_nft, "evaluate", train_nft.evaluate)
    monkeypatch.setattr(train_nft, "run_script", lambda main: seen.append(os.cpu_count()))
    ablation_run.main()
    assert seen == [1] and sys.argv[1:] == ["--lr", "1"]


def test_a_stop_ends_the_runs_and_begins_no_other(place, monkeypatch, capsys):
    started = []

    def start(command, **how):
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    monkeypatch.setattr(ablations, "subprocess", SimpleNamespace(Popen=start, STDOUT=-2))
    settings = ablations.Settings(out="stopped")
    run = ablations.Run("default", 0, ablations.VARIANTS["default"], settings)
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    ablations.train(run, stop)
    ablations.train(run, stop)
    assert [process.returncode for process in started] == [-signal.SIGTERM]
    assert "default, seed 0: 0 of 40 epochs" in capsys.readouterr().out


def test_an_unknown_variant_is_refused_by_name():
    with pytest.raises(BadInput, match="--only nothing: take some of default, "):
        ablations.Settings(only=["default", "nothing"])


# ---------------------------------------------------------------- the table


def finished(*success, **changes):
    rows = []
    for number, value in enumerate(success):
        rows.append({"row": number, "judge": 0.9, "oracle": 0.6, "success": float(value)})
    whole = ablations.Finished(rows=rows, norm=1.0, psnr=20.0, edits=7680, seconds=100.0)
    return replace(whole, **changes)


def test_a_difference_is_paired_by_row_and_seed():
    default = {0: finished(1, 0, 0, 0), 1: finished(0, 0, 0, 1), 2: finished(1, 1, 1, 1)}
    # One success more with each seed, in two of the four rows.
    better = {0: finished(1, 1, 0, 0), 1: finished(0, 0, 1, 1)}
    assert ablations.difference(better, default).startswith("+25.0 (+0.0 to +")
    same = {0: finished(1, 0, 0, 0)}
    assert ablations.difference(same, default) == "+0.0 (+0.0 to +0.0)"
    assert ablations.difference(default, default) == ""


def test_a_line_holds_means_over_the_seeds_and_their_spread():
    runs = {0: finished(1, 1, 0, 0), 1: finished(1, 1, 1, 1, norm=1.2, psnr=np.nan)}
    cells = dict(zip(ablations.COLUMNS, ["name", *ablations.table_row(runs, {})], strict=True))
    assert cells["success"].startswith("75.0 (50.0 to 100.0)")
    assert cells["seeds"] == "50.0 to 100.0"
    assert (cells["judge"], cells["oracle"], cells["gap"]) == ("0.900", "0.600", "+0.300")
    assert (cells["norm"], cells["PSNR"]) == ("1.10", "")
    assert (cells["edits"], cells["seconds"]) == ("7,680", "100")
