"""Scores an editor on ImgEdit-Bench, GEdit-Bench or a held-out set: draws, asks a judge, adds up.

    python evaluate.py imgedit --bench DIR --base MODEL --lora RUN/checkpoint-N --judge URL
    python evaluate.py gedit --language both ...     # the same settings
    python evaluate.py heldout --bench DATASET ...   # the test split of a dataset folder
    python evaluate.py compare RUN_A RUN_B           # the paired difference with its interval
    python evaluate.py agree FILE.jsonl --judge ...  # how far a judge orders edits as people do
    python evaluate.py curves RUN [RUN ...]          # training runs as curves.png (matplotlib)

Three stages, each resumable, each alone with --stage: `sample` draws the edits in the benchmark's
own layout, `judge` appends every call as a JSON line, `score` adds those up. `accelerate launch`
splits the rows over processes. A subject is whose edits are scored: trained (with --lora), base,
edits (--edits, made by anything), source (nothing done).

Nothing stale counts: an edit is drawn again when its weights, source, prompt or settings are not
those whose hash is written in its PNG file; an answer counts for the very edit, sources, text and
judge that it was given for, and of several the newest.

Departures from the benchmarks' own scripts, the first three undone by --mode official:
1. Every sensible spelling of a score is understood, and its range is checked.
2. An answer without a score, a failed call and a missing edit count at the floor (1 or 0).
3. Means are not rounded on the way.
4. Edits travel as PNG; GEdit's are shown as its scorer shows them (size, JPEG), at temperature 0.
5. PSNR and SSIM to the source stand beside every score.
Never reproduced: random scores for answers that cannot be read, endless retries, rows that count
twice, a draft in an unfinished <think> taken for the answer.
"""

import ast
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import threading
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from html import escape
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from data_prep import (
    BadInput,
    CheckedSettings,
    Stopped,
    append_json_line,
    bootstrap,
    catch_signals,
    inside,
    load_image,
    locked,
    oracle,
    parse_settings,
    picture_grid,
    read_json_lines,
    read_rows,
    read_table,
    run_script,
    setting,
    spearman,
    start_processes,
    together,
    whole_file,
)
from reward_mllm import (
    TOY,
    JudgeFailure,
    JudgeSettings,
    load_judge,
    plain_terms,
    requirement_of,
)
from sample import add_policies, load_editor, policy, rollout

METRICS = {  # the main one first
    "imgedit": ("score",),
    "gedit": ("O", "SC", "PQ"),
    "heldout": ("judge", "oracle", "success"),
}
KEPT = ("psnr", "ssim")  # how much of the source is kept
CALLS = {"imgedit": ("edit",), "gedit": ("SC", "PQ"), "heldout": ("judge",)}  # questions on an edit
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG")  # of pictures, ours first
MADE_FROM = "made from"  # the PNG's text that says what an edit was drawn from
MISSING = "no edit"  # the failure of an edit that is not there
ALL_DIGITS = 99  # rounding to so many leaves a number as it is
Rows = list[dict]

# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings(JudgeSettings):
    """Defaults are the benchmarks' own sampling: 28 steps, seed 42, native size."""

    benchmark: Literal["imgedit", "gedit", "heldout"] = setting("imgedit", "Also the first word.")
    bench: str = setting("", "The benchmark's folder, or a dataset folder with test.jsonl.")
    base: str = setting("", "The editor, a hub id or folder.")
    lora: str = setting("", "Its LoRA: RUN/checkpoint-N.")
    edits: str = setting("", "A folder of finished edits in the benchmark's layout, of any editor.")
    baselines: list[str] = setting([], "Scored beside it: source (nothing done), base (no LoRA).")
    out: str = setting("runs/eval", "The folder for edits, calls, scores and report.")
    stage: Literal["all", "sample", "judge", "score"] = setting("all", "One stage alone.")
    mode: Literal["strict", "official"] = setting("strict", "How answers are read and means taken.")
    language: Literal["en", "cn", "both"] = setting("en", "GEdit's rows.")
    masks: str = setting(
        "", "A folder of masks in the layout of edits, white where one may change."
    )
    reply_tokens: int = setting(1400, "Tokens of a judge's reply.", at_least=1, at_most=2**20)
    steps: int = setting(28, "Solver steps.", at_least=1, at_most=1000)
    seed: int = setting(42, "Seed of each row's edit.", at_least=0, at_most=2**62)
    guidance: float | None = setting(None, "Guidance. [the family's]", at_least=0, at_most=1000)
    resolution: int | None = setting(
        None, "Square root of the working pixels. [the model's own]", at_least=16, at_most=8192
    )

    def __post_init__(self):
        super().__post_init__()
        for name in self.baselines:
            if name not in ("source", "base"):
                raise BadInput(f"--baselines {name}: not a baseline; there are source and base")


DRAWN_WITH = ("steps", "seed", "guidance", "resolution")  # what an edit is made with
# what all edits in one --out share
DRAWN = ("benchmark", "bench", "base", "lora", "edits", "language", *DRAWN_WITH)
HOW_ASKED = (  # the judge's settings that a held-out score depends on
    "judge_strategy",
    "judge_think",
    "judge_aspects",
    "judge_reply",
    "judge_range",
    "judge_order",
    "judge_draws",
)


def _hash_of(value):
    """12 hex digits of the sha256 of a file's content (a Path), or of any value's JSON."""
    content = value.read_bytes() if isinstance(value, Path) else json.dumps(value).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def _read_json(file, fix):
    """The object in a JSON file, not an empty one; BadInput with the fix for anything else."""
    fault = "holds no entries"
    try:
        value = json.loads(file.read_bytes())
        if value and isinstance(value, dict):
            return value
    except (OSError, ValueError, RecursionError) as error:
        fault = f"not JSON ({error})"
    raise BadInput(f"{file}: {fault}; {fix}")


# ---------------------------------------------------------------- reading an answer

LINE = r"(?m:^)"
WITHIN = r"(?m:^|[,;{(|.])"  # at the start of a line, or after punctuation
LABEL = r"\W*?(?:\d+[.)]\s*)?([^\W\d][\w &/()'’-]{1,60}?)"
SEPARATOR = r"(?:\s*[:=|]+|\s+[-–—]|\s+is\b)\s*"
NUMBER = r"(\d+(?:\.\d+)?)(?!\.?\d)"
END = r"(?=\s*(?:[,;.|(){}\n]|$)|\s+[-–—]\s)"
ONE_COLON = r"(?:(?!: ).)*: (\d{1,9})"  # followed by a number
UNWANTED = re.compile(r"(?i)reason|overall|average|total|\bsum\b|final|expla|analysis|rationale")
EASTERN = str.maketrans("。、【】「」", ".,[][]")  # what NFKC leaves as it is


def _final_answer(reply):
    """A reply without thoughts and marks around the answer; "" where the thoughts never end."""
    text = reply.rpartition("</think>")[2]
    if "<think" in text:
        return ""
    text = unicodedata.normalize("NFKC", text).translate(EASTERN)  # full-width digits, colons ...
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"</?answer>|<\|(?:begin|end)_of_box\|>", "\n", text)


def labels_of(prompt: str) -> list[str]:
    """The three labels that a prompt of ImgEdit's judge asks for; [] where it is unlike."""
    found = re.findall(r"(?m)^\W*([^\W\d][^:\n]*?)\W*:\W*[Aa] number\b", prompt)
    return [_plain_label(label) for label in found] if len(found) == 3 else []


def _plain_label(label):
    return label.strip().lower().replace("_", " ").replace("&", "and")


def parse_imgedit(reply: str, mode: str = "strict", labels: list = ()) -> list[float] | None:
    """The list of scores in an answer of ImgEdit's judge; None where there are none.

    strict: three differently labelled ones, from 1 to 5, those of `labels` if the prompt names its
    three. official: what is digits alone after a line's one ": ".
    """
    if mode == "official":
        lines = [re.fullmatch(ONE_COLON, line.strip()) for line in reply.splitlines()]
        return [int(line[1]) for line in lines if line] or None
    text = _final_answer(reply)
    scores = _labelled_scores(text, LINE, 5, labels)
    if len(scores) != 3:
        scores = _labelled_scores(text, WITHIN, 5, labels)
    return _if_fit(scores, 3, 1, 5)


def _if_fit(scores, number, low, high):
    """The scores, None unless they are so many and within their range."""
    fit = len(scores) == number and all(low <= score <= high for score in scores)
    return scores if fit else None


def _labelled_scores(text, start, top, labels=()):
    """The values of `label: 4`, `**Label** - 4/5`, `| label | [4.0] |` ..., the last of each label.

    start: where a label may begin; top: what may stand after a slash. With `labels`, only theirs.
    """
    value = NUMBER + rf"\s*(?:/\s*{top}(?!\d)|(?:out )?of {top}(?!\d))?\s*(?:points?|stars?|分)?"
    text = re.sub(r"[*`\"“”]", "", text)
    text = re.sub(rf"([:=|]\s*)\[\s*({value})\s*\]", r"\1\2", text)  # label: [4]
    text += "\n" + _columns_as_lines(text)
    # a value alone on the line below its label
    text = re.sub(rf"(?m)^([^\n\d:=|]{{2,60}}?)\s*\n\s*({value})\s*$", r"\1: \2", text)
    found = {}
    for label, number in re.findall(start + LABEL + SEPARATOR + value + END, text):
        name = _plain_label(label)
        wanted = next((known for known in labels if known in name), "")
        if wanted or not (labels or UNWANTED.search(name)):
            found[wanted or name] = float(number)
    return list(found.values())


def _columns_as_lines(text):
    """A table of two rows, labels above values, as lines `label | value`; "" for any other."""
    rows = re.findall(r"(?m)^(?=.*\|)(?=.*\w).*$", text)  # but for |---|---|
    if len(rows) != 2:
        return ""
    columns = zip(*(row.strip(" |").split("|") for row in rows), strict=False)
    return "\n".join(map(" | ".join, columns))


def parse_gedit(reply: str, mode: str = "strict") -> list[float] | None:
    """The list of scores in an answer of GEdit's judge (VIEScore); None where there are none.

    strict: two from 0 to 10, out of JSON or what nearly is, or labelled. official: what the
    official parser reads, any number of them and of any size, but None where it would draw a
    random score.
    """
    if mode == "official":
        return _official_gedit(reply)
    text = _final_answer(reply)
    found = _json_scores(text) or _listed_scores(text)
    if found:
        scores = [_score_of_ten(value) for value in found[-1]]
    else:
        scores = _labelled_scores(text, WITHIN, 10)
    return _if_fit(scores, 2, 0, 10)


def _json_scores(text):
    """The values of every `score` or `scores` that is a list or an object in JSON anywhere."""
    found = []
    for brace in re.finditer("{", text):
        with suppress(ValueError, RecursionError):
            value, _ = json.JSONDecoder(strict=False).raw_decode(text, brace.start())
            scores = value.get("score") or value.get("scores")
            if isinstance(scores, dict):
                scores = list(scores.values())
            if isinstance(scores, list):
                found.append(scores)
    return found


def _listed_scores(text):
    """Lists after `score`, or alone: for quotes in the reasoning, or an answer cut short."""
    found = re.findall(r"(?i)scores?[\"']?\s*[:=]\s*[\"']?[\[(]([^\])]*)[\])]", text)
    found = found or re.findall(r"^\s*\[?((?:[\d./\s]+,)+[\d./\s]+)\]?\s*$", text)
    return [values.split(",") for values in found]


def _score_of_ten(value):
    """8, "8" or "8/10" as a number; NaN for anything else."""
    number = re.fullmatch(r"\s*[\"']?(\d+(?:\.\d+)?)(?:\s*/\s*10)?\s*分?[\"']?\s*", str(value))
    return float(number[1]) if number else math.nan


def _official_gedit(reply):
    """What VIEScore's parser reads: JSON between its delimiters or the outer braces; or else two
    numbers in brackets, or nothing but a number from 0 to 10."""
    fenced = reply.split("||V^=^V||")
    bare = re.fullmatch(r"[^\[]*(\[\d+, ?\d+\])[^\]]*|\s*(\d|10)\s*", reply)
    if len(fenced) == 3:
        text = fenced[1]
    elif "{" in reply and "}" in reply:
        text = reply[reply.find("{") : reply.rfind("}") + 1]
    elif bare:
        text = f'{{"score": {bare[1] or bare[2]}}}'
    else:
        return None
    text = text.strip().replace("\n", "")
    return _official_scores(text) or _official_scores(_repaired(text))


def _official_scores(text):
    """`score` of a JSON text: a list of finite numbers, or one."""
    try:
        scores = json.loads(text)["score"]
        if not isinstance(scores, list):
            scores = [scores]
        return scores if math.isfinite(min(scores)) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _repaired(text):
    """Quotes round bare keys and values, brackets round lone numbers, as VIEScore repairs JSON."""

    def pair(found):
        key, value, end = found.groups()
        is_number = re.fullmatch(r"-?\d+(?:\.\d+)?", value)
        return f"{key}: [{value}]{end}" if is_number else f'{key}: "{value}"{end}'

    quoted = re.sub(r"(\w+)(?=:)", r'"\1"', text)
    return re.sub(r'("[^\n]*?"):\s*([^\n]*?)\s*([,}])', pair, quoted)


# ---------------------------------------------------------------- adding up


def score(benchmark: str, records: Rows, mode: str = "strict") -> dict:
    """A benchmark's result from the judge's calls: {"rows": [a dict a row], "groups": {"all" or a
    language: what tabulate gives}}.

    records: of each row one for each of its CALLS, in their order: dicts with `row`, `task`,
    `source`, `reply` or `failure`, perhaps `psnr` and `ssim`; ImgEdit's `labels`, GEdit's
    `language` and `intersection`; in a held-out set the judge's own score in `scores`, and the
    oracle's of a toy row (that has a `target_scene`) in `truth`.
    What has no value counts at the floor, ImgEdit's 1 or else 0; official: then no metric of the
    row has any, NaN, and ImgEdit's rows and the means of its tasks are rounded to 2 digits.
    """
    is_imgedit = benchmark == "imgedit"
    digits = 2 if is_imgedit and mode == "official" else ALL_DIGITS
    number = len(CALLS[benchmark])
    rows = []
    for start in range(0, len(records), number):
        calls = records[start : start + number]
        metrics = MEASURES[benchmark](calls, mode)
        silent = [name for name, value in metrics.items() if math.isnan(value)]
        if silent and mode == "official":
            metrics = dict.fromkeys(metrics, math.nan)
        elif silent:
            metrics |= dict.fromkeys(silent, 1.0 if is_imgedit else 0.0)
        said = [record.get("reply") or record.get("failure", "") for record in calls]
        told = {"answered": not silent, "said": "\n".join(said).strip()}
        rows.append(calls[0] | metrics | told)
    return {"rows": rows, "groups": _grouped(rows, METRICS[benchmark], digits)}


def _imgedit_metrics(calls, mode):
    """The mean of the three scores."""
    (record,) = calls
    scores = parse_imgedit(record.get("reply", ""), mode, record.get("labels", ()))
    return {"score": _average(scores or [math.nan], 2 if mode == "official" else ALL_DIGITS)}


def _gedit_metrics(calls, mode):
    """SC and PQ, the lower of their two scores, and O, the square root of their product."""
    scores = [parse_gedit(record.get("reply", ""), mode) for record in calls]
    sc, pq = (min(values or [math.nan]) for values in scores)
    overall = math.sqrt(sc * pq) if sc * pq >= 0 else math.nan
    return {"O": overall, "SC": sc, "PQ": pq}


def _heldout_metrics(calls, mode):
    """The judge's score, and for a toy row the oracle's."""
    (record,) = calls
    truth = record.get("truth", {})
    if not truth and "target_scene" in record:  # without an edit
        truth = dict.fromkeys(METRICS["heldout"][1:], math.nan)
    return {"judge": record.get("scores", [math.nan])[0], **truth}


MEASURES = {"imgedit": _imgedit_metrics, "gedit": _gedit_metrics, "heldout": _heldout_metrics}


def _average(values, digits=ALL_DIGITS):
    return round(sum(values) / len(values), digits)


def _grouped(rows, metrics, digits=ALL_DIGITS):
    """The tables of the rows of each language and of its intersection subset; else of all rows.
    What is kept of the source stands beside the metrics."""
    groups = {}
    for row in rows:
        name = row.get("language", "all")
        groups.setdefault(name, []).append(row)
        if row.get("intersection"):
            groups.setdefault(f"{name} intersection", []).append(row)
    metrics = (*metrics, *KEPT)
    return {name: tabulate(members, metrics, digits) for name, members in groups.items()}


def tabulate(rows: Rows, metrics: tuple, digits: int = ALL_DIGITS) -> dict:
    """Means with 95 % intervals: {"rows", "answered", metric: {"macro": [mean, low, high],
    "micro": ..., task: ...}}.

    rows: dicts with `task`, `source`, `answered` and the metrics, NaN or none where there is no
    value; of metrics that no row has only the first is shown. macro is the mean of the tasks'
    means, micro that of the rows. digits: to which the tasks' means are rounded. Intervals are
    bootstrapped over source pictures, each with all its rows.
    """
    table = {"rows": len(rows), "answered": sum(row["answered"] for row in rows)}
    for metric in metrics:
        known = [row for row in rows if not math.isnan(row.get(metric, math.nan))]
        if not known and metric != metrics[0]:
            continue
        values = [row[metric] for row in known]
        sources = [row["source"] for row in known]
        tasks, draws = bootstrap(values, [row["task"] for row in known], sources)  # (D, T)
        _, overall = bootstrap(values, ["all"] * len(known), sources)  # (D, 1)
        macro = np.ma.masked_invalid(draws).mean(1).filled(np.nan)  # (D,) over the drawn tasks
        by_task = {}
        for task, of_task in zip(tasks, draws.T, strict=True):
            mean = _average([row[metric] for row in known if row["task"] == task], digits)
            by_task[task] = _interval([mean], of_task)
        means = [mean for mean, _, _ in by_task.values()]
        table[metric] = {"macro": _interval(means, macro), "micro": _interval(values, overall)}
        table[metric] |= by_task
    return table


def _interval(values, draws):
    """[mean of the values, 2.5 % and 97.5 % quantile of the draws]; None where there are none."""
    draws = draws[~np.isnan(draws)]
    ends = np.quantile(draws, (0.025, 0.975)).tolist() if len(draws) else [None, None]
    return [_average(values) if values else None, *ends]


def paired_differences(a: Rows, b: Rows, metrics: tuple) -> dict[str, dict]:
    """The tables of a - b, two results of the same rows in one order, resampled together."""
    pairs = []
    for row, other in zip(a, b, strict=True):
        pair = row | {"answered": row["answered"] and other["answered"]}
        for metric in (*metrics, *KEPT):
            pair[metric] = row.get(metric, math.nan) - other.get(metric, math.nan)
        pairs.append(pair)
    return _grouped(pairs, metrics)


def _verdict(difference, a, b, kept=None):
    """A mean difference [mean, low, high] of a and b in words, and that of their PSNR."""
    mean, low, high = difference
    if low is None:
        return f"too few source pictures to tell {a} from {b}"
    words = f"no difference between {a} and {b} can be told"
    if low > 0 or high < 0:
        words = f"{a} is {'better' if mean > 0 else 'worse'} than {b}"
    words += f": {mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
    if kept and kept[1] is not None:
        mean, low, high = kept
        words += (
            f"; {a} keeps {abs(mean):.1f} dB {'more' if mean > 0 else 'less'} of the source "
            f"({low:+.1f} to {high:+.1f} dB)"
        )
    return words


# ---------------------------------------------------------------- benchmarks


def _read_heldout(folder, settings):
    """The test split of a dataset folder. An edit's file is named by the row's id."""
    rows = read_rows(folder, "test")
    for row in rows:
        row["row"] = row["id"]
        row.setdefault("task", "all")
        row["source"] = row["images"][0]
        row["files"] = [row["id"]]
        inside(folder, f"{row['id']}.png", row["where"])
    return rows, {}


def _read_imgedit(folder, settings):
    """ImgEdit-Bench, single turn; {key: {id, prompt, edit_type}}, a row's picture is its id."""
    fix = "take the benchmark's own file"
    file = _find_file((folder, folder / "singleturn"), ("singleturn.json", "basic_edit.json"))
    places = (file.parent, file.parent.parent)
    asked = _find_file(places, ("judge_prompt.json", "prompts.json"))
    texts = _read_json(asked, fix)
    prompts = {kind.replace("alter", "adjust"): text for kind, text in texts.items()}
    rows = []
    for key, entry in _read_json(file, fix).items():
        where = f"{file}: row {key}"
        _check_entry(entry, ("id", "prompt", "edit_type"), where)
        inside(folder, f"{key}.png", where)
        task = entry["edit_type"].replace("alter", "adjust")  # two versions circulate
        if not isinstance(prompts.get(task), str):
            raise BadInput(
                f"{asked}: has no prompt for the task {task!r} of row {key}; take both files of "
                "one version"
            )
        row = {"row": key, "prompt": entry["prompt"], "task": task, "source": entry["id"]}
        row["images"] = [inside(file.parent, entry["id"], where)]
        row["files"] = [key]
        row["labels"] = labels_of(prompts[task])
        rows.append(row)
    return rows, prompts


def _check_entry(entry, keys, where):
    """BadInput for an entry of a benchmark that lacks one of these texts."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
        raise BadInput(f"{where} lacks {' or '.join(keys)}; take the benchmark's own metadata")


def _read_gedit(folder, settings):
    """GEdit-Bench: parquet or arrow files, whose pictures are written into --out, or metadata.jsonl
    with `file_name` beside pictures; and vie_prompts.py."""
    places = (folder, folder / "viescore", folder.parent / "viescore")
    prompts = _read_vie_prompts(_find_file(places, ("vie_prompts.py",)))
    listed = folder / "metadata.jsonl"
    entries = read_table(folder)
    if listed.is_file():
        entries = [entry for _, entry in read_json_lines(listed)]
    rows = []
    times = Counter()
    for number, entry in enumerate(entries, 1):
        where = f"{folder}: row {number}"
        _check_entry(entry, ("key", "task_type", "instruction_language", "instruction"), where)
        if settings.language in (entry["instruction_language"], "both"):
            place = "{task_type}/{instruction_language}/{key}".format(**entry)
            times[place] += 1
            name = place if times[place] == 1 else f"{place}-{times[place]}"  # a few keys repeat
            rows.append(_gedit_row(entry, name, folder, Path(settings.out).resolve(), where))
            # the last is how the authors of the method write them
            short = "{task_type}/{key}".format(**entry)
            rows[-1]["files"] = [f"fullset/{name}", f"fullset/{place}", name, place, short]
    if not rows:
        raise BadInput(
            f"{folder}: holds no rows in --language {settings.language}, in parquet, arrow or "
            "metadata.jsonl; name GEdit-Bench's folder"
        )
    return rows, prompts


def _gedit_row(entry, name, folder, out, where):
    """A checked row of GEdit-Bench; pictures that are stored in it are written below `out`."""
    inside(out, f"{name}.png", where)
    raw = _stored_picture(entry.get("input_image_raw"), out / f"sources/{name}.png")
    shown = _stored_picture(entry.get("input_image"), out / f"sources/{name}_shown.png")
    if not (raw or shown):
        _check_entry(entry, ("file_name",), where)
        raw = inside(folder, entry["file_name"], where)
    return {
        "row": name,
        "prompt": entry["instruction"],
        "images": [raw or shown],
        "shown": shown or raw,
        "task": entry["task_type"],
        "language": entry["instruction_language"],
        "intersection": bool(entry.get("Intersection_exist")),
    }


def _stored_picture(value, path):
    """Writes the bytes of a table's picture to `path`, unless they are there; "" for no picture."""
    content = value.get("bytes") if isinstance(value, dict) else None
    if not content:
        return ""
    if not path.is_file() or path.read_bytes() != content:
        with whole_file(path) as part:
            part.write_bytes(content)
    return str(path)


VIE_TEXTS = {  # what VIEScore puts together
    "SC": (
        "_context_no_delimit",
        "_prompts_0shot_two_image_edit_rule",
        "_prompts_0shot_tie_rule_SC",
    ),
    "PQ": ("_context_no_delimit", "_prompts_0shot_rule_PQ"),
}


def _read_vie_prompts(file):
    """{"SC", "PQ"} from a Python file, whose constants are read as literals and never executed."""
    texts = {}
    try:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                texts[ast.unparse(node.targets[0])] = node.value.value
        return {call: "\n".join(map(texts.get, names)) for call, names in VIE_TEXTS.items()}
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        raise BadInput(
            f"{file}: has not the texts of VIEScore ({error}); take GEdit-Bench's vie_prompts.py"
        ) from None


def _find_file(folders, names):
    """The first of `names` in `folders`."""
    found = _first_file(folder / name for folder, name in itertools.product(folders, names))
    if found is None:
        raise BadInput(f"{folders[0]}: holds no {' or '.join(names)}; put the benchmark's there")
    return found


def _first_file(paths):
    return next(filter(os.path.isfile, paths), None)


READERS = {"imgedit": _read_imgedit, "gedit": _read_gedit, "heldout": _read_heldout}


def load_benchmark(settings: Settings) -> tuple[Rows, dict]:
    """(rows, the judge's prompts by task or call); BadInput when it is not as it should be.

    rows: dicts with `row` (its name), `prompt`, `images` (paths), `task`, `source` (whose picture
    it is), `files` (where its edit may lie in a subject's folder, without ending; the first is
    ours), `hash` (of all that is asked for), ImgEdit's `labels`, GEdit's `language`,
    `intersection` and `shown` (the source as its judge sees it).
    """
    folder = Path(settings.bench).resolve()
    if not settings.bench or not folder.is_dir():
        raise BadInput(f"--bench {settings.bench}: no such folder; name the benchmark's")
    rows, prompts = READERS[settings.benchmark](folder, settings)
    for row in rows:
        hashes = []
        for path in map(Path, [*row["images"], row.get("shown", row["images"][0])]):
            if not path.is_file():
                raise BadInput(
                    f"{path}: the picture of row {row['row']} is not there; put the pictures "
                    "beside the metadata"
                )
            hashes.append(_hash_of(path))
        row.setdefault("source", hashes[0])
        row["hash"] = _hash_of([row["row"], row["prompt"], hashes])
    return rows, prompts


# ---------------------------------------------------------------- one evaluation


@dataclass(frozen=True)
class Job:
    """What an evaluation works on."""

    settings: Settings
    accelerator: Accelerator
    stop: threading.Event  # set by a signal
    rows: Rows  # as load_benchmark tells
    prompts: dict[str, str]

    @property
    def mine(self):
        """This process's share of the rows."""
        return self.rows[self.accelerator.process_index :: self.accelerator.num_processes]

    @property
    def dtype(self):
        return torch.bfloat16 if self.accelerator.device.type == "cuda" else torch.float32

    def refuse_when_stopped(self):
        if self.stop.is_set():
            raise Stopped

    def warn(self, text):
        """Says something once, whatever the number of processes."""
        if self.accelerator.is_main_process:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def bar(self, work, name, total=None):
        """A progress bar, shown by one process."""
        return tqdm(work, name, total, disable=not self.accelerator.is_main_process)


def _subjects_of(settings):
    """Whose edits are scored, the one in question first."""
    names = sorted(settings.baselines)
    if settings.edits:
        names.insert(0, "edits")
    elif settings.lora:
        names.insert(0, "trained")
    elif settings.base or not names:
        names.insert(0, "base")
    return list(dict.fromkeys(names))


def _find_picture(folder, stems):
    """The first picture of these names, without their endings, in a folder; None without any."""
    names = itertools.product(stems, ENDINGS)
    return _first_file(Path(folder, stem + ending) for stem, ending in names)


def _find_edit(settings, row, subject):
    """Where a row's edit lies, None where there is none."""
    if subject == "source":
        return Path(row["images"][0])
    if subject == "edits":
        return _find_picture(settings.edits, row["files"])
    return _find_picture(Path(settings.out, subject), row["files"][:1])


def _check_folder(job, flag):
    """BadInput when a folder of --edits or --masks is for no row."""
    folder = getattr(job.settings, flag)
    if folder and not any(_find_picture(folder, row["files"]) for row in job.rows):
        raise BadInput(
            f"--{flag} {folder}: has nothing for any row, no {job.rows[0]['files'][0]}.png; name a "
            "folder in the benchmark's layout"
        )


# ---------------------------------------------------------------- sample: the edits


def _weights_hash(place):
    """A hash of the names, sizes and first megabytes of a model's or LoRA's files; a hub id is its
    own."""
    known = []
    for file in [Path(place), *sorted(Path(place).rglob("*"))]:
        if file.is_file():
            with open(file, "rb") as stored:
                known.append([file.name, file.stat().st_size, stored.read(2**20).hex()])
    return _hash_of(known or place)


def _is_current(path, recipe):
    """Whether a drawn edit is there, whole and of this recipe."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(MADE_FROM) == recipe
    except (OSError, ValueError, SyntaxError):
        return False


class Undrawn(NamedTuple):
    """An edit to be drawn."""

    subject: str
    row: dict
    path: Path
    recipe: str  # a hash of all that it is made from


def _find_undrawn(job):
    """What is not there as it should be of this process's share of the edits."""
    settings = job.settings
    todo = []
    for subject in sorted({*_subjects_of(settings)} & {"trained", "base"}):
        if not settings.base:
            raise BadInput("--base is missing; name the editor, or a folder of finished --edits")
        made_from = [getattr(settings, name) for name in DRAWN_WITH]
        made_from.append(_weights_hash(settings.base))
        if subject == "trained":
            made_from.append(_weights_hash(settings.lora))
        for row in job.mine:
            path = Path(settings.out, subject, f"{row['files'][0]}.png")
            recipe = _hash_of([made_from, row["hash"]])
            if not _is_current(path, recipe):
                todo.append(Undrawn(subject, row, path, recipe))
    return todo


def draw_edits(job: Job) -> None:
    """Draws what has to be; an edit's noise comes from its seed alone."""
    settings = job.settings
    todo = _find_undrawn(job)
    if not todo:
        return
    editor = load_editor(
        settings.base,
        job.accelerator.device,
        job.dtype,
        settings.resolution,
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.lora:
        add_policies(editor, averages=(), start=settings.lora)
    for edit in job.bar(todo, "edits"):
        job.refuse_when_stopped()
        sources = [load_image(path) for path in edit.row["images"]]
        noise = [torch.Generator().manual_seed(settings.seed)]
        asked = (edit.row["prompt"], noise, settings.steps, settings.guidance)
        with policy(editor, "new" if edit.subject == "trained" else "base"):
            group = rollout(editor, sources, *asked, evaluation=True)
        if settings.benchmark == "gedit":  # its layout has the source beside
            with whole_file(edit.path.with_name(f"{edit.path.stem}_SRCIMG.png")) as part:
                load_image(edit.row["shown"]).save(part, "PNG")
        info = PngImagePlugin.PngInfo()
        info.add_text(MADE_FROM, edit.recipe)
        with whole_file(edit.path) as part:
            group.images[0].save(part, "PNG", pnginfo=info)


# ---------------------------------------------------------------- judge: the calls


# what a record tells of its row
ROW_KEYS = ("row", "task", "source", "language", "intersection", "labels", "target_scene")


class Call(NamedTuple):
    """One question about one edit."""

    record: dict  # `subject`, `call`, `key`: a hash of what an answer must be for; ROW_KEYS
    row: dict
    text: str
    path: Path | None  # of the edit


def _find_calls(job, rows):
    """The questions about every edit of these rows, also about those that are missing."""
    calls = []
    for subject in _subjects_of(job.settings):
        for row in rows:
            path = _find_edit(job.settings, row, subject)
            edit = _hash_of(path) if path else ""
            for name in CALLS[job.settings.benchmark]:
                text = _question(job, row, name)
                record = {key: row[key] for key in ROW_KEYS if key in row}
                record |= {"subject": subject, "call": name}
                record["key"] = _hash_of([name, text, row["hash"], edit])
                calls.append(Call(record, row, text, path))
    return calls


def _question(job, row, call):
    """What the judge is asked: the prompt with the instruction in its place."""
    if job.settings.benchmark == "heldout":
        return f"{row['prompt']}\n{requirement_of(row)}"
    text = job.prompts.get(call) or job.prompts[row["task"]]
    # one pass: an instruction may itself hold such words
    return re.sub("<edit_prompt>|<instruction>", lambda place: row["prompt"], text)


def _read_answers(job, label):
    """{key: its newest record} of all processes' files of a judge; what cannot be read is none."""
    records = []
    faults = []
    for file in Path(job.settings.out).glob(f"calls-{label}-*.jsonl"):
        found = [record for _, record in read_json_lines(file, faults)]
        records += [record for record in found if isinstance(record.get("time"), float)]
    if faults:
        job.warn(f"{len(faults)} calls do not count, such as {faults[0]}")
    records.sort(key=itemgetter("time"))
    return {str(record.get("key")): record for record in records}


def _label_of(job, judge):
    """The judge's name and a hash of how it is asked: results of two labels never mix."""
    asked = job.prompts or [judge.prompts, *(getattr(job.settings, name) for name in HOW_ASKED)]
    return "-".join([*re.findall(r"[\w.]+", judge.name), _hash_of([judge.name, asked])])


def judge_edits(job: Job) -> None:
    """Asks the judge what has no good answer yet, several calls at a time, and appends each as one
    line as it comes."""
    settings = job.settings
    judge = load_judge(settings, job.accelerator.device, job.dtype, stop=job.stop)
    _warn_of_own_judge(job, judge)
    label = _label_of(job, judge)
    done = {key for key, call in _read_answers(job, label).items() if "failure" not in call}
    calls = [call for call in _find_calls(job, job.mine) if call.path]
    todo = [call for call in calls if call.record["key"] not in done]
    file = Path(settings.out, f"calls-{label}-{job.accelerator.process_index}.jsonl")
    pool = ThreadPoolExecutor(settings.judge_in_flight * (1 + settings.judge.count(",")))
    calls = {pool.submit(_answer, job, judge, call): call for call in todo}
    failures = []
    try:
        for future in job.bar(as_completed(calls), "judge", len(todo)):
            record = future.result()
            if job.stop.is_set() and "failure" in record:
                continue  # given up, not answered
            append_json_line(file, calls[future].record | record | {"time": time.time()})
            failures.append(record.get("failure"))
            if len(failures) == 8 and all(failures):
                raise BadInput(
                    f"{settings.judge}: its first 8 calls all failed ({failures[-1]}); see to the "
                    "judge, which must take pictures, and start again"
                )
    finally:
        pool.shutdown(cancel_futures=True)
        judge.close()


def _warn_of_own_judge(job, judge):
    """A warning when the LoRA was trained with this very judge."""
    lora = job.settings.lora
    config = Path(lora).parent / "config.json"
    if lora and config.is_file():
        trained = _read_json(config, "take a run's own folder")
        if trained.get("judge") == job.settings.judge:
            job.warn(
                f"{judge.name} is the judge that {lora} was trained with; its scores tell how well "
                "it is pleased: let another judge have the last word"
            )


def _answer(job, judge, call):
    """The record of a call: its answer, or the cause of its failure."""
    if job.stop.is_set():
        return {"failure": "stopped"}
    try:
        *sources, edit = map(load_image, [*call.row["images"], call.path])
        if job.settings.benchmark == "heldout":
            return _heldout_answer(judge, call.row, sources, edit)
        if job.settings.benchmark == "gedit":
            source, edit = _as_gedit_shows(load_image(call.row["shown"]), edit)
            # quality is judged without the source
            sources = [] if call.record["call"] == "PQ" else [source]
        return {"reply": judge.ask(call.text, [*sources, edit], job.settings.reply_tokens)}
    except (JudgeFailure, BadInput) as failure:
        return {"failure": str(failure)}


def _heldout_answer(judge, row, sources, edit):
    """The judge's own score of an edit, and the oracle's where there is one."""
    scores = judge.score(row, sources, [edit])
    record = {"scores": scores.score.tolist(), "reply": "".join(scores.words)}
    if scores.score.isnan():
        record = {"failure": "".join(scores.causes) or "no score"}
    truth = oracle(row, edit)
    if truth:
        record["truth"] = dict(zip(METRICS["heldout"][1:], truth, strict=True))
    return record


def _as_gedit_shows(source, edit):
    """Source and edit as GEdit's scorer shows them: at the size of the stored source, whose sides
    are multiples of 32 at about 512 x 512 pixels, and through JPEG."""
    size = source.size
    if size[0] % 32 or size[1] % 32:  # not the stored one
        scale = 512 / math.sqrt(size[0] * size[1])
        size = [max(32, 32 * round(side * scale / 32)) for side in size]
    shown = []
    for picture in (source, edit):
        content = io.BytesIO()
        picture.resize(size).save(content, "JPEG")
        shown.append(load_image(content))
    return shown


# ---------------------------------------------------------------- what is kept of the source


def _kept_of_source(job, call):
    """PSNR and SSIM of an edit to its first source, outside the mask if there is one."""
    job.refuse_when_stopped()
    if call.path is None or call.record["subject"] == "source":
        return {}
    mask = call.row.get("mask")
    if job.settings.masks:
        mask = _find_picture(job.settings.masks, call.row["files"])
    try:
        source, edit = load_image(call.row["images"][0]), load_image(call.path)
        mask = load_image(mask) if mask else None
    except BadInput:
        return {}
    psnr = plain_terms(source, [edit], mask)["psnr"]
    return {"psnr": psnr.item(), "ssim": _ssim(source, edit, mask)}


def _ssim(source, edit, mask=None):
    """Structural similarity of two pictures' luminance, in [-1, 1], at the edit's size: the mean
    over what is not white in the mask, NaN where all is.

    7 x 7 windows, sample covariance, as scikit-image's default (Wang et al., 2004).
    """

    def plane(picture):
        grey = picture.convert("L").resize(edit.size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(grey, np.float64) / 255)  # (H, W)

    x, y = plane(source), plane(edit)
    moments = torch.stack([x, y, x * x + y * y, x * y])
    mean_x, mean_y, squares, product = F.avg_pool2d(moments, 7, stride=1)  # (H - 6, W - 6) each
    means = mean_x**2 + mean_y**2
    variances = 49 / 48 * (squares - means)
    covariance = 49 / 48 * (product - mean_x * mean_y)
    # the paper's 0.01^2 and 0.03^2 keep dark and flat places stable
    alike = (2 * mean_x * mean_y + 1e-4) / (means + 1e-4)
    alike = alike * (2 * covariance + 9e-4) / (variances + 9e-4)
    if mask is not None:
        alike = alike[plane(mask)[3:-3, 3:-3] < 0.5]
    return alike.mean().item()


# ---------------------------------------------------------------- score: tables and report


def score_calls(job: Job) -> Rows:
    """Adds up each judge's calls into scores-JUDGE-MODE.json and returns what was written.

    What lay there before goes: calls of other edits or other questions do not count.
    """
    out = Path(job.settings.out)
    benchmark, mode = job.settings.benchmark, job.settings.mode
    calls = _find_calls(job, job.rows)
    kept = [_kept_of_source(job, call) for call in job.bar(calls, "kept of the source")]
    results = {}
    names = (file.stem.removeprefix("calls-") for file in out.glob("calls-*.jsonl"))
    for label in sorted({name.rpartition("-")[0] for name in names}):  # of all processes
        answers = _read_answers(job, label)
        if answers.keys() & {call.record["key"] for call in calls}:
            records = _records_of(calls, kept, answers)
            results[out / f"scores-{label}-{mode}.json"] = {
                "benchmark": benchmark,
                "judge": label,
                "mode": mode,
                "metadata": _hash_of([row["hash"] for row in job.rows]),
                "subjects": {name: score(benchmark, records[name], mode) for name in records},
            }
    if not results:
        raise BadInput(f"{out}: holds no calls of a judge on these edits; run --stage judge first")
    for file, result in results.items():
        with whole_file(file) as part:
            part.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    for file in set(out.glob("scores-*.json")) - results.keys():
        file.unlink()
    return list(results.values())


def _records_of(calls, kept, answers):
    """{subject: a record of each of its calls, answered or not}."""
    records = {}
    for call, values in zip(calls, kept, strict=True):
        empty = {"failure": "not judged" if call.path else MISSING}
        said = answers.get(call.record["key"], empty)
        records.setdefault(call.record["subject"], []).append(said | call.record | values)
    return records


def _shown(mean, form=".3f"):
    """A mean with its interval as text."""
    value, low, high = mean
    if value is None:
        return "-"
    if low is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _as_text(groups, title):
    """A result's tables: for each group its coverage, and a line a task with the mean and interval
    of each metric."""
    lines = []
    for group, table in groups.items():
        names = _metrics_in(table)
        lines.append(f"{title}, {group}: {table['answered']} of {table['rows']} rows answered")
        lines.append(_line("", names))
        for task in table[names[0]]:
            means = [_shown(table[name].get(task, [None] * 3)) for name in names]
            lines.append(_line(task, means))
    return "\n".join(lines)


def _line(first, cells):
    return f"  {first:16} " + " ".join(f"{cell:26}" for cell in cells).rstrip()


def _metrics_in(table):
    return [name for name in table if name not in ("rows", "answered")]


def _differences(a, b, benchmark, names):
    """The paired differences of two lists of row results as tables and in words."""
    groups = paired_differences(a, b, METRICS[benchmark])
    lines = [_as_text(groups, " - ".join(names))]
    for group, table in groups.items():
        kept = table.get("psnr", {}).get("macro")
        lines.append(f"{group}: " + _verdict(table[METRICS[benchmark][0]]["macro"], *names, kept))
    return "\n".join(lines)


def _describe(settings, result):
    """What a person reads first: every table, the gain over the baselines, and a row for a table of
    published numbers."""
    rows = {subject: content["rows"] for subject, content in result["subjects"].items()}
    first, *others = rows
    lines = [
        f"{settings.benchmark}, {result['mode']} reading, judge and prompts {result['judge']}, "
        f"{len(rows[first])} rows, metadata {result['metadata']}"
    ]
    for subject, content in result["subjects"].items():
        lines.append(_as_text(content["groups"], subject))
        silent = [row["said"] for row in content["rows"] if not row["answered"]]
        if silent:
            missing = sum(MISSING in said for said in silent)
            lines.append(
                f"warning: {subject}: {missing} edits missing, {len(silent) - missing} without a "
                "score"
            )
    for other in others:
        lines.append(_differences(rows[first], rows[other], settings.benchmark, (first, other)))
    return "\n".join([*lines, *_pasted_row(settings, result, first)])


def _pasted_row(settings, result, subject):
    """A subject as a row of a Markdown table, with its header."""
    name = settings.edits or settings.base or subject
    if subject == "trained":
        name += f" + {settings.lora}"
    cells = {"model": name, "judge": result["judge"], "mode": result["mode"]}
    for group, table in result["subjects"][subject]["groups"].items():
        for metric in _metrics_in(table):
            cells[f"{group} {metric}"] = _shown(table[metric]["macro"])
        cells[f"{group} rows answered"] = f"{table['answered']} of {table['rows']}"
    lines = (cells, ["---"] * len(cells), cells.values())
    return [f"| {' | '.join(line)} |" for line in lines]


PAGE = """<!doctype html><meta charset="utf-8"><title>edit-nft: evaluation</title><style>
body {font: 14px system-ui, sans-serif; margin: 1.5em; color: #222}
pre {background: #f4f4f4; padding: .8em; overflow: auto}
article {display: flex; flex-wrap: wrap; gap: 12px; border-top: 1px solid #ddd; padding: 12px 0}
[hidden] {display: none !important} article > div {flex: 0 0 230px}
figure {margin: 0; width: 260px} small {color: #666} details {white-space: pre-wrap}
img {width: 260px; height: 260px; object-fit: contain; background: #f4f4f4}
.tiny {image-rendering: pixelated} figcaption {min-height: 2.5em}
details:has(span:empty) {display: none}</style>
<h1>edit-nft: evaluation</h1><pre>@SUMMARY@</pre>
<label>task <select id="task"><option value="">all</option></select></label>
<label>rows <select id="kind"><option value="">all</option></select></label>
<label>order <select id="order"><option value="1">worst first</option>
<option value="-1">best first</option></select></label>
<span id="count"></span><main>@ROWS@</main><script>
for (const image of document.querySelectorAll("img"))
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth <= 128);
const rows = [...document.querySelectorAll("article")];
const [task, kind, order, count] = ["task", "kind", "order", "count"].map(
  id => document.getElementById(id));
const fill = (menu, names) => {
  for (const name of [...new Set(names)].sort()) menu.add(new Option(name, name));
};
fill(task, rows.map(row => row.dataset.task));
fill(kind, rows.flatMap(row => row.dataset.kinds.split(" ").filter(name => name)));
const shown = row => (!task.value || row.dataset.task === task.value)
  && (!kind.value || row.dataset.kinds.split(" ").includes(kind.value));
task.onchange = kind.onchange = order.onchange = () => {
  rows.sort((a, b) => order.value * (a.dataset.score - b.dataset.score));
  rows.forEach(row => row.parentNode.append(row));
  rows.forEach(row => row.hidden = !shown(row));
  count.textContent = rows.filter(row => !row.hidden).length + " rows";
};
order.onchange();</script>
"""
ARTICLE = """<article data-task="{task}" data-kinds="{kinds}" data-score="{score}">
<div><b>{prompt}</b><p>{task}</p><small>{row}</small></div>{figures}</article>
"""
FIGURE = """<figure><figcaption>{caption}</figcaption>
<img alt="no edit" loading="lazy" src="{link}"><details><summary>the judge's words</summary>
<span>{said}</span></details></figure>"""


def write_report(job: Job, results: Rows, summary: str) -> None:
    """report.html with small pictures beside it, and grid.png: of each task the row with the median
    score."""
    out = Path(job.settings.out)
    main_metric = METRICS[job.settings.benchmark][0]
    subjects = _subjects_of(job.settings)
    first = results[0]["subjects"][subjects[0]]["rows"]  # of the subject in question
    articles = ""
    by_task = {}
    for number, row in enumerate(job.bar(job.rows, "report")):
        job.refuse_when_stopped()
        names = dict.fromkeys(["source", *reversed(subjects)])  # source, base, trained
        edits = [_show_edit(job, results, number, name) for name in names]
        rank = np.nan_to_num(first[number][main_metric], nan=-1.0)
        texts = {key: escape(row[key]) for key in ("task", "prompt", "row")}
        kinds = [row.get("language", ""), "" if first[number]["answered"] else "failed"]
        figures = "".join(figure for _, _, figure in edits)
        articles += ARTICLE.format(**texts, kinds=" ".join(kinds), score=rank, figures=figures)
        by_task.setdefault(row["task"], []).append((rank, number, edits))
    page = PAGE.replace("@SUMMARY@", escape(summary)).replace("@ROWS@", articles)
    with whole_file(out / "report.html") as part:
        part.write_text(page, encoding="utf-8")
    pictures = []
    captions = []
    for _, found in sorted(by_task.items()):
        _, _, edits = sorted(found)[len(found) // 2]
        pictures.append([picture for picture, _, _ in edits])
        captions.append([caption for _, caption, _ in edits])
    with whole_file(out / "grid.png") as part:
        picture_grid(pictures, captions, "of each task the row with the median score").save(part)


def _show_edit(job, results, number, name):
    """(picture, caption, html) of a row's edit, with its scores under each judge and what was said
    of it; the picture, small, is written."""
    row = job.rows[number]
    caption = f"source: {row['prompt']}" if name == "source" else name
    said = ""
    for result in results:
        if name in result["subjects"]:
            scored = result["subjects"][name]["rows"][number]
            metrics = [key for key in (*METRICS[result["benchmark"]], "psnr") if key in scored]
            values = " ".join(f"{key} {scored[key]:.2f}" for key in metrics)
            caption += f" {values.replace('nan', 'missing')} by {result['judge']};"
            said += f"{scored['said']}\n"
    picture, link = None, ""
    with suppress(BadInput):
        picture = load_image(_find_edit(job.settings, row, name) or MISSING)
    if picture:
        link = f"report/{number:05}-{name}.jpg"
        picture.thumbnail((384, 384))
        with whole_file(Path(job.settings.out, link)) as part:
            picture.save(part, quality=95, subsampling=0)
    figure = FIGURE.format(caption=escape(caption), link=link, said=escape(said.strip()))
    return picture, caption, figure


# ---------------------------------------------------------------- two runs


def compare(places: list[str]) -> None:
    """Prints the paired differences of two runs' first subjects under each judge and reading that
    both have."""
    if len(places) != 2:
        raise BadInput("compare: name two runs, python evaluate.py compare RUN_A RUN_B")
    first, second = map(_read_results, places)
    both = " and ".join(places)
    shared = first.keys() & second.keys()
    if not shared:
        raise BadInput(f"{both}: no result under one judge, prompts and reading; score both alike")
    for name in sorted(shared):
        a, b = first[name], second[name]
        if a["metadata"] != b["metadata"]:
            raise BadInput(f"{both}: another version of the benchmark in each; score both on one")
        print(f"judge and prompts {a['judge']}, {a['mode']} reading")
        rows = [next(iter(result["subjects"].values()))["rows"] for result in (a, b)]
        print(_differences(*rows, a["benchmark"], places))


def _read_results(place):
    """{file name: result} of an --out folder; BadInput for none, or for one that is no JSON."""
    files = Path(place).glob("scores-*.json")
    results = {file.name: _read_json(file, "run --stage score again") for file in files}
    if not results:
        raise BadInput(f"{place}: holds no scores; name an --out folder of evaluate.py")
    return results


# ---------------------------------------------------------------- does a judge agree with people?


def read_ratings(file: Path) -> Rows:
    """The rows of a file of rated edits, with `sources` and `edits` (pictures) and `labels`.

    A line has `prompt`, `image`, `edits` and `scores`, a number for each edit, the higher the
    better; for two edits also `preference` in place of scores: 0 the first is better, 1 the
    second, 0.5 neither. Paths are relative to the file.
    """
    rows = read_rows(file.parent, file.stem)
    for row in rows:
        try:
            labels = row.get("scores") or [1 - row["preference"], row["preference"]]
            row["labels"] = [float(label) for label in labels]
            row["edits"] = [load_image(file.parent / path) for path in row["edits"]]
            if len(labels) != len(row["edits"]):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise BadInput(
                f"{file}: {row['id']} lacks `edits` with as many `scores`, or with a `preference`; "
                "add them"
            ) from None
        row["sources"] = [load_image(path) for path in row["images"]]
    return rows


def _ordered_pairs(scores, labels):
    """Of each pair of edits that labels tell apart: 1 if the scores order them alike, 0 if not,
    0.5 if they tie. Pairs with a score that is NaN are left out."""
    outcomes = []
    for (a, x), (b, y) in itertools.combinations(zip(scores, labels, strict=True), 2):
        if x == y or math.isnan(a - b):
            continue
        is_tie = abs(a - b) < 1e-6
        outcomes.append(0.5 if is_tie else float((a > b) == (x > y)))
    return outcomes


def agree(words: list[str]) -> None:
    """Prints how far the judge orders edits as people do."""
    if not words or not words[0].endswith(".jsonl"):
        raise BadInput("agree: names no file; write evaluate.py agree FILE.jsonl --judge ...")
    settings = parse_settings(JudgeSettings, words[1:], agree.__doc__, judge=TOY)
    rows = read_ratings(Path(words[0]))
    judge = load_judge(settings, stop=catch_signals())
    outcomes = []
    places = []  # the row of each pair
    scores = []
    labels = []
    for place, row in enumerate(rows):
        found = judge.score(row, row["sources"], row["edits"]).score.tolist()
        pairs = _ordered_pairs(found, row["labels"])
        outcomes += pairs
        places += [place] * len(pairs)
        scores += found
        labels += row["labels"]
    judge.close()
    _, draws = bootstrap(outcomes, ["all"] * len(outcomes), places)
    right = _shown(_interval(outcomes, draws), ".1%")
    ties = outcomes.count(0.5) / max(len(outcomes), 1)
    scores, labels = torch.tensor([scores, labels])  # (all edits,) each
    known = ~scores.isnan()
    order = spearman(scores[known], labels[known])
    print(
        f"{settings.judge}, {settings.judge_strategy}: {len(scores)} edits of {len(rows)} "
        f"sources; right pairs {right}, ties {ties:.1%}, Spearman {order:.3f}, "
        f"failed {1 - known.float().mean():.1%}"
    )


# ---------------------------------------------------------------- training runs as curves

CURVES = (
    "reward/mean",
    "heldout/new/judge",
    "heldout/new/oracle",
    "heldout/new/success",
    "groups/kept",
    "update/drift_base",
    "update/norm_ratio",
    "reward/psnr",
)


@dataclass(frozen=True)
class CurvesSettings(CheckedSettings):
    """Training runs of one setting, such as its seeds."""

    runs: list[str] = setting([], "Folders with a log.jsonl; also the first words.")
    out: str = setting("curves.png", "The picture.")


def curves(words: list[str]) -> None:
    """Draws what runs logged, by epoch: their mean as a line, from lowest to highest as a band."""
    settings = parse_settings(CurvesSettings, ["--runs", *words], curves.__doc__)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("curves: needs matplotlib; pip install matplotlib") from None
    logs = [read_json_lines(Path(run, "log.jsonl"), faults=[]) for run in settings.runs]
    figure = Figure((14, 7), layout="constrained")
    for axes, name in zip(figure.subplots(2, 4).flat, CURVES, strict=True):
        values = {}  # epoch -> what the runs that have come so far logged
        for _, record in itertools.chain(*logs):
            if name in record:
                values.setdefault(record["epoch"], []).append(record[name])
        epochs = sorted(values)
        found = [values[epoch] for epoch in epochs]
        axes.plot(epochs, list(map(np.mean, found)), marker=".")
        axes.fill_between(epochs, list(map(min, found)), list(map(max, found)), alpha=0.3)
        axes.set_title(name)
    with whole_file(settings.out) as part:
        figure.savefig(part, format="png")
    print(f"wrote {settings.out}")


# ---------------------------------------------------------------- the command


def _begin(settings, accelerator, stop):
    """What is to be done, checked; parts of it are written into --out. BadInput when edits of other
    settings lie there."""
    file = Path(settings.out, "config.json")
    before = _read_json(file, "give another --out") if file.is_file() else asdict(settings)
    for name in DRAWN:
        value = before.get(name)
        if value != getattr(settings, name):
            raise BadInput(
                f"{settings.out}: was begun with --{name} {value}, not {getattr(settings, name)}; "
                "give another --out"
            )
    with whole_file(file) as part:
        part.write_text(json.dumps(asdict(settings), indent=1))
    job = Job(settings, accelerator, stop, *load_benchmark(settings))
    _check_folder(job, "edits")
    _check_folder(job, "masks")
    return job


def _run_stages(settings, accelerator, stop):
    """Draws, judges and adds up. Raises Stopped on all processes when one has to stop."""
    job = None
    with ExitStack() as held:
        with together(accelerator, stop):
            if accelerator.is_main_process:  # first: it writes
                held.enter_context(locked(settings.out))
                job = _begin(settings, accelerator, stop)
        with together(accelerator, stop):
            job = job or _begin(settings, accelerator, stop)
        for stage, work in (("sample", draw_edits), ("judge", judge_edits)):
            with together(accelerator, stop):
                if settings.stage in ("all", stage):
                    work(job)
        if settings.stage in ("all", "score") and accelerator.is_main_process:
            results = score_calls(job)
            summary = "\n".join(_describe(job.settings, result) for result in results)
            write_report(job, results, summary)
            print(f"{summary}\nwrote {settings.out}/report.html and grid.png")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "no command"
    others = {"compare": compare, "agree": agree, "curves": curves}
    if command in others:
        return others[command](argv[1:])
    if command not in METRICS:
        raise BadInput(
            f"{command}: say what to score: {', '.join(METRICS)}; or {', '.join(others)}"
        )
    settings = parse_settings(Settings, ["--benchmark", *argv], __doc__.splitlines()[0])
    stop = catch_signals()
    accelerator = start_processes()
    try:
        _run_stages(settings, accelerator, stop)
    except Stopped as stopped:
        if stopped.__cause__ and not isinstance(stopped.__cause__, Stopped):
            raise stopped.__cause__ from None
        if accelerator.is_main_process:
            kept = "every finished edit and call is kept; the same command goes on"
            print(f"stopped: {settings.out}: {kept}", file=sys.stderr)
        sys.exit(1)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
