"""The editor: any diffusers flow editor, its group rollout, its velocity, and its LoRA policies new / old / base.

    python sample.py --image in.png --prompt "remove the red circle" --out out.png
    python sample.py --image in.png --prompt "..." --lora RUN/checkpoint-60 --compare --num 4 --out out.png

The diffusers pipeline itself does the rollout, unmodified: a forward pre-hook on its transformer keeps the keyword
arguments of the first call, the scheduler keeps the latents. Training replays them with another x_t and t. What else a
pipeline class needs is a line of FAMILIES.

Shapes: K copies of one group, B a batch, N tokens of the edit, S tokens of the source pictures, C latent channels.
t is flow time in [0, 1]: x_t = (1 - t) x_0 + t noise, velocity v = noise - x_0, x_0 = x_t - t v.

Departures from the paper and its released code:
1. Their DPM-Solver++ 2M extrapolates x_0 in log-SNR, infinite at t = 1 and t = 0: its first two steps and its last are
   first order. Ours extrapolates the velocity in t, finite at both ends: only the first step, without history, is.
2. Noise level and what the model is told are the same number: a group's `sigmas` are the timesteps that the
   transformer was given, rounded to its dtype by the pipeline, and training noises with them.
3. A group's text embeddings and source tokens are stored once, not K times.
"""

import functools
import inspect
import json
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer
from transformers.hf_argparser import HfArg
from transformers.utils import is_torchvision_available

from data_prep import (
    BadInput,
    load_image,
    load_processor,
    parse_settings,
    picture_grid,
    run_script,
    seeded,
)

TOY = "data/toy/editor"
LORA_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"

# ---------------------------------------------------------------- families of editors

# q, k, v and output projections of both streams; Flux, Qwen-Image, LongCat and Flux.2's double blocks share the names
LORA_TARGETS = [
    f"attn.{name}"
    for name in (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
]
# Flux.2's single blocks have one matrix for q, k, v and the MLP; their attn.to_out has the double blocks' container's name
FLUX2_TARGETS = [
    *LORA_TARGETS,
    "attn.to_qkv_mlp_proj",
    *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(48)),
]


@dataclass(frozen=True)
class Family:
    """What a pipeline class needs beyond the call that all share; the defaults are a guess for one that is not known."""

    guidance: str = "guidance_scale"  # the argument of its call that holds the guidance
    rollout: float | None = (
        None  # its value in rollouts and training, 1: no CFG; None: the pipeline's own
    )
    evaluation: float | None = None  # its value in evaluation and sampling
    negative: str | None = None  # the negative prompt without which there is no true CFG
    several: bool = False  # takes several source pictures
    sizes: str = ""  # function (area, ratio) of its module that sets the sources' size; "": it keeps the size they have
    max_pixels: int | None = None  # it shrinks sources above these
    long_text: str = "cut"  # a prompt beyond the encoder's tokens is "cut", taken "whole", or makes the pipeline "fail"
    targets: tuple = tuple(LORA_TARGETS)
    distilled: tuple = ()  # names of its models for few steps


QWEN = Family(
    "true_cfg_scale",
    rollout=1.0,
    evaluation=4.0,
    negative=" ",
    sizes="calculate_dimensions",
    long_text="whole",
)
FLUX2 = Family(several=True, max_pixels=1024**2, targets=tuple(FLUX2_TARGETS))
FAMILIES = {
    "FluxKontextPipeline": Family(rollout=2.5, evaluation=3.5),  # an embedded scale, no CFG
    "QwenImageEditPipeline": QWEN,
    "QwenImageEditPlusPipeline": replace(QWEN, several=True),
    "Flux2Pipeline": replace(FLUX2, rollout=4.0, evaluation=4.0),  # an embedded scale, no CFG
    "Flux2KleinPipeline": replace(
        FLUX2, rollout=1.0, evaluation=4.0, distilled=("FLUX.2-klein-4B", "FLUX.2-klein-9B")
    ),
    "LongCatImageEditPipeline": Family(
        rollout=1.0,
        evaluation=4.5,
        sizes="calculate_dimensions",
        long_text="fail",
        distilled=("LongCat-Image-Edit-Turbo",),
    ),
}


@functools.cache
def note(text):
    """Tells the user, once in a process, of something that is no error."""
    print(f"note: {text}", file=sys.stderr)


def guess_family(pipe):
    """A Family for a pipeline class that FAMILIES does not know, and a note of what was assumed."""
    kind, taken = type(pipe), inspect.signature(pipe.__call__).parameters
    embedded = getattr(pipe.transformer.config, "guidance_embeds", False)
    true_cfg = "true_cfg_scale" in taken and not embedded
    sizes = (
        "calculate_dimensions"
        if hasattr(sys.modules[kind.__module__], "calculate_dimensions")
        else ""
    )
    family = Family(
        "true_cfg_scale" if true_cfg else "guidance_scale",
        rollout=None if embedded else 1.0,
        negative=" " if true_cfg else None,
        sizes=sizes,
    )
    note(
        f"{kind.__name__} is not in FAMILIES of sample.py; assumed: one source picture, "
        f"{'an embedded guidance' if embedded else f'{family.guidance} 1 (no CFG) in rollouts'}, the pipeline's own guidance "
        f"in evaluation, {f'sources sized by {sizes}' if sizes else 'sources kept in their size'}, the usual LoRA targets"
    )
    return family


# ---------------------------------------------------------------- the solver


class FlowDPMSolverMultistepScheduler(FlowMatchEulerDiscreteScheduler):
    """Second-order multistep solver on the parent's own sigmas: one model evaluation a step, float32 inside.

    dx/dt = v is integrated with v linear in t through this evaluation and the last (two-step Adams-Bashforth with
    variable steps). It has the order of DPM-Solver++ 2M (arXiv:2211.01095, Alg. 2) but nothing infinite at t = 1 or
    t = 0. The only state is the last velocity; a rollout's first step, which set_timesteps announces, drops it.
    `solver_order` 1 is the parent's Euler step, for ablations.
    """

    solver_order = 2

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        """One step from this sigma to the next: v and x_t of any one shape -> x at the next sigma, in v's dtype."""
        if self.solver_order == 1:
            self.last_x = super().step(model_output, timestep, sample, return_dict=False, **kwargs)[
                0
            ]
            return (
                FlowMatchEulerDiscreteSchedulerOutput(prev_sample=self.last_x)
                if return_dict
                else (self.last_x,)
            )
        if self.step_index is None:
            self._init_step_index(timestep)
            self._last_v = None
        t, t_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        v, h = model_output.float(), t_next - t
        x = sample.float() + h * v
        if self._last_v is not None:
            slope = (v - self._last_v) / (
                t - self.sigmas[self.step_index - 1]
            )  # dv/dt along the path
            x = x + 0.5 * h * h * slope
        self._step_index += 1
        self._last_v = v
        self.last_x = x.to(model_output.dtype)
        return (
            FlowMatchEulerDiscreteSchedulerOutput(prev_sample=self.last_x)
            if return_dict
            else (self.last_x,)
        )


# ---------------------------------------------------------------- loading


@dataclass
class Editor:
    """A frozen diffusers pipeline with our solver; `resolution` is the square root of the pixels it works at."""

    pipe: DiffusionPipeline
    family: Family
    resolution: int
    max_text: int  # tokens that a prompt may have
    lora_layers: list = field(default_factory=list)
    policies: tuple = ()  # names of the LoRA adapters, `new` first


def load_pipeline(base, dtype, trust_remote_code=False):
    """The diffusers pipeline `base`. Where torchvision is missing, processors that need it get a picture-only stand-in."""
    parts, late = {}, {}
    if not is_torchvision_available():
        for name, made_of in DiffusionPipeline.load_config(base).items():
            kind = made_of[1] if isinstance(made_of, (list, tuple)) else None
            if kind in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor"):
                parts[name] = load_processor(getattr(transformers, kind), base, subfolder=name)
            elif kind == "PixtralProcessor":  # Flux.2 uses it for text alone
                parts[name], late[name] = None, AutoTokenizer.from_pretrained(base, subfolder=name)
    pipe = DiffusionPipeline.from_pretrained(
        base, dtype=dtype, trust_remote_code=trust_remote_code, **parts
    )
    pipe.register_modules(**late)
    return pipe


def load_editor(
    base,
    device="cpu",
    dtype=torch.float32,
    resolution=None,
    max_text=None,
    solver_order=2,
    trust_remote_code=False,
):
    """The editor in the folder, or of the hub id, `base`: frozen, in eval mode, with the second-order solver.

    resolution in pixels, None: what the VAE was made for. max_text in tokens, None: the pipeline's default, or its
    tokenizer's own limit where that is lower. Raises BadInput when nothing loads, when it is no image editor, or when
    it cannot take the resolution.
    """
    base = str(base)
    if not Path(base).is_dir() and (base.count("/") != 1 or base.startswith((".", "/", "~"))):
        mend = (
            "run python data_prep.py toy first"
            if base == TOY
            else "name a model folder or a hub id owner/name"
        )
        raise BadInput(f"{base}: no such model folder; {mend}")
    try:
        pipe = load_pipeline(base, dtype, trust_remote_code)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        mend = "name a model folder or a hub id"
        if any(word in reason for word in ("orchvision", "video processor", "Placeholder")):
            mend = "its processor needs torchvision; pip install torchvision"
        raise BadInput(f"{base}: not a diffusers model ({reason}); {mend}") from error
    return as_editor(pipe, base, device, resolution, max_text, solver_order)


def as_editor(pipe, base, device="cpu", resolution=None, max_text=None, solver_order=2):
    """The Editor of a pipeline that was built already; `base` is its name. The rest as in load_editor."""
    kind, taken = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    if getattr(pipe, "transformer", None) is None or "image" not in taken:
        raise BadInput(
            f"{base}: {kind} edits no pictures; name an editor such as FLUX.1-Kontext-dev"
        )
    family = FAMILIES.get(kind) or guess_family(pipe)
    if pipe.config.get("is_distilled") or Path(base).name in family.distilled:
        note(
            f"{base} is distilled to few steps and may blur in a long training; its undistilled base is the safer start"
        )
        family = replace(family, evaluation=family.rollout)
    if resolution is None:
        resolution = getattr(pipe.vae.config, "sample_size", None) or 1024
    multiple = 2 * pipe.vae_scale_factor  # latent pixels are packed 2 x 2
    nearest = max(multiple, round(resolution / multiple) * multiple)
    if family.max_pixels:
        nearest = min(nearest, int(family.max_pixels**0.5) // multiple * multiple)
    if resolution != nearest:
        most = f" up to {int(family.max_pixels**0.5)}" if family.max_pixels else ""
        raise BadInput(
            f"resolution {resolution}: {base} takes multiples of {multiple}{most}; take {nearest}"
        )
    if max_text is None:
        own = taken["max_sequence_length"].default if "max_sequence_length" in taken else 512
        max_text = min(own, getattr(text_parts(pipe)[1], "model_max_length", own))
    if "max_sequence_length" not in taken:
        pipe.tokenizer_max_length = max_text
    pipe.scheduler = FlowDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.solver_order = solver_order
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    return Editor(pipe.to(device), family, resolution, max_text)


# ---------------------------------------------------------------- policies


def add_policies(editor, rank=None, alpha=None, targets=None, seed=0, averages=("old",), start=""):
    """Binds the LoRA adapters `old` (and other frozen `averages`) and `new` (trained, active); all float32.

    A is gaussian with deviation 1 / rank, drawn from (seed, parameter's name) and the same in all; B is zero, so
    new = old = base. targets: endings of module names, None: the family's. With `start`, a LoRA as read_lora takes it,
    new = old = that LoRA and rank, alpha and layers are its own; it is not merged, so base stays the released model that
    the loss pulls to, and what is saved is one LoRA over it. BadInput when they match no module, or not this editor's.
    """
    transformer, weights = editor.pipe.transformer, {}
    names, kind = {name for name, _ in transformer.named_modules()}, type(transformer).__name__
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets or editor.family.targets),
    }
    if start:
        weights, settings = read_lora(start)
        strangers = [name for name in settings["target_modules"] if name not in names]
        if strangers:
            raise BadInput(
                f"{start}: a LoRA for another model: {kind} has no layer {strangers[0]}, nor {len(strangers) - 1} "
                "more of its layers; take the LoRA's own base model"
            )
    elif not any(
        f".{name}".endswith(f".{target}") for name in names for target in settings["target_modules"]
    ):
        raise BadInput(
            f"LoRA targets {settings['target_modules']} match no module of {kind}; name some of its layers"
        )
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):  # peft draws A from the global generator
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        for adapter in (*averages, "new"):
            transformer.add_adapter(LoraConfig(**settings, init_lora_weights="gaussian"), adapter)
    find_lora_layers(editor)
    editor.policies = ("new", *averages)
    for adapter in editor.policies:
        for name, parameter in lora_parameters(editor, adapter).items():
            parameter.data = parameter.data.float()
            if "lora_A" in name:
                draw = (
                    torch.randn(parameter.shape, generator=seeded(seed, "lora", name))
                    / parameter.shape[0]
                )
                parameter.data.copy_(draw)
            parameter.requires_grad_(adapter == "new")
        if start:
            copy_lora(editor, weights, adapter, start)


def find_lora_layers(editor):
    """Fills editor.lora_layers; to be called after a LoRA was loaded behind its back."""
    editor.lora_layers = [
        layer for layer in editor.pipe.transformer.modules() if isinstance(layer, BaseTunerLayer)
    ]


@contextmanager
def policy(editor, name):
    """Within, the transformer is the policy `new`, `old` or `base`; after, whatever it was, also after an exception.

    The flags are set directly, since peft's set_adapter and enable_adapters also flip requires_grad, which here stays
    as add_policies left it. Gradient checkpointing recomputes during backward: call that under the same policy.
    """
    layers = editor.lora_layers
    assert name == "base" or layers and all(name in layer.lora_A for layer in layers), (
        f"no policy {name}"
    )
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer, (_, active) in zip(layers, before):
        layer._disable_adapters = name == "base"
        layer._active_adapter = active if name == "base" else [name]
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before):
            layer._disable_adapters, layer._active_adapter = disabled, active


def lora_parameters(editor, name):
    """{parameter's name without the adapter's: Parameter} of one adapter, sorted: the same names for new and old."""
    mark = f".{name}."
    every = editor.pipe.transformer.named_parameters()
    return dict(
        sorted((key.replace(mark, "."), p) for key, p in every if ".lora_" in key and mark in key)
    )


@torch.no_grad()
def soft_update(editor, decay, average="old"):
    """old <- decay * old + (1 - decay) * new, in place, in float32 (Alg. 1 line 14 of arXiv:2509.16117v2)."""
    new = lora_parameters(editor, "new")
    for name, old in lora_parameters(editor, average).items():
        old.lerp_(new[name], 1 - decay)


def save_lora(editor, folder, name="new"):
    """Writes one adapter in diffusers' format: plain pipe.load_lora_weights(folder) then draws the same edits.

    LongCat's pipeline lacks it; there it is pipe.transformer.load_lora_adapter(folder, weight_name=LORA_FILE).
    """
    weights = {key: parameter.detach() for key, parameter in lora_parameters(editor, name).items()}
    settings = editor.pipe.transformer.peft_config[name].to_dict()
    settings["target_modules"] = sorted(
        settings["target_modules"]
    )  # a set: the file would differ from run to run
    save = getattr(editor.pipe, "save_lora_weights", FluxLoraLoaderMixin.save_lora_weights)
    save(folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=settings)


def read_lora(place):
    """({layer.lora_A.weight: tensor, ...}, keywords of its LoraConfig) of the LoRA in a folder or a hub id.

    Takes what save_lora writes and PEFT's own adapter_model.safetensors. Raises BadInput when there is none.
    """
    folder, hub = (
        Path(place),
        str(place).count("/") == 1 and not str(place).startswith((".", "/", "~")),
    )
    try:
        if not folder.is_dir() and hub:
            folder = Path(snapshot_download(str(place), allow_patterns=[LORA_FILE, "adapter_*"]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{place}: not a LoRA that can be had ({reason}); name RUN/checkpoint-N or a hub id"
        ) from error
    file = next(
        (folder / name for name in (LORA_FILE, PEFT_FILE) if (folder / name).is_file()), None
    )
    if file is None:
        raise BadInput(
            f"{place}: not a LoRA, holds neither {LORA_FILE} nor {PEFT_FILE}; name RUN/checkpoint-N"
        )
    with safe_open(file, "pt") as stored:
        bare = lambda key: key.removeprefix("base_model.model.").removeprefix("transformer.")  # noqa: E731
        weights = {bare(key): stored.get_tensor(key) for key in stored.keys()}
        settings = json.loads((stored.metadata() or {}).get("lora_adapter_metadata", "{}"))
    settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    if (folder / "adapter_config.json").is_file() and file.name == PEFT_FILE:
        settings = json.loads((folder / "adapter_config.json").read_text())
    layers = sorted({key.rsplit(".lora_", 1)[0] for key in weights})
    ranks = [weight.shape[0] for key, weight in weights.items() if key.endswith(".lora_A.weight")]
    if not ranks or len(weights) != 2 * len(ranks):
        raise BadInput(
            f"{file}: not a plain LoRA, it holds layers such as {next(iter(weights), 'none')}; name another"
        )
    settings = {
        "r": ranks[0],
        "lora_alpha": ranks[0],
    } | settings  # without settings alpha is the rank, as in diffusers
    wanted = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    return weights, {key: settings[key] for key in wanted if key in settings} | {
        "target_modules": layers
    }


@torch.no_grad()
def copy_lora(editor, weights, name, place):
    """Copies a LoRA's weights, as read_lora gives them, into the adapter `name`; BadInput when they do not fit it."""
    own = lora_parameters(editor, name)
    shapes, own_shapes = (
        {key: value.shape for key, value in each.items()} for each in (weights, own)
    )
    if shapes != own_shapes:
        raise BadInput(
            f"{place}: its layers or rank are not those of this {type(editor.pipe.transformer).__name__} and its "
            "policies; take the LoRA's own base model and rank"
        )
    for key, parameter in own.items():
        parameter.copy_(weights[key])


def load_lora(editor, folder, name):
    """Copies the LoRA in `folder` into the adapter `name`, bit for bit; BadInput when it does not fit that adapter."""
    weights, settings = read_lora(folder)
    copy_lora(editor, weights, name, folder)
    own_alpha = editor.pipe.transformer.peft_config[name].lora_alpha
    if settings["lora_alpha"] != own_alpha:
        raise BadInput(
            f"{folder}: was trained with alpha {settings['lora_alpha']}, not {own_alpha}; give the same alpha"
        )


# ---------------------------------------------------------------- rollout and velocity


@dataclass
class Group:
    """K edits of one row and what training needs to see them again."""

    images: list  # K PIL.Images
    x_0: torch.Tensor  # (K, N, C) float32, clean packed latents
    cond: dict  # keyword arguments of the transformer, batch of 1; hidden_states holds the source tokens (1, S, C)
    sigmas: (
        torch.Tensor
    )  # (steps,) float32, flow times as the transformer was given them, on the CPU


def working_size(editor, image):
    """(width, height) at which a picture is edited: its aspect ratio, about resolution^2 pixels, what the VAE takes."""
    multiple = 2 * editor.pipe.vae_scale_factor
    scale = editor.resolution / (image.width * image.height) ** 0.5
    sides = [max(multiple, round(side * scale / multiple) * multiple) for side in image.size]
    while editor.family.max_pixels and sides[0] * sides[1] > editor.family.max_pixels:
        sides[sides.index(max(sides))] -= multiple
    return tuple(sides)


def _per_copy(name, value):
    """Whether a keyword argument has a batch dimension; Flux's ids without one are (tokens, 3)."""
    return isinstance(value, torch.Tensor) and not (name.endswith("_ids") and value.ndim == 2)


@contextmanager
def sources_keep_their_size(editor, images):
    """Within, a pipeline that sets its sources' size by a function of its module gets the size that they have.

    The small picture that Qwen-Image-Edit-Plus shows its text encoder stays the pipeline's own, if not above ours.
    """
    module, name = sys.modules[type(editor.pipe).__module__], editor.family.sizes
    if not name:
        yield
        return
    sizes, own = {image.width / image.height: image.size for image in images}, getattr(module, name)

    def ours(area, ratio):
        answer = own(min(area, editor.resolution**2), ratio)
        return answer if area < 1024**2 else (*sizes[ratio], *answer[2:])

    setattr(module, name, ours)
    try:
        yield
    finally:
        setattr(module, name, own)


def text_parts(pipe):
    """(encoder, tokenizer) that read the whole prompt; either may be None."""
    encoder, tokenizer = (
        getattr(pipe, f"{part}_2", None) or getattr(pipe, part, None)
        for part in ("text_encoder", "tokenizer")
    )
    return encoder, getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds its tokenizer


def _call_pipeline(editor, images, prompt, generators, steps, guidance):
    """One pipeline call with an ear on it: (pictures, x_0 (B, N, C), first call's arguments, times (steps,))."""
    pipe, family, times, first = editor.pipe, editor.family, [], {}
    images = [
        image.resize(working_size(editor, image), Image.Resampling.LANCZOS) for image in images
    ]
    (width, height), negative = (
        images[0].size,
        family.negative if guidance is None or guidance > 1 else None,
    )
    wanted = {
        "height": height,
        "width": width,
        "max_area": height * width,
        "_auto_resize": False,
        family.guidance: guidance,
        "max_sequence_length": editor.max_text,
        "negative_prompt": negative,
    }
    taken = inspect.signature(pipe.__call__).parameters
    wanted = {name: value for name, value in wanted.items() if value is not None and name in taken}
    encoder, tokenizer = text_parts(pipe)
    too_long = f"a prompt has more than the {editor.max_text} tokens that {type(pipe).__name__} takes: {prompt[:60]!r}..."

    def before_encoder(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)  # (1, tokens)
        if (
            ids is not None
            and ids.shape[1] == editor.max_text
            and tokenizer.pad_token_id not in ids
        ):
            note(f"{too_long}; the rest is cut")

    def before_transformer(module, args, kwargs):
        if len(times) == (
            pipe.scheduler.step_index or 0
        ):  # with true CFG a step's second call is the unconditional one
            times.append(kwargs["timestep"][0].float().cpu())
            if not first:
                first.update(kwargs)

    hooks = [pipe.transformer.register_forward_pre_hook(before_transformer, with_kwargs=True)]
    if family.long_text == "cut" and encoder is not None:
        hooks.append(encoder.register_forward_pre_hook(before_encoder, with_kwargs=True))
    try:
        with sources_keep_their_size(editor, images):
            pictures = pipe(
                image=images[0] if len(images) == 1 else images,
                prompt=prompt,
                generator=list(generators),
                num_images_per_prompt=len(generators),
                num_inference_steps=steps,
                **wanted,
            ).images
    except TypeError as error:  # LongCat's own warning of a prompt that is too long ends so
        if family.long_text != "fail":
            raise
        raise BadInput(f"{too_long}; shorten it") from error
    except ValueError as error:
        raise BadInput(
            f"{type(pipe).__name__} refuses a row: {' '.join(str(error).split())[:200]}; remove it"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return pictures, pipe.scheduler.last_x, first, torch.stack(times)


def rollout(
    editor, images, prompt, generators, steps, guidance=None, rollout_batch=None, evaluation=False
):
    """Draws K = len(generators) edits of one row with the active policy, rollout_batch of them a pipeline call.

    images: list of the row's PIL.Images. Copy j's noise comes from generators[j] alone. guidance: of the family's kind,
    None: the family's own for rollouts, or with `evaluation` for evaluation. Returns a Group, whose `cond` is that of
    the conditional call. Raises BadInput when the editor cannot take these pictures, or was not shown them as tokens.
    """
    kind, chunk, family = (
        type(editor.pipe).__name__,
        rollout_batch or len(generators),
        editor.family,
    )
    if len(images) > 1 and not family.several:
        raise BadInput(
            f"a row has {len(images)} pictures and {kind} takes one; remove the row or take another editor"
        )
    if guidance is None:
        guidance = family.evaluation if evaluation else family.rollout
    calls = [
        _call_pipeline(editor, images, prompt, generators[i : i + chunk], steps, guidance)
        for i in range(0, len(generators), chunk)
    ]
    pictures, x_0, arguments, times = calls[0]
    tokens = arguments["hidden_states"]  # (B, N + S, C)
    if tokens.shape[1] <= x_0.shape[1] or tokens.shape[2] != x_0.shape[2]:
        raise BadInput(
            f"{kind} does not see the source picture as tokens beside the edit's; take another editor"
        )
    if len(tokens) != len(x_0):
        raise BadInput(
            f"{kind} runs its guidance in one batch with the edits; give a guidance of 1"
        )
    sizes = [working_size(editor, image) for image in images]  # the first is the edit's
    pixels = [width * height for width, height in sizes]
    if pictures[0].size != sizes[0] or tokens.shape[1] * pixels[0] != x_0.shape[1] * (
        pixels[0] + sum(pixels)
    ):
        note(
            f"{kind} does not keep the size of its pictures, as its Family says: wanted {sizes}, got {pictures[0].size}"
        )
    sigmas = editor.pipe.scheduler.sigmas[:steps].cpu()
    assert torch.allclose(times, sigmas, atol=0.01), (
        f"{kind} gives its transformer {times}, not flow times {sigmas}"
    )
    cond = {name: value for name, value in arguments.items() if name != "timestep"}
    cond["hidden_states"] = tokens[:, x_0.shape[1] :]  # (B, S, C)
    for name, value in cond.items():
        if _per_copy(name, value):
            assert torch.equal(value, value[:1].expand_as(value)), (
                f"{name} differs between copies of one group"
            )
            cond[name] = value[:1].clone()  # a slice would keep all copies in memory
    pictures = [picture for call in calls for picture in call[0]]
    return Group(pictures, torch.cat([call[1] for call in calls]).float(), cond, times)


def velocity(editor, x_t, t, cond):
    """The active policy's velocity at x_t (B, N, C) and flow times t (B,), under a group's `cond`: (B, N, C) float32.

    The one place that calls the transformer. It gets t as the pipeline gives it, in its own dtype: noise with t from
    Group.sigmas, which that rounding leaves as they are. Differentiable in the LoRA parameters.
    """
    B, N, C = x_t.shape
    assert t.shape == (B,), f"t is {tuple(t.shape)}, not ({B},)"
    source = cond["hidden_states"]  # (1, S, C)
    t_told = t.to(source.device, source.dtype)  # (B,)
    exact = torch.equal(t_told.float(), t.to(source.device, torch.float32))
    assert exact, f"t is not a time that can be told in {source.dtype}"
    arguments = {
        name: value.expand(B, *value.shape[1:]).contiguous() if _per_copy(name, value) else value
        for name, value in cond.items()
    }
    arguments["hidden_states"] = torch.cat(
        [x_t.to(source), arguments["hidden_states"]], dim=1
    )  # (B, N + S, C)
    return editor.pipe.transformer(timestep=t_told, **arguments)[0][:, :N].float()


def check_editor(editor, row, guidance, optimizer, started=False):
    """Stops a run that could not learn: an editor that does not see its source, a LoRA without gradient, unequal policies.

    row: one of the data; started: the policies begin from a LoRA, not as the base. Raises BadInput that names the editor or
    the LoRA's layers.
    """
    sources = [load_image(path) for path in row["images"]]
    seen, other = (
        rollout(editor, pictures, row["prompt"], [seeded("check")], 1, guidance)
        for pictures in (sources, [ImageOps.invert(picture) for picture in sources])
    )
    x_t, t = seen.x_0, seen.sigmas[:1].to(seen.x_0.device)
    v = velocity(editor, x_t, t, seen.cond)
    kind = type(editor.pipe).__name__
    if torch.allclose(v, velocity(editor, x_t, t, other.cond)):
        raise BadInput(
            f"{kind}: another source picture changes nothing; take an editor that sees it"
        )
    for name in ("base", *editor.policies)[started:]:
        with policy(editor, name):
            assert torch.equal(v, velocity(editor, x_t, t, seen.cond)), (
                f"policies new and {name} differ at the start"
            )
    v.square().mean().backward()
    if not any(
        p.grad is not None and p.grad.any() for p in lora_parameters(editor, "new").values()
    ):
        targets = sorted(editor.pipe.transformer.peft_config["new"].target_modules)
        raise BadInput(f"{kind}: the LoRA on {targets} gets no gradient; name other --lora_targets")
    optimizer.zero_grad()


# ---------------------------------------------------------------- memory, and bases larger than one card


@contextmanager
def parked(editor, park=True):
    """Within, all of the pipeline but its transformer lies in the CPU's memory; after, where it was."""
    device = editor.pipe.transformer.device
    parts = [
        part
        for name, part in editor.pipe.components.items()
        if isinstance(part, torch.nn.Module) and name != "transformer"
    ]
    for part in parts * park:
        part.to("cpu")
    try:
        yield
    finally:
        for part in parts * park:
            part.to(device)


def compile_blocks(editor):
    """Compiles the transformer's blocks in place, each class once for each policy, gradient mode and batch size."""
    torch._dynamo.config.recompile_limit = (
        64  # the default of 8 would fall back to eager in silence
    )
    editor.pipe.transformer.compile_repeated_blocks()


def shard_base(editor, accelerator):
    """Spreads the frozen base over all ranks by accelerate's FSDP2; the LoRA stays whole on each, as without it.

    To be called with the editor on the CPU; what is not sharded moves to the rank's device.
    """
    transformer = editor.pipe.transformer
    blocks = [
        type(block).__name__
        for blocks in transformer.children()
        if isinstance(blocks, torch.nn.ModuleList)
        for block in blocks
    ]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(set(blocks)),
        cpu_ram_efficient_loading=False,
        ignored_modules=[
            part for layer in editor.lora_layers for part in (layer.lora_A, layer.lora_B)
        ],
    )
    accelerator.state.fsdp_plugin = plugin
    fsdp2_prepare_model(accelerator, transformer)
    parts = [
        (p.numel(), p.to_local().numel())
        for p in transformer.parameters()
        if isinstance(p, DTensor)
    ]
    whole, here = map(sum, zip(*parts))
    accelerator.print(
        f"the base's {whole:,} numbers are spread over {accelerator.num_processes} ranks, {here:,} on this one"
    )
    editor.pipe.to(accelerator.device)


# ---------------------------------------------------------------- checkpoints


# ---------------------------------------------------------------- pictures of results


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Settings:
    image: list[str] = HfArg(
        default_factory=list, help="The source picture; several where the editor takes them."
    )
    prompt: str = HfArg(default="", help="The instruction.")
    out: str = HfArg(default="out.png", help="Where the picture of the edits goes.")
    base: str = HfArg(default=TOY, help="The editor: a folder or a hub id.")
    lora: str = HfArg(default="", help="A LoRA, ours or PEFT's: RUN/checkpoint-N, or a hub id.")
    compare: bool = HfArg(
        default=False, help="Show base and LoRA side by side, with the same seeds."
    )
    num: int = HfArg(default=4, help="Edits to draw.")
    seed: int = HfArg(default=42, help="The first edit's seed; the others follow it.")
    steps: int | None = HfArg(default=None, help="Solver steps. [6 for the toy, else 28]")
    guidance: float | None = HfArg(
        default=None, help="Guidance. [2.5 for the toy, else the family's]"
    )
    resolution: int | None = HfArg(
        default=None, help="Square root of the working pixels. [what the VAE was made for]"
    )
    max_text: int | None = HfArg(default=None, help="Tokens that a prompt may have. [the model's]")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with the model.")

    def __post_init__(self):
        if not self.image:
            raise BadInput("--image is missing; name the source picture")
        if not self.prompt.strip():
            raise BadInput("--prompt is empty; say what to change")
        if self.num < 1 or (self.steps is not None and self.steps < 1):
            raise BadInput(
                f"--num {self.num} --steps {self.steps}: nothing to draw; give at least 1 of each"
            )
        if self.compare and not self.lora:
            raise BadInput(
                "--compare has nothing to compare with the base; add --lora RUN/checkpoint-N"
            )
        if Path(self.out).suffix.lower() not in Image.registered_extensions():
            raise BadInput(f"--out {self.out}: not a picture's name; end it in .png")


def main(argv=None):
    args = parse_settings(Settings, argv, description=__doc__.splitlines()[0])
    images, cuda = [load_image(path) for path in args.image], torch.cuda.is_available()
    editor = load_editor(
        args.base,
        "cuda" if cuda else "cpu",
        torch.bfloat16 if cuda else torch.float32,
        args.resolution,
        args.max_text,
        trust_remote_code=args.trust_remote_code,
    )
    steps = args.steps or (6 if args.base == TOY else 28)
    guidance = 2.5 if args.guidance is None and args.base == TOY else args.guidance
    if args.lora:
        add_policies(editor, averages=(), start=args.lora)
    names = ["base", "new"] if args.compare else ["new" if args.lora else "base"]
    rows, captions = [], []
    for name in names:
        generators = [torch.Generator().manual_seed(args.seed + j) for j in range(args.num)]
        with policy(editor, name):
            edits = rollout(
                editor,
                images,
                args.prompt,
                generators,
                steps,
                guidance,
                rollout_batch=4,
                evaluation=True,
            ).images
        label = {"base": "base", "new": "trained"}[name]
        rows.append(images + edits)
        captions.append(
            ["source"] * len(images) + [f"{label}, seed {args.seed + j}" for j in range(args.num)]
        )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows, captions, args.prompt).save(args.out)
    print(f"wrote {args.out}: {args.num} edits in {steps} steps with {' and '.join(names)}")


if __name__ == "__main__":
    run_script(main)
