"""full_size.py: its editors have the released sizes, its pretended GPU counts as a real device."""

from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace

import full_size
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from pretended_gpu import CPU, GPU, Count, Meter, PretendedGPU, pretended_gpu
from released import NAMES, build_editor, build_judge, parameters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        (
            "kontext",
            {"transformer": 11.90, "text_encoder": 0.12, "text_encoder_2": 4.76, "vae": 0.08},
        ),
        ("qwen", {"transformer": 20.43, "text_encoder": 8.29, "vae": 0.13}),
        ("klein", {"transformer": 3.88, "text_encoder": 4.02, "vae": 0.08}),
    ],
)
def test_the_full_size_editors_have_as_many_parameters_as_the_released_ones(model, billions):
    pipe = build_editor(model, "meta")
    assert {part: round(count / 1e9, 2) for part, count in parameters(pipe).items()} == billions
    assert type(pipe).__name__ == NAMES[model][1]
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert pipe.tokenizer.model_max_length == (77 if model == "kontext" else 512)


@pytest.mark.parametrize(("size", "billions"), [("7B", 8.29), ("32B", 33.45)])
def test_the_judges_have_as_many_parameters_as_the_released_ones(size, billions):
    count = sum(parameter.numel() for parameter in build_judge(size, "meta").parameters())
    assert round(count / 1e9, 2) == billions


# ---------------------------------------------------------------- the pretended GPU


def one_step(device, watch):
    """A training step of a small Flux transformer with recompute; `watch` wraps the step alone."""
    torch.manual_seed(0)
    with torch.device(device):
        model = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=(8, 12, 12),
        )
        model.enable_gradient_checkpointing()
        inputs = {
            "hidden_states": torch.randn(2, 256, 64),
            "encoder_hidden_states": torch.randn(2, 32, 64),
            "pooled_projections": torch.randn(2, 32),
            "timestep": torch.ones(2),
            "img_ids": torch.zeros(256, 3),
            "txt_ids": torch.zeros(32, 3),
        }
    with watch, sdpa_kernel(SDPBackend.MATH):
        model(**inputs)[0].square().mean().backward()


def simulated_step():
    """Its meter. Attention is in its plain form, as on the CPU above."""
    meter = Meter(GPU)
    with PretendedGPU(), Count(meter):
        one_step(GPU, meter.within("step"))
    return meter


def test_its_flops_are_those_that_torchs_counter_sees_on_the_cpu():
    real = FlopCounterMode(display=False)
    one_step(CPU, real)
    flops = simulated_step().figures["step"].flops
    assert flops == {torch.float32: real.get_total_flops()}


def test_its_peak_is_within_two_percent_of_what_the_cpus_allocator_gives_out():
    real = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    one_step(CPU, real)
    moves = [event for event in real.profiler.kineto_results.events() if event.name() == "[memory]"]
    moves.sort(key=lambda event: event.start_ns())
    held = torch.tensor([event.nbytes() for event in moves]).cumsum(0)
    meter = simulated_step()
    began = meter.figures["loading"].peak
    assert meter.figures["step"].peak - began == pytest.approx(held.max().item(), rel=0.02)


def test_on_the_cpu_itself_the_peak_is_the_largest_sum_of_living_tensors():
    meter = Meter(CPU)
    with Count(meter), meter.within("work"):
        a = torch.zeros(1000)
        b = a[:10]  # a view costs nothing
        c = a + 1
        del a, b
        d = torch.zeros(500)
    assert meter.figures["work"].peak == 4 * 2000
    assert meter.live == c.nbytes + d.nbytes


def test_what_autograd_keeps_for_backward_counts():
    meter = Meter(GPU)
    with PretendedGPU(), Count(meter):
        x = torch.zeros(1000, device=GPU, requires_grad=True)
        y = (x.exp() * 2).sum()  # backward needs exp(x)
        assert meter.live == 4 * (2 * 1000 + 1)
        del y
    assert meter.live == 4 * 1000


def test_attention_is_the_fused_kernel_that_keeps_no_scores():
    meter = Meter(GPU)
    with pretended_gpu(), Count(meter):
        q = torch.zeros(1, 2, 4096, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    figures = meter.figures["loading"]
    forward = 2 * 2 * 2 * 4096**2 * 64  # 2 matrix products of 2 heads
    assert figures.flops == {torch.bfloat16: 3.5 * forward}  # backward has five
    assert figures.peak < 2 * 2 * 4096**2  # bytes of the score matrices


def test_flops_are_counted_by_dtype():
    meter = Meter(GPU)
    with pretended_gpu(), Count(meter):
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.zeros(2, 3, device=GPU, dtype=dtype)
            a @ a.T @ a
    assert meter.figures["loading"].flops == {
        dtype: 2 * 2 * 2 * 2 * 3 for dtype in (torch.float32, torch.bfloat16)
    }


def test_bytes_between_devices_are_counted_and_those_within_are_not():
    meter = Meter(GPU)
    with pretended_gpu(), Count(meter):
        layer = torch.nn.Linear(10, 10, bias=False)
        layer.to(GPU)
        layer.to(CPU)
        torch.zeros(5).double().add_(torch.ones(5))
        torch.zeros(7, device=GPU).copy_(torch.ones(7))
    assert meter.figures["loading"].copied == 4 * (100 + 100 + 7)


def test_small_tensors_on_the_pretended_gpu_keep_their_values():
    with pretended_gpu():
        mask = torch.arange(6, device=GPU) > 3
        assert mask.tolist() == [False] * 4 + [True] * 2
        mask[0] = True
        assert mask.sum().item() == 3
        assert torch.tensor([mask.sum(), 5], device=GPU).tolist() == [3, 5]
        large = torch.zeros(6, 10**6, device=GPU)
        assert large[mask].shape == (3, 10**6)


def test_what_is_read_of_unknown_values_is_a_stand_in():
    with pretended_gpu():
        large = torch.zeros(10**6, device=GPU)
        assert large.sum().item() == 1
        assert torch.equal(large, large + 1)
        assert not large.cpu().any()


# ---------------------------------------------------------------- phases


def test_every_second_belongs_to_one_phase(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("pretended_gpu.time", SimpleNamespace(time=lambda: next(clock)))
    meter = Meter(CPU)
    with meter.within("denoise"):
        with meter.within("encode"):
            pass
        with meter.within("decode"):
            pass
    seconds = {phase: figures.seconds for phase, figures in meter.figures.items()}
    assert seconds == {"loading": 1, "denoise": 3, "encode": 1, "decode": 1}


def settings_of(**changes):
    """Those of a tiny epoch: 3 edits in 2 steps, 2 trained times."""
    few = {"group_size": 3, "rollout_steps": 2, "train_timesteps": 2, "eval_steps": 1}
    values = {"base": "x", "data": "x", "judge": "local:x", "resolution": 64} | few | changes
    return full_size.train_nft.Settings(**values)


FEW = ["group_size=3", "rollout_steps=2", "train_timesteps=2", "eval_steps=1"]


@pytest.fixture(scope="module")
def tiny():
    """The meter of a tiny Kontext's epoch, and the settings."""
    settings = settings_of()
    meter = Meter(GPU)
    full_size.run_model("kontext", settings, meter, is_tiny=True)
    return meter, settings


def test_an_epoch_fills_every_phase(tiny):
    meter, _ = tiny
    phases = {*full_size.DRAWING, *full_size.TRAINING, "evaluate"} - {"step"}
    assert all(meter.figures[phase].flops for phase in phases)
    assert meter.figures["offload"].copied > 0


def test_nothing_stays_patched_after_an_epoch(tiny):
    import sample

    train_nft = full_size.train_nft
    assert train_nft.velocity is sample.velocity
    assert train_nft.parked is sample.parked
    assert train_nft.rollout is sample.rollout


def test_the_forward_of_an_edit_costs_the_same_wherever_it_is_made(tiny):
    meter, settings = tiny
    flops = {phase: full_size.flops_of(figures) for phase, figures in meter.figures.items()}
    assert flops["old"] == flops["new"]  # both of all pairs, through a LoRA
    a_pair = flops["new"] / settings.train_timesteps
    assert flops["denoise"] / settings.rollout_steps == pytest.approx(a_pair)
    assert flops["base"] < flops["new"]  # no LoRA


def test_without_recompute_backward_costs_a_forward_less_and_more_memory(tiny):
    meter, _ = tiny
    kept = Meter(GPU)
    without = settings_of(gradient_checkpointing=False)
    full_size.run_model("kontext", without, kept, is_tiny=True)
    before, after = meter.figures["backward"], kept.figures["backward"]
    saved = full_size.flops_of(before) - full_size.flops_of(after)
    assert 0.5 < saved / full_size.flops_of(meter.figures["new"]) <= 1
    assert after.peak > before.peak


def test_what_is_only_simulated_is_not_compiled(monkeypatch):
    def fail(editor):
        raise AssertionError("compiled")

    monkeypatch.setattr(full_size.sample, "compile_blocks", fail)
    for device in (GPU, CPU):
        full_size.run_model("kontext", settings_of(compile=True), Meter(device), is_tiny=True)


def test_flux_2_is_counted_with_its_familys_steps():
    assert full_size.steps_of("klein", settings_of(rollout_steps=None)) == 12
    assert full_size.steps_of("kontext", settings_of(rollout_steps=None)) == 6
    assert full_size.steps_of("klein", settings_of(rollout_steps=3)) == 3


def test_the_slowest_rank_has_whole_groups_to_draw_and_chunks_to_train():
    settings = settings_of(groups=4, group_size=12, rollout_steps=6, train_timesteps=5)
    meter = Meter(GPU)
    for phase in ("denoise", "backward"):
        meter.figures[phase].flops = Counter({torch.bfloat16: 10})
    # 4 groups; 4 chunks with the pull to the base and 16 without it
    assert full_size.flops_on_slowest(meter, settings, 1) == pytest.approx(40 + 40)
    assert full_size.flops_on_slowest(meter, settings, 3) == pytest.approx(20 + 2 * (2 + 6))


# ---------------------------------------------------------------- the command


def cells_of(line):
    return line.strip("| \n").split(" | ")


@pytest.fixture(scope="module")
def simulated():
    """What the command prints of a tiny editor."""
    with redirect_stdout(StringIO()) as said:
        full_size.main(["--tiny", "--models", "klein", "--set", "groups=7", *FEW])
    return said.getvalue()


def test_the_tables_say_that_they_are_simulated_and_what_a_judge_adds(simulated):
    assert simulated.startswith("Simulated, not measured: ")
    assert "A judge on the same card adds 17 GB (Qwen2.5-VL-7B; 32B: 67 GB)" in simulated


def test_the_shares_of_the_phases_add_up_to_an_epoch(simulated):
    head, _, row = simulated[simulated.index("| share of FLOPs") :].splitlines()[:3]
    name, *shares, judge = cells_of(row)
    assert (name, cells_of(head)[-1]) == (NAMES["klein"][0], "7B judge, besides")
    assert sum(float(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=0.5)


def test_settings_of_train_nft_can_be_set(simulated):
    assert "7 x 3 edits an epoch at 64 pixels" in simulated


def test_measured_tiny_editors_make_a_row(capsys):
    full_size.main(["--tiny", "--measure", "--models", "klein", "--set", *FEW])
    *_, head, line, row, _ = capsys.readouterr().out.split("\n")[:-1]
    assert cells_of(head)[:4] == ["measured", "drawing", "training", "both"]
    _, drawing, training, both, _ = cells_of(row)
    speeds = [float(cell.split()[-1].removesuffix("/s")) for cell in (drawing, training, both)]
    assert 1 / speeds[2] == pytest.approx(1 / speeds[0] + 1 / speeds[1], rel=0.05)


def test_a_model_that_does_not_fit_is_a_row_and_no_crash(monkeypatch):
    def full(self, *args, **kwargs):
        if not isinstance(kwargs["hidden_states"], torch.Tensor) or kwargs["hidden_states"].is_meta:
            return forward(self, *args, **kwargs)
        raise torch.OutOfMemoryError("CUDA out of memory")

    forward = FluxTransformer2DModel.forward
    monkeypatch.setattr(FluxTransformer2DModel, "forward", full)
    (cell,) = full_size.measured_cells("kontext", settings_of(), CPU, is_tiny=True)
    assert cell.startswith("does not fit")
    assert cell.endswith("in phase denoise")


def test_without_cuda_a_measurement_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    full_size.main(["--measure"])
    said = capsys.readouterr().out
    assert (said.count("\n"), said[:7]) == (1, "skipped")
