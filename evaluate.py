"""Scores an editor on ImgEdit-Bench, GEdit-Bench or a held-out set of one's own: draws, asks a judge, adds up.

    python evaluate.py imgedit --bench DIR --base MODEL [--lora DIR] --judge http://HOST/v1 --judge_model NAME --out RUN
    python evaluate.py gedit ... --language both         # and heldout, for the test split of a dataset folder
    python evaluate.py compare RUN_A RUN_B               # the paired difference with its interval, in words

Three stages, each resumable, each alone with --stage: `sample` writes the edits in the benchmark's own layout, `judge`
appends every call as a JSON line, `score` adds those up. `accelerate launch` splits the rows over processes. A subject is
whose edits are scored: trained (with --lora), base, edits (--edits, made by anything), source (nothing done).

Departures from the benchmarks' own scripts, undone by --mode official:
1. Every sensible spelling of a score is understood, and its range is checked.
2. An answer without a score, a failed call and a missing edit count at the floor (1 or 0) instead of going unseen.
3. Means are not rounded on the way.
Never reproduced: random scores for answers that cannot be read, endless retries, rows that count twice.
"""

import ast
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data_prep import (
    BadInput,
    bootstrap,
    inside,
    load_image,
    oracle,
    parse_settings,
    picture_grid,
    read_rows,
    read_table,
    run_script,
    spearman,
    whole_file,
)
from reward_mllm import STRATEGIES, TOY, JudgeFailure, JudgeSettings, load_judge
from sample import add_policies, load_editor, policy, rollout


def short_hash(content):
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[
        :8
    ]


METRICS = {
    "imgedit": ("score",),
    "gedit": ("O", "SC", "PQ"),
    "heldout": ("judge", "oracle", "success"),
}  # the main one first
CALLS = {"imgedit": ("edit",), "gedit": ("SC", "PQ"), "heldout": ("judge",)}  # questions on an edit
MISSING = "no edit"  # the failure of an edit that is not there

# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings(JudgeSettings):
    """Defaults are the benchmarks' own sampling: 28 steps, seed 42, native size, the family's guidance."""

    benchmark: Literal["imgedit", "gedit", "heldout"] = HfArg(
        default="imgedit", help="Also the first word."
    )
    bench: str = HfArg(
        default="", help="The benchmark's folder, or a dataset folder with test.jsonl."
    )
    base: str = HfArg(default="", help="The editor, a hub id or folder.")
    lora: str = HfArg(default="", help="Its LoRA: RUN/checkpoint-N.")
    edits: str = HfArg(
        default="",
        help="A folder of finished edits in the benchmark's layout, instead of an editor.",
    )
    baselines: list[str] = HfArg(
        default_factory=list, help="Scored beside it: source (nothing done), base (no LoRA)."
    )
    out: str = HfArg(default="runs/eval", help="The folder for edits, calls, scores and report.")
    stage: Literal["all", "sample", "judge", "score"] = HfArg(
        default="all", help="One stage alone."
    )
    mode: Literal["strict", "official"] = HfArg(
        default="strict", help="How answers are read and means taken."
    )
    language: Literal["en", "cn", "both"] = HfArg(default="en", help="GEdit's rows.")
    prompts: str = HfArg(
        default="", help="judge_prompt.json or vie_prompts.py, where they are not in --bench."
    )
    name: str = HfArg(default="", help="What the table calls the model. [base and LoRA]")
    steps: int = HfArg(default=28, help="Solver steps.")
    seed: int = HfArg(default=42, help="Seed of each row's first edit.")
    copies: int = HfArg(
        default=1, help="Edits of each row, with the seeds that follow, in one pipeline call."
    )
    guidance: float | None = HfArg(
        default=None, help="Guidance scale. [the family's for evaluation]"
    )
    resolution: int | None = HfArg(
        default=None, help="Square root of the working pixels. [the model's own]"
    )

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.baselines) - {"source", "base"}:
            raise BadInput(
                f"--baselines {' '.join(unknown)}: not a baseline; there are source and base"
            )
        if self.steps < 1 or self.copies < 1:
            raise BadInput(
                f"--steps {self.steps} --copies {self.copies}: nothing to draw; give at least 1 of each"
            )


DRAWN = (
    "benchmark",
    "bench",
    "base",
    "lora",
    "edits",
    "steps",
    "seed",
    "copies",
    "guidance",
    "resolution",
    "language",
)

# ---------------------------------------------------------------- reading an answer

WITHIN = r"(?m:^|[,;{(|.])"


def parse_imgedit(reply, mode="strict"):
    """The list of scores in an answer of ImgEdit's judge; None where there are none.

    strict: three differently labelled ones, from 1 to 5. official: what is digits alone after a line's one ": ".
    """
    if mode == "official":
        pairs = [line.strip().split(": ") for line in reply.splitlines()]
        return [int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()] or None
    for start in (r"(?m:^)", WITHIN):  # at the start of lines; else also within them
        scores = _labelled(reply.rpartition("</think>")[2], start, 5)
        if len(scores) == 3:
            return scores if all(1 <= score <= 5 for score in scores) else None
    return None


def parse_gedit(reply, mode="strict"):
    """The list of scores in an answer of GEdit's judge (VIEScore); None where there are none.

    strict: two from 0 to 10, out of JSON or what nearly is, or labelled. official: what the official parser reads, any
    number of them and of any size, but None where it would draw a random score.
    """
    if mode == "official":
        return _official_gedit(reply)
    text, found = reply.rpartition("</think>")[2], []
    for start in (match.start() for match in re.finditer("{", text)):
        try:
            value = json.JSONDecoder(strict=False).raw_decode(text, start)[0]
            found += [value[key] for key in ("score", "scores") if isinstance(value.get(key), list)]
        except ValueError:
            pass
    if not found:  # quotes inside the reasoning, single quotes, an answer cut short
        found = re.findall(r"(?i)scores?[\"']?\s*[:=]\s*[\"']?[\[(]([^\])]*)[\])]", text)
        found = found or re.findall(r"^\s*\[?((?:[\d./\s]+,)+[\d./\s]+)\]?\s*$", text)
        found = [values.split(",") for values in found]
    numbers = [
        re.fullmatch(r"\s*[\"']?(\d+(?:\.\d+)?)(?:\s*/\s*10)?[\"']?\s*", str(value))
        for value in (found or [[]])[-1]
    ]
    scores = [float(number[1]) for number in numbers if number] if all(numbers) else []
    scores = scores if found else _labelled(text, WITHIN, 10)
    return scores if len(scores) == 2 and all(0 <= score <= 10 for score in scores) else None


def _labelled(text, start, top):
    """The values of `label: 4`, `**Label** - 4/5`, `| label | 4.0 |` ..., the last of each label, in order."""
    text = re.sub(r"[*`\"“”]", "", text)
    end = rf"\s*(?:/\s*{top}\b|(?:out )?of {top}\b|points?\b|stars?\b)?(?=\s*(?:[,;.|(){{}}\n]|$)|\s+[-–—]\s)"
    label = r"\W*?(?:\d+[.)]\s*)?([^\W\d][\w &/()'’-]{1,60}?)(?:\s*[:：=|]+|\s+[-–—]|\s+is\b)\s*"
    found = re.findall(rf"{start}{label}(\d+(?:\.\d+)?)(?!\.?\d){end}", text)
    unwanted = re.compile(r"(?i)reason|overall|average|total|final|expla|analysis|rationale")
    return list(
        {
            key.strip().lower(): float(value) for key, value in found if not unwanted.search(key)
        }.values()
    )


def _official_gedit(reply):
    """What VIEScore's parser reads: between two delimiters or the outer braces, mended where it is not JSON."""
    mark, attempts = "||V^=^V||", (str, _mended)
    if reply.count(mark) == 2:
        text = reply[reply.find(mark) + len(mark) : reply.rfind(mark)]
    elif "{" in reply and "}" in reply:
        text = reply[reply.find("{") : reply.rfind("}") + 1]
    else:
        text = reply[reply.find("[") : reply.rfind("]") + 1] if "[" in reply else ""
        text = (
            text
            if re.match(r"\[\d+, ?\d+\]$", text)
            else reply
            if re.fullmatch(r"\s*\+?0*(?:\d|10)\s*", reply)
            else ""
        )
        text, attempts = f'{{"score": {text}}}', (str,)
    for attempt in attempts:
        try:
            value = json.loads(attempt(text.strip().replace("\n", "")))["score"]
            scores = value if isinstance(value, list) or attempt is _mended else [value]
            return scores if math.isfinite(min(scores)) else None
        except (ValueError, KeyError, TypeError):
            pass
    return None


def _mended(text):
    """Quotes round bare keys and values, brackets round lone numbers, as VIEScore mends what is not JSON."""

    def value(pair):
        body = pair[2].strip()
        if re.match(r"-?\d+(?:\.\d+)?$", body):
            body = f"[{body}]"
        elif body.lower() not in ("true", "false", "null"):
            body = f'"{body}"'
        return f"{pair[1]}: {body}{pair[3]}"

    return re.sub(r'("[^\n]*?"):([^\n]*?)([,}])', value, re.sub(r"(\w+)(?=:)", r'"\1"', text))


# ---------------------------------------------------------------- adding up


def score_imgedit(records, mode="strict"):
    """ImgEdit-Bench's result from the judge's calls: {"rows": [one dict a row], "groups": {"all": data_prep.tabulate's}}.

    records: dicts with `row`, `task`, `source`, and `reply` or `failure`; a row's last one counts. A row's score is the
    mean of its three, the floor is 1. official: rounded to 2 digits, as are the tasks'.
    """
    rows, digits = [], 2 if mode == "official" else None
    for record in {record["row"]: record for record in records}.values():
        marks = parse_imgedit(record.get("reply") or "", mode)
        score = sum(marks) / len(marks) if marks else None
        rows.append(
            _row(
                record,
                mode,
                1.0,
                score=score if score is None or digits is None else round(score, digits),
            )
        )
    return {"rows": rows, "groups": grouped(rows, METRICS["imgedit"], digits)}


def score_gedit(records, mode="strict"):
    """GEdit-Bench's result from the judge's calls, as score_imgedit; groups are `en`, `en intersection`, `cn` ...

    records: dicts with `row`, `call` ("SC" or "PQ"), `task`, `source`, `language`, `intersection`, and `reply` or
    `failure`. A row's SC and PQ are the lower of their two scores, O is sqrt(SC PQ); the floor is 0.
    """
    calls, rows = {}, []
    for record in records:
        calls.setdefault(record["row"], {})[record["call"]] = record
    for both in calls.values():
        marks = {
            call: parse_gedit(both.get(call, {}).get("reply") or "", mode)
            for call in CALLS["gedit"]
        }
        low = {call: min(scores) if scores else None for call, scores in marks.items()}
        whole = None not in low.values() and low["SC"] * low["PQ"] >= 0
        rows.append(
            _row(
                next(iter(both.values())),
                mode,
                0.0,
                O=math.sqrt(low["SC"] * low["PQ"]) if whole else None,
                **low,
            )
        )
    return {"rows": rows, "groups": grouped(rows, METRICS["gedit"])}


def score_heldout(records, mode="strict"):
    """A held-out set's result, as score_imgedit: the judge's own score in `scores`; a toy row's oracle in `truth`."""
    rows = []
    for record in {record["row"]: record for record in records}.values():
        truth = record.get("truth") or dict.fromkeys(
            ("oracle", "success") if "target_scene" in record else ()
        )
        rows.append(_row(record, mode, 0.0, judge=(record.get("scores") or [None])[0], **truth))
    return {"rows": rows, "groups": grouped(rows, METRICS["heldout"])}


def _row(record, mode, floor, **metrics):
    """A row's result: a metric without a value gets the floor; official: then the row has no value at all (NaN)."""
    answered = None not in metrics.values()
    if not answered:
        metrics = {key: floor if value is None else value for key, value in metrics.items()}
        metrics = dict.fromkeys(metrics, math.nan) if mode == "official" else metrics
    kept = ("row", "task", "source", "language", "intersection")
    return {key: record[key] for key in kept if key in record} | {"answered": answered} | metrics


def grouped(rows, metrics, digits=None):
    """The tables of the rows of each language and of its intersection subset; of all rows where there is no language."""
    groups = {}
    for row in rows:
        name = row.get("language", "all")
        for group in (name, f"{name} intersection")[: 1 + bool(row.get("intersection"))]:
            groups.setdefault(group, []).append(row)
    return {
        name: tabulate(rows, [key for key in metrics if key in rows[0]], digits)
        for name, rows in groups.items()
    }


def tabulate(rows, metrics, digits=None):
    """Means with 95 % intervals: {"rows", "answered", metric: {"macro": [mean, low, high], "micro": ..., task: ...}}.

    rows: dicts with `task`, `source`, `answered` and the metrics, NaN where there is no value. macro is the mean of the
    tasks' means, micro that of the rows. digits: to which the tasks' means are rounded; None: not. Intervals are
    bootstrapped over source pictures, each with all its rows.
    """
    table = {"rows": len(rows), "answered": sum(row["answered"] for row in rows)}
    for metric in metrics:
        kept = [row for row in rows if not math.isnan(row.get(metric, math.nan))]
        values, tasks, sources = ([row[key] for row in kept] for key in (metric, "task", "source"))
        names, draws = bootstrap(values, tasks, sources)  # (D, T)
        own = [[value for value, task in zip(values, tasks) if task == name] for name in names]
        means = [
            sum(mine) / len(mine) if digits is None else round(sum(mine) / len(mine), digits)
            for mine in own
        ]
        with np.errstate(all="ignore"):
            whole = np.nansum(draws, 1) / (~np.isnan(draws)).sum(
                1
            )  # (D,) over the tasks that were drawn
        every = bootstrap(values, ["all"] * len(values), sources)[1].reshape(-1)
        table[metric] = {"macro": _interval(means, whole), "micro": _interval(values, every)}
        table[metric] |= {
            name: _interval([mean], draws[:, i]) for i, (name, mean) in enumerate(zip(names, means))
        }
    return table


def _interval(values, draws):
    draws = draws[~np.isnan(draws)]
    ends = np.quantile(draws, (0.025, 0.975)).tolist() if len(draws) else [None, None]
    return [sum(values) / len(values) if values else None, *ends]


def paired_differences(a, b, metrics):
    """The tables of a - b over the rows that both results have; the rows' sources are resampled for both at once."""
    other, pairs = {row["row"]: row for row in b}, []
    for row, mate in ((row, other[row["row"]]) for row in a if row["row"] in other):
        both = {key: row[key] - mate[key] for key in metrics if key in row and key in mate}
        pairs.append(row | both | {"answered": row["answered"] and mate["answered"]})
    return grouped(pairs, metrics)


def verdict(difference, a, b):
    """A mean difference [mean, low, high] of a and b in words."""
    mean, low, high = difference
    if low is None:
        return f"too few source pictures to tell {a} from {b}"
    interval = f"{mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
    if low <= 0 <= high:
        return f"no difference between {a} and {b} can be told: {interval}"
    return f"{a} is {'better' if mean > 0 else 'worse'} than {b}: {interval}"


# ---------------------------------------------------------------- benchmarks


def load_benchmark(settings):
    """(rows, prompts, {"sha256", "rows"} of the metadata) of the benchmark; BadInput when it is not what it should be.

    rows: dicts with `row` (its name), `prompt`, `images` (paths), `task`, `source` (whose picture it is), `file` (where
    its edit lies in a subject's folder), and GEdit's `language` and `intersection`. prompts: the judge's, by task or call.
    """
    folder, kind = Path(settings.bench).resolve(), settings.benchmark
    if not settings.bench or not folder.is_dir():
        raise BadInput(f"--bench {settings.bench}: no such folder; name the benchmark's")
    if kind == "heldout":
        rows, prompts, sha = read_rows(folder, "test"), {}, ""
        for i, row in enumerate(rows):
            row |= {
                "row": row["id"],
                "task": row.get("task", "all"),
                "source": row["images"][0],
                "file": f"{i:05}.png",
            }
    elif kind == "imgedit":
        rows, prompts, sha = read_imgedit(folder, settings.prompts)
    else:
        languages = ("en", "cn") if settings.language == "both" else (settings.language,)
        rows, prompts, sha = read_gedit(folder, settings.prompts, languages, settings.out)
    if gone := [row for row in rows if not Path(row["images"][0]).is_file()]:
        raise BadInput(
            f"{gone[0]['images'][0]}: the picture of row {gone[0]['row']} is not there, nor {len(gone) - 1} others; "
            "put the pictures beside the metadata"
        )
    said = json.dumps([[row["row"], row["prompt"], row["task"]] for row in rows])
    return (
        rows,
        prompts,
        {"sha256": sha or hashlib.sha256(said.encode()).hexdigest(), "rows": len(rows)},
    )


BENCHMARK_TASKS = {
    "imgedit": (
        "add",
        "adjust",
        "extract",
        "replace",
        "remove",
        "background",
        "style",
        "compose",
        "action",
    ),
    "gedit": (
        "background_change",
        "color_alter",
        "material_alter",
        "motion_change",
        "ps_human",
        "style_change",
        "subject-add",
        "subject-remove",
        "subject-replace",
        "text_change",
        "tone_transfer",
    ),
}


def read_imgedit(folder, prompts_file):
    """ImgEdit-Bench, single turn, in `folder`: (rows, judge's prompts by task, sha256 of the metadata).

    The metadata is {key: {id, prompt, edit_type}}, a row's picture is its id. Rows are as evaluate.load_benchmark tells.
    prompts_file: the judge's prompts where they are not in the folder.
    """
    file = find_file("", (folder, folder / "singleturn"), ("singleturn.json", "basic_edit.json"))
    asked = find_file(
        prompts_file, (file.parent, file.parent.parent), ("judge_prompt.json", "prompts.json")
    )
    texts, rows, prompts, keys = read_json(asked), [], {}, ("id", "prompt", "edit_type")
    for key, entry in read_json(file).items():
        where = f"{file}: row {key}"
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name), str) for name in keys
        ):
            raise BadInput(
                f"{where} has no id, prompt and edit_type; take ImgEdit-Bench's single-turn metadata"
            )
        kind = entry["edit_type"]
        task = "adjust" if kind == "alter" else kind  # two versions circulate
        if task not in BENCHMARK_TASKS["imgedit"]:
            raise BadInput(
                f"{where}: unknown task {kind!r}; ImgEdit-Bench has {', '.join(BENCHMARK_TASKS['imgedit'])}"
            )
        prompts[task] = (
            texts.get(kind) or texts.get(task) or (texts.get("alter") if task == "adjust" else None)
        )
        if not isinstance(prompts[task], str):
            raise BadInput(
                f"{asked}: has no prompt for the task {kind!r} of row {key}; take both files of one version"
            )
        picture, _ = (inside(file.parent, name, where) for name in (entry["id"], f"{key}.png"))
        rows.append(
            {
                "row": key,
                "prompt": entry["prompt"],
                "images": [picture],
                "task": task,
                "source": entry["id"],
                "file": f"{key}.png",
            }
        )
    return rows, prompts, hashlib.sha256(file.read_bytes()).hexdigest()


def read_gedit(folder, prompts_file, languages, out):
    """GEdit-Bench in `folder`: (rows of some languages, {"SC", "PQ"} the judge's prompts, "").

    Parquet or arrow files, whose pictures are written below `out`, or metadata.jsonl with `file_name` beside pictures; and
    vie_prompts.py, or prompts_file. Rows are as evaluate.load_benchmark tells.
    """
    places = (folder, folder / "viescore", folder.parent / "viescore")
    prompts = read_vie_prompts(find_file(prompts_file, places, ("vie_prompts.py",)))
    rows, times, listed = [], {}, folder / "metadata.jsonl"
    try:
        lines = listed.read_text(encoding="utf-8").split("\n") if listed.is_file() else []
        entries = [json.loads(line) for line in lines if line.strip()] or read_table(folder)
    except ValueError as error:
        raise BadInput(f"{listed}: not JSON ({error}); write one object a line") from None
    for number, entry in enumerate(entries, 1):
        where, keys = (
            f"{folder}: row {number}",
            ("key", "task_type", "instruction_language", "instruction"),
        )
        if not all(isinstance(entry.get(name), str) for name in keys):
            raise BadInput(
                f"{where} lacks {', '.join(keys[:3])} or {keys[3]}; name GEdit-Bench's folder"
            )
        key, task, language, text = (entry[name] for name in keys)
        if task not in BENCHMARK_TASKS["gedit"] or language not in ("en", "cn"):
            known = f"{', '.join(BENCHMARK_TASKS['gedit'])}, in en and cn"
            raise BadInput(
                f"{where}: unknown task {task!r} in {language!r}; GEdit-Bench has {known}"
            )
        if language not in languages:
            continue
        place = f"{task}/{language}/{key}"
        times[place] = times.get(place, 0) + 1
        name = (
            place if times[place] == 1 else f"{place}-{times[place]}"
        )  # a few keys repeat, with another instruction
        path = Path(inside(Path(out).resolve(), f"sources/{name}.png", where))
        if stored := (entry.get("input_image_raw") or entry.get("input_image") or {}).get("bytes"):
            if not path.is_file():
                with whole_file(path) as part:
                    part.write_bytes(stored)
        elif isinstance(entry.get("file_name"), str):
            path = Path(inside(folder, entry["file_name"], where))
        else:
            raise BadInput(
                f"{where} holds no picture: neither the bytes of input_image_raw nor a file_name"
            )
        picture = short_hash(path.read_bytes()) if path.is_file() else ""
        rows.append(
            {
                "row": name,
                "prompt": text,
                "images": [str(path)],
                "task": task,
                "source": picture,
                "language": language,
                "intersection": bool(entry.get("Intersection_exist")),
                "file": f"fullset/{name}.png",
                "shared file": f"fullset/{place}.png",
            }
        )
    if not rows:
        raise BadInput(
            f"{folder}: holds no rows in {' or '.join(languages)}, in parquet, arrow or metadata.jsonl; name "
            "GEdit-Bench's folder"
        )
    return rows, prompts, ""


def read_vie_prompts(file):
    """{"SC": ..., "PQ": ...}, put together as VIEScore does, from a Python file whose constants are read as literals."""
    texts = {}
    try:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                texts[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
        parts = [
            texts[name]
            for name in (
                "_context_no_delimit",
                "_prompts_0shot_two_image_edit_rule",
                "_prompts_0shot_tie_rule_SC",
                "_prompts_0shot_rule_PQ",
            )
        ]
        return {"SC": "\n".join(parts[:3]), "PQ": "\n".join([parts[0], parts[3]])}
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise BadInput(
            f"{file}: has not the texts of VIEScore ({error}); take GEdit-Bench's vie_prompts.py"
        ) from None


def find_file(given, folders, names):
    """The file that was given, else the first of `names` in `folders`."""
    for path in (
        [Path(given)] if given else [Path(folder, name) for folder in folders for name in names]
    ):
        if path.is_file():
            return path
    raise BadInput(
        f"{given or folders[0]}: holds no {' or '.join(names)}; name the benchmark's folder, or --prompts FILE"
    )


def read_json(file):
    """The object in a JSON file, not an empty one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file}: not JSON ({error}); take the benchmark's own file") from None
    if isinstance(value, dict) and value:
        return value
    raise BadInput(f"{file}: holds no entries; take the benchmark's own file")


# ---------------------------------------------------------------- sample: the edits


def edit_of(row, subject, folder):
    """Where a row's edit lies; of a repeated key a foreign folder has one file alone."""
    path = Path(row["images"][0]) if subject == "source" else folder / row["file"]
    return (
        path
        if path.is_file() or subject != "edits"
        else folder / row.get("shared file", row["file"])
    )


def subjects_of(settings):
    """{name: folder of its edits}, the one in question first; the edits of `source` are the sources themselves."""
    first = "edits" if settings.edits else "trained" if settings.lora else "base"
    names = dict.fromkeys([first, *sorted(settings.baselines)])
    return {
        name: Path(settings.edits) if name == "edits" else Path(settings.out, name)
        for name in names
    }


def with_copies(rows, settings):
    """Every row `copies` times: the first lies where the benchmark wants it, the others in a folder of their seed."""
    for row in rows:
        for seed in range(settings.seed, settings.seed + settings.copies):
            file = f"seed-{seed}/{row['file']}"
            other = (
                {"row": f"{row['row']}@{seed}", "file": file, "shared file": file}
                if seed != settings.seed
                else {}
            )
            yield row | {"seed": seed} | other


def draw_edits(settings, rows, accelerator):
    """Draws what is missing of this process's share of the rows; an edit's noise comes from its seed alone."""
    todo = []
    for name, folder in subjects_of(settings).items():
        for row in (
            rows[accelerator.process_index :: accelerator.num_processes]
            if name in ("trained", "base")
            else ()
        ):
            copies = list(
                with_copies([row], settings)
            )  # always drawn together: a batch of another size rounds otherwise
            todo += [(name, folder, row, copies)] * any(
                not (folder / copy["file"]).is_file() for copy in copies
            )
    if todo and not settings.base:
        raise BadInput("--base is missing; name the editor, or a folder of finished --edits")
    if todo:
        dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
        editor = load_editor(
            settings.base,
            accelerator.device,
            dtype,
            settings.resolution,
            trust_remote_code=settings.trust_remote_code,
        )
        if settings.lora:
            add_policies(editor, averages=(), start=settings.lora)
    for name, folder, row, copies in tqdm(
        todo, desc="edits", disable=not accelerator.is_main_process
    ):
        sources = [load_image(path) for path in row["images"]]
        noises = [torch.Generator().manual_seed(copy["seed"]) for copy in copies]
        with policy(editor, "new" if name == "trained" else "base"):
            edits = rollout(
                editor,
                sources,
                row["prompt"],
                noises,
                settings.steps,
                settings.guidance,
                evaluation=True,
            ).images
        for copy, edit in zip(copies, edits):
            path = folder / copy["file"]
            if settings.benchmark == "gedit":
                with whole_file(path.with_name(f"{path.stem}_SRCIMG.png")) as part:
                    sources[0].save(part, "PNG")
            if not path.is_file():
                with whole_file(path) as part:
                    edit.save(part, "PNG")


# ---------------------------------------------------------------- judge: the calls


def shown_to_judge(path, benchmark):
    """The picture as the benchmark's scorer shows it: GEdit's with about 512 x 512 pixels, others as they are."""
    image = load_image(path)
    width = math.sqrt(512 * 512 * image.width / image.height)
    return (
        image.resize((int(width), int(width * image.height / image.width)))
        if benchmark == "gedit"
        else image
    )


def read_calls(out, stem):
    """{(subject, row, call): its newest record} of a judge's call files; a last line that a kill cut short is none."""
    lines = [
        line
        for file in sorted(Path(out).glob(f"{stem}-*.jsonl"))
        for line in file.read_bytes().split(b"\n")[:-1]
    ]
    return {
        (record["subject"], record["row"], record["call"]): record
        for record in map(json.loads, lines)
    }


def judge_edits(settings, rows, prompts, accelerator):
    """Asks the judge what this process's share of the rows lacks, and appends each call as one line as it comes.

    A call is asked again only when it failed, or when its text or picture has changed.
    """
    judge = load_judge(
        settings,
        accelerator.device,
        torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32,
    )
    name = (
        getattr(judge, "name", "") or settings.judge_model or settings.judge.removeprefix("local:")
    )
    trained = Path(settings.lora or ".").parent / "config.json"
    if (
        settings.lora
        and trained.is_file()
        and settings.judge == read_json(trained).get("judge")
        and not accelerator.process_index
    ):
        print(
            f"warning: {name} is the judge that {settings.lora} was trained with; its scores tell how well it is pleased: "
            "let another judge have the last word",
            file=sys.stderr,
        )
    texts = json.dumps(prompts or judge.prompts, sort_keys=True)
    stem = "-".join(["calls", *re.findall(r"[\w.]+", name), short_hash(texts)])
    done, todo, process = read_calls(settings.out, stem), [], accelerator.process_index
    for subject, folder in subjects_of(settings).items():
        for row in list(with_copies(rows, settings))[process :: accelerator.num_processes]:
            path = edit_of(row, subject, folder)
            seen = short_hash(path.read_bytes()) if path.is_file() else ""
            for call in CALLS[settings.benchmark]:
                text = prompts.get(call) or prompts.get(
                    row["task"], ""
                )  # the instruction goes in its place
                text = (
                    re.sub("<edit_prompt>|<instruction>", lambda mark: row["prompt"], text)
                    or row["prompt"]
                )
                record = {
                    "subject": subject,
                    "row": row["row"],
                    "call": call,
                    "judge": name,
                    "prompt": short_hash(text),
                    "picture": seen,
                }
                before = done.get((subject, row["row"], call), {})
                if any(before.get(key) != value for key, value in record.items()) or (
                    before.get("failure") and seen
                ):
                    todo.append((record, text, row, path))
    path = Path(settings.out, f"{stem}-{process}.jsonl")
    if path.is_file():
        os.truncate(
            path, path.read_bytes().rfind(b"\n") + 1
        )  # a kill may have cut the last line short
    lock, failed, good = threading.Lock(), [], []
    with open(path, "ab", buffering=0) as file:

        def keep(record, answer):
            with lock:
                file.write(json.dumps(record | answer, ensure_ascii=False).encode() + b"\n")
                if answer.get("failure") != MISSING:
                    (failed if "failure" in answer else good).append(answer)
                if len(failed) >= 8 and not good:
                    raise BadInput(
                        f"{settings.judge}: its first {len(failed)} calls all failed ({answer['failure']}); see "
                        "to the judge, which must take pictures, and start again"
                    )

        for record, *_ in todo:
            if not record["picture"]:
                keep(record, {"failure": MISSING})
        ask = ask_heldout if settings.benchmark == "heldout" else ask_benchmark
        ask(
            settings,
            judge,
            [entry for entry in todo if entry[0]["picture"]],
            keep,
            not accelerator.is_main_process,
        )


def ask_benchmark(settings, judge, todo, keep, quiet):
    """judge.ask for each entry of todo, several at a time; a failed call is a record with its cause."""
    parse = parse_imgedit if settings.benchmark == "imgedit" else parse_gedit

    def ask(entry):
        record, text, row, path = entry
        pictures = [path] if record["call"] == "PQ" else [*row["images"], path]
        try:
            reply = judge.ask(
                text, [shown_to_judge(picture, settings.benchmark) for picture in pictures]
            )
        except JudgeFailure as failure:
            return keep(record, {"failure": str(failure)})
        keep(record, {"reply": reply, "scores": parse(reply)})

    with ThreadPoolExecutor(settings.judge_in_flight * (1 + settings.judge.count(","))) as pool:
        for _ in tqdm(pool.map(ask, todo), total=len(todo), desc="judge", disable=quiet):
            pass


def ask_heldout(settings, judge, todo, keep, quiet):
    """The judge's own score of each edit, judge_batch edits at a time, and the oracle's where there is one."""
    for first in tqdm(range(0, len(todo), settings.judge_batch), desc="judge", disable=quiet):
        records, _, rows, paths = zip(*todo[first : first + settings.judge_batch])
        edits = [load_image(path) for path in paths]
        result = judge.score(
            rows, [[load_image(path) for path in row["images"]] for row in rows], edits
        )
        for i, score in enumerate(result.score.tolist()):
            answer = (
                {"failure": result.causes[i] or "no score"}
                if math.isnan(score)
                else {"scores": [score]}
            )
            truth = oracle(rows[i], edits[i])
            keep(
                records[i],
                answer
                | ({"truth": dict(zip(("oracle", "success"), map(float, truth)))} if truth else {}),
            )


# ---------------------------------------------------------------- score: tables, report, comparison


def score_calls(settings, rows, version):
    """Adds up each judge's calls in --out into scores-JUDGE-PROMPTS-MODE.json: [what was written, one for each judge]."""
    stems = {
        re.match(r"calls-(.*)-\d+$", file.stem)[1]
        for file in Path(settings.out).glob("calls-*.jsonl")
    }
    if not stems:
        raise BadInput(f"{settings.out}: holds no calls of a judge; run --stage judge first")
    score, results = (
        {"imgedit": score_imgedit, "gedit": score_gedit, "heldout": score_heldout}[
            settings.benchmark
        ],
        [],
    )
    for stem in sorted(stems):
        said, subjects = read_calls(settings.out, f"calls-{stem}"), {}
        for name in subjects_of(settings):
            records = [
                {"failure": "not judged"}
                | said.get((name, row["row"], call), {})
                | row
                | {"call": call}
                for row in with_copies(rows, settings)
                for call in CALLS[settings.benchmark]
            ]
            subjects[name] = score(records, settings.mode)
        results.append(
            {
                "benchmark": settings.benchmark,
                "judge": stem,
                "mode": settings.mode,
                "metadata": version,
                "subjects": subjects,
            }
        )
        file = Path(settings.out, f"scores-{stem}-{settings.mode}.json")
        with whole_file(file) as part:
            part.write_text(json.dumps(results[-1], ensure_ascii=False), encoding="utf-8")
    return results


def shown(mean):
    mean, low, high = mean
    return (
        "-"
        if mean is None
        else f"{mean:.3f}"
        if low is None
        else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    )


def as_text(groups, title):
    """A result's tables: for each group its coverage, and a line a task with the mean and interval of each metric."""
    lines = []
    for group, table in groups.items():
        metrics = [key for key in table if key not in ("rows", "answered")]
        lines.append(f"{title}, {group}: {table['answered']} of {table['rows']} rows answered")
        lines.append(" " * 19 + "".join(f"{metric:27}" for metric in metrics).rstrip())
        lines += [
            f"  {name:17}"
            + "".join(f"{shown(table[metric][name]):27}" for metric in metrics).rstrip()
            for name in table[metrics[0]]
        ]
    return "\n".join(lines)


def differences(a, b, benchmark, name_a, name_b):
    """The paired differences of two lists of row results as tables and in words."""
    groups, metric = paired_differences(a, b, METRICS[benchmark]), METRICS[benchmark][0]
    words = [
        f"{group}: " + verdict(table[metric]["macro"], name_a, name_b)
        for group, table in groups.items()
    ]
    return "\n".join([as_text(groups, f"{name_a} - {name_b}"), *words])


def describe(settings, result):
    """What a person reads first: every table, the gain over the baselines, and a row for a table of published numbers."""
    version, (first, *others), metrics = (
        result["metadata"],
        result["subjects"],
        METRICS[settings.benchmark],
    )
    lines = [
        f"{result['benchmark']}, {result['mode']} reading, judge and prompts {result['judge']}, {version['rows']} rows, "
        f"metadata sha256 {version['sha256']}"
    ]
    full = {"imgedit": 737, "gedit": 1212 if settings.language == "both" else 606}.get(
        settings.benchmark, version["rows"]
    )
    if version["rows"] != full:
        lines.append(
            f"warning: the published metadata has {full} rows; these numbers stand beside no published ones"
        )
    lines += [as_text(content["groups"], name) for name, content in result["subjects"].items()]
    of = {name: content["rows"] for name, content in result["subjects"].items()}
    lines += [differences(of[first], of[name], settings.benchmark, first, name) for name in others]
    title = settings.name or " + ".join(
        filter(None, (settings.edits or settings.base, settings.lora))
    )
    cells = {"model": title, "judge": result["judge"]} | {
        f"{group} {metric}": shown(table[metric]["macro"])
        for group, table in result["subjects"][first]["groups"].items()
        for metric in metrics
        if metric in table
    }
    return "\n".join(
        [
            *lines,
            *(f"| {' | '.join(row)} |" for row in (cells, ["---"] * len(cells), cells.values())),
        ]
    )


PAGE = """<!doctype html><meta charset="utf-8"><title>edit-nft: evaluation</title><style>
body {font: 14px system-ui, sans-serif; margin: 1.5em; color: #222} pre {background: #f4f4f4; padding: .8em; overflow: auto}
article {display: flex; flex-wrap: wrap; gap: 12px; border-top: 1px solid #ddd; padding: 12px 0} [hidden] {display: none}
article > div {flex: 0 0 230px} figure {margin: 0; width: 260px} small {color: #666} details {white-space: pre-wrap}
img {width: 260px; height: 260px; object-fit: contain; background: #f4f4f4} .tiny {image-rendering: pixelated}
figcaption {min-height: 2.5em}</style>
<h1>edit-nft: evaluation</h1><pre>@SUMMARY@</pre><label>task <select id="task"><option value="">all</option></select></label>
<label>order <select id="order"><option value="1">worst first</option><option value="-1">best first</option></select></label>
<span id="count"></span><main>@ROWS@</main><script>
const rows = [...document.querySelectorAll("article")], [task, order, count] = ["task", "order", "count"].map(
  id => document.getElementById(id)), mark = row => parseFloat(row.dataset.mark);
for (const name of [...new Set(rows.map(row => row.dataset.task))].sort()) task.add(new Option(name, name));
task.onchange = order.onchange = () => {
  rows.sort((a, b) => order.value * (mark(a) - mark(b))).forEach(row => row.parentNode.append(row));
  rows.forEach(row => row.hidden = task.value && row.dataset.task !== task.value);
  count.textContent = rows.filter(row => !row.hidden).length + " rows";
};
order.onchange();</script>
"""


def write_report(settings, rows, results, summary):
    """report.html with small pictures beside it, and grid.png: of each task the row with the median score."""
    out, kind, articles, grid = Path(settings.out), settings.benchmark, [], {}
    subjects, calls = (
        subjects_of(settings),
        [read_calls(out, f"calls-{result['judge']}") for result in results],
    )
    marks = [
        {
            name: {row["row"]: row for row in content["rows"]}
            for name, content in result["subjects"].items()
        }
        for result in results
    ]
    (out / "report").mkdir(exist_ok=True)
    for number, row in enumerate(tqdm(list(with_copies(rows, settings)), desc="report")):
        figures, seen = [], []
        for name in dict.fromkeys(["source", *reversed(subjects)]):  # source, base, trained
            path, picture, image = edit_of(row, name, subjects.get(name)), None, "no edit"
            mine = [of_row[name][row["row"]] for of_row in marks if name in of_row]
            caption = "; ".join(
                " ".join(f"{key} {one[key]:.2f}" for key in METRICS[kind] if key in one)
                for one in mine
            )
            said = [
                record.get((name, row["row"], call), {}) for record in calls for call in CALLS[kind]
            ]
            words = escape(
                "\n".join(
                    record.get("reply") or record.get("failure") or "" for record in said
                ).strip()
            )
            if path.is_file():
                picture = load_image(path)
                picture.thumbnail((384, 384))
                file, tiny = f"report/{number:05}-{name}.jpg", "tiny" * (max(picture.size) <= 128)
                picture.save(out / file, quality=95, subsampling=0)
                image = f'<img class="{tiny}" loading="lazy" src="{file}">'
            words = words and f"<details><summary>the judge's words</summary>{words}</details>"
            figures.append(
                f"<figure><figcaption>{name} {escape(caption)}</figcaption>{image}{words}</figure>"
            )
            seen.append((picture, f"{name} {caption}" if name != "source" else row["prompt"]))
        mark = marks[0][next(iter(subjects))][row["row"]][METRICS[kind][0]]
        mark, texts = (
            -1.0 if math.isnan(mark) else mark,
            [escape(row[key]) for key in ("task", "prompt", "row")],
        )
        articles.append(
            f'<article data-task="{texts[0]}" data-mark="{mark}"><div><b>{texts[1]}</b><p>{texts[0]}</p>'
            f"<small>{texts[2]}</small></div>{''.join(figures)}</article>\n"
        )
        grid.setdefault(row["task"], []).append((mark, number, seen))
    page = PAGE.replace("@SUMMARY@", escape(summary)).replace("@ROWS@", "".join(articles))
    (out / "report.html").write_text(page, encoding="utf-8")
    middle = [sorted(of_task)[len(of_task) // 2][2] for _, of_task in sorted(grid.items())]
    pictures, captions = ([[pair[i] for pair in row] for row in middle] for i in (0, 1))
    picture_grid(
        pictures, captions, f"of each task the row with the median {METRICS[kind][0]}"
    ).save(out / "grid.png")


def read_ratings(file):
    """Edits that people rated: (row, source pictures, edits, labels) of each line, a group of edits of one source.

    A line has `prompt`, `image`, `edits` and `scores`, a number for each edit, the higher the better; for two edits also
    `preference` in place of scores: 0 the first is better, 1 the second, 0.5 neither. Paths are relative to the file.
    """
    groups, load = [], functools.cache(load_image)
    for row in read_rows(file.parent, file.stem):
        try:
            labels = (
                row["scores"] if "scores" in row else [1 - row["preference"], row["preference"]]
            )
            labels, edits = (
                [float(label) for label in labels],
                [load_image(file.parent / path) for path in row["edits"]],
            )
        except (KeyError, TypeError, ValueError):
            raise BadInput(
                f"{file}: {row['id']} lacks `edits` with `scores` or a `preference`; add them"
            ) from None
        if len(labels) != len(edits):
            raise BadInput(
                f"{file}: {row['id']} has {len(edits)} edits and {len(labels)} scores; give one for each"
            )
        groups.append((row, [load(path) for path in row["images"]], edits, labels))
    return groups


def ordered_pairs(scores, labels):
    """Of a group's pairs of edits that labels tell apart: how many, how many scores order alike (equal: half), how many tie."""
    gaps = [
        (a - b) * (1 if x > y else -1)
        for (a, x), (b, y) in itertools.combinations(zip(scores, labels), 2)
        if x != y
    ]
    gaps = [0.0 if abs(gap) < 1e-6 else gap for gap in gaps if gap == gap]
    return len(gaps), sum(gap > 0 for gap in gaps) + gaps.count(0.0) / 2, gaps.count(0.0)


@dataclass(frozen=True)
class AgreeSettings(JudgeSettings):
    strategies: list[str] = HfArg(
        default_factory=lambda: ["logits"], help=f"To compare, of {', '.join(STRATEGIES)}."
    )


def agree(file, settings):
    """Prints, for each strategy, how far the judge orders edits as people do: Table 4 of the paper."""
    if unknown := set(settings.strategies) - set(STRATEGIES):
        raise BadInput(
            f"--strategies {unknown.pop()}: no strategy; take of {', '.join(STRATEGIES)}"
        )
    groups, judge = read_ratings(file), load_judge(settings)
    rows, sources, edits = zip(
        *((row, shown, edit) for row, shown, group, _ in groups for edit in group)
    )
    labels = torch.tensor([label for *_, marks in groups for label in marks])
    split = lambda values: values.split([len(marks) for *_, marks in groups])  # noqa: E731
    print(f"{settings.judge}: {len(edits)} edits in {len(groups)} groups")
    print(
        "strategy     right pairs  (95 %)         Spearman  ties    spread  mass   failed  s/score"
    )
    for strategy in settings.strategies:
        try:
            judge.use(strategy)
        except BadInput as error:
            print(f"{strategy:<12} {error}")
            continue
        start = time.perf_counter()
        scores = judge.score(rows, sources, edits)
        pace, score, good = (
            (time.perf_counter() - start) / len(edits),
            scores.score,
            ~scores.score.isnan(),
        )
        counts = np.array(
            [ordered_pairs(a.tolist(), b.tolist()) for a, b in zip(split(score), split(labels))]
        )
        draws = np.random.default_rng(0).integers(len(counts), size=(2000, len(counts)))
        total, right, ties = counts.sum(0) / max(counts[:, 0].sum(), 1)
        low, high = np.quantile(
            counts[draws, 1].sum(1) / np.maximum(counts[draws, 0].sum(1), 1), (0.025, 0.975)
        )
        spread = np.nanmean([group[~group.isnan()].std(unbiased=False) for group in split(score)])
        print(
            f"{strategy:<12} {right:7.1%}      ({low:.1%} to {high:.1%})  {spearman(score[good], labels[good]):7.3f}  "
            f"{ties:6.1%}  {spread:6.3f}  {scores.mass.nanmean():5.3f}  {1 - good.float().mean():6.1%}  {pace:.4f}"
        )


def compare(places):
    """Prints the paired differences of two runs' first subjects under each judge and reading that both have."""
    if len(places) != 2:
        raise BadInput("compare: name two runs, python evaluate.py compare RUN_A RUN_B")
    found = [
        {file.name: read_json(file) for file in Path(place).glob("scores-*.json")}
        for place in places
    ]
    for place, files in zip(places, found):
        if not files:
            raise BadInput(f"{place}: holds no scores; name an --out folder of evaluate.py")
    both = sorted(found[0].keys() & found[1].keys())
    if not both:
        raise BadInput(
            f"{' and '.join(places)}: no result under one judge, prompts and reading, but {', '.join(found[0])} "
            f"against {', '.join(found[1])}; score both alike"
        )
    for a, b in ([files[name] for files in found] for name in both):
        if a["metadata"] != b["metadata"]:
            raise BadInput(
                f"{' and '.join(places)}: another version of the benchmark in each; score both on one"
            )
        rows = [next(iter(result["subjects"].values()))["rows"] for result in (a, b)]
        print(
            f"judge and prompts {a['judge']}, {a['mode']} reading",
            differences(*rows, a["benchmark"], *places),
            sep="\n",
        )


def claim(settings):
    """Settings with what --out was begun with; BadInput when edits of another making lie there."""
    file = Path(settings.out, "config.json")
    before = read_json(file) if file.is_file() else {}
    if before and settings.stage in ("judge", "score"):
        wanted = sorted({*before["baselines"], *settings.baselines})
        return replace(settings, baselines=wanted, **{key: before[key] for key in DRAWN})
    for key in DRAWN:
        if before and before[key] != getattr(settings, key):
            own = getattr(settings, key)
            raise BadInput(
                f"{settings.out}: was begun with --{key} {before[key]}, not {own}; give another --out"
            )
    with whole_file(file) as part:
        part.write_text(json.dumps(asdict(settings), indent=1))
    return settings


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    if argv[:1] == ["agree"]:
        if not argv[1:] or not argv[1].endswith(".jsonl"):
            raise BadInput(
                "agree: names no file; write python evaluate.py agree FILE.jsonl --judge ..."
            )
        return agree(
            Path(argv[1]),
            parse_settings(AgreeSettings, argv[2:], description=agree.__doc__, judge=TOY),
        )
    if argv[:1] not in (["imgedit"], ["gedit"], ["heldout"]):
        given = " ".join(argv[:1]) or "no command"
        raise BadInput(
            f"{given}: say what to score: imgedit, gedit, heldout, or compare RUN_A RUN_B"
        )
    settings = parse_settings(Settings, ["--benchmark", *argv], description=__doc__.splitlines()[0])
    patient = InitProcessGroupKwargs(
        timeout=timedelta(days=7)
    )  # one process may be done long before another
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patient])
    with accelerator.main_process_first():
        settings = claim(settings)
        rows, prompts, version = load_benchmark(settings)
    if settings.stage in ("all", "sample"):
        draw_edits(settings, rows, accelerator)
        accelerator.wait_for_everyone()
    if settings.stage in ("all", "judge"):
        judge_edits(settings, rows, prompts, accelerator)
        accelerator.wait_for_everyone()
    if settings.stage in ("all", "score") and accelerator.is_main_process:
        results = score_calls(settings, rows, version)
        summary = "\n".join(describe(settings, result) for result in results)
        write_report(settings, rows, results, summary)
        print(summary, f"wrote {settings.out}/report.html and grid.png", sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
