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
   only the first step, which has no history, is first order.
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
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import send_to_device
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.peft_utils import get_peft_kwargs
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer
from transformers.utils import is_torchvision_available

from data_prep import (
    BadInput,
    CheckedSettings,
    disk_faults,
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
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
# Flux.2's single blocks have one matrix for q, k, v and the MLP. Their output matrix has the name
# of the double blocks' container, so it is named block by block; no Flux.2 has more than 48.
FLUX2_OUTPUTS = tuple(f"single_transformer_blocks.{block}.attn.to_out" for block in range(48))
FLUX2_TARGETS = (*LORA_TARGETS, "attn.to_qkv_mlp_proj", *FLUX2_OUTPUTS)


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
    max_pixels: int | None = None  # it shrinks sources above these
    # A prompt of too many tokens is "cut", taken "whole", or makes the pipeline "fail".
    long_text: str = "cut"
    targets: tuple[str, ...] = LORA_TARGETS
    distilled: tuple[str, ...] = ()  # names of its models for few steps


KONTEXT = Family(rollout=2.5, evaluation=3.5)  # an embedded scale, no CFG
QWEN = Family(
    guidance="true_cfg_scale",
    rollout=1.0,
    evaluation=4.0,
    negative=" ",
    sizes="calculate_dimensions",
    long_text="whole",
)
FLUX2 = Family(  # an embedded scale, no CFG
    rollout=4.0, evaluation=4.0, several=True, max_pixels=1024**2, targets=FLUX2_TARGETS
)
LONGCAT = Family(
    rollout=1.0,
    evaluation=4.5,
    sizes="calculate_dimensions",
    long_text="fail",
    distilled=("LongCat-Image-Edit-Turbo",),
)
FAMILIES = {
    "FluxKontextPipeline": KONTEXT,
    "QwenImageEditPipeline": QWEN,
    "QwenImageEditPlusPipeline": replace(QWEN, several=True),
    "Flux2Pipeline": FLUX2,
    "Flux2KleinPipeline": replace(
        FLUX2, rollout=1.0, distilled=("FLUX.2-klein-4B", "FLUX.2-klein-9B")
    ),
    "LongCatImageEditPipeline": LONGCAT,
}


@functools.cache
def note(text: str) -> None:
    """Tells the user, once in a process, of something that is no error."""
    print(f"note: {text}", file=sys.stderr)


def guess_family(pipe: DiffusionPipeline) -> Family:
    """A Family for a pipeline class that FAMILIES does not know, and a note of what was assumed."""
    name = type(pipe).__name__
    family = Family()
    scale = "an embedded guidance"
    if not getattr(pipe.transformer.config, "guidance_embeds", False):
        if "true_cfg_scale" in call_arguments(pipe):
            family = Family(guidance="true_cfg_scale", negative=" ")
        family = replace(family, rollout=1.0)
        scale = f"{family.guidance} 1 (no CFG)"
    sources = "kept in their size"
    if hasattr(pipeline_module(pipe), QWEN.sizes):
        family = replace(family, sizes=QWEN.sizes)
        sources = f"sized by {family.sizes}"
    note(
        f"{name} is not in FAMILIES of sample.py; assumed: one source picture, {sources}, "
        f"{scale} in rollouts, the pipeline's own guidance in evaluation, the usual LoRA targets"
    )
    return family


def call_arguments(pipe: DiffusionPipeline) -> dict:
    """The parameters that a pipeline's call takes, by name."""
    return dict(inspect.signature(pipe.__call__).parameters)


def pipeline_module(pipe: DiffusionPipeline):
    """The module of a pipeline's class, where its functions for sizes and texts stand."""
    return sys.modules[type(pipe).__module__]


# ---------------------------------------------------------------- the solver


class FlowDPMSolverMultistepScheduler(FlowMatchEulerDiscreteScheduler):
    """Second-order multistep solver on the parent's own sigmas: one model evaluation a step.

    dx/dt = v is integrated with v linear in t through this evaluation and the last (two-step
    Adams-Bashforth with variable steps), in float32. It has the order of DPM-Solver++ 2M
    (arXiv:2211.01095, Alg. 2) but nothing infinite at t = 1 or t = 0. The only state is the last
    velocity; a rollout's first step, which set_timesteps announces, drops it. `solver_order` 1 is
    the parent's Euler step, for ablations. `last_x` is the newest x.
    """

    solver_order = 2

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        """From this sigma to the next: v and x of any one shape -> x, in v's dtype."""
        if self.solver_order == 1:
            (self.last_x,) = super().step(
                model_output, timestep, sample, return_dict=False, **kwargs
            )
        else:
            self.last_x = self.second_order_step(model_output, timestep, sample)
        if return_dict:
            return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=self.last_x)
        return (self.last_x,)

    def second_order_step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
        """x(t + h) = x + h v + h^2/2 dv/dt, with dv/dt from this velocity and the last."""
        if self.step_index is None:  # the first step of a rollout
            self._init_step_index(timestep)
            self._last_v = None
        t = self.sigmas[self.step_index]
        h = self.sigmas[self.step_index + 1] - t
        v = model_output.float()
        x = sample.float() + h * v
        if self._last_v is not None:
            t_last = self.sigmas[self.step_index - 1]
            slope = (v - self._last_v) / (t - t_last)  # dv/dt along the path
            x = x + 0.5 * h * h * slope
        self._last_v = v
        self._step_index += 1
        return x.to(model_output.dtype)


# ---------------------------------------------------------------- loading


@dataclass
class Editor:
    """A frozen diffusers pipeline with our solver, and the LoRA policies over it."""

    pipe: DiffusionPipeline
    family: Family
    resolution: int  # square root of the pixels it works at
    max_text: int  # tokens that a prompt may have
    lora_layers: list[BaseTunerLayer] = field(default_factory=list)
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
    max_text: int | None = None,
    solver_order: int = 2,
    trust_remote_code: bool = False,
) -> Editor:
    """The editor in the folder, or of the hub id, `base`: frozen, in eval mode, with our solver.

    resolution: in pixels; None: what the VAE was made for. max_text: in tokens; None: the
    pipeline's default, or its tokenizer's own limit where that is lower. BadInput when nothing
    loads, when it is no image editor, or when it cannot take the resolution.
    """
    base = str(base)
    pipe = load_pipeline(base, device, dtype, trust_remote_code)
    family = family_of(pipe, base)
    resolution = checked_resolution(pipe, family, base, resolution)
    max_text = max_text or default_max_text(pipe)
    if "max_sequence_length" not in call_arguments(pipe):
        pipe.tokenizer_max_length = max_text
    pipe.scheduler = FlowDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.solver_order = solver_order
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return Editor(pipe, family, resolution, max_text)


def load_pipeline(
    base: str, device: str | torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> DiffusionPipeline:
    """The pipeline in a folder or of a hub id as diffusers loads it; BadInput if it cannot."""
    fix = "name a whole model folder or a hub id owner/name"
    if base == TOY and not Path(base).is_dir():
        raise BadInput(f"{base}: no such model folder; run python data_prep.py toy first")
    if not Path(base).is_dir() and not is_hub_id(base):
        raise BadInput(f"{base}: no such model folder; {fix}")
    try:
        processors, tokenizers = load_processors(base)
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
        reason = one_line(error)
        for word in ("orchvision", "video processor", "Placeholder"):
            if word in reason:
                fix = "its processor needs torchvision; pip install torchvision"
        raise BadInput(f"{base}: not a diffusers model ({reason}); {fix}") from error


def load_processors(base: str) -> tuple[dict, dict]:
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


def family_of(pipe: DiffusionPipeline, base: str) -> Family:
    """A pipeline's family; BadInput for one that edits no pictures."""
    kind = type(pipe).__name__
    if getattr(pipe, "transformer", None) is None or "image" not in call_arguments(pipe):
        raise BadInput(
            f"{base}: {kind} edits no pictures; name an editor such as FLUX.1-Kontext-dev"
        )
    family = FAMILIES.get(kind) or guess_family(pipe)
    if pipe.config.get("is_distilled") or Path(base).name in family.distilled:
        note(
            f"{base} is distilled to few steps and may blur in a long training; its undistilled "
            "base is the safer start"
        )
        family = replace(family, evaluation=family.rollout)
    return family


def checked_resolution(
    pipe: DiffusionPipeline, family: Family, base: str, resolution: int | None
) -> int:
    """The resolution to work at; BadInput, naming the nearest, if the editor cannot take it."""
    resolution = resolution or getattr(pipe.vae.config, "sample_size", None) or 1024
    multiple = 2 * pipe.vae_scale_factor  # latent pixels are packed 2 x 2
    nearest = max(multiple, round(resolution / multiple) * multiple)
    wanted = f"multiples of {multiple}"
    if family.max_pixels:
        most = int(family.max_pixels**0.5)
        nearest = min(nearest, most // multiple * multiple)
        wanted += f" up to {most}"
    if resolution != nearest:
        raise BadInput(f"resolution {resolution}: {base} takes {wanted}; take {nearest}")
    return resolution


def default_max_text(pipe: DiffusionPipeline) -> int:
    """Tokens that a prompt may have by the pipeline's default and its tokenizer's own limit."""
    tokens = 512
    if "max_sequence_length" in call_arguments(pipe):
        tokens = call_arguments(pipe)["max_sequence_length"].default
    return min(tokens, getattr(text_parts(pipe)[1], "model_max_length", tokens))


def text_parts(pipe: DiffusionPipeline) -> tuple:
    """(encoder, tokenizer) that read the whole prompt; either may be None."""
    encoder = getattr(pipe, "text_encoder_2", None) or getattr(pipe, "text_encoder", None)
    tokenizer = getattr(pipe, "tokenizer_2", None) or getattr(pipe, "tokenizer", None)
    return encoder, getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds its tokenizer


def is_hub_id(place: str | Path) -> bool:
    """Whether a name that is no file here may be one on the hub: owner/name."""
    return str(place).count("/") == 1 and not str(place).startswith((".", "/", "~"))


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
    transformer = editor.transformer
    targets = list(targets or editor.family.targets)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
    if start:
        lora = read_lora(start, editor.pipe)
        config = lora.config
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws A, too
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        try:
            for name in (*averages, "new"):
                transformer.add_adapter(LoraConfig(**config, init_lora_weights="gaussian"), name)
        except ValueError as error:
            raise BadInput(
                f"LoRA targets {config['target_modules']} match no module of "
                f"{type(transformer).__name__} that can have one ({one_line(error)}); name some of "
                "its layers"
            ) from error
    editor.lora_layers = [
        layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer)
    ]
    editor.policies = ("new", *averages)
    editor.active = "new"
    for name in editor.policies:
        for key, parameter in lora_parameters(editor, name).items():
            parameter.data = parameter.data.float()
            if "lora_A" in key:
                draw = torch.randn(parameter.shape, generator=seeded(seed, "lora", key))
                parameter.data.copy_(draw / parameter.shape[0])
            parameter.requires_grad_(name == "new")
        if start:
            copy_lora(editor, lora, name, start)


@contextmanager
def policy(editor: Editor, name: str) -> Iterator[None]:
    """Within, the transformer is the policy `new`, `old`, ... or `base`; after, what it was.

    Gradient checkpointing recomputes during backward: call that under the same policy.
    """
    assert name in ("base", *editor.policies), f"no policy {name}"
    before = editor.active
    activate(editor, name)
    try:
        yield
    finally:
        activate(editor, before)


def activate(editor: Editor, name: str) -> None:
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
        if ".lora_" in key and f".{name}." in key:
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
    weights = lora_parameters(editor, name)
    dtype = torch.float32
    for key, strength in lora_strengths(editor, name).items():
        if not torch.equal(weights[key] * strength / strength, weights[key]):
            dtype = torch.float64
    full = {f"transformer.{key}": weight.to(dtype) for key, weight in weights.items()}
    for key, strength in lora_strengths(editor, name).items():
        full[f"transformer.{key}"] = full[f"transformer.{key}"] * strength
    config = editor.transformer.peft_config[name].to_dict()
    config = {key: config[key] for key in LORA_CONFIG}
    with whole_file(Path(folder, LORA_FILE)) as part:
        save_file(full, part, {"format": "pt", "lora_config": json.dumps(config)})


def lora_strengths(editor: Editor, name: str) -> dict[str, float]:
    """{LAYER.lora_B.weight: alpha / rank}, which peft multiplies the LoRA's output with."""
    strengths = {}
    for layer, module in editor.transformer.named_modules():
        if isinstance(module, BaseTunerLayer):
            strengths[f"{layer}.lora_B.weight"] = module.scaling[name]
    return strengths


def load_lora(editor: Editor, folder: str | Path, name: str) -> None:
    """Copies a LoRA into the adapter `name`, with the bits that save_lora was given.

    BadInput when its layers, rank or alpha are not the adapter's.
    """
    lora = read_lora(folder)
    alpha = editor.transformer.peft_config[name].lora_alpha
    if lora.config["lora_alpha"] != alpha:
        raise BadInput(
            f"{folder}: was trained with alpha {lora.config['lora_alpha']}, not {alpha}; give the "
            "same alpha"
        )
    copy_lora(editor, lora, name, folder)


@torch.no_grad()
def copy_lora(editor: Editor, lora: Lora, name: str, place: str | Path) -> None:
    """Copies a LoRA into the adapter `name`; BadInput when its shapes are others."""
    own = lora_parameters(editor, name)
    shapes = {key: weight.shape for key, weight in lora.weights.items()}
    if shapes != {key: parameter.shape for key, parameter in own.items()}:
        raise BadInput(
            f"{place}: its layers or rank are not those of this "
            f"{type(editor.transformer).__name__} and its policies; take the LoRA's own base "
            "model and rank"
        )
    strengths = lora_strengths(editor, name) if lora.is_full_strength else {}
    for key, parameter in own.items():
        parameter.copy_(lora.weights[key] / strengths.get(key, 1.0))


def read_lora(place: str | Path, pipe: DiffusionPipeline | None = None) -> Lora:
    """The LoRA in a file, in a folder, or of a hub id.

    Takes what save_lora, diffusers and PEFT write, and the names and `.alpha` tensors of other
    trainers. With `pipe`, layers by another program's names go through diffusers' converter for it,
    and a LoRA for another model is refused. BadInput when there is none, or it is not whole.
    """
    try:
        file = find_lora(place)
        with safe_open(file, "pt") as stored:
            keys = stored.keys()  # it is no dict, though it has keys
            tensors = {key: stored.get_tensor(key) for key in keys}
            metadata = stored.metadata() or {}
        weights, alphas = plain_names(tensors)
        if pipe and strange_layers(weights, pipe):
            with suppress(Exception):  # what the converter raises on other names has no end
                weights, alphas = plain_names(pipe.lora_state_dict(tensors))
        config = lora_config(file, metadata, weights, alphas)
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
        raise BadInput(
            f"{place}: not a LoRA that can be read ({one_line(error)}); name RUN/checkpoint-N, a "
            "whole file or a hub id"
        ) from error
    strangers = strange_layers(weights, pipe) if pipe else []
    if strangers:
        raise BadInput(
            f"{place}: a LoRA for another model: {type(pipe.transformer).__name__} has no layer "
            f"{strangers[0]}, nor {len(strangers) - 1} more of its layers; take the LoRA's own "
            "base model"
        )
    return Lora(weights, config, is_full_strength="lora_config" in metadata)


def find_lora(place: str | Path) -> Path:
    """The file of the LoRA that a file, a folder or a hub id names; OSError if there is none."""
    path = Path(place)
    if not path.exists() and is_hub_id(place):
        wanted = [LORA_FILE, PEFT_FILE, "adapter_config.json"]
        path = Path(snapshot_download(str(place), allow_patterns=wanted))
    for file in (path, path / LORA_FILE, path / PEFT_FILE):
        if file.is_file():
            return file
    raise FileNotFoundError(f"it holds neither {LORA_FILE} nor {PEFT_FILE}")


def plain_names(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A LoRA's tensors by the names that lora_parameters gives, and {layer: alpha}."""
    weights = {}
    alphas = {}
    for key, tensor in tensors.items():
        for prefix in ("base_model.model.", "diffusion_model.", "transformer."):
            key = key.removeprefix(prefix)
        key = key.replace(".default.", ".")
        key = key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = tensor.item()
        else:
            weights[key] = tensor
    return weights, alphas


def layers_of(weights: dict[str, Tensor]) -> list[str]:
    """The names of the layers that a LoRA changes, sorted."""
    return sorted({key.split(".lora_")[0] for key in weights})


def strange_layers(weights: dict[str, Tensor], pipe: DiffusionPipeline) -> list[str]:
    """A LoRA's layers that are no modules of a pipeline's transformer."""
    modules = dict(pipe.transformer.named_modules())
    return [layer for layer in layers_of(weights) if layer not in modules]


def lora_config(file: Path, metadata: dict, weights: dict, alphas: dict) -> dict:
    """The keywords of the LoraConfig that a file's LoRA was trained under.

    metadata, weights, alphas: the file's; without any settings alpha is the rank, as in diffusers.
    """
    layers = layers_of(weights)
    if "lora_config" in metadata:  # save_lora's
        config = json.loads(metadata["lora_config"])
    elif "lora_adapter_metadata" in metadata and not alphas:  # diffusers'
        config = json.loads(metadata["lora_adapter_metadata"])
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
    elif file.name == PEFT_FILE and Path(file.parent, "adapter_config.json").is_file():
        config = LoraConfig.from_pretrained(file.parent).to_dict()
    else:
        ranks = {layer: len(weights[f"{layer}.lora_A.weight"]) for layer in layers}
        alphas = {f"{layer}.alpha": alphas.get(layer, ranks[layer]) for layer in layers}
        ranks = {f"^{layer}.lora_B.": rank for layer, rank in ranks.items()}  # diffusers' form
        config = get_peft_kwargs(ranks, alphas, weights)
    config = {key: config[key] for key in LORA_CONFIG if key in config}
    return config | {"target_modules": layers}


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


@dataclass
class Drawn:
    """What one call of the pipeline drew, and what was overheard of it."""

    images: Pictures  # B
    x_0: Tensor  # (B, N, C) in the model's dtype
    arguments: dict  # of the transformer's first conditional call; hidden_states (B, N + S, C)
    times: Tensor  # (steps,) float32 on the CPU, as the transformer was given them


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
    batch = rollout_batch or len(generators)
    calls = []
    for first in range(0, len(generators), batch):
        some = generators[first : first + batch]
        calls.append(_call_pipeline(editor, images, prompt, some, steps, guidance))
    check_call(editor, images, calls[0])
    edits = sum([call.images for call in calls], [])
    x_0 = torch.cat([call.x_0.float() for call in calls])  # (K, N, C)
    return Group(edits, x_0, conditioning(calls[0]), calls[0].times)


def _call_pipeline(editor, images, prompt, generators, steps, guidance) -> Drawn:
    """One call of the diffusers pipeline, with an ear on it; BadInput for what it refuses."""
    pipe = editor.pipe
    resampling = Image.Resampling.LANCZOS
    images = [image.resize(working_size(editor, image), resampling) for image in images]
    times = []
    arguments = {}

    def listen(module, args, kwargs):
        # With true CFG a step's second call is the unconditional one.
        if len(times) == (pipe.scheduler.step_index or 0):
            times.append(kwargs["timestep"][0].float().cpu())
            if not arguments:
                arguments.update(kwargs)

    ear = pipe.transformer.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        with ear, sources_keep_their_size(editor, images), cut_prompts_are_told(editor, prompt):
            drawn = pipe(
                image=images[0] if len(images) == 1 else images,
                prompt=prompt,
                generator=list(generators),
                num_images_per_prompt=len(generators),
                num_inference_steps=steps,
                **call_options(editor, images[0].size, guidance),
            ).images
    except ValueError as error:
        raise BadInput(f"{editor.kind} refuses a row: {one_line(error)}; remove it") from error
    return Drawn(drawn, pipe.scheduler.last_x, arguments, torch.stack(times))


def call_options(editor: Editor, size: tuple[int, int], guidance: float | None) -> dict:
    """Of the keywords that fix size, guidance and length of text, those that the pipeline takes."""
    width, height = size
    options = {
        "height": height,
        "width": width,
        "max_area": height * width,
        "_auto_resize": False,
        "max_sequence_length": editor.max_text,
        editor.family.guidance: guidance,
    }
    if guidance is None or guidance > 1:
        options["negative_prompt"] = editor.family.negative
    taken = call_arguments(editor.pipe)
    return {key: value for key, value in options.items() if value is not None and key in taken}


def working_size(editor: Editor, image: Image.Image) -> tuple[int, int]:
    """(width, height) at which a picture is edited: about resolution^2 pixels in its own ratio."""
    multiple = 2 * editor.pipe.vae_scale_factor
    scale = editor.resolution / (image.width * image.height) ** 0.5
    sides = [max(multiple, round(side * scale / multiple) * multiple) for side in image.size]
    while editor.family.max_pixels and sides[0] * sides[1] > editor.family.max_pixels:
        sides[sides.index(max(sides))] -= multiple
    return tuple(sides)


@contextmanager
def sources_keep_their_size(editor: Editor, images: Pictures) -> Iterator[None]:
    """Within, a pipeline that sizes sources by a function of its module keeps the size they have.

    The small picture that Qwen-Image-Edit-Plus shows its text encoder stays the pipeline's own, if
    it is not above ours.
    """
    name = editor.family.sizes
    if not name:
        yield
        return
    module = pipeline_module(editor.pipe)
    pipelines_own = getattr(module, name)
    sizes = {image.width / image.height: image.size for image in images}

    def own_size(area, ratio):
        width_height_more = pipelines_own(min(area, editor.resolution**2), ratio)
        if area < 1024**2:  # the text encoder's picture
            return width_height_more
        return (*sizes[ratio], *width_height_more[2:])

    setattr(module, name, own_size)
    try:
        yield
    finally:
        setattr(module, name, pipelines_own)


def conditioning(drawn: Drawn) -> dict:
    """A Group's cond out of a call's arguments: no times, no edits, and one copy of the rest."""
    N = drawn.x_0.shape[1]
    cond = {name: value for name, value in drawn.arguments.items() if name != "timestep"}
    cond["hidden_states"] = cond["hidden_states"][:, N:]  # (B, S, C)
    for name, value in cond.items():
        if has_batch(name, value):
            same = torch.equal(value, value[:1].expand_as(value))
            assert same, f"{name} differs between copies of one group"
            cond[name] = value[:1].clone()  # a slice would keep all copies in memory
    return cond


def has_batch(name: str, value) -> bool:
    """Whether an argument of the transformer has a batch dimension; Flux's ids may have none."""
    is_ids = name.endswith("_ids") and getattr(value, "ndim", 0) == 2  # (tokens, 3)
    return isinstance(value, Tensor) and not is_ids


# ---------------------------------------------------------------- velocity


def velocity(editor: Editor, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
    """The active policy's v at x_t (B, N, C) and t (B,) under a group's cond: (B, N, C) float32.

    The one place that calls the transformer. It gets t as the pipeline gives it, in its own dtype:
    noise with t from Group.sigmas, which that rounding leaves as they are. Differentiable in the
    LoRA's parameters.
    """
    B, N, C = x_t.shape
    assert t.shape == (B,), f"t is {tuple(t.shape)}, not ({B},)"
    source = cond["hidden_states"]  # (1, S, C)
    t_told = t.to(source.device, source.dtype)  # (B,)
    is_exact = torch.equal(t_told.float(), t.to(source.device, torch.float32))
    assert is_exact, f"t is not a time that can be told in {source.dtype}"
    arguments = dict(cond)
    for name, value in cond.items():
        if has_batch(name, value):
            arguments[name] = value.expand(B, *value.shape[1:]).contiguous()
    tokens = [x_t.to(source), arguments["hidden_states"]]
    arguments["hidden_states"] = torch.cat(tokens, dim=1)  # (B, N + S, C)
    return editor.transformer(timestep=t_told, **arguments)[0][:, :N].float()


# ---------------------------------------------------------------- checks


def row_fault(editor: Editor, row: dict) -> str:
    """Why this editor cannot take a row, found without drawing; "" if nothing speaks against it.

    row: looked at are the number of its `images` and its `prompt`; one that will be cut is a note.
    """
    pictures = len(row["images"])
    if pictures > 1 and not editor.family.several:
        return (
            f"a row has {pictures} pictures and {editor.kind} takes one; remove the row or take "
            "another editor"
        )
    if editor.family.long_text == "whole":
        return ""
    if text_tokens(editor.pipe, row["prompt"]) > editor.max_text:
        if editor.family.long_text == "fail":
            return f"{too_long(editor, row['prompt'])}; shorten it"
        note(f"{too_long(editor, row['prompt'])}; the rest is cut")
    return ""


def text_tokens(pipe: DiffusionPipeline, prompt: str) -> int:
    """The tokens of a prompt, without those of the template that some pipelines put around it."""
    tokenizer = text_parts(pipe)[1]
    if tokenizer is None:
        return 0
    parts = [prompt]
    if hasattr(pipeline_module(pipe), "split_quotation"):  # LongCat reads quoted text by the letter
        parts = []
        for part, is_quoted in pipeline_module(pipe).split_quotation(prompt):
            parts += list(part) if is_quoted else [part]
    return sum(len(tokenizer(part, verbose=False).input_ids) for part in parts)


def too_long(editor: Editor, prompt: str) -> str:
    """What is said of a prompt that the editor cannot take whole."""
    return (
        f"a prompt has more than the {editor.max_text} tokens that {editor.kind} "
        f"takes: {prompt[:60]!r}..."
    )


@contextmanager
def cut_prompts_are_told(editor: Editor, prompt: str) -> Iterator[None]:
    """Within, a prompt that fills the encoder's tokens to the last, template included, is noted."""
    encoder, tokenizer = text_parts(editor.pipe)
    if editor.family.long_text != "cut" or encoder is None:
        yield
        return

    def listen(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)  # (1, tokens)
        if ids is None or ids.shape[1] < editor.max_text:
            return
        if tokenizer.pad_token_id not in ids:
            note(f"{too_long(editor, prompt)}; the rest is cut")

    with encoder.register_forward_pre_hook(listen, with_kwargs=True):
        yield


def check_call(editor: Editor, images: Pictures, drawn: Drawn) -> None:
    """BadInput unless what was overheard is what `velocity` replays; a note of another size."""
    tokens = drawn.arguments["hidden_states"]  # (B, N + S, C)
    B, N, C = drawn.x_0.shape
    if tokens.shape[1] <= N or tokens.shape[2] != C:
        raise BadInput(
            f"{editor.kind} does not see the source picture as tokens beside the edit's; take "
            "another editor"
        )
    if len(tokens) != B:
        raise BadInput(
            f"{editor.kind} runs its guidance in one batch with the edits; give a guidance of 1"
        )
    sizes = [working_size(editor, image) for image in images]  # the first is the edit's
    pixels = [width * height for width, height in sizes]
    tokens_wanted = N * (pixels[0] + sum(pixels)) / pixels[0]
    if drawn.images[0].size != sizes[0] or tokens.shape[1] != tokens_wanted:
        note(
            f"{editor.kind} does not keep the size of its pictures, as its Family says: wanted "
            f"{sizes}, got {drawn.images[0].size}"
        )
    sigmas = editor.pipe.scheduler.sigmas[: len(drawn.times)].cpu()
    are_flow_times = torch.allclose(drawn.times, sigmas, atol=0.01)
    assert are_flow_times, (
        f"{editor.kind} gives its transformer {drawn.times}, not flow times {sigmas}"
    )


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
        seen = rollout(editor, sources, row["prompt"], [seeded("check")], 1, guidance)
        other = rollout(editor, inverted, row["prompt"], [seeded("check")], 1, guidance)
    except BadInput as error:
        raise BadInput(f"{row['where']}: row {row['id']}: {error}") from error
    x_t = seen.x_0
    t = seen.sigmas[:1].to(x_t.device)
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
        targets = sorted(editor.transformer.peft_config["new"].target_modules)
        raise BadInput(
            f"{editor.kind}: the LoRA on {targets} gets no gradient; name other --lora_targets"
        )
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
    transformer = editor.transformer
    blocks = set()
    for child in transformer.children():
        if isinstance(child, nn.ModuleList):
            blocks.update(type(block).__name__ for block in child)
    adapters = []
    for layer in editor.lora_layers:
        adapters += [layer.lora_A, layer.lora_B]
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(blocks),
        cpu_ram_efficient_loading=False,
        ignored_modules=adapters,
    )
    fsdp2_prepare_model(accelerator, transformer)
    spread = [part for part in transformer.parameters() if isinstance(part, DTensor)]
    whole = sum(part.numel() for part in spread)
    here = sum(part.to_local().numel() for part in spread)
    accelerator.print(
        f"the base's {whole:,} numbers are spread over {accelerator.num_processes} ranks, "
        f"{here:,} on this one"
    )
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
    steps: int | None = setting(
        None, "Solver steps. [6 for the toy, else 28]", at_least=1, at_most=1000
    )
    guidance: float | None = setting(
        None, "Guidance. [2.5 for the toy, else the family's]", at_least=0, at_most=100
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
        if Path(self.out).is_dir():
            raise BadInput(f"--out {self.out}: is a folder; name a picture in it")


def draw_rows(editor: Editor, args: Settings, images: Pictures, names: list[str]) -> Image.Image:
    """The grid of the edits: a row of pictures for each policy in `names`."""
    is_toy = args.base == TOY
    steps = args.steps or (6 if is_toy else 28)
    guidance = 2.5 if args.guidance is None and is_toy else args.guidance
    seeds = range(args.seed, args.seed + args.num)
    rows = []
    captions = []
    for name in names:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        how = {"rollout_batch": 4, "evaluation": True}
        with policy(editor, name):
            group = rollout(editor, images, args.prompt, generators, steps, guidance, **how)
        rows.append(images + group.images)
        captions.append(["source"] * len(images) + [f"{name}, seed {seed}" for seed in seeds])
    return picture_grid(rows, captions, args.prompt)


def main(argv: list[str] | None = None) -> None:
    args = parse_settings(Settings, argv, description=__doc__.splitlines()[0])
    # What is wrong is better known now than after minutes of work.
    with disk_faults(args.out):
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(args.out).parent).close()
    images = [load_image(path) for path in args.image]
    names = ["base"]
    if args.lora:
        read_lora(args.lora)
        names = ["base", "new"] if args.compare else ["new"]

    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
    how = {"trust_remote_code": args.trust_remote_code}
    editor = load_editor(args.base, device, dtype, args.resolution, **how)
    if args.lora:
        add_policies(editor, averages=(), start=args.lora)
    grid = draw_rows(editor, args, images, names)
    with whole_file(args.out) as part:
        grid.save(part)
    say(f"wrote {args.out}: {args.num} edits with {' and '.join(names)}")


if __name__ == "__main__":
    run_script(main)
