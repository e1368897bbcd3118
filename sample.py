"""The editor: any diffusers flow editor, its rollout and velocity, its policies new / old / base.

    python sample.py --image in.png --prompt "remove the red circle" --out out.png
    python sample.py --image in.png --prompt "..." --lora RUN/checkpoint-60 --compare --num 4

The diffusers pipeline itself does the rollout, unmodified, and we listen: a forward pre-hook on its
transformer keeps the keyword arguments of the first call, the scheduler keeps the clean latents.
Training replays those arguments with another x_t and t. What else a pipeline class needs is a line
of FAMILIES.

Shapes: K copies of one group, B a batch, N tokens of the edit, S tokens of the source pictures,
C latent channels. t is flow time in [0, 1]: x_t = (1 - t) x_0 + t noise, v = noise - x_0.

Departures from the papers (arXiv:2510.16888, arXiv:2509.16117v2) and their released code:
1. Solver. Theirs, DPM-Solver++ 2M, extrapolates x_0 in log-SNR, which is infinite at t = 1 and
   t = 0: its first two steps and its last are first order. Ours extrapolates the velocity in t:
   only the first step, which has no history, is first order; and a step above 1.5 times the one
   before is corrected as if it were 1.5 times as long.
2. Noise level and what the model is told are one number: a group's `sigmas` are the timesteps that
   the transformer was given, rounded to its dtype by the pipeline; training noises with them.
3. A group's text embeddings and source tokens are made and stored once, not K times.
4. A copy's noise has its own generator: a group is the same however it is cut into calls.
5. The LoRA's weights are float32 over a base of any dtype; A has deviation 1 / rank and its own
   seed; on Flux.2 the single blocks have a LoRA too.
6. A LoRA to start from is not merged: the base stays the released model that the loss pulls to.
7. A LoRA's file holds its full strength, alpha / rank multiplied into B (see save_lora).
8. Edits keep their source's aspect ratio, at about resolution^2 pixels.
"""

import functools
import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import send_to_device
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.peft_utils import get_peft_kwargs
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import is_torchvision_available

from data_prep import (
    BadInput,
    CheckedSettings,
    load_image,
    load_processor,
    one_line,
    parse_settings,
    picture_grid,
    run_script,
    say,
    seeded,
    setting,
    whole_file,
)

TOY = "data/toy/editor"
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_FILE = "adapter_model.safetensors"  # PEFT's, with adapter_config.json beside it
Pictures = list[Image.Image]

# ---------------------------------------------------------------- families of editors

# q, k, v and output projections of both streams; Flux, Qwen-Image, LongCat and Flux.2's double
# blocks share these names.
LORA_TARGETS = r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
# Flux.2's single blocks have one matrix for q, k, v and the MLP, and one output matrix.
FLUX2_TARGETS = LORA_TARGETS + r"|single_.*\.attn\.(to_qkv_mlp_proj|to_out)"


@dataclass(frozen=True)
class Family:
    """What a pipeline class needs beyond the call that all share; the defaults suit most."""

    # The argument of its call that holds the guidance, and its value in rollouts and training
    # (1: no CFG) and in evaluation; None: the pipeline's own.
    guidance: str = "guidance_scale"
    rollout: float | None = None
    evaluation: float | None = None
    negative: str | None = None  # the negative prompt without which there is no true CFG
    several: bool = False  # takes several source pictures
    # The function (area, ratio) of its module that sets the sources' size; "": it keeps their size.
    sizes: str = ""
    max_pixels: int = 8192**2  # it shrinks sources above these
    # A prompt of too many tokens is "cut", taken "whole", or makes the pipeline "fail".
    long_text: str = "cut"
    template: int = 0  # tokens that it puts around a prompt, which count where prompts are cut
    targets: str = LORA_TARGETS  # regular expression of the names of layers


QWEN = Family(
    guidance="true_cfg_scale",
    rollout=1.0,
    evaluation=4.0,
    negative=" ",
    sizes="calculate_dimensions",
    long_text="whole",
)
FLUX2 = Family(  # an embedded scale, no CFG
    rollout=4.0,
    evaluation=4.0,
    several=True,
    max_pixels=1024**2,
    template=32,  # the system message; klein, which has none, 12
    targets=FLUX2_TARGETS,
)
FAMILIES = {
    "FluxKontextPipeline": Family(rollout=2.5, evaluation=3.5),  # an embedded scale, no CFG
    "QwenImageEditPipeline": QWEN,
    "QwenImageEditPlusPipeline": replace(QWEN, several=True),
    "Flux2Pipeline": FLUX2,
    "Flux2KleinPipeline": replace(FLUX2, rollout=1.0, template=12),
    "LongCatImageEditPipeline": Family(
        rollout=1.0, evaluation=4.5, sizes="calculate_dimensions", long_text="fail"
    ),
}


@functools.cache
def note(text: str) -> None:
    """Tells the user, once in a process, of something that is no error."""
    print(f"note: {text}", file=sys.stderr)


def _guess_family(pipe):
    """A Family for a pipeline class that FAMILIES does not know, and a note of what was assumed."""
    family = Family()
    if not pipe.transformer.config.get("guidance_embeds"):
        family = replace(family, rollout=1.0)  # no CFG
        if "true_cfg_scale" in _parameters(pipe):
            family = replace(family, guidance="true_cfg_scale", negative=" ")
    if hasattr(_module(pipe), QWEN.sizes):
        family = replace(family, sizes=QWEN.sizes)
    note(f"{type(pipe).__name__} is not in FAMILIES of sample.py; assumed: {family}")
    return family


def _parameters(pipe):
    """What a pipeline's call takes: {name: inspect.Parameter}."""
    return inspect.signature(pipe.__call__).parameters


def _module(pipe):
    """The module of a pipeline's class, where its functions for sizes and texts stand."""
    return sys.modules[type(pipe).__module__]


# ---------------------------------------------------------------- the solver

# Up to so many times the length of the step before, a step gets its whole correction. Kontext and
# the toy stay below in 6 steps (1.3 and 1.2); FLUX.2's last is more than 3 times as long.
MAX_RATIO = 1.5


class FlowDPMSolverMultistepScheduler(FlowMatchEulerDiscreteScheduler):
    """Second-order multistep solver on the parent's own sigmas: one model evaluation a step.

    dx/dt = v is integrated with v linear in t through this evaluation and the last (two-step
    Adams-Bashforth with variable steps), in float32. It has the order of DPM-Solver++ 2M
    (arXiv:2211.01095, Alg. 2) but nothing infinite at t = 1 or t = 0. The only state is the last
    velocity; a rollout's first step, which set_timesteps announces, drops it. `solver_order` 1 is
    Euler's method, for ablations. `last_x` is the newest x.
    """

    solver_order = 2

    def step(self, model_output, timestep, sample, **kwargs):
        """From this sigma to the next: v and x of any one shape -> (x,), in v's dtype.

        x(t + h) = x + h v + h^2/2 dv/dt, with dv/dt from this velocity and the last. A tuple, as
        the pipelines ask for (return_dict=False).
        """
        if self.step_index is None:  # the first step of a rollout
            self._init_step_index(timestep)
            self._last_v = None
        t = self.sigmas[self.step_index]
        h = self.sigmas[self.step_index + 1] - t  # negative: from noise, t = 1, to data, t = 0
        v = model_output.float()
        x = sample.float() + h * v  # Euler's step, all that there is without a history
        if self._last_v is not None and self.solver_order == 2:
            h_last = t - self.sigmas[self.step_index - 1]
            slope = (v - self._last_v) / h_last  # dv/dt along the path
            # A slope says little of what lies far beyond its two points: it is trusted no further
            # than MAX_RATIO times their distance.
            reach = torch.maximum(h, MAX_RATIO * h_last)
            x = x + 0.5 * h * reach * slope
        self._last_v = v
        self._step_index += 1
        self.last_x = x.to(model_output.dtype)
        return (self.last_x,)


# ---------------------------------------------------------------- loading


@dataclass
class Editor:
    """A frozen diffusers pipeline with our solver, and the LoRA policies over it."""

    pipe: DiffusionPipeline
    family: Family
    resolution: int  # square root of the pixels it works at
    max_text: int  # tokens that a prompt may have
    lora_layers: tuple[BaseTunerLayer, ...] = ()
    policies: tuple[str, ...] = ()  # names of the LoRA adapters, `new` first
    active: str = "base"  # the policy that is on

    @property
    def transformer(self) -> nn.Module:
        """The denoiser, which the LoRA lies on."""
        return self.pipe.transformer

    @property
    def kind(self) -> str:
        """The name of the pipeline's class."""
        return type(self.pipe).__name__


def load_editor(
    base: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    resolution: int | None = None,
    solver_order: int = 2,
    trust_remote_code: bool = False,
) -> Editor:
    """The editor in the folder, or of the hub id, `base`: frozen, in eval mode, with our solver.

    resolution: in pixels; None: what the VAE was made for. BadInput when nothing loads, when it is
    no image editor, or when it cannot take the resolution.
    """
    pipe = _load_pipeline(base, device, dtype, trust_remote_code)
    family = _family(pipe, base)
    resolution = _checked_resolution(pipe, family, base, resolution)
    # The pipeline's default, or its tokenizer's own limit where that is lower.
    limit = _parameters(pipe).get("max_sequence_length")
    max_text = limit.default if limit else 512
    max_text = min(max_text, getattr(_tokenizer(pipe), "model_max_length", max_text))
    if not limit:
        pipe.tokenizer_max_length = max_text  # LongCat's place for it
    pipe.scheduler = FlowDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.solver_order = solver_order
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return Editor(pipe, family, resolution, max_text)


def _load_pipeline(base, device, dtype, trust_remote_code):
    """The pipeline in a folder or of a hub id as diffusers loads it; BadInput if it cannot."""
    fix = "name a whole model folder or a hub id owner/name"
    if base == TOY:
        fix = "run python data_prep.py toy first"
    try:
        processors, tokenizers = _processors(base)
        pipe = DiffusionPipeline.from_pretrained(
            base,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **processors,
            **dict.fromkeys(tokenizers),
        )
        pipe.register_modules(**tokenizers)  # diffusers would refuse their class above
        return pipe.to(device)  # where weights are missing, this is what fails
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a damaged folder makes four libraries raise has no end
        if not is_torchvision_available():
            fix += ", or pip install torchvision if its processor needs it"
        raise BadInput(f"{base}: not a diffusers model ({one_line(error)}); {fix}") from error


def _processors(base):
    """Where torchvision is missing, a pipeline's processors without videos; else nothing.

    -> ({part: processor}, {part: tokenizer}): Flux.2 has a processor and uses it for text alone.
    """
    processors = {}
    tokenizers = {}
    if is_torchvision_available():
        return processors, tokenizers
    for part, made_of in DiffusionPipeline.load_config(base).items():
        kind = made_of[1] if isinstance(made_of, list) else None
        if kind in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor"):
            processors[part] = load_processor(getattr(transformers, kind), base, subfolder=part)
        if kind == "PixtralProcessor":
            tokenizers[part] = AutoTokenizer.from_pretrained(base, subfolder=part)
    return processors, tokenizers


def _family(pipe, base):
    """A pipeline's family; BadInput for one that edits no pictures."""
    kind = type(pipe).__name__
    if getattr(pipe, "transformer", None) is None or "image" not in _parameters(pipe):
        raise BadInput(
            f"{base}: {kind} edits no pictures; name an editor such as FLUX.1-Kontext-dev"
        )
    family = FAMILIES.get(kind) or _guess_family(pipe)
    if pipe.config.get("is_distilled") or "Turbo" in Path(base).name:
        note(
            f"{base} is distilled to few steps and may blur in a long training; its undistilled "
            "base is the safer start"
        )
        family = replace(family, evaluation=family.rollout)
    return family


def _checked_resolution(pipe, family, base, resolution):
    """The resolution to work at; BadInput, naming the nearest, if the editor cannot take it."""
    resolution = resolution or pipe.vae.config.get("sample_size") or 1024
    multiple = 2 * pipe.vae_scale_factor  # latent pixels are packed 2 x 2
    most = math.isqrt(family.max_pixels)
    nearest = round(min(resolution, most) / multiple) * multiple or multiple
    if resolution != nearest:
        raise BadInput(
            f"resolution {resolution}: {base} takes multiples of {multiple} up to {most}; "
            f"take {nearest}"
        )
    return resolution


def _tokenizer(pipe):
    """The tokenizer that reads the whole prompt, or None."""
    tokenizer = getattr(pipe, "tokenizer_2", None) or getattr(pipe, "tokenizer", None)
    return getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds its tokenizer


# ---------------------------------------------------------------- policies


def add_policies(
    editor: Editor,
    rank: int | None = None,
    alpha: float | None = None,
    targets: list[str] | None = None,
    seed: int = 0,
    averages: tuple[str, ...] = ("old",),
    start: str | Path = "",
) -> None:
    """Binds the LoRA adapters `new` (trained, active) and `averages` (frozen); all float32.

    A is gaussian with deviation 1 / rank, drawn from (seed, parameter's name) and the same in all;
    B is zero, so new = old = base. targets: endings of module names; None: the family's. With
    `start`, a LoRA as read_lora takes it, new = old = that LoRA, and rank, alpha and layers are its
    own. BadInput when no module has such a name, or the LoRA is for another editor.
    """
    targets = targets or editor.family.targets
    config = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
    if start:
        config = read_lora(start, editor.pipe).config
    transformer = editor.transformer
    warnings.filterwarnings("ignore", "Already found a `peft_config`")
    with torch.random.fork_rng(devices=[]):  # peft draws A, too
        try:
            for name in (*averages, "new"):
                transformer.add_adapter(LoraConfig(**config, init_lora_weights="gaussian"), name)
        except ValueError as error:
            raise BadInput(
                f"LoRA {start or targets}: its names match no module of "
                f"{type(transformer).__name__} that can have one ({one_line(error)}); name layers, "
                "or a LoRA, of this model"
            ) from error
    editor.lora_layers = tuple(
        layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer)
    )
    editor.policies = ("new", *averages)
    editor.active = "new"
    for name in editor.policies:
        for key, parameter in lora_parameters(editor, name).items():
            parameter.data = parameter.data.float()
            # All ranks and all policies begin with the same A, whatever else draws numbers.
            if "lora_A" in key:
                draw = torch.randn(parameter.shape, generator=seeded(seed, "lora", key))
                parameter.data.copy_(draw / parameter.shape[0])
            parameter.requires_grad_(name == "new")
    if start:
        load_lora(editor, start, "new")
        for average in averages:
            soft_update(editor, 0.0, average)  # a copy


@contextmanager
def policy(editor: Editor, name: str) -> Iterator[None]:
    """Within, the transformer is the policy `new`, `old`, ... or `base`; after, what it was.

    Gradient checkpointing recomputes during backward: call that under the same policy.
    """
    assert name in ("base", *editor.policies), f"no policy {name}"
    before = editor.active
    _activate(editor, name)
    try:
        yield
    finally:
        _activate(editor, before)


def _activate(editor, name):
    """Turns a policy on.

    Sets peft's flags themselves: its set_adapter and disable_adapters also walk all parameters to
    change requires_grad, which is to stay, and take a third of a small model's forward.
    """
    for layer in editor.lora_layers:
        layer._disable_adapters = name == "base"
        if name != "base":
            layer._active_adapter = [name]
    editor.active = name


def lora_parameters(editor: Editor, name: str) -> dict[str, nn.Parameter]:
    """{LAYER.lora_A.weight (rank, in) or LAYER.lora_B.weight (out, rank): Parameter}, sorted.

    The keys are without the adapter's name: the same for new and old.
    """
    found = {}
    for key, parameter in editor.transformer.named_parameters():
        if f".{name}.weight" in key:
            found[key.replace(f".{name}.", ".")] = parameter
    return dict(sorted(found.items()))


@torch.no_grad()
def soft_update(editor: Editor, decay: float, average: str = "old") -> None:
    """old <- decay * old + (1 - decay) * new, in place (Alg. 1 line 14 of arXiv:2509.16117v2)."""
    new = lora_parameters(editor, "new")
    for key, old in lora_parameters(editor, average).items():
        old.lerp_(new[key], 1 - decay)


# ---------------------------------------------------------------- LoRA files


@dataclass
class Lora:
    """A LoRA as a file holds it."""

    weights: dict[str, Tensor]  # by the names that lora_parameters gives
    config: dict  # keywords of its LoraConfig; target_modules are its layers by full name
    is_full_strength: bool  # alpha / rank is multiplied into B, as save_lora does


# What sets the shapes and the strength of a LoRA's layers.
LORA_CONFIG = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


@torch.no_grad()
def save_lora(editor: Editor, folder: str | Path, name: str = "new") -> None:
    """Writes one adapter as folder/LORA_FILE, at full strength: alpha / rank is multiplied into B.

    So every reader of tensors draws the same edits: diffusers' pipe.load_lora_weights(folder), and
    programs that know no metadata. (`.alpha` tensors would not do: diffusers 0.42 refuses them for
    Flux.2.) What load_lora and add_policies need of the LoraConfig lies in the file's metadata,
    under a name of our own: under diffusers' name the strength would count twice. No bit is lost:
    where float32 cannot undo the product, as with a factor of 1.5, the file is float64. LongCat's
    pipeline has no load_lora_weights; there it is
    pipe.transformer.load_lora_adapter(folder, weight_name=LORA_FILE).
    """
    strengths = _strengths(editor, name)
    # A power of two changes a number's exponent alone; frexp gives those the mantissa 0.5.
    is_exact = all(math.frexp(strength)[0] == 0.5 for strength in strengths.values())
    dtype = torch.float32 if is_exact else torch.float64
    full = {}
    for key, weight in lora_parameters(editor, name).items():
        full[f"transformer.{key}"] = weight.to(dtype) * strengths[key]
    config = editor.transformer.peft_config[name]
    config = {key: getattr(config, key) for key in LORA_CONFIG}
    with whole_file(Path(folder, LORA_FILE)) as part:
        save_file(full, part, {"format": "pt", "lora_config": json.dumps(config)})


def _strengths(editor, name):
    """{key of lora_parameters: alpha / rank for B, which peft multiplies it with; 1 for A}."""
    strengths = {}
    for key in lora_parameters(editor, name):
        layer = editor.transformer.get_submodule(key.split(".lora_")[0])
        strengths[key] = layer.scaling[name] if "lora_B" in key else 1.0
    return strengths


@torch.no_grad()
def load_lora(editor: Editor, folder: str | Path, name: str) -> None:
    """Copies a LoRA into the adapter `name`, with the bits that save_lora was given.

    folder: as read_lora takes it. BadInput when its layers, rank or alpha are not the adapter's.
    """
    lora = read_lora(folder, editor.pipe)
    own = lora_parameters(editor, name)
    wanted = {key: parameter.shape for key, parameter in own.items()}
    found = {key: weight.shape for key, weight in lora.weights.items()}
    alpha = editor.transformer.peft_config[name].lora_alpha
    if found != wanted or lora.config["lora_alpha"] != alpha:
        raise BadInput(
            f"{folder}: its layers, rank or alpha are not those of this "
            f"{type(editor.transformer).__name__} and its policies; take the LoRA's own base "
            "model, rank and alpha"
        )
    for key, strength in _strengths(editor, name).items():
        if not lora.is_full_strength:
            strength = 1.0  # B is as it was trained, to be multiplied by this adapter
        own[key].copy_(lora.weights[key] / strength)


def read_lora(place: str | Path, pipe: DiffusionPipeline | None = None) -> Lora:
    """The LoRA in a file, in a folder, or of a hub id.

    Takes what save_lora, diffusers and PEFT write, and the names and `.alpha` tensors of other
    trainers. With `pipe`, layers by another program's names go through diffusers' converter for it.
    BadInput when there is none, or it is not whole.
    """
    try:
        file = _lora_file(place)
        tensors = load_file(file)
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
        weights = _plain_names(tensors)
        if pipe and not _has_layers(pipe, weights):
            with suppress(Exception):  # what the converter raises on other names has no end
                weights = _plain_names(pipe.lora_state_dict(tensors))
        config = _lora_config(file, metadata, weights)
    except Exception as error:  # nor has what a damaged file makes three libraries raise
        raise BadInput(
            f"{place}: not a LoRA that can be read ({one_line(error)}); name RUN/checkpoint-N, a "
            "whole file or a hub id"
        ) from error
    return Lora(weights, config, is_full_strength="lora_config" in metadata)


def _lora_file(place):
    """The file of the LoRA that a file, a folder or a hub id names; there may be none."""
    path = Path(place)
    if not path.exists():
        wanted = [LORA_FILE, PEFT_FILE, "adapter_config.json"]
        path = Path(snapshot_download(str(place), allow_patterns=wanted))
    if path.is_file():
        return path
    peft = path / PEFT_FILE
    return peft if peft.is_file() else path / LORA_FILE


def _plain_names(tensors):
    """A LoRA's tensors by the names that lora_parameters gives; `.alpha` multiplied into B."""
    weights = {}
    for key, tensor in tensors.items():
        # PEFT's prefix and that of ComfyUI, diffusers'; PEFT's adapter; kohya's down and up.
        key = re.sub(r"^(base_model\.model\.|diffusion_model\.|transformer\.)+", "", key)
        key = key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        weights[key.replace(".default.", ".")] = tensor
    for key in sorted(weights):
        if key.endswith(".alpha"):
            layer = key.removesuffix("alpha")
            strength = weights.pop(key).item() / len(weights[f"{layer}lora_A.weight"])
            weights[f"{layer}lora_B.weight"] = weights[f"{layer}lora_B.weight"].float() * strength
    return weights


def _has_layers(pipe, weights):
    """Whether all of a LoRA's layers are modules of a pipeline's transformer."""
    modules = dict(pipe.transformer.named_modules())
    return all(key.split(".lora_")[0] in modules for key in weights)


def _lora_config(file, metadata, weights):
    """The keywords of the LoraConfig that a file's LoRA was trained under.

    Where there are no settings, alpha is the rank, as in diffusers.
    """
    layers = sorted({key.split(".lora_")[0] for key in weights})
    # save_lora's, or diffusers'
    settings = metadata.get("lora_config") or metadata.get("lora_adapter_metadata")
    beside = Path(file.parent, "adapter_config.json")
    if file.name == PEFT_FILE and beside.is_file():
        settings = beside.read_text()
    if settings:
        config = dict(json.loads(settings))
    else:
        ranks = {f"^{layer}.lora_B.": len(weights[f"{layer}.lora_A.weight"]) for layer in layers}
        config = get_peft_kwargs(ranks, None, weights)
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    known = {key: config[key] for key in LORA_CONFIG if key in config}
    return known | {"target_modules": layers}


# ---------------------------------------------------------------- rollout


@dataclass
class Group:
    """K edits of one row and what training needs to see them again."""

    images: Pictures  # K
    x_0: Tensor  # (K, N, C) float32, clean packed latents
    # Keyword arguments of the transformer for a batch of 1; hidden_states are the sources' tokens,
    # (1, S, C).
    cond: dict
    sigmas: Tensor  # (steps,) float32 on the CPU, flow times as the transformer was given them

    def for_training(self) -> "Group":
        """The group without its pictures, tensors on the CPU: as ranks hand it on."""
        return Group([], self.x_0.cpu(), send_to_device(self.cond, "cpu"), self.sigmas)


def rollout(
    editor: Editor,
    images: Pictures,
    prompt: str,
    generators: list[torch.Generator],
    steps: int,
    guidance: float | None = None,
    rollout_batch: int | None = None,
    evaluation: bool = False,
) -> Group:
    """Draws K = len(generators) edits of one row with the active policy.

    images: the row's. Copy j's noise comes from generators[j] alone. guidance: of the family's
    kind; None: the family's own for rollouts, or with `evaluation` for evaluation. rollout_batch:
    edits a pipeline call; None: all. BadInput when the editor cannot take these pictures or this
    prompt, or cannot be trained as it takes them.
    """
    fault = row_fault(editor, {"images": images, "prompt": prompt})
    if fault:
        raise BadInput(fault)
    if guidance is None:
        guidance = editor.family.evaluation if evaluation else editor.family.rollout
    # All copies in as few calls as memory allows; each call encodes text and sources once.
    batch = rollout_batch or len(generators)
    groups = []
    for first in range(0, len(generators), batch):
        some = generators[first : first + batch]
        groups.append(_call_pipeline(editor, images, prompt, some, steps, guidance))
    edits = sum([group.images for group in groups], [])
    x_0 = torch.cat([group.x_0 for group in groups])  # (K, N, C)
    # What the model is told of the row is the same in every call.
    return Group(edits, x_0, groups[0].cond, groups[0].sigmas)


def _call_pipeline(editor, images, prompt, generators, steps, guidance):
    """One call of the diffusers pipeline, with an ear on it; BadInput for what it refuses."""
    pipe = editor.pipe
    # Pipelines resize by rules of their own: what has its final size already, they leave alone.
    images = [
        image.resize(working_size(editor, image), Image.Resampling.LANCZOS) for image in images
    ]
    told = []  # the transformer's keyword arguments, step by step

    def listen(module, args, kwargs):
        # With true CFG a step's second call is the unconditional one, and not for us.
        if len(told) == (pipe.scheduler.step_index or 0):
            told.append(kwargs)

    ear = pipe.transformer.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        with ear, _sources_keep_their_size(editor, images):
            edits = pipe(
                image=images[0] if len(images) == 1 else images,
                prompt=prompt,
                # A generator a copy, so that a copy's noise does not depend on its neighbours.
                generator=list(generators),
                num_images_per_prompt=len(generators),
                num_inference_steps=steps,
                **_call_options(editor, images[0].size, guidance),
            ).images
    except ValueError as error:
        raise BadInput(f"{editor.kind} refuses a row: {one_line(error)}; remove it") from error
    # The latents that were decoded; and the times as the transformer was told them, which in bf16
    # are not the scheduler's sigmas.
    x_0 = pipe.scheduler.last_x.float()  # (B, N, C)
    sigmas = torch.stack([arguments["timestep"][0] for arguments in told]).float().cpu()
    _check_call(editor, told[0]["hidden_states"], x_0, sigmas)
    return Group(edits, x_0, _conditioning(told[0], x_0.shape[1]), sigmas)


def _call_options(editor, size, guidance):
    """Of the keywords that fix size, guidance and length of text, those that the pipeline takes."""
    width, height = size
    options = {
        "height": height,
        "width": width,
        "max_area": height * width,  # Kontext would work at a megapixel,
        "_auto_resize": False,  # and resize its sources to sizes it was trained on
        "max_sequence_length": editor.max_text,
        editor.family.guidance: guidance,
    }
    # True CFG needs both: a scale above 1 and a negative prompt. One alone, the pipeline warns of.
    if guidance is None or guidance > 1:
        options["negative_prompt"] = editor.family.negative
    taken = _parameters(editor.pipe)
    return {key: value for key, value in options.items() if value is not None and key in taken}


def working_size(editor: Editor, image: Image.Image) -> tuple[int, int]:
    """(width, height) at which a picture is edited: about resolution^2 pixels in its own ratio."""
    multiple = 2 * editor.pipe.vae_scale_factor  # pixels of a token's side
    scale = editor.resolution / (image.width * image.height) ** 0.5
    sides = [max(multiple, round(side * scale / multiple) * multiple) for side in image.size]
    # Above max_pixels the pipeline would shrink the source and break the size of the edit.
    while sides[0] * sides[1] > editor.family.max_pixels:
        sides[sides.index(max(sides))] -= multiple
    return tuple(sides)


@contextmanager
def _sources_keep_their_size(editor, images):
    """Within, a pipeline that sizes sources by a function of its module keeps the size they have.

    The small picture that Qwen-Image-Edit-Plus shows its text encoder stays the pipeline's own, if
    it is not above ours.
    """
    name = editor.family.sizes
    if not name:
        yield
        return
    module = _module(editor.pipe)
    pipelines_own = getattr(module, name)
    sizes = {image.width / image.height: image.size for image in images}

    def own_size(area, ratio):
        # (width, height), and in some pipelines a third value, which stays.
        width_height_more = pipelines_own(min(area, editor.resolution**2), ratio)
        if area < 1024**2:  # the text encoder's picture; the VAE's area is a megapixel
            return width_height_more
        return (*sizes[ratio], *width_height_more[2:])

    setattr(module, name, own_size)
    try:
        yield
    finally:
        setattr(module, name, pipelines_own)


def _conditioning(arguments, N):
    """A Group's cond out of a call's arguments: no times, no edits, and one copy of the rest."""
    cond = {name: value for name, value in arguments.items() if name != "timestep"}
    cond["hidden_states"] = cond["hidden_states"][:, N:]  # (B, S, C), the edits' tokens come first
    for name, value in cond.items():
        if _has_batch(name, value):
            same = torch.equal(value, value[:1].expand_as(value))
            assert same, f"{name} differs between copies of one group"
            cond[name] = value[:1].clone()  # a slice would keep all copies in memory
    return cond


def _has_batch(name, value):
    """Whether an argument of the transformer has a batch dimension; Flux's ids may have none."""
    is_ids = name.endswith("_ids") and getattr(value, "ndim", 0) == 2  # (tokens, 3)
    return isinstance(value, Tensor) and not is_ids


def _check_call(editor, tokens, x_0, sigmas):
    """BadInput unless what was overheard is what `velocity` replays."""
    if tokens.shape[1] <= x_0.shape[1]:  # N + S of (B, N + S, C), N of (B, N, C)
        raise BadInput(
            f"{editor.kind} does not see the source picture as tokens beside the edit's; take "
            "another editor"
        )
    if len(tokens) != len(x_0):
        raise BadInput(
            f"{editor.kind} runs its guidance in one batch with the edits; give a guidance of 1"
        )
    # A model that is told other times than t in [0, 1] could not be trained at x_t by them.
    wanted = editor.pipe.scheduler.sigmas[: len(sigmas)].cpu()
    are_flow_times = torch.allclose(sigmas, wanted, atol=0.01)
    assert are_flow_times, f"{editor.kind} tells its transformer {sigmas}, not flow times {wanted}"


# ---------------------------------------------------------------- velocity


def velocity(editor: Editor, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
    """The active policy's v at x_t (B, N, C) and t (B,) under a group's cond: (B, N, C) float32.

    The one place that calls the transformer. It gets t as the pipeline gives it, in its own dtype:
    noise with t from Group.sigmas, which that rounding leaves as they are. Differentiable in the
    LoRA's parameters.
    """
    B, N, _ = x_t.shape
    source = cond["hidden_states"]  # (1, S, C)
    # In bf16 the model would hear 0.7004 as 0.6992 while x_t has the noise of 0.7004.
    t_told = t.to(source.device, source.dtype)  # (B,)
    is_exact = torch.equal(t_told.float(), t.to(source.device))
    assert is_exact, f"t is not a time that can be told in {source.dtype}"
    # The row's conditioning, B times; contiguous, as the pipeline gives it, for equal bits.
    arguments = dict(cond)
    for name, value in cond.items():
        if _has_batch(name, value):
            arguments[name] = value.expand(B, *value.shape[1:]).contiguous()
    tokens = [x_t.to(source), arguments["hidden_states"]]
    arguments["hidden_states"] = torch.cat(tokens, dim=1)  # (B, N + S, C)
    # The tokens of the edit and of its source attend to each other.
    v = editor.transformer(timestep=t_told, **arguments)[0]  # (B, N + S, C)
    return v[:, :N].float()  # what it says of the source's tokens means nothing


# ---------------------------------------------------------------- checks


def row_fault(editor: Editor, row: dict) -> str:
    """Why this editor cannot take a row, found without drawing; "" if nothing speaks against it.

    row: looked at are the number of its `images` and its `prompt`; one that will be cut is a note.
    """
    family = editor.family
    pictures = len(row["images"])
    if pictures > 1 and not family.several:
        return (
            f"a row has {pictures} pictures and {editor.kind} takes one; remove the row or take "
            "another editor"
        )
    prompt = row["prompt"]
    if family.long_text == "whole":
        return ""
    if _text_tokens(editor.pipe, prompt) + family.template <= editor.max_text:
        return ""
    fault = (
        f"a prompt has more than the {editor.max_text} tokens that {editor.kind} takes: "
        f"{prompt[:60]!r}..."
    )
    if family.long_text == "fail":
        return f"{fault}; shorten it"
    note(f"{fault}; the rest is cut")
    return ""


def _text_tokens(pipe, prompt):
    """The tokens of a prompt, without those of the template that some pipelines put around it."""
    tokenizer = _tokenizer(pipe)
    if tokenizer is None:
        return 0
    parts = [prompt]
    if hasattr(_module(pipe), "split_quotation"):  # LongCat reads quoted text by the letter
        parts = []
        for part, is_quoted in _module(pipe).split_quotation(prompt):
            parts += list(part) if is_quoted else [part]
    return sum(len(tokenizer(part, verbose=False).input_ids) for part in parts)


def check_editor(
    editor: Editor,
    row: dict,
    guidance: float | None,
    optimizer: torch.optim.Optimizer,
    started: bool = False,
) -> None:
    """Stops a run that could not learn: see the three checks below.

    row: one of the data; started: the policies begin from a LoRA, not as the base. BadInput names
    the row, the editor or the LoRA's layers.
    """
    sources = [load_image(path) for path in row["images"]]
    inverted = [ImageOps.invert(source) for source in sources]
    try:
        seen, other = [
            rollout(editor, images, row["prompt"], [seeded("check")], 1, guidance)
            for images in (sources, inverted)
        ]
    except BadInput as error:
        raise BadInput(f"{row['where']}: row {row['id']}: {error}") from error
    x_t = seen.x_0
    t = seen.sigmas  # (1,)
    v = velocity(editor, x_t, t, seen.cond)

    # 1. The editor sees its source.
    if torch.allclose(v, velocity(editor, x_t, t, other.cond)):
        raise BadInput(
            f"{editor.kind}: another source picture changes nothing; take an editor that sees it"
        )
    # 2. The policies are equal at the start.
    equals = editor.policies if started else ("base", *editor.policies)
    for name in equals:
        with policy(editor, name):
            is_same = torch.equal(v, velocity(editor, x_t, t, seen.cond))
        assert is_same, f"policies new and {name} differ at the start"
    # 3. The LoRA gets a gradient.
    v.square().mean().backward()
    gradients = [parameter.grad for parameter in lora_parameters(editor, "new").values()]
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        raise BadInput(f"{editor.kind}: the LoRA gets no gradient; name other --lora_targets")
    optimizer.zero_grad()


# ---------------------------------------------------------------- memory and sharding


@contextmanager
def parked(editor: Editor, park: bool = True) -> Iterator[None]:
    """Within, all of the pipeline but its transformer lies in the CPU's memory; after, as before.

    park: False does nothing.
    """
    device = editor.transformer.device
    parts = []
    for name, part in editor.pipe.components.items():
        if park and isinstance(part, nn.Module) and name != "transformer":
            parts.append(part.to("cpu"))
    try:
        yield
    finally:
        for part in parts:
            part.to(device)


def compile_blocks(editor: Editor) -> None:
    """Compiles the transformer's blocks, each class once for policy, gradient mode and batch."""
    # The default of 8 recompilations would fall back to eager in silence.
    torch._dynamo.config.recompile_limit = 64
    editor.transformer.compile_repeated_blocks()


def shard_base(editor: Editor, accelerator: Accelerator) -> None:
    """Spreads the frozen base over all ranks by accelerate's FSDP2; the LoRA stays whole on each.

    To be called with the editor on the CPU; what is not sharded moves to the rank's device.
    """
    adapters = []
    for layer in editor.lora_layers:
        adapters += [layer.lora_A, layer.lora_B]
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=editor.transformer._repeated_blocks,
        ignored_modules=adapters,
    )
    fsdp2_prepare_model(accelerator, editor.transformer)
    spread = [part for part in editor.transformer.parameters() if hasattr(part, "to_local")]
    whole = sum(part.numel() for part in spread)
    here = sum(part.to_local().numel() for part in spread)
    accelerator.print(f"the base's {whole:,} numbers are spread out, {here:,} on this rank")
    editor.pipe.to(accelerator.device)


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """What sample.py is told."""

    image: list[str] = setting([], "The source picture; several where the editor takes them.")
    prompt: str = setting("", "The instruction.")
    out: str = setting("out.png", "Where the picture of the edits goes.")
    base: str = setting(TOY, "The editor: a folder or a hub id.")
    lora: str = setting("", "A LoRA, ours or another's: RUN/checkpoint-N, a file or a hub id.")
    compare: bool = setting(False, "Show base and LoRA side by side, with the same seeds.")
    num: int = setting(4, "Edits to draw.", at_least=1, at_most=100)
    seed: int = setting(
        42, "The first edit's seed; the others follow it.", at_least=0, at_most=2**32
    )
    steps: int = setting(28, "Solver steps.", at_least=1, at_most=1000)
    guidance: float | None = setting(
        None, "Guidance. [the family's for evaluation]", at_least=0, at_most=100
    )
    resolution: int | None = setting(
        None,
        "Square root of the working pixels. [what the VAE was made for]",
        at_least=16,
        at_most=8192,
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")

    def __post_init__(self):
        super().__post_init__()
        if not self.image:
            raise BadInput("--image is missing; name the source picture")
        if not self.prompt.strip():
            raise BadInput("--prompt is empty; say what to change")
        if self.compare and not self.lora:
            raise BadInput(
                "--compare has nothing to compare with the base; add --lora RUN/checkpoint-N"
            )
        ending = Path(self.out).suffix.lower()
        if Image.registered_extensions().get(ending) not in Image.SAVE:
            raise BadInput(f"--out {self.out}: not a picture's name; end it in .png")


def _draw(editor, args, images, names):
    """The grid of the edits: a row of pictures for each policy in `names`."""
    seeds = range(args.seed, args.seed + args.num)
    rows = []
    captions = []
    for name in names:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with policy(editor, name):
            group = rollout(
                editor,
                images,
                args.prompt,
                generators,
                args.steps,
                args.guidance,
                rollout_batch=4,
                evaluation=True,
            )
        rows.append(images + group.images)
        captions.append(["source"] * len(images) + [f"{name}, seed {seed}" for seed in seeds])
    return picture_grid(rows, captions, args.prompt)


def main(argv: list[str] | None = None) -> None:
    args = parse_settings(Settings, argv, description=__doc__.splitlines()[0])
    images = [load_image(path) for path in args.image]
    names = ["base"]
    if args.lora:
        read_lora(args.lora)
        names = ["base", "new"] if args.compare else ["new"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with whole_file(args.out) as part:
        # A disk that refuses is better known now than after minutes of work.
        part.touch()
        part.unlink()
        editor = load_editor(
            args.base, device, dtype, args.resolution, trust_remote_code=args.trust_remote_code
        )
        if args.lora:
            add_policies(editor, averages=(), start=args.lora)
        _draw(editor, args, images, names).save(part)
    say(f"wrote {args.out}: {args.num} edits with {' and '.join(names)}")


if __name__ == "__main__":
    run_script(main)
