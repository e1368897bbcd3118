"""The data: JSONL rows in, checked examples out; and the toy world with its two tiny models.

    python data_prep.py toy            # builds data/toy: rows, pictures, a tiny editor, a tiny judge
"""

import functools
import hashlib
import itertools
import json
import random
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image, ImageDraw, ImageOps
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast
from transformers.hf_argparser import HfArgumentParser

# ---------------------------------------------------------------- what every script uses


class BadInput(Exception):
    """A mistake in what the user gave: one line that names the file, line or value, and the mend."""


def run_script(main):
    """Calls a script's `main`; a `BadInput` ends it as one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_settings(cls, argv=None, description=None, **defaults):
    """The command line as an instance of the dataclass `cls`: `--name value` for each field, unknown names refused.

    `defaults` replace the dataclass's own; argv None means sys.argv[1:].
    """
    parser = HfArgumentParser(cls, description=description, allow_abbrev=False)
    parser.set_defaults(**defaults)
    return cls(**vars(parser.parse_args(argv)))


def seeded(*key):
    """A CPU torch.Generator whose seed is a hash of `key`: every random draw names itself, so randomness has no state.

    key: anything whose repr is stable, as in seeded(seed, "noise", epoch, group, copy).
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


# ---------------------------------------------------------------- rows and pictures


def load_image(path):
    """The picture at `path` as an upright RGB PIL.Image; BadInput when it is missing or does not decode."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such picture; correct the path in the row, or add the file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: not a readable picture ({error}); replace it or remove its row") from None


def read_rows(folder, split):
    """The rows of a dataset folder's `train` or `test` split, checked, pictures not yet opened.

    Returns a list of dicts: `prompt` (str), `images` (list of absolute paths, from the key `image`), `id` (str), and
    whatever else the row holds (`requirement`, `task`, ...); `target`, the picture of a right edit, becomes absolute.
    Raises BadInput naming file, line and mend.
    """
    folder = Path(folder).resolve()
    names = [f"{split}.jsonl", f"{split}_metadata.jsonl"]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise BadInput(f"{folder}: holds neither {names[0]} nor {names[1]}; name a dataset folder")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{where}: not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise BadInput(f"{where}: not an object; write one object a line")
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise BadInput(f"{where}: the row has no `prompt`; add the instruction or remove the row")
        images = [row["image"]] if isinstance(row.get("image"), str) else row.get("image")
        if not images or not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise BadInput(f"{where}: the row has no `image`; add a path, or a list of paths, relative to {folder}")
        row["images"] = [_inside(folder, name, where) for name in images]
        if "target" in row:
            row["target"] = _inside(folder, row["target"], where)
        row["id"] = str(row.get("id", f"{split}-{number}"))
        rows.append(row)
    if not rows:
        raise BadInput(f"{file}: holds no rows; add some")
    return rows


def _inside(folder, name, where):
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise BadInput(f"{where}: picture {name} leaves the dataset folder; move it inside {folder}")
    return str(path)


def check_pictures(rows):
    """Opens every picture of `rows` once; the first that is missing or broken raises BadInput."""
    paths = {path for row in rows for path in row["images"] + [row["target"]] * ("target" in row)}
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(load_image, sorted(paths)):
            pass


# ---------------------------------------------------------------- the toy world: 2 x 2 cells of coloured shapes

SIZE, CELL = 32, 16  # pixels
COLOURS = {"red": (220, 40, 40), "green": (30, 170, 50), "blue": (50, 80, 220), "yellow": (240, 200, 40),
           "purple": (150, 40, 190)}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = {"white": (245, 245, 245), "gray": (140, 140, 140), "black": (25, 25, 25)}
CELLS = ("top left", "top right", "bottom left", "bottom right")
OBJECTS = (None, *((colour, shape) for shape in SHAPES for colour in COLOURS))  # object 0 is an empty cell
TASKS = ("recolour", "remove", "add", "replace", "background")
TOY_JUDGE_PROMPT = "{prompt}"  # the tiny judge knows a few dozen words: it gets the instruction alone

# A scene is five integers: background, then the object in each cell, row by row.


@functools.cache
def cell_templates():
    """Every picture a cell can show: float (backgrounds, objects, 3, 16, 16) in [0, 1]."""
    table = torch.empty(len(BACKGROUNDS), len(OBJECTS), 3, CELL, CELL)
    for b, background in enumerate(BACKGROUNDS.values()):
        for o, thing in enumerate(OBJECTS):
            big = Image.new("RGB", (8 * CELL, 8 * CELL), background)  # drawn large, then averaged: smooth edges
            if thing:
                colour, draw = COLOURS[thing[0]], ImageDraw.Draw(big)
                if thing[1] == "circle":
                    draw.ellipse((20, 20, 107, 107), fill=colour)
                elif thing[1] == "square":
                    draw.rectangle((16, 16, 111, 111), fill=colour)
                else:
                    draw.polygon([(64, 12), (116, 110), (12, 110)], fill=colour)
            small = np.asarray(big.resize((CELL, CELL), Image.Resampling.BOX))
            table[b, o] = torch.from_numpy(small.copy()).permute(2, 0, 1) / 255
    return table


def render(scenes):
    """Pictures of scenes: int (B, 5) -> float (B, 3, 32, 32) in [0, 1]."""
    cells = cell_templates()[scenes[:, :1], scenes[:, 1:]]  # (B, 4, 3, 16, 16)
    grid = cells.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5)  # (B, 3, row, 16, column, 16)
    return grid.reshape(len(scenes), 3, SIZE, SIZE)


def to_pil(picture):
    """float (3, H, W) in [0, 1] -> PIL.Image."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


@functools.cache
def instructions():
    """Every instruction of the world: {text: (task, wanted change)}, and the held-out ones: a set of texts."""
    texts = {task: {} for task in TASKS}
    for (colour, shape) in OBJECTS[1:]:
        this = OBJECTS.index((colour, shape))
        texts["remove"][f"remove the {colour} {shape}"] = (this, 0)
        for other in set(COLOURS) - {colour}:
            texts["recolour"][f"make the {colour} {shape} {other}"] = (this, OBJECTS.index((other, shape)))
        for other in set(SHAPES) - {shape}:
            texts["replace"][f"turn the {colour} {shape} into a {other}"] = (this, OBJECTS.index((colour, other)))
        for cell, name in enumerate(CELLS):
            texts["add"][f"add a {colour} {shape} at the {name}"] = (cell, this)
    for old, new in itertools.permutations(range(len(BACKGROUNDS)), 2):
        names = list(BACKGROUNDS)
        texts["background"][f"change the {names[old]} background to {names[new]}"] = (old, new)
    held_out = set()
    for task in TASKS:
        names = sorted(texts[task])
        order = torch.randperm(len(names), generator=seeded("toy held-out instructions", task)).tolist()
        held_out |= {names[i] for i in order[: max(1, len(names) // 7)]}
    return {text: (task, change) for task in TASKS for text, change in texts[task].items()}, held_out


def is_test_scene(scene):
    """An eighth of all scenes is never seen in training, neither as a source nor as a target."""
    return zlib.crc32(bytes(scene)) % 8 == 0


def apply_change(scene, task, change):
    """The scene after an instruction, or None where it does not apply (no such object, cell taken)."""
    background, cells, (this, new) = scene[0], list(scene[1:]), change
    if task == "background":
        return (new, *cells) if background == this else None
    if task == "add":
        if cells[this] or new in cells:
            return None
        cells[this] = new
    else:
        if this not in cells or (new and new in cells):
            return None
        cells[cells.index(this)] = new
    return (background, *cells)


def toy_examples(number, split, *key):
    """Seeded (source scene, target scene, task, text) tuples of one split; tasks take turns, objects are distinct."""
    texts, held_out = instructions()
    by_task = {t: sorted(x for x in texts if texts[x][0] == t and (x in held_out) == (split == "test")) for t in TASKS}
    rng, examples = random.Random(seeded("toy", split, *key).initial_seed()), []
    while len(examples) < number:
        cells = (rng.sample(range(1, len(OBJECTS)), rng.choice((1, 2, 2, 3, 3))) + [0] * 3)[:4]
        rng.shuffle(cells)
        scene, task = (rng.randrange(len(BACKGROUNDS)), *cells), TASKS[len(examples) % len(TASKS)]
        text = rng.choice(by_task[task])
        target = apply_change(scene, task, texts[text][1])
        if target is None or is_test_scene(scene) != (split == "test") or (split == "train" and is_test_scene(target)):
            continue
        examples.append((scene, target, task, text))
    return examples


@functools.cache
def object_credit():
    """credit[source, target, seen] in [0, 1]: 1 the wanted object, 0 the old one, 0.3 each for its colour and shape."""
    credit = torch.zeros(len(OBJECTS), len(OBJECTS), len(OBJECTS))
    for source, target, seen in itertools.product(range(len(OBJECTS)), repeat=3):
        if OBJECTS[target] and OBJECTS[seen]:
            credit[source, target, seen] = 0.3 * sum(a == b for a, b in zip(OBJECTS[target], OBJECTS[seen]))
        if seen == target:
            credit[source, target, seen] = 1.0
        elif seen == source:
            credit[source, target, seen] = 0.0
    return credit


def oracle_scores(pictures, sources, targets):
    """Score and success by program: pictures (B, 3, 32, 32) in [0, 1], scenes (B, 5) -> float (B,), bool (B,).

    Each cell is compared with everything a cell can show; score = (edit done) x (rest kept), each the mean credit of
    what should change and of what should not. Success: every cell is nearest to its target, and near it.
    """
    templates = cell_templates().flatten(2).flatten(0, 1)  # (48, 768)
    cells = pictures.unflatten(3, (2, CELL)).unflatten(2, (2, CELL))  # (B, 3, 2, 16, 2, 16)
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(len(pictures), 4, -1)  # (B, 4, 768)
    distance = torch.cdist(cells.flatten(0, 1), templates).square() / cells.shape[-1]  # (B * 4, 48) mean squared error
    distance = distance.unflatten(0, (-1, 4))  # (B, 4, 48)
    seen = (-distance / 0.001).softmax(-1).unflatten(-1, (len(BACKGROUNDS), len(OBJECTS)))  # (B, 4, 3, 16)
    ground = seen.sum(3).gather(2, targets[:, None, :1].expand(-1, 4, -1)).squeeze(2)  # (B, 4) right background
    thing = (seen.sum(2) * object_credit()[sources[:, 1:], targets[:, 1:]]).sum(2)  # (B, 4) right object
    changed = sources[:, 1:] != targets[:, 1:]  # (B, 4)
    recolours_ground = (sources[:, 0] != targets[:, 0])[:, None]  # (B, 1)
    done = torch.where(recolours_ground, ground, thing * changed).sum(1) / torch.where(recolours_ground, 4, 1).squeeze(1)
    kept_things = (thing * ~changed).sum(1) / (~changed).sum(1)
    kept = torch.where(recolours_ground, 1.0, ground).mean(1) * kept_things
    wanted = targets[:, :1] * len(OBJECTS) + targets[:, 1:]  # (B, 4)
    near = distance.gather(2, wanted[..., None]).squeeze(2) < 0.015
    return done * kept, ((distance.argmin(2) == wanted) & near).all(1)


def oracle(row, image):
    """(score in [0, 1], success) of an edit of a toy row by program, None for a row that is not of the toy world."""
    if "target_scene" not in row:
        return None
    picture = torch.from_numpy(np.asarray(image.convert("RGB").resize((SIZE, SIZE))).copy()).permute(2, 0, 1) / 255
    scenes = [torch.tensor([row[key]]) for key in ("source_scene", "target_scene")]
    score, success = oracle_scores(picture[None], *scenes)
    return score.item(), success.item()


# ---------------------------------------------------------------- the toy editor: FLUX.1-Kontext in miniature

TEXT_TOKENS = 10  # the longest instruction has eight words and an end token


def toy_words():
    return sorted({word for text in instructions()[0] for word in text.split()})


def new_editor():
    """An untrained FluxKontextPipeline of the real classes, 1.6 M parameters, 32 x 32 pixels as 4 picture tokens."""
    words = toy_words()
    t5_tokenizer = T5TokenizerFast(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + word, -1.0) for word in words)], extra_ids=0
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe.train_from_iterator(words, trainers.BpeTrainer(end_of_word_suffix="</w>", special_tokens=special))
    parts = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in parts["merges"]]
    clip_tokenizer = CLIPTokenizer(vocab=parts["vocab"], merges=merges, model_max_length=TEXT_TOKENS + 2)
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS + 2, eos_token_id=clip_tokenizer.eos_token_id,
        bos_token_id=clip_tokenizer.bos_token_id, pad_token_id=clip_tokenizer.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(t5_tokenizer), d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64), layers_per_block=1, latent_channels=16, norm_num_groups=4, sample_size=SIZE,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels, num_layers=1, num_single_layers=2, attention_head_dim=32,
        num_attention_heads=3, joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    return FluxKontextPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae, CLIPTextModel(clip),
        clip_tokenizer, T5EncoderModel(t5), t5_tokenizer, transformer,
    )  # fmt: skip
