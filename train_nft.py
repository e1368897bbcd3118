"""DiffusionNFT with a multimodal LLM as the judge: improves an image editor by its own graded edits.

    accelerate launch train_nft.py                                   # the toy world, two CPU cores, minutes
    accelerate launch train_nft.py --base black-forest-labs/FLUX.1-Kontext-dev --data DIR --judge local:MODEL

Algorithm 1 of DiffusionNFT (arXiv:2509.16117v2) as UniWorld-V2 (arXiv:2510.16888, Edit-R1) applies it. Each epoch: the old
policy draws K edits of each of G rows (rollout); the judge scores them (reward); groups whose scores say nothing go (filter);
the new policy is regressed towards good edits and away from bad ones (update); the old policy follows softly.

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
import math
import os
import resource
import secrets
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Literal
from zlib import crc32

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data_prep import (
    BadInput,
    ToySettings,
    build_toy,
    catch_signals,
    load_image,
    load_rows,
    oracle,
    paired_gain,
    parse_settings,
    picture_grid,
    rows_of_epoch,
    run_script,
    seeded,
)
from reward_mllm import JudgeSettings, check_judge, load_judge
from sample import (
    add_policies,
    check_editor,
    compile_blocks,
    load_editor,
    load_lora,
    lora_parameters,
    parked,
    policy,
    rollout,
    save_lora,
    shard_base,
    soft_update,
    velocity,
)

# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings(JudgeSettings):
    """Defaults are the paper's for FLUX.1-Kontext-dev; without --base the toy world's, TOY below, take their place."""

    base: str = HfArg(default="", help="The editor, a hub id or folder. [the toy's]")
    seed: int = HfArg(default=0, help="Seed of every draw.")
    resolution: int = HfArg(default=512, help="Square root of the working pixels.")
    guidance: float | None = HfArg(
        default=None, help="Guidance in rollouts and training. [the family's]"
    )
    rollout_steps: int = HfArg(default=6, help="Solver steps of a rollout.")
    solver_order: Literal[1, 2] = HfArg(default=2, help="1 Euler, 2 second-order multistep.")
    groups: int = HfArg(default=24, help="Rows drawn per epoch, over all ranks.")
    group_size: int = HfArg(default=12, help="K, edits drawn of each row.")
    # filter and advantage
    filter: Literal["paper", "released", "none"] = HfArg(
        default="paper", help="Which groups to drop."
    )
    filter_mean: float = HfArg(default=0.9, help="A group above this mean may be dropped.")
    filter_std: float = HfArg(default=0.05, help="A group below this spread may be dropped.")
    score_noise: float = HfArg(
        default=0.005, help="Spread of scores below which they count as equal."
    )
    advantage_clip: float = HfArg(
        default=5.0, help="Advantages are cut to +- this; it also multiplies the loss."
    )
    # update
    train_timesteps: int = HfArg(
        default=5, help="Flow times trained per edit, out of the rollout's."
    )
    train_steps_from: int = HfArg(
        default=6, help="Of the rollout's times the noisiest this many may be trained."
    )
    optimizer_steps: int = HfArg(
        default=1, help="Optimizer steps per epoch; the trained times are dealt out to them."
    )
    nft_beta: float = HfArg(
        default=1.0, help="How far v+ and v- lie from v_old, in units of v - v_old."
    )
    kl_weight: float = HfArg(
        default=1e-4, help="Weight of the squared velocity distance to the base. 0 skips it."
    )
    start_lora: str = HfArg(
        default="",
        help="A LoRA, folder or hub id, to start from; rank, alpha, targets are its own.",
    )
    lora_rank: int = HfArg(default=32, help="Rank of the LoRA.")
    lora_alpha: int = HfArg(default=64, help="Its alpha; the update is scaled by alpha / rank.")
    lora_targets: list[str] | None = HfArg(
        default=None, help="Endings of module names. [q k v out, both streams]"
    )
    lr: float = HfArg(default=3e-4, help="AdamW's learning rate.")
    adam_beta1: float = HfArg(default=0.9, help="AdamW's beta 1.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW's beta 2.")
    weight_decay: float = HfArg(default=1e-4, help="AdamW's weight decay.")
    grad_clip: float = HfArg(default=1.0, help="Largest gradient norm.")
    decay_rate: float = HfArg(
        default=0.001, help="After epoch n, old <- d old + (1 - d) new, d = decay_rate n ..."
    )
    decay_max: float = HfArg(default=0.5, help="... up to this d.")
    ema_decay: float = HfArg(
        default=0.9, help="An average of new for saving and evaluation only. 0: none."
    )
    # evaluation and records; from here on a resumed run may have other settings without becoming another run
    data: str = HfArg(default="", help="A dataset folder with train.jsonl and test.jsonl.")
    out: str = HfArg(default="runs/nft", help="The run's folder.")
    epochs: int = HfArg(
        default=300, help="Epochs: rollouts of `groups` rows each, and their update."
    )
    max_failed: float = HfArg(
        default=0.1, help="Share of an epoch's scores that may fail before the run stops."
    )
    eval_every: int = HfArg(default=10, help="Epochs between held-out evaluations.")
    eval_rows: int = HfArg(default=64, help="Rows of test.jsonl that they use, from the first.")
    eval_copies: int = HfArg(default=1, help="Edits of each.")
    eval_steps: int = HfArg(default=15, help="Solver steps of their edits.")
    eval_guidance: float | None = HfArg(
        default=None, help="Their guidance. [the family's for evaluation]"
    )
    log_every: int = HfArg(default=1, help="Epochs between lines of log.jsonl.")
    save_every: int = HfArg(default=30, help="Epochs between checkpoints.")
    keep_checkpoints: int = HfArg(
        default=3, help="The newest this many are kept, and the best held-out one."
    )
    keep_samples: int = HfArg(
        default=50, help="The newest this many grids are kept under samples/."
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = HfArg(
        default="none", help="Where to log, too."
    )
    resume: Literal["never", "auto"] = HfArg(
        default="never", help="auto: go on from the newest whole checkpoint."
    )
    force: bool = HfArg(default=False, help="Resume with other settings, too.")
    bad_rows: Literal["stop", "skip"] = HfArg(
        default="stop", help="What a faulty row or picture does to the run."
    )
    # the machine
    rollout_batch: int = HfArg(default=12, help="Edits in one pipeline call.")
    train_batch: int = HfArg(default=12, help="(edit, time) pairs of one row in one forward.")
    gradient_checkpointing: bool = HfArg(
        default=True, help="Recompute activations in backward: less memory."
    )
    offload: bool = HfArg(
        default=True, help="Text encoders and VAE leave the GPU while the update runs."
    )
    compile: bool = HfArg(default=False, help="Compile the transformer's blocks (torch.compile).")
    shard: bool = HfArg(
        default=False, help="Spread the frozen base over the GPUs (FSDP2); slower, for large bases."
    )
    dry_run: bool = HfArg(
        default=False,
        help="One group, one step; print peak memory and seconds by phase; save nothing.",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "epochs",
            "groups",
            "rollout_batch",
            "train_batch",
            "lora_rank",
            "lora_alpha",
            "lr",
            "nft_beta",
            "advantage_clip",
            "grad_clip",
            "eval_every",
            "eval_rows",
            "eval_copies",
            "eval_steps",
            "log_every",
            "save_every",
            "keep_checkpoints",
            "keep_samples",
            "score_noise",
        ):
            if getattr(self, name) <= 0:
                raise BadInput(f"--{name} {getattr(self, name)}: give a value above 0")
        if self.group_size < 2:
            raise BadInput(
                f"--group_size {self.group_size}: an edit is judged against its group; give at least 2"
            )
        if (
            not 1
            <= self.optimizer_steps
            <= self.train_timesteps
            <= self.train_steps_from
            <= self.rollout_steps
        ):
            raise BadInput(
                "--optimizer_steps, --train_timesteps, --train_steps_from, --rollout_steps: give rising values"
            )
        if self.base and not self.data:
            raise BadInput(
                "--data is missing; name a dataset folder with train.jsonl and test.jsonl"
            )
        if self.report_to != "none" and not find_spec(self.report_to):
            raise BadInput(
                f"--report_to {self.report_to}: is not installed; pip install {self.report_to}"
            )


HARMLESS = {
    *list(Settings.__dataclass_fields__)[list(Settings.__dataclass_fields__).index("data") :],
    "ranks",
    "judge_batch",
    "judge_device",
    "judge_in_flight",
    "judge_timeout",
    "judge_patience",
}
TOY = dict(
    data="data/toy",
    judge="",
    out="runs/toy",
    resolution=32,
    epochs=80,
    groups=16,
    group_size=12,
    rollout_batch=64,
    judge_batch=256,
    train_timesteps=3,
    train_steps_from=4,
    train_batch=256,
    lora_rank=16,
    lora_alpha=16,
    lr=4e-3,
    kl_weight=0.05,
    ema_decay=0.0,
    gradient_checkpointing=False,
    eval_every=40,
    eval_rows=240,
    eval_steps=6,
    eval_guidance=2.5,
)

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
    assert v.ndim == 3 and v.shape == v_old.shape == x_t.shape == x_0.shape, (
        "v, v_old, x_t, x_0 are (B, N, C)"
    )
    assert t.shape == r.shape == v.shape[:1], (
        f"t and r are ({len(v)},), not {tuple(t.shape)} and {tuple(r.shape)}"
    )
    v, v_old, x_t, x_0 = v.float(), v_old.detach().float(), x_t.float(), x_0.float()
    t_ = t.float()[:, None, None]  # (B, 1, 1)

    # Thm 3.2: both policies are read off the one network, as v and its mirror image about v_old
    v_pos = (1 - beta) * v_old + beta * v  # (B, N, C)
    v_neg = (1 + beta) * v_old - beta * v  # (B, N, C)

    # x_0 = x_t - t v, so each velocity names a clean edit
    pos = self_normalised_mse(x_t - t_ * v_pos, x_0)  # (B,) small when v points at this edit
    neg = self_normalised_mse(x_t - t_ * v_neg, x_0)  # (B,) small when v points away from it
    return (r * pos + (1 - r) * neg) / beta


def group_advantages(
    scores, clip=5.0, filter="paper", filter_mean=0.9, filter_std=0.05, score_noise=0.005
):
    """Optimality probabilities of an epoch's edits, and why groups were dropped.

    scores: (G, K) in [0, 1], NaN where the judge failed. Returns r (G, K) in [0, 1], NaN for what is not trained, and
    a list of G reasons, "" for a kept group. A = (score - group's mean) / (std of all kept scores), cut to +-clip;
    r = A / (2 clip) + 1/2 (UniWorld-V2, Sec. 2.3). "paper" drops a group with a high mean and a low spread; "released"
    keeps only groups with a low mean and a high spread.
    """
    scores = torch.as_tensor(scores).double()
    assert scores.ndim == 2, f"scores are (G, K), not {tuple(scores.shape)}"
    scores = scores.masked_fill(~scores.isfinite(), torch.nan)
    valid, mean = (~scores.isnan()).sum(1), scores.nanmean(1)  # (G,)
    spread = (scores - mean[:, None]).square().nanmean(1).sqrt()  # (G,)
    high, flat = mean > filter_mean, spread < filter_std
    drop = {"paper": high & flat, "released": high | flat, "none": high & ~high}[filter]
    reasons = [
        "failed" if n < 2 else "filtered" if d else "no spread" if s < score_noise else ""
        for n, d, s in zip(valid, drop, spread)
    ]
    kept = torch.tensor([not reason for reason in reasons])  # (G,)
    trained = scores[kept][~scores[kept].isnan()]
    scale = (
        trained.std(unbiased=False) if len(trained) else torch.tensor(1.0)
    )  # at least score_noise, as every kept group's
    advantage = ((scores - mean[:, None]) / scale).clamp(-clip, clip)  # (G, K)
    return (advantage / (2 * clip) + 0.5).masked_fill(~kept[:, None], torch.nan), reasons


# ---------------------------------------------------------------- one epoch's parts


def draw(editor, judge, rows, keys, settings, stop, bar, steps, guidance, **mode):
    """Edits of each row by the active policy; the judge scores a group while the next is drawn.

    keys: for each row the names of its copies' noises. Returns Groups and Futures of their Scores; a filled `stop` ends it.
    """
    groups, verdicts = [], []
    for row, names in zip(rows, keys):
        if stop.is_set() and not settings.shard:
            break
        sources, noises = (
            [load_image(path) for path in row["images"]],
            [seeded(*name) for name in names],
        )
        groups.append(
            rollout(
                editor,
                sources,
                row["prompt"],
                noises,
                steps,
                guidance,
                settings.rollout_batch,
                **mode,
            )
        )
        verdicts.append(judge.submit(row, sources, groups[-1].images))
        bar.update()
    return groups, verdicts


def training_pairs(groups, numbers, r, step, settings, epoch):
    """The (edit, time) pairs of this rank's kept groups in one optimizer step, in chunks of one group each.

    Yields (group, number, copy (B,), x_0 (B, N, C), noise (B, N, C), t (B,), r (B,)); r (G, K) is NaN for what is dropped.
    """
    for group, number in zip(groups, numbers):
        columns = []
        for copy in torch.nonzero(~r[number].isnan()).flatten().tolist():
            draws = seeded(settings.seed, "train", epoch, number, copy)
            order = torch.randperm(settings.train_steps_from, generator=draws)[
                : settings.train_timesteps
            ]
            noise = torch.randn(len(order), *group.x_0.shape[1:], generator=draws)  # (T, N, C)
            mine = range(step, len(order), settings.optimizer_steps)
            columns += [
                (
                    torch.tensor(copy),
                    group.x_0[copy],
                    noise[i],
                    group.sigmas[order[i]],
                    r[number, copy].float(),
                )
                for i in mine
            ]
        columns = [torch.stack(column).to(group.x_0.device) for column in zip(*columns)]
        for chunk in zip(*(column.split(settings.train_batch) for column in columns)):
            yield group, number, *chunk


def equally_often(items, spare, accelerator):
    """(1.0, item) for each item, then, unless `spare` is None, (0.0, spare) until every rank has had as many.

    All ranks gather a sharded base in each of its forwards, so all must call it equally often.
    """
    if spare is None:
        yield from ((1.0, item) for item in items)
        return
    items = iter(items)
    while any(gather_object([(item := next(items, None)) is not None])):
        yield (0.0, spare) if item is None else (1.0, item)


def update(editor, optimizer, groups, numbers, r, settings, epoch, accelerator, bar):
    """Alg. 1 lines 9-13: optimizer steps on this rank's groups; r (G, K), NaN for what is dropped, is all ranks'.

    Each step's gradient is the mean over all kept pairs of all ranks. Returns (pairs, 6) with group, copy, t, loss and
    squared distances to old and to base of this rank's pairs, and the gradient's norm in each step: NaN or infinite
    where the step was skipped, because its gradient was not finite.
    """
    seen, norms = [torch.empty(0, 6)], []
    trained = list(lora_parameters(editor, "new").values())
    for step in range(settings.optimizer_steps):
        pairs = int((~r.isnan()).sum()) * len(
            range(step, settings.train_timesteps, settings.optimizer_steps)
        )
        if pairs == 0:
            break  # everything was dropped: the optimizer does not step
        chunks = training_pairs(groups, numbers, r, step, settings, epoch)
        spare = (
            next(training_pairs(groups, numbers, torch.full_like(r, 0.5), step, settings, epoch))
            if settings.shard
            else None
        )
        for share, (group, number, copy, x_0, noise, t, weight) in equally_often(
            chunks, spare, accelerator
        ):
            t_ = t[:, None, None]
            x_t = (1 - t_) * x_0 + t_ * noise  # (B, N, C)
            with torch.no_grad(), policy(editor, "old"):
                v_old = velocity(editor, x_t, t, group.cond)
            v = velocity(editor, x_t, t, group.cond)
            losses = settings.advantage_clip * nft_loss(
                v, v_old, x_t, x_0, t, weight, settings.nft_beta
            )  # (B,)
            drift_old, drift_base = (v - v_old).square().mean((1, 2)), torch.full_like(t, torch.nan)
            if (
                settings.kl_weight
            ):  # the base's forward is a fifth of the cost: not for a weight of 0
                with torch.no_grad(), policy(editor, "base"):
                    v_base = velocity(editor, x_t, t, group.cond)
                drift_base = (v - v_base).square().mean((1, 2))
                losses = losses + settings.kl_weight * drift_base
            (share * losses.sum() / pairs).backward()
            columns = (
                torch.full_like(t, number),
                copy,
                t,
                losses.detach(),
                drift_old.detach(),
                drift_base.detach(),
            )
            seen += [torch.stack([column.float() for column in columns], 1).cpu()] * bool(share)
            bar.update(len(t))
        gradient = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]
        )
        gradient = accelerator.reduce(gradient, "sum")  # the one message between ranks in a step
        norms.append(gradient.norm().item())
        if math.isfinite(norms[-1]):
            gradient *= min(1.0, settings.grad_clip / max(norms[-1], 1e-12))
            for p, part in zip(trained, gradient.split([p.numel() for p in trained])):
                p.grad = part.view_as(p)
            optimizer.step()
        optimizer.zero_grad()
    return torch.cat(seen), norms


# ---------------------------------------------------------------- evaluation and records


def evaluate(editor, judge, rows, settings, name, accelerator, stop):
    """One policy's held-out edits, the same seeds for every policy: a list of dicts, in order, on every rank."""
    rank, ranks, results = accelerator.process_index, accelerator.num_processes, []
    numbers = range(rank, -(-len(rows) // ranks) * ranks, ranks)  # the same count on every rank
    mine = [rows[number % len(rows)] for number in numbers]
    keys = [
        [(settings.seed, "eval", number, copy) for copy in range(settings.eval_copies)]
        for number in numbers
    ]
    with (
        policy(editor, name),
        tqdm(total=len(mine), desc=f"held-out, {name}", leave=False, disable=rank > 0) as bar,
    ):
        groups, verdicts = draw(
            editor,
            judge,
            mine,
            keys,
            settings,
            stop,
            bar,
            settings.eval_steps,
            settings.eval_guidance,
            evaluation=True,
        )
    for number, row, group, verdict in zip(numbers, mine, groups, verdicts):
        for copy, (edit, mark) in enumerate(zip(group.images, verdict.result().score.tolist())):
            truth = dict(
                zip(("oracle", "success"), oracle(row, edit) or ())
            )  # nothing for rows that are not the toy's
            shown = {"image": edit} if number < 8 and copy == 0 else {}
            results += [{"row": number, "copy": copy, "judge": mark, **truth, **shown}] * (
                number < len(rows)
            )
    return sorted(gather_object(results), key=lambda result: (result["row"], result["copy"]))


def time_and_memory(device):
    """Now in seconds, and peak memory in GB: the GPU's since the last call, or this process's so far."""
    if device.type == "cpu":
        return time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return time.time(), peak


def epoch_record(epoch, verdicts, r, reasons, seen, norms, clock, decay):
    """One line of log.jsonl; `seen` and `norms` as update returns them, of all ranks; clock: four of time_and_memory."""
    scores, mass = (
        torch.stack([getattr(verdict, key) for verdict in verdicts]) for key in ("score", "mass")
    )
    terms = {
        name: torch.cat([verdict.terms[name] for verdict in verdicts]).nanmean().item()
        for name in verdicts[0].terms
    }
    steps = sum(map(math.isfinite, norms))
    times, peaks = zip(*clock)
    seconds = dict(zip(("rollout", "reward", "update"), np.diff(times).round(3).tolist()))
    mean = lambda values: values.mean().item() if len(values) and values.isfinite().all() else None  # noqa: E731
    return {
        "epoch": epoch + 1,
        "reward": scores.nanmean().item(),
        "reward spread": (scores - scores.nanmean(1, keepdim=True))
        .square()
        .nanmean()
        .sqrt()
        .item(),
        "terms": terms,
        "digit mass": mass.nanmean().item(),
        "failed scores": int(scores.isnan().sum()),
        "causes": Counter(cause for verdict in verdicts for cause in verdict.causes if cause),
        "groups kept": reasons.count("") / len(reasons),
        "groups dropped": {reason: reasons.count(reason) for reason in sorted(set(reasons) - {""})},
        "r histogram": torch.histc(r[~r.isnan()], 10, 0, 1).int().tolist(),
        "loss": mean(seen[:, 3]),
        "drift old": mean(seen[:, 4]),
        "drift base": mean(seen[:, 5]),
        "loss by t": [mean(seen[(5 * seen[:, 2]).long().clamp(max=4) == i, 3]) for i in range(5)],
        "grad norm": max(filter(math.isfinite, norms), default=None),
        "optimizer steps": steps,
        "skipped steps": len(norms) - steps,
        "old decay": decay,
        "seconds": seconds,
        "edits per second": scores.numel() / sum(seconds.values()),
        "peak GB": dict(zip(seconds, np.round(peaks[1:], 3).tolist())),
    }


def epoch_line(record, epochs, pace):
    """What the terminal shows of a record; pace in seconds an epoch, evaluations included."""
    show = lambda key, digits: "-" if record[key] is None else f"{record[key]:.{digits}f}"  # noqa: E731
    line = (
        f"epoch {record['epoch']}/{epochs}  reward {show('reward', 3)} +-{show('reward spread', 3)}  "
        f"kept {record['groups kept']:.0%}  loss {show('loss', 2)}  grad {show('grad norm', 2)}  "
        f"drift {show('drift base', 4)}  "
        + "GRADIENT SPIKE  " * record.get("grad spike", False)
        + "STEP SKIPPED  " * record["skipped steps"]
        + "  ".join(f"{key} {s:.1f} s" for key, s in record["seconds"].items())
        + f"  left {pace * (epochs - record['epoch']) / 60:.1f} min"
    )
    for name, marks in record.get("held-out", {}).items():
        line += f"\n   held-out, {name}: " + "; ".join(
            f"{key} {m['base']:.3f} -> {m['now']:.3f} ({m['gain']:+.3f}, 95% {m['low']:+.3f} to {m['high']:+.3f})"
            + f", {m['missing']} missing" * (m["missing"] > 0)
            for key, m in marks.items()
        )
    return line


def not_finite(out, rows, scores, seen):
    """The error that ends a run after three steps without a finite gradient; writes what led to the last of them."""
    guilty = seen[~seen[:, 3].isfinite()] if not seen[:, 3].isfinite().all() else seen
    pairs = [
        {
            "row": rows[int(g)]["id"],
            "copy": int(c),
            "t": t,
            "loss": str(loss),
            "score": scores[int(g), int(c)].item(),
        }
        for g, c, t, loss, *_ in guilty.tolist()
    ]
    (out / "not-finite.json").write_text(json.dumps(pairs, indent=1))
    return BadInput(
        f"three steps in a row had no finite gradient and were left out; see {out / 'not-finite.json'} for rows, "
        "times and scores; lower --lr or mend those rows, then go on with --resume auto"
    )


# ---------------------------------------------------------------- checkpoints and pictures


def read_state(folder):
    """The state of a checkpoint whose files are all as they were written; {} when one is missing or damaged."""
    try:
        state = json.loads((folder / "state.json").read_text())
        marks = {name: sha256((folder / name).read_bytes()).hexdigest() for name in state["files"]}
        return state if marks == state["files"] else {}
    except (OSError, ValueError, KeyError):
        return {}


def checkpoints(out):
    """The checkpoint folders of a run, newest first."""
    return sorted(
        Path(out).glob("checkpoint-*"),
        key=lambda folder: int(folder.name.split("-")[1]),
        reverse=True,
    )


def save_checkpoint(editor, optimizer, out, state, keep):
    """Writes out/checkpoint-{epoch} beside and renames it: it is whole or not there. new lies on top, averages below.

    Then drops all but the newest `keep` and the one with the best state["held-out"]. BadInput when it cannot be written;
    the ones before it are then untouched.
    """
    folder = Path(out) / f"checkpoint-{state['epoch']}"
    part = folder.with_name(f".{folder.name}.part")
    for left in folder.parent.glob(".checkpoint-*.part"):  # by a kill
        shutil.rmtree(left)
    try:
        for name in editor.policies:
            save_lora(editor, part / name.removeprefix("new"), name)
        moments = optimizer.state_dict()["state"]
        save_file(
            {f"{i}.{key}": value for i in moments for key, value in moments[i].items()},
            part / "optimizer.safetensors",
        )
        files = [path for path in sorted(part.rglob("*")) if path.is_file()]
        files = {
            str(path.relative_to(part)): sha256(path.read_bytes()).hexdigest() for path in files
        }
        (part / "state.json").write_text(json.dumps(state | {"files": files}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # one that was damaged
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise BadInput(
            f"{folder}: could not be written ({error}); the checkpoints before it are whole: make room and go "
            "on with --resume auto"
        ) from error
    folders = checkpoints(out)
    marks = {
        folder: mark
        for folder in folders
        if (mark := read_state(folder).get("held-out")) is not None
    }
    for old in folders[keep:]:
        if old != max(marks, key=marks.get, default=None):
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.part")))


def load_checkpoint(editor, optimizer, out, settings, harmless, force=False):
    """Puts back the newest whole checkpoint of a run: its state, {} when there is none. Says which were damaged.

    settings: what the run is now; what differs from the checkpoint's is printed, and BadInput unless it is among the
    `harmless` names or `force` is set. The state comes with the new settings.
    """
    for folder in checkpoints(out):
        if not (state := read_state(folder)):
            print(f"{folder}: damaged; going back to the one before", file=sys.stderr)
            continue
        changed = {
            key: f"{key} was {state['settings'].get(key)} and is {settings[key]}"
            for key in settings
            if settings[key] != state["settings"].get(key)
        }
        serious = [change for key, change in changed.items() if key not in harmless]
        if serious and not force:
            raise BadInput(
                f"{folder}: {'; '.join(serious)}; give what it was trained with, or --force true"
            )
        print("".join(f"resuming although {change}\n" for change in changed.values()), end="")
        for name in editor.policies:
            load_lora(editor, folder / name.removeprefix("new"), name)
        moments = {}
        for key, value in load_file(folder / "optimizer.safetensors").items():
            moments.setdefault(int(key.split(".")[0]), {})[key.split(".")[1]] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        return state | {"settings": settings}
    return {}


def comparison_grid(rows, base, now):
    """A grid of held-out edits: source, base, now and, where it is known, the target, with instruction and judge's score.

    base, now: dicts with `row`, `judge` and, for those that are shown, `image`, in the same order.
    """
    pictures, captions = [], []
    for before, after in zip(base, now):
        if "image" in before:
            row = rows[before["row"]]
            target = [load_image(row["target"])] if "target" in row else []
            pictures.append(
                [load_image(row["images"][0]), before["image"], after["image"], *target]
            )
            marks = [
                f"{name} {result['judge']:.2f}"
                for name, result in (("base", before), ("now", after))
            ]
            captions.append([row["prompt"], *marks, *["target"] * len(target)])
    return picture_grid(pictures, captions, "source, base, now, with the judge's score")


def save_newest(image, path, keep):
    """Writes a picture and removes the oldest of its folder, by name, beyond the newest `keep`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    for old in sorted(path.parent.glob(f"*{path.suffix}"))[:-keep]:
        old.unlink()


def cut_log(file, epoch):
    """Leaves the whole lines up to `epoch` in a log.jsonl and returns them: a kill may have cut the last one short."""
    kept = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        kept += [record] * (record["epoch"] <= epoch)
    if file.exists():
        part = file.with_suffix(".part")
        part.write_text("".join(json.dumps(record) + "\n" for record in kept))
        part.replace(file)
    return kept


# ---------------------------------------------------------------- the run


def load_all(settings, accelerator):
    """Data, judge and editor with its policies and optimizer, each refused in one line if it cannot serve."""
    rows = load_rows(settings.data, settings.bad_rows == "skip")
    rows["test"] = rows["test"][: settings.eval_rows]
    device, dtype = (
        accelerator.device,
        torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32,
    )
    editor = load_editor(
        settings.base,
        "cpu" if settings.shard else device,
        dtype,
        settings.resolution,
        solver_order=settings.solver_order,
        trust_remote_code=settings.trust_remote_code,
    )
    add_policies(
        editor,
        settings.lora_rank,
        settings.lora_alpha,
        settings.lora_targets,
        settings.seed,
        ("old", "ema") if settings.ema_decay else ("old",),
        settings.start_lora,
    )
    if settings.gradient_checkpointing:
        editor.pipe.transformer.enable_gradient_checkpointing()
    if settings.shard:
        shard_base(editor, accelerator)
    judge = load_judge(settings, device, dtype)
    optimizer = torch.optim.AdamW(
        lora_parameters(editor, "new").values(),
        settings.lr,
        weight_decay=settings.weight_decay,
        betas=(settings.adam_beta1, settings.adam_beta2),
    )
    check_editor(
        editor, rows["train"][0], settings.guidance, optimizer, started=bool(settings.start_lora)
    )
    check_judge(judge, settings.judge, rows["train"])
    if settings.compile:
        compile_blocks(editor)
    return rows, editor, judge, optimizer


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    toy = not any(word.split("=")[0] == "--base" for word in argv)
    settings = parse_settings(
        Settings, argv, description=__doc__.splitlines()[0], **(TOY if toy else {})
    )
    out, stop = Path(settings.out), catch_signals()
    if (out / "log.jsonl").exists() and settings.resume == "never" and not settings.dry_run:
        raise BadInput(
            f"{out}: holds a run already; give --resume auto, another --out, or remove it"
        )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        project_dir=settings.out,
        log_with=None if settings.report_to == "none" else settings.report_to,
    )
    rank, ranks, chief = (
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.is_main_process,
    )
    if settings.groups % ranks:
        raise BadInput(
            f"--groups {settings.groups}: not divisible by {ranks} processes; give a multiple of {ranks}"
        )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // ranks))
    if toy:
        with accelerator.main_process_first():
            build_toy(ToySettings(out=settings.data))
        settings = replace(
            settings,
            base=f"{settings.data}/editor",
            judge=settings.judge or f"local:{settings.data}/judge",
        )
    if settings.dry_run:
        settings = replace(settings, epochs=1, groups=ranks, eval_rows=1)
    rows, editor, judge, optimizer = load_all(settings, accelerator)
    accelerator.print(
        f"{len(rows['train'])} training rows, {len(rows['test'])} held-out; LoRA on {len(editor.lora_layers)} "
        f"modules; {settings.groups} x {settings.group_size} edits an epoch on {ranks} ranks"
    )
    now = asdict(settings) | {
        "ranks": ranks,
        "rows": crc32(repr([(row["id"], row["prompt"]) for row in rows["train"]]).encode()),
    }
    state = {
        "epoch": 0,
        "skipped in a row": 0,
        "best": -1.0,
        "run": secrets.token_hex(4),
        "settings": now,
    }
    if settings.resume == "auto":
        state |= load_checkpoint(editor, optimizer, out, now, HARMLESS, settings.force)
    first, saved, fault, usual = (
        state["epoch"],
        state["epoch"],
        None,
        [],
    )  # usual: gradient norms of the last steps
    if chief and not settings.dry_run:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(settings), indent=1))
        cut_log(out / "log.jsonl", state["epoch"])
    same_run = {"wandb": {"id": state["run"], "resume": "allow"}, "trackio": {"name": state["run"]}}
    accelerator.init_trackers(
        "edit-nft", {key: str(value) for key, value in asdict(settings).items()}, same_run
    )
    base = (
        []
        if settings.dry_run
        else evaluate(editor, judge, rows["test"], settings, "base", accelerator, stop)
    )
    start, stopped = (
        time.time(),
        lambda: any(gather_object([stop.is_set()])),
    )  # a signal to one rank stops all

    for epoch in range(first, settings.epochs):
        clock = [time_and_memory(accelerator.device)]
        numbers = list(range(rank, settings.groups, ranks))  # groups live whole on one rank
        chosen = list(rows_of_epoch(settings.groups, len(rows["train"]), settings.seed, epoch))
        bar = tqdm(
            total=2 * len(numbers), desc=f"epoch {epoch + 1}", leave=False, disable=not chief
        )

        # ---------------- rollout: the old policy draws a group of edits for each row
        keys = [
            [(settings.seed, "rollout", epoch, number, copy) for copy in range(settings.group_size)]
            for number in numbers
        ]
        with policy(editor, "old"):
            mine = [rows["train"][chosen[number]] for number in numbers]
            groups, verdicts = draw(
                editor,
                judge,
                mine,
                keys,
                settings,
                stop,
                bar,
                settings.rollout_steps,
                settings.guidance,
            )
        clock.append(time_and_memory(accelerator.device))

        # ---------------- reward: the judge scores them; every rank learns all scores
        verdicts = gather_object(
            [(number, verdict.result()) for number, verdict in zip(numbers, verdicts)]
        )
        verdicts = [verdict for _, verdict in sorted(verdicts, key=lambda pair: pair[0])]
        if stopped():
            break  # the weights are as they were after the last epoch
        scores = torch.stack([verdict.score for verdict in verdicts])  # (G, K)
        if (failed := int(scores.isnan().sum())) > settings.max_failed * scores.numel():
            causes = dict(
                Counter(cause for verdict in verdicts for cause in verdict.causes if cause)
            )
            fault = BadInput(
                f"epoch {epoch + 1}: the judge failed on {failed} of {scores.numel()} edits ({causes}); see to "
                f"{settings.judge} and go on with --resume auto, or raise --max_failed"
            )
            break
        clock.append(time_and_memory(accelerator.device))

        # ---------------- filter: groups that say nothing are dropped, the rest become optimality probabilities
        r, reasons = group_advantages(
            scores,
            settings.advantage_clip,
            settings.filter,
            settings.filter_mean,
            settings.filter_std,
            settings.score_noise,
        )
        if settings.dry_run:  # whatever the judge says, one step is to be measured
            r, reasons = (
                torch.linspace(0, 1, settings.group_size).expand_as(scores),
                [""] * len(scores),
            )

        # ---------------- update: towards good edits, away from bad ones; then the old policy follows softly
        with parked(editor, settings.offload):
            seen, norms = update(
                editor, optimizer, groups, numbers, r, settings, epoch, accelerator, bar
            )
        decay = min(settings.decay_rate * (epoch + 1), settings.decay_max)
        soft_update(editor, decay)
        if settings.ema_decay:
            soft_update(editor, settings.ema_decay, "ema")
        clock.append(time_and_memory(accelerator.device))
        bar.close()

        # ---------------- log, evaluate, save
        seen, last = torch.cat(gather_object([seen])), epoch + 1 == settings.epochs
        record = epoch_record(epoch, verdicts, r, reasons, seen, norms, clock, decay)
        if settings.dry_run:
            return accelerator.print(
                epoch_line(record, 1, 0) + f"\npeak GB: {record['peak GB']}; nothing was saved"
            )
        state |= {"epoch": epoch + 1, "held-out": None}
        record["grad spike"] = len(usual) > 4 and (record["grad norm"] or 0) > 5 * median(usual)
        usual = [*usual, *filter(math.isfinite, norms)][-20:]
        for norm in norms:
            state["skipped in a row"] = 0 if math.isfinite(norm) else state["skipped in a row"] + 1
        if state["skipped in a row"] >= 3:
            fault = not_finite(out, [rows["train"][row] for row in chosen], scores, seen)
        if not fault and (last or (epoch + 1) % settings.eval_every == 0):
            held_out = {
                name: evaluate(editor, judge, rows["test"], settings, name, accelerator, stop)
                for name in editor.policies
            }
            if not stopped():  # else some of the edits were not drawn
                record["held-out"] = {
                    name: {
                        key: paired_gain(base, results, key)
                        for key in ("judge", "oracle", "success")
                        if key in base[0]
                    }
                    for name, results in held_out.items()
                }
                state["held-out"] = record["held-out"]["new"]["judge"]["now"]
        if chief:
            if "held-out" in record:
                file = out / "samples" / f"epoch-{epoch + 1:04}.png"
                save_newest(
                    comparison_grid(rows["test"], base, held_out["new"]),
                    file,
                    settings.keep_samples,
                )
            if (epoch + 1) % settings.log_every == 0 or "held-out" in record:
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(record) + "\n")
            print(
                epoch_line(record, settings.epochs, (time.time() - start) / (epoch + 1 - first)),
                flush=True,
            )
            if (epoch + 1) % settings.save_every == 0 or (state["held-out"] or -1.0) > state[
                "best"
            ]:
                state["best"], saved = max(state["best"], state["held-out"] or -1.0), epoch + 1
                save_checkpoint(editor, optimizer, out, state, settings.keep_checkpoints)
        accelerator.log(
            {key: value for key, value in record.items() if isinstance(value, (int, float))},
            epoch + 1,
        )
        if fault or stopped():
            break

    if chief and state["epoch"] > saved:
        save_checkpoint(editor, optimizer, out, state, settings.keep_checkpoints)
    accelerator.wait_for_everyone()  # a rank that leaves early would break the others' last messages
    accelerator.end_training()
    if fault:
        raise fault
    if state["epoch"] < settings.epochs:
        accelerator.print(
            f"stopped after epoch {state['epoch']} of {settings.epochs}; go on with --resume auto"
        )


if __name__ == "__main__":
    run_script(main)
