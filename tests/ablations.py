"""What each part of the method does: variants of it on the toy, several seeds each, as a table.

python tests/ablations.py [--epochs 40] [--seeds 0 1 2] [--only NAME ...] [--jobs N]
python tests/ablations.py --table           # what is there already; nothing is run

Needs the toy (python data_prep.py toy). A variant is a few flags of train_nft.py, or a patch of at
most three lines of a copy of the scripts, which OUT/NAME/scripts keeps. Every draw is seeded by its
name, so runs with one seed see the same rows and noises, and variants are compared row by row.
The same command goes on where it was stopped, and runs again what failed; OUT/NAME/seed-N.txt is
what a run said. At the end OUT/table.md and a picture of each variant's curves are written.
"""

import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product, repeat
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data_prep import (  # noqa: E402  the scripts lie one folder above
    BadInput,
    CheckedSettings,
    ToySettings,
    build_toy,
    catch_signals,
    locked,
    paired_gain,
    parse_settings,
    read_json,
    read_json_lines,
    run_script,
    say,
    setting,
    whole_file,
    whole_folder,
    write_json,
)
from evaluate import curves  # noqa: E402

SCRIPTS = ("data_prep.py", "sample.py", "reward_mllm.py", "train_nft.py", "evaluate.py")
LATE = 10  # epochs at the end whose mean stands for norm ratio and PSNR

# ---------------------------------------------------------------- variants


@dataclass(frozen=True)
class Patch:
    """A change of a script's text, which has the old lines exactly once."""

    script: str
    old: str
    new: str


@dataclass(frozen=True)
class Variant:
    """A change of the toy's training."""

    flags: str = ""
    patch: Patch | None = None
    epochs: int = 1  # so many times the epochs, where one draws less
    policy: str = "new"  # the one that is evaluated


VARIANTS = {
    "default": Variant(),
    # filter
    "filter-released": Variant("--filter released"),
    "filter-none": Variant("--filter none"),
    # loss
    "no-negative": Variant(
        patch=Patch(
            "train_nft.py", "return (r * pos + (1 - r) * neg) / beta", "return r * pos / beta"
        )
    ),
    "beta-0.1": Variant("--nft_beta 0.1"),
    "kl-0": Variant("--kl_weight 0"),
    "kl-1e-4": Variant("--kl_weight 1e-4"),
    "kl-1e-4-hinge": Variant("--kl_weight 1e-4 --norm_hinge 10"),
    # advantages
    "std-per-group": Variant("--scale group"),
    "psnr": Variant("--judge_aspects psnr=0.3"),
    "psnr-normalised": Variant("--judge_aspects psnr=0.3 --normalise_aspects"),
    "4-copies": Variant("--group_size 4"),
    "4-copies-of-48-rows": Variant("--group_size 4 --groups 48"),
    # rollout
    "euler": Variant("--solver_order 1"),
    "old-is-new": Variant("--decay_max 0"),
    "old-is-slow": Variant("--decay_rate 1 --decay_max 0.9"),
    "decay-late": Variant("--decay_rate 0.02 --decay_start 10"),
    "ema": Variant("--ema_decay 0.9", policy="ema"),
    # judge
    "judge-sampled": Variant("--judge_strategy sampled"),
    "judge-worse": Variant("--judge tests/ablation_run.py:worse"),
    "judge-hacked": Variant("--judge tests/ablation_run.py:brightness --judge_check false"),
    # learning rate, and edits a step
    "lr-6e-3": Variant("--lr 6e-3"),
    "lr-warm-up": Variant(
        patch=Patch(
            "train_nft.py",
            'record = {"epoch": epoch + 1}\n',
            'record = {"epoch": epoch + 1}\n'
            "        warm_up = min(1, (epoch + 1) / 10)\n"
            '        run.optimizer.param_groups[0]["lr"] = settings.lr * warm_up\n',
        )
    ),
    "8-rows": Variant("--groups 8", epochs=2),
    "8-rows-lr-6e-3": Variant("--groups 8 --lr 6e-3", epochs=2),
}


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Which variants, and how long."""

    epochs: int = setting(40, "Epochs of a run.", at_least=1)
    seeds: list[int] = setting([0, 1, 2], "Seeds of the runs.", at_least=0)
    only: list[str] = setting([], f"Of the variants: {', '.join(VARIANTS)}. [all]")
    out: str = setting("runs/ablations", "Where runs, table and pictures go.")
    jobs: int | None = setting(None, "Runs side by side. [the cores]", at_least=1)
    flags: str = setting("", "More flags for all runs, in one word: --flags='--lr 6e-3'.")
    table: bool = setting(False, "Only make the table of what is there.")

    def __post_init__(self):
        super().__post_init__()
        unknown = set(self.only) - VARIANTS.keys()
        if unknown:
            raise BadInput(f"--only {' '.join(unknown)}: take some of {', '.join(VARIANTS)}")


# ---------------------------------------------------------------- runs


@dataclass
class Run:
    """A variant's training with one seed."""

    name: str
    seed: int
    variant: Variant
    settings: Settings

    @property
    def folder(self) -> Path:
        return Path(self.settings.out, self.name, f"seed-{self.seed}")

    @property
    def epochs(self) -> int:
        return self.settings.epochs * self.variant.epochs

    def words(self) -> list[str]:
        """The command line of its train_nft.py."""
        quarter = max(1, self.epochs // 4)
        words = f"--seed {self.seed} --epochs {self.epochs} --resume auto"
        words += f" --eval_every {quarter} --save_every {quarter}"
        words += f" {self.settings.flags} {self.variant.flags}"  # the last of two counts
        # so that a judge is found from any folder
        words = [word.replace("tests/", f"{HERE}/") for word in words.split()]
        return [*words, "--out", str(self.folder)]

    def log(self) -> list[dict]:
        """What is logged so far."""
        file = self.folder / "log.jsonl"
        if not file.exists():
            return []
        # with a list for faults, a last line that a crash cut short is passed over
        return [record for _, record in read_json_lines(file, faults=[])]

    def done(self) -> int:
        """The epochs that are logged so far."""
        log = self.log()
        return log[-1]["epoch"] if log else 0

    def is_finished(self) -> bool:
        """Whether it has its epochs, no fewer and no more, or has ended by itself."""
        return self.done() == self.epochs or self.has_ended()

    def has_ended(self) -> bool:
        """Whether the training stopped itself: it did harm, or nothing was left to learn from."""
        said = self.folder.with_suffix(".txt")
        if not said.exists():
            return False
        last = said.read_text("utf-8").rstrip().rpartition("\n")[2]
        return last.startswith(("error: three steps in a row", "error: nothing was kept"))


def write_scripts(run: Run):
    """The variant's own copy of the scripts. It stays as it was when the variant was begun."""
    folder = Path(run.settings.out, run.name)
    patch = run.variant.patch
    recipe = {"flags": run.variant.flags, "more": run.settings.flags, "patch": "", "scripts": ""}
    if patch:
        recipe["patch"] = f"{patch.script}: {patch.old} -> {patch.new}"
    if (folder / "scripts").exists():
        begun = read_json(folder / "scripts" / "recipe.json")
        if begun | {"scripts": ""} != recipe:
            raise BadInput(f"{folder}: was begun as {begun}, not {recipe}; move it away")
        return
    texts = {name: (HERE.parent / name).read_text("utf-8") for name in SCRIPTS}
    recipe["scripts"] = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:8]
    if patch:
        texts[patch.script] = patched(texts[patch.script], patch)
    with whole_folder(folder / "scripts") as part:
        for name, text in texts.items():
            (part / name).write_text(text, "utf-8")
        write_json(part / "recipe.json", recipe)


def patched(text: str, patch: Patch) -> str:
    """A script's text with the patch's new lines; BadInput unless the old ones are there once."""
    found = text.count(patch.old)
    if found != 1:
        raise BadInput(f"{patch.script}: has {found} times {patch.old!r}, not once; mend the patch")
    return text.replace(patch.old, patch.new)


def train(run: Run, stop: threading.Event):
    """Runs a training to its end, or until it is told to stop."""
    if stop.is_set():
        return
    begun = time.time()
    scripts = Path(run.settings.out, run.name, "scripts")
    command = [sys.executable, str(HERE / "ablation_run.py"), str(scripts), *run.words()]
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
    run.folder.mkdir(parents=True, exist_ok=True)
    said = run.folder.with_suffix(".txt")
    with said.open("a") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | one_thread
        )
    while process.poll() is None and not stop.wait(0.2):
        pass
    if process.poll() is None:
        process.terminate()  # it keeps its finished epochs
    process.wait()
    how = f"{run.done()} of {run.epochs} epochs, {time.time() - begun:.0f} s"
    if run.done() < run.epochs:
        how += f"; see {said}"
    say(f"{run.name}, seed {run.seed}: {how}")


def train_all(runs: list[Run], settings: Settings):
    """Trains what is not finished, so many at a time as there are cores."""
    stop = catch_signals()
    build_toy(ToySettings())
    for run in runs:
        write_scripts(run)
    todo = [run for run in runs if not run.is_finished()]
    say(f"{len(runs) - len(todo)} of {len(runs)} runs are finished; {len(todo)} to go")
    with ThreadPoolExecutor(settings.jobs or os.cpu_count()) as pool:
        list(pool.map(train, todo, repeat(stop)))  # a list, so that errors come through
    if stop.is_set():
        say("stopped; the same command goes on")


# ---------------------------------------------------------------- the table

COLUMNS = {
    "variant": "the change",
    "success": "held-out success by the oracle in %, with its 95 % interval over rows",
    "seeds": "lowest to highest of the seeds",
    "against default": "success less the default's in points, paired by row, with its interval",
    "oracle": "held-out score by the oracle",
    "judge": "held-out score by the run's own judge",
    "gap": "judge less oracle",
    "norm": f"|v_new| / |v_base| in the last {LATE} epochs",
    "PSNR": f"of rollouts to their sources in the last {LATE} epochs, in dB",
    "edits": "drawn in training; a run that stopped itself is shown as last evaluated",
    "seconds": "of a run on one core, without start and evaluations",
}


@dataclass
class Finished:
    """What the table needs of a run."""

    rows: list[dict]  # the last held-out evaluation, a dict for each row
    norm: float
    psnr: float
    edits: int
    seconds: float


def read_run(run: Run) -> Finished:
    log = run.log()
    kept = run.folder / f"heldout-{run.variant.policy}.jsonl"
    rows = [row for _, row in read_json_lines(kept)]
    config = read_json(run.folder / "config.json")
    seconds = 0.0
    for record in log:
        seconds += sum(value for key, value in record.items() if key.startswith("seconds/"))
    return Finished(
        # Seeds differ in their noises, not in their rows, which the intervals resample.
        rows=sorted(rows, key=lambda row: row["row"]),
        norm=late_mean(log, "update/norm_ratio"),
        psnr=late_mean(log, "reward/psnr"),
        edits=config["groups"] * config["group_size"] * run.done(),
        seconds=seconds,
    )


def late_mean(log: list[dict], key: str) -> float:
    """The mean of the last epochs that have it; NaN where none has."""
    values = [record[key] for record in log[-LATE:] if key in record]
    return np.mean(values) if values else np.nan


def table_row(runs: dict[int, Finished], default: dict[int, Finished]) -> list[str]:
    """A variant's cells after its name, from the finished runs of it and of the default by seed."""
    rows = sum([run.rows for run in runs.values()], [])
    nothing = [{"row": row["row"], "success": 0.0} for row in rows]
    success = paired_gain(nothing, rows, "success")
    by_seed = [np.mean([row["success"] for row in run.rows]) for run in runs.values()]
    oracle, judge = (np.nanmean([row[key] for row in rows]) for key in ("oracle", "judge"))
    return [
        f"{100 * success['now']:.1f} ({100 * success['low']:.1f} to {100 * success['high']:.1f})",
        f"{100 * min(by_seed):.1f} to {100 * max(by_seed):.1f}",
        difference(runs, default),
        f"{oracle:.3f}",
        f"{judge:.3f}",
        f"{judge - oracle:+.3f}",
        *(mean_cell(runs, name, form) for name, form in (("norm", "{:.2f}"), ("psnr", "{:.1f}"))),
        *(mean_cell(runs, name, "{:,.0f}") for name in ("edits", "seconds")),
    ]


def difference(runs: dict[int, Finished], default: dict[int, Finished]) -> str:
    """Success of a variant less the default's, over the seeds that both have."""
    seeds = runs.keys() & default.keys()
    if runs is default or not seeds:
        return ""
    now = sum([runs[seed].rows for seed in sorted(seeds)], [])
    before = sum([default[seed].rows for seed in sorted(seeds)], [])
    gain = paired_gain(before, now, "success")
    return f"{100 * gain['gain']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"


def mean_cell(runs: dict[int, Finished], name: str, form: str) -> str:
    mean = np.mean([getattr(run, name) for run in runs.values()])
    return "" if np.isnan(mean) else form.format(mean)


def change_of(variant: Variant) -> str:
    """A variant's flags or new lines, in markdown."""
    parts = []
    if variant.flags:
        parts.append(f"`{variant.flags}`")
    if variant.patch:
        added = [line for line in variant.patch.new.splitlines() if line not in variant.patch.old]
        lines = [f"`{line.strip()}`" for line in added]
        parts.append(f"{variant.patch.script}: {' '.join(lines)}")
    if variant.policy != "new":
        parts.append(f"the policy {variant.policy} evaluated")
    if variant.epochs > 1:
        parts.append(f"{variant.epochs} times the epochs")
    return ", ".join(parts)


def make_table(runs: list[Run]) -> str:
    """The table of the runs that are finished, and the names of the others."""
    found = {}  # variant -> seed -> Finished
    missing = []
    for run in runs:
        if run.is_finished():
            found.setdefault(run.name, {})[run.seed] = read_run(run)
        else:
            missing.append(f"{run.name}, seed {run.seed}")
    default = found.get("default", {})
    lines = [f"| {' | '.join(['variant', 'change', *list(COLUMNS)[1:]])} |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for name, by_seed in found.items():
        cells = [name, change_of(VARIANTS[name]), *table_row(by_seed, default)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {meaning}" for name, meaning in COLUMNS.items())]
    if missing:
        lines.append(f"- missing: {'; '.join(missing)}")
    lines += old_and_new(runs)
    return "\n".join(lines) + "\n"


def old_and_new(runs: list[Run]) -> list[str]:
    """A line of the table where its variants were not begun with the same scripts."""
    names = {}  # hash -> variants
    for run in runs:
        file = Path(run.settings.out, run.name, "scripts", "recipe.json")
        if file.exists():
            names.setdefault(read_json(file)["scripts"], set()).add(run.name)
    if len(names) < 2:
        return []
    parts = [f"{key}: {', '.join(sorted(some))}" for key, some in names.items()]
    return [f"- begun with different scripts, {'; '.join(parts)}"]


def draw_pictures(runs: list[Run]):
    """A picture of each variant's curves, its seeds as a band."""
    folders = {}
    for run in runs:
        if run.is_finished():
            folders.setdefault(run.name, []).append(str(run.folder))
    for name, some in folders.items():
        curves([*some, "--out", str(Path(runs[0].settings.out, f"{name}.png"))])


def main(argv: list[str] | None = None):
    settings = parse_settings(Settings, argv, __doc__.splitlines()[0])
    # All variants with the first seed, then all with the second: a first table stands early.
    runs = []
    for seed, name in product(settings.seeds, VARIANTS):
        runs.append(Run(name, seed, VARIANTS[name], settings))
    if not settings.table:
        with locked(settings.out):
            wanted = [run for run in runs if run.name in (settings.only or VARIANTS)]
            train_all(wanted, settings)
    table = make_table(runs)
    with whole_file(Path(settings.out, "table.md")) as part:
        part.write_text(table, "utf-8")
    print(table)
    draw_pictures(runs)


if __name__ == "__main__":
    run_script(main)
