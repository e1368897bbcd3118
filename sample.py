"""The editor: any diffusers flow editor, its rollout and velocity, its policies new / old / base.

    python sample.py --image in.png --prompt "remove the red circle" --out out.png
    python sample.py --image in.png --prompt "..." --lora RUN/checkpoint-60 --compare --num 4

The diffusers pipeline itself does the rollout, unmodified, and we listen: a forward pre-hook on its
transformer keeps what each step's call was given, the scheduler keeps the clean latents. Training
replays the first step's arguments with another x_t and t. What else a pipeline class needs is a
line of FAMILIES.

Shapes: K copies of one group, B a batch, N tokens of the edit, S tokens of the source pictures,
C latent channels. t is flow time in [0, 1]: x_t = (1 - t) x_0 + t noise, v = noise - x_0.

Departures from the papers (arXiv:2510.16888, arXiv:2509.16117v2) and their released code:
1. Solver. Theirs, DPM-Solver++ 2M, extrapolates x_0 in log-SNR, which is infinite at t = 1 and
   t = 0: its first two steps and its last are first order. Ours extrapolates the velocity in t:
   only the first step, which has no history, is first order. It extrapolates no further than a
   step of 1.5 times the length of the last would.
2. Noise level and what the model is told are one number: a group's `sigmas` are the timesteps that
   the transformer was given, rounded to its dtype by the pipeline; training noises with them.
3. A group's text embeddings and source tokens are made once a pipeline call, of as many copies as
   memory allows, and stored once, not K times.
4. A copy's noise has its own generator: a group is the same however it is cut into calls.
5. The LoRA's weights are float32 over a base of any dtype; it is computed in the base's dtype
   (theirs loads Kontext in float32). A is gaussian with deviation 1 / rank, as theirs, but from a
   seed of its own. On Flux.2, which theirs does not train, the single blocks have a LoRA too.
6. A LoRA to start from gives rank, alpha and layers to all policies; in theirs `old` has rank 32
   and alpha 64 whatever the file says. As in theirs it is not merged: the base, which the loss
   pulls to, stays the released model.
7. A LoRA's file holds its full strength, alpha / rank multiplied into B (see save_lora).
8. Edits keep their source's aspect ratio, at about resolution^2 pixels; theirs are square.
9. Prompts have the pipeline's own limit, 512 tokens on Kontext; theirs trains Kontext with 128.
"""

import functools
import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import send_to_device
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.peft_utils import get_peft_kwargs
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import is_torchvision_available

from data_prep import (
    BadInput,
    CheckedSettings,
    faults_of,
    load_image,
    load_processor,
    load_sources,
    one_line,
    parse_settings,
    picture_grid,
    run_script,
    say,
    say_once,
    seeded,
    setting,
    whole_file,
)

TOY = "data/toy/editor"
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_FILE = "adapter_model.safetensors"  # PEFT's, which holds tensors alone
PEFT_CONFIG = "adapter_config.json"  # what stands beside it

# ---------------------------------------------------------------- families of editors

# q, k, v and output projections of both streams; Flux, Qwen-Image, LongCat and Flux.2's double
# blocks share these names.
LORA_TARGETS = r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
# Flux.2's single blocks have one matrix for q, k, v and the MLP, and one output matrix.
FLUX2_TARGETS = LORA_TARGETS + r"|single_.*\.attn\.(to_qkv_mlp_proj|to_out)"


@dataclass(frozen=True)
class Family:
    """How a pipeline class differs from the others; the defaults suit most."""

    guidance_name: str = "guidance_scale"  # what the pipeline's call names its guidance
    # The guidance in rollouts and training (1: no CFG), and in evaluation; None: the pipeline's.
    rollout_guidance: float | None = None
    evaluation_guidance: float | None = None
    negative: str | None = None  # the negative prompt without which there is no true CFG
    several: bool = False  # the pipeline takes several source pictures
    max_pixels: int = 8192**2  # the pipeline shrinks sources of more pixels
    # A prompt of too many tokens is "cut", taken "whole", or makes the pipeline "fail".
    long_text: str = "cut"
    template_tokens: int = 0  # put around a prompt by the pipeline, and within its limit
    targets: str = LORA_TARGETS  # regular expression: the names of the layers that get a LoRA
    source_first: bool = False  # in hidden_states the source's tokens stand before the edit's
    rollout_steps: int = 6  # solver steps of a training edit; see FLUX2


QWEN = Family(
    guidance_name="true_cfg_scale",
    rollout_guidance=1.0,
    evaluation_guidance=4.0,
    negative=" ",
    long_text="whole",
)
FLUX2 = Family(  # its guidance is an input of the model, no CFG
    rollout_guidance=4.0,
    evaluation_guidance=4.0,
    several=True,
    max_pixels=1024**2,
    template_tokens=32,  # of its system message and chat format; klein has the format alone
    targets=FLUX2_TARGETS,
    # With 6 steps the last one goes from t = 0.6 to 0. On a mixture of Gaussians the solver's error
    # is .34 with 6 steps and .18 with 12; with 6 on Kontext's schedule it is .17.
    rollout_steps=12,
)
NO_CFG = Family(rollout_guidance=1.0)
KLEIN = replace(FLUX2, rollout_guidance=1.0, template_tokens=12)
FAMILIES = {
    # Its guidance is an input of the model, no CFG.
    "FluxKontextPipeline": Family(rollout_guidance=2.5, evaluation_guidance=3.5),
    "QwenImageEditPipeline": QWEN,
    "QwenImageEditPlusPipeline": replace(QWEN, several=True),
    "QwenImage21Pipeline": replace(QWEN, evaluation_guidance=1.0, several=True, source_first=True),
    "Flux2Pipeline": FLUX2,
    "Flux2KleinPipeline": KLEIN,
    "Flux2KleinKVPipeline": replace(KLEIN, source_first=True),
    "LongCatImageEditPipeline": replace(NO_CFG, evaluation_guidance=4.5, long_text="fail"),
}


@functools.cache
def note(text: str) -> None:
    """Tells the user, once in a process, of something that is no error."""
    say_once(f"note: {text}", sys.stderr)


def _parameters(pipe):
    """What a pipeline's call takes: {name: inspect.Parameter}."""
    return inspect.signature(pipe.__call__).parameters


# ---------------------------------------------------------------- the solver

# A step over this many times as long as the step before gets only a part of its second-order
# correction. With 6 steps the largest ratio is 1.3 on Kontext, 1.2 on the toy, but over 3 on
# FLUX.2, for its last step.
MAX_RATIO = 1.5


class FlowDPMSolverMultistepScheduler(FlowMatchEulerDiscreteScheduler):
    """Second-order multistep solver on the parent's own sigmas: one model evaluation a step.

    dx/dt = v is integrated with v linear in t through this evaluation and the last (two-step
    Adams-Bashforth with variable steps), in float32. It has the order of DPM-Solver++ 2M
    (arXiv:2211.01095, Alg. 2) but nothing infinite at t = 1 or t = 0. Its only state is the last
    velocity, `last_v`; a rollout's first step drops it (set_timesteps has reset step_index).
    `solver_order` 1 is Euler's method, for ablations. `last_x` is the newest x, for others to read.
    """

    solver_order = 2

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs
    ) -> tuple[Tensor]:
        """From this sigma to the next: v and x of any one shape -> (x,), in v's dtype.

        x(t + h) = x + h v + h^2/2 dv/dt, with dv/dt from this velocity and the last. The names are
        diffusers': model_output is v, sample is x, timestep (1000 t) finds the first sigma.
        A tuple, as the pipelines ask for (return_dict=False).
        """
        if self.step_index is None:  # the first step of a rollout
            self._init_step_index(timestep)
            self.last_v = None
        t = self.sigmas[self.step_index]
        h = self.sigmas[self.step_index + 1] - t  # negative: from noise, t = 1, to data, t = 0
        v = model_output.float()
        x = sample.float() + h * v  # Euler's step, all that there is without a history
        if self.last_v is not None and self.solver_order == 2:
            h_last = t - self.sigmas[self.step_index - 1]
            slope = (v - self.last_v) / h_last  # dv/dt along the path
            # A slope says little of what lies far beyond its two points: it is trusted no further
            # than MAX_RATIO times their distance. Both are negative, so the maximum is the shorter.
            reach = torch.maximum(h, MAX_RATIO * h_last)
            x += 0.5 * h * reach * slope  # = h^2/2 dv/dt unless reach was cut
        self.last_v = v
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
    policies: Sequence[str] = ()  # names of the LoRA adapters, `new` first
    active: str = "base"  # the policy that is on
    idle: Sequence[nn.Module] = ()  # what leaves the GPU while the policies are trained

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
    trust_remote_code: bool = False,
) -> Editor:
    """The editor in the folder, or of the hub id, `base`: frozen, in eval mode, with our solver.

    resolution: in pixels; None: what the VAE was made for. BadInput when nothing loads, when it is
    no image editor, or when it cannot take the resolution.
    """
    pipe = _load_pipeline(base, device, dtype, trust_remote_code)
    family = _family(pipe, base)
    resolution = _checked_resolution(pipe, family, base, resolution)
    # The limit of a prompt is the default of max_sequence_length in the pipeline's call. LongCat
    # has an attribute instead, tokenizer_max_length, of 512. A tokenizer may take less.
    argument = _parameters(pipe).get("max_sequence_length")
    max_text = argument.default if argument else 512
    max_text = min(max_text, getattr(_tokenizer(pipe), "model_max_length", max_text))
    if not argument:
        pipe.tokenizer_max_length = max_text
    pipe.scheduler = FlowDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    # A config with sample_sigmas fixes the times, and so the number of steps: dropped.
    if pipe.config.get("sample_sigmas"):
        pipe.register_to_config(sample_sigmas=None)
    if torch.cuda.is_available():
        pipe.vae.enable_slicing()  # decodes picture by picture; twelve at once cost Qwen 10 GB
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return Editor(pipe, family, resolution, max_text)


def _load_pipeline(base, device, dtype, trust_remote_code):
    """The pipeline in a folder or of a hub id as diffusers loads it; BadInput if it cannot."""
    fix = "name a whole model folder or a hub id; pip install torchvision if its processor needs it"
    if base == TOY:
        fix = "run python data_prep.py toy first"
    try:
        processors, tokenizers = _processors(base)
        # diffusers would refuse a tokenizer where a processor belongs: such a part is loaded as
        # None and registered afterwards.
        pipe = DiffusionPipeline.from_pretrained(
            base,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **processors,
            **dict.fromkeys(tokenizers),
        )
        pipe.register_modules(**tokenizers)
        return pipe.to(device)  # where weights are missing, this is what fails
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a damaged folder makes four libraries raise has no end
        raise BadInput(f"{base}: not a diffusers model ({one_line(error)}); {fix}") from error


def _processors(base):
    """What a pipeline needs in place of its processors where torchvision is missing.

    -> processors that do without it (but for videos) and, for Flux.2, which uses its processor for
    text alone, tokenizers; both as {part: it}, part being a name in model_index.json.
    """
    processors = {}
    tokenizers = {}
    if is_torchvision_available():
        return processors, tokenizers
    # model_index.json is {part: [library, class]}, and settings, which are no lists.
    for part, made_of in DiffusionPipeline.load_config(base).items():
        match made_of:
            case [_, "Qwen2VLProcessor" | "Qwen2_5_VLProcessor" | "Qwen3VLProcessor" as kind]:
                processors[part] = load_processor(getattr(transformers, kind), base, subfolder=part)
            case [_, "PixtralProcessor"]:
                tokenizers[part] = transformers.AutoTokenizer.from_pretrained(base, subfolder=part)
    return processors, tokenizers


def _family(pipe, base):
    """A pipeline's family; BadInput for one that edits no pictures."""
    kind = type(pipe).__name__
    if "transformer" not in pipe.components or "image" not in _parameters(pipe):
        raise BadInput(
            f"{base}: {kind} edits no pictures; name an editor such as FLUX.1-Kontext-dev"
        )
    family = FAMILIES.get(kind)
    if not family:
        family = Family()
        # A transformer without a guidance input is guided by CFG; the argument has two names.
        if not pipe.transformer.config.get("guidance_embeds"):
            family = QWEN if "true_cfg_scale" in _parameters(pipe) else NO_CFG
        note(f"{kind} is not in FAMILIES of sample.py; assumed: {family}")
    if pipe.config.get("is_distilled") or "Turbo" in Path(base).name:
        note(
            f"{base} is distilled to few steps and may blur in a long training; its undistilled "
            "base is the safer start"
        )
        family = replace(family, evaluation_guidance=family.rollout_guidance)
    return family


def _checked_resolution(pipe, family, base, resolution):
    """The resolution to work at; BadInput, naming the nearest, if the editor cannot take it."""
    resolution = resolution or pipe.vae.config.get("sample_size") or 1024
    multiple = 2 * pipe.vae_scale_factor  # latent pixels are packed 2 x 2
    most = math.isqrt(family.max_pixels)
    # The nearest multiple, and where that is 0 the first one.
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
    own; without it rank and alpha must be given. BadInput when no module has such a name, or the
    LoRA is for another editor.
    """
    targets = targets or editor.family.targets  # peft takes names' endings or one expression
    config = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
    if start:
        config = read_lora(start, editor.pipe).config
    editor.policies = ("new", *averages)
    # peft warns of a second adapter, which here is meant.
    warnings.filterwarnings("ignore", "Already found a `peft_config`")
    try:
        for name in editor.policies:
            editor.transformer.add_adapter(LoraConfig(**config), name)
    except ValueError as error:
        raise BadInput(
            f"LoRA {start or targets}: its names match no module of {editor.kind} that can have "
            f"one ({one_line(error)}); name layers, or a LoRA, of this model"
        ) from error
    _multiply_in_input_dtype(editor.transformer)
    for name in editor.policies:
        for key, parameter in lora_parameters(editor, name).items():
            # All ranks and all policies begin with the same A, whatever else draws numbers.
            if "lora_A" in key:
                gaussian = torch.randn(parameter.shape, generator=seeded(seed, "lora", key))
                parameter.data.copy_(gaussian / len(parameter))  # (rank, in), so len is the rank
        if start:
            load_lora(editor, start, name)
    _activate(editor, "new")


def _multiply_in_input_dtype(transformer):
    """Makes every LoRA matrix a float32 LoraMatrix, which multiplies in its input's dtype."""
    for layer in transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                matrix.float()
                matrix.__class__ = LoraMatrix  # another forward over the same parameters


class LoraMatrix(nn.Linear):
    """A or B of a LoRA: float32 to learn in, multiplied in the dtype of what comes in.

    bf16 weights would lose updates smaller than their rounding. peft by default casts each layer's
    input (tokens, in) to float32, where we cast the far smaller matrices: on a bf16 base that cast
    was 30 % of the update's memory traffic.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        return nn.functional.linear(x, self.weight.to(x.dtype))


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
    """Turns a policy on. Only `new` gets gradients, and only while it is on."""
    if name != "base":
        editor.transformer.enable_adapters()
        set_adapter(editor.transformer, name, inference_mode=name != "new")
    elif editor.policies:  # without any, the editor is its base
        editor.transformer.disable_adapters()
    editor.active = name


def lora_parameters(editor: Editor, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter by their names, sorted.

    Of each layer, LAYER.lora_A.weight (rank, in) and LAYER.lora_B.weight (out, rank). The names are
    without the adapter's, which peft puts before `.weight`: the same for new and old.
    """
    ending = f".{name}.weight"
    return {
        key.replace(ending, ".weight"): parameter
        for key, parameter in sorted(editor.transformer.named_parameters())
        if key.endswith(ending)
    }


@torch.no_grad()
def soft_update(editor: Editor, decay: float, average: str = "old") -> None:
    """old <- decay * old + (1 - decay) * new, in place (Alg. 1 line 14 of arXiv:2509.16117v2).

    decay: in [0, 1]; 0 copies. average: the adapter that takes the place of old.
    """
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

    So every reader draws the same edits: diffusers' pipe.load_lora_weights(folder), and programs
    that read tensors alone. (LongCat's pipeline has no such method; there it is
    pipe.transformer.load_lora_adapter(folder, weight_name=LORA_FILE). `.alpha` tensors beside a
    plain B would not do: diffusers 0.42 refuses them for Flux.2.)

    The LoraConfig, for load_lora and add_policies, is metadata under a key of our own: under
    diffusers' key it would apply alpha / rank once more. No bit is lost: where float32 cannot hold
    the product, as with a factor of 1.5, B is float64.
    """
    full = {}
    for key, weight in lora_parameters(editor, name).items():
        exact = weight.double() * _strength(editor, name, key)
        rounded = exact.float()  # loses nothing where alpha / rank is a power of two
        is_same = (rounded == exact).all()
        full[f"transformer.{key}"] = rounded if is_same else exact
    config = editor.transformer.peft_config[name]
    settings = json.dumps({key: getattr(config, key) for key in LORA_CONFIG})
    with whole_file(Path(folder, LORA_FILE)) as temporary:
        save_file(full, temporary, {"format": "pt", "lora_config": settings})


def _strength(editor, name, key):
    """What peft multiplies a weight of lora_parameters with: alpha / rank for B, 1 for A."""
    layer, matrix = key.split(".lora_")
    if matrix == "A.weight":
        return 1.0
    return editor.transformer.get_submodule(layer).scaling[name]


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
            f"{folder}: its layers, rank or alpha are not those of this {editor.kind} and its "
            "policies; take the LoRA's own base model, rank and alpha"
        )
    for key, parameter in own.items():
        # In other files B is without its strength, as in the adapter: nothing to undo.
        strength = _strength(editor, name, key) if lora.is_full_strength else 1.0
        parameter.copy_(lora.weights[key] / strength)


def read_lora(place: str | Path, pipe: DiffusionPipeline | None = None) -> Lora:
    """The LoRA in a file, in a folder, or of a hub id.

    Takes what save_lora, diffusers and PEFT write, and the names and `.alpha` tensors of other
    trainers. With `pipe`, layers by another program's names go through diffusers' converter for it.
    BadInput when there is none, or it is not whole.
    """
    try:
        file = Path(place)
        if not file.exists():
            names = [LORA_FILE, PEFT_FILE, PEFT_CONFIG]
            file = Path(snapshot_download(str(place), allow_patterns=names))
        for name in (PEFT_FILE, LORA_FILE):
            if (file / name).is_file():  # `file` is a folder
                file /= name
        tensors = load_file(file)
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
        weights, alphas = _plain_names(tensors)
        # Layers that the model has not: another program's names, which diffusers may know.
        if pipe and _layers_of(weights) - dict(pipe.transformer.named_modules()).keys():
            with suppress(Exception):  # what its converter raises on other names has no end
                weights, alphas = _plain_names(pipe.lora_state_dict(tensors))
        config = _lora_config(file, metadata, weights, alphas)
    except Exception as error:  # what a damaged file makes three libraries raise has no end
        raise BadInput(
            f"{place}: not a LoRA that can be read ({one_line(error)}); name RUN/checkpoint-N, a "
            f"hub id, a whole file, or a PEFT folder with {PEFT_FILE} and {PEFT_CONFIG}"
        ) from error
    return Lora(weights, config, is_full_strength="lora_config" in metadata)


def _plain_names(tensors):
    """A LoRA's weights by the names that lora_parameters gives, and the alphas beside them.

    The alphas are {^LAYER.alpha: number}, the form that get_peft_kwargs wants.
    """
    weights = {}
    alphas = {}
    for key, tensor in tensors.items():
        # The prefixes of PEFT, ComfyUI and diffusers; then kohya's names for A and B.
        key = re.sub(r"^(base_model\.model\.|diffusion_model\.|transformer\.)+", "", key)
        key = key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        if key.endswith(".alpha"):
            alphas[f"^{key}"] = tensor.item()
        else:
            weights[key.replace(".default.", ".")] = tensor  # PEFT's name of an adapter
    return weights, alphas


def _layers_of(weights):
    """The names of the layers that a LoRA's weights are of."""
    return {key.split(".lora_")[0] for key in weights}


def _lora_config(file, metadata, weights, alphas):
    """The keywords of the LoraConfig that a file's LoRA was trained under.

    Where it says nothing, alpha is the rank, as in diffusers.
    """
    layers = sorted(_layers_of(weights))
    # JSON in our metadata, in diffusers', or in PEFT's own file.
    settings = metadata.get("lora_config") or metadata.get("lora_adapter_metadata")
    if file.name == PEFT_FILE:
        settings = file.with_name(PEFT_CONFIG).read_text()
    if settings:
        config = json.loads(settings)
    else:
        # diffusers takes the most frequent rank and alpha as the default, and makes PEFT's
        # rank_pattern and alpha_pattern of the rest: these keys, cut before .lora_B. or .alpha.
        ranks = {f"^{layer}.lora_B.": len(weights[f"{layer}.lora_A.weight"]) for layer in layers}
        config = get_peft_kwargs(ranks, alphas, weights)
    known = {"target_modules": layers}
    for key, value in config.items():
        key = key.removeprefix("transformer.")  # a part's name, in diffusers' metadata
        if key in LORA_CONFIG:
            known[key] = value
    return known


# ---------------------------------------------------------------- rollout


@dataclass
class Group:
    """K edits of one row and what training needs to see them again."""

    images: list[Image.Image]  # K
    x_0: Tensor  # (K, N, C) float32, clean packed latents
    # The conditioning: the transformer's keyword arguments for a batch of 1, without its times. Of
    # `hidden_states` (1, N + S, C) the edit's N tokens are still noise; `velocity` replaces them.
    cond: dict
    sigmas: Tensor  # (steps,) float32 on the CPU, flow times as the transformer was given them

    def for_training(self) -> "Group":
        """The group without its pictures, tensors on the CPU: as ranks hand it on."""
        return Group([], self.x_0.cpu(), send_to_device(self.cond, "cpu"), self.sigmas)


def rollout(
    editor: Editor,
    images: list[Image.Image],
    prompt: str,
    generators: list[torch.Generator],
    steps: int,
    guidance: float | None = None,
    rollout_batch: int = 12,
    evaluation: bool = False,
) -> Group:
    """Draws K = len(generators) edits of one row with the active policy.

    images: the row's source pictures. Copy j's noise comes from generators[j] alone. guidance:
    embedded or true CFG, as the family has it; None: its value for rollouts, or with `evaluation`
    for evaluation. rollout_batch: edits in one pipeline call. BadInput when the editor cannot take
    these pictures or this prompt, or cannot be trained as it takes them.
    """
    check_row(editor, {"images": images, "prompt": prompt})
    if guidance is None:
        guidance = editor.family.rollout_guidance
        if evaluation:
            guidance = editor.family.evaluation_guidance
    # Text and sources are encoded once a call: the fewer calls, the better.
    groups = []
    for first in range(0, len(generators), rollout_batch):
        some = generators[first : first + rollout_batch]  # those of one call
        groups.append(_call_pipeline(editor, images, prompt, some, steps, guidance))
    edits = sum([group.images for group in groups], [])  # the calls' lists in one
    x_0 = torch.cat([group.x_0 for group in groups])  # (K, N, C)
    # Conditioning and times are the same in every call: the first's stand for all.
    return replace(groups[0], images=edits, x_0=x_0)


def _call_pipeline(editor, images, prompt, generators, steps, guidance):
    """One call of the diffusers pipeline, listened to: a Group. BadInput for what it refuses."""
    pipe = editor.pipe
    # Pipelines resize by rules of their own: what has its final size already, they leave alone.
    images = [image.resize(working_size(editor, image), Image.LANCZOS) for image in images]
    calls = []  # the transformer's keyword arguments, one entry a step

    def listen(module, args, kwargs):
        # With true CFG each step has a second call, the unconditional one: not for us.
        if len(calls) == (pipe.scheduler.step_index or 0):  # None before the first step's end
            calls.append(kwargs)

    hook = pipe.transformer.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        # Leaving the block removes the hook.
        with hook, _sources_keep_their_size(editor, images):
            edits = pipe(
                image=images[0] if len(images) == 1 else images,
                prompt=prompt,
                # A generator a copy, so that a copy's noise does not depend on its neighbours.
                generator=generators,
                num_images_per_prompt=len(generators),
                num_inference_steps=steps,
                **_call_options(editor, images[0].size, guidance),
            ).images
    except ValueError as error:
        if calls:  # a row is refused before the transformer is called; this is something else
            raise
        raise BadInput(f"{editor.kind} refuses a row: {one_line(error)}; remove it") from error
    edits = [edit.convert("RGB") for edit in edits]  # Qwen-Image-2.1's have an alpha channel
    x_0 = pipe.scheduler.last_x.float()  # (B, N, C), the latents that were decoded
    # The times as the transformer was told them, (B,) a step, all equal: in bf16 they are not the
    # scheduler's sigmas.
    sigmas = torch.stack([arguments["timestep"][0] for arguments in calls]).float().cpu()
    return Group(edits, x_0, _conditioning(editor, calls[0], x_0), sigmas)


def _call_options(editor, size, guidance):
    """Of the keywords that fix size, guidance and length of text, those that the pipeline takes."""
    width, height = size
    options = {
        "height": height,
        "width": width,
        "max_area": height * width,  # otherwise Kontext works at a megapixel
        "_auto_resize": False,  # otherwise Kontext resizes sources to the sizes of its training
        "max_sequence_length": editor.max_text,
        editor.family.guidance_name: guidance,
    }
    # Without CFG the pipeline would warn of a negative prompt. (None: its own guidance may be CFG.)
    if guidance is None or guidance > 1:
        options["negative_prompt"] = editor.family.negative
    taken = _parameters(editor.pipe)
    return {key: value for key, value in options.items() if value is not None and key in taken}


def working_size(editor: Editor, image: Image.Image) -> tuple[int, int]:
    """(width, height) at which a picture is edited: about resolution^2 pixels in its own ratio."""
    multiple = 2 * editor.pipe.vae_scale_factor  # pixels of a token's side
    scale = editor.resolution / math.prod(image.size) ** 0.5
    sides = [max(multiple, round(side * scale / multiple) * multiple) for side in image.size]
    # Above max_pixels the pipeline would shrink the source and break the size of the edit.
    while math.prod(sides) > editor.family.max_pixels:
        sides[sides.index(max(sides))] -= multiple
    return tuple(sides)


@contextmanager
def _sources_keep_their_size(editor, images):
    """Within, the pipeline takes its sources at the size that they have.

    Some pipelines ask a function of their module, calculate_dimensions, for the size of a source
    with some ratio of sides at some area; another function stands in for it here.
    """
    name = "calculate_dimensions"
    module = inspect.getmodule(type(editor.pipe))
    original = getattr(module, name, None)  # None: this pipeline has and needs no such function
    # Sources of one ratio have one working size, so the ratio tells which is meant.
    size_by_ratio = {image.width / image.height: image.size for image in images}

    def size_function(area, ratio):
        # Qwen-Image-Edit-Plus asks twice. For its text encoder (a smaller area) the pipeline's size
        # stays, capped at the working area; for the VAE (a megapixel) the picture's own is given.
        size = original(min(area, editor.resolution**2), ratio)
        if area < 1024**2:
            return size
        return (*size_by_ratio[ratio], *size[2:])  # some return a third value, which stays

    with patch.object(module, name, size_function, create=True):
        yield


def _conditioning(editor, arguments, x_0):
    """A Group's cond out of the first call's arguments: one copy, without times and caches.

    BadInput if `velocity` could not make that call again.
    """
    tokens = arguments["hidden_states"]  # (B, N + S, C)
    if tokens.shape[1] <= x_0.shape[1]:  # N
        raise BadInput(
            f"{editor.kind} does not see the source picture as tokens beside the edit's; take "
            "another editor"
        )
    if len(tokens) != len(x_0):
        raise BadInput(
            f"{editor.kind} runs its guidance in one batch with the edits; give a guidance of 1"
        )
    dropped = ["timestep"]
    # FLUX.2-klein-KV's first call also fills a cache for later ones; training repeats that call
    # alone, so both go. A mode without a cache selects how tokens attend to each other: it stays.
    if "kv_cache" in arguments:
        dropped += ["kv_cache", "kv_cache_mode"]
    cond = {}
    for name, value in arguments.items():
        if name not in dropped:
            # A slice alone would keep all copies in memory.
            cond[name] = value[:1].clone() if _has_batch(name, value) else value
    return cond


def _has_batch(name, value):
    """Whether an argument of the transformer has a batch dimension; Flux's ids may have none."""
    return isinstance(value, Tensor) and (value.ndim > 2 or not name.endswith("_ids"))


# ---------------------------------------------------------------- velocity


def velocity(editor: Editor, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
    """The active policy's v at x_t (B, N, C) and t (B,) under a group's cond: (B, N, C) float32.

    The one place that calls the transformer. It gets t as the pipeline gives it, rounded to its own
    dtype: to bf16, by at most 0.002. Group.sigmas are rounded already; other times are best rounded
    before x_t is made of them. Differentiable in the LoRA's parameters.
    """
    B, N, _ = x_t.shape
    arguments = dict(cond)
    for name, value in cond.items():
        if _has_batch(name, value):
            arguments[name] = value.repeat_interleave(B, dim=0)
    # The tokens of the edit and of its source attend to each other.
    tokens = arguments["hidden_states"]  # (B, N + S, C)
    place = _edit_tokens(editor, N)
    tokens[:, place] = x_t
    v = editor.transformer(timestep=t.to(tokens), **arguments)[0]  # (B, N + S or more, C)
    return v[:, place].float()  # the outputs at other tokens mean nothing


def _edit_tokens(editor, N):
    """The place of an edit's N tokens among all that the transformer takes and returns."""
    return slice(-N, None) if editor.family.source_first else slice(N)


# ---------------------------------------------------------------- checks


def check_row(editor: Editor, row: dict) -> None:
    """BadInput for a row that this editor cannot take, found without drawing.

    row: its `images`, of which only the number counts, and its `prompt`; a prompt that the pipeline
    will cut is no fault but a note.
    """
    family = editor.family
    pictures = len(row["images"])
    if pictures > 1 and not family.several:
        raise BadInput(
            f"a row has {pictures} pictures and {editor.kind} takes one; remove the row or take "
            "another editor"
        )
    prompt = row["prompt"]
    tokens = _text_tokens(editor.pipe, prompt) + family.template_tokens
    if tokens <= editor.max_text or family.long_text == "whole":
        return
    fault = (
        f"a prompt has more than the {editor.max_text} tokens that {editor.kind} takes: "
        f"{prompt[:60]!r}..."
    )
    if family.long_text == "fail":
        raise BadInput(f"{fault}; shorten it")
    note(f"{fault}; the rest is cut")


def _text_tokens(pipe, prompt):
    """The tokens of a prompt, without those of the template that some pipelines put around it."""
    tokenizer = _tokenizer(pipe)
    if tokenizer is None:
        return 0
    pieces = [prompt]
    # LongCat tokenizes what stands in quotes letter by letter, by a function of its module.
    split = getattr(inspect.getmodule(type(pipe)), "split_quotation", None)
    if split:
        pieces = []
        for piece, is_quoted in split(prompt):
            pieces += list(piece) if is_quoted else [piece]
    return sum(len(tokenizer(piece, verbose=False).input_ids) for piece in pieces)


def check_editor(editor: Editor, row: dict) -> None:
    """Stops a run that could not learn: see the three checks below.

    row: one of the data. BadInput names the row, the editor or the LoRA's layers.
    """
    noises = [seeded(0), seeded(0)]  # the same edit twice, drawn in one step
    with faults_of(row, skip=False):
        # A guidance of 1: with CFG the solver would be given a mixture of two velocities.
        group = rollout(editor, load_sources(row), row["prompt"], noises, steps=1, guidance=1.0)
    place = _edit_tokens(editor, group.x_0.shape[1])
    x_t = group.cond["hidden_states"][:, place].float().expand_as(group.x_0)  # (2, N, C), noise
    t = group.sigmas.expand(2)
    v = velocity(editor, x_t, t, group.cond)

    # 1. Training's call of the transformer is the rollout's: its v leads from x_t to the same x_0,
    # but for rounding. Tokens at another place, or times of another meaning, would not.
    error = x_t - group.sigmas.item() * v - group.x_0  # (2, N, C)
    if error.norm() > 0.05 * v.norm():
        raise BadInput(
            f"{editor.kind}: its transformer's calls cannot be repeated; mend its line of FAMILIES "
            "in sample.py (source_first is the order of tokens) or take another editor"
        )
    # 2. The editor sees its source. All tokens are negated, but velocity overwrites the edit's.
    other_source = group.cond | {"hidden_states": -group.cond["hidden_states"]}
    if torch.allclose(v, velocity(editor, x_t, t, other_source)):
        raise BadInput(
            f"{editor.kind}: another source picture changes nothing; take an editor that sees it"
        )
    # 3. The LoRA gets a gradient: that of any loss will do. Its norm is what clipping returns.
    v.square().mean().backward()
    if nn.utils.clip_grad_norm_(lora_parameters(editor, "new").values(), math.inf) == 0:
        raise BadInput(f"{editor.kind}: the LoRA gets no gradient; name other --lora_targets")
    editor.transformer.zero_grad()


# ---------------------------------------------------------------- memory and sharding


@contextmanager
def parked(editor: Editor) -> Iterator[None]:
    """Within, the weights of editor.idle lie in the CPU's memory; after, on the GPU again."""
    weights = []
    for part in editor.idle:
        weights += [*part.parameters(), *part.buffers()]
    for weight in weights:
        # They are frozen: one copy, made at the first time, serves the whole run. It lies in
        # pinned memory, which a GPU reads several times as fast.
        if not hasattr(weight, "copy_on_cpu"):
            weight.copy_on_cpu = weight.detach().cpu().pin_memory()
        weight.data = weight.copy_on_cpu
    try:
        yield
    finally:
        for weight in weights:
            weight.data = weight.copy_on_cpu.to(editor.transformer.device, non_blocking=True)


def fit_memory(editor: Editor, batch: int, trial: Callable[[int], None]) -> tuple[int, list[str]]:
    """Parks, splits and recomputes only as much as updates need to fit, found by trial.

    editor.idle: before, what may be parked; after, what is. Returns the pairs of a forward, at most
    `batch`, and which classes of blocks backward computes again from their inputs.
    trial: a training step of so many pairs, forward and backward. Not for a sharded base, whose
    ranks must all recompute the same blocks.
    """
    idle = editor.idle
    classes = editor.transformer._repeated_blocks  # their names

    def run(block, *arguments):
        if type(block).__name__ in recomputed:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    # The transformer calls each of its blocks by way of this function, where gradients are kept.
    editor.transformer.enable_gradient_checkpointing(run)
    attempts = [([], batch, [])]
    # The cheapest first. To park takes seconds of an epoch. A half of a batch, and so on to one,
    # keeps a GPU busy: a pair is thousands of tokens. To recompute is a fourth of the training.
    attempts += [(idle, batch >> halvings, []) for halvings in range(batch.bit_length())]
    attempts += [(idle, batch, classes[: count + 1]) for count in range(len(classes))]
    attempts += [(idle, batch >> halvings, classes) for halvings in range(1, batch.bit_length())]
    for attempt in attempts:
        editor.idle, pairs, recomputed = attempt
        with suppress(torch.OutOfMemoryError):
            trial(pairs)
            return pairs, recomputed
    raise torch.OutOfMemoryError("no update fits, whatever is parked and recomputed")


def compile_blocks(editor: Editor) -> None:
    """Compiles the transformer's blocks: once for each class, policy, gradient mode and batch size.

    The first forward of each takes the time. What cannot be compiled runs as it is.
    """
    try:
        # Needs what the blocks will need: a C compiler, and for a GPU Triton.
        torch.compile(torch.sin)(torch.zeros(2, device=editor.transformer.device))
    except Exception as error:  # what a missing tool makes two libraries raise has no end
        note(f"nothing is compiled, which costs time ({one_line(error)})")
        return
    torch._dynamo.config.suppress_errors = True  # a block that fails is warned of, and runs
    # After so many variants of a block (else after 8) torch runs the others uncompiled.
    torch._dynamo.config.recompile_limit = 64
    editor.transformer.compile_repeated_blocks()


def shard_base(editor: Editor, accelerator: Accelerator) -> None:
    """Spreads the frozen base over all ranks by accelerate's FSDP2; the LoRA stays whole on each.

    To be called with the editor on the CPU; what is not sharded moves to the rank's device.
    """
    adapters = [part for part in editor.transformer.modules() if isinstance(part, LoraMatrix)]
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=editor.transformer._repeated_blocks,
        ignored_modules=adapters,
    )
    fsdp2_prepare_model(accelerator, editor.transformer)
    local = 0
    for part in editor.transformer.parameters():
        if hasattr(part, "to_local"):  # it is sharded
            local += part.to_local().numel()
    accelerator.print(f"{local:,} of the base's parameters are on this rank")
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
    seed: int = setting(42, "The first edit's seed; the others follow it.", at_least=0)
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
        if not self.image or not self.prompt.strip():
            raise BadInput("--image or --prompt is missing; name a picture and say what to change")
        if self.compare and not self.lora:
            raise BadInput(
                "--compare has nothing to compare with the base; add --lora RUN/checkpoint-N"
            )
        if not self.out.endswith(".png"):
            raise BadInput(f"--out {self.out}: not a picture's name; end it in .png")


def load_to_draw(settings) -> Editor:
    """The editor of --base on the GPU, if there is one, with --lora as its policy `new`.

    settings: this script's, or others with the same names. BadInput as load_editor and read_lora.
    """
    on_gpu = torch.cuda.is_available()
    editor = load_editor(
        settings.base,
        # To the "cpu:0" of several processes weights would be copied, to places where a sum is
        # rounded otherwise; "cuda" is each process's own.
        "cuda" if on_gpu else "cpu",
        # few CPUs are fast in bfloat16
        torch.bfloat16 if on_gpu else torch.float32,
        settings.resolution,
        settings.trust_remote_code,
    )
    if settings.lora:
        add_policies(editor, averages=(), start=settings.lora)
    return editor


def _draw(args, images):
    """The grid of the edits: a row of pictures for each policy."""
    editor = load_to_draw(args)
    names = ["new"] if args.lora else ["base"]
    if args.compare:
        names = ["base", "new"]
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
        captions.append([args.prompt] * len(images) + [f"{name}, seed {seed}" for seed in seeds])
    return picture_grid(rows, captions)


def main(argv: list[str] | None = None) -> None:
    """The command: draws the edits of one picture and writes them as one grid."""
    args = parse_settings(Settings, argv, description=__doc__.splitlines()[0])
    images = list(map(load_image, args.image))
    if args.lora:
        read_lora(args.lora)  # a bad name fails here, before minutes of loading
    with whole_file(args.out) as temporary:
        # A disk that refuses is better known now than after minutes of work.
        temporary.touch()
        temporary.unlink()
        _draw(args, images).save(temporary)
    say(f"wrote {args.out}: {args.num} edits of each policy")


if __name__ == "__main__":
    run_script(main)
