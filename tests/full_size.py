"""Memory, arithmetic and time of full-size editors, by phase of an epoch. No downloads, no GPU.

    python tests/full_size.py                                   # three editors, some minutes
    python tests/full_size.py --models kontext --set resolution=1024 group_size=24
    python tests/full_size.py --card 76          # saves only the memory that such a card asks for
    python tests/full_size.py --measure [--cap 24] [--set compile=true]      # on a CUDA card

Editors of the released sizes (random weights, bf16) go through this project's own rollout, update
and evaluation: one group with train_nft's defaults, K = 12, 512 x 512, the family's solver steps,
5 trained times, LoRA of rank 32, all that saves memory. Without --measure on a GPU that is only
pretended (pretended_gpu.py), and an epoch is the group times their number: memory and FLOPs are
those of eager code, what kernels need inside themselves is left out, and hours are the FLOPs at a
stated share of the card's peak (MFU).
With --measure on the card, second group, after a warm-up; then MFU is what comes out. --cap N lets
the process have N GB (10^9 bytes) of the card, to see whether a smaller one would do.

encode: text encoders and VAE encoder; denoise and decode: the rest of drawing; old, new, base: the
update's forwards; backward: with what it computes again; step: the optimizer and the averages;
offload: what moves back to the GPU after the update. The judge is counted apart: it has a card of
its own, or adds to the peak of drawing.
"""

import argparse
import dataclasses
import functools
import gc
import math
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import Accelerator
from conftest import tiny_editor
from PIL import Image
from pretended_gpu import CPU, GPU, Count, Meter, pretended_gpu
from released import NAMES, build_editor, build_judge
from rule_judge import RuleJudge

import sample
import train_nft
from data_prep import Stopped, parse_settings

DRAWING = ("encode", "denoise", "decode")
TRAINING = ("old", "new", "base", "backward", "step")
H100 = 989e12  # FLOP/s in bf16
A800 = 312e12
PAPER_EPOCHS = 500  # how far the paper's curves run
RANKS = (1, 2, 3, 8, 24)
AUTHORS = 0.06  # edits/s and GPU of the released code, on A800

# ---------------------------------------------------------------- one epoch of one group


@contextmanager
def watched(meter, pipe):
    """Within, the parts of an epoch of train_nft.run_epochs are phases of a meter.

    Of an epoch that another one follows, the warm-up, nothing is kept. The judge, records and
    held-out edits of other policies than `new` are left out.
    """

    def timed(call, phase):
        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            if meter.phase == "evaluate":  # has its own encoding, denoising and decoding
                return call(*args, **kwargs)
            with meter.within(phase):
                return call(*args, **kwargs)

        return wrapper

    def velocity(editor, *args):
        with meter.within(editor.active):
            return sample.velocity(editor, *args)

    @contextmanager
    def parked(editor):
        outer = meter.phase
        meter.switch("parking")  # makes copies the first time alone, and is left out
        with moved(editor.idle) if meter.device == GPU else sample.parked(editor):
            meter.switch(outer)
            yield
            meter.switch("offload")
        meter.switch(outer)

    def close_epoch(run, state, base):
        if state["epoch"] < run.settings.epochs:
            meter.figures.clear()
            return
        with meter.within("evaluate"):
            evaluate(run, "new")

    evaluate = train_nft.evaluate
    parts = {
        "rollout": timed(train_nft.rollout, "denoise"),
        "mean_gradient": timed(train_nft.mean_gradient, "backward"),
        "velocity": velocity,
        "parked": parked,
        "close_epoch": close_epoch,
        "evaluate": lambda *args: [],
        "old_is_new": lambda editor: False,  # as in all epochs but the first
        "refuse_hopeless": lambda *args: None,
    }
    encoders = [pipe.components.get(name) for name in ("text_encoder", "text_encoder_2")]
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(train_nft, **parts))
        for name in ("encode", "decode"):
            call = timed(getattr(pipe.vae, name), name)
            stack.enter_context(patch.object(pipe.vae, name, call))
        for encoder in filter(None, encoders):
            call = timed(encoder.forward, "encode")
            stack.enter_context(patch.object(encoder, "forward", call))
        yield


@contextmanager
def moved(parts):
    """sample.parked on the pretended GPU, whose tensors cannot change their place themselves."""
    for part in parts:
        part.to(CPU)
    try:
        yield
    finally:
        for part in parts:
            part.to(GPU)


class OnDevice(Accelerator):
    """One process on any device, a pretended one too."""

    def __init__(self, device):
        self.place = device
        super().__init__(cpu=device.type != "cuda")

    @property
    def device(self):
        return self.place


def make_run(pipe, settings, meter, folder):
    """A train_nft.Run of one row with a pipeline that is built already.

    On a pretended GPU whose memory is limited it saves what its updates ask for, else all it can.
    """
    device = meter.device
    source = Path(folder, "source.png")
    Image.new("RGB", (settings.resolution, settings.resolution)).save(source)
    row = {"id": "0", "prompt": "make the red circle blue", "image": source.name}
    row["images"] = [str(source)]
    with patch.object(sample, "_load_pipeline", lambda *args: pipe):
        editor = sample.load_editor(settings.base, device, resolution=settings.resolution)
    sample.add_policies(editor, settings.lora_rank, settings.lora_alpha, averages=("old", "ema"))
    editor.transformer.to(device)  # peft leaves a LoRA on the CPU if the base is on meta
    if settings.offload and device != CPU:
        parts = pipe.components.values()
        parts = [part for part in parts if isinstance(part, torch.nn.Module)]
        editor.idle = [part for part in parts if part is not editor.transformer]
    if settings.gradient_checkpointing:
        editor.transformer.enable_gradient_checkpointing()
    if settings.compile and device.type == "cuda":
        sample.compile_blocks(editor)
    trained = sample.lora_parameters(editor, "new").values()
    optimizer = torch.optim.AdamW(trained, settings.lr)
    rows = {"train": [row], "test": [row]}
    run = train_nft.Run(
        settings, OnDevice(device), Event(), rows, editor, RuleJudge(), optimizer, saved={}
    )
    if device == GPU and settings.gradient_checkpointing and math.isfinite(meter.limit):
        train_nft._try_update(run)
        meter.switch("loading")
        meter.figures.clear()
    return run


def run_model(model, settings, meter, epochs=1, is_tiny=False):
    """Fills a meter with the last of so many epochs of one group, all of it trained."""
    settings = dataclasses.replace(settings, groups=1, eval_rows=1, epochs=epochs, dry_run=True)
    device = meter.device
    with TemporaryDirectory() as folder, ExitStack() as stack:
        if device == GPU:
            stack.enter_context(pretended_gpu())
            stack.enter_context(Count(meter))
        pipe = tiny_editor(NAMES[model][1]) if is_tiny else build_editor(model, device)
        pipe.to(device)
        stack.enter_context(watched(meter, pipe))
        run = make_run(pipe, settings, meter, folder)
        with meter.within("step"):
            train_nft.run_epochs(run, train_nft.fresh_state(run))


def judge_figures(size, edits, side):
    """Figures of one group before a judge: source and edit a chat, 150 tokens of text, one word."""
    meter = Meter(GPU)
    patches = side // 28 * 2  # of 14 pixels, in a side
    pictures = 2 * edits
    tokens = (patches // 2) ** 2  # of a picture
    with pretended_gpu(), Count(meter), torch.no_grad():
        model = build_judge(size, GPU)
        picture = torch.full((edits, 1 + tokens), model.config.image_token_id)
        picture[:, 0] = model.config.vision_start_token_id
        ids = torch.cat([torch.full((edits, 150), 5), picture, picture], dim=1)  # (B, L)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
            "pixel_values": torch.zeros(pictures * patches**2, 1176, dtype=torch.bfloat16),
            "image_grid_thw": torch.tensor([[1, patches, patches]] * pictures),
        }
        inputs = {name: value.to(GPU) for name, value in inputs.items()}
        with meter.within("judge"):
            model(**inputs, use_cache=False, logits_to_keep=1)
    return meter.figures["judge"]


# ---------------------------------------------------------------- what an epoch costs


def steps_of(model, settings):
    """Solver steps of its rollouts: those of the settings, or the family's."""
    return settings.rollout_steps or sample.FAMILIES[NAMES[model][1]].rollout_steps


def flops_of(figures):
    return sum(figures.flops.values())


def highest(meter, phases):
    """Peak in GB."""
    return max(meter.figures[phase].peak for phase in phases) / 1e9


def times_an_epoch(settings):
    """How often an epoch has what was counted by phase: for one group, one held-out edit."""
    times = dict.fromkeys((*DRAWING, *TRAINING), settings.groups) | {"step": 1}
    times["evaluate"] = settings.eval_rows / settings.eval_every
    return times


def epoch_flops(meter, settings):
    """FLOPs of an epoch by phase."""
    times = times_an_epoch(settings)
    return {phase: times[phase] * flops_of(meter.figures[phase]) for phase in times}


def epoch_share_of(dtype, meter, settings):
    """The share of an epoch's FLOPs that are done in a dtype."""
    done = 0
    for phase, times in times_an_epoch(settings).items():
        done += times * meter.figures[phase].flops[dtype]
    return done / sum(epoch_flops(meter, settings).values())


def epoch_copies(meter, settings):
    """GB between CPU and GPU in an epoch: the offload once, the rest with each group."""
    times = times_an_epoch(settings)
    copied = meter.figures["offload"].copied
    for phase in (*DRAWING, *TRAINING):
        copied += times[phase] * meter.figures[phase].copied
    return copied / 1e9


def flops_on_slowest(meter, settings, ranks):
    """FLOPs of an epoch on the rank that has most to do.

    Groups are drawn whole; chunks are dealt, those with the pull to the base by themselves.
    """
    pulled = settings.groups * math.ceil(settings.group_size / settings.train_batch)
    others = settings.group_size * (settings.train_timesteps - 1)  # pairs of a group
    others = settings.groups * math.ceil(others / settings.train_batch)
    units = dict.fromkeys(DRAWING, [settings.groups]) | dict.fromkeys(TRAINING, [pulled, others])
    units |= {"base": [pulled], "step": [1], "evaluate": [settings.eval_rows]}
    flops = 0
    for phase, whole in epoch_flops(meter, settings).items():
        on_slowest = sum(math.ceil(number / ranks) for number in units[phase])
        flops += whole * on_slowest / sum(units[phase])
    return flops


# ---------------------------------------------------------------- tables


def print_table(head, rows):
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |", flush=True)
    print()


def print_simulated(meters, settings, mfu):
    judges = {}
    for size in ("7B", "32B"):
        judges[size] = judge_figures(size, settings.group_size, settings.resolution)
    print(
        f"Simulated, not measured: eager code, {settings.groups} x {settings.group_size} edits an "
        f"epoch at {settings.resolution} pixels, all kept; one H100 at {mfu:.0%} MFU. A judge on "
        f"the same card adds {judges['7B'].peak / 1e9:.0f} GB (Qwen2.5-VL-7B; 32B: "
        f"{judges['32B'].peak / 1e9:.0f} GB) to the peak of drawing; it leaves for updates.\n"
    )
    print_costs(meters, settings, mfu)
    print_shares(meters, settings, judges)
    print_parts(meters, settings, judges)
    print_ranks(meters, settings, mfu)


def print_costs(meters, settings, mfu):
    head = ["simulated", "steps", "GB drawing", "GB training", "GB copied an epoch"]
    head += ["PFLOP an epoch"]
    head += ["in float32", "hours an epoch", "edits/s", f"GPU hours, {PAPER_EPOCHS} epochs"]
    rows = []
    for model, meter in meters.items():
        flops = sum(epoch_flops(meter, settings).values())
        hours = flops / (mfu * H100) / 3600
        edits = settings.groups * settings.group_size / hours / 3600  # per second
        cells = [NAMES[model][0], str(steps_of(model, settings))]
        cells += [f"{highest(meter, phases):.1f}" for phases in (DRAWING, TRAINING)]
        cells += [f"{epoch_copies(meter, settings):.1f}"]
        cells += [f"{flops / 1e15:.0f}", f"{epoch_share_of(torch.float32, meter, settings):.1%}"]
        cells += [f"{hours:.2f}", f"{edits:.2f}", f"{PAPER_EPOCHS * hours:.0f}"]
        rows.append(cells)
    print_table(head, rows)
    if "kontext" in meters:
        flops = sum(epoch_flops(meters["kontext"], settings).values())
        edits = settings.groups * settings.group_size * mfu * A800 / flops
        print(
            f"Kontext on an A800 at {mfu:.0%} of its peak: {edits:.2f} edits/s; the released code "
            f"there: {AUTHORS} a GPU.\n"
        )


def print_shares(meters, settings, judges):
    rows = []
    for model, meter in meters.items():
        flops = epoch_flops(meter, settings)
        whole = sum(flops.values())
        flops["7B judge, besides"] = settings.groups * flops_of(judges["7B"])
        rows.append([NAMES[model][0], *(f"{part / whole:.1%}" for part in flops.values())])
    print_table(["share of FLOPs", *flops], rows)


def print_parts(meters, settings, judges):
    print(
        "An epoch is groups x K x (steps x a step + encode, decode + kept share x trained times x "
        "a time). At equal MFU a judge's card scores while so many cards draw:\n"
    )
    head = ["TFLOP an edit", "a step", "encode, decode", "a time", "7B judge", "32B judge"]
    head += ["drawing cards a 7B judge", "a 32B judge"]
    rows = []
    for model, meter in meters.items():
        drawing = sum(flops_of(meter.figures[phase]) for phase in DRAWING)
        denoise = flops_of(meter.figures["denoise"])
        training = sum(flops_of(meter.figures[phase]) for phase in TRAINING)
        judging = [flops_of(judge) for judge in judges.values()]
        parts = [denoise / steps_of(model, settings), drawing - denoise]
        parts += [training / settings.train_timesteps, *judging]
        cells = [f"{part / settings.group_size / 1e12:.1f}" for part in parts]
        cells += [f"{drawing / judge:.1f}" for judge in judging]
        rows.append([NAMES[model][0], *cells])
    print_table(head, rows)


def print_ranks(meters, settings, mfu):
    rows = []
    for model, meter in meters.items():
        minutes = []
        for ranks in RANKS:
            flops = flops_on_slowest(meter, settings, ranks)
            minutes.append(f"{flops / (mfu * H100) / 60:.1f}")
        rows.append([NAMES[model][0], *minutes])
    print_table(["minutes an epoch, GPUs", *map(str, RANKS)], rows)


# ---------------------------------------------------------------- with a GPU


def measured_cells(model, settings, device, is_tiny):
    """A row's cells: GB and edits/s by phase, MFU; or in which phase memory ran out."""
    counted = Meter(GPU)
    run_model(model, settings, counted, is_tiny=is_tiny)
    meter = Meter(device)
    try:
        run_model(model, settings, meter, 2, is_tiny)
    except (Stopped, torch.OutOfMemoryError) as fault:
        if not isinstance(fault.__cause__ or fault, torch.OutOfMemoryError):
            raise
        return [f"does not fit, ran out in phase {meter.phase}"]
    cells = []
    flops = 0
    whole = 0.0
    for phases in (DRAWING, (*TRAINING, "offload")):
        seconds = sum(meter.figures[phase].seconds for phase in phases)
        whole += seconds
        flops += sum(flops_of(counted.figures[phase]) for phase in phases)
        cells.append(f"{highest(meter, phases):.1f} GB, {settings.group_size / seconds:.2f}/s")
    return [*cells, f"{settings.group_size / whole:.2f}/s", f"{flops / whole / H100:.1%}"]


def print_measured(args, settings):
    device = CPU if args.tiny else torch.device("cuda", 0)
    card = "CPU, tiny models" if args.tiny else torch.cuda.get_device_name(0)
    if args.cap:
        card += f", {args.cap:g} GB of it"
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * 1e9 / whole))
    print(f"Measured on {card}; torch {torch.__version__}; K = {settings.group_size}\n")
    rows = []
    for model in args.models:
        rows.append([NAMES[model][0], *measured_cells(model, settings, device, args.tiny)])
        gc.collect()
        if not args.tiny:
            torch.cuda.empty_cache()
    print_table(["measured", "drawing", "training", "both", "MFU of an H100"], rows)


# ---------------------------------------------------------------- the command


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of train_nft")
    parser.add_argument("--mfu", type=float, default=0.3, help="share of the peak, simulated")
    parser.add_argument("--measure", action="store_true", help="on a CUDA card")
    parser.add_argument("--cap", type=float, default=0.0, help="GB of the card to use; 0: all")
    parser.add_argument("--card", type=float, default=math.inf, help="GB of the simulated card")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    words = ["--base", "x", "--data", "x", "--judge", "local:x"]
    for pair in args.set:
        name, _, value = pair.partition("=")
        words += [f"--{name}", value]
    if args.tiny:
        words += ["--resolution", "64"]
    settings = parse_settings(train_nft.Settings, words, "")
    if args.measure and not args.tiny and not torch.cuda.is_available():
        print("skipped: no CUDA device here; without --measure none is needed")
        return
    if args.measure:
        print_measured(args, settings)
        return
    meters = {}
    for model in args.models:
        meters[model] = Meter(GPU)
        meters[model].limit = args.card * 1e9
        run_model(model, settings, meters[model], is_tiny=args.tiny)
    print_simulated(meters, settings, args.mfu)


if __name__ == "__main__":
    main()
