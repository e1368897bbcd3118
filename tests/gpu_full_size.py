"""Peak memory and speed of training full-size editors on one GPU, as a table. No downloads.

    python tests/gpu_full_size.py [--models kontext qwen klein] [--compile both|yes|no] [--cap 24]
    python tests/gpu_full_size.py --estimate    # no GPU: weights and a rough count of activations

Random weights in the released configs are made on the GPU in bf16 (transformer, text encoders, VAE;
only vocabularies are tiny, their tables are not). train_nft.main runs two epochs with its own
defaults: K = 12, 512 x 512, 6 steps, 5 trained times, LoRA of rank 32. Shown is the second epoch,
after warm-up and compilation; evaluation and saving are left out.
encode: text encoders and VAE encoder; decode: VAE decoder; rollout: the rest of drawing, so the
denoising; update: with what moves off the GPU for it. A judge is not in the figures: scores are
even steps from 0 to 1. --cap N lets the process have N GB (10^9 bytes) of the card, to see whether
a smaller card would do.
"""

import argparse
import functools
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

NAMES = {  # the editor and its pipeline's class
    "kontext": ("FLUX.1-Kontext-dev", "FluxKontextPipeline"),
    "qwen": ("Qwen-Image-Edit-2509", "QwenImageEditPlusPipeline"),
    "klein": ("FLUX.2-klein-base-4B", "Flux2KleinPipeline"),
}
PHASES = ("encode", "rollout", "decode", "update")
COPIES, SIDE, BATCH, RANK = 12, 512, 12, 32  # train_nft's defaults
TEXT = {
    "kontext": 512,
    "qwen": 230,
    "klein": 512,
}  # text tokens; Qwen's are 196 of the picture and the prompt's own
# what one block with LoRA saves for backward, in units of its input; counted with
# saved_tensors_hooks at full width, with q, k, v and the output in place of the score matrix that a
# fused attention does not keep
SAVED = {"kontext": 22, "qwen": 24, "klein": 31}

# ---------------------------------------------------------------- the editors


def full_size(model, tiny):
    """{part: module} of an editor in its released config, on the default device, of its dtype.

    tiny: a tiny pipeline of the same class, whose ids of the picture tokens the encoder is told.
    """
    import diffusers as d
    import transformers as t

    kl = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        block_out_channels=(128, 256, 512, 512),
        sample_size=1024,
    )
    if model == "kontext":
        clip = t.CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_attention_heads=12,
            projection_dim=768,
            eos_token_id=2,
        )
        t5 = t.T5Config(
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
        return {
            "transformer": d.FluxTransformer2DModel(
                guidance_embeds=True
            ),  # its other defaults are the released config
            "text_encoder": t.CLIPTextModel(clip),
            "text_encoder_2": t.T5EncoderModel(t5),
            "vae": d.AutoencoderKL(
                **kl,
                latent_channels=16,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        }
    if model == "qwen":
        text = dict(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
            max_position_embeddings=128000,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        )
        vision = dict(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=112,
            out_hidden_size=3584,
            fullatt_block_indexes=[7, 15, 23, 31],
        )
        ids = {
            key: value
            for key, value in tiny.text_encoder.config.to_dict().items()
            if key.endswith("_token_id")
        }
        return {
            "transformer": d.QwenImageTransformer2DModel(num_layers=60),
            "text_encoder": t.Qwen2_5_VLForConditionalGeneration(
                t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
            ),
            "vae": d.AutoencoderKLQwenImage(),
        }
    qwen3 = t.Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return {
        "transformer": d.Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=3 * 2560,
            guidance_embeds=False,
        ),
        "text_encoder": t.Qwen3ForCausalLM(qwen3),
        "vae": d.AutoencoderKLFlux2(**kl, latent_channels=32),
    }


def build(model, device, tiny_size=False):
    """A tiny pipeline of the class, with full-size modules, prompts and pictures as released."""
    from conftest import tiny_editor
    from transformers.modeling_utils import local_torch_dtype

    pipe = tiny_editor(NAMES[model][1])
    if tiny_size:
        return pipe
    with torch.device(device), local_torch_dtype(torch.bfloat16):
        parts = full_size(model, pipe)
    pipe.tokenizer.model_max_length = 77 if model == "kontext" else 512
    if model == "kontext":
        pipe.tokenizer_2.model_max_length = 512
    if model == "qwen":
        pictures = pipe.processor.image_processor
        pictures.patch_size, pictures.size = 14, {"shortest_edge": 56**2, "longest_edge": 12845056}
    return type(pipe)(**pipe.components | parts)


# ---------------------------------------------------------------- the measurement


def read_clock(device):
    """Now in seconds, and peak GB: the GPU's since the last call, or this process's so far."""
    if device.type == "cpu":
        return time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return time.time(), peak


class Meter:
    """Seconds and peak GB by phase: at any moment one runs; its end is an entry in `figures`."""

    def __init__(self, read, device):
        self.read = read
        self.device = device
        self.phase = "loading"
        self.since = 0.0
        self.figures = {}

    def switch(self, phase):
        """Ends the running phase and begins another."""
        now, peak = self.read(self.device)
        seconds, highest = self.figures.get(self.phase, (0.0, 0.0))
        self.figures[self.phase] = (seconds + now - self.since, max(highest, peak))
        self.phase = phase
        self.since = now

    @contextmanager
    def timed(self, record, phase, device):
        """In place of train_nft's, which holds each phase of an epoch."""
        self.switch(phase)
        if phase == "rollout":
            self.figures = {}  # of one epoch
        yield
        self.switch("between")

    @contextmanager
    def within(self, phase):
        """Takes a part out of the rollout; evaluation's are not counted."""
        if self.phase != "rollout":
            yield
            return
        self.switch(phase)
        yield
        self.switch("rollout")

    def listen(self, pipe):
        """Times the pipeline's text encoders and VAE wherever they are called."""

        def timed(call, phase):
            @functools.wraps(call)
            def wrapper(*args, **kwargs):
                with self.within(phase):
                    return call(*args, **kwargs)

            return wrapper

        for part in {"text_encoder", "text_encoder_2"} & set(pipe.components):
            getattr(pipe, part).forward = timed(getattr(pipe, part).forward, "encode")
        pipe.vae.encode = timed(pipe.vae.encode, "encode")
        pipe.vae.decode = timed(pipe.vae.decode, "decode")
        return pipe


def measure(args):
    """A row's cells of one editor: peak GB and edits/s of the second of two epochs of training.

    Or in which phase memory ran out.
    """
    from PIL import Image
    from rule_judge import RuleJudge, log, write_dataset

    import sample
    import train_nft

    class EvenJudge(RuleJudge):
        def score(self, row, sources, edits):
            scores = super().score(row, sources, edits)
            return scores._replace(score=torch.linspace(0, 1, len(edits)), causes=[""] * len(edits))

    device = torch.device("cpu" if args.tiny else "cuda:0")
    total = 0 if args.tiny else torch.cuda.get_device_properties(0).total_memory
    if args.cap:
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * 1e9 / total))
    meter = Meter(read_clock, device)
    edits = args.groups * COPIES

    def load(base, device, dtype, trust_remote_code):
        return meter.listen(build(args.models[0], device, args.tiny))

    sample._load_pipeline = load
    train_nft.load_judge = lambda *args, **kwargs: EvenJudge()
    train_nft.check_judge = lambda *args, **kwargs: None
    train_nft.timed = meter.timed
    side = 64 if args.tiny else SIDE
    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(Path(folder) / "data")
        for path in data.glob("*.png"):
            Image.open(path).resize((side, side)).save(path)
        settings = {
            "base": NAMES[args.models[0]][0],
            "data": data,
            "out": Path(folder) / "run",
            "judge": "local:none",
            "epochs": 2,
            "groups": args.groups,
            "resolution": side,
            "eval_rows": 2,
            "eval_steps": 1,
            "compile": args.compile == "yes",
        }
        words = []
        for key, value in settings.items():
            words += [f"--{key}", str(value)]
        try:
            train_nft.main(words)
        except torch.OutOfMemoryError as error:
            print(error, file=sys.stderr)
            room = f"{args.cap or total / 1e9:.0f} GB"
            return {"row": f"does not fit ({room}), ran out in phase {meter.phase}"}
        last = log(settings["out"])[-1]
    assert last["epoch"] == 2, last
    assert last["steps/made"] == last["groups/kept"] == 1, last
    figures = [meter.figures[phase] for phase in PHASES]  # seconds, GB
    figures.append((sum(seconds for seconds, _ in figures), max(peak for _, peak in figures)))
    cells = [f"{peak:.1f} GB, {edits / seconds:.2f}/s" for seconds, peak in figures]
    return {"row": " | ".join(cells)}


# ---------------------------------------------------------------- the estimate


def parameters(pipe):
    """{part: its number of parameters} of a pipeline."""
    return {
        part: sum(p.numel() for p in module.parameters())
        for part, module in pipe.components.items()
        if isinstance(module, nn.Module)
    }


def estimate(model):
    """GB (10^9 bytes): weights by part, and peaks with train_nft's defaults, roughly.

    Weights are bf16; LoRAs new, old and ema, the gradient and AdamW's moments are float32. A tensor
    of one forward is (batch, tokens, width) in bf16. Training keeps one per block (gradient
    checkpointing) and, in the block that it recomputes, SAVED of them for backward plus some for
    the gradients on their way; drawing has about 16 at once, the decoder three at full size and its
    widest channels there.
    """
    from sample import FAMILIES

    pipe = build(model, "meta")
    transformer, vae = pipe.transformer, pipe.vae.config
    size = {part: 2 * count / 1e9 for part, count in parameters(pipe).items()}
    targets = FAMILIES[NAMES[model][1]].targets
    bound = [
        layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and re.fullmatch(targets, name)
    ]
    lora = 6 * 4 * sum(RANK * (layer.in_features + layer.out_features) for layer in bound) / 1e9
    blocks = sum(
        len(layers) for layers in transformer.children() if isinstance(layers, nn.ModuleList)
    )
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    one = 2 * BATCH * (2 * (SIDE // 16) ** 2 + TEXT[model]) * width / 1e9
    channels = 2 * vae.base_dim if model == "qwen" else vae.block_out_channels[1]
    decode = 3 * 2 * COPIES * SIDE**2 * channels / 1e9
    text = sum(value for part, value in size.items() if part.startswith("text"))
    return {
        "transformer": size["transformer"],
        "text encoders": text,
        "VAE": size["vae"],
        "LoRA": lora,
        "peak, drawing": sum(size.values()) + lora + max(16 * one, decode),
        "peak, training": size["transformer"] + lora + one * (blocks + SAVED[model] + 6),
    }


# ---------------------------------------------------------------- the command


def in_process_of_its_own(args, model, compiled):
    """The row that a fresh process prints for one configuration, or how that process failed."""
    command = [sys.executable, __file__, "--child", "--models", model, "--compile", compiled]
    command += [f"--cap={args.cap}", f"--groups={args.groups}"]
    if args.tiny:
        command.append("--tiny")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines() or [""]
    print(*lines[:-1], sep="\n", file=sys.stderr)
    if done.returncode != 0:
        return f"failed with exit code {done.returncode}, see above"
    return json.loads(lines[-1])["row"]


def print_row(cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def print_head(cells):
    print_row(cells)
    print("|" + "---|" * len(cells))


def print_estimates(models):
    rows = {model: estimate(model) for model in models}
    print_head(["estimated GB", *rows[models[0]]])
    for model, row in rows.items():
        print_row([NAMES[model][0], *(f"{value:.1f}" for value in row.values())])


def print_measurements(args):
    card = "CPU, tiny models, peak of the whole process"
    if not args.tiny:
        card = torch.cuda.get_device_name(0)
    if args.cap:
        card += f", {args.cap:g} GB of it"
    print(f"{card}; torch {torch.__version__}; {args.groups} x {COPIES} edits an epoch\n")
    print_head(["editor", "compile", *PHASES, "whole epoch"])
    ways = ("no", "yes") if args.compile == "both" else (args.compile,)
    for model in args.models:
        for compiled in ways:
            row = in_process_of_its_own(args, model, compiled)
            print_row([NAMES[model][0], compiled, row])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--compile", choices=("both", "yes", "no"), default="both")
    parser.add_argument(
        "--cap", type=float, default=0.0, help="GB of the card that may be used; 0: all"
    )
    parser.add_argument("--groups", type=int, default=2, help="groups of 12 edits in an epoch")
    parser.add_argument(
        "--estimate", action="store_true", help="count weights and activations; no GPU needed"
    )
    for hidden in ("--tiny", "--child"):  # tiny models on the CPU; one row in this process
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
    elif args.estimate:
        print_estimates(args.models)
    elif args.tiny or torch.cuda.is_available():
        print_measurements(args)
    else:
        print("skipped: no CUDA device here; --estimate needs none")


if __name__ == "__main__":
    main()
