"""Scores an editor on ImgEdit-Bench, GEdit-Bench or a held-out set: draws, asks a judge, adds up.

    python evaluate.py imgedit --bench DIR --base MODEL [--lora RUN/checkpoint-N] --judge URL --out RUN
    python evaluate.py gedit --language both ...     # the same settings
    python evaluate.py heldout --bench DATASET ...   # the test split of a dataset folder
    python evaluate.py compare RUN_A RUN_B           # the paired difference with its interval
    python evaluate.py agree FILE.jsonl --judge ...  # how far a judge orders edits as people do
    python evaluate.py curves RUN [RUN ...]          # log.jsonl of training runs as curves.png

Three stages, each resumable, each alone with --stage: `sample` draws the edits in the benchmark's
own layout, `judge` appends every call as a JSON line, `score` adds those up. `accelerate launch`
splits the rows over processes. A subject is whose edits are scored: trained (with --lora), base,
edits (--edits, made by anything), source (nothing done).

Nothing stale counts: an edit is drawn again when its weights, source, prompt or settings are not
those that are written in its PNG file; an answer counts for the very edit, sources, text and judge
that it was given for, and of several the newest.

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
import functools
import hashlib
import io
import itertools
import json
import math
import re
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from data_prep import (
    BadInput,
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
    whole_file,
)
from reward_mllm import (
    STRATEGIES,
    TOY,
    Judge,
    JudgeFailure,
    JudgeSettings,
    load_judge,
    plain_terms,
    requirement_of,
)
from sample import add_policies, load_editor, policy, rollout

METRICS = {  # the main one first; those of all benchmarks follow
    "imgedit": ("score",),
    "gedit": ("O", "SC", "PQ"),
    "heldout": ("judge", "oracle", "success"),
}
PARTS = {  # what a score is made of
    "imgedit": ("score 1", "score 2", "score 3"),
    "gedit": ("SC 1", "SC 2", "PQ 1", "PQ 2"),
    "heldout": (),
}
KEPT = ("psnr", "ssim")  # how much of the source is kept
CALLS = {"imgedit": ("edit",), "gedit": ("SC", "PQ"), "heldout": ("judge",)}  # questions on an edit
PUBLISHED_ROWS = {"imgedit": 737, "gedit en": 606, "gedit cn": 606, "gedit both": 1212}
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG")
MADE_FROM = "made from"  # the PNG's text that says what an edit was drawn from

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
    prompts: str = setting("", "judge_prompt.json or vie_prompts.py, if not in --bench.")
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


DRAWN = (  # settings that all edits in one --out share
    "benchmark",
    "bench",
    "base",
    "lora",
    "edits",
    "steps",
    "seed",
    "guidance",
    "resolution",
    "language",
)


def short_hash(content: str | bytes) -> str:
    """The first 12 hex digits of a sha256."""
    if isinstance(content, str):
        content = content.encode()
    return hashlib.sha256(content).hexdigest()[:12]


@functools.cache
def file_hash(path: str | Path) -> str:
    """short_hash of a file; "" where there is none. A picture is hashed once in a run."""
    path = Path(path)
    return short_hash(path.read_bytes()) if path.is_file() else ""


def read_json(file: Path, fix: str) -> dict:
    """The object in a JSON file, not an empty one; BadInput with the fix for anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: not JSON ({error}); {fix}") from None
    if not isinstance(value, dict) or not value:
        raise BadInput(f"{file}: holds no entries; {fix}")
    return value


# ---------------------------------------------------------------- reading an answer

LINE = r"(?m:^)"
WITHIN = r"(?m:^|[,;{(|.])"  # at the start of a line, or after punctuation
LABEL = r"\W*?(?:\d+[.)]\s*)?([^\W\d][\w &/()'’-]{1,60}?)"
SEPARATOR = r"(?:\s*[:=|]+|\s+[-–—]|\s+is\b)\s*"
NUMBER = r"(\d+(?:\.\d+)?)(?!\.?\d)"
END = r"(?=\s*(?:[,;.|(){}\n]|$)|\s+[-–—]\s)"
UNWANTED = re.compile(r"(?i)reason|overall|average|total|\bsum\b|final|expla|analysis|rationale")
EASTERN = str.maketrans("。、【】「」", ".,[][]")  # what NFKC leaves as it is


def final_answer(reply: str) -> str:
    """A reply without thoughts and marks around the answer; "" where the thoughts never end."""
    text = reply.rpartition("</think>")[2]
    if "<think" in text:
        return ""
    text = unicodedata.normalize("NFKC", text).translate(EASTERN)  # full-width digits, colons ...
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"</?answer>|<\|(?:begin|end)_of_box\|>", "\n", text)


def labels_of(prompt: str) -> tuple[str, ...]:
    """The three labels of scores that a prompt of ImgEdit's judge asks for; () where it is unlike."""
    found = re.findall(r"(?m)^\W*([^\W\d][^:\n]*?)\W*:\W*[Aa] number\b", prompt)
    labels = tuple(dict.fromkeys(plain_label(label) for label in found))
    return labels if len(labels) == 3 else ()


def plain_label(label: str) -> str:
    return label.strip().lower().replace("_", " ").replace("&", "and")


def parse_imgedit(reply: str, mode: str = "strict", labels: tuple = ()) -> list[float] | None:
    """The list of scores in an answer of ImgEdit's judge; None where there are none.

    strict: three differently labelled ones, from 1 to 5, those of `labels` if the prompt names its
    three. official: what is digits alone after a line's one ": ".
    """
    if mode == "official":
        pairs = [line.strip().split(": ") for line in reply.splitlines()]
        pairs = [pair for pair in pairs if len(pair) == 2 and re.fullmatch(r"\d{1,9}", pair[1])]
        return [int(value) for _, value in pairs] or None
    text = final_answer(reply)
    for start in (LINE, WITHIN):
        scores = labelled_scores(text, start, 5, labels)
        if len(scores) == 3:
            return scores if all(1 <= score <= 5 for score in scores) else None
    return None


def labelled_scores(text: str, start: str, top: int, labels: tuple = ()) -> list[float]:
    """The values of `label: 4`, `**Label** - 4/5`, `| label | [4.0] |` ..., the last of each label.

    start: where a label may begin; top: what may stand after a slash. With `labels`, only theirs.
    """
    unit = rf"\s*(?:/\s*{top}(?!\d)|(?:out )?of {top}(?!\d))?\s*(?:points?|stars?|分)?"
    value = rf"[\[(]?\s*{NUMBER}{unit}\s*[\])]?"
    text = re.sub(r"[*`\"“”]", "", text)
    text += header_as_lines(text)
    # a value alone on the line below its label
    text = re.sub(rf"(?m)^([^\n\d:=|]{{2,60}}?)\s*\n\s*({value})\s*$", r"\1: \2", text)
    found = {}
    for label, number in re.findall(start + LABEL + SEPARATOR + value + END, text):
        name = plain_label(label)
        if labels:
            name = next((known for known in labels if known in name), "")
        elif UNWANTED.search(name):
            continue
        found[name] = float(number)
    found.pop("", None)  # none of the prompt's
    return list(found.values())


def header_as_lines(text: str) -> str:
    """Of a table whose header row has the labels, its last row as lines `label: value`."""
    lines = [line.strip().strip("|") for line in text.splitlines() if "|" in line]
    rows = [line.split("|") for line in lines if not re.fullmatch(r"[-:|\s]+", line)]
    if len(rows) < 2 or len(rows[0]) < 2 or len(rows[0]) != len(rows[-1]):
        return ""
    if not all(re.match(r"\s*\[?\d", cell) for cell in rows[-1][-2:]):
        return ""
    return "".join(f"\n{label}: {cell}" for label, cell in zip(rows[0], rows[-1], strict=True))


def parse_gedit(reply: str, mode: str = "strict") -> list[float] | None:
    """The list of scores in an answer of GEdit's judge (VIEScore); None where there are none.

    strict: two from 0 to 10, out of JSON or what nearly is, or labelled. official: what the
    official parser reads, any number of them and of any size, but None where it would draw a
    random score.
    """
    if mode == "official":
        return official_gedit(reply)
    text = final_answer(reply)
    found = json_scores(text) or listed_scores(text)
    if found:
        scores = [score_of_ten(value) for value in found[-1]]
    else:
        scores = labelled_scores(text, WITHIN, 10)
    fit = len(scores) == 2 and all(0 <= score <= 10 for score in scores)
    return scores if fit else None


def json_scores(text: str) -> list[list]:
    """The values of every `score` or `scores` that is a list or an object in JSON anywhere."""
    found = []
    for brace in re.finditer("{", text):
        try:
            value = json.JSONDecoder(strict=False).raw_decode(text, brace.start())[0]
        except (ValueError, RecursionError):
            continue
        for key in ("score", "scores"):
            scores = value.get(key)
            if isinstance(scores, dict):
                scores = list(scores.values())
            if isinstance(scores, list):
                found.append(scores)
    return found


def listed_scores(text: str) -> list[list]:
    """Lists after `score`, or alone: quotes in the reasoning, single quotes, an answer cut short."""
    found = re.findall(r"(?i)scores?[\"']?\s*[:=]\s*[\"']?[\[(]([^\])]*)[\])]", text)
    found = found or re.findall(r"^\s*\[?((?:[\d./\s]+,)+[\d./\s]+)\]?\s*$", text)
    return [values.split(",") for values in found]


def score_of_ten(value) -> float:
    """8, "8" or "8/10" as a number; NaN for anything else."""
    number = re.fullmatch(r"\s*[\"']?(\d+(?:\.\d+)?)(?:\s*/\s*10)?\s*分?[\"']?\s*", str(value))
    return float(number[1]) if number else math.nan


def official_gedit(reply: str) -> list | None:
    """What VIEScore's parser reads: between its delimiters or the outer braces, or a bare list."""
    fenced = reply.split("||V^=^V||")
    if len(fenced) == 3:
        text = fenced[1]
    elif "{" in reply and "}" in reply:
        text = reply[reply.find("{") : reply.rfind("}") + 1]
    else:
        return official_bare(reply)
    text = text.strip().replace("\n", "")
    return official_scores(text) or official_scores(repaired(text), lone=False)


def official_bare(reply: str) -> list | None:
    """Two numbers in brackets, or nothing but a number from 0 to 10."""
    listed = reply[reply.find("[") : reply.rfind("]") + 1] if "[" in reply else ""
    if re.match(r"\[\d+, ?\d+\]$", listed):
        return official_scores(f'{{"score": {listed}}}')
    if re.fullmatch(r"\s*\+?0*(?:\d|10)\s*", reply):
        return [int(reply)]
    return None


def official_scores(text: str, lone: bool = True) -> list | None:
    """`score` of a JSON text, finite numbers; lone: a number without a list will do."""
    try:
        scores = json.loads(text)["score"]
        if lone and not isinstance(scores, list):
            scores = [scores]
        return scores if math.isfinite(min(scores)) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def repaired(text: str) -> str:
    """Quotes round bare keys and values, brackets round lone numbers, as VIEScore repairs JSON."""
    quoted = re.sub(r"(\w+)(?=:)", r'"\1"', text)
    return re.sub(r'("[^\n]*?"):([^\n]*?)([,}])', repaired_pair, quoted)


def repaired_pair(pair: re.Match) -> str:
    key, body, end = pair.groups()
    body = body.strip()
    if re.match(r"-?\d+(?:\.\d+)?$", body):
        body = f"[{body}]"
    elif body.lower() not in ("true", "false", "null"):
        body = f'"{body}"'
    return f"{key}: {body}{end}"


# ---------------------------------------------------------------- adding up


def score_imgedit(records: list[dict], mode: str = "strict") -> dict:
    """ImgEdit-Bench's result from the judge's calls: {"rows": [a dict a row], "groups": {"all":
    what tabulate gives}}.

    records: dicts with `row`, `task`, `source`, and `reply` or `failure`, perhaps `labels`, `psnr`
    and `ssim`; a row's last one counts. A row's score is the mean of its three, the floor is 1.
    official: rounded to 2 digits, as are the tasks' means.
    """
    rows = []
    digits = 2 if mode == "official" else None
    for record in {record["row"]: record for record in records}.values():
        said = record.get("reply") or ""
        scores = parse_imgedit(said, mode, tuple(record.get("labels") or ()))
        mean = None
        if scores:
            mean = sum(scores) / len(scores)
            mean = mean if digits is None else round(mean, digits)
        row = row_result([record], mode, 1.0, score=mean)
        rows.append(row | parts(PARTS["imgedit"], scores, mode, 1.0))
    return {"rows": rows, "groups": grouped(rows, all_metrics("imgedit"), digits)}


def score_gedit(records: list[dict], mode: str = "strict") -> dict:
    """GEdit-Bench's result from the judge's calls, as score_imgedit; groups are `en`, `en
    intersection`, `cn` ...

    records: dicts with `row`, `call` ("SC" or "PQ"), `task`, `source`, `language`, `intersection`,
    and `reply` or `failure`. A row's SC and PQ are the lower of their two scores, O is
    sqrt(SC PQ); the floor is 0.
    """
    calls = {}
    for record in records:
        calls.setdefault(record["row"], {})[record["call"]] = record
    rows = []
    for both in calls.values():
        replies = {call: both.get(call, {}).get("reply") or "" for call in CALLS["gedit"]}
        scores = {call: parse_gedit(reply, mode) for call, reply in replies.items()}
        low = {call: min(values) if values else None for call, values in scores.items()}
        overall = None
        if None not in low.values() and low["SC"] * low["PQ"] >= 0:
            overall = math.sqrt(low["SC"] * low["PQ"])
        row = row_result(list(both.values()), mode, 0.0, O=overall, **low)
        row |= parts(PARTS["gedit"][:2], scores["SC"], mode, 0.0)
        rows.append(row | parts(PARTS["gedit"][2:], scores["PQ"], mode, 0.0))
    return {"rows": rows, "groups": grouped(rows, all_metrics("gedit"))}


def score_heldout(records: list[dict], mode: str = "strict") -> dict:
    """A held-out set's result, as score_imgedit: the judge's own score in `scores`, the oracle's of
    a toy row in `truth`."""
    rows = []
    for record in {record["row"]: record for record in records}.values():
        truth = record.get("truth")
        if truth is None and "target_scene" in record:  # a toy row without an edit
            truth = {"oracle": None, "success": None}
        score = (record.get("scores") or [None])[0]
        rows.append(row_result([record], mode, 0.0, judge=score, **(truth or {})))
    return {"rows": rows, "groups": grouped(rows, all_metrics("heldout"))}


def all_metrics(benchmark: str) -> tuple[str, ...]:
    return (*METRICS[benchmark], *PARTS[benchmark], *KEPT)


def row_result(records: list[dict], mode: str, floor: float, **metrics) -> dict:
    """A row's result: a metric without a value gets the floor; official: then none has any (NaN)."""
    answered = None not in metrics.values()
    for name, value in metrics.items():
        if mode == "official" and not answered:
            metrics[name] = math.nan
        elif value is None:
            metrics[name] = floor
    kept = ("row", "task", "source", "language", "intersection", *KEPT)
    result = {key: records[0][key] for key in kept if key in records[0]}
    said = [record.get("reply") or record.get("failure") or "" for record in records]
    return result | {"answered": answered, "said": "\n".join(said).strip()} | metrics


def parts(names: tuple, scores: list | None, mode: str, floor: float) -> dict[str, float]:
    """The scores that a row's score is made of, by name; the floor or NaN where they are not there."""
    if not scores or len(scores) != len(names):
        scores = [math.nan if mode == "official" else floor] * len(names)
    return dict(zip(names, scores, strict=True))


def grouped(rows: list[dict], metrics: tuple, digits: int | None = None) -> dict[str, dict]:
    """The tables of the rows of each language and of its intersection subset; else of all rows."""
    groups = {}
    for row in rows:
        name = row.get("language", "all")
        groups.setdefault(name, []).append(row)
        if row.get("intersection"):
            groups.setdefault(f"{name} intersection", []).append(row)
    tables = {}
    for name, members in groups.items():
        known = [metric for metric in metrics if any(metric in row for row in members)]
        tables[name] = tabulate(members, known, digits)
    return tables


def tabulate(rows: list[dict], metrics: list[str], digits: int | None = None) -> dict:
    """Means with 95 % intervals: {"rows", "answered", metric: {"macro": [mean, low, high],
    "micro": ..., task: ...}}.

    rows: dicts with `task`, `source`, `answered` and the metrics, NaN where there is no value.
    macro is the mean of the tasks' means, micro that of the rows. digits: to which the tasks'
    means are rounded; None: not. Intervals are bootstrapped over source pictures, each with all
    its rows.
    """
    table = {"rows": len(rows), "answered": sum(row["answered"] for row in rows)}
    for metric in metrics:
        known = [row for row in rows if not math.isnan(row.get(metric, math.nan))]
        table[metric] = means_with_intervals(known, metric, digits)
    return table


def means_with_intervals(rows: list[dict], metric: str, digits: int | None) -> dict[str, list]:
    values = [row[metric] for row in rows]
    tasks = [row["task"] for row in rows]
    sources = [row["source"] for row in rows]
    names, drawn = bootstrap(values, tasks, sources)  # (D, T), NaN of a task that was not drawn
    _, overall = bootstrap(values, ["all"] * len(values), sources)  # (D, 1)
    means = []
    for name in names:
        own = [value for value, task in zip(values, tasks, strict=True) if task == name]
        mean = sum(own) / len(own)
        means.append(mean if digits is None else round(mean, digits))
    with np.errstate(all="ignore"):
        macro = np.nansum(drawn, 1) / (~np.isnan(drawn)).sum(1)  # (D,)
    found = {"macro": interval(means, macro), "micro": interval(values, overall.flatten())}
    for name, mean, of_task in zip(names, means, drawn.T, strict=True):
        found[name] = interval([mean], of_task)
    return found


def interval(values: list[float], draws: np.ndarray) -> list:
    """[mean of the values, 2.5 % and 97.5 % quantile of the draws]; None where there are none."""
    draws = draws[~np.isnan(draws)]
    ends = np.quantile(draws, (0.025, 0.975)).tolist() if len(draws) else [None, None]
    mean = sum(values) / len(values) if values else None
    return [mean, *ends]


def paired_differences(a: list[dict], b: list[dict], metrics: tuple) -> dict[str, dict]:
    """The tables of a - b over the rows that both results have, resampled together."""
    others = {row["row"]: row for row in b}
    pairs = []
    for row in a:
        if row["row"] in others:
            other = others[row["row"]]
            shared = [key for key in metrics if key in row and key in other]
            pair = {key: value for key, value in row.items() if key not in metrics}
            pair["answered"] = row["answered"] and other["answered"]
            pairs.append(pair | {key: row[key] - other[key] for key in shared})
    return grouped(pairs, metrics)


def verdict(difference: list, a: str, b: str, kept: list | None = None) -> str:
    """A mean difference [mean, low, high] of a and b in words, and that of their PSNR to the source."""
    mean, low, high = difference
    if low is None:
        return f"too few source pictures to tell {a} from {b}"
    measured = f"{mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
    if low <= 0 <= high:
        words = f"no difference between {a} and {b} can be told: {measured}"
    else:
        words = f"{a} is {'better' if mean > 0 else 'worse'} than {b}: {measured}"
    if kept is None or kept[1] is None:
        return words
    mean, low, high = kept
    amount = f"{abs(mean):.1f} dB {'more' if mean > 0 else 'less'} of the source"
    doubt = ", which may be chance" if low <= 0 <= high else ""
    return f"{words}; {a} keeps {amount}{doubt} ({low:+.1f} to {high:+.1f})"


# ---------------------------------------------------------------- benchmarks

IMGEDIT_TASKS = "add adjust extract replace remove background style compose action".split()
GEDIT_TASKS = """background_change color_alter material_alter motion_change ps_human style_change
subject-add subject-remove subject-replace text_change tone_transfer""".split()


def load_benchmark(settings: Settings) -> tuple[list[dict], dict, dict]:
    """(rows, prompts, {"sha256", "rows"} of the metadata); BadInput when it is not as it should be.

    rows: dicts with `row` (its name), `prompt`, `images` (paths), `task`, `source` (whose picture
    it is), `files` (where its edit may lie in a subject's folder, without ending; the first is
    ours), ImgEdit's `labels`, GEdit's `language`, `intersection` and `shown` (the source as its
    judge sees it). prompts: the judge's, by task or call.
    """
    folder = Path(settings.bench).resolve()
    if not settings.bench or not folder.is_dir():
        raise BadInput(f"--bench {settings.bench}: no such folder; name the benchmark's")
    sha256 = ""
    if settings.benchmark == "heldout":
        rows, prompts = read_heldout(folder), {}
    elif settings.benchmark == "imgedit":
        rows, prompts, sha256 = read_imgedit(folder, settings.prompts)
    else:
        languages = ("en", "cn") if settings.language == "both" else (settings.language,)
        rows, prompts = read_gedit(folder, settings.prompts, languages, settings.out)
    gone = [row for row in rows if not Path(row["images"][0]).is_file()]
    if gone:
        raise BadInput(
            f"{gone[0]['images'][0]}: the picture of row {gone[0]['row']} is not there, nor "
            f"{len(gone) - 1} others; put the pictures beside the metadata"
        )
    asked = json.dumps([[row["row"], row["prompt"], row["task"]] for row in rows])
    sha256 = sha256 or hashlib.sha256(asked.encode()).hexdigest()
    return rows, prompts, {"sha256": sha256, "rows": len(rows)}


def read_heldout(folder: Path) -> list[dict]:
    """The test split of a dataset folder. An edit's file is named by the row's id."""
    rows = read_rows(folder, "test")
    for row in rows:
        row["row"] = row["id"]
        row.setdefault("task", "all")
        row["source"] = row["images"][0]
        row["files"] = [safe_name(row["id"])]
    return rows


def safe_name(text: str) -> str:
    """A file name for any text: itself where it is plain, else what is plain of it and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", text)[:80]
    if plain == text and not plain.startswith("."):
        return text
    return f"{plain.lstrip('.')}-{short_hash(text)}"


def read_imgedit(folder: Path, prompts_file: str) -> tuple[list[dict], dict, str]:
    """ImgEdit-Bench, single turn: (rows, judge's prompts by task, sha256 of the metadata).

    The metadata is {key: {id, prompt, edit_type}}, a row's picture is its id. Rows are as
    load_benchmark tells. prompts_file: the judge's prompts where they are not in the folder.
    """
    fix = "take the benchmark's own file"
    file = find_file("", (folder, folder / "singleturn"), ("singleturn.json", "basic_edit.json"))
    places = (file.parent, file.parent.parent)
    asked = find_file(prompts_file, places, ("judge_prompt.json", "prompts.json"))
    texts = read_json(asked, fix)
    rows = []
    prompts = {}
    for key, entry in read_json(file, fix).items():
        where = f"{file}: row {key}"
        row = imgedit_row(key, entry, file.parent, where)
        task = row["task"]
        kinds = (entry["edit_type"], task, "alter" if task == "adjust" else task)
        text = next((texts[kind] for kind in kinds if texts.get(kind)), None)
        if not isinstance(text, str):
            raise BadInput(
                f"{asked}: has no prompt for the task {kinds[0]!r} of row {key}; take both files "
                "of one version"
            )
        prompts[task] = text
        rows.append(row | {"labels": labels_of(text)})
    return rows, prompts, hashlib.sha256(file.read_bytes()).hexdigest()


def imgedit_row(key: str, entry: dict, folder: Path, where: str) -> dict:
    """A checked row of ImgEdit's metadata."""
    names = ("id", "prompt", "edit_type")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in names):
        raise BadInput(
            f"{where} has no id, prompt and edit_type; take ImgEdit-Bench's single-turn metadata"
        )
    kind = entry["edit_type"]
    task = "adjust" if kind == "alter" else kind  # two versions circulate
    if task not in IMGEDIT_TASKS:
        known = ", ".join(IMGEDIT_TASKS)
        raise BadInput(f"{where}: unknown task {kind!r}; ImgEdit-Bench has {known}")
    inside(folder, f"{key}.png", where)
    return {
        "row": key,
        "prompt": entry["prompt"],
        "images": [inside(folder, entry["id"], where)],
        "task": task,
        "source": entry["id"],
        "files": [key],
    }


def read_gedit(
    folder: Path, prompts_file: str, languages: tuple[str, ...], out: str
) -> tuple[list[dict], dict]:
    """GEdit-Bench: (rows of some languages, {"SC", "PQ"} the judge's prompts).

    Parquet or arrow files, whose pictures are written below `out`, or metadata.jsonl with
    `file_name` beside pictures; and vie_prompts.py, or prompts_file. Rows are as load_benchmark
    tells.
    """
    places = (folder, folder / "viescore", folder.parent / "viescore")
    prompts = read_vie_prompts(find_file(prompts_file, places, ("vie_prompts.py",)))
    listed = folder / "metadata.jsonl"
    entries = [entry for _, entry in read_json_lines(listed)] if listed.is_file() else []
    rows = []
    times = {}
    for number, entry in enumerate(entries or read_table(folder), 1):
        where = f"{folder}: row {number}"
        check_gedit(entry, where)
        if entry["instruction_language"] in languages:
            place = "{task_type}/{instruction_language}/{key}".format(**entry)
            times[place] = times.get(place, 0) + 1
            rows.append(gedit_row(entry, place, times[place], folder, Path(out).resolve(), where))
    if not rows:
        raise BadInput(
            f"{folder}: holds no rows in {' or '.join(languages)}, in parquet, arrow or "
            "metadata.jsonl; name GEdit-Bench's folder"
        )
    return rows, prompts


def check_gedit(entry: dict, where: str) -> None:
    """BadInput for an entry that is none of GEdit-Bench."""
    keys = ("key", "task_type", "instruction_language", "instruction")
    if not all(isinstance(entry.get(name), str) for name in keys):
        raise BadInput(
            f"{where} lacks {', '.join(keys[:3])} or {keys[3]}; name GEdit-Bench's folder"
        )
    task, language = entry["task_type"], entry["instruction_language"]
    if task not in GEDIT_TASKS or language not in ("en", "cn"):
        known = f"{', '.join(GEDIT_TASKS)}, in en and cn"
        raise BadInput(f"{where}: unknown task {task!r} in {language!r}; GEdit-Bench has {known}")


def gedit_row(entry: dict, place: str, time_seen: int, folder: Path, out: Path, where: str) -> dict:
    """A checked row of GEdit-Bench; pictures that are stored in it are written below `out`."""
    name = place if time_seen == 1 else f"{place}-{time_seen}"  # a few keys repeat
    inside(out, f"{name}.png", where)
    raw = stored_picture(entry.get("input_image_raw"), out / f"sources/{name}.png")
    shown = stored_picture(entry.get("input_image"), out / f"sources/{name}_shown.png")
    if not raw and not shown:
        if not isinstance(entry.get("file_name"), str):
            raise BadInput(
                f"{where} holds no picture: neither the bytes of input_image_raw nor a file_name"
            )
        raw = inside(folder, entry["file_name"], where)
    picture = raw or shown
    short = f"{entry['task_type']}/{entry['key']}"  # as the authors of the method write them
    return {
        "row": name,
        "prompt": entry["instruction"],
        "images": [picture],
        "shown": shown or picture,
        "task": entry["task_type"],
        "source": file_hash(picture),
        "language": entry["instruction_language"],
        "intersection": bool(entry.get("Intersection_exist")),
        "files": [f"fullset/{name}", f"fullset/{place}", name, place, short],
    }


def stored_picture(value: dict | None, path: Path) -> str:
    """Writes the bytes of a table's picture to `path`, unless they are there; "" for no picture."""
    content = value.get("bytes") if isinstance(value, dict) else None
    if not content:
        return ""
    if not path.is_file() or path.read_bytes() != content:
        with whole_file(path) as part:
            part.write_bytes(content)
    return str(path)


VIE_TEXTS = (
    "_context_no_delimit",
    "_prompts_0shot_two_image_edit_rule",
    "_prompts_0shot_tie_rule_SC",
    "_prompts_0shot_rule_PQ",
)


def read_vie_prompts(file: Path) -> dict[str, str]:
    """{"SC": ..., "PQ": ...}, put together as VIEScore does, from a Python file whose constants are
    read as literals and never executed."""
    texts = {}
    try:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                texts[ast.unparse(node.targets[0])] = node.value.value
        context, two_pictures, success, quality = (texts[name] for name in VIE_TEXTS)
        return {
            "SC": "\n".join([context, two_pictures, success]),
            "PQ": "\n".join([context, quality]),
        }
    except (OSError, ValueError, SyntaxError, KeyError, TypeError) as error:
        raise BadInput(
            f"{file}: has not the texts of VIEScore ({error}); take GEdit-Bench's vie_prompts.py"
        ) from None


def find_file(given: str, folders: tuple[Path, ...], names: tuple[str, ...]) -> Path:
    """The file that was given, else the first of `names` in `folders`."""
    paths = [Path(given)]
    if not given:
        paths = [folder / name for folder, name in itertools.product(folders, names)]
    for path in paths:
        if path.is_file():
            return path
    raise BadInput(
        f"{given or folders[0]}: holds no {' or '.join(names)}; name the benchmark's folder, or "
        "--prompts FILE"
    )


# ---------------------------------------------------------------- sample: the edits


def subjects_of(settings: Settings) -> dict[str, Path]:
    """{name: folder of its edits}, the one in question first; `source` needs no folder."""
    if settings.edits:
        names = ["edits"]
    elif settings.lora:
        names = ["trained"]
    elif settings.base or "source" not in settings.baselines:
        names = ["base"]
    else:
        names = []
    folders = {name: Path(settings.out, name) for name in [*names, *sorted(settings.baselines)]}
    if settings.edits:
        folders["edits"] = Path(settings.edits)
    return folders


def find_picture(folder: Path, stems: list[str]) -> Path | None:
    """The first picture of these names, without their endings, in a folder."""
    for stem, ending in itertools.product(stems, ENDINGS):
        path = folder / f"{stem}{ending}"
        if path.is_file():
            return path
    return None


def find_edit(row: dict, subject: str, folder: Path) -> Path | None:
    """Where a row's edit lies, None where there is none."""
    if subject == "source":
        return Path(row["images"][0])
    return find_picture(folder, row["files"] if subject == "edits" else row["files"][:1])


def find_mask(settings: Settings, row: dict) -> Path | None:
    """The mask of what may change in a row's picture: the row's own, or that of --masks."""
    if settings.masks:
        return find_picture(Path(settings.masks), row["files"])
    return Path(row["mask"]) if row.get("mask") else None


def check_folders(settings: Settings, rows: list[dict]) -> None:
    """BadInput when --edits or --masks matches no row; a warning when it misses some."""
    for flag, place in (("--edits", settings.edits), ("--masks", settings.masks)):
        if not place:
            continue
        missing = [row for row in rows if find_picture(Path(place), row["files"]) is None]
        example = f"{place}/{rows[0]['files'][0]}{ENDINGS[0]}"
        if len(missing) == len(rows):
            raise BadInput(f"{flag} {place}: has none for any row, such as {example}; correct it")
        if missing:
            first = f"{place}/{missing[0]['files'][0]}{ENDINGS[0]}"
            lost = f"{len(missing)} of {len(rows)} rows, the first {first}"
            print(f"warning: {flag} {place}: has none for {lost}", file=sys.stderr)


@functools.cache
def fingerprint(place: str) -> str:
    """What tells one model from another: its hub id, or a hash of the names, sizes and first and
    last megabytes of a folder's or file's content."""
    path = Path(place)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    parts = hashlib.sha256()
    for file in files:
        if not file.is_file():  # a hub id
            return place
        size = file.stat().st_size
        with open(file, "rb") as stored:
            head = stored.read(2**20)
            stored.seek(max(0, size - 2**20))
            parts.update(f"{file.relative_to(path)} {size}".encode() + head + stored.read())
    return parts.hexdigest()[:12]


def recipe_of(settings: Settings, subject: str, row: dict) -> str:
    """All that an edit is made from, as JSON: it is drawn again when this changes."""
    made_from = {
        "base": fingerprint(settings.base),
        "lora": fingerprint(settings.lora) if subject == "trained" else "",
        "sources": [file_hash(path) for path in row["images"]],
        "prompt": row["prompt"],
    }
    for name in ("steps", "seed", "guidance", "resolution"):
        made_from[name] = getattr(settings, name)
    return json.dumps(made_from)


def is_current(path: Path, recipe: str) -> bool:
    """Whether a drawn edit is there, whole and of this recipe."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(MADE_FROM) == recipe
    except (OSError, ValueError, SyntaxError):
        return False


def draw_edits(
    settings: Settings, rows: list[dict], accelerator: Accelerator, stop: threading.Event
) -> None:
    """Draws what is not current of this process's share of the rows; an edit's noise comes from
    its seed alone."""
    todo = []
    for subject, folder in subjects_of(settings).items():
        if subject in ("edits", "source"):
            continue
        if not settings.base:
            raise BadInput("--base is missing; name the editor, or a folder of finished --edits")
        for row in rows[accelerator.process_index :: accelerator.num_processes]:
            path = folder / f"{row['files'][0]}.png"
            recipe = recipe_of(settings, subject, row)
            if not is_current(path, recipe):
                todo.append((subject, row, Drawn(path, recipe)))
    if not todo:
        return
    editor = load_editor(
        settings.base,
        accelerator.device,
        dtype_of(accelerator),
        settings.resolution,
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.lora:
        add_policies(editor, averages=(), start=settings.lora)
    for subject, row, drawn in tqdm(todo, desc="edits", disable=not accelerator.is_main_process):
        refuse_when_stopped(stop, settings.out)
        sources = [load_image(path) for path in row["images"]]
        noise = torch.Generator().manual_seed(settings.seed)
        with policy(editor, "new" if subject == "trained" else "base"):
            group = rollout(
                editor,
                sources,
                row["prompt"],
                [noise],
                settings.steps,
                settings.guidance,
                evaluation=True,
            )
        drawn.save(group.images[0], load_image(row["shown"]) if "shown" in row else None)


class Drawn(NamedTuple):
    """Where an edit goes and what it is made from."""

    path: Path
    recipe: str

    def save(self, edit: Image.Image, source: Image.Image | None) -> None:
        """Writes the edit, after its source where the benchmark's layout has it beside."""
        if source is not None:
            with whole_file(self.path.with_name(f"{self.path.stem}_SRCIMG.png")) as part:
                source.save(part, "PNG")
        told = PngImagePlugin.PngInfo()
        told.add_text(MADE_FROM, self.recipe)
        with whole_file(self.path) as part:
            edit.save(part, "PNG", pnginfo=told)


def dtype_of(accelerator: Accelerator) -> torch.dtype:
    return torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32


def refuse_when_stopped(stop: threading.Event, out: str) -> None:
    """Ends the program when a signal asked for it."""
    if stop.is_set():
        raise SystemExit(
            f"stopped: every finished edit and call is kept in {out}; the same command goes on"
        )


# ---------------------------------------------------------------- judge: the calls


class Call(NamedTuple):
    """One question about one edit."""

    key: dict[str, str]  # what an answer must be for, KEYS
    text: str
    row: dict
    path: Path  # of the edit


KEYS = ("subject", "row", "call", "text", "sources", "edit")  # the last three are hashes


def identity(record: dict) -> tuple[str, ...]:
    return tuple(str(record.get(key)) for key in KEYS)


def find_calls(settings: Settings, rows: list[dict], names: tuple, text_of: Callable) -> list[Call]:
    """The calls `names` for every edit that is there; text_of(row, name) is what is asked."""
    calls = []
    for subject, folder in subjects_of(settings).items():
        for row in rows:
            path = find_edit(row, subject, folder)
            for name in names if path else ():
                text = text_of(row, name)
                key = {"subject": subject, "row": row["row"], "call": name}
                key["text"] = short_hash(text)
                pictures = [*row["images"], row.get("shown", "")]
                key["sources"] = short_hash(" ".join(file_hash(picture) for picture in pictures))
                key["edit"] = file_hash(path)
                calls.append(Call(key, text, row, path))
    return calls


def judge_calls(settings: Settings, rows: list[dict], prompts: dict) -> list[Call]:
    """What the judge is to be asked about every edit that is there."""

    def text_of(row, call):
        if settings.benchmark == "heldout":
            return f"{row['prompt']}\n{requirement_of(row)}"
        text = prompts[call] if call in prompts else prompts[row["task"]]
        # the instruction goes in its place; it may itself hold such words
        return re.sub("<edit_prompt>|<instruction>", lambda place: row["prompt"], text)

    return find_calls(settings, rows, CALLS[settings.benchmark], text_of)


def read_answers(out: str, name: str) -> dict[tuple, dict]:
    """{identity: its newest record} out of every process's file of one name; a line that cannot be
    read is none."""
    records = []
    faults = []
    for file in sorted(Path(out).glob(f"{name}-*.jsonl")):
        records += [record for _, record in read_json_lines(file, faults)]
    if faults:
        print(f"warning: {len(faults)} lines do not count, such as {faults[0]}", file=sys.stderr)
    records.sort(key=recorded_at)
    return {identity(record): record for record in records}


def recorded_at(record: dict) -> float:
    seconds = record.get("time")
    return seconds if isinstance(seconds, float) else 0.0


class Asking(NamedTuple):
    """How calls are answered."""

    name: str  # of the files of answers
    answer: Callable[[Call], dict]
    workers: int
    judge: str  # named when all goes wrong


def answer_calls(
    settings: Settings,
    calls: list[Call],
    asking: Asking,
    accelerator: Accelerator,
    stop: threading.Event,
) -> None:
    """Answers this process's share of the calls that have no good answer yet, several at a time,
    and appends each as one line as it comes."""
    known = read_answers(settings.out, asking.name)
    accelerator.wait_for_everyone()  # all have read before anyone writes
    todo = []
    for call in calls[accelerator.process_index :: accelerator.num_processes]:
        before = known.get(identity(call.key))
        if before is None or "failure" in before:
            todo.append(call)
    file = Path(settings.out, f"{asking.name}-{accelerator.process_index}.jsonl")
    quiet = not accelerator.is_main_process

    def answer(call):
        return {"failure": "stopped"} if stop.is_set() else asking.answer(call)

    failed = 0
    succeeded = False
    pool = ThreadPoolExecutor(asking.workers)
    futures = {pool.submit(answer, call): call for call in todo}
    try:
        bar = tqdm(as_completed(futures), total=len(todo), desc=asking.name[:24], disable=quiet)
        for future in bar:
            record = future.result()
            if "failure" not in record:
                succeeded = True
            elif stop.is_set():
                continue  # what was given up is no answer
            else:
                failed += 1
            append_json_line(file, futures[future].key | record | {"time": time.time()})
            if failed >= 8 and not succeeded:
                raise BadInput(
                    f"{asking.judge}: its first {failed} calls all failed ({record['failure']}); "
                    "see to it, it must take pictures, and start again"
                )
    finally:
        pool.shutdown(cancel_futures=True)
    refuse_when_stopped(stop, settings.out)


HOW_ASKED = (  # the judge's settings that a held-out score depends on
    "judge_strategy",
    "judge_think",
    "judge_aspects",
    "judge_reply",
    "judge_range",
    "judge_order",
)


def label_of(settings: Settings, judge: Judge, prompts: dict) -> str:
    """The judge's name and a hash of how it is asked: results of two labels never mix."""
    asked = prompts
    if not prompts:
        asked = {name: getattr(settings, name) for name in HOW_ASKED} | dict(judge.prompts)
    known = json.dumps([judge.name, asked], sort_keys=True)
    return "-".join([*re.findall(r"[\w.]+", judge.name), short_hash(known)[:8]])


def judge_edits(
    settings: Settings,
    rows: list[dict],
    prompts: dict,
    accelerator: Accelerator,
    stop: threading.Event,
) -> None:
    """Measures what each edit keeps of its source, and asks the judge about it."""
    measure_edits(settings, rows, accelerator, stop)
    judge = load_judge(settings, accelerator.device, dtype_of(accelerator), stop=stop)
    try:
        if accelerator.is_main_process:
            warn_of_own_judge(settings, judge)
        answer = functools.partial(ask_benchmark, settings, judge)
        if settings.benchmark == "heldout":
            answer = functools.partial(ask_heldout, judge)
        workers = settings.judge_in_flight * (1 + settings.judge.count(","))
        name = f"calls-{label_of(settings, judge, prompts)}"
        asking = Asking(name, answer, workers, settings.judge)
        calls = judge_calls(settings, rows, prompts)
        answer_calls(settings, calls, asking, accelerator, stop)
    finally:
        judge.close()


def warn_of_own_judge(settings: Settings, judge: Judge) -> None:
    """A warning when the LoRA was trained with this very judge."""
    config = Path(settings.lora).parent / "config.json"
    if settings.lora and config.is_file():
        trained = read_json(config, "take the folder of a whole run")
        if trained.get("judge") == settings.judge:
            print(
                f"warning: {judge.name} is the judge that {settings.lora} was trained with; its "
                "scores tell how well it is pleased: let another judge have the last word",
                file=sys.stderr,
            )


def ask_benchmark(settings: Settings, judge: Judge, call: Call) -> dict:
    """The judge's reply to a benchmark's question; a call that failed is a record of its cause."""
    paths = [call.path]
    if call.key["call"] != "PQ":  # quality is judged without the source
        paths = [*call.row["images"], call.path]
    try:
        if settings.benchmark == "gedit":
            shown = as_gedit_shows(call)
        else:
            shown = [load_image(path) for path in paths]
        return {"reply": judge.ask(call.text, shown, settings.reply_tokens)}
    except (JudgeFailure, BadInput) as failure:
        return {"failure": str(failure)}


def as_gedit_shows(call: Call) -> list[Image.Image]:
    """The pictures as GEdit's scorer shows them: the stored source, whose sides are multiples of
    32 at about 512 x 512 pixels; the edit in the same size; both through JPEG."""
    source = load_image(call.row["shown"])
    size = source.size
    if size[0] % 32 or size[1] % 32:
        ratio = source.width / source.height
        size = (512 * math.sqrt(ratio), 512 / math.sqrt(ratio))
        size = tuple(max(32, 32 * round(side / 32)) for side in size)
    pictures = [load_image(call.path)]
    if call.key["call"] != "PQ":  # quality is judged without the source
        pictures.insert(0, source)
    shown = []
    for picture in pictures:
        content = io.BytesIO()
        picture.resize(size).save(content, "JPEG")
        shown.append(load_image(content))
    return shown


def ask_heldout(judge: Judge, call: Call) -> dict:
    """The judge's own score of an edit, and the oracle's where there is one."""
    try:
        edit = load_image(call.path)
        scores = judge.score(call.row, [load_image(path) for path in call.row["images"]], [edit])
    except BadInput as fault:
        return {"failure": str(fault)}
    score = scores.score.item()
    record = {"scores": [score], "reply": "".join(scores.words)}
    if math.isnan(score):
        record = {"failure": "".join(scores.causes) or "no score"}
    truth = oracle(call.row, edit)
    if truth:
        record["truth"] = {"oracle": float(truth[0]), "success": float(truth[1])}
    return record


# ---------------------------------------------------------------- what is kept of the source


def measure_edits(
    settings: Settings, rows: list[dict], accelerator: Accelerator, stop: threading.Event
) -> None:
    """PSNR and SSIM of every edit to its first source, as calls of no judge."""
    asking = Asking("kept", functools.partial(measure, settings), 1, "--edits")
    answer_calls(settings, kept_calls(settings, rows), asking, accelerator, stop)


def kept_calls(settings: Settings, rows: list[dict]) -> list[Call]:
    def text_of(row, call):
        return file_hash(find_mask(settings, row) or "")

    calls = find_calls(settings, rows, ("kept",), text_of)
    return [call for call in calls if call.key["subject"] != "source"]


def measure(settings: Settings, call: Call) -> dict:
    """What an edit keeps of its source, outside the mask if there is one."""
    try:
        edit = load_image(call.path)
        source = load_image(call.row["images"][0])
        place = find_mask(settings, call.row)
        mask = load_image(place) if place else None
    except BadInput as fault:
        return {"failure": str(fault)}
    psnr = plain_terms(source, [edit], mask)["psnr"].item()
    return {"psnr": psnr, "ssim": ssim(source, edit, mask)}


def ssim(source: Image.Image, edit: Image.Image, mask: Image.Image | None = None) -> float:
    """Structural similarity of two pictures' luminance, in [-1, 1], at the edit's size.

    The mean over what is not white in the mask; NaN where all is. Gaussian window of 11 pixels,
    deviation 1.5 (Wang et al., Image quality assessment, 2004).
    """

    def plane(picture, how=Image.Resampling.LANCZOS):
        grey = picture.convert("L").resize(edit.size, how)
        return torch.from_numpy(np.array(grey, np.float32) / 255)[None, None]  # (1, 1, H, W)

    def blur(x):
        x = F.pad(x, (5, 5, 5, 5), mode="replicate")
        return F.conv2d(F.conv2d(x, window[None, None, None]), window[None, None, :, None])

    window = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    window = window / window.sum()  # (11,)
    x, y = plane(source), plane(edit)
    mean_x, mean_y = blur(x), blur(y)
    spread = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    shared = blur(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    alike = light * (2 * shared + 0.03**2) / (spread + 0.03**2)  # (1, 1, H, W)
    if mask is not None:
        alike = alike[plane(mask, Image.Resampling.NEAREST) < 0.5]
    return alike.mean().item()


# ---------------------------------------------------------------- score: tables, report, comparison


MISSING = "no edit"  # the failure of an edit that is not there
SCORERS = {"imgedit": score_imgedit, "gedit": score_gedit, "heldout": score_heldout}
ROW_KEYS = ("row", "task", "source", "language", "intersection", "labels", "target_scene")


def score_calls(settings: Settings, rows: list[dict], prompts: dict, version: dict) -> list[dict]:
    """Adds up each judge's calls into scores-JUDGE-MODE.json: what was written of settings.mode.

    Results of the other mode that lie there are made anew; those of calls that no longer count go.
    """
    out = Path(settings.out)
    files = sorted(out.glob("calls-*.jsonl"))
    if not files:
        raise BadInput(f"{out}: holds no calls of a judge; run --stage judge first")
    labels = {re.fullmatch(r"calls-(.*)-\d+", file.stem)[1] for file in files}
    wanted = {identity(call.key) for call in judge_calls(settings, rows, prompts)}
    measured = measurements(settings, rows)
    old = list(out.glob("scores-*.json"))
    modes = {settings.mode, *(file.stem.rpartition("-")[2] for file in old)}
    results = {}
    for label, mode in itertools.product(sorted(labels), sorted(modes)):
        answers = read_answers(settings.out, f"calls-{label}")
        answers = [answer for key, answer in answers.items() if key in wanted]
        if not answers:
            continue  # of other edits or other questions
        records = records_of(settings, rows, answers, measured)
        score = SCORERS[settings.benchmark]
        result = {
            "benchmark": settings.benchmark,
            "judge": label,
            "mode": mode,
            "metadata": version,
            "subjects": {name: score(records[name], mode) for name in records},
        }
        file = out / f"scores-{label}-{mode}.json"
        with whole_file(file) as part:
            part.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
        results[file] = result
    if not results:
        raise BadInput(f"{out}: no call is for the edits that are there; run --stage judge first")
    for file in set(old) - results.keys():
        file.unlink()
    return [result for result in results.values() if result["mode"] == settings.mode]


def measurements(settings: Settings, rows: list[dict]) -> dict[tuple[str, str], dict]:
    """{(subject, row): {"psnr", "ssim"}} of the edits that were measured as they are."""
    kept = read_answers(settings.out, "kept")
    found = {}
    for call in kept_calls(settings, rows):
        record = kept.get(identity(call.key), {})
        values = {name: record[name] for name in KEPT if name in record}
        found[call.key["subject"], call.key["row"]] = values
    return found


def records_of(
    settings: Settings, rows: list[dict], answers: list[dict], measured: dict
) -> dict[str, list[dict]]:
    """{subject: a record of every call of every row}, answered or not."""
    said = {tuple(answer[key] for key in KEYS[:3]): answer for answer in answers}
    records = {}
    for subject, folder in subjects_of(settings).items():
        records[subject] = []
        for row in rows:
            there = find_edit(row, subject, folder)
            empty = {"failure": "not judged" if there else MISSING}
            known = {key: row[key] for key in ROW_KEYS if key in row}
            known |= measured.get((subject, row["row"]), {})
            for call in CALLS[settings.benchmark]:
                answer = said.get((subject, row["row"], call), empty)
                records[subject].append(known | answer | {"row": row["row"], "call": call})
    return records


def shown(mean: list, form: str = ".3f") -> str:
    """A mean with its interval as text."""
    value, low, high = mean
    if value is None:
        return "-"
    if low is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def as_text(groups: dict[str, dict], title: str, metrics: tuple) -> str:
    """A result's tables: for each group its coverage, and a line a task with the mean and interval
    of each metric."""
    lines = []
    for group, table in groups.items():
        names = [metric for metric in metrics if metric in table]
        lines.append(f"{title}, {group}: {table['answered']} of {table['rows']} rows answered")
        lines.append(" " * 19 + "".join(f"{name:27}" for name in names).rstrip())
        for task in table[names[0]]:
            cells = [f"{shown(table[name].get(task, NOTHING)):26} " for name in names]
            lines.append(f"  {task:16} " + "".join(cells).rstrip())
    return "\n".join(lines)


NOTHING = [None, None, None]  # the mean of no rows


def differences(a: list[dict], b: list[dict], benchmark: str, name_a: str, name_b: str) -> str:
    """The paired differences of two lists of row results as tables and in words."""
    metrics = (*METRICS[benchmark], *KEPT)
    groups = paired_differences(a, b, metrics)
    lines = [as_text(groups, f"{name_a} - {name_b}", metrics)]
    for group, table in groups.items():
        kept = table["psnr"]["macro"] if "psnr" in table else None
        lines.append(f"{group}: " + verdict(table[metrics[0]]["macro"], name_a, name_b, kept))
    return "\n".join(lines)


def describe(settings: Settings, result: dict) -> str:
    """What a person reads first: every table, the gain over the baselines, and a row for a table of
    published numbers."""
    version = result["metadata"]
    benchmark = settings.benchmark
    lines = [
        f"{benchmark}, {result['mode']} reading, judge and prompts {result['judge']}, "
        f"{version['rows']} rows, metadata sha256 {version['sha256']}"
    ]
    name = f"gedit {settings.language}" if benchmark == "gedit" else benchmark
    published = PUBLISHED_ROWS.get(name, version["rows"])
    if version["rows"] != published:
        lines.append(
            f"warning: the published metadata has {published} rows; these numbers stand beside no "
            "published ones"
        )
    metrics = (*METRICS[benchmark], *KEPT)
    for name, content in result["subjects"].items():
        lines.append(as_text(content["groups"], name, metrics))
        lines += uncounted(content["rows"], name)
    first, *others = result["subjects"]
    rows = {name: content["rows"] for name, content in result["subjects"].items()}
    for name in others:
        lines.append(differences(rows[first], rows[name], benchmark, first, name))
    return "\n".join([*lines, *pasted_rows(settings, result)])


def uncounted(rows: list[dict], name: str) -> list[str]:
    """A warning about rows without an answer, if there are any."""
    silent = [row for row in rows if not row["answered"]]
    missing = [row for row in silent if MISSING in row["said"]]
    if not silent:
        return []
    counts = f"{len(missing)} edits are missing, {len(silent) - len(missing)} have no score"
    return [f"warning: {name}: of {len(rows)} rows {counts}; see the mode for how they count"]


def pasted_rows(settings: Settings, result: dict) -> list[str]:
    """The first subject as a row of a Markdown table, with its header, and as one of LaTeX."""
    subject, content = next(iter(result["subjects"].items()))
    names = [settings.edits or settings.base, settings.lora if subject == "trained" else ""]
    cells = {"model": " + ".join(name for name in names if name) or subject}
    cells["judge"] = result["judge"]
    metrics = all_metrics(settings.benchmark)
    for group, metric in itertools.product(content["groups"], metrics):
        table = content["groups"][group]
        if metric in table:
            cells[f"{group} {metric}"] = shown(table[metric]["macro"])
    cells["mode"] = result["mode"]
    answered = sum(row["answered"] for row in content["rows"])
    cells["rows answered"] = f"{answered} of {len(content['rows'])}"
    lines = [" | ".join(line) for line in (cells, ["---"] * len(cells), cells.values())]
    latex = re.sub(r"([_%&#])", r"\\\1", "\0".join(cells.values())).replace("\0", " & ")
    return [*(f"| {line} |" for line in lines), f"LaTeX: {latex} \\\\"]


PAGE = """<!doctype html><meta charset="utf-8"><title>edit-nft: evaluation</title><style>
body {font: 14px system-ui, sans-serif; margin: 1.5em; color: #222}
pre {background: #f4f4f4; padding: .8em; overflow: auto}
article {display: flex; flex-wrap: wrap; gap: 12px; border-top: 1px solid #ddd; padding: 12px 0}
[hidden] {display: none !important} article > div {flex: 0 0 230px}
figure {margin: 0; width: 260px} small {color: #666} details {white-space: pre-wrap}
img {width: 260px; height: 260px; object-fit: contain; background: #f4f4f4}
.tiny {image-rendering: pixelated} figcaption {min-height: 2.5em}</style>
<h1>edit-nft: evaluation</h1><pre>@SUMMARY@</pre>
<label>task <select id="task"><option value="">all</option></select></label>
<label>rows <select id="kind"><option value="">all</option></select></label>
<label>order <select id="order"><option value="1">worst first</option>
<option value="-1">best first</option></select></label>
<span id="count"></span><main>@ROWS@</main><script>
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


class Shown(NamedTuple):
    """One edit in the report."""

    name: str  # of the subject
    caption: str
    words: str  # the judge's
    picture: Image.Image | None


def write_report(settings: Settings, rows: list[dict], results: list[dict], summary: str) -> None:
    """report.html with small pictures beside it, and grid.png: of each task the row with the median
    score."""
    out = Path(settings.out)
    main_metric = METRICS[settings.benchmark][0]
    subjects = subjects_of(settings)
    found = {}  # (row, subject) -> [its result under each judge]
    for result, name in itertools.product(results, subjects):
        for row in result["subjects"][name]["rows"]:
            found.setdefault((row["row"], name), []).append(row | {"judge": result["judge"]})
    articles = []
    by_task = {}
    for number, row in enumerate(tqdm(rows, desc="report")):
        figures = []
        for name in dict.fromkeys(["source", *reversed(subjects)]):  # source, base, trained
            path = find_edit(row, name, subjects.get(name))
            figures.append(shown_edit(settings, name, path, found.get((row["row"], name), [])))
        first = found[row["row"], next(iter(subjects))][0]
        score = -1.0 if math.isnan(first[main_metric]) else first[main_metric]
        articles.append(article(out, number, row, figures, first, score))
        by_task.setdefault(row["task"], []).append((score, number, figures))
    page = PAGE.replace("@SUMMARY@", escape(summary)).replace("@ROWS@", "".join(articles))
    with whole_file(out / "report.html") as part:
        part.write_text(page, encoding="utf-8")
    pictures = []
    captions = []
    for _, of_task in sorted(by_task.items()):
        _, number, figures = sorted(of_task)[len(of_task) // 2]
        pictures.append([figure.picture for figure in figures])
        captions.append([f"{figure.name} {figure.caption}" for figure in figures])
        captions[-1][0] = rows[number]["prompt"]  # below the source
    title = f"of each task the row with the median {main_metric}"
    with whole_file(out / "grid.png") as part:
        picture_grid(pictures, captions, title).save(part)


def shown_edit(settings: Settings, name: str, path: Path | None, found: list[dict]) -> Shown:
    """An edit with its scores under each judge and what was said of it."""
    scores = []
    for row in found:
        metrics = [metric for metric in METRICS[settings.benchmark] if metric in row]
        values = " ".join(f"{metric} {number(row[metric])}" for metric in metrics)
        scores.append(values if len(found) == 1 else f"{values} by {row['judge']}")
    if found and "psnr" in found[0]:
        scores.append(f"psnr {number(found[0]['psnr'])}")
    try:
        picture = load_image(path) if path else None
    except BadInput:
        picture = None
    if picture:
        picture.thumbnail((384, 384))
    words = "\n".join(row["said"] for row in found)
    return Shown(name, "; ".join(scores), words, picture)


def number(value: float) -> str:
    return "missing" if math.isnan(value) else f"{value:.2f}"


def article(
    out: Path, place: int, row: dict, figures: list[Shown], first: dict, score: float
) -> str:
    """A row of the report; its pictures are written below `out`."""
    kinds = [row.get("language", ""), "" if first["answered"] else "failed"]
    parts = [
        f'<article data-task="{escape(row["task"])}" data-kinds="{" ".join(kinds)}" '
        f'data-score="{score}"><div><b>{escape(row["prompt"])}</b><p>{escape(row["task"])}</p>'
        f"<small>{escape(row['row'])}</small></div>"
    ]
    for figure in figures:
        image = MISSING
        if figure.picture:
            file = f"report/{place:05}-{figure.name}.jpg"
            with whole_file(out / file) as part:
                figure.picture.save(part, quality=95, subsampling=0)
            style = "tiny" if max(figure.picture.size) <= 128 else ""
            image = f'<img class="{style}" loading="lazy" src="{file}">'
        words = ""
        if figure.words:
            words = f"<details><summary>the judge's words</summary>{escape(figure.words)}</details>"
        caption = escape(f"{figure.name} {figure.caption}")
        parts.append(f"<figure><figcaption>{caption}</figcaption>{image}{words}</figure>")
    return "".join([*parts, "</article>\n"])


def compare(places: list[str]) -> None:
    """Prints the paired differences of two runs' first subjects under each judge and reading that
    both have."""
    if len(places) != 2:
        raise BadInput("compare: name two runs, python evaluate.py compare RUN_A RUN_B")
    found = [read_results(Path(place)) for place in places]
    both = sorted(found[0].keys() & found[1].keys())
    if not both:
        raise BadInput(
            f"{' and '.join(places)}: no result under one judge, prompts and reading, but "
            f"{', '.join(found[0])} against {', '.join(found[1])}; score both alike"
        )
    for name in both:
        a, b = (results[name] for results in found)
        if a["metadata"] != b["metadata"]:
            raise BadInput(
                f"{' and '.join(places)}: another version of the benchmark in each; score both on "
                "one"
            )
        print(f"judge and prompts {a['judge']}, {a['mode']} reading")
        rows = [next(iter(result["subjects"].values()))["rows"] for result in (a, b)]
        print(differences(*rows, a["benchmark"], *places))


def read_results(place: Path) -> dict[str, dict]:
    """{file name: result} of an --out folder; BadInput for none, or for a damaged one."""
    results = {}
    for file in sorted(place.glob("scores-*.json")):
        fix = "run --stage score again"
        result = read_json(file, fix)
        try:
            METRICS[result["benchmark"]], result["judge"], result["mode"], result["metadata"]
            for row in next(iter(result["subjects"].values()))["rows"]:
                row["row"], row["task"], row["source"], row["answered"]
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise BadInput(f"{file}: is no result of this script; {fix}") from None
        results[file.name] = result
    if not results:
        raise BadInput(f"{place}: holds no scores; name an --out folder of evaluate.py")
    return results


# ---------------------------------------------------------------- does a judge agree with people?


class Rated(NamedTuple):
    """Edits of one source that people rated."""

    row: dict
    sources: list[Image.Image]
    edits: list[Image.Image]  # n of them
    labels: list[float]  # n, the higher the better


def read_ratings(file: Path) -> list[Rated]:
    """The groups of a file of rated edits, one a line.

    A line has `prompt`, `image`, `edits` and `scores`, a number for each edit, the higher the
    better; for two edits also `preference` in place of scores: 0 the first is better, 1 the
    second, 0.5 neither. Paths are relative to the file.
    """
    groups = []
    load = functools.cache(load_image)
    for row in read_rows(file.parent, file.stem):
        try:
            labels = row.get("scores")
            if labels is None:
                labels = [1 - row["preference"], row["preference"]]
            labels = [float(label) for label in labels]
            edits = [load_image(file.parent / path) for path in row["edits"]]
        except (KeyError, TypeError, ValueError):
            raise BadInput(
                f"{file}: {row['id']} lacks `edits` with `scores` or a `preference`; add them"
            ) from None
        if len(labels) != len(edits):
            raise BadInput(
                f"{file}: {row['id']} has {len(edits)} edits and {len(labels)} scores; give one "
                "for each"
            )
        groups.append(Rated(row, [load(path) for path in row["images"]], edits, labels))
    return groups


def pair_outcomes(scores: list[float], labels: list[float]) -> list[float]:
    """Of each pair of edits that labels tell apart: 1 if the scores order them alike, 0 if not,
    0.5 if they tie. Pairs with a score that is NaN are left out."""
    outcomes = []
    for (a, x), (b, y) in itertools.combinations(zip(scores, labels, strict=True), 2):
        if x == y or math.isnan(a - b):
            continue
        if abs(a - b) < 1e-6:
            outcomes.append(0.5)
        else:
            outcomes.append(1.0 if (a > b) == (x > y) else 0.0)
    return outcomes


def ordered_pairs(scores: list[float], labels: list[float]) -> tuple[int, float, int]:
    """Of a group's pairs that labels tell apart: how many, how many are right (a tie is half), how
    many tie."""
    outcomes = pair_outcomes(scores, labels)
    return len(outcomes), sum(outcomes), outcomes.count(0.5)


@dataclass(frozen=True)
class AgreeSettings(JudgeSettings):
    """A judge and what to compare."""

    strategies: list[str] = setting(["logits"], f"To compare, of {', '.join(STRATEGIES)}.")

    def __post_init__(self):
        super().__post_init__()
        for name in self.strategies:
            if name not in STRATEGIES:
                raise BadInput(f"--strategies {name}: no strategy; take of {', '.join(STRATEGIES)}")


def agree(words: list[str]) -> None:
    """Prints, for each strategy, how far the judge orders edits as people do: Table 4 of the paper."""
    if not words or not words[0].endswith(".jsonl"):
        raise BadInput(
            "agree: names no file; write python evaluate.py agree FILE.jsonl --judge ..."
        )
    settings = parse_settings(AgreeSettings, words[1:], description=agree.__doc__, judge=TOY)
    groups = read_ratings(Path(words[0]))
    judge = load_judge(settings, stop=catch_signals())
    edits = sum(len(group.edits) for group in groups)
    print(f"{settings.judge}: {edits} edits in {len(groups)} groups")
    print(
        f"{'strategy':12} {'right pairs (95 %)':26} Spearman   ties  spread   mass failed s/score"
    )
    for strategy in settings.strategies:
        try:
            judge.use(strategy)
        except BadInput as error:
            print(f"{strategy:12} {error}")
            continue
        print(f"{strategy:12} {agreement(judge, groups)}")
    judge.close()


def agreement(judge: Judge, groups: list[Rated]) -> str:
    """A line of agree's table."""
    start = time.perf_counter()
    results = [judge.score(group.row, group.sources, group.edits) for group in groups]
    scores = torch.cat([result.score for result in results])  # (all edits,)
    pace = (time.perf_counter() - start) / len(scores)
    labels = torch.tensor([label for group in groups for label in group.labels])
    outcomes = []
    places = []  # the group of each pair
    for place, (group, result) in enumerate(zip(groups, results, strict=True)):
        pairs = pair_outcomes(result.score.tolist(), group.labels)
        outcomes += pairs
        places += [str(place)] * len(pairs)
    _, draws = bootstrap(outcomes, ["all"] * len(outcomes), places)
    right = shown(interval(outcomes, draws.flatten()), ".1%")
    ties = outcomes.count(0.5) / max(len(outcomes), 1)
    known = ~scores.isnan()
    order = spearman(scores[known], labels[known])
    spreads = [result.score[~result.score.isnan()].std(unbiased=False) for result in results]
    spread = torch.stack(spreads).nanmean().item()
    mass = torch.cat([result.mass for result in results]).nanmean().item()
    failed = 1 - known.float().mean().item()
    return f"{right:26} {order:8.3f} {ties:6.1%} {spread:7.3f} {mass:6.3f} {failed:6.1%} {pace:.4f}"


# ---------------------------------------------------------------- runs as pictures

CURVES = {  # panel: the record's key
    "reward": "reward/mean",
    "held-out judge": "heldout/new/judge",
    "held-out oracle": "heldout/new/oracle",
    "held-out success": "heldout/new/success",
    "kept groups": "groups/kept",
    "drift from the base": "update/drift_base",
    "norm of v to the base's": "update/norm_ratio",
    "PSNR to the source": "reward/psnr",
}


def curves(places: list[str]) -> None:
    """Draws curves.png from the log.jsonl of training runs; runs that differ in nothing but their
    seed are one line, their mean, in a band from the least to the greatest."""
    if not places:
        raise BadInput("curves: names no run; write python evaluate.py curves RUN [RUN ...]")
    try:
        import matplotlib
    except ImportError:
        raise BadInput("curves: needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {}  # settings but for the seed -> {run: its records}
    for place in places:
        config = read_json(Path(place, "config.json"), "name the folder of a training run")
        same = {key: value for key, value in config.items() if key not in ("seed", "out", "resume")}
        records = [record for _, record in read_json_lines(Path(place, "log.jsonl"), [])]
        groups.setdefault(json.dumps(same, sort_keys=True), {})[place] = records
    figure, axes = pyplot.subplots(2, 4, figsize=(18, 8))
    for axis, (title, key) in zip(axes.flat, CURVES.items(), strict=True):
        for runs in groups.values():
            epochs, values = curve(list(runs.values()), key)
            line = axis.plot(epochs, values.mean(0), label=" ".join(runs))
            if len(runs) > 1:
                colour = line[0].get_color()
                axis.fill_between(epochs, values.min(0), values.max(0), alpha=0.2, color=colour)
        axis.set(title=title, xlabel="epoch")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    with whole_file("curves.png") as part:
        figure.savefig(part)
    print("wrote curves.png")


def curve(runs: list[list[dict]], key: str) -> tuple[list[int], np.ndarray]:
    """A key's epochs (E,) and values (runs, E), at the epochs where all runs have a number."""
    by_epoch = []
    for records in runs:
        known = {record.get("epoch"): record.get(key) for record in records}
        by_epoch.append({e: v for e, v in known.items() if isinstance(v, (int, float))})
    epochs = sorted(set.intersection(*(set(values) for values in by_epoch)))
    rows = [[values[epoch] for epoch in epochs] for values in by_epoch]
    return epochs, np.array(rows, float).reshape(len(runs), len(epochs))


# ---------------------------------------------------------------- the command


def claim(settings: Settings) -> Settings:
    """Settings with what --out was begun with; BadInput when edits of another making lie there."""
    file = Path(settings.out, "config.json")
    if file.is_file():
        fix = "give another --out"
        before = read_json(file, fix)
        if any(key not in before for key in (*DRAWN, "baselines")):
            raise BadInput(f"{settings.out}: is a folder of something else, see {file}; {fix}")
        if settings.stage in ("judge", "score"):
            wanted = sorted({*before["baselines"], *settings.baselines})
            return replace(settings, baselines=wanted, **{key: before[key] for key in DRAWN})
        for key in DRAWN:
            if before[key] != getattr(settings, key):
                own = getattr(settings, key)
                raise BadInput(
                    f"{settings.out}: was begun with --{key} {before[key]}, not {own}; {fix}"
                )
    with whole_file(file) as part:
        part.write_text(json.dumps(asdict(settings), indent=1))
    return settings


def wait_for_all(accelerator: Accelerator, stop: threading.Event, out: str) -> None:
    """Waits until every process is here; ends in one line when another is gone."""
    try:
        accelerator.wait_for_everyone()
    except RuntimeError as error:  # gloo and NCCL raise it when a process has ended
        refuse_when_stopped(stop, out)
        reason = str(error).splitlines()[0][:120]
        raise BadInput(f"{out}: another process ended ({reason}); start again to go on") from None
    refuse_when_stopped(stop, out)


def evaluate(settings: Settings, accelerator: Accelerator, stop: threading.Event) -> None:
    """Runs the stages."""
    with accelerator.main_process_first():
        settings = claim(settings)
        rows, prompts, version = load_benchmark(settings)
    check_folders(settings, rows)
    if settings.stage in ("all", "sample"):
        draw_edits(settings, rows, accelerator, stop)
        wait_for_all(accelerator, stop, settings.out)
    if settings.stage in ("all", "judge"):
        judge_edits(settings, rows, prompts, accelerator, stop)
        wait_for_all(accelerator, stop, settings.out)
    if settings.stage in ("all", "score") and accelerator.is_main_process:
        results = score_calls(settings, rows, prompts, version)
        summary = "\n".join(describe(settings, result) for result in results)
        write_report(settings, rows, results, summary)
        print(summary, f"wrote {settings.out}/report.html and grid.png", sep="\n")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "no command"
    others = {"compare": compare, "agree": agree, "curves": curves}
    if command in others:
        return others[command](argv[1:])
    if command not in METRICS:
        raise BadInput(
            f"{command}: say what to score: imgedit, gedit, heldout, or compare RUN_A RUN_B, agree "
            "FILE.jsonl, curves RUN"
        )
    about = __doc__.splitlines()[0]
    settings = parse_settings(Settings, ["--benchmark", *argv], description=about)
    stop = catch_signals()
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))  # one may be done long before
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patient])
    with locked(settings.out) if accelerator.is_main_process else nullcontext():
        evaluate(settings, accelerator, stop)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
