"""bench_epoch.py: both trainers do the same training, and their work is counted."""

import bench_epoch
import pytest
import torch
from bench_epoch import Ours, Plain, farthest, given_scores, make_work, one_epoch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny editor with 2 groups of 6 edits, its policies apart from each other."""
    return make_work(tmp_path_factory.mktemp("bench"), is_tiny=True, recompute=False)


def test_both_draw_the_same_edits(run):
    ours = torch.cat([group.x_0 for group in Ours().draw(run, 0)])
    plain = torch.cat([batch.x_0 for batch in Plain().draw(run, 0)])
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", ["everything", "half"])
def test_both_leave_the_same_gradient_without_the_pull_to_the_base(run, kept):
    assert farthest(run, given_scores(kept)) < 1e-4


def test_a_plain_trainer_that_forgets_the_mask_leaves_another_gradient(run, monkeypatch):
    def unmasked(self, mask, other):
        return self

    monkeypatch.setattr(torch.Tensor, "where", unmasked)
    assert farthest(run, given_scores("half")) > 0.01


def test_ours_trains_only_what_was_kept_and_asks_the_base_at_one_time_of_five(run):
    forwards = one_epoch(run, Ours(), given_scores("half"), 0).forwards
    assert forwards == {"rollout": 72, "old": 30, "new": 30, "base": 6}


def test_plain_trains_everything_with_base_and_recompute(run):
    forwards = one_epoch(run, Plain(), given_scores("half"), 0).forwards
    assert forwards == {"rollout": 72, "old": 60, "new": 60, "base": 60, "again": 60}


def test_ours_recomputes_when_it_is_told_to(tmp_path):
    run = make_work(tmp_path, is_tiny=True, recompute=True)
    assert one_epoch(run, Ours(), given_scores("half"), 0).forwards["again"] == 30


def test_plain_leaves_ours_without_recompute(run):
    one_epoch(run, Plain(), given_scores("half"), 0)
    assert one_epoch(run, Ours(), given_scores("half"), 0).forwards["again"] == 0


def test_ours_encodes_a_group_once_and_plain_each_copy(run, monkeypatch):
    encoded = []
    encode = run.editor.pipe.vae.encode

    def counting(pictures, *args, **kwargs):
        encoded.append(len(pictures))
        return encode(pictures, *args, **kwargs)

    monkeypatch.setattr(run.editor.pipe.vae, "encode", counting)
    Ours().draw(run, 0)
    assert sum(encoded) == bench_epoch.GROUPS
    encoded.clear()
    Plain().draw(run, 0)
    assert sum(encoded) == bench_epoch.GROUPS * bench_epoch.COPIES


def test_the_report_has_a_row_for_each_trainer_and_one_line_for_the_ratio(run, capsys):
    r = given_scores("half")
    pairs = [{"ours": one_epoch(run, Ours(), r, 0), "plain": one_epoch(run, Plain(), r, 0)}] * 3
    bench_epoch.report("half", pairs, is_timed=True)
    ours, plain, _, ratio, _ = capsys.readouterr().out.split("\n")[:-1]
    assert ours.startswith("| ours, half kept | 72 | 30 | 30 | 6 | 0 |")
    assert plain.startswith("| plain, half kept | 72 | 60 | 60 | 60 | 60 |")
    quotient = pairs[0]["plain"].seconds / pairs[0]["ours"].seconds
    assert ratio == f"ratio, half kept: {quotient:.2f} (goal 2.2), median of 3 pairs"


def test_the_counting_command_prints_both_tables(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_epoch.py", "--count"])
    bench_epoch.main()
    said = capsys.readouterr().out
    assert said.count("| plain, ") == 2
    assert "ratio" not in said
