"""DiffusionNFT with a multimodal LLM as the judge: improves an image editor by its own graded edits.

    accelerate launch train_nft.py                                   # the toy world, two CPU cores, minutes
    accelerate launch train_nft.py --base black-forest-labs/FLUX.1-Kontext-dev --data DIR --judge local:MODEL

Algorithm 1 of DiffusionNFT (arXiv:2509.16117v2) as UniWorld-V2 (arXiv:2510.16888, Edit-R1) applies it to editing. Each
epoch: the old policy draws K edits of each of G rows (rollout); the judge scores them (reward); groups whose scores say
nothing are dropped (filter); the new policy is regressed towards good edits and away from bad ones (update); the old
policy follows softly.

Shapes: G groups, K copies in a group, B a batch of (edit, flow time) pairs, N tokens of an edit, C latent channels.
t is flow time in [0, 1]: x_t = (1 - t) x_0 + t noise, velocity v = noise - x_0, x_0 = x_t - t v.

Departures from the papers and the authors' released code:
1. A dropped group costs nothing: no forward, no place in a mean, no share in the std that scales the advantages.
2. The gradient is the mean over the kept pairs of all ranks, summed over ranks once a step: N ranks do what one does.
3. A score that the judge could not give drops its edit; it is never 0.
4. A group is a row of the data, not a prompt. Its K copies live on one rank, in as many pipeline calls as fit.
5. Filter: the paper's rule (high mean and low spread), not the released code's; `--filter released` is that one.
6. Scores nearer than `score_noise` are equal: such a group is skipped, and the advantages' scale is never below it.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import ImageOps
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data_prep import (
    BadInput, ToySettings, build_toy, check_pictures, load_image, oracle, paired_gain, parse_settings,
    read_rows, run_script, seeded,
)  # fmt: skip
from reward_mllm import JudgeSettings, load_judge
from sample import (
    add_policies, load_editor, load_lora, lora_parameters, picture_grid, policy, rollout, save_lora, soft_update,
    velocity,
)  # fmt: skip

# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings(JudgeSettings):
    """Defaults are the paper's for FLUX.1-Kontext-dev; without --base the toy world's, TOY below, take their place."""

    base: str = HfArg(default="", help="The editor, a hub id or folder. [the toy's]")
    data: str = HfArg(default="", help="A dataset folder with train.jsonl and test.jsonl.")
    max_failed: float = HfArg(default=0.1, help="Share of an epoch's scores that may fail before the run stops.")
    out: str = HfArg(default="runs/nft", help="The run's folder.")
    seed: int = HfArg(default=0, help="Seed of every draw.")
    epochs: int = HfArg(default=300, help="Epochs: rollouts of `groups` rows each, and their update.")
    # rollout
    resolution: int = HfArg(default=512, help="Square root of the working pixels.")
    guidance: float = HfArg(default=2.5, help="Embedded guidance scale, in rollout, training and evaluation.")
    rollout_steps: int = HfArg(default=6, help="Solver steps of a rollout.")
    solver_order: Literal[1, 2] = HfArg(default=2, help="1 Euler, 2 second-order multistep.")
    groups: int = HfArg(default=24, help="Rows drawn per epoch, over all ranks.")
    group_size: int = HfArg(default=12, help="K, edits drawn of each row.")
    rollout_batch: int = HfArg(default=12, help="Edits in one pipeline call.")
    # filter and advantage
    filter: Literal["paper", "released", "none"] = HfArg(default="paper", help="Which groups to drop.")
    filter_mean: float = HfArg(default=0.9, help="A group above this mean may be dropped.")
    filter_std: float = HfArg(default=0.05, help="A group below this spread may be dropped.")
    score_noise: float = HfArg(default=0.005, help="Spread of scores below which they count as equal.")
    advantage_clip: float = HfArg(default=5.0, help="Advantages are cut to +- this; it also multiplies the loss.")
    # update
    train_timesteps: int = HfArg(default=5, help="Flow times trained per edit, out of the rollout's.")
    train_steps_from: int = HfArg(default=6, help="Of the rollout's times the noisiest this many may be trained.")
    train_batch: int = HfArg(default=12, help="(edit, time) pairs of one row in one forward.")
    optimizer_steps: int = HfArg(default=1, help="Optimizer steps per epoch; the trained times are dealt out to them.")
    nft_beta: float = HfArg(default=1.0, help="How far v+ and v- lie from v_old, in units of v - v_old.")
    kl_weight: float = HfArg(default=1e-4, help="Weight of the squared velocity distance to the base. 0 skips it.")
    lora_rank: int = HfArg(default=32, help="Rank of the LoRA.")
    lora_alpha: int = HfArg(default=64, help="Its alpha; the update is scaled by alpha / rank.")
    lora_targets: list[str] | None = HfArg(default=None, help="Endings of module names. [q k v out, both streams]")
    lr: float = HfArg(default=3e-4, help="AdamW's learning rate.")
    adam_beta1: float = HfArg(default=0.9, help="AdamW's beta 1.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW's beta 2.")
    weight_decay: float = HfArg(default=1e-4, help="AdamW's weight decay.")
    grad_clip: float = HfArg(default=1.0, help="Largest gradient norm.")
    decay_rate: float = HfArg(default=0.001, help="After epoch n, old <- d old + (1 - d) new, d = decay_rate n ...")
    decay_max: float = HfArg(default=0.5, help="... up to this d.")
    ema_decay: float = HfArg(default=0.9, help="An average of new for saving and evaluation only. 0: none.")
    gradient_checkpointing: bool = HfArg(default=True, help="Recompute activations in backward: less memory.")
    # evaluation and records
    eval_every: int = HfArg(default=10, help="Epochs between held-out evaluations.")
    eval_rows: int = HfArg(default=64, help="Rows of test.jsonl that they use, from the first.")
    eval_copies: int = HfArg(default=1, help="Edits of each.")
    eval_steps: int = HfArg(default=15, help="Solver steps of their edits.")
    save_every: int = HfArg(default=30, help="Epochs between checkpoints.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = HfArg(default="none", help="Where to log, too.")
    resume: bool = HfArg(default=False, help="Go on from the newest checkpoint in --out.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("epochs", "groups", "rollout_batch", "train_batch", "lora_rank", "lora_alpha", "lr",
                     "nft_beta", "advantage_clip", "grad_clip", "eval_every", "eval_rows", "eval_copies", "eval_steps",
                     "save_every", "score_noise"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise BadInput(f"--{name} {getattr(self, name)}: give a value above 0")
        if self.group_size < 2:
            raise BadInput(f"--group_size {self.group_size}: an edit is judged against its group; give at least 2")
        if not 1 <= self.optimizer_steps <= self.train_timesteps <= self.train_steps_from <= self.rollout_steps:
            raise BadInput("--optimizer_steps, --train_timesteps, --train_steps_from, --rollout_steps: give rising values")
        if self.base and not self.data:
            raise BadInput("--data is missing; name a dataset folder with train.jsonl and test.jsonl")


TOY = dict(
    data="data/toy", judge="", out="runs/toy", resolution=32, epochs=80, groups=16, group_size=12, rollout_batch=64,
    judge_batch=256, train_timesteps=3, train_steps_from=4, train_batch=256, lora_rank=16, lora_alpha=16, lr=4e-3,
    kl_weight=0.05, ema_decay=0.0, gradient_checkpointing=False, eval_every=40, eval_rows=240, eval_steps=6,
    save_every=40,
)  # fmt: skip

# ---------------------------------------------------------------- the maths


def self_normalised_mse(prediction, target):
    """Mean squared error over its own detached mean absolute error, per sample: (B, N, C) twice -> (B,).

    The adaptive weight of DiffusionNFT, Sec. 3.3: all samples pull about equally hard, whatever their t.
    """
    error = prediction - target  # (B, N, C)
    weight = error.detach().abs().mean((1, 2)).clamp(min=1e-5)  # (B,)
    return error.square().mean((1, 2)) / weight


def nft_loss(v, v_old, x_t, x_0, t, r, beta):
    """The loss of DiffusionNFT (Eq. 5 of arXiv:2509.16117v2) in its x_0 form, divided by beta: -> (B,), float32.

    v, v_old, x_t, x_0: (B, N, C); t, r: (B,), r in [0, 1] is the edit's optimality. No gradient reaches v_old. At
    v = v_old the gradient is along -(2 r - 1) (noise - x_0 - v_old): none at r = 1/2, and independent of beta.
    """
    assert v.ndim == 3 and v.shape == v_old.shape == x_t.shape == x_0.shape, "v, v_old, x_t, x_0 are (B, N, C)"
    assert t.shape == r.shape == v.shape[:1], f"t and r are ({len(v)},), not {tuple(t.shape)} and {tuple(r.shape)}"
    v, v_old, x_t, x_0 = v.float(), v_old.detach().float(), x_t.float(), x_0.float()
    t_ = t.float()[:, None, None]  # (B, 1, 1)

    # Thm 3.2: both policies are read off the one network, as v and its mirror image about v_old
    v_pos = (1 - beta) * v_old + beta * v  # (B, N, C)
    v_neg = (1 + beta) * v_old - beta * v  # (B, N, C)

    # x_0 = x_t - t v, so each velocity names a clean edit
    pos = self_normalised_mse(x_t - t_ * v_pos, x_0)  # (B,) small when v points at this edit
    neg = self_normalised_mse(x_t - t_ * v_neg, x_0)  # (B,) small when v points away from it
    return (r * pos + (1 - r) * neg) / beta


def group_advantages(scores, clip=5.0, filter="paper", filter_mean=0.9, filter_std=0.05, score_noise=0.005):
    """Optimality probabilities of an epoch's edits, and why groups were dropped.

    scores: (G, K) in [0, 1], NaN where the judge failed. Returns r (G, K) in [0, 1], NaN for what is not trained, and
    a list of G reasons, "" for a kept group. A = (score - group's mean) / (std of all kept scores), cut to +-clip;
    r = A / (2 clip) + 1/2 (UniWorld-V2, Sec. 2.3). "paper" drops a group with a high mean and a low spread; "released"
    keeps only groups with a low mean and a high spread.
    """
    scores, reasons = torch.as_tensor(scores).double(), []
    assert scores.ndim == 2, f"scores are (G, K), not {tuple(scores.shape)}"
    for group in scores:
        valid = group[~group.isnan()]
        if len(valid) < 2:
            reasons.append("failed")
            continue
        high, flat = valid.mean() > filter_mean, valid.std(unbiased=False) < filter_std
        drop = {"paper": high and flat, "released": high or flat, "none": False}[filter]
        reasons.append("filtered" if drop else "no spread" if valid.std(unbiased=False) < score_noise else "")
    kept = torch.tensor([not reason for reason in reasons])  # (G,)
    trained = scores[kept][~scores[kept].isnan()]
    scale = trained.std(unbiased=False).clamp(min=score_noise) if len(trained) else torch.tensor(1.0)
    advantage = ((scores - scores.nanmean(1, keepdim=True)) / scale).clamp(-clip, clip)  # (G, K)
    return (advantage / (2 * clip) + 0.5).masked_fill(~kept[:, None], torch.nan), reasons


def rows_of_epoch(number, rows, seed, epoch):
    """Indices of the `number` rows of an epoch: the data shuffled anew each time it is used up, without any state."""
    for position in range(epoch * number, (epoch + 1) * number):
        turn, place = divmod(position, rows)
        yield torch.randperm(rows, generator=seeded(seed, "rows", turn))[place].item()


# ---------------------------------------------------------------- one epoch's parts


def judge_edits(judge, rows, edits):
    """The judge's (scores, digit masses) of edits, a list of pictures per row: float (rows, copies), NaN for failed."""
    copies = len(edits[0]) if edits else 0
    sources = [[load_image(path) for path in row["images"]] for row in rows]
    repeat = lambda items: [item for item in items for _ in range(copies)]  # noqa: E731
    scores = judge.score(repeat(rows), repeat(sources), [edit for group in edits for edit in group])
    return scores.score.view(len(rows), copies), scores.mass.view(len(rows), copies)


def training_pairs(group, r, step, settings, epoch, number):
    """The (edit, time) pairs of one group in one optimizer step, in chunks: (x_0, noise, t, r), each with B first."""
    columns = []
    for copy in torch.nonzero(~r.isnan()).flatten().tolist():
        draws = seeded(settings.seed, "train", epoch, number, copy)
        order = torch.randperm(settings.train_steps_from, generator=draws)[: settings.train_timesteps]
        noise = torch.randn(len(order), *group.x_0.shape[1:], generator=draws)  # (T, N, C)
        mine = range(step, len(order), settings.optimizer_steps)
        columns += [(group.x_0[copy], noise[i], group.sigmas[order[i]], r[copy].float()) for i in mine]
    columns = [torch.stack(column).to(group.x_0.device) for column in zip(*columns)]
    return zip(*(column.split(settings.train_batch) for column in columns))


def update(editor, optimizer, groups, numbers, r, settings, epoch, accelerator, bar):
    """Alg. 1 lines 9-13: optimizer steps on this rank's groups; r (G, K), NaN for what is dropped, is all ranks'.

    Each step's gradient is the mean over all kept pairs of all ranks. Returns (pairs, 4) with t, loss, squared distance
    to old and to base of this rank's pairs, and the gradient's norm in each step. Raises FloatingPointError, before the
    weights change, when the gradient is not finite.
    """
    seen, norms = [torch.empty(0, 4)], []
    trained = list(lora_parameters(editor, "new").values())
    for step in range(settings.optimizer_steps):
        pairs = int((~r.isnan()).sum()) * len(range(step, settings.train_timesteps, settings.optimizer_steps))
        if pairs == 0:
            break  # everything was dropped: the optimizer does not step
        for group, number in zip(groups, numbers):
            if r[number].isnan().all():
                continue
            for x_0, noise, t, weight in training_pairs(group, r[number], step, settings, epoch, number):
                t_ = t[:, None, None]
                x_t = (1 - t_) * x_0 + t_ * noise  # (B, N, C)
                with torch.no_grad(), policy(editor, "old"):
                    v_old = velocity(editor, x_t, t, group.cond)
                v = velocity(editor, x_t, t, group.cond)
                losses = settings.advantage_clip * nft_loss(v, v_old, x_t, x_0, t, weight, settings.nft_beta)  # (B,)
                drift_old, drift_base = (v - v_old).square().mean((1, 2)), torch.full_like(t, torch.nan)
                if settings.kl_weight:  # the base's forward is a fifth of the cost: not for a weight of 0
                    with torch.no_grad(), policy(editor, "base"):
                        v_base = velocity(editor, x_t, t, group.cond)
                    drift_base = (v - v_base).square().mean((1, 2))
                    losses = losses + settings.kl_weight * drift_base
                (losses.sum() / pairs).backward()
                seen.append(torch.stack([t, losses.detach(), drift_old.detach(), drift_base.detach()], 1).cpu())
            bar.update()
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
        gradient = accelerator.reduce(gradient, "sum")  # the one message between ranks in a step
        norms.append(gradient.norm().item())
        if not np.isfinite(norms[-1]):
            raise FloatingPointError(f"epoch {epoch + 1}: the gradient is not finite; the weights are as before it")
        gradient *= min(1.0, settings.grad_clip / max(norms[-1], 1e-12))
        for p, part in zip(trained, gradient.split([p.numel() for p in trained])):
            p.grad = part.view_as(p)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat(seen), norms


# ---------------------------------------------------------------- checks, evaluation, records


def check_start(editor, judge, optimizer, rows, settings):
    """Stops a run that could not learn, before it starts: blind editor, dead LoRA, unequal policies, useless judge."""
    sources = [load_image(path) for path in rows[0]["images"]]
    seen, other = (rollout(editor, pictures, rows[0]["prompt"], [seeded("check")], 1, settings.guidance)
                   for pictures in (sources, [ImageOps.invert(picture) for picture in sources]))  # fmt: skip
    x_t, t = seen.x_0, seen.sigmas[:1].to(seen.x_0.device)
    v = velocity(editor, x_t, t, seen.cond)
    if torch.allclose(v, velocity(editor, x_t, t, other.cond)):
        raise BadInput(f"{settings.base}: another source picture changes nothing; take an editor that sees it")
    for name in ("base", "old"):
        with policy(editor, name):
            assert torch.equal(v, velocity(editor, x_t, t, seen.cond)), f"policies new and {name} differ at the start"
    v.square().mean().backward()
    if not any(p.grad is not None and p.grad.any() for p in lora_parameters(editor, "new").values()):
        raise BadInput(f"{settings.lora_targets or 'the LoRA'}: gets no gradient; name other --lora_targets")
    optimizer.zero_grad()
    asked = [row for row in rows if "target" in row][:16] or rows[:4]
    untouched, mass = judge_edits(judge, asked, [[load_image(row["images"][0])] for row in asked])
    if not mass.nanmean() > 0.5:
        raise BadInput(f"{settings.judge}: puts {mass.nanmean():.1%} of its probability on the digits 0-5; take another "
                       "judge or a --judge_prompt that asks for a digit alone")  # fmt: skip
    if "target" in asked[0]:
        right, _ = judge_edits(judge, asked, [[load_image(row["target"])] for row in asked])
        if not right.nanmean() > untouched.nanmean():
            raise BadInput(f"{settings.judge}: scores right edits {right.nanmean():.2f} and untouched sources "
                           f"{untouched.nanmean():.2f}; take another judge or another --judge_prompt")  # fmt: skip


def evaluate(editor, judge, rows, settings, name, accelerator):
    """One policy's held-out edits, the same seeds for every policy: a list of dicts, in order, on every rank."""
    mine = list(enumerate(rows))[accelerator.process_index :: accelerator.num_processes]
    edits = []
    with policy(editor, name):
        for number, row in tqdm(mine, desc=f"held-out, {name}", leave=False, disable=not accelerator.is_main_process):
            noises = [seeded(settings.seed, "eval", number, copy) for copy in range(settings.eval_copies)]
            sources = [load_image(path) for path in row["images"]]
            edits.append(rollout(editor, sources, row["prompt"], noises, settings.eval_steps, settings.guidance,
                                 settings.rollout_batch).images)  # fmt: skip
    scores, _ = judge_edits(judge, [row for _, row in mine], edits)
    results = []
    for (number, row), group, marks in zip(mine, edits, scores.tolist()):
        for copy, (edit, mark) in enumerate(zip(group, marks)):
            shown = {"image": edit} if number < 8 and copy == 0 else {}
            truth = dict(zip(("oracle", "success"), oracle(row, edit) or ()))  # nothing for rows that are not the toy's
            results.append({"row": number, "copy": copy, "judge": mark, **truth, **shown})
    return sorted(gather_object(results), key=lambda result: (result["row"], result["copy"]))


def epoch_record(epoch, scores, mass, r, reasons, seen, norms, clock, decay):
    """One line of log.jsonl; `seen` and `norms` as update returns them, of all ranks; clock: four times in seconds."""
    seconds = dict(zip(("rollout", "reward", "update"), np.diff(clock).round(3).tolist()))
    bins = [seen[(5 * seen[:, 0]).long().clamp(max=4) == i, 1] for i in range(5)]
    mean = lambda values: values.mean().item() if len(values) and not values.isnan().any() else None  # noqa: E731
    return {
        "epoch": epoch + 1, "reward": scores.nanmean().item(),
        "reward spread": (scores - scores.nanmean(1, keepdim=True)).square().nanmean().sqrt().item(),
        "digit mass": mass.nanmean().item(), "failed scores": int(scores.isnan().sum()),
        "groups kept": reasons.count("") / len(reasons),
        "groups dropped": {reason: reasons.count(reason) for reason in sorted(set(reasons) - {""})},
        "r histogram": torch.histc(r[~r.isnan()], 10, 0, 1).int().tolist(),
        "loss": mean(seen[:, 1]), "loss by t": list(map(mean, bins)), "drift old": mean(seen[:, 2]),
        "drift base": mean(seen[:, 3]), "grad norm": max(norms, default=None), "optimizer steps": len(norms),
        "old decay": decay, "seconds": seconds, "edits per second": scores.numel() / sum(seconds.values()),
    }  # fmt: skip


def epoch_line(record, epochs, pace):
    """What the terminal shows of a record; pace in seconds an epoch, evaluations included."""
    show = lambda key, digits: "-" if record[key] is None else f"{record[key]:.{digits}f}"  # noqa: E731
    line = (f"epoch {record['epoch']}/{epochs}  reward {show('reward', 3)} +-{show('reward spread', 3)}  "
            f"kept {record['groups kept']:.0%}  loss {show('loss', 2)}  grad {show('grad norm', 2)}  "
            f"drift {show('drift base', 4)}  " + "  ".join(f"{key} {s:.1f} s" for key, s in record["seconds"].items())
            + f"  left {pace * (epochs - record['epoch']) / 60:.1f} min")  # fmt: skip
    for name, marks in record.get("held-out", {}).items():
        line += f"\n   held-out, {name}: " + "; ".join(
            f"{key} {m['base']:.3f} -> {m['now']:.3f} ({m['gain']:+.3f}, 95% {m['low']:+.3f} to {m['high']:+.3f})"
            + f", {m['missing']} missing" * (m["missing"] > 0) for key, m in marks.items())  # fmt: skip
    return line


def save_samples(path, rows, base, now):
    """A grid: source, base, now and, where it is known, the target, with instruction and judge's score."""
    pictures, captions = [], []
    for before, after in zip(base, now):
        if "image" in before:
            row = rows[before["row"]]
            target = [load_image(row["target"])] if "target" in row else []
            pictures.append([load_image(row["images"][0]), before["image"], after["image"], *target])
            captions.append([row["prompt"], f"base {before['judge']:.2f}", f"now {after['judge']:.2f}", *["target"][: len(target)]])
    path.parent.mkdir(exist_ok=True)
    picture_grid(pictures, captions, "source, base, now, with the judge's score").save(path)


def save_checkpoint(editor, optimizer, folder, epoch, averages):
    """Writes beside and renames: `folder` is whole or not there. new lies on top, the averages in folders below."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name in ("new", *averages):
        save_lora(editor, part / name.removeprefix("new"), name)
    torch.save(optimizer.state_dict(), part / "optimizer.pt")
    (part / "state.json").write_text(json.dumps({"epoch": epoch}))
    part.rename(folder)


def load_checkpoint(editor, optimizer, out, averages):
    """Puts back the newest checkpoint of a run's folder and cuts the log to it: the epochs done."""
    folders = sorted(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    if not folders:
        raise BadInput(f"{out}: holds no checkpoint to resume from; leave out --resume")
    for name in ("new", *averages):
        load_lora(editor, folders[-1] / name.removeprefix("new"), name)
    optimizer.load_state_dict(torch.load(folders[-1] / "optimizer.pt", weights_only=True))
    epoch = json.loads((folders[-1] / "state.json").read_text())["epoch"]
    lines = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_text("".join(line + "\n" for line in lines[:epoch]))
    return epoch


def load_all(settings, accelerator):
    """Data, judge and editor with its policies and optimizer, each refused in one line if it cannot serve."""
    rows = {split: read_rows(settings.data, split) for split in ("train", "test")}
    rows["test"] = rows["test"][: settings.eval_rows]
    check_pictures(rows["train"] + rows["test"])
    device, dtype = accelerator.device, torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    editor = load_editor(settings.base, device, dtype, settings.resolution, solver_order=settings.solver_order)
    averages = ("old", "ema") if settings.ema_decay else ("old",)
    add_policies(editor, settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.seed, averages)
    if settings.gradient_checkpointing:
        editor.pipe.transformer.enable_gradient_checkpointing()
    judge = load_judge(settings, device, dtype)
    optimizer = torch.optim.AdamW(lora_parameters(editor, "new").values(), settings.lr, weight_decay=settings.weight_decay,
                                  betas=(settings.adam_beta1, settings.adam_beta2))  # fmt: skip
    return rows, editor, judge, optimizer, averages


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    toy = not any(word.split("=")[0] == "--base" for word in argv)
    settings = parse_settings(Settings, argv, description=__doc__.splitlines()[0], **(TOY if toy else {}))
    out = Path(settings.out)
    if (out / "log.jsonl").exists() and not settings.resume:
        raise BadInput(f"{out}: holds a run already; give --resume, another --out, or remove it")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), project_dir=settings.out,
                              log_with=None if settings.report_to == "none" else settings.report_to)  # fmt: skip
    rank, ranks, chief = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    if settings.groups % ranks:
        raise BadInput(f"--groups {settings.groups}: not divisible by {ranks} processes; give a multiple of {ranks}")
    if accelerator.device.type == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // ranks))
    if toy:
        with accelerator.main_process_first():
            build_toy(ToySettings(out=settings.data))
        judge = settings.judge or f"local:{settings.data}/judge"
        settings = replace(settings, base=f"{settings.data}/editor", judge=judge)
    rows, editor, judge, optimizer, averages = load_all(settings, accelerator)
    check_start(editor, judge, optimizer, rows["train"], settings)
    if chief:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(settings), indent=1))
        size = sum(p.numel() for p in lora_parameters(editor, "new").values())
        print(f"{len(rows['train'])} training rows, {len(rows['test'])} held-out; LoRA of {size:,} numbers on "
              f"{len(editor.lora_layers)} modules; {settings.groups} x {settings.group_size} edits an epoch")  # fmt: skip
    if settings.report_to != "none":
        plain = {key: value if isinstance(value, (int, float)) else str(value) for key, value in asdict(settings).items()}
        accelerator.init_trackers("edit-nft", plain)
    base = evaluate(editor, judge, rows["test"], settings, "base", accelerator)
    first = load_checkpoint(editor, optimizer, out, averages) if settings.resume else 0
    start = time.time()

    for epoch in range(first, settings.epochs):
        clock = [time.time()]
        numbers = list(range(rank, settings.groups, ranks))  # groups live whole on one rank
        chosen = list(rows_of_epoch(settings.groups, len(rows["train"]), settings.seed, epoch))
        mine = [rows["train"][chosen[number]] for number in numbers]
        bar = tqdm(total=2 * len(numbers), desc=f"epoch {epoch + 1}", leave=False, disable=not chief)

        # ---------------- rollout: the old policy draws a group of edits for each row
        groups = []
        with policy(editor, "old"):
            for row, number in zip(mine, numbers):
                noises = [seeded(settings.seed, "rollout", epoch, number, copy) for copy in range(settings.group_size)]
                sources = [load_image(path) for path in row["images"]]
                groups.append(rollout(editor, sources, row["prompt"], noises, settings.rollout_steps, settings.guidance,
                                      settings.rollout_batch))  # fmt: skip
                bar.update()
        clock.append(time.time())

        # ---------------- reward: the judge scores them; every rank learns all scores
        own_scores, own_mass = judge_edits(judge, mine, [group.images for group in groups])
        scores, mass = torch.empty(2, settings.groups, settings.group_size)
        for number, *values in gather_object(list(zip(numbers, own_scores, own_mass))):
            scores[number], mass[number] = values
        clock.append(time.time())

        # ---------------- filter: groups that say nothing are dropped, the rest become optimality probabilities
        r, reasons = group_advantages(scores, settings.advantage_clip, settings.filter, settings.filter_mean,
                                      settings.filter_std, settings.score_noise)  # fmt: skip
        if (failed := int(scores.isnan().sum())) > settings.max_failed * scores.numel():
            raise BadInput(f"epoch {epoch + 1}: the judge failed on {failed} of {scores.numel()} edits; see to "
                           f"{settings.judge}, or raise --max_failed")  # fmt: skip

        # ---------------- update: towards good edits, away from bad ones; then the old policy follows softly
        seen, norms = update(editor, optimizer, groups, numbers, r, settings, epoch, accelerator, bar)
        decay = min(settings.decay_rate * (epoch + 1), settings.decay_max)
        soft_update(editor, decay)
        if settings.ema_decay:
            soft_update(editor, settings.ema_decay, "ema")
        clock.append(time.time())
        bar.close()

        # ---------------- log, evaluate, save
        seen, last = torch.cat(gather_object([seen])), epoch + 1 == settings.epochs
        record = epoch_record(epoch, scores, mass, r, reasons, seen, norms, clock, decay)
        if last or (epoch + 1) % settings.eval_every == 0:
            held_out = {name: evaluate(editor, judge, rows["test"], settings, name, accelerator)
                        for name in ("new", *averages)}  # fmt: skip
            record["held-out"] = {name: {key: paired_gain(base, results, key) for key in ("judge", "oracle", "success")
                                         if key in base[0]} for name, results in held_out.items()}  # fmt: skip
        if chief:
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            print(epoch_line(record, settings.epochs, (time.time() - start) / (epoch + 1 - first)), flush=True)
            if "held-out" in record:
                save_samples(out / "samples" / f"epoch-{epoch + 1:04}.png", rows["test"], base, held_out["new"])
            if last or (epoch + 1) % settings.save_every == 0:
                save_checkpoint(editor, optimizer, out / f"checkpoint-{epoch + 1}", epoch + 1, averages)
        if settings.report_to != "none":
            accelerator.log({key: value for key, value in record.items() if isinstance(value, (int, float))}, epoch + 1)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
