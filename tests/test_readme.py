"""What the README promises: a stranger's edits run at first try, and its commands are true."""

import importlib
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ablations import SCRIPTS, VARIANTS, Patch, patched
from rule_judge import arguments, log, lora
from test_evaluate import Figure

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------- a stranger's edits

REWARD = """
import numpy as np

def score(row, sources, edits):
    light = np.array([np.asarray(edit).mean() / 255 for edit in edits])
    return abs((40 * light) % 2 - 1)

def contrast(row, sources, edits):
    return [np.asarray(edit).std() / 128 for edit in edits]
"""

TWO_JUDGES = """
from reward_mllm import JudgeSettings, load_judge

judges = [load_judge(JudgeSettings(judge=name)) for name in ("reward.py", "reward.py:contrast")]

def score(row, sources, edits):
    first, second = [judge.score(row, sources, edits).score for judge in judges]
    return (first + second) / 2
"""


@dataclass(frozen=True)
class Edit:
    """A change that people want to try: a few lines of a script, or flags."""

    place: str  # where the README says it is to be made
    patches: tuple[Patch, ...] = ()
    flags: str = ""


def in_train(old, new):
    return Patch("train_nft.py", old, new)


EDITS = {
    "no negative term": Edit("nft_loss", (VARIANTS["no-negative"].patch,)),
    "top-k groups by spread": Edit(
        "group_advantages",
        (
            in_train(
                "    dropped = torch.tensor(",
                "    spread = (scores - scores.nanmean(1, keepdim=True)).square().nanmean(1)\n"
                "    for number in spread.nan_to_num().argsort(descending=True)[2:]:\n"
                "        reasons[number] = reasons[number] or 'little spread'\n"
                "    dropped = torch.tensor(",
            ),
        ),
    ),
    "std per group": Edit("group_advantages", (VARIANTS["std-per-group"].patch,)),
    "a Python function as the reward": Edit("--judge FILE.py", flags="--judge reward.py"),
    "two judges": Edit("--judge FILE.py", flags="--judge two.py"),
    "logit-normal times": Edit(
        "draw_pairs",
        (
            in_train(
                "        t.append(group.sigmas[order[pick]])\n",
                # In bfloat16, as a base of any precision can be told them.
                "        times = torch.randn(T, generator=draws).sigmoid().bfloat16().float()\n"
                "        t.append(times[pick])\n",
            ),
        ),
    ),
    "hard copy of the old policy every five epochs": Edit(
        "run_epochs",
        (
            in_train(
                'record["old_decay"] = min(settings.decay_rate * (epoch + 1), settings.decay_max)',
                'record["old_decay"] = 0.0 if epoch % 5 == 4 else 1.0',
            ),
        ),
    ),
    "full weights instead of a LoRA": Edit(
        "add_policies",
        (
            Patch(
                "sample.py",
                "    if start:\n        config =",
                "    sizes = {}\n"
                "    for name, layer in editor.transformer.named_modules():\n"
                "        if isinstance(layer, nn.Linear):\n"
                "            sizes[f'^{name}'] = layer.in_features\n"
                "    config |= {'rank_pattern': sizes, 'alpha_pattern': sizes}\n"
                "    config['target_modules'] = [name[1:] for name in sizes]\n"
                "    if start:\n        config =",
            ),
            Patch(
                "sample.py",
                "parameter.data.copy_(gaussian / len(parameter))",
                "parameter.data.copy_(torch.eye(len(gaussian)))",
            ),
            Patch(
                "sample.py",
                'parameter.requires_grad_(name == "new")',
                'parameter.requires_grad_(name == "new" and "lora_B" in key)',
            ),
        ),
    ),
    "a penalty on the norm of v": Edit(
        "pair_losses",
        (
            in_train(
                '    return measured | {"loss": loss}\n',
                "    loss = loss + 0.01 * v.square().mean((1, 2))\n"
                '    return measured | {"loss": loss}\n',
            ),
        ),
    ),
    "one more scalar by task": Edit(
        "run_epochs",
        (
            in_train(
                "        record |= epoch_record(scores, r, reasons, measured, norm)\n",
                "        record |= epoch_record(scores, r, reasons, measured, norm)\n"
                "        for row, group in zip(drawn, scores.score, strict=True):\n"
                "            key = f\"best/{row.get('task', 'none')}\"\n"
                "            record[key] = max(record.get(key, 0.0), group.max().item())\n",
            ),
            Patch("evaluate.py", '    "reward/psnr",\n)', '    "best/none",\n)'),
        ),
    ),
}


def write_edited(folder, edit):
    """A copy of the scripts with an edit, and the reward functions."""
    folder.mkdir()
    texts = {name: (HERE.parent / name).read_text("utf-8") for name in SCRIPTS}
    for patch in edit.patches:
        texts[patch.script] = patched(texts[patch.script], patch)
    for name, text in {**texts, "reward.py": REWARD, "two.py": TWO_JUDGES}.items():
        (folder / name).write_text(text, "utf-8")


@contextmanager
def imported(folder):
    """Within, the scripts are those of a folder, where the work is done, too."""
    names = [name.removesuffix(".py") for name in SCRIPTS]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    place = os.getcwd()
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield importlib.import_module("train_nft")
    finally:
        os.chdir(place)
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"], scope="module")
def edited(request, kontext_folder, dataset, tmp_path_factory):
    """edited(name) trains three epochs with an edit, by a base of one precision: the run's folder.

    "" is no edit.
    """
    finished = {}

    def train(name):
        if name in finished:
            return finished[name]
        edit = EDITS.get(name, Edit(""))
        folder = tmp_path_factory.mktemp("edited") / "scripts"
        write_edited(folder, edit)
        words = arguments(
            kontext_folder,
            dataset,
            folder / "run",
            judge="reward.py",
            epochs=3,
            eval_every=3,
            save_every=3,
        )
        with imported(folder) as train_nft, pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "cpu_count", lambda: 1)
            load = train_nft.load_editor

            def load_editor(base, device, dtype, *args, **options):
                return load(base, device, request.param, *args, **options)

            patch.setattr(train_nft, "load_editor", load_editor)
            train_nft.main([*words, *edit.flags.split()])
        finished[name] = folder / "run"
        return finished[name]

    return train


@pytest.mark.parametrize("name", EDITS)
def test_a_strangers_edit_runs_three_epochs_at_first_try(edited, name):
    records = log(edited(name))
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert sum(record["steps/made"] for record in records) == 3


TRAINED_OTHERWISE = set(EDITS) - {"a Python function as the reward", "one more scalar by task"}


@pytest.mark.parametrize("name", sorted(TRAINED_OTHERWISE))
def test_a_strangers_edit_of_the_method_trains_another_lora(edited, name):
    plain = lora(edited("") / "checkpoint-3")
    changed = lora(edited(name) / "checkpoint-3")
    is_equal = [key in changed and torch.equal(plain[key], changed[key]) for key in plain]
    assert not all(is_equal)


def test_full_weights_are_the_whole_change_of_each_linear_layer(edited):
    weights = lora(edited("full weights instead of a LoRA") / "checkpoint-3")
    layers = {key.split(".lora_")[0] for key in weights}
    assert any("norm" in layer for layer in layers) and any("ff" in layer for layer in layers)
    for layer in layers:
        A, B = (weights[f"{layer}.lora_{part}.weight"] for part in "AB")
        assert torch.allclose(A, torch.eye(A.shape[1]), atol=1e-4)  # so that B is the change
        assert B.any()


def test_a_hard_copy_every_five_epochs_leaves_old_alone_before(edited):
    records = log(edited("hard copy of the old policy every five epochs"))
    assert [record["old_decay"] for record in records] == [1, 1, 1]


def test_of_top_k_groups_no_more_than_k_are_kept(edited):
    assert all(record["groups/kept"] <= 0.5 for record in log(edited("top-k groups by spread")))


def test_one_more_scalar_by_task_is_logged_and_drawn(edited, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace(Figure=Figure))
    folder = edited("one more scalar by task")
    with imported(folder.parent):
        importlib.import_module("evaluate").curves([str(folder), "--out", "curves.png"])
    axes = {axes.title: axes for axes in Figure.last.axes}["best/none"]
    assert axes.line == {record["epoch"]: record["best/none"] for record in log(folder)}
