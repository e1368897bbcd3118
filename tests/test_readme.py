"""What the README promises: a stranger's edits run at first try, and its commands are true."""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ablations import SCRIPTS, VARIANTS, Patch, patched
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from rule_judge import arguments, log, lora, write_dataset
from test_evaluate import Figure

import data_prep
import reward_mllm
import train_nft
from data_prep import BadInput

HERE = Path(__file__).resolve().parent
README = (HERE.parent / "README.md").read_text("utf-8")
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # by a training, which leaves it so

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
    "std per group": Edit("--scale", flags="--scale group"),
    "a Python function as the reward": Edit("--judge FILE.py", flags="--judge reward.py"),
    "two judges": Edit("--judge FILE.py", flags="--judge two.py"),
    "logit-normal times": Edit(
        "draw_pairs",
        (
            in_train(
                "        t.append(group.sigmas[order[pick]])\n",
                "        times = torch.randn(T, generator=draws).sigmoid()\n"
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
                "            layer.cast_input_dtype_enabled = False\n",
                "            layer.cast_input_dtype_enabled = False\n"
                "            layer.frozen_peft_weight_names = {'new': ['lora_A']}\n",
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
        "reward_by_task",
        (
            in_train(
                '    return {f"reward/task/',
                "    best = {}\n"
                "    for task in named:\n"
                '        best[f"reward/best/{task}"] = score[tasks == task].max().item()\n'
                '    return best | {f"reward/task/',
            ),
            Patch("evaluate.py", '    "reward/psnr",\n)', '    "reward/best/remove",\n)'),
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
    handlers = {number: signal.getsignal(number) for number in CAUGHT}
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


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Eight training rows and two held-out ones, whose task is the first word of their prompt."""
    folder = write_dataset(tmp_path_factory.mktemp("tasks"))
    for split in ("train", "test"):
        file = folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["task"] = row["prompt"].split()[0]
        data_prep.write_json_lines(file, rows)
    return folder


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"], scope="module")
def edited(request, kontext_folder, tasks, tmp_path_factory):
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
            tasks,
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


@pytest.mark.parametrize("name", EDITS)
def test_the_readme_names_the_function_or_option_of_an_edit(name):
    place = EDITS[name].place
    if place not in README and place in ("add_policies", "reward_by_task", "--scale"):
        pytest.xfail(f"the README does not name {place} yet")
    assert place in README


@pytest.mark.parametrize("name", [name for name in EDITS if EDITS[name].patches])
def test_an_edit_lies_in_the_function_that_is_named(name):
    patch = EDITS[name].patches[0]
    text = (HERE.parent / patch.script).read_text("utf-8")
    functions = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = ast.get_source_segment(text, node)
    assert patch.old.strip() in functions[EDITS[name].place]


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
    axes = {axes.title: axes for axes in Figure.last.axes}["reward/best/remove"]
    records = [record for record in log(folder) if "reward/best/remove" in record]
    assert axes.line == {record["epoch"]: record["reward/best/remove"] for record in records}
    assert all(record["reward/best/remove"] >= record["reward/task/remove"] for record in records)
    assert records


# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Command:
    """A call of a script that the README shows."""

    script: str  # its path in the repository
    words: tuple[str, ...]  # what follows it, but for a `...` and --help

    @property
    def what(self):
        """The script, and what it is told to do, if it does several things."""
        is_named = self.words and re.fullmatch("[a-z]+", self.words[0])
        return f"{self.script} {self.words[0]}" if is_named else self.script

    def option(self, name):
        """The word that follows an option; None without it."""
        if name in self.words:
            return self.words[self.words.index(name) + 1]


def shell_lines(text):
    """The lines of a README's bash blocks, cut at && and without comments: each a list of words."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            lines += split_at(words, "&&")
    return [line for line in lines if line]


def split_at(words, mark):
    parts = [[]]
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def inline_lines(text):
    """The commands in the README's sentences and tables, and in blocks without a language."""
    starts = r"(?:python|accelerate launch) "
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = re.findall(rf"`({starts}[^`]+)`", " ".join(prose.split()))
    found += re.findall(rf"^ {{4}}({starts}.*)$", prose.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line) for line in found]


def commands(text):
    """The README's calls of our scripts."""
    found = []
    for line in shell_lines(text) + inline_lines(text):
        while "=" in line[0]:  # a variable of the environment
            line = line[1:]
        if line[:2] == ["accelerate", "launch"]:
            launch = launch_command_parser().parse_args(line[2:])  # checks its own options, too
            line = ["python", launch.training_script, *launch.training_script_args]
        if line[0] == "python" and line[1].endswith(".py"):
            found.append(Command(line[1], without_dots(line[2:])))
    return found


def without_dots(words):
    """The words but for brackets, and for a `...` that stands for others, not for a value."""
    kept = []
    for word in words:
        word = word.strip("[]")
        is_value = kept and kept[-1].startswith("--")
        if word != "--help" and (word != "..." or is_value):
            kept.append(word)
    return tuple(kept)


COMMANDS = commands(README)

# What runs each command in a form of seconds.
RUN_BY = {
    "train_nft.py": "test_train_nft.py: test_a_run_moves_the_lora_and_writes_what_it_promises",
    "sample.py": "test_sample.py: test_the_command_draws_base_and_trained_side_by_side",
    "reward_mllm.py": "test_reward.py: test_the_command_prints_one_fact_a_line",
    "reward_mllm.py requirements": (
        "test_served_judge.py: test_a_judge_writes_the_requirements_that_nobody_wrote"
    ),
    "reward_mllm.py propose": (
        "test_propose.py: test_a_folder_of_pictures_becomes_a_dataset_that_check_finds_faultless"
    ),
    "evaluate.py imgedit": (
        "test_evaluate.py: test_trained_base_and_source_are_drawn_judged_and_compared"
    ),
    "evaluate.py gedit": (
        "test_evaluate.py: test_gedit_asks_twice_and_keeps_languages_and_rows_of_one_key_apart"
    ),
    "evaluate.py heldout": (
        "test_evaluate.py: test_a_held_out_set_is_scored_by_the_judge_and_by_the_oracle"
    ),
    "evaluate.py compare": "test_evaluate.py: test_a_verdict_says_how_much_of_the_source_is_kept",
    "evaluate.py seeds": ("test_evaluate.py: test_seeds_are_a_mean_and_a_spread_and_not_more_rows"),
    "evaluate.py agree": "test_evaluate.py: test_agree_prints_a_line_for_a_strategy",
    "evaluate.py curves": (
        "test_evaluate.py: test_curves_draw_the_mean_of_runs_and_the_band_between_them"
    ),
    "data_prep.py check": (
        "test_data_prep.py: test_check_finds_exact_resized_and_recompressed_benchmark_pictures"
    ),
    "data_prep.py import": "test_import.py: test_what_is_imported_passes_the_check",
    "data_prep.py toy": "test_data_prep.py: test_both_models_load_as_from_the_hub",
    "tests/ablations.py": (
        "test_ablations.py: test_a_run_goes_on_where_it_was_and_a_finished_one_is_not_run_again"
    ),
    "tests/bench_epoch.py": ("test_bench_epoch.py: test_the_counting_command_prints_both_tables"),
    "tests/full_size.py": "test_full_size.py: test_measured_tiny_editors_make_a_row",
    "tests/toy_ratings.py": (
        "test_data_prep.py: test_a_toy_that_is_too_bad_to_learn_from_is_said_in_one_line"
    ),
    "tests/kill_train.py": (
        "test_resume.py: test_a_run_ended_again_and_again_ends_with_the_same_bits"
    ),
}


WITHOUT_OPTIONS = ("evaluate.py compare", "evaluate.py seeds", "tests/toy_ratings.py")


class Parsed(Exception):
    """The command line was understood."""


def understand(command, patch):
    """Lets a script read a command line, and goes no further."""
    path = Path(command.script)
    script = importlib.import_module(path.stem)
    parse_settings = getattr(script, "parse_settings", None)
    parse_args = argparse.ArgumentParser.parse_args

    def settings_alone(*args, **defaults):
        parse_settings(*args, **defaults)
        raise Parsed

    def arguments_alone(parser, words=None):
        parse_args(parser, command.words)
        raise Parsed

    if command.what.split()[1:] == list(command.words):  # a name in a sentence, no whole call
        return
    if command.what in WITHOUT_OPTIONS:
        assert not any(word.startswith("-") for word in command.words)
        return
    with pytest.raises(Parsed):
        if parse_settings:
            patch.setattr(script, "parse_settings", settings_alone)
            script.main(list(command.words))
        else:
            patch.setattr(argparse.ArgumentParser, "parse_args", arguments_alone)
            script.main()


def test_the_readme_shows_commands():
    assert {"train_nft.py", "sample.py"} < {command.what for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.what)
def test_a_command_of_the_readme_is_understood_by_its_script(command, monkeypatch):
    understand(command, monkeypatch)


@pytest.mark.parametrize(
    "script, option", [("train_nft.py", "--groupz"), ("tests/ablations.py", "--epoch")]
)
def test_a_command_with_an_option_that_is_none_would_be_found(script, option, monkeypatch):
    with pytest.raises(BadInput, match=option):
        understand(Command(script, (option, "3")), monkeypatch)


def test_what_the_readme_shows_is_found_in_blocks_sentences_and_tables():
    text = """```bash
pip install x && A=1 accelerate launch --num_processes 2 train_nft.py ... --shard   # why
python evaluate.py gedit \\
    --language both
```
See `python tests/kill_train.py
--kills 3 [--seed 1]`.

    python reward_mllm.py --prompt "a b"
"""
    assert commands(text) == [
        Command("train_nft.py", ("--shard",)),
        Command("evaluate.py", ("gedit", "--language", "both")),
        Command("tests/kill_train.py", ("--kills", "3", "--seed", "1")),
        Command("reward_mllm.py", ("--prompt", "a b")),
    ]


@pytest.mark.parametrize("what", sorted({command.what for command in COMMANDS}))
def test_a_test_runs_each_command_of_the_readme_in_a_small_form(what):
    assert what in RUN_BY, "name in RUN_BY the test that runs it"
    file, test = RUN_BY[what].split(": ")
    assert f"\ndef {test}(" in (HERE / file).read_text("utf-8")


def test_ci_runs_the_commands_of_the_readme_that_are_not_ours():
    ci = (HERE.parent / ".ci" / "run").read_text("utf-8")
    ours = ("python", "accelerate")
    for words in shell_lines(README):
        if words[0] not in ours or words[1] == "-m":
            line = " ".join(words).replace("pip install", "pip install -q")
            assert line in ci


# ---------------------------------------------------------------- files, rows, functions


@pytest.fixture(scope="module")
def toy_files(tmp_path_factory):
    """The rows and pictures of the toy, and the names of its models."""
    folder = tmp_path_factory.mktemp("place") / "data" / "toy"
    data_prep.write_rows(folder, data_prep.ToySettings())
    for name in ("editor", "judge"):
        (folder / name).mkdir()
    return folder.parents[1]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.what)
def test_the_files_that_a_command_names_are_the_toys(command, toy_files):
    assert (HERE.parent / command.script).is_file()
    for word in command.words:
        word = word.removeprefix("local:")
        if word.startswith("data/"):
            assert (toy_files / word).exists()
        if word.startswith("runs/toy/checkpoint-"):
            assert word == f"runs/toy/checkpoint-{train_nft.TOY['epochs']}"
        if word.startswith("tests/"):
            assert (HERE.parent / word.partition(":")[0]).is_file()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.what)
def test_a_toys_picture_is_shown_with_its_own_instruction(command, toy_files):
    picture = command.option("--image") or command.option("--source") or ""
    if picture.startswith("data/toy/"):
        rows = data_prep.read_rows(toy_files / "data" / "toy", "test")
        prompts = {Path(row["images"][0]).name: row["prompt"] for row in rows}
        assert command.option("--prompt") == prompts[Path(picture).name]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_a_function_of_the_readme_serves_as_a_judge(block, tmp_path):
    (tmp_path / "reward.py").write_text(block)
    name = re.search(r"def (\w+)\(row, sources, edits\)", block)[1]
    settings = reward_mllm.JudgeSettings(judge=f"{tmp_path}/reward.py:{name}")
    source = Image.new("RGB", (32, 32))
    scores = reward_mllm.load_judge(settings).score({"prompt": "p"}, [source], [source] * 2)
    assert len(scores.score) == 2 and scores.causes == ["", ""]


@pytest.mark.parametrize("block", re.findall(r"```json\n(.*?)```", README, re.DOTALL))
def test_rows_of_the_readme_are_rows(block, tmp_path):
    for line in block.splitlines():
        images = json.loads(line)["image"]
        for name in [images] if isinstance(images, str) else images:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(tmp_path / name)
    (tmp_path / "train.jsonl").write_text(block)
    assert len(data_prep.read_rows(tmp_path, "train")) == len(block.splitlines())


# ---------------------------------------------------------------- options in sentences

# Of pip, accelerate, vLLM, SGLang and git, which the README names beside ours.
FOREIGN = """index-url cpu num_processes multi_gpu num_machines machine_rank main_process_ip
main_process_port host port tensor-parallel-size max-model-len limit-mm-per-prompt max-logprobs
logprobs-mode generation-config enable-multimodal sampling-defaults"""


def known_options():
    """The names of all options of all scripts, those under tests/ included."""
    known = set(FOREIGN.split())
    for path in [*HERE.parent.glob("*.py"), *HERE.glob("*.py")]:
        text = path.read_text("utf-8")
        known |= set(re.findall(r"^    (\w+): [^=\n]+ = \w+\(", text, re.MULTILINE))
        known |= set(re.findall(r'add_argument\(\s*"--(\w+)"', text))
    known |= {f"no_{name}" for name in known}  # switches that are on by default
    return known


def test_every_option_that_the_readme_names_exists():
    named = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", README)) - {"help", "check"}
    assert named <= known_options(), named - known_options()
