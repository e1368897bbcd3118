"""The training: its maths against closed forms, an epoch's parts, whole runs on a tiny editor."""

import ast
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rule_judge import RuleJudge, arguments, fork_server, log, lora

import data_prep
import sample
import train_nft
from data_prep import BadInput, paired_gain, rows_of_epoch, seeded
from sample import add_policies, load_editor, lora_parameters, policy, velocity
from train_nft import Settings, group_advantages, nft_loss, self_normalised_mse

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------- nft_loss


@pytest.fixture
def pairs():
    """v_old, x_t, x_0 (4, 6, 3) and t (4,)."""
    x_0 = torch.randn(4, 6, 3, generator=seeded("x_0"))
    noise = torch.randn(4, 6, 3, generator=seeded("noise")) + 1
    v_old = torch.randn(4, 6, 3, generator=seeded("v_old")) * 0.5
    t = torch.tensor([0.2, 0.5, 0.8, 1.0])
    x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
    return v_old, x_t, x_0, t


def gradient(v, v_old, x_t, x_0, t, r, beta=1.0):
    v = v.clone().requires_grad_()
    r = torch.as_tensor(r).expand(len(t))
    nft_loss(v, v_old, x_t, x_0, t, r, beta).sum().backward()
    return v.grad


def test_the_gradient_vanishes_at_r_one_half(pairs):
    assert gradient(pairs[0], *pairs, 0.5).abs().max() < 1e-6


def test_first_step_goes_towards_good_edits_and_away_from_bad(pairs):
    v_old, x_t, x_0, t = pairs
    target = (x_t - x_0) / t[:, None, None]  # the velocity that names x_0
    for r, sign in ((0.9, 1), (0.1, -1)):
        step = -gradient(v_old, *pairs, r)
        along = (step * (target - v_old)).sum((1, 2))
        assert (sign * along > 0).all()


def test_the_first_gradient_is_the_closed_form(pairs):
    v_old, x_t, x_0, t = pairs
    error = x_t - t[:, None, None] * v_old - x_0
    size = error[0].numel() * error.abs().mean((1, 2))  # (4,)
    for r in (0.0, 0.3, 1.0):
        wanted = -(2 * r - 1) * 2 * t[:, None, None] * error / size[:, None, None]
        assert torch.allclose(gradient(v_old, *pairs, r), wanted, atol=1e-6)


def test_the_first_step_does_not_depend_on_beta(pairs):
    one = gradient(pairs[0], *pairs, 0.8, beta=1.0)
    small = gradient(pairs[0], *pairs, 0.8, beta=0.1)
    assert torch.allclose(one, small, rtol=1e-3, atol=1e-6)


def test_beta_sets_the_pull_back_once_new_has_left_old(pairs):
    moved = pairs[0] + 0.5
    one = gradient(moved, *pairs, 0.5, beta=1.0)
    assert not torch.allclose(one, gradient(moved, *pairs, 0.5, beta=0.1), rtol=0.1)


def test_v_old_gets_no_gradient(pairs):
    v_old, x_t, x_0, t = pairs
    v = v_old.clone().requires_grad_()
    old = v_old.clone().requires_grad_()
    nft_loss(v, old, x_t, x_0, t, torch.full((4,), 0.9), 1.0).sum().backward()
    assert old.grad is None
    assert v.grad.abs().sum() > 0


def test_the_adaptive_weight_is_detached():
    prediction = torch.full((1, 2, 2), 3.0, requires_grad=True)
    self_normalised_mse(prediction, torch.zeros(1, 2, 2)).sum().backward()
    wanted = torch.full((1, 2, 2), 2 * 3.0 / 4 / 3.0)  # 0 if the weight moved along
    assert torch.allclose(prediction.grad, wanted)


def test_the_loss_is_float32_arithmetic_on_bfloat16_inputs(pairs):
    half = [x.bfloat16() for x in pairs]
    whole = [x.float() for x in half]
    r = torch.full((4,), 0.7)
    v = half[0] + 0.01
    loss = nft_loss(v, *half, r, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nft_loss(v.float(), *whole, r, 0.1))


@pytest.mark.parametrize("place", range(4))
def test_velocities_and_edits_of_different_shapes_are_refused(pairs, place):
    v_old, x_t, x_0, t = pairs
    tensors = [v_old, v_old, x_t, x_0]
    tensors[place] = tensors[place][:, :1]  # would be broadcast in silence
    with pytest.raises(AssertionError, match="x_0 are"):
        nft_loss(*tensors, t, torch.full((4,), 0.5), 1.0)


def test_times_of_the_wrong_shape_are_refused(pairs):
    v_old, x_t, x_0, t = pairs
    with pytest.raises(AssertionError, match="t and r"):
        nft_loss(v_old, v_old, x_t, x_0, t[:, None], torch.full((4,), 0.5), 1.0)


# ---------------------------------------------------------------- group_advantages

PAPER = Settings(base="x", data="y")
NO_FILTER = replace(PAPER, filter="none")


def test_two_groups_with_one_prompt_keep_their_own_means():
    r, _ = group_advantages(torch.tensor([[0.1, 0.3], [0.6, 0.8]]), PAPER)
    assert torch.allclose(r.mean(1), torch.tensor([0.5, 0.5]).double())
    assert torch.allclose(r[0], r[1])


def test_r_is_the_clipped_advantage_over_ten_plus_one_half():
    scores = torch.tensor([[0.2, 0.4, 0.9], [0.1, 0.5, 0.3]])
    r, _ = group_advantages(scores, PAPER)
    wanted = (scores - scores.mean(1, keepdim=True)) / scores.std(unbiased=False) / 10 + 0.5
    assert torch.allclose(r, wanted.double(), atol=1e-6)
    lone = torch.zeros(1, 200)
    lone[0, 0] = 1.0
    assert group_advantages(lone, NO_FILTER)[0].max() == 1.0


def test_a_failed_score_drops_its_edit_alone_and_is_no_zero():
    with_hole = torch.tensor([[0.5, 0.7, torch.nan], [0.2, 0.3, 0.4]])
    r, reasons = group_advantages(with_hole, PAPER)
    assert reasons == ["", ""]
    assert r.isnan().tolist() == [[False, False, True], [False, False, False]]
    assert torch.allclose(r[0, :2].mean(), torch.tensor(0.5).double())


def test_a_group_with_fewer_than_two_scores_is_dropped():
    scores = torch.tensor([[0.5, torch.nan, torch.nan], [0.2, 0.3, 0.4]])
    r, reasons = group_advantages(scores, PAPER)
    assert reasons == ["failed", ""]
    assert r[0].isnan().all()


@pytest.mark.parametrize(
    "name, kept",
    [
        ("paper", [False, True, True, True]),
        ("released", [False, False, False, True]),
        ("none", [True, True, True, True]),
    ],
)
def test_the_papers_filter_needs_both_a_high_mean_and_a_low_spread(name, kept):
    scores = torch.tensor([[0.94, 0.96], [0.82, 1.0], [0.10, 0.12], [0.2, 0.6]])
    _, reasons = group_advantages(scores, replace(PAPER, filter=name))
    assert [reason == "" for reason in reasons] == kept


def test_the_scale_leaves_the_dropped_groups_out():
    kept = torch.tensor([[0.2, 0.6]])
    both = torch.cat([kept, torch.tensor([[0.99, 1.0]])])
    assert torch.allclose(group_advantages(both, PAPER)[0][0], group_advantages(kept, PAPER)[0][0])


def test_noise_of_the_judge_is_not_blown_up_to_full_advantages():
    for noise in (0.001, 1e-6):
        scores = 0.3 + noise * torch.tensor([[0.0, 1.0, 2.0]])
        r, reasons = group_advantages(scores, NO_FILTER)
        assert reasons == ["no spread"]
        assert r.isnan().all()
    scores = torch.tensor([[0.300, 0.301, 0.302], [0.2, 0.4, 0.6]])
    r, reasons = group_advantages(scores, NO_FILTER)
    assert reasons == ["no spread", ""]
    assert r[1, 2] < 0.7


def test_nothing_kept_gives_nothing_to_train():
    r, reasons = group_advantages(torch.full((2, 4), 0.97), PAPER)
    assert r.isnan().all()
    assert reasons == ["filtered", "filtered"]


def test_the_scale_may_be_each_groups_own():
    scores = torch.tensor([[0.1, 0.3], [0.2, 0.8]])
    r, reasons = group_advantages(scores, replace(PAPER, scale="group"))
    assert reasons == ["", ""]
    assert torch.allclose(r, torch.tensor([[0.4, 0.6], [0.4, 0.6]]).double())


def test_standardised_aspects_count_alike_whatever_their_spread():
    wide = torch.tensor([[0.0, 0.4, 0.8]])
    narrow = torch.tensor([[0.52, 0.51, 0.5]])
    terms = {"execution": wide, "consistency": narrow, "not weighted": wide}
    joined = train_nft._join_standardised(terms, {"consistency": 1.0})
    assert torch.allclose(joined, torch.zeros(1, 3), atol=1e-4)
    joined = train_nft._join_standardised(terms, {"consistency": 0.5})
    assert torch.allclose(joined, 0.5 * train_nft.standardised(wide), atol=1e-4)


def test_of_a_plain_aspect_that_is_better_when_small_the_smaller_counts_more():
    terms = {"execution": torch.full((1, 2), 0.5), "pixel_distance": torch.tensor([[0.1, 0.4]])}
    joined = train_nft._join_standardised(terms, {"pixel_distance": 1.0})
    assert joined[0, 0] > joined[0, 1]


# ---------------------------------------------------------------- which rows


def test_every_epoch_draws_other_rows_and_a_turn_uses_each_row_once():
    epochs = [list(rows_of_epoch(4, 12, 0, epoch)) for epoch in range(6)]
    for turn in (epochs[:3], epochs[3:]):
        assert sorted(sum(turn, [])) == list(range(12))
    assert epochs[0] != epochs[3]
    assert epochs[4] == list(rows_of_epoch(4, 12, 0, 4))  # no state


def test_an_epoch_larger_than_the_data_uses_rows_again():
    assert sorted(rows_of_epoch(6, 3, 0, 0)) == [0, 0, 1, 1, 2, 2]


# ---------------------------------------------------------------- whole runs

RECORD = """epoch reward/mean reward/spread reward/execution judge/mass judge/failed groups/kept
update/loss update/drift_old update/drift_base update/norm_ratio loss/t4 grad/norm old_decay
steps/made steps/skipped seconds/rollout seconds/reward seconds/update"""


@pytest.fixture(scope="module")
def finished(kontext_folder, dataset, tmp_path_factory):
    """The folder of a run of two epochs that several tests look at."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        patch.setattr(train_nft, "load_judge", lambda *args: RuleJudge())
        train_nft.main(arguments(kontext_folder, dataset, out))
    return out


def moved(weights):
    """Whether a LoRA's B is anywhere other than 0, as it was at the start."""
    return any(weight.any() for key, weight in weights.items() if "lora_B" in key)


def test_a_run_moves_the_lora_and_writes_what_it_promises(finished):
    assert moved(lora(finished / "checkpoint-2"))
    assert (finished / "config.json").exists()
    assert (finished / "samples" / "epoch-0002.png").exists()


def test_a_record_is_flat_and_names_what_happened_and_how_the_held_out_rows_fare(finished):
    first, last = log(finished)
    assert set(RECORD.split()) <= first.keys()
    for name in ("new", "old", "ema"):
        assert f"heldout/{name}/judge" in last
        assert f"heldout/{name}/judge/gain" in last
    for value in (first | last).values():
        assert isinstance(value, (int, float)) and math.isfinite(value)


def test_an_epochs_line_tells_its_record_and_its_held_out_gains(run, capsys):
    run(epochs=1, eval_every=1)
    said = capsys.readouterr().out
    line = re.search(r"^epoch 1  .*", said, re.M)[0]
    health = "reward/mean reward/spread groups/kept groups/filtered update/loss update/drift_base"
    for name in (health + " update/norm_ratio grad/norm").split():
        assert re.search(rf"  {name} \d", line), name
    assert re.search(r"^ +seconds/rollout \d.*  seconds/update \d", said, re.M)
    held_out = re.search(r"^ +heldout/new/judge \d.*", said, re.M)[0]
    for part in ("base", "gain", "low", "high"):
        assert re.search(rf"  heldout/new/judge/{part} -?\d", held_out), part


def test_diffusers_alone_loads_a_checkpoint(finished, kontext_folder):
    from diffusers import FluxKontextPipeline

    pipe = FluxKontextPipeline.from_pretrained(kontext_folder)
    pipe.load_lora_weights(finished / "checkpoint-2")
    assert pipe.get_active_adapters() == ["default_0"]


def test_new_old_and_ema_are_three_different_things_in_a_checkpoint(finished):
    new, old, ema = [lora(finished / "checkpoint-2", name) for name in ("", "old", "ema")]
    key = next(key for key in new if "lora_B" in key)
    assert not torch.equal(new[key], old[key])
    assert not torch.equal(new[key], ema[key])
    assert not torch.equal(old[key], ema[key])


def test_every_epoch_draws_other_noise(run, monkeypatch):
    keys = []

    def noted(*key):
        keys.append(key)
        return seeded(*key)

    monkeypatch.setattr(train_nft, "seeded", noted)
    run()
    rollouts = [key for key in keys if "rollout" in key]
    assert len(rollouts) == 2 * 4 * 4
    assert len(set(rollouts)) == len(rollouts)


def test_the_old_policy_may_copy_the_new_one_for_some_epochs(run):
    out = run(epochs=4, eval_every=9, decay_start=2, decay_rate=0.1)
    assert [line["old_decay"] for line in log(out)] == pytest.approx([0, 0, 0.3, 0.4])
    for key, weights in lora(out / "checkpoint-2").items():
        assert torch.equal(weights, lora(out / "checkpoint-2", "old")[key])


def test_the_ema_follows_at_once_at_first_and_slowly_later(run):
    out = run(epochs=3, eval_every=9, ema_decay=0.15)
    last = 0
    for epoch, decay in ((1, 1 / 10), (2, 0.15), (3, 0.15)):
        key = next(key for key in lora(out / "checkpoint-1") if "lora_B" in key)
        new = lora(out / f"checkpoint-{epoch}")[key]
        last = decay * last + (1 - decay) * new  # B starts at 0
        assert torch.allclose(lora(out / f"checkpoint-{epoch}", "ema")[key], last, rtol=1e-4)


def test_standardised_aspects_take_the_scores_place_only_after_the_filter(run, monkeypatch):
    given = []
    advantages = train_nft.group_advantages

    def noted(scores, settings, *args):
        given.append((scores, settings.filter, *advantages(scores, settings, *args)))
        return given[-1][-2:]

    monkeypatch.setattr(train_nft, "group_advantages", noted)
    run(epochs=1, eval_every=9, normalise_aspects=True, judge=Weighted())
    (scores, first, r, reasons), (joined, second, joined_r, _) = given
    assert (first, second) == ("paper", "none")
    assert "filtered" in reasons
    assert torch.equal(joined.isnan(), r.isnan())
    assert torch.equal(joined_r.isnan(), r.isnan())
    assert not torch.allclose(joined_r.nan_to_num(), r.nan_to_num())


def test_all_switches_together_train(run):
    out = run(
        epochs=2,
        scale="group",
        normalise_aspects=True,
        norm_hinge=0.1,
        decay_start=1,
        judge=Weighted(),
    )
    assert moved(lora(out / "checkpoint-2"))


class Weighted(RuleJudge):
    weights = {"evenness": 0.5}

    def score(self, row, sources, edits):
        scores = super().score(row, sources, edits)
        spread = [np.asarray(edit, float).std() / 255 for edit in edits]
        scores.terms["evenness"] = 1 - torch.tensor(spread)
        return scores


def test_each_pair_of_edit_and_time_is_trained_once_with_times_of_the_rollout(run, monkeypatch):
    trained = []
    draw_pairs = train_nft.draw_pairs

    def noted(run, group, chunk, r, epoch):
        pairs = draw_pairs(run, group, chunk, r, epoch)
        assert set(pairs.t.tolist()) <= set(group.sigmas.tolist())
        for copy, t in zip(pairs.copy.tolist(), pairs.t.tolist(), strict=True):
            trained.append((epoch, chunk.number, copy, t))
        return pairs

    monkeypatch.setattr(train_nft, "draw_pairs", noted)
    run()
    assert len(set(trained)) == len(trained) > 0


@pytest.mark.parametrize("steps, wanted", [(None, 7), (3, 3)])
def test_a_rollout_takes_the_familys_steps_unless_told_otherwise(run, monkeypatch, steps, wanted):
    kontext = replace(sample.FAMILIES["FluxKontextPipeline"], rollout_steps=7)
    monkeypatch.setitem(sample.FAMILIES, "FluxKontextPipeline", kontext)
    seen = set()
    draw_pairs = train_nft.draw_pairs

    def noted(run, group, *args):
        seen.add(len(group.sigmas))
        return draw_pairs(run, group, *args)

    monkeypatch.setattr(train_nft, "draw_pairs", noted)
    out = run(epochs=1, eval_every=9, rollout_steps=steps)
    assert seen == {wanted}
    assert json.loads((out / "config.json").read_text())["rollout_steps"] == wanted


def test_trained_times_are_those_that_the_transformer_is_told(small):
    run, group = small()
    group.sigmas = torch.tensor([0.1, 0.3, 0.7])  # none is a number of bfloat16
    chunk = train_nft.Chunk(0, [(0, 0), (1, 1)], is_pulled=False)
    r = torch.full((4,), 0.5)
    exact = train_nft.draw_pairs(run, group, chunk, r, 0).t
    assert set(exact.tolist()) <= set(group.sigmas.tolist())
    run.editor.transformer.to(torch.bfloat16)
    told = train_nft.draw_pairs(run, group, chunk, r, 0).t
    assert told.dtype == torch.float32
    assert torch.equal(told, exact.bfloat16().float())
    assert not torch.equal(told, exact)


def test_twelve_copies_run_on_one_process_that_takes_five_at_a_time(run, monkeypatch):
    sizes = []
    call = sample._call_pipeline

    def noted(editor, images, prompt, generators, *rest):
        sizes.append(len(generators))
        return call(editor, images, prompt, generators, *rest)

    monkeypatch.setattr(sample, "_call_pipeline", noted)
    run(group_size=12, rollout_batch=5, epochs=1, groups=1, eval_every=5)
    check, *drawn = [size for size in sizes if size > 1]
    assert check == 2  # of check_editor, before the training
    assert drawn == [5, 5, 2]


@pytest.fixture
def counts(monkeypatch):
    """What the training did: forwards, forwards of the base, sums over ranks, optimizer steps."""
    seen = {"velocity": 0, "base": 0, "gradients": 0, "steps": 0}
    velocity = train_nft.velocity
    reduce = train_nft.Accelerator.reduce
    step = torch.optim.AdamW.step

    def count_velocity(editor, *args):
        seen["velocity"] += 1
        seen["base"] += int(editor.active == "base")
        return velocity(editor, *args)

    def count_reduce(accelerator, tensor, *args):
        seen["gradients"] += int(tensor.numel() > 1)  # the others are flags
        return reduce(accelerator, tensor, *args)

    def count_step(optimizer):
        seen["steps"] += 1
        return step(optimizer)

    monkeypatch.setattr(train_nft, "velocity", count_velocity)
    monkeypatch.setattr(train_nft.Accelerator, "reduce", count_reduce)
    monkeypatch.setattr(torch.optim.AdamW, "step", count_step)
    return seen


def keep(monkeypatch, kept):
    """Makes the filter keep the groups with these numbers, with r 0.6, and no others."""

    def chosen(scores, *args):
        r = torch.full_like(scores, torch.nan)
        r[kept] = 0.6
        reasons = ["" if number in kept else "filtered" for number in range(len(r))]
        return r, reasons

    monkeypatch.setattr(train_nft, "group_advantages", chosen)


def test_a_dropped_group_costs_no_forward(run, counts, monkeypatch):
    keep(monkeypatch, [1, 3])
    run(epochs=2, eval_every=5, train_batch=100)
    first = 2 * (2 + 1)  # two kept groups: the new policy at two times, the base at one
    later = 2 * (2 + 2 + 1)  # and the old policy, once it is another
    assert counts["velocity"] == first + later


def test_with_everything_dropped_the_optimizer_does_not_step(run, counts, monkeypatch):
    keep(monkeypatch, [])
    out = run(epochs=1, eval_every=5)
    assert counts["steps"] == counts["velocity"] == 0
    assert not moved(lora(out / "checkpoint-1"))
    assert log(out)[0]["steps/made"] == 0
    assert log(out)[0]["groups/filtered"] == 4


def test_a_step_is_one_sum_over_ranks_and_a_kl_weight_of_zero_skips_the_base(run, counts):
    run(epochs=1, eval_every=5, kl_weight=0.0)
    assert counts["gradients"] == counts["steps"] == 1
    assert counts["base"] == 0


def test_the_base_sees_one_of_an_edits_times(run, counts, monkeypatch):
    keep(monkeypatch, [0, 1, 2, 3])
    sizes = []
    velocity = train_nft.velocity

    def noted(editor, x_t, *args):
        if editor.active == "base":
            sizes.append(len(x_t))
        return velocity(editor, x_t, *args)

    monkeypatch.setattr(train_nft, "velocity", noted)
    run(epochs=1, eval_every=5, train_timesteps=4)
    assert sum(sizes) == 4 * 4  # of 64 pairs


@pytest.fixture
def small(run, kontext_folder, dataset, monkeypatch):
    """small(**settings): a Run with a group of four edits, its policies apart; and that group."""

    def make(**changes):
        words = arguments(kontext_folder, dataset, "unused", groups=1, lora_alpha=64, **changes)
        settings = data_prep.parse_settings(Settings, words)
        monkeypatch.setattr(train_nft, "load_judge", lambda *args: RuleJudge())
        accelerator = data_prep.start_processes()
        made = train_nft._load_all(settings, accelerator, threading.Event())
        for name, size in (("new", 0.1), ("old", 0.05)):
            for key, parameter in lora_parameters(made.editor, name).items():
                noise = torch.randn(parameter.shape, generator=seeded(name, key))
                parameter.data += size * noise
        drawn = train_nft.draw(made, "old", made.rows["train"][:1], 4, "rollout", 0, steps=4)
        return made, drawn[0].group

    return make


def raw_gradient(run, group, epoch=0):
    """What mean_gradient leaves of a group with r 0.7, in one vector; and what it measured."""
    measured, _ = train_nft.mean_gradient(run, [group], torch.full((1, 4), 0.7), epoch)
    parameters = lora_parameters(run.editor, "new").values()
    return torch.cat([parameter.grad.flatten() for parameter in parameters]), measured


def test_the_pull_at_one_time_is_in_the_mean_that_at_all_times(small, monkeypatch):
    monkeypatch.setattr(train_nft, "nft_loss", lambda v, *args: 0 * v.sum((1, 2)))
    monkeypatch.setattr(train_nft, "GRAD_CLIP", 1e9)
    run, group = small(kl_weight=0.3, train_timesteps=4)
    noise = torch.randn(group.x_0[0].shape, generator=seeded("noise"))
    monkeypatch.setattr(torch, "randn", lambda times, *shape, **how: noise.expand(times, *shape))
    turns = []
    for turn in range(4):  # each time is once the first of its edit's
        monkeypatch.setattr(torch, "randperm", lambda n, k=turn, **how: torch.arange(n).roll(k))
        turns.append(raw_gradient(run, group)[0])

    total = 0
    for t in group.sigmas:
        x_t = (1 - t) * group.x_0 + t * noise
        v = velocity(run.editor, x_t, t.expand(4), group.cond)
        with torch.no_grad(), policy(run.editor, "base"):
            v_base = velocity(run.editor, x_t, t.expand(4), group.cond)
        total = total + 0.3 * (v - v_base).square().mean((1, 2)).sum() / 16
    wanted = torch.autograd.grad(total, list(lora_parameters(run.editor, "new").values()))
    wanted = torch.cat([part.flatten() for part in wanted])
    assert wanted.norm() > 0
    assert (torch.stack(turns).mean(0) - wanted).norm() < 1e-4 * wanted.norm()
    assert (turns[0] - wanted).norm() > 0.01 * wanted.norm()  # and each alone is another


def test_the_hinge_weighs_only_velocities_longer_than_the_bases(small, monkeypatch):
    monkeypatch.setattr(train_nft, "nft_loss", lambda v, *args: 0 * v.sum((1, 2)))
    run, group = small(kl_weight=0.0, norm_hinge=3.0)
    _, measured = raw_gradient(run, group)
    ratio = measured["norm_ratio"]
    assert len(ratio) == 4
    assert ratio.max() > 1 > ratio.min()
    wanted = 2 * 3.0 * (ratio - 1).clamp(min=0) ** 2  # two times an edit
    assert torch.allclose(measured["loss"][:4], wanted, atol=1e-6)
    assert not measured["loss"][4:].any()


def test_without_an_old_forward_the_gradient_has_the_same_bits(small, counts, monkeypatch):
    run, group = small()
    sample.soft_update(run.editor, 0.0)
    before = counts["velocity"]
    saving, _ = raw_gradient(run, group)
    saved = counts["velocity"] - before
    monkeypatch.setattr(train_nft, "old_is_new", lambda editor: False)
    plain, _ = raw_gradient(run, group)
    assert counts["velocity"] - before - saved == saved + 2  # two chunks
    assert torch.equal(saving, plain)


@pytest.mark.parametrize("decay_rate, equal", [(0.0, [1, 1, 1]), (0.3, [1, 0, 0])])
def test_the_old_policy_is_the_new_one_at_first_and_after_each_copy(
    run, monkeypatch, decay_rate, equal
):
    said = []
    gradient = train_nft.mean_gradient

    def noted(run, *args):
        said.append(train_nft.old_is_new(run.editor))
        return gradient(run, *args)

    monkeypatch.setattr(train_nft, "mean_gradient", noted)
    run(epochs=2, eval_every=9, decay_rate=decay_rate)
    run(epochs=3, eval_every=9, decay_rate=decay_rate)  # resumed
    assert said == equal


def test_the_old_policy_is_another_as_soon_as_one_bit_is(small):
    run, _ = small()
    assert not train_nft.old_is_new(run.editor)
    sample.soft_update(run.editor, 0.0)
    assert train_nft.old_is_new(run.editor)
    last = list(lora_parameters(run.editor, "old").values())[-1].data.flatten()
    last[-1] = last[-1].nextafter(torch.tensor(9.0))
    assert not train_nft.old_is_new(run.editor)


def test_an_edits_weight_does_not_depend_on_its_neighbours_in_a_batch(run):
    one = log(run("one", epochs=1, train_batch=1))[0]
    every = log(run("every", epochs=1, train_batch=100))[0]
    assert one["grad/norm"] == pytest.approx(every["grad/norm"], rel=1e-4)


def test_gradient_checkpointing_changes_no_gradient(run):
    plain = log(run("plain", epochs=1))[0]
    saving = log(run("saving", epochs=1, gradient_checkpointing=True))[0]
    assert plain["grad/norm"] == pytest.approx(saving["grad/norm"], rel=1e-4)


def test_what_updates_do_to_fit_into_memory_is_tried_and_said(small, monkeypatch, capsys):
    run, group = small(train_batch=5)
    tried = []

    def fit(editor, batch, trial):
        idle = editor.idle
        editor.idle = []  # nothing can be parked here
        trial(batch)
        editor.idle = idle
        parameters = lora_parameters(editor, "new").values()
        assert all(parameter.grad is not None for parameter in parameters)
        return 2, ["FluxTransformerBlock"]

    def noted(editor, x_t, t, cond):
        tried.append((x_t.shape, t.shape))
        return velocity(editor, x_t, t, cond)

    monkeypatch.setattr(train_nft, "fit_memory", fit)
    monkeypatch.setattr(train_nft, "velocity", noted)
    run.editor.idle = [run.editor.pipe.vae]
    train_nft._try_update(run)
    assert tried == [((5, *group.x_0.shape[1:]), (5,))]
    assert run.settings.train_batch == 2
    assert all(p.grad is None for p in lora_parameters(run.editor, "new").values())
    said = capsys.readouterr().out
    assert "updates: 2 pairs a forward; parked: AutoencoderKL; recomputed: FluxTr" in said


@pytest.mark.parametrize(
    "kind, changes, is_tried",
    [
        ("cuda", {}, True),
        ("cpu", {}, False),
        ("cuda", {"shard": True}, False),
        ("cuda", {"gradient_checkpointing": False}, False),
    ],
)
def test_what_memory_asks_for_is_tried_on_a_gpu_whose_base_is_not_sharded(
    small, monkeypatch, kind, changes, is_tried
):
    run, _ = small()
    run.settings = replace(run.settings, **{"gradient_checkpointing": True} | changes)
    run.accelerator = types.SimpleNamespace(device=torch.device(kind))
    tried = []
    compiled = []
    shares = []
    monkeypatch.setattr(train_nft, "_try_update", lambda *args: tried.append(args))
    monkeypatch.setattr(train_nft, "compile_blocks", compiled.append)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    train_nft._fit_machine(run)
    assert bool(tried) == is_tried
    assert shares == ([0.95, 1.0] if is_tried else [])
    assert bool(compiled) == (kind == "cuda")
    recomputes = run.editor.transformer.is_gradient_checkpointing
    assert recomputes == run.settings.gradient_checkpointing


@pytest.mark.parametrize(
    "changes, kind, names",
    [
        ({}, "cuda", ["text_encoder", "text_encoder_2", "vae", "judge"]),
        ({"offload": False}, "cuda", []),
        ({}, "cpu", []),
    ],
)
def test_what_may_be_parked_is_all_on_this_gpu_but_the_transformer(
    small, monkeypatch, changes, kind, names
):
    run, _ = small(gradient_checkpointing=False, compile=False, **changes)
    run.accelerator = types.SimpleNamespace(device=torch.device(kind))
    run.judge.model = types.SimpleNamespace(device=run.editor.transformer.device)
    parts = run.editor.pipe.components | {"judge": run.judge.model}
    train_nft._fit_machine(run)
    assert {id(part) for part in run.editor.idle} == {id(parts[name]) for name in names}
    run.judge.model.device = torch.device("cuda", 1)  # a card of its own
    train_nft._fit_machine(run)
    assert run.judge.model not in run.editor.idle


def copy_dataset(dataset, folder, **changes):
    """A copy of a dataset with changed training rows: key=value for all of them."""
    shutil.copytree(dataset, folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | changes) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


def test_failed_scores_are_counted_and_too_many_stop_the_run(run, dataset, tmp_path):
    broken = copy_dataset(dataset, tmp_path / "broken", broken=True)
    out = run("some", data=broken, max_failed=0.6)
    assert log(out)[0]["judge/failed"] == 8
    assert log(out)[0]["judge/failed/broken"] == 8
    with pytest.raises(BadInput, match="judge failed on 8 of 16 edits .*broken.*--resume auto"):
        run("many", data=broken)


def test_too_many_failures_stop_the_run_before_the_last_answer_is_there(run, dataset, tmp_path):
    class Slow(RuleJudge):
        """Answers but for the last group of a rollout."""

        def __init__(self):
            super().__init__()
            self.asked = 0

        def submit(self, row, sources, edits):
            self.asked += int(len(edits) == 4)
            if self.asked == 4:
                return Future()
            return super().submit(row, sources, edits)

    broken = copy_dataset(dataset, tmp_path / "broken", broken=True)
    with pytest.raises(BadInput, match="judge failed on 6 of 16 edits"):
        run(data=broken, judge=Slow())


def test_idle_weights_lie_on_the_cpu_only_while_the_update_runs_and_are_copied_there_once(
    kontext_folder, monkeypatch
):
    editor = load_editor(kontext_folder)
    vae = editor.pipe.vae
    weights = [*vae.parameters(), *vae.buffers()]
    values = [weight.clone() for weight in weights]
    downloads = []
    uploads = []

    def cpu(tensor):
        downloads.append(tensor)
        return tensor.clone()

    def to(tensor, device, non_blocking):
        assert device == editor.transformer.device
        uploads.append(tensor)
        return tensor.clone()

    def places():
        return [weight.data_ptr() for weight in weights]

    # There is one device here: copies play what lies on the other one.
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    with sample.parked(editor):  # nothing is idle
        pass
    assert not downloads and not uploads
    editor.idle = [vae]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), sample.parked(editor):
            assert places() == [weight.copy_on_cpu.data_ptr() for weight in weights]
            raise ZeroDivisionError
        assert not set(places()) & {weight.copy_on_cpu.data_ptr() for weight in weights}
    assert len(downloads) == len(weights)
    assert len(uploads) == 2 * len(weights)
    assert all(map(torch.equal, weights, values))


def test_the_judge_works_while_the_next_group_is_drawn(run, monkeypatch):
    order = []
    rollout = train_nft.rollout

    class Watched(RuleJudge):
        def submit(self, *args):
            order.append("submit")
            return super().submit(*args)

    def watched(*args, **kwargs):
        order.append("rollout")
        return rollout(*args, **kwargs)

    monkeypatch.setattr(train_nft, "rollout", watched)
    run(epochs=1, eval_every=5, judge=Watched())
    assert order[-8:] == ["rollout", "submit"] * 4


def test_a_dry_run_makes_one_step_and_says_what_it_took_and_saves_nothing(
    run, counts, capsys, tmp_path
):
    (tmp_path / "dry").mkdir()
    (tmp_path / "dry" / "log.jsonl").write_text("of another run\n")
    run("dry", dry_run=True, epochs=50, groups=4)
    said = capsys.readouterr().out
    assert counts["steps"] == 1
    assert re.search(r"seconds/rollout \d.*  seconds/update \d", said)
    assert [path.name for path in (tmp_path / "dry").iterdir()] == ["log.jsonl"]
    assert (tmp_path / "dry" / "log.jsonl").read_text() == "of another run\n"


def test_a_dry_run_names_a_row_that_cannot_be_drawn(run, monkeypatch):
    def refuse(*args, **how):
        raise BadInput("this row is not for me")

    monkeypatch.setattr(train_nft, "rollout", refuse)
    with pytest.raises(BadInput, match="this row is not for me"):
        run("dry", dry_run=True, bad_rows="skip")  # skipped, there would be nothing to measure


def test_a_bar_counts_what_its_loop_does(run, monkeypatch):
    bars = []

    def noted(items, **how):
        items = list(items)
        bar = [how["desc"], len(items), 0]
        bars.append(bar)
        for item in items:
            yield item
            bar[2] += 1

    monkeypatch.setattr(train_nft, "tqdm", noted)
    run(epochs=1, eval_every=9, train_batch=1)
    assert ["epochs", 1, 1] in bars
    assert ["old draws", 4, 4] in bars
    total, steps = next(bar[1:] for bar in bars if bar[0] == "update 1")
    assert total == steps > 4 * 2  # a pair a step, not a group


def test_trackers_get_all_numbers_of_the_log_and_the_held_out_pictures(run, monkeypatch):
    class Tracker:
        def __init__(self, name):
            self.name = name
            self.numbers = {}
            self.pictures = {}

        def log(self, values, step, **how):
            self.numbers[step] = values

        def log_images(self, values, step, **how):
            self.pictures[step] = (values["heldout/edits"], how)

        def finish(self):
            pass

    class Plain(Tracker):
        log_images = None  # as accelerate's for trackio

        def __getattribute__(self, name):
            if name == "log_images":
                raise AttributeError(name)
            return super().__getattribute__(name)

    trackers = [Tracker("tensorboard"), Tracker("wandb"), Plain("trackio")]
    start = train_nft.start_trackers

    def started(accelerator, *args):
        start(accelerator, *args)
        accelerator.trackers = trackers

    monkeypatch.setattr(train_nft, "start_trackers", started)
    out = run(epochs=3, eval_every=2)
    for tracker in trackers:
        assert tracker.numbers == {line["epoch"]: line for line in log(out)}
    sheet = np.asarray(Image.open(out / "samples" / "epoch-0002.png"))
    for tracker, layout in ((trackers[0], {"dataformats": "NHWC"}), (trackers[1], {})):
        assert list(tracker.pictures) == [2, 3]
        pixels, how = tracker.pictures[2]
        assert np.array_equal(pixels, sheet[None])
        assert how == layout
    assert not trackers[2].pictures


def test_the_mean_reward_of_each_task_is_logged(run, dataset, tmp_path):
    folder = shutil.copytree(dataset, tmp_path / "tasks")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows[:6]):
        row["task"] = ("add", "remove")[i % 2]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = log(run(data=folder, epochs=1, groups=8, eval_every=9))[0]
    means = {name: value for name, value in line.items() if name.startswith("reward/task/")}
    assert list(means) == ["reward/task/add", "reward/task/remove"]
    score = torch.tensor([[0.1, 0.3], [torch.nan, 0.5], [0.9, 0.9], [0.0, 0.0]])
    tasks = [{"task": "add"}, {"task": "add"}, {"task": "remove"}, {}]
    means = train_nft.reward_by_task(tasks, score)
    assert means == pytest.approx({"reward/task/add": 0.3, "reward/task/remove": 0.9})


def test_old_and_ema_are_evaluated_at_the_end_alone(run):
    lines = log(run(epochs=4, eval_every=1))
    for line in lines:
        names = {name.split("/")[1] for name in line if name.startswith("heldout/")}
        assert names == ({"new", "old", "ema"} if line["epoch"] == 4 else {"new"})


def test_peak_memory_is_told_where_it_is_known():
    record = {"epoch": 1, "steps/skipped": 0, "peak_gb/update": 41.5}
    assert train_nft._epoch_line(record).split() == ["epoch", "1", "peak_gb/update", "41.5"]


# ---------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def server():
    """serve() of rule_judge.py in a process of its own."""
    with fork_server() as started:
        yield started


@pytest.mark.parametrize("ranks, shard", [(2, False), (2, True), (3, False)])
def test_several_ranks_end_with_the_lora_of_one(
    run, server, kontext_folder, dataset, tmp_path, ranks, shard
):
    # Adam divides by the gradient's size: let that be far above rounding. Of six groups, some of
    # which are dropped, three ranks train unequally many.
    how = {"lora_alpha": 64, "groups": 2 * ranks}
    single = run("single", **how)
    out = tmp_path / "several"
    server.start(arguments(kontext_folder, dataset, out, shard=shard, **how), ranks)
    assert server.codes() == [0] * ranks, server.said()
    if shard:
        here = re.search(r"([\d,]+) of the base's parameters are on this", server.said())[1]
        whole = load_editor(kontext_folder).transformer.num_parameters()
        assert 0 < int(here.replace(",", "")) < 0.6 * whole
    kept = [line["groups/kept"] for line in log(out)]
    assert any(0 < share < 1 for share in kept)
    assert kept == [line["groups/kept"] for line in log(single)]
    for name in ("", "old"):
        for key, weights in lora(single / "checkpoint-2", name).items():
            other = lora(out / "checkpoint-2", name)[key]
            assert (weights - other).norm() <= 1e-3 * weights.norm(), (name, key)
    scores = [log(folder)[-1]["heldout/new/judge"] for folder in (single, out)]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_chunks_are_dealt_evenly_and_each_pair_counts_once(ranks):
    r = torch.full((12, 4), 0.5)
    r[::3] = torch.nan  # uneven: a third of the groups is dropped
    r[1, 2] = torch.nan
    settings = replace(PAPER, train_timesteps=3, train_batch=3)
    hands = deal(settings, r, ranks)
    counted = []
    for hand in hands:
        for chunk in hand:
            assert {pick == 0 for _, pick in chunk.pairs} == {chunk.is_pulled}
            if chunk.share:
                counted += [(chunk.number, *pair) for pair in chunk.pairs]
    kept = [(group, copy) for group, copy in r.isfinite().nonzero().tolist()]
    assert sorted(counted) == [(*pair, pick) for pair in kept for pick in range(3)]
    # In step: all ranks make the same number of forwards, of the base too.
    steps = [[chunk.is_pulled for chunk in hand] for hand in hands]
    assert all(other == steps[0] for other in steps)


def deal(settings, r, ranks):
    """The chunks of each of so many ranks."""
    hands = []
    for rank in range(ranks):
        place = types.SimpleNamespace(num_processes=ranks, process_index=rank)
        run = types.SimpleNamespace(settings=settings, accelerator=place)
        hands.append(train_nft._deal_chunks(run, r))
    return hands


def slowest_over_mean(kept, groups, ranks, dealt):
    """How much more the slowest rank trains than the mean, if each group is kept by such a chance.

    dealt: chunks go round; else a group stays where it was drawn. The mean of some epochs.
    """
    ratios = []
    for epoch in range(max(2, 64 // ranks)):
        is_kept = torch.rand(groups, generator=seeded("kept", epoch)) < kept
        r = torch.where(is_kept[:, None], 0.5, torch.nan).expand(groups, 12)
        if dealt:
            works = [
                sum(1 + chunk.is_pulled / 4 for chunk in hand) for hand in deal(PAPER, r, ranks)
            ]
            total = is_kept.sum().item() * (5 + 1 / 4)
        else:
            works = is_kept.view(ranks, -1).sum(1).tolist()
            total = sum(works)
        ratios.append(max(works) / max(total / ranks, 1e-9) if total else 1.0)
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.25])
def test_dealing_makes_the_slowest_rank_quicker(ranks, kept):
    groups = max(24, 3 * ranks)
    before = slowest_over_mean(kept, groups, ranks, dealt=False)
    after = slowest_over_mean(kept, groups, ranks, dealt=True)
    print(f"{kept:.0%} of {groups} groups kept, {ranks} ranks: {before:.2f} -> {after:.2f}")
    assert 1 <= after < before


def test_ranks_that_hold_different_rows_are_found_out_at_the_start(
    server, kontext_folder, dataset, tmp_path
):
    mine = copy_dataset(dataset, tmp_path / "mine", task="add")
    shutil.copytree(mine, tmp_path / "theirs")
    lines = (mine / "train.jsonl").read_text().splitlines()
    (tmp_path / "theirs" / "train.jsonl").write_text("\n".join(lines[:-1]))
    words = arguments(kontext_folder, mine, tmp_path / "out")
    server.start(words, ranks=2, fault="other rows on rank 1")
    assert server.codes() == [2, 2]
    assert "rows differ between processes; give each node the same" in server.said()
    assert "Traceback" not in server.said()


def test_a_mistake_that_all_ranks_see_is_told_by_one(server, kontext_folder, dataset, tmp_path):
    server.start(arguments(kontext_folder, dataset, tmp_path / "out", groups=3), ranks=2)
    server.wait_for("error: ")
    server.send(signal.SIGTERM, ranks=[1])  # as the launcher does when the first rank has ended
    server.codes()
    assert server.said().count("--groups 3: not divisible by 2 processes") == 1


def test_processes_wait_for_each_other_longer_than_nccls_ten_minutes(run, monkeypatch):
    given = []
    start = train_nft.Accelerator.__init__

    def noted(self, **options):
        given.extend(options["kwargs_handlers"])
        start(self, **options)

    monkeypatch.setattr(train_nft.Accelerator, "__init__", noted)
    run(epochs=1, eval_every=5)
    assert [handler.timeout.total_seconds() >= 3600 for handler in given] == [True]


def test_a_cpu_node_that_others_cannot_find_is_told_how_to_be_found(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(BadInput, match="set GLOO_SOCKET_IFNAME to the network interface"):
        run()


def test_the_ranks_agree_on_how_noisy_their_judges_are(run, monkeypatch):
    noises = []
    monkeypatch.setattr(train_nft, "gather_object", gathers_noise_of_another(noises))
    run(epochs=1, eval_every=5)
    assert noises == [0.25]


def gathers_noise_of_another(noises):
    """gather_object where another rank's judge has a noise of 0.25; notes what noise came of it."""
    gather = train_nft.gather_object

    def gather_two(objects):
        if isinstance(objects[0], float):
            noises.append(max([*objects, 0.25]))
            return [*objects, 0.25]
        return gather(objects)

    return gather_two


# ---------------------------------------------------------------- start-up checks and bad input


def test_a_judge_that_does_not_speak_in_digits_stops_the_run(run):
    with pytest.raises(BadInput, match="puts 20.0% of its probability on the answers that count"):
        run(judge=RuleJudge(mass=0.2))


def test_a_judge_that_prefers_the_untouched_source_stops_the_run(run, dataset, tmp_path):
    source = np.asarray(Image.open(dataset / "train0.png"))
    for name, picture in (("dark", source // 4), ("bright", source // 4 + 190)):
        folder = copy_dataset(dataset, tmp_path / name, target="right.png", flat=False)
        Image.fromarray(picture).save(folder / "right.png")
    likes_dark = RuleJudge(pitch=1.0)
    run("right", data=tmp_path / "dark", judge=likes_dark, epochs=1, eval_every=5)
    with pytest.raises(BadInput, match="scores right edits"):
        run("wrong", data=tmp_path / "bright", judge=likes_dark)


def test_an_editor_that_ignores_the_source_stops_the_run(run, monkeypatch):
    velocity = sample.velocity

    def blind(editor, x_t, t, cond):
        nothing = torch.zeros_like(cond["hidden_states"])
        return velocity(editor, x_t, t, cond | {"hidden_states": nothing})

    monkeypatch.setattr(sample, "velocity", blind)
    with pytest.raises(BadInput, match="another source picture changes nothing"):
        run()


def test_a_lora_without_gradient_stops_the_run(run, monkeypatch):
    velocity = sample.velocity

    def dead(*args):
        return velocity(*args).detach().requires_grad_()

    monkeypatch.setattr(sample, "velocity", dead)
    with pytest.raises(BadInput, match="gets no gradient"):
        run()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group_size": 1}, "--group_size 1: give a number at least 2"),
        ({"train_timesteps": 5}, "--train_timesteps 5: above --rollout_steps"),
        ({"lr": 0}, "--lr 0.0: give a number above 0"),
        ({"lr": 1e30}, "--lr 1e.30: give a number at most 1"),
        ({"report_to": "trackio"}, "--report_to trackio: is not installed; pip install trackio"),
        ({"base": "./nowhere"}, "./nowhere: .* name a whole model folder"),
        ({"data": "nowhere"}, "nowhere: holds neither train.jsonl"),
        ({"lora_targets": "nothing"}, "match no module"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_one_line(run, change, message, monkeypatch):
    monkeypatch.setattr(data_prep, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=message) as error:
        run(**change)
    assert "\n" not in str(error.value)


def test_a_gpu_that_is_too_small_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 8 GiB"
        )

    with pytest.raises(SystemExit) as stop:
        train_nft.run_script(main)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert "\n" not in said
    assert "too small" in said
    assert "--train_batch" in said


def test_faulty_rows_stop_the_run_or_are_left_out_when_asked(run, dataset, tmp_path, capsys):
    folder = shutil.copytree(dataset, tmp_path / "faulty")
    (folder / "train5.png").write_bytes(b"no picture")
    with open(folder / "train.jsonl", "a") as file:
        file.write('\n{"image": "train0.png"}')
    with pytest.raises(BadInput, match="train.jsonl:9: .*no `prompt`"):
        run("stops", data=folder)
    run("skips", data=folder, bad_rows="skip", epochs=1)
    said = capsys.readouterr().err
    assert said.count("skipped: ") == 2
    assert "train5.png" in said
    assert "train.jsonl:9" in said


def test_a_row_that_only_this_editor_cannot_take_is_known_before_anything_is_drawn(
    run, dataset, tmp_path, monkeypatch, capsys
):
    folder = copy_dataset(dataset, tmp_path / "several")
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"prompt": "add red", "image": ["train2.png", "train3.png"], "id": "two"})
    (folder / "train.jsonl").write_text("\n".join(lines))
    with monkeypatch.context() as patch:
        patch.setattr(train_nft, "check_editor", lambda *args: pytest.fail("it went on"))
        with pytest.raises(BadInput, match="train.jsonl:3, row two: a row has 2 pictures"):
            run(data=folder)
    out = run("skips", data=folder, bad_rows="skip", epochs=1)
    assert capsys.readouterr().err.count("train.jsonl:3, row two: a row has 2 pictures") == 1
    assert len(log(out)) == 1


def test_an_editor_that_takes_no_row_is_refused(run, dataset, tmp_path):
    pictures = ["train0.png", "train1.png"]
    folder = copy_dataset(dataset, tmp_path / "several", image=pictures)
    rows = [{"prompt": f"add {i}", "image": pictures} for i in range(3)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match="no faultless row is left in train; mend those named above"):
        run(data=folder, bad_rows="skip")


def test_groups_that_do_not_divide_by_the_ranks_are_refused(run, monkeypatch):
    two = types.SimpleNamespace(process_index=0, num_processes=2, is_main_process=True)
    monkeypatch.setattr(train_nft, "start_processes", lambda *args: two)
    with pytest.raises(BadInput, match="--groups 3: not divisible by 2 processes"):
        run(groups=3)


@pytest.mark.parametrize(
    "words", [["--learning_rate", "1"], ["--filter", "mine"], ["--lr", "fast"]]
)
def test_an_unknown_key_or_value_is_refused_by_name(words):
    with pytest.raises(BadInput, match=words[-2]) as error:
        train_nft.main(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fault, message",
    [("missing", "not a readable picture .no such file"), ("broken", "not a readable picture")],
)
def test_a_bad_picture_is_refused_before_anything_is_loaded(
    run, dataset, tmp_path, monkeypatch, fault, message
):
    folder = shutil.copytree(dataset, tmp_path / "bad")
    if fault == "missing":
        (folder / "train5.png").unlink()
    else:
        (folder / "train5.png").write_bytes((dataset / "train5.png").read_bytes()[:20])
    monkeypatch.setattr(train_nft, "load_editor", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(BadInput, match=f"train5.png: {message}"):
        run(data=folder)


# ---------------------------------------------------------------- records and layout


def test_the_paired_gain_is_resampled_over_rows():
    base = []
    for row in range(40):
        base += [{"row": row, "judge": 0.2 + 0.1 * (row % 2)}] * 3
    now = [result | {"judge": result["judge"] + 0.1 * (result["row"] % 3)} for result in base]
    gain = paired_gain(base, now, "judge")
    assert gain["gain"] == pytest.approx(gain["now"] - gain["base"])
    assert gain["low"] < gain["gain"] < gain["high"]
    assert gain["high"] - gain["low"] < 0.1


def test_a_pair_with_a_missing_score_counts_on_neither_side():
    base = [{"row": row, "judge": score} for row, score in enumerate([0.1, 0.9, math.nan])]
    now = [{"row": row, "judge": score} for row, score in enumerate([0.3, math.nan, 0.5])]
    gain = paired_gain(base, now, "judge")
    assert (gain["base"], gain["now"], gain["missing"]) == (0.1, 0.3, 2)
    assert gain["gain"] == pytest.approx(0.2)


BELOW = {
    "data_prep": set(),
    "sample": {"data_prep"},
    "reward_mllm": {"data_prep"},
    "train_nft": {"data_prep", "sample", "reward_mllm"},
    "evaluate": {"data_prep", "sample", "reward_mllm"},
}


@pytest.mark.parametrize("name", BELOW)
def test_imports_point_one_way_also_inside_functions(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert imported & BELOW.keys() <= BELOW[name]


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_nft"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_the_papers_settings_are_the_defaults():
    wanted = {
        "rollout_steps": None,  # the family's
        "resolution": 512,
        "guidance": None,
        "groups": 24,
        "group_size": 12,
        "train_timesteps": 5,
        "lora_rank": 32,
        "lora_alpha": 64,
        "lr": 3e-4,
        "advantage_clip": 5.0,
        "nft_beta": 1.0,
        "kl_weight": 1e-4,
        "decay_rate": 0.001,
        "decay_max": 0.5,
        "eval_steps": 15,
        "eval_every": 10,
        "save_every": 30,
        "ema_decay": 0.9,
        "filter_mean": 0.9,
        "filter_std": 0.05,
        "filter": "paper",
    }
    assert {key: getattr(PAPER, key) for key in wanted} == wanted
    assert sample.FAMILIES["FluxKontextPipeline"].rollout_steps == 6
    assert (train_nft.WEIGHT_DECAY, train_nft.GRAD_CLIP) == (1e-4, 1.0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert torch.optim.AdamW([parameter]).defaults["betas"] == (0.9, 0.999)


def test_the_base_stays_in_its_precision_and_the_lora_is_float32(kontext_folder):
    editor = load_editor(kontext_folder, dtype=torch.bfloat16)
    add_policies(editor, 4, 4)
    trained = list(lora_parameters(editor, "new").values())
    added = {id(parameter) for parameter in trained}
    added |= {id(parameter) for parameter in lora_parameters(editor, "old").values()}
    kinds = set()
    for parameter in editor.pipe.transformer.parameters():
        if id(parameter) not in added:
            kinds.add(parameter.dtype)
    assert kinds == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained} == {torch.float32}
