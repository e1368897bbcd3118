"""Every family of editors, as tiny random models of the real classes, saved like released ones."""

import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import lora_layers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from rule_judge import RuleJudge, log  # noqa: E402

import sample  # noqa: E402
import train_nft  # noqa: E402
from data_prep import BadInput, load_processor, seeded  # noqa: E402

KONTEXT, QWEN, PLUS = "FluxKontextPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"
KLEIN, FLUX2, LONGCAT = "Flux2KleinPipeline", "Flux2Pipeline", "LongCatImageEditPipeline"
QWEN21, KLEIN_KV = "QwenImage21Pipeline", "Flux2KleinKVPipeline"
EDITORS = [KONTEXT, QWEN, PLUS, f"{PLUS}-2511", KLEIN, f"{KLEIN}-distilled", FLUX2, LONGCAT]
EDITORS += [QWEN21, KLEIN_KV]
SEVERAL = (PLUS, KLEIN, FLUX2, QWEN21, KLEIN_KV)
SIZE = 64  # pixels; Flux.2 takes no picture below
PROMPT = "make the red circle blue"


@pytest.fixture
def load(editor_folder):
    return lambda name, resolution=SIZE, **kwargs: sample.load_editor(
        editor_folder(name), resolution=resolution, **kwargs
    )


def picture(key="source", width=SIZE, height=SIZE):
    pixels = torch.randint(
        0, 256, (height, width, 3), generator=seeded("test", key), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())


def draw(editor, K=3, images=None, steps=2, prompt=PROMPT, **kwargs):
    return sample.rollout(
        editor,
        images or [picture()],
        prompt,
        [seeded("noise", j) for j in range(K)],
        steps,
        **kwargs,
    )


def listen(editor):
    """What the pipeline gives the transformer and gets back, call by call."""
    calls = []
    editor.pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    return calls


def token_side(editor):
    """In pixels; Qwen-Image-2.1 has a token for each latent pixel, the others for 2 x 2."""
    scale = editor.pipe.vae_scale_factor
    return scale if editor.kind == QWEN21 else 2 * scale


def of_edit(editor, tokens, group):
    """The edit's part of what the transformer takes or returns."""
    N = group.x_0.shape[1]
    return (tokens[:, -N:] if editor.family.source_first else tokens[:, :N]).float()


def shaken(editor):
    """Policies that differ from the base."""
    sample.add_policies(editor, rank=4, alpha=8)
    for key, parameter in sample.lora_parameters(editor, "new").items():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=seeded("test", key))
    return editor


def pixels(images):
    return [image.tobytes() for image in images]


# ---------------------------------------------------------------- rollout and velocity


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize(
    "evaluation, dtype", [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)]
)
def test_velocity_is_the_pipelines_own_conditional_prediction_at_every_step(
    load, name, evaluation, dtype
):
    editor = shaken(load(name, dtype=dtype))
    calls = listen(editor)
    group = draw(editor, evaluation=evaluation, steps=3)
    seen = list(calls)
    no_cfg = (KONTEXT, FLUX2, f"{KLEIN}-distilled", QWEN21, KLEIN_KV)
    if evaluation and name not in no_cfg:
        seen = calls[::2]
        texts = [kwargs["encoder_hidden_states"] for kwargs, _ in calls[:2]]
        assert not torch.equal(texts[0], texts[1][:, :1])
    assert all(len(kwargs["hidden_states"]) == 3 for kwargs, _ in calls)
    for step, (t, (kwargs, output)) in enumerate(zip(group.sigmas, seen, strict=True)):
        x_t = of_edit(editor, kwargs["hidden_states"], group)
        with torch.no_grad():
            v = sample.velocity(editor, x_t, t.expand(3), group.cond)
        wanted = of_edit(editor, output, group)
        if step and editor.family.source_first:  # from a cache of the sources' keys and values
            assert (v - wanted).norm() < (1e-5 if dtype == torch.float32 else 0.02) * v.norm()
        else:
            assert torch.equal(v, wanted)
    assert len(set(pixels(group.images))) == 3
    for key, value in group.cond.items():
        assert not sample._has_batch(key, value) or len(value) == 1


@pytest.mark.parametrize("name", EDITORS)
def test_sources_keep_their_aspect_ratio_at_the_training_resolution(load, name):
    resolution = 192 if name == QWEN21 else 96
    editor = load(name, resolution=resolution)
    multiple = 2 * editor.pipe.vae_scale_factor
    for size in ((640, 480), (300, 450), (80, 80)):
        group = draw(editor, K=1, images=[picture("any", *size)], steps=1)
        width, height = group.images[0].size
        assert abs(width * height / resolution**2 - 1) < 0.1
        assert abs(width / height / (size[0] / size[1]) - 1) < 0.1
        assert width % multiple == height % multiple == 0
        tokens = width * height // token_side(editor) ** 2
        assert group.x_0.shape[1] == tokens
        assert group.cond["hidden_states"].shape[1] == 2 * tokens  # the source too


@pytest.mark.parametrize("name", EDITORS)
def test_the_source_reaches_the_vae_in_one_piece(load, name):
    """A picture that needs no resizing is encoded with its size and pixels, nothing cropped."""
    editor = load(name)
    seen = []
    encode = editor.pipe.vae.encode

    def spied(x, *args):
        seen.append(x)
        return encode(x, *args)

    editor.pipe.vae.encode = spied
    source = picture()
    if not name.startswith("Flux2"):  # Flux.2 takes no side below 64
        source = picture("odd", 128, 32)
    draw(editor, K=1, images=[source], steps=1)
    wanted = torch.from_numpy(np.array(source)) / 127.5 - 1
    encoded = seen[0].squeeze(2)[0, :3]  # Qwen-Image-2.1 adds an opaque alpha channel
    assert torch.allclose(encoded.permute(1, 2, 0), wanted, atol=1e-5)


@pytest.mark.parametrize("name", EDITORS)
def test_several_pictures_are_seen_where_the_pipeline_takes_them(load, name):
    editor = load(name, resolution=96)
    images = [picture(), picture("other", 300, 200)]
    if not name.startswith(SEVERAL):
        with pytest.raises(BadInput, match=f"2 pictures and {name.split('-')[0]} takes one"):
            draw(editor, images=images)
        return
    group = draw(editor, images=images, steps=1)
    other = draw(editor, images=[images[0], picture("third", 300, 200)], steps=1)
    wanted = [sample.working_size(editor, image) for image in images]
    pixels_in_all = sum(width * height for width, height in [wanted[0], *wanted])
    assert group.images[0].size == wanted[0]
    assert group.cond["hidden_states"].shape[1] == pixels_in_all // token_side(editor) ** 2
    t = group.sigmas[:1].expand(3)
    v = sample.velocity(editor, group.x_0, t, group.cond)
    assert not torch.allclose(v, sample.velocity(editor, group.x_0, t, other.cond))


def test_the_text_encoders_small_picture_is_the_pipelines_own_unless_it_is_above_the_working_size(
    load,
):
    for resolution, small in ((512, (384, 384)), (64, (64, 64))):
        editor = load(PLUS, resolution=resolution)
        with sample._sources_keep_their_size(editor, [picture("wide", 160, 80)]):
            module = sys.modules[type(editor.pipe).__module__]
            assert module.calculate_dimensions(module.CONDITION_IMAGE_SIZE, 1.0) == small
            assert module.calculate_dimensions(module.VAE_IMAGE_SIZE, 2.0) == (160, 80)


def test_flux2_sources_stay_below_the_pixels_at_which_the_pipeline_would_crop_them(load):
    editor = load(KLEIN, resolution=1024)
    for size in ((1264, 832), (3000, 2000), (832, 1264), (1000, 1000)):
        width, height = sample.working_size(editor, picture("big", *size))
        assert 0.95 * 1024**2 < width * height <= 1024**2
    with pytest.raises(BadInput, match="up to 1024; take 1024"):
        load(KLEIN, resolution=1088)


@pytest.mark.parametrize("name", [QWEN, PLUS, LONGCAT])
def test_the_pipelines_module_is_as_it_was_after_a_rollout(load, name):
    editor = load(name)
    module = sys.modules[type(editor.pipe).__module__]
    own = module.calculate_dimensions
    draw(editor, K=1, steps=1)
    assert module.calculate_dimensions is own
    with pytest.raises(BadInput):
        draw(editor, K=1, steps=-1)
    assert module.calculate_dimensions is own


# ---------------------------------------------------------------- families


@pytest.mark.parametrize(
    "name, evaluation, wanted",
    [
        (KONTEXT, False, {"guidance_scale": 2.5}),
        (KONTEXT, True, {"guidance_scale": 3.5}),
        (QWEN, False, {"true_cfg_scale": 1.0}),
        (QWEN, True, {"true_cfg_scale": 4.0, "negative_prompt": " "}),
        (PLUS, False, {"true_cfg_scale": 1.0}),
        (PLUS, True, {"true_cfg_scale": 4.0, "negative_prompt": " "}),
        (KLEIN, False, {"guidance_scale": 1.0}),
        (KLEIN, True, {"guidance_scale": 4.0}),
        (f"{KLEIN}-distilled", True, {"guidance_scale": 1.0}),
        (FLUX2, False, {"guidance_scale": 4.0}),
        (QWEN21, True, {"true_cfg_scale": 1.0}),
        (LONGCAT, False, {"guidance_scale": 1.0}),
        (LONGCAT, True, {"guidance_scale": 4.5}),
    ],
)
def test_a_family_has_its_own_guidance_in_rollouts_and_in_evaluation(
    load, monkeypatch, name, evaluation, wanted
):
    editor = load(name)
    given = {}
    call = type(editor.pipe).__call__

    def spied(self, **kwargs):
        given.update(kwargs)
        return call(self, **kwargs)

    spied.__signature__ = sample.inspect.signature(call)
    monkeypatch.setattr(type(editor.pipe), "__call__", spied)
    draw(editor, K=1, steps=1, evaluation=evaluation)
    keys = given.keys() & {"guidance_scale", "true_cfg_scale", "negative_prompt"}
    assert {key: given[key] for key in keys} == wanted
    draw(editor, K=1, steps=1, evaluation=evaluation, guidance=1.5)
    assert given[editor.family.guidance_name] == 1.5


@pytest.mark.parametrize("name", EDITORS)
def test_the_lora_reaches_every_block_of_the_family(load, name):
    editor = load(name)
    sample.add_policies(editor, rank=4, alpha=8)
    layers = {key.rsplit(".lora_", 1)[0] for key in sample.lora_parameters(editor, "new")}
    blocks = set()
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        for number in range(len(getattr(editor.transformer, kind, []))):
            blocks.add(f"{kind}.{number}")
    assert {".".join(layer.split(".")[:2]) for layer in layers} == blocks
    wanted = {"to_q", "to_k", "to_v", "to_out.0"}
    if name != QWEN21:  # it has one stream
        wanted |= {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert {layer.split("attn.")[1] for layer in layers} >= wanted
    if name.startswith("Flux2"):
        single = "single_transformer_blocks.0.attn"
        assert layers >= {f"{single}.to_qkv_mlp_proj", f"{single}.to_out"}


def test_distilled_bases_are_warned_of_and_not_refused(load, editor_folder, tmp_path, capsys):
    sample.note.cache_clear()
    load(KLEIN)
    assert "distilled" not in capsys.readouterr().err
    load(f"{KLEIN}-distilled")
    assert "is distilled to few steps" in capsys.readouterr().err
    (tmp_path / "LongCat-Image-Edit-Turbo").symlink_to(editor_folder(LONGCAT))
    sample.load_editor(tmp_path / "LongCat-Image-Edit-Turbo", resolution=SIZE)
    assert "LongCat-Image-Edit-Turbo is distilled" in capsys.readouterr().err


@pytest.mark.parametrize("name", [KONTEXT, QWEN, KLEIN])
def test_a_pipeline_that_the_table_does_not_know_is_tried_and_what_was_assumed_is_said(
    load, monkeypatch, capsys, name
):
    sample.note.cache_clear()
    known = draw(load(name), guidance=1.0)
    monkeypatch.delitem(sample.FAMILIES, name)
    editor = load(name)
    said = capsys.readouterr().err
    assert f"{name} is not in FAMILIES" in said
    assert "several=False" in said
    assert pixels(draw(editor, guidance=1.0).images) == pixels(known.images)
    sample.add_policies(editor, rank=4, alpha=8)
    assert editor.family.rollout_guidance == (None if name == KONTEXT else 1.0)


def test_guidance_that_shares_a_batch_with_the_edits_is_refused(load, monkeypatch):
    editor = load(KONTEXT)
    forward = editor.transformer.forward

    def half(**kwargs):
        return (forward(**kwargs)[0][:3],)

    def double(module, args, kwargs):
        for key, value in kwargs.items():
            if sample._has_batch(key, value):
                kwargs[key] = torch.cat([value, value])
        return args, kwargs

    editor.transformer.forward = half
    editor.transformer.register_forward_pre_hook(double, with_kwargs=True)
    said = "runs its guidance in one batch with the edits; give a guidance of 1"
    with pytest.raises(BadInput, match=said):
        draw(editor)


# ---------------------------------------------------------------- prompts


LONG = " ".join([PROMPT] * 30)
SPELLED = 'add "' + "red " * 12 + '"'  # LongCat reads quoted text by the letter
TOO_LONG = r"more than the 40 tokens that LongCatImageEditPipeline takes: .*shorten it"
CUTTING = [KONTEXT, KLEIN, f"{KLEIN}-distilled", FLUX2, KLEIN_KV]
TAKING_WHOLE = [QWEN, PLUS, f"{PLUS}-2511", QWEN21]


def text_length(group):
    return group.cond["encoder_hidden_states"].shape[1]


@pytest.fixture
def said(capsys):
    """A function to what was said on stderr since; each note anew."""
    sample.note.cache_clear()
    return lambda: capsys.readouterr().err


@pytest.mark.parametrize("name", EDITORS)
def test_nothing_is_said_of_a_prompt_that_fits(load, said, name):
    draw(load(name), K=1, steps=1)
    assert "more than the" not in said()


@pytest.mark.parametrize("name", CUTTING)
def test_a_prompt_that_will_be_cut_is_said(load, said, name):
    editor = load(name)
    group = draw(editor, K=1, steps=1, prompt=LONG)
    assert f"more than the {editor.max_text} tokens" in said()
    assert text_length(group) == editor.max_text


@pytest.mark.parametrize("name", [KLEIN, FLUX2])
def test_a_prompt_that_is_cut_for_its_template_alone_is_said(load, said, name):
    editor = load(name)
    words = ["red"] * (editor.max_text - 1)
    draw(editor, K=1, steps=1, prompt=" ".join(words))
    assert f"more than the {editor.max_text} tokens" in said()


@pytest.mark.parametrize("name", TAKING_WHOLE)
def test_a_long_prompt_is_taken_whole(load, said, name):
    editor = load(name)
    fits = draw(editor, K=1, steps=1)
    whole = draw(editor, K=1, steps=1, prompt=LONG)
    assert text_length(whole) - text_length(fits) == 29 * 5
    assert "more than the" not in said()


@pytest.mark.parametrize("prompt", [LONG, SPELLED])
def test_a_prompt_at_which_the_pipeline_would_fail_is_refused(load, prompt):
    with pytest.raises(BadInput, match=TOO_LONG):
        draw(load(LONGCAT), K=1, steps=1, prompt=prompt)


def test_the_longest_prompt_that_the_pipeline_takes_is_not_refused(load):
    editor = load(LONGCAT)
    prompt = SPELLED
    while sample._text_tokens(editor.pipe, prompt) > editor.max_text:
        prompt = 'add "' + prompt[6:]  # a letter less
    assert sample._text_tokens(editor.pipe, prompt) == editor.max_text
    with pytest.raises(BadInput, match=TOO_LONG):
        sample.check_row(editor, {"images": ["a.png"], "prompt": 'add "r' + prompt[5:]})
    draw(editor, K=1, steps=1, prompt=prompt)


# ---------------------------------------------------------------- rows, before drawing


@pytest.fixture
def idle(load):
    """As load; a model that is called fails the test."""

    def call(*args):
        pytest.fail("a model was called")

    def load_idle(name):
        editor = load(name)
        for part in editor.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.register_forward_pre_hook(call)
        return editor

    return load_idle


@pytest.mark.parametrize("name", EDITORS)
def test_a_row_that_fits_has_no_fault(idle, said, name):
    sample.check_row(idle(name), {"images": ["a.png"], "prompt": PROMPT})
    assert "more than the" not in said()


@pytest.mark.parametrize("name", EDITORS)
def test_several_pictures_are_a_fault_where_the_editor_takes_one(idle, name):
    row = {"images": ["a.png", "b.png"], "prompt": PROMPT}
    if name.startswith(SEVERAL):
        sample.check_row(idle(name), row)
    else:
        with pytest.raises(BadInput, match="2 pictures"):
            sample.check_row(idle(name), row)


@pytest.mark.parametrize("prompt", [LONG, SPELLED])
def test_a_prompt_at_which_the_pipeline_would_fail_is_a_fault(idle, prompt):
    with pytest.raises(BadInput, match=TOO_LONG):
        sample.check_row(idle(LONGCAT), {"images": ["a.png"], "prompt": prompt})


@pytest.mark.parametrize("name", CUTTING)
def test_a_prompt_that_will_be_cut_is_a_note_and_no_fault(idle, said, name):
    sample.check_row(idle(name), {"images": ["a.png"], "prompt": LONG})
    assert "the rest is cut" in said()


@pytest.mark.parametrize("name", TAKING_WHOLE)
def test_a_long_prompt_that_is_taken_whole_is_no_fault(idle, said, name):
    sample.check_row(idle(name), {"images": ["a.png"], "prompt": LONG})
    assert "more than the" not in said()


def test_the_check_at_the_start_names_the_row_that_the_editor_refuses(load, tmp_path):
    editor = load(KLEIN)
    sample.add_policies(editor, rank=4, alpha=8)
    picture("thin", 640, 64).save(tmp_path / "thin.png")
    row = {"images": [tmp_path / "thin.png"], "prompt": PROMPT}
    row |= {"id": "seven", "where": "train.jsonl:7"}
    with pytest.raises(BadInput, match="^train.jsonl:7, row seven: Flux2KleinPipeline refuses"):
        sample.check_editor(editor, row)


@pytest.fixture
def check(load, tmp_path):
    """A function of an editor to its check at the start of training."""
    picture().save(tmp_path / "source.png")
    row = {"images": [tmp_path / "source.png"], "prompt": PROMPT, "id": "0", "where": "a.jsonl:1"}

    def check_editor(editor):
        sample.add_policies(editor, rank=4, alpha=8)
        sample.check_editor(editor, row)

    return check_editor


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_passes_the_check_at_the_start_with_and_without_cfg(load, check, name, dtype):
    check(load(name, dtype=dtype))
    editor = load(name, dtype=dtype)
    editor.family = sample.replace(editor.family, rollout_guidance=3.0)
    check(editor)


@pytest.mark.parametrize("name", [KONTEXT, PLUS, KLEIN, LONGCAT, QWEN21, KLEIN_KV])
def test_a_layout_of_tokens_that_is_not_the_familys_is_refused_by_its_name(load, check, name):
    editor = load(name)
    turned = not editor.family.source_first
    editor.family = sample.replace(editor.family, source_first=turned)
    with pytest.raises(BadInput, match=f"{name}: its transformer's calls cannot be .*source_first"):
        check(editor)


def test_an_editor_that_tells_its_transformer_other_times_is_refused(load, check):
    """As thousandths, which the transformer itself divides."""
    editor = load(KONTEXT)
    forward = editor.transformer.forward

    def tell(module, args, kwargs):
        t = kwargs["timestep"]
        return args, kwargs | {"timestep": 1000 * t if t.max() <= 1 else t}

    editor.transformer.register_forward_pre_hook(tell, with_kwargs=True)
    editor.transformer.forward = lambda timestep, **kwargs: forward(
        timestep=timestep / 1000, **kwargs
    )
    with pytest.raises(BadInput, match="calls cannot be repeated"):
        check(editor)


def test_a_transformer_that_returns_something_else_when_called_again_is_refused(load, check):
    editor = load(KONTEXT)
    calls = []

    def change(module, args, output):
        calls.append(output)
        return (output[0] * len(calls),)

    editor.transformer.register_forward_hook(change)
    with pytest.raises(BadInput, match="calls cannot be repeated"):
        check(editor)


@pytest.mark.parametrize("name", [QWEN21, KLEIN_KV])
def test_a_group_keeps_no_cache_of_keys_and_values(load, name):
    cond = draw(load(name), steps=2).cond
    assert "kv_cache" not in cond
    tensors = [value for value in cond.values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in tensors) < 100_000


@pytest.mark.parametrize("name", [QWEN21, KLEIN_KV])
def test_recomputing_blocks_keeps_the_gradient_of_editors_that_cache_keys(load, name):
    editor = shaken(load(name))
    group = draw(editor, K=2)
    parameters = list(sample.lora_parameters(editor, "new").values())
    gradients = []

    classes = editor.transformer._repeated_blocks

    def trial(pairs):
        v = sample.velocity(editor, group.x_0, group.sigmas[:1].expand(2), group.cond)
        gradients.append(torch.autograd.grad(v.square().mean(), parameters))
        if len(gradients) < 2 + len(classes):
            raise torch.OutOfMemoryError

    assert sample.fit_memory(editor, 1, trial) == (1, classes)
    for some in gradients[1:]:
        for gradient, wanted in zip(some, gradients[0], strict=True):
            assert torch.equal(gradient, wanted)


def test_pictures_with_an_alpha_channel_become_plain_ones(load):
    assert {image.mode for image in draw(load(QWEN21)).images} == {"RGB"}


@pytest.mark.parametrize("name, steps", [(KONTEXT, 6), (QWEN21, 6), (KLEIN, 12), (KLEIN_KV, 12)])
def test_a_rollout_has_as_many_steps_as_its_family_needs(load, name, steps):
    editor = load(name)
    assert len(draw(editor, K=1, steps=editor.family.rollout_steps).sigmas) == steps


# ---------------------------------------------------------------- training


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Two rows and one held-out row."""
    folder = tmp_path_factory.mktemp("rows")
    for split, number in (("train", 2), ("test", 1)):
        lines = []
        for i in range(number):
            picture(f"{split}{i}", SIZE, SIZE).save(folder / f"{split}{i}.png")
            lines.append({"prompt": PROMPT, "image": f"{split}{i}.png"})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def train(base, rows, out, **changes):
    settings = {
        "base": base,
        "data": rows,
        "out": out,
        "judge": "local:rule",
        "resolution": SIZE,
        "epochs": 2,
        "groups": 2,
        "group_size": 3,
        "rollout_steps": 2,
        "train_timesteps": 1,
        "eval_steps": 2,
        "eval_every": 2,
        "save_every": 2,
        "lr": 1e-2,
        "ema_decay": 0.0,
        "filter": "none",
        "lora_rank": 4,
        "lora_alpha": 8,
        "train_batch": 4,
    }
    words = []
    for key, value in (settings | changes).items():
        words += [f"--{key}", str(value)]
    train_nft.main(words)


@pytest.fixture
def watched(monkeypatch):
    """A rule for a judge, and the editor that training loads."""
    loaded = []
    load_editor = train_nft.load_editor

    def load(*args, **kwargs):
        loaded.append(load_editor(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(train_nft, "load_editor", load)
    monkeypatch.setattr(train_nft, "load_judge", lambda *args, **kwargs: RuleJudge())
    monkeypatch.setattr(train_nft, "catch_signals", threading.Event)  # pytest keeps its handlers
    # two threads on a busy machine take turns waiting
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return loaded


def frozen(pipe):
    """Everything but LoRA weights, by name."""
    found = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for key, value in part.state_dict().items():
                if ".lora_" not in key:
                    found[f"{name}.{key.replace('.base_layer', '')}"] = value
    return found


def plain_pipeline(folder):
    """Diffusers alone; where torchvision is missing it needs the processors, and only them."""
    parts = {}
    late = {}
    for name, kind in json.loads((folder / "model_index.json").read_text()).items():
        if isinstance(kind, list) and kind[1] in ("Qwen2_5_VLProcessor", "Qwen3VLProcessor"):
            parts[name] = load_processor(getattr(transformers, kind[1]), folder / name)
        if kind == ["transformers", "PixtralProcessor"]:
            late[name] = transformers.AutoTokenizer.from_pretrained(folder / name)
    pipe = DiffusionPipeline.from_pretrained(folder, **parts, **dict.fromkeys(late))
    pipe.register_modules(**late)
    return pipe


def plain_load_lora(pipe, folder):
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(folder)
    else:  # LongCat's pipeline has no LoRA loader; its transformer has
        pipe.transformer.load_lora_adapter(
            folder, prefix="transformer", weight_name=sample.LORA_FILE
        )


def is_unread(name, key):
    """Qwen-Image's last block does not use its text tokens."""
    return name.startswith("Qwen") and (".1.attn.add_q" in key or ".1.attn.to_add_out" in key)


def plain_edits(pipe, editor):
    """A function to three edits by diffusers alone, as draw(editor, guidance=1.0) draws them."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if "sample_sigmas" in pipe.config:  # Qwen-Image-2.1 has times of its own
        pipe.register_to_config(sample_sigmas=None)
    pipe.tokenizer_max_length = editor.pipe.tokenizer_max_length
    plain = sample.Editor(pipe, editor.family, SIZE, editor.max_text)
    options = sample._call_options(plain, (SIZE, SIZE), 1.0)

    def edits():
        # LongCat and Qwen have no other way to work below a megapixel
        with sample._sources_keep_their_size(plain, [picture()]):
            images = pipe(
                image=picture(),
                prompt=PROMPT,
                num_images_per_prompt=3,
                num_inference_steps=2,
                generator=[seeded("noise", j) for j in range(3)],
                **options,
            ).images
        return [image.convert("RGB") for image in images]

    return edits


@pytest.mark.parametrize("name", EDITORS)
def test_two_epochs_move_the_lora_and_nothing_else_and_diffusers_alone_draws_the_same(
    editor_folder, rows, tmp_path, watched, name
):
    out = tmp_path / "out"
    train(editor_folder(name), rows, out)
    (editor,) = watched
    pipe = plain_pipeline(editor_folder(name))
    before = frozen(pipe)
    after = frozen(editor.pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for key, weight in load_file(out / "checkpoint-2" / sample.LORA_FILE).items():
        if "lora_B" in key and not is_unread(name, key):
            assert weight.abs().max() > 1e-4, f"{key} did not move"

    editor.pipe.scheduler.solver_order = 1  # diffusers' own solver
    ours = pixels(draw(editor, guidance=1.0).images)
    edits = plain_edits(pipe, editor)
    assert pixels(edits()) != ours
    plain_load_lora(pipe, out / "checkpoint-2")
    assert pixels(edits()) == ours


@pytest.mark.parametrize(
    "name, given, wanted",
    [
        (QWEN, {}, {(1, 1.0), (2, 1.0), (3, 4.0)}),
        (QWEN, {"guidance": 2, "eval_guidance": 1}, {(1, 1.0), (2, 2.0), (3, 1.0)}),
        (KONTEXT, {"guidance": 2}, {(1, 1.0), (2, 2.0), (3, 3.5)}),
        (KONTEXT, {}, {(1, 1.0), (2, 2.5), (3, 3.5)}),
    ],
)
def test_training_takes_the_familys_guidance_in_rollouts_and_in_evaluation(
    editor_folder, rows, tmp_path, watched, monkeypatch, name, given, wanted
):
    # (steps, guidance): 1 step and a guidance of 1 in the check at the start, 2 steps in rollouts
    seen = set()
    call = sample._call_pipeline

    def spied(*args):
        seen.add(args[4:])
        return call(*args)

    monkeypatch.setattr(sample, "_call_pipeline", spied)
    some = {"epochs": 1, "eval_every": 5, "eval_steps": 3}
    train(editor_folder(name), rows, tmp_path / "out", **some, **given)
    assert seen == wanted


@pytest.mark.parametrize("name", [PLUS, KLEIN])
def test_rows_of_several_pictures_and_other_shapes_train(
    editor_folder, rows, tmp_path, watched, name
):
    folder = tmp_path / "rows"
    folder.mkdir()
    for key, size in (("a", (120, 80)), ("b", (80, 130))):
        picture(key, *size).save(folder / f"{key}.png")
    images = ["a.png", ["b.png", "a.png"], ["a.png", "b.png"]]
    lines = [json.dumps({"prompt": PROMPT, "image": image}) for image in images]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    train(editor_folder(name), folder, tmp_path / "out", groups=3, resolution=96)
    records = log(tmp_path / "out")
    assert [record["groups/kept"] for record in records] == [1, 1]
    assert records[0]["grad/norm"] > 0


# ---------------------------------------------------------------- released LoRAs


def released(editor, folder, name="new", prefix="base_model.model.", **changes):
    """Writes an adapter as PEFT does, which is how the method's own LoRAs were released."""
    folder.mkdir()
    parameters = sample.lora_parameters(editor, name)
    weights = {prefix + key: value.detach().contiguous() for key, value in parameters.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    config = editor.transformer.peft_config[name].to_dict() | changes
    (folder / "adapter_config.json").write_text(json.dumps(config, default=sorted))
    return folder


@pytest.mark.parametrize("name", [KONTEXT, PLUS])
def test_a_released_lora_in_pefts_format_draws_what_its_own_policy_draws(
    load, editor_folder, tmp_path, monkeypatch, name
):
    editor = shaken(load(name))
    folder = released(editor, tmp_path / "released")
    picture().save(tmp_path / "in.png")
    seen = []

    def grid(rows, *args):
        seen.extend(rows[0][1:])
        return picture()

    monkeypatch.setattr(sample, "picture_grid", grid)
    options = ["--image", tmp_path / "in.png", "--prompt", PROMPT, "--out", tmp_path / "out.png"]
    options += ["--base", editor_folder(name), "--lora", folder]
    options += ["--num", 2, "--steps", 2, "--resolution", SIZE]
    sample.main([str(word) for word in options])
    generators = [torch.Generator().manual_seed(seed) for seed in (42, 43)]
    ours = sample.rollout(editor, [picture()], PROMPT, generators, 2, evaluation=True)
    assert pixels(seen) == pixels(ours.images)
    assert pixels(ours.images) != pixels(draw(load(name), K=2, evaluation=True).images)


@pytest.mark.parametrize("name", [KONTEXT, PLUS, LONGCAT])
def test_training_starts_from_a_lora_over_the_bare_base(
    load, editor_folder, rows, tmp_path, watched, name
):
    start = shaken(load(name))
    folder = released(start, tmp_path / "released")
    some = {"lora_rank": 16, "epochs": 1, "lr": 1e-9, "eval_every": 2}
    train(editor_folder(name), rows, tmp_path / "out", start_lora=folder, **some)
    (editor,) = watched
    wanted = sample.lora_parameters(start, "new")
    for policy in ("new", "old"):
        for key, weight in sample.lora_parameters(editor, policy).items():
            assert torch.allclose(weight, wanted[key], atol=1e-6), (policy, key)
    assert editor.transformer.peft_config["new"].lora_alpha == 8

    bare = load(name)
    group = draw(bare)
    arguments = (group.x_0, group.sigmas[:1].expand(3), group.cond)
    with sample.policy(editor, "base"):
        v = sample.velocity(editor, *arguments)
    assert torch.equal(v, sample.velocity(bare, *arguments))
    with sample.policy(editor, "old"):
        v = sample.velocity(editor, *arguments)
    assert torch.allclose(v, sample.velocity(start, *arguments), atol=1e-5)


@pytest.mark.parametrize(
    "changes, scaling", [({"lora_alpha": 2}, 0.5), ({"lora_alpha": 8, "use_rslora": True}, 4.0)]
)
def test_alpha_comes_from_the_lora_also_with_rank_stabilised_scaling(
    load, tmp_path, changes, scaling
):
    folder = released(shaken(load(KONTEXT)), tmp_path / "released", **changes)
    again = load(KONTEXT)
    sample.add_policies(again, start=folder)
    for layer in lora_layers(again):
        assert layer.scaling == {"new": scaling, "old": scaling}


@pytest.mark.parametrize("name", [KONTEXT, PLUS, KLEIN, LONGCAT])
def test_a_saved_rank_stabilised_lora_has_its_full_strength_for_diffusers_alone(
    load, tmp_path, name
):
    folder = released(shaken(load(name)), tmp_path / "released", use_rslora=True)
    editor = load(name)
    sample.add_policies(editor, start=folder)
    sample.save_lora(editor, tmp_path / "saved")
    plain = load(name)
    plain_load_lora(plain.pipe, tmp_path / "saved")
    group = draw(editor)
    arguments = (group.x_0, group.sigmas[:1].expand(3), group.cond)
    v = sample.velocity(plain, *arguments)
    torch.testing.assert_close(v, sample.velocity(editor, *arguments))


def test_our_own_checkpoint_is_a_start_too(load, tmp_path):
    editor = shaken(load(KLEIN))
    sample.save_lora(editor, tmp_path / "checkpoint-2")
    again = load(KLEIN)
    sample.add_policies(again, start=tmp_path / "checkpoint-2", averages=("old", "ema"))
    for policy in ("new", "old", "ema"):
        for key, weight in sample.lora_parameters(again, policy).items():
            assert torch.equal(weight, sample.lora_parameters(editor, "new")[key])


# ---------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name", [QWEN, LONGCAT, FLUX2])
def test_with_torchvision_the_standard_processors_are_loaded(editor_folder, monkeypatch, name):
    pipe = plain_pipeline(editor_folder(name))
    passed = []

    def spied(base, **kwargs):
        passed.append(kwargs)
        return pipe

    monkeypatch.setattr(sample, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", spied)
    folder = str(editor_folder(name))
    assert sample._load_pipeline(folder, "cpu", torch.float32, trust_remote_code=False) is pipe
    assert passed == [{"dtype": torch.float32, "trust_remote_code": False}]


def test_a_processor_that_cannot_be_had_without_torchvision_is_one_clear_line(
    editor_folder, tmp_path
):
    folder = tmp_path / "editor"
    shutil.copytree(editor_folder(QWEN), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Glm4vProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    if sample.is_torchvision_available():
        pytest.skip("torchvision is installed")
    with pytest.raises(
        BadInput, match="pip install torchvision if its processor needs it"
    ) as error:
        sample.load_editor(folder)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", [QWEN, FLUX2])
def test_a_lora_for_another_family_is_refused_in_one_line(load, tmp_path, name):
    folder = released(shaken(load(KONTEXT)), tmp_path / "kontext")
    said = f"kontext: its layers, rank or alpha are not those of this {name}"
    with pytest.raises(BadInput, match=said) as error:
        sample.add_policies(load(name), start=folder)
    assert "\n" not in str(error.value)


def test_a_lora_of_another_width_is_refused_in_one_line(load, tmp_path):
    folder = released(shaken(load(KONTEXT)), tmp_path / "kontext")
    wider = {}
    for key, value in load_file(folder / sample.PEFT_FILE).items():
        wider[key] = torch.zeros(value.shape[0], 2 * value.shape[1])
    save_file(wider, folder / sample.PEFT_FILE)
    said = "its layers, rank or alpha are not those of this FluxKontextPipeline"
    with pytest.raises(BadInput, match=said):
        sample.add_policies(load(KONTEXT), start=folder)


@pytest.mark.parametrize("name", [QWEN, KLEIN, LONGCAT])
def test_a_resolution_that_the_vae_cannot_take_is_refused_in_one_line(load, name):
    said = "resolution 100: .* takes multiples of 8.*; take 96|take 104"
    with pytest.raises(BadInput, match=said) as error:
        load(name, resolution=100)
    assert "\n" not in str(error.value)


def test_a_text_to_image_model_is_refused_in_one_line(editor_folder, tmp_path):
    from diffusers import QwenImagePipeline

    parts = dict(plain_pipeline(editor_folder(QWEN)).components)
    del parts["processor"]
    QwenImagePipeline(**parts).save_pretrained(tmp_path / "t2i")
    with pytest.raises(BadInput, match="t2i: QwenImagePipeline edits no pictures; name an editor"):
        sample.load_editor(tmp_path / "t2i")


def test_a_picture_that_the_pipeline_refuses_is_one_line(load):
    with pytest.raises(BadInput, match="Flux2KleinPipeline refuses a row: Image too small"):
        draw(load(KLEIN), images=[picture("thin", 640, 64)])
