"""Every family of editors, as tiny random models of the real classes, saved like released ones."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLProcessor

sys.path.insert(0, str(Path(__file__).parent))

import sample  # noqa: E402
import train_nft  # noqa: E402
from data_prep import BadInput, load_processor, seeded  # noqa: E402
from rule_judge import RuleJudge  # noqa: E402

KONTEXT, QWEN, PLUS = "FluxKontextPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"
KLEIN, FLUX2, LONGCAT = "Flux2KleinPipeline", "Flux2Pipeline", "LongCatImageEditPipeline"
EDITORS = [KONTEXT, QWEN, PLUS, f"{PLUS}-2511", KLEIN, f"{KLEIN}-distilled", FLUX2, LONGCAT]
SEVERAL = (PLUS, KLEIN, FLUX2)
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
    N, true_cfg = (
        group.x_0.shape[1],
        evaluation and name not in (KONTEXT, FLUX2, f"{KLEIN}-distilled"),
    )
    seen = calls[:: 1 + true_cfg]
    assert len(calls) == 3 * (1 + true_cfg) and all(
        len(kwargs["hidden_states"]) == 3 for kwargs, _ in calls
    )
    for t, (kwargs, output) in zip(group.sigmas, seen, strict=True):
        with torch.no_grad():
            v = sample.velocity(
                editor, kwargs["hidden_states"][:, :N].float(), t.expand(3), group.cond
            )
        assert torch.equal(v, output[:, :N].float())
    if true_cfg:  # the other call is another one
        assert not torch.equal(
            calls[0][0]["encoder_hidden_states"], calls[1][0]["encoder_hidden_states"][:, :1]
        )
    assert len(group.images) == 3 and len(set(pixels(group.images))) == 3
    assert all(len(value) == 1 for key, value in group.cond.items() if sample.has_batch(key, value))


@pytest.mark.parametrize("name", EDITORS)
def test_sources_keep_their_aspect_ratio_at_the_training_resolution(load, name, capsys):
    sample.note.cache_clear()
    editor = load(name, resolution=96)
    multiple = 2 * editor.pipe.vae_scale_factor
    for size in ((640, 480), (300, 450), (80, 80)):
        group = draw(editor, K=1, images=[picture("any", *size)], steps=1)
        width, height = group.images[0].size
        assert (
            abs(width * height / 96**2 - 1) < 0.1
            and abs(width / height / (size[0] / size[1]) - 1) < 0.1
        )
        assert width % multiple == height % multiple == 0
        assert (
            group.cond["hidden_states"].shape[1]
            == group.x_0.shape[1]
            == width * height // multiple**2
        )
    assert "keep the size" not in capsys.readouterr().err


@pytest.mark.parametrize("name", EDITORS)
def test_the_source_reaches_the_vae_in_one_piece(load, name):
    """A picture that needs no resizing is encoded as it is: same size, same pixels, nothing cropped."""
    editor, seen = load(name), []
    encode = editor.pipe.vae.encode
    editor.pipe.vae.encode = lambda x, *args: seen.append(x) or encode(x, *args)
    source = (
        picture("odd", 128, 32) if not name.startswith("Flux2") else picture()
    )  # Flux.2 takes no side below 64
    draw(editor, K=1, images=[source], steps=1)
    wanted = torch.frombuffer(bytearray(source.tobytes()), dtype=torch.uint8).view(
        source.height, source.width, 3
    )
    assert torch.allclose(seen[0].squeeze(2)[0].permute(1, 2, 0), wanted / 127.5 - 1, atol=1e-5)


@pytest.mark.parametrize("name", EDITORS)
def test_several_pictures_are_seen_where_the_pipeline_takes_them(load, name):
    editor, images = load(name, resolution=96), [picture(), picture("other", 300, 200)]
    if not name.startswith(SEVERAL):
        with pytest.raises(BadInput, match=f"2 pictures and {name.split('-')[0]} takes one"):
            draw(editor, images=images)
        return
    group, other = (
        draw(editor, images=[images[0], second], steps=1)
        for second in (images[1], picture("third", 300, 200))
    )
    wanted = [sample.working_size(editor, image) for image in images]
    multiple = 2 * editor.pipe.vae_scale_factor
    assert group.images[0].size == wanted[0]
    assert group.cond["hidden_states"].shape[1] == sum(w * h for w, h in wanted) // multiple**2
    x, t = group.x_0, group.sigmas[:1].expand(3)
    assert not torch.allclose(
        sample.velocity(editor, x, t, group.cond), sample.velocity(editor, x, t, other.cond)
    )


def test_the_text_encoders_small_picture_is_the_pipelines_own_unless_it_is_above_the_working_size(
    load,
):
    for resolution, small in ((512, (384, 384)), (64, (64, 64))):
        editor = load(PLUS, resolution=resolution)
        with sample.sources_keep_their_size(editor, [picture("wide", 160, 80)]):
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
    with pytest.raises(ZeroDivisionError):
        draw(editor, K=1, steps=0)
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
        (LONGCAT, False, {"guidance_scale": 1.0}),
        (LONGCAT, True, {"guidance_scale": 4.5}),
    ],
)
def test_a_family_has_its_own_guidance_in_rollouts_and_in_evaluation(
    load, monkeypatch, name, evaluation, wanted
):
    editor, given = load(name), {}
    call = type(editor.pipe).__call__

    def spied(self, **kwargs):
        given.update(kwargs)
        return call(self, **kwargs)

    spied.__signature__ = sample.inspect.signature(call)
    monkeypatch.setattr(type(editor.pipe), "__call__", spied)
    draw(editor, K=1, steps=1, evaluation=evaluation)
    assert {
        key: given[key]
        for key in ("guidance_scale", "true_cfg_scale", "negative_prompt")
        if key in given
    } == wanted
    draw(editor, K=1, steps=1, evaluation=evaluation, guidance=1.5)
    assert given[editor.family.guidance] == 1.5


@pytest.mark.parametrize("name", EDITORS)
def test_the_lora_reaches_every_block_of_the_family(load, name):
    editor = load(name)
    sample.add_policies(editor, rank=4, alpha=8)
    layers = {key.rsplit(".lora_", 1)[0] for key in sample.lora_parameters(editor, "new")}
    blocks = {".".join(layer.split(".")[:2]) for layer in layers}
    assert blocks == {
        f"{kind}.{i}"
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for i in range(len(getattr(editor.pipe.transformer, kind, [])))
    }
    assert {layer.split("attn.")[1] for layer in layers} >= {
        target.split("attn.")[1] for target in sample.LORA_TARGETS
    }
    if name.startswith("Flux2"):
        assert layers >= {
            f"single_transformer_blocks.0.attn.{layer}" for layer in ("to_qkv_mlp_proj", "to_out")
        }


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
    assert f"{name} is not in FAMILIES" in said and "assumed: one source picture" in said
    assert pixels(draw(editor, guidance=1.0).images) == pixels(known.images)
    sample.add_policies(editor, rank=4, alpha=8)
    assert editor.family.rollout == (None if name == KONTEXT else 1.0)


def test_a_size_that_the_pipeline_does_not_keep_is_not_passed_over_in_silence(load, capsys):
    sample.note.cache_clear()
    editor = load(QWEN)
    editor.family = sample.replace(editor.family, sizes="")
    monkey = sys.modules[type(editor.pipe).__module__]
    own = monkey.calculate_dimensions
    try:
        monkey.calculate_dimensions = lambda area, ratio: (32, 32, None)
        draw(editor, K=1, steps=1)
    finally:
        monkey.calculate_dimensions = own
    assert "does not keep the size of its pictures" in capsys.readouterr().err


def test_guidance_that_shares_a_batch_with_the_edits_is_refused(load, monkeypatch):
    editor = load(KONTEXT)
    forward = editor.pipe.transformer.forward

    def doubled(**kwargs):
        return (forward(**kwargs)[0][:3],)

    editor.pipe.transformer.forward = doubled
    hook = lambda module, args, kwargs: (
        args,
        {
            key: torch.cat([value] * 2) if sample.has_batch(key, value) else value  # noqa: E731
            for key, value in kwargs.items()
        },
    )
    editor.pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(
        BadInput, match="runs its guidance in one batch with the edits; give a guidance of 1"
    ):
        draw(editor)


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", EDITORS)
def test_a_prompt_longer_than_the_encoder_takes_is_reported_or_taken_whole(load, capsys, name):
    sample.note.cache_clear()
    editor = load(name)
    fits = draw(editor, K=1, steps=1)
    assert "more than the" not in capsys.readouterr().err
    long = " ".join([PROMPT] * 30)
    if name == LONGCAT:
        for text in (long, 'add "' + 45 * "a" + '"'):  # it reads quoted text by the letter
            with pytest.raises(
                BadInput,
                match=r"more than the 40 tokens that LongCatImageEditPipeline takes: .*shorten it",
            ):
                draw(editor, K=1, steps=1, prompt=text)
        return
    whole = draw(editor, K=1, steps=1, prompt=long)
    text = [group.cond["encoder_hidden_states"].shape[1] for group in (fits, whole)]
    if name.startswith("Qwen"):
        assert text[1] - text[0] == 29 * 5 and "more than the" not in capsys.readouterr().err
    else:
        assert (
            f"more than the {editor.max_text} tokens" in capsys.readouterr().err
            and text == [editor.max_text] * 2
        )


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
    settings = (
        dict(
            base=base,
            data=rows,
            out=out,
            resolution=SIZE,
            epochs=2,
            groups=2,
            group_size=3,
            rollout_steps=2,
            train_timesteps=1,
            train_steps_from=2,
            eval_steps=2,
            eval_every=2,
            save_every=2,
            lr=1e-2,
            ema_decay=0.0,
            filter="none",
            score_noise=1e-6,
            lora_rank=4,
            lora_alpha=8,
            train_batch=4,
        )
        | changes
    )
    train_nft.main([word for key, value in settings.items() for word in (f"--{key}", str(value))])


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
    parts = {
        name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)
    }
    return {
        f"{part}.{key.replace('.base_layer', '')}": value
        for part, module in parts.items()
        for key, value in module.state_dict().items()
        if ".lora_" not in key
    }


def plain_pipeline(folder):
    """Diffusers alone; where torchvision is missing it needs the processors, and only them, from us."""
    parts, late = {}, {}
    for name, kind in json.loads((folder / "model_index.json").read_text()).items():
        if kind == ["transformers", "Qwen2_5_VLProcessor"]:
            parts[name] = load_processor(Qwen2_5_VLProcessor, folder / name)
        if kind == ["transformers", "PixtralProcessor"]:
            parts[name], late[name] = None, sample.AutoTokenizer.from_pretrained(folder / name)
    pipe = DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.register_modules(**late)
    return pipe


def plain_load_lora(pipe, folder):
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(folder)
    else:  # LongCat's pipeline has no LoRA loader; its transformer has
        pipe.transformer.load_lora_adapter(
            folder, prefix="transformer", weight_name=sample.LORA_FILE
        )


@pytest.mark.parametrize("name", EDITORS)
def test_two_epochs_move_the_lora_and_nothing_else_and_diffusers_alone_draws_the_same(
    editor_folder, rows, tmp_path, watched, name
):
    out, folder = tmp_path / "out", editor_folder(name)
    train(folder, rows, out)
    (editor,) = watched
    pipe = plain_pipeline(folder)
    before, after = frozen(pipe), frozen(editor.pipe)
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    for key, weight in load_file(out / "checkpoint-2" / sample.LORA_FILE).items():
        unread = name.startswith("Qwen") and (
            ".1.attn.add_q" in key or ".1.attn.to_add_out" in key
        )  # its last text tokens
        assert "lora_A" in key or unread or weight.abs().max() > 1e-4, f"{key} did not move"

    editor.pipe.scheduler.solver_order = 1  # diffusers' own solver
    ours = draw(editor, guidance=1.0)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    listening = sample.Editor(pipe, editor.family, SIZE, editor.max_text)
    taken = sample.inspect.signature(pipe.__call__).parameters
    wanted = {
        "height": SIZE,
        "width": SIZE,
        "max_area": SIZE**2,
        "_auto_resize": False,
        "guidance_scale": 1.0,
        "true_cfg_scale": 1.0,
        "max_sequence_length": editor.max_text,
    }
    if name.startswith("Qwen"):
        del wanted["guidance_scale"]
    pipe.tokenizer_max_length = editor.pipe.tokenizer_max_length

    def plain():
        with sample.sources_keep_their_size(
            listening, [picture()]
        ):  # LongCat and Qwen: no other way below a megapixel
            return pipe(
                image=picture(),
                prompt=PROMPT,
                num_images_per_prompt=3,
                num_inference_steps=2,
                generator=[seeded("noise", j) for j in range(3)],
                **{key: value for key, value in wanted.items() if key in taken},
            ).images

    untrained = pixels(plain())
    plain_load_lora(pipe, out / "checkpoint-2")
    assert pixels(plain()) == pixels(ours.images) != untrained


@pytest.mark.parametrize(
    "name, given, wanted",
    [
        (QWEN, {}, {(1, 1.0), (2, 1.0), (3, 4.0)}),
        (QWEN, {"guidance": 2, "eval_guidance": 1}, {(1, 2.0), (2, 2.0), (3, 1.0)}),
        (KONTEXT, {}, {(1, 2.5), (2, 2.5), (3, 3.5)}),
    ],
)
def test_training_takes_the_familys_guidance_in_rollouts_and_in_evaluation(
    editor_folder, rows, tmp_path, watched, monkeypatch, name, given, wanted
):
    seen, call = set(), sample._call_pipeline
    monkeypatch.setattr(sample, "_call_pipeline", lambda *args: seen.add(args[4:]) or call(*args))
    train(
        editor_folder(name), rows, tmp_path / "out", epochs=1, eval_every=5, eval_steps=3, **given
    )
    assert (
        seen == wanted
    )  # steps and guidance: 1 in the check at the start, 2 in rollouts, 3 in evaluation


@pytest.mark.parametrize("name", [PLUS, KLEIN])
def test_rows_of_several_pictures_and_other_shapes_train(
    editor_folder, rows, tmp_path, watched, name
):
    folder = tmp_path / "rows"
    folder.mkdir()
    for key, size in (("a", (120, 80)), ("b", (80, 130))):
        picture(key, *size).save(folder / f"{key}.png")
    lines = [
        {"prompt": PROMPT, "image": image}
        for image in ("a.png", ["b.png", "a.png"], ["a.png", "b.png"])
    ]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train(editor_folder(name), folder, tmp_path / "out", groups=3, resolution=96)
    records = [
        json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    ]
    assert [record["groups kept"] for record in records] == [1, 1] and records[0]["grad norm"] > 0


# ---------------------------------------------------------------- released LoRAs


def released(editor, folder, name="new", prefix="base_model.model.", **changes):
    """Writes an adapter as PEFT does: the format of the LoRAs that were released with the method."""
    folder.mkdir()
    weights = {
        prefix + key: value.detach().contiguous()
        for key, value in sample.lora_parameters(editor, name).items()
    }
    save_file(weights, folder / "adapter_model.safetensors")
    config = editor.pipe.transformer.peft_config[name].to_dict() | changes
    (folder / "adapter_config.json").write_text(
        json.dumps(config, default=lambda value: sorted(value))
    )
    return folder


@pytest.mark.parametrize("name", [KONTEXT, PLUS])
def test_a_released_lora_in_pefts_format_draws_what_its_own_policy_draws(
    load, editor_folder, tmp_path, name
):
    editor = shaken(load(name))
    folder = released(editor, tmp_path / "released")
    picture().save(tmp_path / "in.png")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sample, "picture_grid", lambda rows, *args: seen.extend(rows[0][1:]) or picture()
        )
        sample.main(
            [
                "--image",
                str(tmp_path / "in.png"),
                "--prompt",
                PROMPT,
                "--base",
                str(editor_folder(name)),
                "--lora",
                str(folder),
                "--num",
                "2",
                "--steps",
                "2",
                "--resolution",
                str(SIZE),
                "--out",
                str(tmp_path / "out.png"),
            ]
        )
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
    train(
        editor_folder(name),
        rows,
        tmp_path / "out",
        start_lora=folder,
        lora_rank=16,
        epochs=1,
        lr=1e-9,
        eval_every=2,
    )
    (editor,) = watched
    wanted = sample.lora_parameters(start, "new")
    for policy in ("new", "old"):
        for key, weight in sample.lora_parameters(editor, policy).items():
            assert torch.allclose(weight, wanted[key], atol=1e-6), (policy, key)
    assert editor.pipe.transformer.peft_config["new"].lora_alpha == 8
    bare = load(name)
    group = draw(bare)
    arguments = group.x_0, group.sigmas[:1].expand(3), group.cond
    with sample.policy(editor, "base"):
        assert torch.equal(sample.velocity(editor, *arguments), sample.velocity(bare, *arguments))
    with sample.policy(editor, "old"):
        assert torch.allclose(
            sample.velocity(editor, *arguments), sample.velocity(start, *arguments), atol=1e-5
        )


def test_alpha_comes_from_the_lora_also_with_rank_stabilised_scaling(load, tmp_path):
    editor = shaken(load(KONTEXT))
    for changes, scaling in (
        ({"lora_alpha": 2}, 0.5),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
    ):
        again = load(KONTEXT)
        sample.add_policies(again, start=released(editor, tmp_path / str(scaling), **changes))
        assert {
            layer.scaling[policy] for layer in again.lora_layers for policy in ("new", "old")
        } == {scaling}


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
    passed, pipe = [], plain_pipeline(editor_folder(name))
    monkeypatch.setattr(sample, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(
        DiffusionPipeline, "from_pretrained", lambda base, **kwargs: passed.append(kwargs) or pipe
    )
    assert sample.load_pipeline(
        str(editor_folder(name)), torch.float32, False
    ) is pipe and passed == [{"dtype": torch.float32, "trust_remote_code": False}]


def test_a_processor_that_cannot_be_had_without_torchvision_is_one_clear_line(
    editor_folder, tmp_path
):
    folder = tmp_path / "editor"
    folder.mkdir()
    for part in editor_folder(QWEN).iterdir():
        (folder / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text()) | {
        "processor": ["transformers", "Qwen3VLProcessor"]
    }
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps(index))
    if sample.is_torchvision_available():
        pytest.skip("torchvision is installed")
    with pytest.raises(BadInput, match="; pip install torchvision") as error:
        sample.load_editor(folder)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- bad input


def test_a_lora_for_another_family_is_refused_in_one_line(load, tmp_path):
    released(shaken(load(KONTEXT)), tmp_path / "kontext")
    for name, said in (
        (
            QWEN,
            "kontext: a LoRA for another model: QwenImageTransformer2DModel has no layer single_transformer",
        ),
        (
            FLUX2,
            "kontext: a LoRA for another model: Flux2Transformer2DModel has no layer single_transformer",
        ),
    ):
        with pytest.raises(BadInput, match=said) as error:
            sample.add_policies(load(name), start=tmp_path / "kontext")
        assert "\n" not in str(error.value)
    wider = {
        f"base_model.model.{key}": torch.zeros(value.shape[0], 2 * value.shape[1])
        for key, value in sample.read_lora(tmp_path / "kontext").weights.items()
    }
    save_file(wider, tmp_path / "kontext" / "adapter_model.safetensors")
    with pytest.raises(
        BadInput, match="its layers or rank are not those of this FluxTransformer2DModel"
    ):
        sample.add_policies(load(KONTEXT), start=tmp_path / "kontext")


@pytest.mark.parametrize("name", [QWEN, KLEIN, LONGCAT])
def test_a_resolution_that_the_vae_cannot_take_is_refused_in_one_line(load, name):
    with pytest.raises(
        BadInput, match="resolution 100: .* takes multiples of 8.*; take 96|take 104"
    ) as error:
        load(name, resolution=100)
    assert "\n" not in str(error.value)


def test_a_text_to_image_model_is_refused_in_one_line(editor_folder, tmp_path):
    from diffusers import QwenImagePipeline

    parts = plain_pipeline(editor_folder(QWEN)).components
    QwenImagePipeline(
        **{key: part for key, part in parts.items() if key != "processor"}
    ).save_pretrained(tmp_path / "t2i")
    with pytest.raises(BadInput, match="t2i: QwenImagePipeline edits no pictures; name an editor"):
        sample.load_editor(tmp_path / "t2i")


def test_a_picture_that_the_pipeline_refuses_is_one_line(load):
    with pytest.raises(BadInput, match="Flux2KleinPipeline refuses a row: Image too small"):
        draw(load(KLEIN), images=[picture("thin", 640, 64)])
