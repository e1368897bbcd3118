"""DiffusionNFT with a multimodal LLM as judge: an image editor learns from its own graded edits.

    accelerate launch train_nft.py                         # the toy world, two CPU cores, minutes
    accelerate launch train_nft.py --base black-forest-labs/FLUX.1-Kontext-dev --data DIR

Algorithm 1 of DiffusionNFT (arXiv:2509.16117v2) as UniWorld-V2 (arXiv:2510.16888, Edit-R1) applies
it. In each epoch the old policy draws K edits of each of G rows (rollout), the judge scores them
(reward), groups whose scores say nothing are dropped (filter), the new policy is regressed towards
the good edits and away from the bad ones (update), and the old policy follows it softly.

Shapes: G groups, K copies (edits) in a group, T flow times trained of each edit, P (edit, time)
pairs of an epoch, B of them in one forward, N tokens of an edit, C latent channels. t is flow time
in [0, 1]: x_t = (1 - t) x_0 + t noise, v = noise - x_0. The method itself is `run_epochs`.

Departures from the papers and their released code:
1. A dropped group costs the update nothing: no forward, no place in a mean or in the scale.
2. The gradient is the mean over the kept pairs of all ranks: many ranks do what one does.
3. An edit that the judge could not score is dropped; it does not count as 0.
4. A group is a row of the data, not a prompt. One rank draws all its copies.
5. The filter is the paper's (high mean and low spread). `--filter released` is the released
   code's, except that a row is drawn again in later epochs whatever was dropped of it.
6. A group whose spread is within the judge's own noise is dropped, whatever the filter.
7. The trained times are any of the rollout's, drawn anew for each edit, each with its own noise.
8. The pull to the base is taken at one of an edit's trained times, T times as strong: the same in
   the mean, for a T-th of the base's forwards.
9. The EMA is for saving and evaluation only; it is not what is drawn from.
10. The toy's own settings (TOY) are none of the papers': a tiny editor learns faster.
"""

import math
import secrets
import time
from collections import Counter
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, tqdm  # shown by the first rank
from PIL import Image
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from data_prep import (
    BadInput,
    Stopped,
    ToySettings,
    append_json_line,
    build_toy,
    catch_signals,
    changed,
    check_names,
    checkpoints_in,
    faults_of,
    fingerprint,
    from_main,
    heed_stop,
    keep_epochs,
    keep_faultless,
    load_image,
    load_rows,
    load_sources,
    locked,
    newest_checkpoint,
    oracle,
    paired_gain,
    parse_settings,
    picture_grid,
    prune_checkpoints,
    read_json,
    rows_of_epoch,
    run_script,
    say,
    say_once,
    seeded,
    setting,
    start_processes,
    start_trackers,
    together,
    whole_file,
    whole_folder,
    write_json,
)
from reward_mllm import Judge, JudgeSettings, Scores, check_judge, combine, load_judge
from sample import (
    Editor,
    Group,
    add_policies,
    check_editor,
    check_row,
    compile_blocks,
    fit_memory,
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

WEIGHT_DECAY = 1e-4  # of AdamW; its betas are PyTorch's, 0.9 and 0.999
GRAD_CLIP = 1.0  # largest norm of the gradient
LEAST_SPREAD = 0.005  # a group whose scores have a smaller standard deviation says nothing
SHOWN_ROWS = 8  # held-out rows in the pictures under samples/
HOPELESS = 10  # a run ends after so many epochs in a row that kept no group
# A step is bad with a larger mean squared distance to the base's velocities, whose entries are of
# size 1, or with a loss larger than so many times the advantage_clip, where 1 is usual.
FARTHEST = 1.0
EXPLODED = 20

# What the terminal shows of an epoch's record: a line has the entries that begin with its words.
SHOWN = """\
epoch reward/mean reward/spread reward/psnr groups update grad
reward/task seconds peak_gb
heldout/new/judge
heldout/new/oracle
heldout/new/success"""

Rows = list[dict]
Results = list[dict]  # of held-out edits, see evaluate
Measured = dict[str, Tensor]  # name -> a number of each pair; of the pull to the base, of fewer

# ---------------------------------------------------------------- settings

# kinds of field
count = partial(setting, at_least=1)
amount = partial(setting, at_least=0)
fraction = partial(amount, at_most=1)
positive = partial(setting, above=0)


@dataclass(frozen=True)
class Settings(JudgeSettings):
    """Defaults are the paper's for FLUX.1-Kontext-dev; without --base the toy's, TOY, apply."""

    base: str = setting("", "The editor, a hub id or folder. [the toy's]")
    data: str = setting("", "A dataset folder with train.jsonl and test.jsonl.")
    out: str = setting("runs/nft", "The run's folder.")
    seed: int = amount(0, "Seed of every draw.")
    epochs: int = count(300, "A rollout and one optimizer step each.")
    # rollout
    resolution: int = setting(512, "Square root of the working pixels.", at_least=16)
    guidance: float | None = amount(None, "Guidance of rollouts. [the family's]")
    rollout_steps: int | None = count(None, "Solver steps of a rollout. [the family's]")
    solver_order: Literal[1, 2] = setting(2, "1 Euler, 2 second-order multistep.")
    groups: int = count(24, "Rows drawn per epoch, over all ranks.")
    group_size: int = setting(12, "K, edits drawn of each row.", at_least=2)
    # filter and advantage
    filter: Literal["paper", "released", "none"] = setting("paper", "Which groups to drop.")
    filter_mean: float = fraction(0.9, "A group above this mean may be dropped.")
    filter_std: float = fraction(0.05, "A group below this spread may be dropped.")
    scale: Literal["epoch", "group"] = setting("epoch", "By whose spread advantages are divided.")
    normalise_aspects: bool = setting(False, "Each aspect at its own scale before they are joined.")
    advantage_clip: float = positive(5.0, "Advantages end there; also a factor of the loss.")
    # update
    train_timesteps: int = count(5, "Flow times trained per edit, of the rollout's.")
    nft_beta: float = positive(1.0, "Distance of v+ and v- to v_old, in units of v - v_old.")
    kl_weight: float = amount(1e-4, "Weight of the distance to the base.")
    norm_hinge: float = amount(0.0, "Weight of a penalty on velocities longer than the base's.")
    start_lora: str = setting("", "A LoRA to start from, with its own rank and layers.")
    lora_rank: int = count(32, "Rank of the LoRA.")
    lora_alpha: int = count(64, "The LoRA is scaled by alpha / rank.")
    lora_targets: list[str] | None = setting(None, "Names of layers. [the family's]")
    lr: float = positive(3e-4, "AdamW's learning rate.", at_most=1)
    decay_rate: float = fraction(0.001, "Old keeps n times this of itself after epoch n.")
    decay_max: float = fraction(0.5, "The most that old keeps of itself.")
    decay_start: int = amount(0, "In each of the first so many epochs old becomes a copy of new.")
    ema_decay: float = fraction(0.9, "The most that the EMA keeps of itself; 0: no EMA.")
    # evaluation and records
    eval_every: int = count(10, "Epochs between held-out evaluations.")
    eval_rows: int = count(64, "Rows of test.jsonl in a held-out evaluation.")
    eval_steps: int = count(15, "Solver steps of held-out edits.")
    eval_guidance: float | None = amount(None, "Guidance of held-out edits. [the family's]")
    save_every: int = count(30, "Epochs between checkpoints.")
    keep_checkpoints: int = count(3, "Keep the newest so many checkpoints, and the best.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "swanlab"] = setting(
        "none", "Where to log beside log.jsonl."
    )
    resume: Literal["never", "auto"] = setting("never", "auto: go on where the run stopped.")
    force: bool = setting(False, "Resume with other settings, too.")
    bad_rows: Literal["stop", "skip"] = setting("stop", "What a faulty row does to the run.")
    max_failed: float = fraction(0.1, "Share of an epoch's scores that may fail.")
    # the machine
    rollout_batch: int = count(12, "Edits in one pipeline call.")
    train_batch: int = count(12, "(edit, time) pairs in one forward; fewer if memory asks for it.")
    # With a GPU, start-up tries an update, and these two save no more memory than it asks for. With
    # --shard, or the second at false, there is no trial.
    offload: bool = setting(True, "In updates encoders, VAE and judge may leave the GPU.")
    gradient_checkpointing: bool = setting(True, "Backward may compute blocks again.")
    compile: bool = setting(True, "On a GPU, compile the transformer's blocks.")
    shard: bool = setting(False, "Spread a large base over the GPUs (FSDP2).")
    dry_run: bool = setting(False, "One small epoch: its memory and time, no files.")


# A resumed run may change these and is still the same run; with others it would be another one.
HARMLESS = """data out epochs eval_every eval_rows eval_steps eval_guidance save_every
keep_checkpoints report_to resume force bad_rows max_failed rollout_batch train_batch
gradient_checkpointing offload compile shard dry_run trust_remote_code judge_device
judge_batch judge_in_flight judge_timeout judge_patience judge_check"""

# The settings of a run without --base, a name and its value a line.
TOY_LINES = """\
base data/toy/editor
data data/toy
judge local:data/toy/judge
out runs/toy
resolution 32
epochs 80
groups 16
rollout_batch 64
judge_batch 256
train_timesteps 3
train_batch 256
gradient_checkpointing false
lora_rank 16
lora_alpha 16
lr 4e-3
kl_weight 0.05
ema_decay 0
eval_every 40
eval_rows 240
eval_steps 6
eval_guidance 2.5"""
TOY = dict(line.split() for line in TOY_LINES.splitlines())

# ---------------------------------------------------------------- the maths


def self_normalised_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over its own mean absolute error, per sample: (B, N, C) twice -> (B,).

    The adaptive weight of DiffusionNFT, Sec. 3.3.
    """
    error = prediction - target  # (B, N, C)
    # Without this division the noisy times, where x_0 is hard to guess, would drown the others.
    # Detached, it scales a sample's gradient and leaves its direction alone.
    size = error.detach().abs().mean((1, 2)).clamp(min=1e-5)  # (B,)
    return error.square().mean((1, 2)) / size


def nft_loss(
    v: Tensor, v_old: Tensor, x_t: Tensor, x_0: Tensor, t: Tensor, r: Tensor, beta: float
) -> Tensor:
    """Eq. 5 of DiffusionNFT in its x_0 form, divided by beta: -> (B,), float32.

    v, v_old, x_t, x_0: (B, N, C); t, r: (B,). r in [0, 1] is the edit's optimality. At v = v_old
    the gradient lies along -(2 r - 1) (noise - x_0 - v_old), whatever beta is.
    """
    assert v.shape == v_old.shape == x_t.shape == x_0.shape, "v, v_old, x_t, x_0 are (B, N, C)"
    assert t.shape == r.shape == v.shape[:1], "t and r are (B,)"
    v = v.float()
    v_old = v_old.detach().float()
    t = t[:, None, None]  # (B, 1, 1)

    # One network is both policies: v, and its mirror image about v_old (Thm 3.2).
    v_pos = (1 - beta) * v_old + beta * v  # (B, N, C)
    v_neg = (1 + beta) * v_old - beta * v  # (B, N, C)

    # Each velocity names a clean edit, x_0 = x_t - t v. pos is small where v points at this
    # edit, neg where v points away from it; r says which of the two is wanted.
    pos = self_normalised_mse(x_t - t * v_pos, x_0)  # (B,), float32 as v_pos is
    neg = self_normalised_mse(x_t - t * v_neg, x_0)  # (B,)

    # Both slopes grow with beta: without the division it would be a second learning rate.
    return (r * pos + (1 - r) * neg) / beta


def drop_reason(scores: Tensor, settings: Settings, least_spread: float) -> str:
    """Why a group is dropped, "" if it is kept; scores (K,), NaN where the judge failed."""
    known = scores[scores.isfinite()]
    if len(known) < 2:
        return "failed"
    spread = known.std(unbiased=False)
    is_high = known.mean() > settings.filter_mean
    is_flat = spread < settings.filter_std
    if settings.filter == "paper" and is_high and is_flat:
        return "filtered"  # solved: the differences that remain are noise
    if settings.filter == "released" and (is_high or is_flat):
        return "filtered"
    if spread < least_spread:
        return "no spread"  # noise of the judge, which scaling would blow up to advantages
    return ""


def standardised(values: Tensor) -> Tensor:
    """(values - mean) / spread of each group, (G, K) -> (G, K); a NaN stays one and does not count.

    A spread counts as LEAST_SPREAD at least.
    """
    centred = values - values.nanmean(1, keepdim=True)
    spread = centred.square().nanmean(1, keepdim=True).sqrt()  # (G, 1)
    return centred / spread.clamp(min=LEAST_SPREAD)


def _join_standardised(terms, weights):
    """The weighted sum (G, K) of the aspects, each standardised, as in GDPO (arXiv:2601.05242).

    So none dominates only because its scores vary more. terms: of Scores; weights: of the aspects
    beside execution.
    """
    total = standardised(terms["execution"])
    for name, weight in weights.items():
        # Of a perfect execution and this aspect alone it makes the aspect's factor, in [0, 1].
        aspect = combine(terms | {"execution": 1.0}, {name: 1.0})
        total = total + weight * standardised(aspect)
    return total


def group_advantages(
    scores: Tensor, settings: Settings, least_spread: float = LEAST_SPREAD
) -> tuple[Tensor, list[str]]:
    """The edits' optimality r (G, K) in [0, 1], NaN for what is not trained; and G drop_reasons.

    A = (score - its group's mean) / (std of all kept scores), cut to +-clip; r = A / (2 clip) + 1/2
    (UniWorld-V2, Sec. 2.3); with --scale group it is the group's own std. scores: (G, K) in [0, 1],
    NaN where the judge failed. Of the settings it takes advantage_clip, scale, filter, filter_mean
    and filter_std.
    """
    scores = scores.double()
    reasons = [drop_reason(group, settings, least_spread) for group in scores]
    dropped = torch.tensor([reason != "" for reason in reasons])  # (G,)
    scores = scores.masked_fill(dropped[:, None], torch.nan)
    if dropped.all():
        return scores, reasons

    # The mean is the group's own: rows differ in difficulty. The scale is that of all groups: by
    # its own, a group whose scores hardly differ would count like one of success and failure.
    if settings.scale == "group":
        advantage = standardised(scores)  # (G, K)
    else:
        scale = scores[scores.isfinite()].std(unbiased=False)
        advantage = (scores - scores.nanmean(1, keepdim=True)) / scale
    clip = settings.advantage_clip
    return advantage.clamp(-clip, clip) / (2 * clip) + 0.5, reasons


# ---------------------------------------------------------------- what all parts work with


@dataclass
class Run:
    """All parts of a training, and its state when it was last saved."""

    settings: Settings
    accelerator: Accelerator
    stop: Event  # set by a signal
    rows: dict  # {"train": ..., "test": ...}
    editor: Editor
    judge: Judge
    optimizer: torch.optim.Optimizer
    saved: dict  # the state in the newest checkpoint

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    def together(self):
        """A piece of work at whose end all ranks leave if one has to: see data_prep.together."""
        return together(self.accelerator, self.stop)


# ---------------------------------------------------------------- rollout and reward


@contextmanager
def _in_step(run, stand_in=None):
    """Within are forwards that all ranks of a sharded base must make, whatever goes wrong in one.

    After BadInput, known before the first of them, stand_in() makes them in this rank's place.
    After another error the ranks would wait for this one in vain, and nothing can tell them: its
    process ends, and then the launcher ends theirs.
    """
    try:
        yield
    except BadInput:
        if run.settings.shard and stand_in:
            stand_in()
        raise
    except Exception as error:
        if not run.settings.shard:
            raise
        raise SystemExit(
            f"error: {error!r} within a forward of all processes; go on with --resume auto"
        ) from error


@dataclass
class Job:
    """One row that this rank draws."""

    number: int  # its place among the rows of all ranks
    row: dict
    group: Group | None  # its edits; None where --bad_rows skip leaves the row out
    verdict: Future  # of their Scores


def draw(run: Run, name: str, rows: Rows, copies: int, *key, **how) -> list[Job]:
    """This rank's share of the rows, and `copies` edits of each by the named policy.

    key: names the noises, together with a row's number and a copy's; how: as rollout takes it.
    """
    how["rollout_batch"] = run.settings.rollout_batch
    # Every rank draws equally many; where rows are too few for that, the last one again.
    split = run.accelerator.split_between_processes(list(enumerate(rows)), apply_padding=True)
    blank = Image.new("RGB", (512, 512))
    jobs = []
    with policy(run.editor, name), split as mine:
        for number, row in tqdm(mine, desc=f"{name} draws", leave=False):
            noises = [seeded(run.settings.seed, *key, number, copy) for copy in range(copies)]
            stand_in = partial(rollout, run.editor, [blank], "x", noises, **how)
            group = None
            verdict = Future()
            with run.together(), faults_of(row, run.settings.bad_rows == "skip"):
                with _in_step(run, stand_in):
                    sources = load_sources(row)
                    group = rollout(run.editor, sources, row["prompt"], noises, **how)
                # Returns at once: the judge works on this group while the next one is drawn.
                verdict = run.judge.submit(row, sources, group.images)
            if group is None:
                verdict.set_result(run.judge.missing(copies, "bad row"))
            jobs.append(Job(number, row, group, verdict))
    return jobs


def _await_scores(run, jobs, copies):
    """The Scores of all ranks' groups, (G, K). A signal or too many failures end the waiting."""
    verdicts = [job.verdict for job in jobs]
    expected = len(verdicts) * run.accelerator.num_processes  # groups of all ranks
    groups = []
    while len(groups) < expected:
        with run.together():
            wait(verdicts, timeout=1.0)
            known = [verdict.result() for verdict in verdicts if verdict.done()]
        groups = gather_object(known)
        failed = Counter(sum([group.causes for group in groups], []))
        del failed[""], failed["bad row"]  # a success, and no fault of the judge
        with run.together():
            if failed.total() > run.settings.max_failed * expected * copies:
                raise BadInput(
                    f"the judge failed on {failed.total()} of {expected * copies} edits "
                    f"({dict(failed)}); see to {run.settings.judge} and go on with --resume auto, "
                    "or raise --max_failed"
                )
    return Scores.stack(groups)


# ---------------------------------------------------------------- update


@dataclass
class Chunk:
    """Pairs of one group for one forward, by numbers alone: any rank can draw their tensors."""

    number: int  # of the group in the epoch
    pairs: list  # B of (copy, pick): which edit, and which of its trained times
    is_pulled: bool  # to the base, which takes one forward more
    share: float = 1.0  # in the gradient; 0 in padding, which only keeps its rank in step


def _deal_chunks(run, r):
    """This rank's share of the epoch's Chunks, as many as any other's; r (G, K) of all ranks."""
    settings = run.settings
    ranks = run.accelerator.num_processes
    chunks = []
    has_pull = settings.kl_weight + settings.norm_hinge > 0
    # The first of an edit's times is pulled to the base, which makes its chunks slower: they are
    # dealt out before the others, so that each rank gets equally many.
    for picks, is_pulled in (([0], has_pull), (range(1, settings.train_timesteps), False)):
        for number, group in enumerate(r):
            copies = group.isfinite().nonzero().flatten().tolist()
            pairs = list(product(copies, picks))
            for first in range(0, len(pairs), settings.train_batch):
                batch = pairs[first : first + settings.train_batch]
                chunks.append(Chunk(number, batch, is_pulled))
        # The filter leaves ranks unequally many groups, so chunks are dealt out like cards. Padding
        # is free, as ranks wait for the slowest; and a sharded base needs all in each forward.
        while len(chunks) % ranks:
            chunks.append(replace(chunks[-1], share=0.0))
    return chunks[run.accelerator.process_index :: ranks]


@dataclass
class Pairs:
    """B edits of one group and the noise for each."""

    copy: Tensor  # (B,) which of its edits
    x_0: Tensor  # (B, N, C) clean latents
    noise: Tensor  # (B, N, C)
    t: Tensor  # (B,) flow time
    r: Tensor  # (B,) optimality


def draw_pairs(run: Run, group: Group, chunk: Chunk, r: Tensor, epoch: int) -> Pairs:
    """The tensors of a chunk, on this rank's device. r: (K,), of its group alone."""
    T = run.settings.train_timesteps
    noise = []
    t = []
    for copy, pick in chunk.pairs:
        draws = seeded(run.settings.seed, "train", epoch, chunk.number, copy)
        # Only times of the rollout: others the model never meets in use.
        order = torch.randperm(len(group.sigmas), generator=draws)
        # For all T times of the edit, as others of them may be in another chunk.
        noises = torch.randn(T, *group.x_0.shape[1:], generator=draws)  # (T, N, C)
        noise.append(noises[pick])
        t.append(group.sigmas[order[pick]])
    # Rounded as `velocity` rounds them, so that x_t is as noisy as the transformer is told.
    told = torch.stack(t).to(run.editor.transformer.dtype).float()
    copies = torch.tensor([copy for copy, _ in chunk.pairs])
    # In the order of Pairs.
    tensors = (copies, group.x_0[copies], torch.stack(noise), told, r[copies].float())
    return Pairs(*send_to_device(tensors, run.accelerator.device))


def pair_losses(run: Run, pairs: Pairs, cond: dict, is_pulled: bool) -> Measured:
    """The loss (B,) of each pair, and what else is worth a look: name -> (B,).

    is_pulled: to the base as well.
    """
    editor = run.editor
    settings = run.settings
    t = pairs.t[:, None, None]  # (B, 1, 1)
    x_t = (1 - t) * pairs.x_0 + t * pairs.noise  # (B, N, C)
    v = velocity(editor, x_t, pairs.t, cond)  # (B, N, C), the new policy's
    v_old = v.detach()
    if not old_is_new(editor):  # where it is, a forward would give these bits
        with torch.no_grad(), policy(editor, "old"):
            v_old = velocity(editor, x_t, pairs.t, cond)  # (B, N, C)
    loss = settings.advantage_clip * nft_loss(
        v, v_old, x_t, pairs.x_0, pairs.t, pairs.r, settings.nft_beta
    )  # (B,)
    measured = {"copy": pairs.copy, "t": pairs.t, "drift_old": (v - v_old).square().mean((1, 2))}
    if is_pulled:
        with torch.no_grad(), policy(editor, "base"):
            v_base = velocity(editor, x_t, pairs.t, cond)  # (B, N, C)
        # For Gaussian steps of equal variance the KL divergence is a squared distance.
        drift = (v - v_base).square().mean((1, 2))  # (B,)
        # The cheapest alarm for a policy that games its judge: its velocities grow long.
        norm_ratio = v.flatten(1).norm(dim=1) / v_base.flatten(1).norm(dim=1)  # (B,)
        excess = (norm_ratio - 1).relu().square()  # (B,)
        pull = settings.kl_weight * drift + settings.norm_hinge * excess
        # One of the edit's T times, by lot: T times as strong it stands for all.
        loss = loss + settings.train_timesteps * pull
        measured |= {"drift_base": drift, "norm_ratio": norm_ratio}
    return measured | {"loss": loss}


def old_is_new(editor: Editor) -> bool:
    """Whether the old policy is the new one bit for bit, as at first and after a copy."""
    old = lora_parameters(editor, "old").values()
    return all(map(torch.equal, old, lora_parameters(editor, "new").values()))


def mean_gradient(
    run: Run, groups: list[Group | None], r: Tensor, epoch: int
) -> tuple[Measured, float]:
    """Puts into new's .grad the mean gradient over all kept pairs of all ranks, clipped.

    groups, r (G, K): of all ranks. Returns what was measured of the P trained pairs, and the norm
    of the gradient before it is clipped: NaN for P = 0.
    """
    chunks = _deal_chunks(run, r)
    if not chunks:
        return {}, math.nan
    total = r.isfinite().sum().item() * run.settings.train_timesteps  # P
    trained = lora_parameters(run.editor, "new").values()
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    parts = []
    with parked(run.editor):
        for chunk in tqdm(chunks, desc=f"update {epoch + 1}", leave=False):
            with run.together(), _in_step(run):
                group = groups[chunk.number]
                pairs = draw_pairs(run, group, chunk, r[chunk.number], epoch)
                cond = send_to_device(group.cond, run.accelerator.device)
                measured = pair_losses(run, pairs, cond, chunk.is_pulled)
                (chunk.share * measured["loss"].sum() / total).backward()
                if chunk.share:
                    measured["group"] = torch.full_like(pairs.copy, chunk.number)
                    parts.append({name: values.detach() for name, values in measured.items()})

    parts = gather_object(send_to_device(parts, "cpu"))
    measured = {}
    for name in parts[0]:  # of the first chunk: pulled to the base if any is, it has all names
        measured[name] = torch.cat([part[name] for part in parts if name in part])
    grads = [parameter.grad for parameter in trained]
    total_grad = run.accelerator.reduce(parameters_to_vector(grads), "sum")  # one message a step
    vector_to_parameters(total_grad, grads)  # back into each .grad
    return measured, clip_grad_norm_(trained, GRAD_CLIP).item()


@contextmanager
def _all_or_nothing(run):
    """A step: after an error in it, all weights and AdamW's moments are what they were before."""
    weights = []
    for name in run.editor.policies:
        weights += lora_parameters(run.editor, name).values()
    before = parameters_to_vector(weights).detach()
    moments = deepcopy(run.optimizer.state_dict())
    try:
        yield
    except Exception:
        vector_to_parameters(before, weights)
        run.optimizer.load_state_dict(moments)
        raise


# ---------------------------------------------------------------- evaluation


def evaluate(run: Run, name: str) -> Results:
    """One policy's held-out edits, the same noises for every policy: a dict for each row, in order.

    `row`: its number; `judge`, `oracle`, `success`: scores, NaN where unknown, as of the last two
    are all but the toy's; `image`: the edit of the first SHOWN_ROWS, None of the others.
    """
    settings = run.settings
    jobs = draw(
        run,
        name,
        run.rows["test"],
        1,
        "eval",
        steps=settings.eval_steps,
        guidance=settings.eval_guidance,
        evaluation=True,
    )
    _await_scores(run, jobs, 1)  # and every verdict is there
    results = []
    for job in jobs:
        edit = job.group.images[0] if job.group else None
        result = {"row": job.number, "judge": job.verdict.result().score.item()}
        result["image"] = edit if job.number < SHOWN_ROWS else None
        truth = oracle(job.row, edit) if edit else None  # also of rows that are not the toy's
        result["oracle"], result["success"] = truth or (math.nan, math.nan)
        results.append(result)
    by_row = {result["row"]: result for result in gather_object(results)}  # of padding, one
    return list(by_row.values())


def _held_out_record(base, results, name):
    """Entries of a record: one policy's held-out scores, and what they gained over the base's."""
    record = {}
    for key in ("judge", "oracle", "success"):
        if any(math.isfinite(result[key]) for result in results):
            gain = paired_gain(base, results, key)
            prefix = f"heldout/{name}/{key}"
            record[prefix] = gain.pop("now")
            record |= {f"{prefix}/{part}": value for part, value in gain.items()}
    return record


def _show_edits(run, base, now, epoch):
    """A picture for samples/ and the trackers: a few held-out rows, edited by both policies.

    Its columns are the source, base's edit, now's, and the target where there is one.
    """
    pictures = []
    captions = []
    for row, before, after in zip(run.rows["test"], base, now, strict=True):
        if before["image"] and after["image"]:
            with faults_of(row, run.settings.bad_rows == "skip"):
                source = load_image(row["images"][0])
                target = load_image(row["target"]) if "target" in row else None
                pictures.append([source, before["image"], after["image"], target])
                scores = [f"base {before['judge']:.2f}", f"now {after['judge']:.2f}"]
                captions.append([row["prompt"], *scores, "target" if target else ""])
    grid = picture_grid(pictures, captions)
    with whole_file(run.out / "samples" / f"epoch-{epoch:04}.png") as part:
        grid.save(part)
    pixels = np.array(grid)[None]  # (1, height, width, 3)
    for tracker in run.accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):  # accelerate has it for some of them
            tracker.log_images({"heldout/edits": pixels}, epoch, **layout)


# ---------------------------------------------------------------- records


@contextmanager
def _timed(record, phase, device):
    """Adds the seconds of a phase to the record, and on a GPU its peak memory in GB."""
    begun = time.time()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if on_gpu:
        torch.cuda.synchronize(device)
        record[f"peak_gb/{phase}"] = torch.cuda.max_memory_allocated(device) / 1e9
    record[f"seconds/{phase}"] = time.time() - begun


def epoch_record(scores: Scores, reasons: list[str], measured: Measured, norm: float) -> dict:
    """An epoch's numbers by slash names, flat; NaN where nothing is known."""
    score = scores.score  # (G, K)
    centred = score - score.nanmean(1, keepdim=True)
    values = {  # tensors, whose mean is meant
        "reward/mean": score,
        "reward/spread": centred.square().nanmean().sqrt(),
        "judge/mass": scores.mass,
    }
    for name, term in scores.terms.items():
        values[f"reward/{name}"] = term
    for name in sorted(measured.keys() - {"group", "copy", "t"}):
        values[f"update/{name}"] = measured[name]
    if measured:
        fifths = (5 * measured["t"]).long().clamp(max=4)  # (P,) of flow time; t = 1 is in the last
        for fifth in range(5):
            values[f"loss/t{fifth}"] = measured["loss"][fifths == fifth]
    record = {name: entry.nanmean().item() for name, entry in values.items()}

    is_made = math.isfinite(norm)
    record |= {
        "judge/failed": int(score.isnan().sum()),
        "groups/kept": reasons.count("") / len(reasons),
        "grad/norm": norm,
        "steps/made": int(is_made),
        "steps/skipped": int(bool(measured) and not is_made),
    }
    names = [f"judge/failed/{cause}" for cause in scores.causes if cause]
    names += [f"groups/{reason}" for reason in reasons if reason]
    return record | Counter(names)  # name -> how often


def reward_by_task(drawn: Rows, score: Tensor) -> dict:
    """Entries of a record: the mean score of each task that rows name. score: (G, K)."""
    tasks = np.array([row.get("task", "") for row in drawn])
    named = sorted(set(tasks) - {""})
    return {f"reward/task/{task}": score[tasks == task].nanmean().item() for task in named}


def _epoch_line(record):
    """What the terminal shows of a record."""
    lines = []
    for line in SHOWN.splitlines():
        names = tuple(line.split())
        parts = [f"{name} {record[name]:.3g}" for name in record if name.startswith(names)]
        if parts:
            lines.append("  ".join(parts))
    if record["steps/skipped"]:
        lines.append("STEP SKIPPED")
    return "\n   ".join(lines)


# ---------------------------------------------------------------- checkpoints


def _save_checkpoint(run, state):
    """Writes checkpoint-{epoch}, whole or not at all; then only the newest few and the best stay.

    new lies in the folder itself, where diffusers reads it, old and ema in folders of their own.
    """
    folder = run.out / f"checkpoint-{state['epoch']}"
    with whole_folder(folder) as part:
        for name in run.editor.policies:
            save_lora(run.editor, part / name.removeprefix("new"), name)
        torch.save(run.optimizer.state_dict()["state"], part / "optimizer.pt")
        write_json(part / "state.json", state)
    run.saved = dict(state)
    prune_checkpoints(folder, run.settings.keep_checkpoints, state["best_epoch"])


def _load_checkpoint(run, state):
    """Puts back weights and state of the newest whole checkpoint, if there is one."""
    folder = from_main(run.accelerator, run.stop, newest_checkpoint, run.out)
    if folder is None:
        return
    with run.together():
        if not folder.exists():
            raise BadInput(f"{folder}: is not on this node; copy it there")
        stored = read_json(folder / "state.json")
        changes = changed(stored["settings"], state["settings"], HARMLESS)
        if changes and not run.settings.force:
            raise BadInput(f"{folder}: {'; '.join(changes)}; give what it was, or --force true")
        for name in run.editor.policies:
            load_lora(run.editor, folder / name.removeprefix("new"), name)
        # AdamW's moments; its learning rate stays today's, as --force may have changed it.
        moments = torch.load(folder / "optimizer.pt", "cpu")
        run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": moments})
    for change in changes:
        run.accelerator.print(f"resuming although {change}")
    run.saved = stored
    state |= stored | {"settings": state["settings"]}  # but today's settings


def fresh_state(run: Run) -> dict:
    """The state of a run before its first epoch."""
    return {
        "epoch": 0,  # finished so far
        "logged": 0,  # epochs evaluated, where that is due, and logged
        "record": {},  # of the last finished epoch
        "bad_steps": 0,  # in a row
        "silent_epochs": 0,  # in a row
        "best": -1.0,  # held-out score
        "best_epoch": 0,
        "run": secrets.token_hex(11)[:21],  # names it to trackers; swanlab wants 21 characters
        "settings": asdict(run.settings) | {"rows": fingerprint(run.rows["train"])},
    }


def _open_records(run, state):
    """The run's folder and its trackers as they were after the last epoch that is logged."""
    with run.together():
        if run.accelerator.is_main_process:
            write_json(run.out / "config.json", state["settings"])
            keep_epochs(run.out / "log.jsonl", state["logged"])
        start_trackers(run.accelerator, state["settings"], state["run"], state["logged"])


# ---------------------------------------------------------------- before and after an epoch


def _set_up(argv, scratch):
    """The settings of a command line, and this process's place among the ranks.

    scratch: a folder for what a dry run writes.
    """
    settings = parse_settings(Settings, argv, __doc__.splitlines()[0])
    is_toy = not settings.base
    if is_toy:  # once more, with other defaults
        settings = parse_settings(Settings, argv, **TOY)
    if not settings.data:
        raise BadInput("--data is missing; name a folder with train.jsonl and test.jsonl")
    if settings.dry_run:
        settings = replace(
            settings,
            out=scratch,
            epochs=1,
            eval_rows=1,
            bad_rows="stop",
            resume="never",
            report_to="none",
        )
    log = Path(settings.out) / "log.jsonl"
    check_names(Path.is_file, log.with_name("config.json"), log)
    check_names(Path.is_dir, log.with_name("samples"))
    holds_run = checkpoints_in(log.parent) or log.exists()
    if holds_run and settings.resume == "never":
        raise BadInput(f"{settings.out}: holds a run already; give --resume auto or another --out")
    accelerator = start_processes(settings.out, settings.report_to)
    ranks = accelerator.num_processes
    if settings.dry_run:
        settings = replace(settings, groups=ranks)
    if settings.groups % ranks:
        raise BadInput(f"--groups {settings.groups}: not divisible by {ranks} processes")
    if is_toy:
        with accelerator.main_process_first():
            build_toy(ToySettings())
    return settings, accelerator


def _load_all(settings, accelerator, stop):
    """The Run: data, editor, judge and optimizer; BadInput for one that cannot serve."""
    skip = settings.bad_rows == "skip"
    rows = load_rows(settings.data, skip, accelerator)
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    editor = load_editor(
        settings.base,
        "cpu" if settings.shard else accelerator.device,
        dtype,
        settings.resolution,
        settings.trust_remote_code,
    )
    editor.pipe.scheduler.solver_order = settings.solver_order
    steps = settings.rollout_steps or editor.family.rollout_steps
    settings = replace(settings, rollout_steps=steps)
    if settings.train_timesteps > steps:
        raise BadInput(
            f"--train_timesteps {settings.train_timesteps}: above --rollout_steps {steps}"
        )
    rows["test"] = rows["test"][: settings.eval_rows]
    keep_faultless(rows, partial(check_row, editor), skip)
    add_policies(
        editor,
        settings.lora_rank,
        settings.lora_alpha,
        settings.lora_targets,
        settings.seed,
        ("old", "ema") if settings.ema_decay else ("old",),
        settings.start_lora,
    )
    if settings.shard:
        shard_base(editor, accelerator)
    judge = load_judge(settings, accelerator.device, dtype, stop)
    trained = lora_parameters(editor, "new").values()
    optimizer = torch.optim.AdamW(trained, settings.lr, weight_decay=WEIGHT_DECAY)
    check_editor(editor, rows["train"][0])
    check_judge(judge, rows["train"])
    judge.noise = max(gather_object([judge.noise]))  # so that all ranks drop the same groups
    run = Run(settings, accelerator, stop, rows, editor, judge, optimizer, saved={})
    _fit_machine(run)
    return run


def _fit_machine(run):
    """Saves memory where an update asks for it, compiles, and makes forwards heed a signal."""
    editor = run.editor
    settings = run.settings
    transformer = editor.transformer
    on_gpu = run.accelerator.device.type == "cuda"
    if settings.offload and on_gpu:
        # All on the transformer's GPU but itself; a judge may have a GPU of its own.
        parts = [*editor.pipe.components.values(), getattr(run.judge, "model", None)]
        idle = [part for part in parts if getattr(part, "device", None) == transformer.device]
        idle.remove(transformer)
        editor.idle = idle
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        if on_gpu and not settings.shard:
            # 5 % are left for AdamW's moments and larger rows.
            torch.cuda.set_per_process_memory_fraction(0.95)
            _try_update(run)
            torch.cuda.set_per_process_memory_fraction(1.0)
    if settings.compile and on_gpu:
        compile_blocks(editor)
    if not settings.shard:  # of a sharded base no rank may leave a forward alone
        heed_stop(transformer, run.stop)


def _try_update(run):
    """Finds out by trial what updates must do to fit into memory, does it, and says it."""
    editor = run.editor
    row = max(run.rows["train"], key=lambda row: len(row["images"]))
    group = rollout(editor, load_sources(row), row["prompt"], [seeded(0)], steps=1)

    def trial(batch):
        x_t = group.x_0.expand(batch, -1, -1)  # (B, N, C)
        with parked(editor):
            velocity(editor, x_t, group.sigmas.expand(batch), group.cond).sum().backward()

    batch, recomputed = fit_memory(editor, run.settings.train_batch, trial)
    run.optimizer.zero_grad()
    batch = min(gather_object([batch]))  # so that all ranks cut the same chunks
    run.settings = replace(run.settings, train_batch=batch)
    parts = ", ".join(type(part).__name__ for part in editor.idle)
    say_once(
        f"updates: {batch} pairs a forward; parked: {parts or 'nothing'}; recomputed: "
        f"{', '.join(recomputed) or 'nothing'}"
    )


def close_epoch(run: Run, state: dict, base: Rows):
    """Evaluates, logs and saves a finished epoch, as far as that is due.

    Its record is in the state, so that a run stopped before this is done does it when resumed.
    """
    settings = run.settings
    epoch = state["epoch"]
    record = dict(state["record"])
    is_last = epoch == settings.epochs
    results = {}
    if is_last or epoch % settings.eval_every == 0:
        # new is what the user will keep; the others only at the end.
        for name in run.editor.policies if is_last else ["new"]:
            results[name] = evaluate(run, name)
            record |= _held_out_record(base, results[name], name)
    known = {key: value for key, value in record.items() if math.isfinite(value)}  # no NaN
    score = known.get("heldout/new/judge", -1.0)
    is_best = score > state["best"]
    with run.together():
        if run.accelerator.is_main_process:
            if results:
                _show_edits(run, base, results["new"], epoch)
            append_json_line(run.out / "log.jsonl", known)
            say(_epoch_line(known))
            run.accelerator.log(known, epoch)
        state["logged"] = epoch
        if is_best:
            state |= {"best": score, "best_epoch": epoch}
        # A rank that hangs in a sharded forward could not save: there every epoch is saved.
        is_due = any([is_best, settings.shard, epoch % settings.save_every == 0])
        if run.accelerator.is_main_process and is_due:
            _save_checkpoint(run, state)


def refuse_hopeless(run: Run, state: dict, record: dict, measured: Measured, drawn: Rows):
    """BadInput after three bad steps in a row (see bad-steps.json), or HOPELESS epochs in a row."""
    exploded = EXPLODED * run.settings.advantage_clip
    is_bad = (
        record["steps/skipped"]
        or record.get("update/loss", 0.0) > exploded
        or record.get("update/drift_base", 0.0) > FARTHEST
    )
    state["bad_steps"] = state["bad_steps"] + 1 if is_bad else 0
    state["silent_epochs"] = 0 if record["groups/kept"] else state["silent_epochs"] + 1
    if state["bad_steps"] >= 3:
        pairs = {name: values.tolist() for name, values in measured.items()}
        pairs["row"] = [drawn[number]["id"] for number in pairs["group"]]
        write_json(run.out / "bad-steps.json", pairs)
        raise BadInput(
            f"three steps in a row were not finite, had a loss above {exploded:g} or a drift above "
            f"{FARTHEST:g}; {run.out}/bad-steps.json has the last one's rows and times; lower --lr "
            "or mend those rows, remove the checkpoints since then and go on with --resume auto"
        )
    if state["silent_epochs"] >= HOPELESS:
        kinds = ("groups/", "judge/failed/")
        counts = {name: record[name] for name in record if name.startswith(kinds)}
        raise BadInput(
            f"nothing was kept for {HOPELESS} epochs in a row (of the last one: {counts}): all "
            "rows are solved, or the judge tells no edits apart; see to --judge, --filter and "
            "--guidance"
        )


# ---------------------------------------------------------------- Algorithm 1


def run_epochs(run: Run, state: dict):
    """The method: epoch after epoch, from the one that the state names."""
    settings = run.settings
    device = run.accelerator.device
    least_spread = max(LEAST_SPREAD, 3 * run.judge.noise)
    base = evaluate(run, "base")
    if state["logged"] < state["epoch"]:
        close_epoch(run, state, base)

    for epoch in tqdm(range(state["epoch"], settings.epochs), desc="epochs"):
        record = {"epoch": epoch + 1}

        # ---------------- rollout: the old policy draws K edits of each row
        # Rows and noises are functions of the epoch's number, so that a resumed run goes on
        # as if it had never stopped, and many ranks draw what one would.
        rows = run.rows["train"]
        numbers = rows_of_epoch(settings.groups, len(rows), settings.seed, epoch)
        drawn = [rows[number] for number in numbers]  # G
        with _timed(record, "rollout", device):
            jobs = draw(
                run,
                "old",
                drawn,
                settings.group_size,
                "rollout",
                epoch,
                steps=settings.rollout_steps,
                guidance=settings.guidance,
            )

        # ---------------- reward: every rank learns all scores, and gets all edits' latents
        with _timed(record, "reward", device):
            scores = _await_scores(run, jobs, settings.group_size)
            mine = [job.group.for_training() if job.group else None for job in jobs]
            groups = gather_object(mine)  # G

        # ---------------- filter: silent groups are dropped, other scores become optimality
        r, reasons = group_advantages(scores.score, settings, least_spread)  # r: (G, K)
        if settings.normalise_aspects:
            # Of the edits that are left, by their aspects.
            joined = _join_standardised(scores.terms, run.judge.weights)
            joined = joined.masked_fill(r.isnan(), torch.nan)
            r, _ = group_advantages(joined, replace(settings, filter="none"))
        if settings.dry_run:  # whatever the judge says, a full step is to be measured
            r = torch.linspace(0, 1, settings.group_size).expand_as(r)

        # ---------------- update: one step towards good edits, away from bad ones
        with _timed(record, "update", device):
            measured, norm = mean_gradient(run, groups, r, epoch)
        record |= epoch_record(scores, reasons, measured, norm)
        record |= reward_by_task(drawn, scores.score)

        # ---------------- the step; old follows: at once in the first epochs, later more slowly,
        # for fresh data while the policy moves fast, and a steady anchor once it is good
        record["old_decay"] = min(settings.decay_rate * (epoch + 1), settings.decay_max)
        if epoch < settings.decay_start:
            record["old_decay"] = 0.0
        with run.together(), _all_or_nothing(run):  # what is saved is always a whole epoch
            if math.isfinite(norm):
                run.optimizer.step()
            soft_update(run.editor, record["old_decay"])
            if settings.ema_decay:  # of few epochs at first, or its beginning would weigh too long
                ema_decay = min(settings.ema_decay, (1 + epoch) / (10 + epoch))
                soft_update(run.editor, ema_decay, "ema")
            state |= {"epoch": epoch + 1, "record": record}

        # ---------------- records; a run that cannot learn ends
        close_epoch(run, state, base)
        with run.together():
            refuse_hopeless(run, state, record, measured, drawn)


def train(run: Run):
    """A run to its end, or to a stop. Whatever is raised, the last finished epoch is saved."""
    state = fresh_state(run)
    fault = None
    with closing(run.judge):
        try:
            _load_checkpoint(run, state)
            _open_records(run, state)
            run_epochs(run, state)
        except Stopped as stopped:
            fault = stopped.__cause__  # None: a signal, or another rank reports the error
        finally:
            if run.accelerator.is_main_process and state["epoch"] and state != run.saved:
                _save_checkpoint(run, state)
    run.accelerator.wait_for_everyone()  # one that leaves early would break the others' messages
    run.accelerator.end_training()
    if run.accelerator.is_main_process and state["logged"] < run.settings.epochs:
        say(
            f"stopped after epoch {state['epoch']} of {run.settings.epochs}, evaluated and logged "
            f"up to {state['logged']}; go on with --resume auto"
        )
    if fault:
        raise fault


def main(argv: list[str] | None = None):
    with TemporaryDirectory() as scratch:
        settings, accelerator = _set_up(argv, scratch)
        stop = catch_signals()  # not before: until here there is nothing to save
        with locked(settings.out, accelerator.is_main_process):
            train(_load_all(settings, accelerator, stop))


if __name__ == "__main__":
    run_script(main)
