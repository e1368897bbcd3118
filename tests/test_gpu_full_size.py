"""gpu_full_size.py: its editors have the released sizes, and tiny ones make its table."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import gpu_full_size
import pytest
import torch
from gpu_full_size import NAMES, Meter, build, estimate, parameters

SCRIPT = Path(gpu_full_size.__file__)


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
    pipe = build(model, "meta")
    assert {part: round(count / 1e9, 2) for part, count in parameters(pipe).items()} == billions
    assert type(pipe).__name__ == NAMES[model][1]
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert pipe.tokenizer.model_max_length == (77 if model == "kontext" else 512)


def test_the_estimate_counts_bf16_weights_and_six_float32_copies_of_the_lora():
    figures = estimate("klein")
    assert figures["transformer"] == pytest.approx(2 * 3.8755, abs=0.001)
    # 5 double blocks with 8 square layers; 20 single ones with 3072 -> 3 x 3072 + 2 x 9216 and
    # 3072 + 9216 -> 3072
    lora = 32 * (5 * 8 * 2 * 3072 + 20 * (3072 + 27648 + 12288 + 3072))
    assert figures["LoRA"] == pytest.approx(24 * lora / 1e9)
    assert figures["peak, drawing"] > sum(
        figures[part] for part in ("transformer", "text encoders", "VAE", "LoRA")
    )


def test_every_second_belongs_to_one_phase_and_evaluation_to_none():
    clock = iter((float(second), 1.0) for second in range(100))
    meter = Meter(lambda device: next(clock), "cpu")
    for _ in range(2):  # epochs
        for phase in ("rollout", "reward", "update"):
            with meter.timed({}, phase, "cpu"):
                assert meter.phase == phase
                with meter.within("encode"), meter.within("decode"):
                    pass
        with meter.within("encode"):
            pass
    assert meter.figures == {
        "rollout": (2.0, 1.0),
        "encode": (1.0, 1.0),
        "between": (2.0, 1.0),
        "reward": (1.0, 1.0),
        "update": (1.0, 1.0),
    }


def test_a_model_that_does_not_fit_is_a_row_and_no_crash(monkeypatch):
    import sample
    import train_nft

    def full(argv):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_nft, "main", full)
    # measure puts its own there: pytest takes them out again
    monkeypatch.setattr(sample, "_load_pipeline", full)
    monkeypatch.setattr(train_nft, "load_judge", full)
    monkeypatch.setattr(train_nft, "check_judge", full)
    monkeypatch.setattr(train_nft, "timed", full)
    args = Namespace(models=["klein"], tiny=True, cap=0.0, groups=1, compile="no")
    row = gpu_full_size.measure(args)["row"]
    assert row.startswith("does not fit")
    assert row.endswith("in phase loading")


def test_two_epochs_of_a_tiny_editor_make_the_table():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--models", "klein", "--compile", "no"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *_, head, line, row = done.stdout.splitlines()
    assert head == "| editor | compile | encode | rollout | decode | update | whole epoch |"
    name, compiled, *cells = row.strip("| ").split(" | ")
    assert (name, compiled, len(cells)) == ("FLUX.2-klein-base-4B", "no", 5)
    speeds = [float(cell.split(" GB, ")[1].removesuffix("/s")) for cell in cells]
    assert 1 / speeds[-1] == pytest.approx(sum(1 / speed for speed in speeds[:-1]), rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n"), done.stdout[:7]) == (0, 1, "skipped")
