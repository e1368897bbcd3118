"""One epoch side by side: this project's against a plain rendering of the released trainer's.

    python tests/bench_epoch.py                 # two CPU cores, some 5 minutes; leave them alone
    python tests/bench_epoch.py --count         # forwards only, on a tiny model

Both draw and train 2 groups of 6 edits with one Kontext-class editor (real classes, random weights,
large enough to be bound by its arithmetic), the same rows, noises, trained times and given scores,
once with both groups kept and once with one of them dropped. `plain` is written for this comparison
and has what makes the released trainer slow: micro-batches of 3 copies, text and source encoded for
each copy, every edit trained under a mask, the base's forward at every time, recompute in every
backward. Ours encodes once a group, leaves out what was dropped, recomputes with --recompute only.
Unlike the released code, plain divides by the kept pairs of the whole epoch: without the pull to
the base both then have the same gradient, which is checked first.
"""

import argparse
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import tiny_kontext
from diffusers import FluxTransformer2DModel
from full_size import make_run
from PIL import Image
from pretended_gpu import CPU, Meter
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import train_nft
from data_prep import seeded
from sample import lora_parameters, policy, rollout, working_size

MICRO_BATCH = 3
GROUPS, COPIES = 2, 6
KINDS = ("rollout", "old", "new", "base", "again")  # again: what backward computes once more
GOALS = {"everything": 1.35, "half": 2.2}

# ---------------------------------------------------------------- the model and its work


def mid_size_kontext():
    """A FluxKontextPipeline whose transformer has 21 million weights in 6 blocks."""
    pipe = tiny_kontext()
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=6,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    return type(pipe)(**pipe.components | {"transformer": transformer})


def make_work(folder, is_tiny, recompute):
    """A Run whose policies differ from each other and from the base, as later in a training."""
    settings = train_nft.Settings(
        base="x",
        data="x",
        judge="local:x",
        resolution=32 if is_tiny else 64,
        groups=GROUPS,
        group_size=COPIES,
        rollout_steps=6,
        lora_rank=8,
        lora_alpha=8,
        gradient_checkpointing=recompute,
    )
    pipe = tiny_kontext() if is_tiny else mid_size_kontext()
    run = make_run(pipe, settings, Meter(CPU), folder)
    for name in run.editor.policies:
        for key, parameter in lora_parameters(run.editor, name).items():
            if "lora_B" in key:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=seeded(name, key))
    return run


def sources_of(run, number):
    """The source picture of a group: each group has its own."""
    side = run.settings.resolution
    noise = torch.rand(side, side, 3, generator=seeded("source", number))
    return [Image.fromarray((255 * noise).byte().numpy())]


def noises_of(run, number, epoch):
    keys = [(run.settings.seed, "rollout", epoch, number, copy) for copy in range(COPIES)]
    return [seeded(*key) for key in keys]


def given_scores(kept):
    """r (G, K) of groups whose edits are good and bad by turns; of half of them nothing is kept."""
    r = torch.linspace(0, 1, COPIES).repeat(GROUPS, 1)
    if kept == "half":
        r[: GROUPS // 2] = torch.nan
    return r


PROMPT = "make the red circle blue"

# ---------------------------------------------------------------- ours


class Ours:
    """The project's own rollout and update."""

    def draw(self, run, epoch):
        settings = run.settings
        groups = []
        with policy(run.editor, "old"):
            for number in range(GROUPS):
                group = rollout(
                    run.editor,
                    sources_of(run, number),
                    PROMPT,
                    noises_of(run, number, epoch),
                    settings.rollout_steps,
                    rollout_batch=settings.rollout_batch,
                )
                groups.append(group.for_training())
        return groups

    def update(self, run, groups, r, epoch):
        train_nft.mean_gradient(run, groups, r, epoch)


# ---------------------------------------------------------------- the plain trainer


@dataclass
class MicroBatch:
    """B copies of one group, with everything stored for each of them."""

    number: int  # of the group
    copies: list  # B of their numbers
    x_0: Tensor  # (B, N, C)
    cond: dict  # the transformer's arguments, (B, ...) each
    sigmas: Tensor  # (steps,)


class Plain:
    """How the released trainer works, in our own words."""

    def draw(self, run, epoch):
        batches = []
        with policy(run.editor, "old"):
            for number in range(GROUPS):
                noises = noises_of(run, number, epoch)
                for first in range(0, COPIES, MICRO_BATCH):
                    copies = list(range(COPIES))[first : first + MICRO_BATCH]
                    some = [noises[copy] for copy in copies]
                    batches.append(self.draw_some(run, number, copies, some))
        return batches

    def draw_some(self, run, number, copies, noises):
        """One call of the pipeline, which encodes prompt and source once for each copy."""
        editor = run.editor
        calls = []

        def listen(module, args, kwargs):
            calls.append(kwargs)

        (source,) = sources_of(run, number)
        width, height = working_size(editor, source)
        with editor.transformer.register_forward_pre_hook(listen, with_kwargs=True):
            editor.pipe(
                image=[source] * len(copies),
                prompt=[PROMPT] * len(copies),
                generator=noises,
                num_inference_steps=run.settings.rollout_steps,
                guidance_scale=editor.family.rollout_guidance,
                height=height,
                width=width,
                max_area=height * width,
                _auto_resize=False,
                max_sequence_length=editor.max_text,
            )
        x_0 = editor.pipe.scheduler.last_x.float()  # (B, N, C)
        sigmas = torch.stack([arguments["timestep"][0] for arguments in calls])
        cond = dict(calls[0])
        del cond["timestep"]
        cond["hidden_states"] = cond["hidden_states"][:, x_0.shape[1] :]  # (B, S, C)
        return MicroBatch(number, copies, x_0, cond, sigmas)

    def update(self, run, batches, r, epoch):
        """Leaves the clipped mean gradient, as train_nft.mean_gradient does."""
        settings = run.settings
        kept = r.isfinite().sum().item() * settings.train_timesteps
        trained = list(lora_parameters(run.editor, "new").values())
        for parameter in trained:
            parameter.grad = None
        run.editor.transformer.enable_gradient_checkpointing()
        for batch in batches:
            mask = r[batch.number, batch.copies].isfinite()  # (B,)
            optimality = r[batch.number, batch.copies].nan_to_num(0.5)  # (B,)
            for x_t, t in self.noised(run, batch, epoch):
                loss = self.losses(run, batch, x_t, t, optimality)  # (B,)
                (loss.where(mask, 0).sum() / kept).backward()
        if not settings.gradient_checkpointing:
            run.editor.transformer.disable_gradient_checkpointing()
        clip_grad_norm_(trained, train_nft.GRAD_CLIP)

    def noised(self, run, batch, epoch):
        """x_t (B, N, C) and t (B,) of each trained time; their draws are named as in draw_pairs."""
        times = run.settings.train_timesteps
        orders = []
        noises = []
        for copy in batch.copies:
            draws = seeded(run.settings.seed, "train", epoch, batch.number, copy)
            orders.append(torch.randperm(len(batch.sigmas), generator=draws))
            noises.append(torch.randn(times, *batch.x_0.shape[1:], generator=draws))
        for pick in range(times):
            t = batch.sigmas[torch.stack(orders)[:, pick]]  # (B,)
            noise = torch.stack(noises)[:, pick]  # (B, N, C)
            level = t[:, None, None]
            yield (1 - level) * batch.x_0 + level * noise, t

    def losses(self, run, batch, x_t, t, r):
        settings = run.settings
        with torch.no_grad():
            with policy(run.editor, "old"):
                v_old = self.velocity(run, batch, x_t, t)
            with policy(run.editor, "base"):
                v_base = self.velocity(run, batch, x_t, t)
        v = self.velocity(run, batch, x_t, t)
        loss = train_nft.nft_loss(v, v_old, x_t, batch.x_0, t, r, settings.nft_beta)
        distance = (v - v_base).square().mean((1, 2))  # (B,)
        return settings.advantage_clip * loss + settings.kl_weight * distance

    def velocity(self, run, batch, x_t, t):
        arguments = dict(batch.cond)
        arguments["hidden_states"] = torch.cat([x_t, batch.cond["hidden_states"]], dim=1)
        v = run.editor.transformer(timestep=t, **arguments)[0]  # (B, N + S, C)
        return v[:, : x_t.shape[1]]


# ---------------------------------------------------------------- what is compared


def gradient(run, trainer, r):
    """The gradient that a trainer leaves, without the pull to the base: {name: tensor}."""
    run = replace(run, settings=replace(run.settings, kl_weight=0.0))
    trainer.update(run, trainer.draw(run, 0), r, 0)
    grads = {}
    for key, parameter in lora_parameters(run.editor, "new").items():
        grads[key] = parameter.grad.clone()
    return grads


def farthest(run, r):
    """The largest difference of both gradients, beside the largest entry of ours."""
    ours = gradient(run, Ours(), r)
    plain = gradient(run, Plain(), r)
    largest = max(grad.abs().max() for grad in ours.values())
    differences = [(ours[key] - plain[key]).abs().max() for key in ours]
    return (max(differences) / largest).item()


@contextmanager
def counted(editor, forwards, drawing):
    """Within, edits that go through the transformer are added to forwards, by kind.

    drawing: all of them are for the rollout; else they are the active policy's, or backward's.
    """
    blocks = editor.transformer.transformer_blocks
    running = []  # the forward under way: none while backward computes blocks again

    def begin(module, args, kwargs):
        running.append(module)
        kind = "rollout" if drawing else editor.active
        forwards[kind] += len(kwargs["hidden_states"])

    def end(module, args, output):
        running.pop()

    def begin_block(module, args, kwargs):
        if not running:
            first, *_ = [*args, *kwargs.values()]  # hidden_states, (B, tokens, width)
            forwards["again"] += len(first)

    with (
        editor.transformer.register_forward_pre_hook(begin, with_kwargs=True),
        editor.transformer.register_forward_hook(end),
        blocks[0].register_forward_pre_hook(begin_block, with_kwargs=True),
    ):
        yield


@dataclass
class Epoch:
    """What one epoch took."""

    forwards: Counter  # kind -> edits
    drawing: float  # seconds
    update: float

    @property
    def seconds(self):
        return self.drawing + self.update


def one_epoch(run, trainer, r, number):
    """Draws and trains: an Epoch."""
    forwards = Counter()
    begun = time.perf_counter()
    with counted(run.editor, forwards, drawing=True):
        drawn = trainer.draw(run, number)
    middle = time.perf_counter()
    with counted(run.editor, forwards, drawing=False):
        trainer.update(run, drawn, r, number)
    return Epoch(forwards, middle - begun, time.perf_counter() - middle)


def compare(run, kept, rounds):
    """Pairs of epochs, one by each trainer, in turn first: [{"ours": Epoch, "plain": Epoch}]."""
    trainers = {"ours": Ours(), "plain": Plain()}
    r = given_scores(kept)
    pairs = []
    for number in range(rounds):
        order = list(trainers)
        if number % 2:
            order.reverse()
        pairs.append({name: one_epoch(run, trainers[name], r, number) for name in order})
    return pairs


def report(kept, pairs, is_timed):
    """Prints a row for each trainer, and their ratio."""
    for name in ("ours", "plain"):
        epochs = [pair[name] for pair in pairs]
        cells = [f"{name}, {kept} kept"]
        cells += [str(epochs[0].forwards[kind]) for kind in KINDS]
        if is_timed:
            cells.append(f"{median(epoch.drawing for epoch in epochs):.1f}")
            cells.append(f"{median(epoch.update for epoch in epochs):.1f}")
        print(f"| {' | '.join(cells)} |")
    if is_timed:
        ratio = median(pair["plain"].seconds / pair["ours"].seconds for pair in pairs)
        goal = GOALS[kept]
        print(f"\nratio, {kept} kept: {ratio:.2f} (goal {goal}), median of {len(pairs)} pairs\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of epochs timed")
    parser.add_argument("--count", action="store_true", help="forwards only, on a tiny model")
    parser.add_argument("--recompute", action="store_true", help="in ours too")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        run = make_work(folder, args.count, args.recompute)
        print(f"gradients differ by {farthest(run, given_scores('half')):.1e} of the largest entry")
        head = [f"{GROUPS} x {COPIES} edits", *(f"{kind} forwards" for kind in KINDS)]
        if not args.count:
            head += ["s drawing", "s update"]
        for kept in GOALS:
            pairs = compare(run, kept, 1 if args.count else args.rounds)
            print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
            report(kept, pairs, is_timed=not args.count)


if __name__ == "__main__":
    main()
