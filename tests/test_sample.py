"""The editor: solver, rollout, velocity, policies, LoRA files, the command. On a tiny random FLUX-Kontext."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

import sample
from data_prep import BadInput, seeded

PROMPT = "make the red circle blue"


@pytest.fixture
def editor(kontext_folder):
    return sample.load_editor(kontext_folder)


@pytest.fixture
def lora_editor(editor):
    """With policies that differ from the base and from each other."""
    sample.add_policies(editor, rank=4, alpha=8)
    for name in ("new", "old"):
        for key, parameter in sample.lora_parameters(editor, name).items():
            with torch.no_grad():
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=seeded("test", name, key))
                )
    return editor


def picture(key="source", width=32, height=32):
    pixels = torch.randint(
        0, 256, (height, width, 3), generator=seeded("test", key), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())


def draw(editor, K=3, steps=3, source="source", **kwargs):
    return sample.rollout(
        editor, [picture(source)], PROMPT, [seeded("noise", j) for j in range(K)], steps, **kwargs
    )


def predict(editor, group):
    x_t = torch.randn(group.x_0.shape, generator=seeded("x_t"))
    return sample.velocity(editor, x_t, group.sigmas[1].expand(len(x_t)), group.cond)


def listen(editor):
    """What the pipeline gives the transformer and gets back, call by call."""
    calls = []
    editor.pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    return calls


# ---------------------------------------------------------------- the solver

MEAN, DEVIATION = 0.5, 0.5  # of gaussian data, whose flow is known


def gaussian_scale(t):
    return ((1 - t) ** 2 * DEVIATION**2 + t**2) ** 0.5


def exact_x(x_1, t):
    return (1 - t) * MEAN + gaussian_scale(t) * x_1


def exact_velocity(x, t):
    slope = (t - (1 - t) * DEVIATION**2) / gaussian_scale(t)
    return -MEAN + slope * (x - (1 - t) * MEAN) / gaussian_scale(t)


def solve(steps, order, mu=0.5, cls=sample.FlowDPMSolverMultistepScheduler):
    """Root mean square error at t = 0, from t = 1, on Kontext's shifted schedule."""
    scheduler = cls(use_dynamic_shifting=True)
    scheduler.solver_order = order
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    x_1 = torch.linspace(-2, 2, 41)
    x = x_1
    for timestep, t in zip(scheduler.timesteps, scheduler.sigmas.tolist()):
        x = scheduler.step(exact_velocity(x, t), timestep, x, return_dict=False)[0]
    return (x - exact_x(x_1, 0.0)).square().mean().sqrt().item()


def error_of_one_step(before, t, after):
    """Error of the step t -> after when the step before -> t and x at t were exact."""
    scheduler = sample.FlowDPMSolverMultistepScheduler()
    scheduler.set_timesteps(sigmas=[before, t] + [after] * (after > 0))
    x_1 = torch.linspace(-2, 2, 41)
    for sigma, timestep in zip((before, t), scheduler.timesteps):
        x = exact_x(x_1, sigma)
        x = scheduler.step(exact_velocity(x, sigma), timestep, x).prev_sample
    return (x - exact_x(x_1, after)).square().mean().sqrt().item()


def test_error_falls_fourfold_when_steps_double_from_t_1_to_t_0():
    errors = [solve(steps, order=2, mu=0.0) for steps in (12, 24, 48)]
    assert all(3.5 < a / b < 5 for a, b in zip(errors, errors[1:])), errors


def test_six_second_order_steps_are_at_least_three_times_as_exact_as_six_euler_steps():
    assert solve(6, order=2) < solve(6, order=1) / 3


@pytest.mark.parametrize("end", ["second step, next to t = 1", "last step, next to t = 0"])
def test_local_error_falls_eightfold_when_the_step_halves_at_the(end):
    step = {"s": lambda h: (1.0, 1 - h, 1 - 2 * h), "l": lambda h: (2 * h, h, 0.0)}[end[0]]
    errors = [error_of_one_step(*step(h)) for h in (0.08, 0.04, 0.02)]
    assert all(6.5 < a / b < 9.5 for a, b in zip(errors, errors[1:])), errors


def test_order_one_equals_euler_exactly():
    assert solve(6, order=1) == solve(6, order=1, cls=FlowMatchEulerDiscreteScheduler)


def test_a_second_rollout_does_not_see_the_first_ones_velocity(editor):
    assert torch.equal(draw(editor).x_0, draw(editor).x_0)


def test_step_returns_the_models_dtype_and_keeps_float32_inside():
    scheduler = sample.FlowDPMSolverMultistepScheduler()
    scheduler.set_timesteps(3)
    x = scheduler.step(
        torch.ones(1, 4, dtype=torch.bfloat16), scheduler.timesteps[0], torch.ones(1, 4).bfloat16()
    )
    assert x.prev_sample.dtype == torch.bfloat16 and scheduler._last_v.dtype == torch.float32


# ---------------------------------------------------------------- rollout and velocity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["new", "base"])
def test_velocity_equals_the_pipelines_own_prediction_at_every_step(kontext_folder, dtype, name):
    editor = sample.load_editor(kontext_folder, dtype=dtype)
    sample.add_policies(editor, rank=4, alpha=8)
    for parameter in sample.lora_parameters(editor, "new").values():
        parameter.data.add_(0.1)
    calls = listen(editor)
    with sample.policy(editor, name):
        group = draw(editor, steps=6)
        seen, N = list(calls), group.x_0.shape[1]
        assert len(seen) == 6
        for t, (arguments, output) in zip(group.sigmas, seen):
            x_t = arguments["hidden_states"][:, :N].float()
            with torch.no_grad():
                v = sample.velocity(editor, x_t, t.expand(3), group.cond)
            assert v.dtype == torch.float32 and torch.equal(v, output[:, :N].float())


def test_the_velocity_of_part_of_a_group_is_the_same_to_rounding(editor):
    group = draw(editor, K=3)
    x_t, t = torch.randn(group.x_0.shape, generator=seeded("x_t")), group.sigmas[1].expand(3)
    whole = sample.velocity(editor, x_t, t, group.cond)
    torch.testing.assert_close(sample.velocity(editor, x_t[1:2], t[1:2], group.cond), whole[1:2])


def test_a_time_that_the_model_cannot_be_told_is_refused(kontext_folder):
    editor = sample.load_editor(kontext_folder, dtype=torch.bfloat16)
    group = draw(editor)
    assert torch.equal(group.sigmas, group.sigmas.bfloat16().float())
    with pytest.raises(AssertionError, match="can be told"):
        sample.velocity(editor, group.x_0, torch.full((3,), 0.7004), group.cond)


def test_x_0_is_what_the_pictures_were_decoded_from(editor):
    group, pipe = draw(editor), editor.pipe
    latents = pipe._unpack_latents(group.x_0, 32, 32, pipe.vae_scale_factor)
    with torch.no_grad():
        decoded = pipe.vae.decode(
            latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        ).sample
    assert [i.tobytes() for i in pipe.image_processor.postprocess(decoded)] == [
        i.tobytes() for i in group.images
    ]


@pytest.mark.parametrize("K", [3, 12])  # 12 is also the number of text tokens, so ids look batched
def test_a_groups_conditioning_is_stored_once(editor, K):
    cond = draw(editor, K=K, steps=1).cond
    shapes = {
        name: tuple(value.shape) for name, value in cond.items() if isinstance(value, torch.Tensor)
    }
    assert shapes == {
        "hidden_states": (1, 16, 32),
        "encoder_hidden_states": (1, 12, 32),
        "guidance": (1,),
        "pooled_projections": (1, 32),
        "txt_ids": (12, 3),
        "img_ids": (32, 3),
    }
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        assert cond[name].untyped_storage().nbytes() == cond[name].nbytes, (
            f"{name} keeps all copies in memory"
        )


def test_text_and_source_are_encoded_once_a_group_and_not_once_a_copy(editor):
    rows = []
    for module in (editor.pipe.text_encoder, editor.pipe.text_encoder_2, editor.pipe.vae.encoder):
        module.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    draw(editor, K=4)
    assert rows == [1, 1, 1]


def test_noise_does_not_depend_on_how_a_group_is_split(editor):
    calls = listen(editor)
    whole = draw(editor, K=5, steps=2)
    split = draw(editor, K=5, steps=2, rollout_batch=2)
    first = [arguments["hidden_states"] for arguments, _ in calls]
    assert [len(x) for x in first] == [5, 5, 2, 2, 2, 2, 1, 1]
    assert torch.equal(first[0], torch.cat([first[2], first[4], first[6]]))
    torch.testing.assert_close(split.x_0, whole.x_0)
    assert len(split.images) == 5


def test_copies_differ_and_one_copy_alone_is_a_group(editor):
    group = draw(editor, K=2)
    assert not torch.allclose(group.x_0[0], group.x_0[1])
    torch.testing.assert_close(draw(editor, K=1).x_0, group.x_0[:1])


def test_another_source_picture_changes_the_prediction(editor):
    one, other = (predict(editor, draw(editor, source=source)) for source in ("source", "another"))
    assert (one - other).abs().max() > 1e-3


def test_an_editor_that_never_sees_the_source_is_refused(editor, monkeypatch):
    prepare = editor.pipe.prepare_latents
    monkeypatch.setattr(editor.pipe, "prepare_latents", lambda image, *args: prepare(None, *args))
    with pytest.raises(BadInput, match="does not see the source"):
        draw(editor)


def test_guidance_reaches_the_model(editor):
    assert draw(editor, guidance=2.5).cond["guidance"].tolist() == [2.5]


@pytest.mark.parametrize(
    "size, worked", [((32, 32), (32, 32)), ((640, 480), (40, 24)), ((300, 600), (24, 48))]
)
def test_pictures_keep_their_aspect_ratio_at_the_working_resolution(editor, size, worked):
    group = sample.rollout(editor, [picture("wide", *size)], PROMPT, [seeded(0)], steps=1)
    assert group.images[0].size == worked
    assert group.cond["hidden_states"].shape[1] == worked[0] * worked[1] // 64  # the source too


# ---------------------------------------------------------------- policies


def test_new_old_and_base_are_equal_at_the_start(editor):
    group = draw(editor)
    bare = predict(editor, group)
    sample.add_policies(editor, rank=4, alpha=8)
    for name in ("new", "old", "base"):
        with sample.policy(editor, name):
            assert torch.equal(predict(editor, group), bare)
    new, old = (sample.lora_parameters(editor, name) for name in ("new", "old"))
    assert list(new) == list(old) == sorted(new) and all(
        torch.equal(new[key], old[key]) for key in new
    )


def test_lora_is_float32_gaussian_and_seeded_and_leaves_the_global_generator_alone(kontext_folder):
    drawn = []
    for seed in (0, 0, 1):
        editor = sample.load_editor(kontext_folder, dtype=torch.bfloat16)
        torch.manual_seed(len(drawn))
        state = torch.get_rng_state()
        sample.add_policies(editor, rank=16, alpha=8, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        new = sample.lora_parameters(editor, "new")
        assert {p.dtype for p in new.values()} == {torch.float32}
        drawn.append(torch.cat([p.detach().flatten() for key, p in new.items() if "lora_A" in key]))
        assert all(p.eq(0).all() for key, p in new.items() if "lora_B" in key)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert math.isclose(drawn[0].std().item(), 1 / 16, rel_tol=0.05)


def test_lora_that_binds_to_no_module_is_refused(editor):
    with pytest.raises(BadInput, match="match no module"):
        sample.add_policies(editor, rank=4, alpha=8, targets=["self_attn.qkv"])


def test_policies_differ_and_base_is_the_base(lora_editor, kontext_folder):
    group = draw(lora_editor)
    seen = {}
    for name in ("new", "old", "base"):
        with sample.policy(lora_editor, name):
            seen[name] = predict(lora_editor, group)
    assert not torch.allclose(seen["new"], seen["old"]) and not torch.allclose(
        seen["new"], seen["base"]
    )
    assert torch.equal(seen["base"], predict(sample.load_editor(kontext_folder), group))
    assert torch.equal(predict(lora_editor, group), seen["new"])  # the policy outside


def test_policy_keeps_requires_grad_and_is_left_by_an_exception(lora_editor):
    def flags():
        return {
            name: p.requires_grad for name, p in lora_editor.pipe.transformer.named_parameters()
        }

    before, group = flags(), draw(lora_editor)
    outside = predict(lora_editor, group)
    assert all(flag == (".new." in name) for name, flag in before.items())
    for name in ("base", "old", "new"):
        with (
            pytest.raises(KeyError),
            sample.policy(lora_editor, "old"),
            sample.policy(lora_editor, name),
        ):
            assert flags() == before
            raise KeyError
        assert flags() == before and torch.equal(predict(lora_editor, group), outside)


def test_only_new_gets_a_gradient(lora_editor):
    predict(lora_editor, draw(lora_editor)).square().sum().backward()
    got = {
        name
        for name, p in lora_editor.pipe.transformer.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert got and all(".new." in name for name in got)
    with sample.policy(lora_editor, "old"):
        assert not predict(lora_editor, draw(lora_editor)).requires_grad


def test_soft_update_is_the_weighted_mean_in_place_and_aliases_nothing(lora_editor):
    new, old = (sample.lora_parameters(lora_editor, name) for name in ("new", "old"))
    wanted = {key: 0.3 * old[key].detach() + 0.7 * new[key].detach() for key in new}
    kept = {key: new[key].detach().clone() for key in new}
    sample.soft_update(lora_editor, 0.3)
    for key, parameter in sample.lora_parameters(lora_editor, "old").items():
        assert parameter is old[key]
        torch.testing.assert_close(parameter.detach(), wanted[key])
    sample.soft_update(lora_editor, 0.0)
    for key in new:
        assert torch.equal(old[key], kept[key])
        new[key].data.add_(1)
        assert torch.equal(old[key], kept[key]), "old shares memory with new"


# ---------------------------------------------------------------- LoRA files


def test_diffusers_alone_loads_our_lora_and_draws_the_same_picture(
    kontext_folder, lora_editor, tmp_path
):
    lora_editor.pipe.scheduler.solver_order = 1  # diffusers' own solver
    sample.save_lora(lora_editor, tmp_path)
    ours = draw(lora_editor, K=2, guidance=2.5).images
    pipe = DiffusionPipeline.from_pretrained(kontext_folder)

    def plain():
        return pipe(
            image=picture(),
            prompt=PROMPT,
            height=32,
            width=32,
            max_area=32 * 32,
            _auto_resize=False,
            num_images_per_prompt=2,
            generator=[seeded("noise", j) for j in range(2)],
            num_inference_steps=3,
            guidance_scale=2.5,
            max_sequence_length=12,
        ).images

    base = plain()
    pipe.load_lora_weights(tmp_path)
    assert (
        [i.tobytes() for i in plain()] == [i.tobytes() for i in ours] != [i.tobytes() for i in base]
    )


def test_load_lora_gives_back_the_saved_bits_into_either_policy(
    lora_editor, kontext_folder, tmp_path
):
    for name in ("new", "old"):
        sample.save_lora(lora_editor, tmp_path / name, name)
    again = sample.load_editor(kontext_folder)
    sample.add_policies(again, rank=4, alpha=8, seed=1)
    for name in ("new", "old"):
        sample.load_lora(again, tmp_path / name, name)
        saved, loaded = (
            sample.lora_parameters(lora_editor, name),
            sample.lora_parameters(again, name),
        )
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)
        assert all(p.requires_grad == (name == "new") for p in loaded.values())


@pytest.mark.parametrize(
    "rank, alpha, complaint", [(8, 8, "layers or rank"), (4, 4, "alpha 8, not 4")]
)
def test_load_lora_refuses_another_rank_or_alpha(
    lora_editor, kontext_folder, tmp_path, rank, alpha, complaint
):
    sample.save_lora(lora_editor, tmp_path)
    again = sample.load_editor(kontext_folder)
    sample.add_policies(again, rank, alpha)
    with pytest.raises(BadInput, match=complaint):
        sample.load_lora(again, tmp_path, "new")


# ---------------------------------------------------------------- the command


def test_the_command_draws_base_and_trained_side_by_side(
    lora_editor, kontext_folder, tmp_path, capsys
):
    sample.save_lora(lora_editor, tmp_path / "run")
    picture().save(tmp_path / "in.png")
    sample.main(
        [
            "--image",
            str(tmp_path / "in.png"),
            "--prompt",
            PROMPT,
            "--base",
            str(kontext_folder),
            "--lora",
            str(tmp_path / "run"),
            "--compare",
            "--num",
            "2",
            "--steps",
            "2",
            "--out",
            str(tmp_path / "out.png"),
        ]
    )
    grid = Image.open(tmp_path / "out.png")
    assert "wrote" in capsys.readouterr().out
    top, bottom = places(grid, picture(), column=0)
    for name, row in (("base", top), ("new", bottom)):
        generators = [torch.Generator().manual_seed(seed) for seed in (42, 43)]
        with sample.policy(lora_editor, name):
            edits = sample.rollout(
                lora_editor, [picture()], PROMPT, generators, steps=2, evaluation=True
            ).images
        assert [places(grid, edit, column) for column, edit in enumerate(edits, 1)] == [
            [row],
            [row],
        ]


def places(grid, image, column):
    """The heights at which an enlarged picture stands in a column of 96-pixel cells."""
    wanted, x = image.resize((96, 96), Image.Resampling.NEAREST).tobytes(), 4 + 100 * column
    return [
        y for y in range(grid.height - 95) if grid.crop((x, y, x + 96, y + 96)).tobytes() == wanted
    ]


def complaint(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        sample.run_script(lambda: sample.main([str(word) for word in argv]))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    return (
        error[-1] if error[-1].startswith(("error: ", "usage", Path(sys.argv[0]).name)) else error
    )


def test_bad_input_is_one_line_that_names_the_thing_and_the_mend(
    kontext_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "empty").mkdir()
    FluxPipeline(**DiffusionPipeline.from_pretrained(kontext_folder).components).save_pretrained(
        "t2i"
    )
    good = ["--image", "in.png", "--prompt", PROMPT]
    for said, argv in {
        "run python data_prep.py toy first": good,
        "name a whole model folder": [*good, "--base", "no/such/folder"],
        "empty: not a diffusers model": [*good, "--base", "empty"],
        "t2i: FluxPipeline edits no pictures": [*good, "--base", "t2i"],
        "resolution 100": [*good, "--base", kontext_folder, "--resolution", 100],
        "gone.png: no such picture": ["--image", "gone.png", "--prompt", PROMPT],
        "broken.png: not a readable picture": ["--image", "broken.png", "--prompt", PROMPT],
        "--image is missing": ["--prompt", PROMPT],
        "--prompt is empty": ["--image", "in.png"],
        "add --lora": [*good, "--compare"],
        "give a number at least 1": [*good, "--num", 0],
        "end it in .png": [*good, "--out", "out"],
        "2 pictures": [*good, "--image", "in.png", "in.png", "--base", kontext_folder],
        "empty: not a LoRA": [*good, "--base", kontext_folder, "--lora", "empty"],
        "--colour": [*good, "--colour", "red"],
    }.items():
        assert said in complaint(capsys, *argv)


def test_importing_does_nothing(tmp_path):
    code = "import torch; s = torch.get_rng_state(); import sample; assert s.equal(torch.get_rng_state())"
    env = {
        "PYTHONPATH": str(Path(sample.__file__).parent),
        "HOME": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-such-setting"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not [p for p in tmp_path.rglob("*") if p.is_file()]
