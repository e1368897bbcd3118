"""The editor, on a tiny random FLUX-Kontext: solver, rollout, policies, files, the command."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import lora_layers, tiny_kontext
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

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
    shake(editor, "new")
    shake(editor, "old")
    return editor


def picture(key="source", width=32, height=32):
    pixels = torch.randint(
        0, 256, (height, width, 3), generator=seeded("test", key), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())


def pixels(images):
    return [image.tobytes() for image in images]


def shake(editor, name):
    """Moves a policy away from where it started."""
    for key, parameter in sample.lora_parameters(editor, name).items():
        noise = torch.randn(parameter.shape, generator=seeded("test", name, key))
        parameter.data += 0.1 * noise


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key


def layer_name(editor, wanted):
    """The name of one of the transformer's modules."""
    return next(name for name, module in editor.transformer.named_modules() if module is wanted)


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
X_1 = torch.linspace(-2, 2, 41)


def gaussian_scale(t):
    return ((1 - t) ** 2 * DEVIATION**2 + t**2) ** 0.5


def exact_x(x_1, t):
    return (1 - t) * MEAN + gaussian_scale(t) * x_1


def exact_velocity(x, t):
    slope = (t - (1 - t) * DEVIATION**2) / gaussian_scale(t)
    return -MEAN + slope * (x - (1 - t) * MEAN) / gaussian_scale(t)


def solve(
    steps, order, mu=0.5, velocity=exact_velocity, cls=sample.FlowDPMSolverMultistepScheduler
):
    """x at t = 0 from x_1 at t = 1, on the schedule of Kontext, Qwen and Flux.2 with shift mu."""
    scheduler = cls(use_dynamic_shifting=True)
    scheduler.solver_order = order
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    x = X_1
    times = scheduler.sigmas.tolist()[:-1]
    for timestep, t in zip(scheduler.timesteps, times, strict=True):
        x = scheduler.step(velocity(x, t), timestep, x, return_dict=False)[0]
    return x


def rms(x):
    return x.square().mean().sqrt().item()


def error(steps, order, mu=0.5):
    """Root mean square error at t = 0."""
    return rms(solve(steps, order, mu) - exact_x(X_1, 0.0))


def error_of_one_step(before, t, after):
    """Error of the step t -> after when the step before -> t and x at t were exact."""
    scheduler = sample.FlowDPMSolverMultistepScheduler()
    sigmas = [before, t, after] if after > 0 else [before, t]  # 0 is the scheduler's own last
    scheduler.set_timesteps(sigmas=sigmas)
    for sigma, timestep in zip((before, t), scheduler.timesteps, strict=False):
        x = exact_x(X_1, sigma)
        (x,) = scheduler.step(exact_velocity(x, sigma), timestep, x)
    return rms(x - exact_x(X_1, after))


def test_error_falls_fourfold_when_steps_double_from_t_1_to_t_0():
    errors = [error(steps, order=2, mu=0.0) for steps in (12, 24, 48)]
    assert 3.5 < errors[0] / errors[1] < 5
    assert 3.5 < errors[1] / errors[2] < 5


def test_six_second_order_steps_are_at_least_three_times_as_exact_as_six_euler_steps():
    assert error(6, order=2) < error(6, order=1) / 3


def test_local_error_falls_eightfold_when_the_step_halves_next_to_t_1():
    errors = [error_of_one_step(1.0, 1 - h, 1 - 2 * h) for h in (0.08, 0.04, 0.02)]
    assert 6.5 < errors[0] / errors[1] < 9.5
    assert 6.5 < errors[1] / errors[2] < 9.5


def test_local_error_falls_eightfold_when_the_step_halves_next_to_t_0():
    errors = [error_of_one_step(2 * h, h, 0.0) for h in (0.08, 0.04, 0.02)]
    assert 6.5 < errors[0] / errors[1] < 9.5
    assert 6.5 < errors[1] / errors[2] < 9.5


def test_order_one_equals_euler_exactly():
    euler = solve(6, order=1, cls=FlowMatchEulerDiscreteScheduler)
    assert torch.equal(solve(6, order=1), euler)


# ------------------------------ a last step much longer than the one before

CENTRES = torch.tensor([-1.0, 1.0])  # of two equally frequent gaussians
WIDTH = 0.05


def mixture_velocity(x, t):
    """E[noise - x_0 | x_t = x]: each gaussian's own, weighted by how likely x is its."""
    variance = (1 - t) ** 2 * WIDTH**2 + t**2
    off = x[:, None] - (1 - t) * CENTRES  # (points, 2)
    likely = (-(off**2) / (2 * variance)).softmax(1)
    return (likely * (off * (t - (1 - t) * WIDTH**2) / variance - CENTRES)).sum(1)


def test_the_capped_solver_beats_euler_where_the_last_step_is_much_longer(monkeypatch):
    """Shift 2 is FLUX.2's in 6 steps; uncapped, the correction overshoots where data are narrow."""
    exact = solve(2000, order=2, mu=2.0, velocity=mixture_velocity)

    def error_of(order):
        return rms(solve(6, order, mu=2.0, velocity=mixture_velocity) - exact)

    capped = error_of(2)
    assert capped < 0.75 * error_of(1)
    monkeypatch.setattr(sample, "MAX_RATIO", math.inf)
    assert capped < 0.9 * error_of(2)


def test_on_flux2s_schedule_its_own_steps_are_about_as_exact_as_kontexts_six():
    """On the mixture, at 512 x 512; six steps there err twice as much."""

    def error_of(steps, mu):
        exact = solve(2000, order=2, mu=mu, velocity=mixture_velocity)
        return rms(solve(steps, order=2, mu=mu, velocity=mixture_velocity) - exact)

    kontext = error_of(6, calculate_shift(1024))
    steps = sample.FAMILIES["Flux2KleinPipeline"].rollout_steps
    assert error_of(steps, compute_empirical_mu(1024, steps)) < 1.15 * kontext
    assert error_of(6, compute_empirical_mu(1024, 6)) > 2 * kontext


def last_ratio(mu):
    """How many times longer the last of six steps is than the one before."""
    scheduler = sample.FlowDPMSolverMultistepScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).tolist(), mu=mu)
    lengths = scheduler.sigmas.diff()
    return (lengths[1:] / lengths[:-1]).max().item()


@pytest.mark.parametrize("tokens", [16, 64, 1024])  # tests, toy, Kontext at 512 x 512
def test_the_cap_changes_no_bit_of_kontext_and_the_toy_in_six_steps(monkeypatch, tokens):
    mu = calculate_shift(tokens)
    capped = solve(6, order=2, mu=mu)
    monkeypatch.setattr(sample, "MAX_RATIO", math.inf)
    assert torch.equal(capped, solve(6, order=2, mu=mu))
    assert last_ratio(mu) < 1.3 < 3 < last_ratio(2.0)


def test_a_second_rollout_does_not_see_the_first_ones_velocity(editor):
    assert torch.equal(draw(editor).x_0, draw(editor).x_0)


def test_step_returns_the_models_dtype_and_keeps_float32_inside():
    scheduler = sample.FlowDPMSolverMultistepScheduler()
    scheduler.set_timesteps(3)
    ones = torch.ones(1, 4, dtype=torch.bfloat16)
    (x,) = scheduler.step(ones, scheduler.timesteps[0], ones)
    assert x.dtype == torch.bfloat16
    assert scheduler.last_v.dtype == torch.float32


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
        seen = list(calls)
        N = group.x_0.shape[1]
        for t, (arguments, output) in zip(group.sigmas, seen, strict=True):
            x_t = arguments["hidden_states"][:, :N].float()
            with torch.no_grad():
                v = sample.velocity(editor, x_t, t.expand(3), group.cond)
            assert v.dtype == torch.float32
            assert torch.equal(v, output[:, :N].float())


def test_the_velocity_of_part_of_a_group_is_the_same_to_rounding(editor):
    group = draw(editor, K=3)
    x_t = torch.randn(group.x_0.shape, generator=seeded("x_t"))
    t = group.sigmas[1].expand(3)
    whole = sample.velocity(editor, x_t, t, group.cond)
    torch.testing.assert_close(sample.velocity(editor, x_t[1:2], t[1:2], group.cond), whole[1:2])


@pytest.fixture
def bf16_editor(kontext_folder):
    return sample.load_editor(kontext_folder, dtype=torch.bfloat16)


def test_a_groups_times_are_those_that_the_model_can_be_told(bf16_editor):
    group = draw(bf16_editor)
    assert torch.equal(group.sigmas, group.sigmas.bfloat16().float())


@pytest.mark.parametrize("t", [0.7004, 1e-4, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_time_can_be_asked_of_a_bf16_base_which_hears_the_nearest_it_knows(
    bf16_editor, t, dtype
):
    group = draw(bf16_editor)
    t = torch.full((3,), t, dtype=dtype)
    heard = t.bfloat16().float()
    v = sample.velocity(bf16_editor, group.x_0, t, group.cond)
    assert torch.equal(v, sample.velocity(bf16_editor, group.x_0, heard, group.cond))
    assert (heard - t).abs().max() < 0.002


def test_x_0_is_what_the_pictures_were_decoded_from(editor):
    group = draw(editor)
    pipe = editor.pipe
    latents = pipe._unpack_latents(group.x_0, 32, 32, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        decoded = pipe.vae.decode(latents).sample
    assert pixels(pipe.image_processor.postprocess(decoded)) == pixels(group.images)


@pytest.mark.parametrize("K", [3, 12])  # 12 is also the number of text tokens, so ids look batched
def test_a_groups_conditioning_is_stored_once(editor, K):
    cond = draw(editor, K=K, steps=1).cond
    tensors = {name: value for name, value in cond.items() if isinstance(value, torch.Tensor)}
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "hidden_states": (1, 32, 32),
        "encoder_hidden_states": (1, 12, 32),
        "guidance": (1,),
        "pooled_projections": (1, 32),
        "txt_ids": (12, 3),
        "img_ids": (32, 3),
    }
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        kept = cond[name].untyped_storage().nbytes()
        assert kept == cond[name].nbytes, f"{name} keeps all copies in memory"


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
    one = predict(editor, draw(editor, source="source"))
    other = predict(editor, draw(editor, source="another"))
    assert (one - other).abs().max() > 1e-3


def test_an_editor_that_never_sees_the_source_is_refused(editor, monkeypatch):
    prepare = editor.pipe.prepare_latents
    monkeypatch.setattr(editor.pipe, "prepare_latents", lambda image, *args: prepare(None, *args))
    with pytest.raises(BadInput, match="does not see the source"):
        draw(editor)


def test_a_fault_within_the_transformer_is_not_taken_for_the_rows(editor):
    """With a sharded base the other ranks are then within that forward, too."""

    def fail(**kwargs):
        raise ValueError("wrong shapes")

    editor.transformer.forward = fail
    with pytest.raises(ValueError, match="^wrong shapes$"):
        draw(editor)


def test_guidance_reaches_the_model(editor):
    assert draw(editor, guidance=2.5).cond["guidance"].tolist() == [2.5]


@pytest.mark.parametrize(
    "size, worked", [((32, 32), (32, 32)), ((640, 480), (40, 24)), ((300, 600), (24, 48))]
)
def test_pictures_keep_their_aspect_ratio_at_the_working_resolution(editor, size, worked):
    group = sample.rollout(editor, [picture("wide", *size)], PROMPT, [seeded(0)], steps=1)
    assert group.images[0].size == worked
    tokens = worked[0] * worked[1] // 64
    assert group.x_0.shape[1] == tokens
    assert group.cond["hidden_states"].shape[1] == 2 * tokens  # the source too


# ---------------------------------------------------------------- policies


def test_new_old_and_base_are_equal_at_the_start(editor):
    group = draw(editor)
    bare = predict(editor, group)
    sample.add_policies(editor, rank=4, alpha=8)
    for name in ("new", "old", "base"):
        with sample.policy(editor, name):
            assert torch.equal(predict(editor, group), bare)
    new = sample.lora_parameters(editor, "new")
    old = sample.lora_parameters(editor, "old")
    assert list(new) == list(old) == sorted(new)
    assert all(torch.equal(new[key], old[key]) for key in new)


def test_lora_is_float32_gaussian_and_seeded(kontext_folder):
    drawn = []
    for seed in (0, 0, 1):
        editor = sample.load_editor(kontext_folder, dtype=torch.bfloat16)
        torch.manual_seed(len(drawn))
        sample.add_policies(editor, rank=16, alpha=8, seed=seed)
        new = sample.lora_parameters(editor, "new")
        assert {p.dtype for p in new.values()} == {torch.float32}
        drawn.append(torch.cat([p.detach().flatten() for key, p in new.items() if "lora_A" in key]))
        assert all(p.eq(0).all() for key, p in new.items() if "lora_B" in key)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
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
    assert not torch.allclose(seen["new"], seen["old"])
    assert not torch.allclose(seen["new"], seen["base"])
    assert torch.equal(seen["base"], predict(sample.load_editor(kontext_folder), group))
    assert torch.equal(predict(lora_editor, group), seen["new"])  # the policy outside


def test_after_a_policy_and_an_exception_only_new_asks_for_gradients(lora_editor):
    def flags():
        parameters = lora_editor.transformer.named_parameters()
        return {name: parameter.requires_grad for name, parameter in parameters}

    before = flags()
    group = draw(lora_editor)
    outside = predict(lora_editor, group)
    assert all(flag == (".new." in name) for name, flag in before.items())
    for name in ("base", "old", "new"):
        with (
            pytest.raises(KeyError),
            sample.policy(lora_editor, "old"),
            sample.policy(lora_editor, name),
        ):
            raise KeyError
        assert flags() == before
        assert torch.equal(predict(lora_editor, group), outside)


def test_a_policy_that_there_is_not_is_refused(lora_editor):
    with pytest.raises(AssertionError, match="no policy ema"), sample.policy(lora_editor, "ema"):
        pass


def test_base_within_old_is_the_base_and_after_it_old_again(lora_editor):
    group = draw(lora_editor)
    with sample.policy(lora_editor, "base"):
        base = predict(lora_editor, group)
    with sample.policy(lora_editor, "old"):
        old = predict(lora_editor, group)
        with sample.policy(lora_editor, "base"):
            assert torch.equal(predict(lora_editor, group), base)
        assert torch.equal(predict(lora_editor, group), old)


def test_only_new_gets_a_gradient(lora_editor):
    predict(lora_editor, draw(lora_editor)).square().sum().backward()
    got = []
    for name, parameter in lora_editor.transformer.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            got.append(name)
    assert got
    assert all(".new." in name for name in got)
    with sample.policy(lora_editor, "old"):
        assert not predict(lora_editor, draw(lora_editor)).requires_grad


def test_soft_update_is_the_weighted_mean_in_place_and_aliases_nothing(lora_editor):
    new = sample.lora_parameters(lora_editor, "new")
    old = sample.lora_parameters(lora_editor, "old")
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


# ---------------------------------------------------------------- LoRA in the base's dtype


@pytest.fixture
def bf16_lora_editor(bf16_editor):
    """A bf16 base with policies that differ from it."""
    sample.add_policies(bf16_editor, rank=4, alpha=8)
    shake(bf16_editor, "new")
    return bf16_editor


def as_peft_does(editor):
    """Makes peft cast every layer's input to the LoRA's float32, as it does if left alone."""
    for layer in lora_layers(editor):
        layer.cast_input_dtype_enabled = True
        for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
            matrix.__class__ = torch.nn.Linear


def prediction_and_gradients(editor, group):
    parameters = sample.lora_parameters(editor, "new")
    v = predict(editor, group)
    gradients = torch.autograd.grad(v.square().mean(), list(parameters.values()))
    return v, dict(zip(parameters, gradients, strict=True))


def test_a_lora_multiplied_in_bf16_agrees_with_pefts_float32_within_bf16s_rounding(
    bf16_lora_editor,
):
    group = draw(bf16_lora_editor)
    v, gradients = prediction_and_gradients(bf16_lora_editor, group)
    as_peft_does(bf16_lora_editor)
    wanted, wanted_gradients = prediction_and_gradients(bf16_lora_editor, group)
    assert (v - wanted).norm() < 0.02 * wanted.norm()
    for key, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted_gradients[key]).norm() < 0.1 * wanted_gradients[key].norm(), key


class Casts(TorchDispatchMode):
    """Counts the bytes that casts to another dtype write."""

    written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            self.written += result.nbytes
        return result


def test_a_lora_multiplied_in_bf16_casts_its_matrices_and_not_the_tokens(bf16_lora_editor):
    group = draw(bf16_lora_editor)

    def written(name):
        with torch.no_grad(), sample.policy(bf16_lora_editor, name), Casts() as casts:
            predict(bf16_lora_editor, group)
        return casts.written

    ours = written("new") - written("base")
    matrices = sample.lora_parameters(bf16_lora_editor, "new").values()
    assert ours == 2 * sum(matrix.numel() for matrix in matrices)  # in bf16, two bytes each
    as_peft_does(bf16_lora_editor)
    assert ours < 0.1 * (written("new") - written("base"))


def test_over_a_float32_base_a_lora_has_pefts_own_bits(lora_editor):
    group = draw(lora_editor)
    v, gradients = prediction_and_gradients(lora_editor, group)
    as_peft_does(lora_editor)
    wanted, wanted_gradients = prediction_and_gradients(lora_editor, group)
    assert torch.equal(v, wanted)
    assert_equal(gradients, wanted_gradients)


# ---------------------------------------------------------------- memory and speed


def blocks_of(editor):
    transformer = editor.transformer
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


# Of each attempt the parked modules, the pairs of a forward, and the forwards that are done again.
ATTEMPTS = [(0, 5, 0), (1, 5, 0), (1, 2, 0), (1, 1, 0), (1, 5, 1), (1, 5, 2)]
ATTEMPTS += [(1, 2, 2), (1, 1, 2)]  # pairs: smaller batches at last
CLASSES = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]


@pytest.mark.parametrize("failures", range(len(ATTEMPTS)))
def test_an_update_saves_as_little_memory_as_fits_and_the_gradient_stays(lora_editor, failures):
    """A block of each class; the trial after so many that failed has room."""
    group = draw(lora_editor)
    _, wanted = prediction_and_gradients(lora_editor, group)
    calls = []
    made = []
    for block in blocks_of(lora_editor):
        block.register_forward_pre_hook(lambda module, args: calls.append(module))

    def trial(pairs):
        calls.clear()
        _, gradients = prediction_and_gradients(lora_editor, group)
        assert_equal(gradients, wanted)
        made.append((len(lora_editor.idle), pairs, len(calls) - 2))
        if len(made) <= failures:
            raise torch.OutOfMemoryError

    idle = [lora_editor.pipe.vae]
    parked, pairs, again = ATTEMPTS[failures]
    lora_editor.idle = idle
    assert sample.fit_memory(lora_editor, 5, trial) == (pairs, CLASSES[:again])
    assert made == ATTEMPTS[: failures + 1]
    assert lora_editor.idle == idle[:parked]
    calls.clear()
    prediction_and_gradients(lora_editor, group)
    assert len(calls) == 2 + again


def test_a_base_that_no_saving_makes_room_for_is_refused_at_the_start(lora_editor):
    def trial(pairs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="no update fits"):
        sample.fit_memory(lora_editor, 5, trial)


def test_a_trial_that_fails_otherwise_is_not_taken_for_a_lack_of_memory(lora_editor):
    def trial(pairs):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sample.fit_memory(lora_editor, 5, trial)


def test_a_machine_that_cannot_compile_says_so_once_and_goes_on(lora_editor, monkeypatch, capsys):
    def refuse(function):
        raise RuntimeError("no C compiler\nat all")

    sample.note.cache_clear()
    monkeypatch.setattr(torch, "compile", refuse)
    before = predict(lora_editor, draw(lora_editor))
    sample.compile_blocks(lora_editor)
    sample.compile_blocks(lora_editor)
    said = capsys.readouterr().err
    assert said.count("nothing is compiled") == 1
    assert "no C compiler" in said
    assert torch.equal(predict(lora_editor, draw(lora_editor)), before)


def test_where_the_machine_compiles_each_block_is_compiled(lora_editor, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kw: compiled.append(module))
    sample.compile_blocks(lora_editor)
    assert compiled == blocks_of(lora_editor)


def test_every_part_is_frozen_and_in_eval_mode_however_the_pipeline_was_made(monkeypatch):
    pipe = tiny_kontext()
    for part in (pipe.text_encoder_2, pipe.transformer):
        part.train()
    monkeypatch.setattr(sample, "_load_pipeline", lambda *args: pipe)
    editor = sample.load_editor("x")
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.vae, editor.transformer):
        assert not any(module.training for module in part.modules())
        assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("on_gpu", [False, True])
def test_on_a_gpu_pictures_are_decoded_one_at_a_time(kontext_folder, monkeypatch, on_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    editor = sample.load_editor(kontext_folder)
    batches = []
    editor.pipe.vae.decoder.register_forward_pre_hook(
        lambda module, args: batches.append(len(args[0]))
    )
    assert len(draw(editor, K=3).images) == 3
    assert batches == ([1, 1, 1] if on_gpu else [3])


# ---------------------------------------------------------------- groups


def test_a_group_for_training_has_no_pictures_and_predicts_the_same(editor):
    group = draw(editor)
    lean = group.for_training()
    assert lean.images == []
    assert torch.equal(lean.x_0, group.x_0)
    assert torch.equal(predict(editor, lean), predict(editor, group))


def test_a_group_for_training_lies_on_the_cpu():
    moved = []

    class Far(torch.Tensor):
        def to(self, device, *args, **kwargs):
            moved.append(str(device))
            return self

        def cpu(self):
            return self.to("cpu")

    far = torch.zeros(1, 2).as_subclass(Far)
    cond = {"hidden_states": far, "img_shapes": [[(1, 4, 4)]]}
    lean = sample.Group([], far, cond, torch.zeros(1)).for_training()
    assert moved == ["cpu", "cpu"]
    assert lean.cond["img_shapes"] == [[(1, 4, 4)]]


# ---------------------------------------------------------------- LoRA files: what is written


def plain_edits(pipe):
    """Two edits by diffusers alone, as draw(editor, K=2, guidance=2.5) draws them in order 1."""
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


def merge(transformer, file):
    """Adds a LoRA to the weights as programs do that read tensors alone, ComfyUI for one.

    The strength is alpha / rank where the file holds `.alpha`, else 1.
    """
    tensors = load_file(file)
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            strength = tensors.get(f"{layer}.alpha", torch.tensor(len(down))).item() / len(down)
            up = tensors[f"{layer}.lora_B.weight"]
            weight = transformer.get_submodule(layer.removeprefix("transformer.")).weight
            weight.data += (strength * up.double() @ down.double()).to(weight.dtype)


@pytest.fixture(params=[8, 6])
def strong_editor(editor, request):
    """With a trained LoRA of strength 2, and 1.5, which float32 cannot undo."""
    sample.add_policies(editor, rank=4, alpha=request.param)
    shake(editor, "new")
    return editor


def test_diffusers_alone_loads_our_lora_and_draws_the_same_picture(
    kontext_folder, lora_editor, tmp_path
):
    lora_editor.pipe.scheduler.solver_order = 1  # diffusers' own solver
    sample.save_lora(lora_editor, tmp_path)
    pipe = DiffusionPipeline.from_pretrained(kontext_folder)
    base = pixels(plain_edits(pipe))
    pipe.load_lora_weights(tmp_path)
    edits = pixels(plain_edits(pipe))
    assert edits == pixels(draw(lora_editor, K=2, guidance=2.5).images)
    assert edits != base


def test_diffusers_alone_gets_the_full_strength_whatever_alpha_is(
    kontext_folder, strong_editor, tmp_path
):
    group = draw(strong_editor)
    sample.save_lora(strong_editor, tmp_path)
    plain = sample.load_editor(kontext_folder)
    base = predict(plain, group)
    plain.pipe.load_lora_weights(tmp_path)
    wanted = predict(strong_editor, group)
    torch.testing.assert_close(predict(plain, group), wanted)
    assert (wanted - base).abs().max() > 0.01


def test_a_reader_of_tensors_alone_gets_the_full_strength(kontext_folder, strong_editor, tmp_path):
    group = draw(strong_editor)
    sample.save_lora(strong_editor, tmp_path)
    merged = sample.load_editor(kontext_folder)
    merge(merged.transformer, tmp_path / sample.LORA_FILE)
    torch.testing.assert_close(
        predict(merged, group), predict(strong_editor, group), atol=1e-4, rtol=1e-4
    )


def test_a_file_is_float32_but_where_that_would_lose_bits(strong_editor, tmp_path):
    sample.save_lora(strong_editor, tmp_path)
    (layer,) = {layer.scaling["new"] for layer in lora_layers(strong_editor)}
    wanted = {2.0: torch.float32, 1.5: torch.float64}[layer]
    for key, tensor in load_file(tmp_path / sample.LORA_FILE).items():
        assert tensor.dtype == (wanted if "lora_B" in key else torch.float32)


def test_load_lora_gives_back_the_saved_bits(strong_editor, kontext_folder, tmp_path):
    sample.save_lora(strong_editor, tmp_path)
    again = sample.load_editor(kontext_folder)
    alpha = strong_editor.transformer.peft_config["new"].lora_alpha
    sample.add_policies(again, rank=4, alpha=alpha, seed=1)
    sample.load_lora(again, tmp_path, "new")
    assert_equal(sample.lora_parameters(again, "new"), sample.lora_parameters(strong_editor, "new"))


@pytest.mark.parametrize("name", ["new", "old"])
def test_load_lora_fills_either_policy_and_trains_only_new(
    lora_editor, kontext_folder, tmp_path, name
):
    sample.save_lora(lora_editor, tmp_path, name)
    again = sample.load_editor(kontext_folder)
    sample.add_policies(again, rank=4, alpha=8, seed=1)
    sample.load_lora(again, tmp_path, name)
    loaded = sample.lora_parameters(again, name)
    assert_equal(loaded, sample.lora_parameters(lora_editor, name))
    assert {p.requires_grad for p in loaded.values()} == {name == "new"}


def test_our_own_file_is_a_start_with_its_bits_and_its_alpha(
    strong_editor, kontext_folder, tmp_path
):
    sample.save_lora(strong_editor, tmp_path)
    again = sample.load_editor(kontext_folder)
    sample.add_policies(again, start=tmp_path)
    for name in ("new", "old"):
        loaded = sample.lora_parameters(again, name)
        assert_equal(loaded, sample.lora_parameters(strong_editor, "new"))
    group = draw(strong_editor)
    assert torch.equal(predict(again, group), predict(strong_editor, group))


@pytest.mark.parametrize("rank, alpha", [(8, 8), (4, 4)])
def test_load_lora_refuses_another_rank_or_alpha(
    lora_editor, kontext_folder, tmp_path, rank, alpha
):
    sample.save_lora(lora_editor, tmp_path)
    again = sample.load_editor(kontext_folder)
    sample.add_policies(again, rank, alpha)
    with pytest.raises(BadInput, match="layers, rank or alpha are not those"):
        sample.load_lora(again, tmp_path, "new")


def test_a_full_disk_leaves_the_saved_lora_as_it_was(lora_editor, tmp_path, monkeypatch):
    sample.save_lora(lora_editor, tmp_path)
    before = (tmp_path / sample.LORA_FILE).read_bytes()

    def half(tensors, file, metadata):
        Path(file).write_bytes(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(sample, "save_file", half)
    with pytest.raises(BadInput, match="cannot be written .No space left"):
        sample.save_lora(lora_editor, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [sample.LORA_FILE]
    assert (tmp_path / sample.LORA_FILE).read_bytes() == before


# ---------------------------------------------------------------- LoRA files: what is read


def named(weights, form):
    """A LoRA's tensors by other programs' names."""
    return {form(key): weight.detach().clone() for key, weight in weights.items()}


NAMES = {
    "bare": lambda key: key,
    "diffusers": lambda key: f"transformer.{key}",
    "peft": lambda key: f"base_model.model.{key}",
    "comfy": lambda key: f"diffusion_model.{key}",
    "down and up": lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "default": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("form", NAMES)
def test_a_lora_by_other_programs_names_is_read(lora_editor, kontext_folder, tmp_path, form):
    """Without settings and alphas the strength is 1, as in diffusers."""
    wanted = sample.lora_parameters(lora_editor, "new")
    file = tmp_path / "some name.safetensors"
    save_file(named(wanted, NAMES[form]), file)
    again = sample.load_editor(kontext_folder)
    sample.add_policies(again, start=file)
    assert_equal(sample.lora_parameters(again, "new"), wanted)
    assert {layer.scaling["new"] for layer in lora_layers(again)} == {1.0}


def test_alpha_tensors_set_each_layers_strength(lora_editor, kontext_folder, tmp_path):
    """All alphas differ from the rank, 4, and from each other; B makes up for them."""
    tensors = {}
    for number, layer in enumerate(lora_layers(lora_editor)):
        name = layer_name(lora_editor, layer)
        alpha = 2.0 ** (1 + number % 5)
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(alpha)
        weights = sample.lora_parameters(lora_editor, "new")
        tensors[f"diffusion_model.{name}.lora_down.weight"] = weights[f"{name}.lora_A.weight"]
        strong = weights[f"{name}.lora_B.weight"] * 2  # alpha 8, rank 4
        tensors[f"diffusion_model.{name}.lora_up.weight"] = strong / (alpha / 4)
    file = tmp_path / "kohya.safetensors"
    save_file({key: tensor.detach().clone() for key, tensor in tensors.items()}, file)
    again = sample.load_editor(kontext_folder)
    sample.add_policies(again, start=file)
    group = draw(lora_editor)
    assert torch.equal(predict(again, group), predict(lora_editor, group))


def test_ranks_and_alphas_that_differ_from_layer_to_layer_survive_saving(
    lora_editor, kontext_folder, tmp_path
):
    tensors = {}
    for number, layer in enumerate(lora_layers(lora_editor)):
        name = layer_name(lora_editor, layer)
        rank = 2 + number % 3
        tensors[f"{name}.alpha"] = torch.tensor(3.0 + number % 2)
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, layer.in_features)
        tensors[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, rank)
    save_file(tensors, tmp_path / "mixed.safetensors")
    group = draw(lora_editor)
    first = sample.load_editor(kontext_folder)
    sample.add_policies(first, start=tmp_path / "mixed.safetensors")
    sample.save_lora(first, tmp_path / "saved")
    again = sample.load_editor(kontext_folder)
    sample.add_policies(again, start=tmp_path / "saved")
    assert torch.equal(predict(again, group), predict(first, group))
    merged = sample.load_editor(kontext_folder)
    merge(merged.transformer, tmp_path / "mixed.safetensors")
    torch.testing.assert_close(predict(first, group), predict(merged, group), atol=1e-3, rtol=1e-3)


def test_a_lora_by_another_programs_names_of_layers_goes_through_diffusers_converter(
    kontext_folder, tmp_path
):
    """As kohya's trainer writes them for FLUX; alpha is folded into the weights there."""
    down = torch.randn(4, 32)
    up = torch.randn(32, 4)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    tensors[f"{name}.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    editor = sample.load_editor(kontext_folder)
    sample.add_policies(editor, start=tmp_path / "kohya.safetensors")
    a, b = sample.lora_parameters(editor, "new").values()
    assert layer_name(editor, lora_layers(editor)[0]) == "transformer_blocks.0.attn.to_out.0"
    torch.testing.assert_close(b @ a, 2 * up @ down)


def test_a_file_of_diffusers_own_writer_keeps_its_alpha(lora_editor, kontext_folder, tmp_path):
    """Also what earlier versions of save_lora wrote."""
    wanted = sample.lora_parameters(lora_editor, "new")
    lora_editor.pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers={key: value.detach() for key, value in wanted.items()},
        transformer_lora_adapter_metadata=lora_editor.transformer.peft_config["new"].to_dict(),
    )
    again = sample.load_editor(kontext_folder)
    sample.add_policies(again, rank=4, alpha=8)
    sample.load_lora(again, tmp_path, "new")
    assert_equal(sample.lora_parameters(again, "new"), wanted)


def spoil(lora_editor, folder, how):
    """A LoRA file with a fault; returns what names it."""
    sample.save_lora(lora_editor, folder)
    file = folder / sample.LORA_FILE
    tensors = load_file(file)
    content = file.read_bytes()
    if how == "cut short":
        file.write_bytes(content[: len(content) // 2])
    elif how == "no safetensors":
        file.write_bytes(b"not tensors at all")
    elif how == "nothing in it":
        file.write_bytes(b"")
    elif how == "no tensors":
        save_file({}, file)
    elif how == "half a layer":
        tensors.popitem()
        save_file(tensors, file)
    elif how == "settings that are none":
        save_file(tensors, file, {"lora_config": "{"})
    elif how == "another kind":
        save_file({"transformer_blocks.0.attn.to_q.lokr_w1": torch.ones(2, 2)}, file)
    elif how == "pictures' layers":
        save_file({key: torch.ones(4, 4, 3, 3) for key in tensors}, file)
    return folder


FAULTS = [
    "cut short",
    "no safetensors",
    "nothing in it",
    "no tensors",
    "half a layer",
    "settings that are none",
    "another kind",
    "pictures' layers",
]


@pytest.mark.parametrize("how", FAULTS)
def test_a_broken_lora_file_is_one_line_that_names_it(lora_editor, kontext_folder, tmp_path, how):
    place = spoil(lora_editor, tmp_path / "lora", how)
    editor = sample.load_editor(kontext_folder)
    with pytest.raises(BadInput, match=str(place)) as error:
        sample.add_policies(editor, start=place)
    assert "\n" not in str(error.value)


def test_pefts_file_without_its_settings_is_refused_with_the_fix(lora_editor, tmp_path):
    weights = sample.lora_parameters(lora_editor, "new")
    save_file(named(weights, NAMES["peft"]), tmp_path / sample.PEFT_FILE)
    with pytest.raises(BadInput, match="a PEFT folder with .* and adapter_config.json$") as error:
        sample.read_lora(tmp_path)
    assert "\n" not in str(error.value)


def test_broken_settings_beside_pefts_file_are_one_line(lora_editor, tmp_path):
    weights = sample.lora_parameters(lora_editor, "new")
    save_file(named(weights, NAMES["peft"]), tmp_path / sample.PEFT_FILE)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(BadInput, match="not a LoRA that can be read") as error:
        sample.read_lora(tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- damaged bases


def copy_of(folder, place):
    shutil.copytree(folder, place)
    return place


def damage(base, how):
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    if how == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "weights missing":
        tensors = load_file(weights)
        tensors.popitem()
        save_file(tensors, weights)
    elif how == "weights of another shape":
        save_file({key: torch.ones(2, 2) for key in load_file(weights)}, weights)
    elif how == "an index that is no JSON":
        (base / "model_index.json").write_text("{")
    elif how == "a config that is no JSON":
        (base / "transformer" / "config.json").write_bytes(b"\xff\x00")
    elif how == "a part missing":
        shutil.rmtree(base / "text_encoder_2")
    elif how == "a class that there is not":
        index = json.loads((base / "model_index.json").read_text())
        index["vae"] = ["diffusers", "AutoencoderOfTomorrow"]
        (base / "model_index.json").write_text(json.dumps(index))


DAMAGES = [
    "weights cut short",
    "weights missing",
    "weights of another shape",
    "an index that is no JSON",
    "a config that is no JSON",
    "a part missing",
    "a class that there is not",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_base_is_one_line_that_names_it(kontext_folder, tmp_path, how):
    base = copy_of(kontext_folder, tmp_path / "base")
    damage(base, how)
    with pytest.raises(BadInput, match=f"{base}: not a diffusers model") as error:
        sample.load_editor(base)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the command


def places(grid, image, column):
    """The heights at which an enlarged picture stands in a column of 96-pixel cells."""
    wanted = image.resize((96, 96), Image.Resampling.NEAREST).tobytes()
    x = 100 * column
    heights = range(grid.height - 95)
    return [y for y in heights if grid.crop((x, y, x + 96, y + 96)).tobytes() == wanted]


def test_the_command_draws_base_and_trained_side_by_side(
    lora_editor, kontext_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sample.save_lora(lora_editor, "run")
    picture().save("in.png")
    options = ["--image", "in.png", "--prompt", PROMPT, "--base", str(kontext_folder)]
    options += ["--lora", "run", "--compare", "--num", "2", "--steps", "2"]
    sample.main(options)
    assert "wrote out.png" in capsys.readouterr().out
    grid = Image.open("out.png")
    heights = places(grid, picture(), column=0)
    for name, height in zip(("base", "new"), heights, strict=True):
        generators = [torch.Generator().manual_seed(seed) for seed in (42, 43)]
        with sample.policy(lora_editor, name):
            group = sample.rollout(
                lora_editor, [picture()], PROMPT, generators, steps=2, evaluation=True
            )
        for column, edit in enumerate(group.images, 1):
            assert places(grid, edit, column) == [height]


@pytest.fixture
def command(kontext_folder, tmp_path, monkeypatch, capsys):
    """A function of more options to the one line that the command ends with."""
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")

    def ends_with(*options):
        good = ["--image", "in.png", "--prompt", PROMPT, "--base", str(kontext_folder)]
        with pytest.raises(SystemExit) as stop:
            sample.run_script(lambda: sample.main([*good, *map(str, options)]))
        assert stop.value.code == 2
        *_, line = capsys.readouterr().err.strip().splitlines()
        return line

    return ends_with


@pytest.fixture
def no_model(monkeypatch):
    """What is wrong is to be known before a model is loaded."""
    monkeypatch.setattr(sample, "load_editor", lambda *a, **k: pytest.fail("a model was loaded"))


WRONG = [
    ("--image", ["--image"]),
    ("gone.png: not a readable picture (no such file)", ["--image", "gone.png"]),
    ("broken.png: not a readable picture", ["--image", "broken.png"]),
    ("--prompt is missing; name a picture and say what to change", ["--prompt", " "]),
    ("add --lora", ["--compare"]),
    ("end it in .png", ["--out", "out"]),
    ("end it in .png", ["--out", "out.psd"]),
    ("is in the way", ["--out", "folder.png"]),
    ("cannot be written", ["--out", "in.png/out.png"]),
    ("empty: not a LoRA", ["--lora", "empty"]),
    ("no/such/lora: not a LoRA", ["--lora", "no/such/lora"]),
    ("in.png: not a LoRA", ["--lora", "in.png"]),
    ("--colour", ["--colour", "red"]),
]


@pytest.mark.parametrize("said, options", WRONG)
def test_wrong_options_are_one_line_before_a_model_is_loaded(command, no_model, said, options):
    Path("broken.png").write_bytes(b"not a picture")
    Path("empty").mkdir()
    Path("folder.png").mkdir()
    line = command(*options)
    assert line.startswith("error: ")
    assert said in line


def test_a_read_only_disk_is_one_line_before_a_model_is_loaded(command, no_model, monkeypatch):
    def refuse(path):
        raise OSError("Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    assert "error: out.png: cannot be written (Read-only file system)" in command()


def test_nothing_lies_beside_the_picture_while_it_is_drawn(command, monkeypatch):
    """A run that is killed then leaves no part of a file."""

    def look(*args, **kwargs):
        assert [path.name for path in Path().iterdir()] == ["in.png"]
        raise BadInput("looked")

    monkeypatch.setattr(sample, "load_editor", look)
    assert command() == "error: looked"


def test_no_picture_at_all_is_one_line(no_model):
    with pytest.raises(BadInput, match="--image or --prompt is missing; name a picture"):
        sample.main(["--prompt", PROMPT])


HOSTILE = {
    "num": ["nan", "inf", "-1", "0", "1e30", "1000000000", "", "two"],
    "seed": ["nan", "-1", "1e30", str(2**70)],
    "steps": ["nan", "-1", "0", "1e30", "1000000000"],
    "guidance": ["nan", "inf", "-inf", "-1", "1e30", "1000", "x"],
    "resolution": ["nan", "-1", "0", "1", "1e30", "1000000000"],
}
HOSTILE_PAIRS = []
for flag, values in HOSTILE.items():
    HOSTILE_PAIRS += [(flag, value) for value in values]


@pytest.mark.parametrize("flag, value", HOSTILE_PAIRS)
def test_a_hostile_number_is_one_line_that_names_the_setting(command, no_model, flag, value):
    line = command(f"--{flag}={value}")
    assert line.startswith("error: ")
    assert f"--{flag}" in line


def test_a_full_disk_leaves_the_old_picture_whole(command, monkeypatch):
    Path("out.png").write_bytes(b"a good picture")

    def save(image, path):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    line = command("--num", 1, "--steps", 1)
    assert line.startswith("error: out.png: cannot be written")
    assert Path("out.png").read_bytes() == b"a good picture"
    assert sorted(path.name for path in Path().iterdir()) == ["in.png", "out.png"]


def test_a_base_that_is_none_is_one_line(command, kontext_folder):
    Path("empty").mkdir()
    parts = DiffusionPipeline.from_pretrained(kontext_folder).components
    FluxPipeline(**parts).save_pretrained("t2i")
    for said, options in (
        ("run python data_prep.py toy first", ["--base", sample.TOY]),
        ("name a whole model folder", ["--base", "no/such/folder"]),
        ("empty: not a diffusers model", ["--base", "empty"]),
        ("t2i: FluxPipeline edits no pictures", ["--base", "t2i"]),
        ("resolution 100", ["--resolution", 100]),
        ("2 pictures", ["--image", "in.png", "in.png"]),
    ):
        assert said in command(*options)


def test_importing_does_nothing(tmp_path):
    code = """
import torch
state = torch.get_rng_state()
import sample
assert state.equal(torch.get_rng_state())
"""
    env = {"PYTHONPATH": str(Path(sample.__file__).parent), "HOME": str(tmp_path)}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-c", code, "--no-such-setting"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
