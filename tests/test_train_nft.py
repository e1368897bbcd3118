"""The training: its maths against closed forms, one epoch's parts, and whole runs on a tiny random editor."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import sample  # noqa: E402
import train_nft  # noqa: E402
from data_prep import BadInput, paired_gain, seeded  # noqa: E402
from rule_judge import RuleJudge, arguments, log, lora  # noqa: E402
from train_nft import Settings, group_advantages, nft_loss, rows_of_epoch, self_normalised_mse  # noqa: E402

# ---------------------------------------------------------------- nft_loss


@pytest.fixture
def pairs():
    draw = lambda *shape: torch.randn(*shape, generator=seeded("pairs", shape))  # noqa: E731
    x_0, noise, v_old = draw(4, 6, 3), draw(4, 6, 3) + 1, draw(4, 6, 3) * 0.5
    t = torch.tensor([0.2, 0.5, 0.8, 1.0])
    x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
    return v_old, x_t, x_0, t


def gradient(v, v_old, x_t, x_0, t, r, beta=1.0):
    v = v.clone().requires_grad_()
    nft_loss(v, v_old, x_t, x_0, t, torch.as_tensor(r).expand(len(t)), beta).sum().backward()
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
    weight = error.abs().mean((1, 2))
    for r in (0.0, 0.3, 1.0):
        wanted = (
            -(2 * r - 1) * 2 * t[:, None, None] * error / (error[0].numel() * weight[:, None, None])
        )
        assert torch.allclose(gradient(v_old, *pairs, r), wanted, atol=1e-6)


def test_the_first_step_does_not_depend_on_beta(pairs):
    one = gradient(pairs[0], *pairs, 0.8, beta=1.0)
    assert torch.allclose(one, gradient(pairs[0], *pairs, 0.8, beta=0.1), rtol=1e-3, atol=1e-6)


def test_beta_sets_the_pull_back_once_new_has_left_old(pairs):
    moved = pairs[0] + 0.5
    assert not torch.allclose(
        gradient(moved, *pairs, 0.5, beta=1.0), gradient(moved, *pairs, 0.5, beta=0.1), rtol=0.1
    )


def test_v_old_gets_no_gradient(pairs):
    v_old, x_t, x_0, t = pairs
    v, old = v_old.clone().requires_grad_(), v_old.clone().requires_grad_()
    nft_loss(v, old, x_t, x_0, t, torch.full((4,), 0.9), 1.0).sum().backward()
    assert old.grad is None and v.grad.abs().sum() > 0


def test_the_adaptive_weight_is_detached():
    prediction = torch.full((1, 2, 2), 3.0, requires_grad=True)
    self_normalised_mse(prediction, torch.zeros(1, 2, 2)).sum().backward()
    assert torch.allclose(
        prediction.grad, torch.full((1, 2, 2), 2 * 3.0 / 4 / 3.0)
    )  # 0 if the weight moved along


def test_the_loss_is_float32_arithmetic_on_bfloat16_inputs(pairs):
    half = [x.bfloat16() for x in pairs]
    r = torch.full((4,), 0.7)
    v = half[0] + 0.01
    loss = nft_loss(v, *half, r, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nft_loss(v.float(), *(x.float() for x in half), r, 0.1))


def test_times_of_the_wrong_shape_are_refused(pairs):
    v_old, x_t, x_0, t = pairs
    with pytest.raises(AssertionError, match="t and r"):
        nft_loss(v_old, v_old, x_t, x_0, t[:, None], torch.full((4,), 0.5), 1.0)


# ---------------------------------------------------------------- group_advantages


def test_two_groups_with_one_prompt_keep_their_own_means():
    r, _ = group_advantages(torch.tensor([[0.1, 0.3], [0.6, 0.8]]))
    assert torch.allclose(r.mean(1), torch.tensor([0.5, 0.5]).double())
    assert torch.allclose(r[0], r[1])


def test_r_is_the_clipped_advantage_over_ten_plus_one_half():
    scores = torch.tensor([[0.2, 0.4, 0.9], [0.1, 0.5, 0.3]])
    r, _ = group_advantages(scores)
    wanted = (scores - scores.mean(1, keepdim=True)) / scores.std(unbiased=False) / 10 + 0.5
    assert torch.allclose(r, wanted.double(), atol=1e-6)
    lone = torch.zeros(1, 200)
    lone[0, 0] = 1.0
    assert group_advantages(lone, filter="none")[0].max() == 1.0


def test_a_failed_score_drops_its_edit_alone_and_is_no_zero():
    with_hole = torch.tensor([[0.5, 0.7, torch.nan], [0.2, 0.3, 0.4]])
    r, reasons = group_advantages(with_hole)
    assert r[0, 2].isnan() and not r[0, :2].isnan().any() and reasons == ["", ""]
    assert torch.allclose(r[0, :2].mean(), torch.tensor(0.5).double())


def test_a_group_with_fewer_than_two_scores_is_dropped():
    r, reasons = group_advantages(torch.tensor([[0.5, torch.nan, torch.nan], [0.2, 0.3, 0.4]]))
    assert reasons == ["failed", ""] and r[0].isnan().all()


def test_the_papers_filter_needs_both_a_high_mean_and_a_low_spread():
    scores = torch.tensor([[0.94, 0.96], [0.82, 1.0], [0.10, 0.12], [0.2, 0.6]])
    assert group_advantages(scores, filter="paper")[1] == ["filtered", "", "", ""]
    assert group_advantages(scores, filter="released")[1] == [
        "filtered",
        "filtered",
        "filtered",
        "",
    ]
    assert group_advantages(scores, filter="none")[1] == ["", "", "", ""]


def test_the_scale_leaves_the_dropped_groups_out():
    kept = torch.tensor([[0.2, 0.6]])
    both = torch.cat([kept, torch.tensor([[0.99, 1.0]])])
    assert torch.allclose(group_advantages(both)[0][0], group_advantages(kept)[0][0])


def test_noise_of_the_judge_is_not_blown_up_to_full_advantages():
    for noise in (0.001, 1e-6):
        r, reasons = group_advantages(0.3 + noise * torch.tensor([[0.0, 1.0, 2.0]]), filter="none")
        assert reasons == ["no spread"] and r.isnan().all()
    r, reasons = group_advantages(
        torch.tensor([[0.300, 0.301, 0.302], [0.2, 0.4, 0.6]]), filter="none"
    )
    assert reasons == ["no spread", ""] and r[1, 2] < 0.7


def test_nothing_kept_gives_nothing_to_train():
    r, reasons = group_advantages(torch.full((2, 4), 0.97))
    assert r.isnan().all() and reasons == ["filtered", "filtered"]


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


def test_a_run_moves_the_lora_and_writes_what_it_promises(run, capsys):
    out = run()
    assert any(
        weights.abs().sum() > 0
        for key, weights in lora(out / "checkpoint-2").items()
        if "lora_B" in key
    )
    assert (out / "config.json").exists() and (out / "samples" / "epoch-0002.png").exists()
    first, last = log(out)
    for key in (
        "reward",
        "reward spread",
        "groups kept",
        "r histogram",
        "drift old",
        "drift base",
        "loss by t",
        "grad norm",
        "skipped steps",
        "terms",
        "digit mass",
        "seconds",
        "peak GB",
        "edits per second",
    ):
        assert key in first
    assert set(last["held-out"]) == {"new", "old", "ema"}
    assert "epoch 2/2" in capsys.readouterr().out


def test_diffusers_alone_loads_a_checkpoint(run, kontext_folder):
    from diffusers import FluxKontextPipeline

    out = run()
    pipe = FluxKontextPipeline.from_pretrained(kontext_folder)
    pipe.load_lora_weights(out / "checkpoint-2")
    assert pipe.get_active_adapters() == ["default_0"]


def test_new_old_and_ema_are_three_different_things_in_a_checkpoint(run):
    out = run()
    key = next(key for key in lora(out / "checkpoint-2") if "lora_B" in key)
    new, old, ema = (lora(out / "checkpoint-2", name)[key] for name in ("", "old", "ema"))
    assert not torch.equal(new, old) and not torch.equal(new, ema) and not torch.equal(old, ema)


def test_an_older_run_is_not_overwritten(run, kontext_folder, dataset):
    out = run(epochs=1)
    with pytest.raises(BadInput, match="holds a run already"):
        train_nft.main(arguments(kontext_folder, dataset, out))


def test_every_epoch_draws_other_noise(run, monkeypatch):
    keys = []
    monkeypatch.setattr(train_nft, "seeded", lambda *key: keys.append(key) or seeded(*key))
    run()
    rollouts = [key for key in keys if "rollout" in key]
    assert len(rollouts) == 2 * 4 * 4 and len(set(rollouts)) == len(rollouts)
    training = [key for key in keys if "train" in key]
    assert len(set(training)) == len(training)


def test_twelve_copies_run_on_one_process_that_takes_five_at_a_time(run, monkeypatch):
    sizes, call = [], sample._call_pipeline
    monkeypatch.setattr(
        sample,
        "_call_pipeline",
        lambda e, i, p, g, s, x: sizes.append(len(g)) or call(e, i, p, g, s, x),
    )
    run(group_size=12, rollout_batch=5, epochs=1, groups=1, eval_every=5)
    assert [size for size in sizes if size > 1] == [5, 5, 2]


@pytest.fixture
def spied(run, monkeypatch):
    """run with what `update` did: transformer calls by policy, messages between ranks, optimizer steps."""
    counts = {"velocity": 0, "base": 0, "reduce": 0, "step": 0}
    velocity, policy, update = train_nft.velocity, train_nft.policy, train_nft.update

    def watched(editor, optimizer, groups, numbers, r, settings, epoch, accelerator, bar):
        with monkeypatch.context() as patch:
            count = lambda key, call: (
                lambda *a, **k: counts.update({key: counts[key] + 1}) or call(*a, **k)
            )  # noqa: E731
            named = lambda e, name: (
                counts.update(base=counts["base"] + (name == "base")) or policy(e, name)
            )  # noqa: E731
            patch.setattr(train_nft, "velocity", count("velocity", velocity))
            patch.setattr(train_nft, "policy", named)
            patch.setattr(accelerator, "reduce", count("reduce", accelerator.reduce))
            patch.setattr(optimizer, "step", count("step", optimizer.step))
            return update(editor, optimizer, groups, numbers, r, settings, epoch, accelerator, bar)

    monkeypatch.setattr(train_nft, "update", watched)
    return run, counts


def test_a_dropped_group_costs_no_forward(spied, monkeypatch):
    run, counts = spied
    keep = lambda scores, *a: (
        torch.full_like(scores, 0.6).masked_fill(  # noqa: E731
            torch.arange(len(scores))[:, None] % 2 == 0, torch.nan
        ),
        ["filtered", ""] * 2,
    )
    monkeypatch.setattr(train_nft, "group_advantages", keep)
    run(epochs=1, eval_every=5, train_batch=100)
    assert counts["velocity"] == 2 * 3  # two kept groups; old, new and base


def test_with_everything_dropped_the_optimizer_does_not_step(spied, monkeypatch):
    run, counts = spied
    monkeypatch.setattr(
        train_nft,
        "group_advantages",
        lambda scores, *a: (torch.full_like(scores, torch.nan), ["filtered"] * len(scores)),
    )
    out = run(epochs=1, eval_every=5)
    assert counts["step"] == counts["velocity"] == 0
    assert all(
        weights.abs().sum() == 0
        for key, weights in lora(out / "checkpoint-1").items()
        if "lora_B" in key
    )
    assert log(out)[0]["optimizer steps"] == 0


def test_one_message_between_ranks_a_step_and_no_base_forward_for_a_weight_of_zero(spied):
    run, counts = spied
    run(epochs=1, eval_every=5, kl_weight=0.0)
    assert counts["reduce"] == counts["step"] == 1 and counts["base"] == 0


def test_an_edits_weight_does_not_depend_on_its_neighbours_in_a_batch(run):
    one, all_ = run("one", epochs=1, train_batch=1), run("all", epochs=1, train_batch=100)
    assert log(one)[0]["grad norm"] == pytest.approx(log(all_)[0]["grad norm"], rel=1e-4)


def test_gradient_checkpointing_changes_no_gradient(run):
    plain, saving = run("plain", epochs=1), run("saving", epochs=1, gradient_checkpointing=True)
    assert log(plain)[0]["grad norm"] == pytest.approx(log(saving)[0]["grad norm"], rel=1e-4)


def test_optimizer_steps_deal_out_the_times(spied):
    run, counts = spied
    out = run(epochs=1, eval_every=5, optimizer_steps=2)
    assert counts["step"] == 2 and log(out)[0]["optimizer steps"] == 2


def test_failed_scores_are_counted_and_too_many_stop_the_run(run, dataset, tmp_path):
    rows = [
        json.loads(line) | {"broken": True}
        for line in (dataset / "train.jsonl").read_text().splitlines()
    ]
    broken = tmp_path / "broken"
    broken.mkdir()
    for picture in dataset.glob("*.png"):
        (broken / picture.name).write_bytes(picture.read_bytes())
    (broken / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (broken / "test.jsonl").write_text((dataset / "test.jsonl").read_text())
    out = run("some", data=broken, max_failed=0.6)
    assert log(out)[0]["failed scores"] == 8
    with pytest.raises(BadInput, match="judge failed on 8 of 16 edits .*broken.*--resume auto"):
        run("many", data=broken)


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_end_with_the_lora_of_one(run, kontext_folder, dataset, tmp_path, shard):
    larger = {
        "lora_alpha": 64
    }  # Adam divides by the gradient's size: let that be far above rounding
    single = run("single", **larger)
    script, out = ROOT / "tests" / "rule_judge.py", tmp_path / "double"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
            script,
            *arguments(kontext_folder, dataset, out, **larger, shard=shard),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "checkpoint-2" / "state.json").read_text())["settings"]["ranks"] == 2
    if shard:
        whole, here = (
            int(words.replace(",", ""))
            for words in re.search(r"base's ([\d,]+) .* ([\d,]+) on this", done.stdout).groups()
        )
        assert here < 0.6 * whole
    dropped = [line["groups kept"] for line in log(out)]
    assert any(0 < share < 1 for share in dropped) and dropped == [
        line["groups kept"] for line in log(single)
    ]
    for name in ("", "old"):
        for key, weights in lora(single / "checkpoint-2", name).items():
            assert (
                weights - lora(out / "checkpoint-2", name)[key]
            ).norm() <= 1e-3 * weights.norm(), (name, key)
    assert log(out)[-1]["held-out"]["new"]["judge"]["now"] == pytest.approx(
        log(single)[-1]["held-out"]["new"]["judge"]["now"], abs=0.02
    )


def test_a_dry_run_makes_one_step_and_says_what_it_took_and_saves_nothing(spied, capsys, tmp_path):
    run, counts = spied
    run("dry", dry_run=True, epochs=50, groups=4)
    said = capsys.readouterr().out
    assert counts["step"] == 1 and "1 x 4 edits" in said and not (tmp_path / "dry").exists()
    assert all(
        f"{phase} " in said and f"'{phase}': " in said for phase in ("rollout", "reward", "update")
    )


def test_text_encoders_and_vae_are_away_only_while_the_update_runs(kontext_folder):
    editor = sample.load_editor(kontext_folder)
    places = lambda: {
        name: part.device.type
        for name, part in editor.pipe.components.items()
        if hasattr(part, "device")
    }  # noqa: E731
    editor.pipe.to("meta")  # a second place that every machine has
    with sample.parked(editor, park=False):
        assert set(places().values()) == {"meta"}
    moved = []
    for name in ("text_encoder", "text_encoder_2", "vae"):
        getattr(editor.pipe, name).to = lambda device, name=name: moved.append((name, str(device)))
    with sample.parked(editor):
        assert sorted(moved) == [
            (name, "cpu") for name in ("text_encoder", "text_encoder_2", "vae")
        ]
    assert sorted(moved[3:]) == [
        (name, "meta") for name in ("text_encoder", "text_encoder_2", "vae")
    ]


def test_the_judge_works_while_the_next_group_is_drawn(run, monkeypatch):
    order, rollout = [], train_nft.rollout

    class Watched(RuleJudge):
        def submit(self, *args):
            order.append("submit")
            return super().submit(*args)

    monkeypatch.setattr(
        train_nft, "rollout", lambda *a, **k: order.append("rollout") or rollout(*a, **k)
    )
    run(epochs=1, eval_every=5, judge=Watched())
    assert order[-8:] == ["rollout", "submit"] * 4


# ---------------------------------------------------------------- start-up checks and bad input


def test_a_judge_that_does_not_speak_in_digits_stops_the_run(run):
    with pytest.raises(BadInput, match="puts 20.0% of its probability on the answers that count"):
        run(judge=RuleJudge(mass=0.2))


def test_a_judge_that_prefers_the_untouched_source_stops_the_run(run, dataset, tmp_path):
    rows = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()]
    source = np.asarray(Image.open(dataset / rows[0]["image"]))
    for name, picture in (("dark", source // 4), ("bright", source // 4 + 190)):
        folder = tmp_path / name
        folder.mkdir()
        for file in dataset.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        Image.fromarray(picture).save(folder / "right.png")
        lines = [json.dumps({**row, "target": "right.png", "flat": False}) for row in rows]
        (folder / "train.jsonl").write_text("\n".join(lines))
    likes_dark = RuleJudge(pitch=1.0)
    run("right", data=tmp_path / "dark", judge=likes_dark, epochs=1, eval_every=5)
    with pytest.raises(BadInput, match="scores right edits"):
        run("wrong", data=tmp_path / "bright", judge=likes_dark)


def test_an_editor_that_ignores_the_source_stops_the_run(run, monkeypatch):
    velocity = sample.velocity
    blind = lambda e, x, t, cond: velocity(
        e, x, t, cond | {"hidden_states": torch.zeros_like(cond["hidden_states"])}
    )  # noqa: E731
    monkeypatch.setattr(sample, "velocity", blind)
    with pytest.raises(BadInput, match="another source picture changes nothing"):
        run()


def test_a_lora_without_gradient_stops_the_run(run, monkeypatch):
    velocity = sample.velocity
    dead = lambda *a: velocity(*a).detach().requires_grad_()  # noqa: E731
    monkeypatch.setattr(sample, "velocity", dead)
    with pytest.raises(BadInput, match="gets no gradient"):
        run()


def test_policies_that_differ_at_the_start_stop_the_run(run, monkeypatch):
    add = train_nft.add_policies

    def unequal(editor, *args):
        add(editor, *args)
        for p in train_nft.lora_parameters(editor, "new").values():
            p.data += 0.1

    monkeypatch.setattr(train_nft, "add_policies", unequal)
    with pytest.raises(AssertionError, match="differ at the start"):
        run()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group_size": 1}, "--group_size 1: .* give at least 2"),
        ({"train_timesteps": 5}, "--train_timesteps"),
        ({"lr": 0}, "--lr 0.0: give a value above 0"),
        ({"report_to": "trackio"}, "--report_to trackio: is not installed; pip install trackio"),
        ({"base": "nowhere"}, "nowhere: no such model folder"),
        ({"data": "nowhere"}, "nowhere: holds neither train.jsonl"),
        ({"lora_targets": "nothing"}, "match no module"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_one_line(run, change, message, monkeypatch):
    monkeypatch.setattr(train_nft, "find_spec", lambda name: None)
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
    assert (
        stop.value.code == 2
        and "\n" not in said
        and "too small" in said
        and "--train_batch" in said
    )


def test_faulty_rows_stop_the_run_or_are_left_out_when_asked(run, dataset, tmp_path, capsys):
    folder = tmp_path / "faulty"
    folder.mkdir()
    for file in dataset.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "train5.png").write_bytes(b"no picture")
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([*lines, '{"image": "train0.png"}']))
    with pytest.raises(BadInput, match="train.jsonl:9: .*no `prompt`"):
        run("stops", data=folder)
    run("skips", data=folder, bad_rows="skip", epochs=1)
    out, said = capsys.readouterr()
    assert (
        said.count("skipped: ") == 2
        and "train5.png" in said
        and "train.jsonl:9" in said
        and "7 training rows" in out
    )


def test_groups_that_do_not_divide_by_the_ranks_are_refused(run, monkeypatch):
    class TwoRanks:
        process_index, num_processes, is_main_process = 0, 2, True

        def __init__(self, **kwargs):
            pass

    monkeypatch.setattr(train_nft, "Accelerator", TwoRanks)
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
    "fault, message", [("missing", "no such picture"), ("broken", "not a readable picture")]
)
def test_a_bad_picture_is_refused_before_anything_is_loaded(
    dataset, tmp_path, monkeypatch, kontext_folder, fault, message
):
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in dataset.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if fault == "missing":
        (folder / "train5.png").unlink()
    else:
        (folder / "train5.png").write_bytes((dataset / "train5.png").read_bytes()[:200])
    monkeypatch.setattr(
        train_nft, "load_editor", lambda *a, **k: pytest.fail("the editor was loaded first")
    )
    with pytest.raises(BadInput, match=f"train5.png: {message}"):
        train_nft.main(arguments(kontext_folder, folder, tmp_path / "out"))


# ---------------------------------------------------------------- records and layout


def test_the_paired_gain_is_resampled_over_rows():
    base = [{"row": row, "judge": 0.2 + 0.1 * (row % 2)} for row in range(40) for _ in range(3)]
    now = [result | {"judge": result["judge"] + 0.1 * (result["row"] % 3)} for result in base]
    gain = paired_gain(base, now, "judge")
    assert gain["gain"] == pytest.approx(gain["now"] - gain["base"])
    assert gain["low"] < gain["gain"] < gain["high"] and gain["high"] - gain["low"] < 0.1


def test_imports_point_one_way():
    allowed = {
        "data_prep": set(),
        "sample": {"data_prep"},
        "reward_mllm": {"data_prep"},
        "train_nft": {"data_prep", "sample", "reward_mllm"},
    }
    found = []
    for name, below in allowed.items():
        for node in (tree := ast.parse((ROOT / f"{name}.py").read_text())).body:
            for inner in ast.walk(node):
                names = [inner.module] if isinstance(inner, ast.ImportFrom) else []
                names += (
                    [alias.name for alias in inner.names] if isinstance(inner, ast.Import) else []
                )
                found += [
                    (name, other, getattr(node, "name", ""))
                    for other in names
                    if other in set(allowed) - below
                ]
        assert tree.body
    assert found == [
        ("data_prep", "reward_mllm", "write_requirements")
    ]  # one command asks the judge, and only there


def test_the_training_script_stays_a_page():
    source = (ROOT / "train_nft.py").read_text()
    assert len(source.splitlines()) <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= (150 if node.name == "main" else 60), (
                node.name
            )


def test_importing_does_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_nft"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir())


def test_the_papers_settings_are_the_defaults():
    settings = Settings(base="x", data="y")
    wanted = dict(
        rollout_steps=6,
        resolution=512,
        guidance=None,
        groups=24,
        group_size=12,
        optimizer_steps=1,
        train_timesteps=5,
        lora_rank=32,
        lora_alpha=64,
        lr=3e-4,
        adam_beta1=0.9,
        adam_beta2=0.999,
        weight_decay=1e-4,
        grad_clip=1.0,
        advantage_clip=5.0,
        nft_beta=1.0,
        kl_weight=1e-4,
        decay_rate=0.001,
        decay_max=0.5,
        eval_steps=15,
        eval_every=10,
        save_every=30,
        ema_decay=0.9,
        filter_mean=0.9,
        filter_std=0.05,
        filter="paper",
    )
    assert {key: getattr(settings, key) for key in wanted} == wanted


def test_the_base_stays_in_its_precision_and_the_lora_is_float32(kontext_folder):
    from sample import add_policies, load_editor, lora_parameters

    editor = load_editor(kontext_folder, dtype=torch.bfloat16)
    add_policies(editor, 4, 4)
    trained = {id(p) for name in ("new", "old") for p in lora_parameters(editor, name).values()}
    kinds = {p.dtype for p in editor.pipe.transformer.parameters() if id(p) not in trained}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in lora_parameters(editor, "new").values()} == {torch.float32}
