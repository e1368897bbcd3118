"""Scores an editor on ImgEdit-Bench, GEdit-Bench or a held-out set: draws, asks a judge, adds up.

    python evaluate.py imgedit --bench DIR --base MODEL --lora RUN/checkpoint-N --judge URL
    python evaluate.py gedit --language both ...     # the same settings
    python evaluate.py heldout --bench DATASET ...   # the test split of a dataset folder
    python evaluate.py compare RUN_A RUN_B           # the paired difference with its interval
    python evaluate.py agree FILE.jsonl --judge ...  # how far a judge orders edits as people do

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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
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
    together,
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

METRICS = {  # the main one first
    "imgedit": ("score",),
    "gedit": ("O", "SC", "PQ"),
    "heldout": ("judge", "oracle", "success"),
}
KEPT = ("psnr", "ssim")  # how much of the source is kept
SHOWN_METRICS = ("score", "O", "SC", "PQ", "judge", "oracle", "success", "psnr")
CALLS = {"imgedit": ("edit",), "gedit": ("SC", "PQ"), "heldout": ("judge",)}  # questions on an edit
PUBLISHED_ROWS = {"imgedit": 737, "gedit": 606}  # of a language
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG")  # of pictures, ours first
MADE_FROM = "made from"  # the PNG's text that says what an edit was drawn from
MISSING = "no edit"  # the failure of an edit that is not there
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


def short_hash(content: str | bytes) -> str:
    """The first 12 hex digits of a sha256."""
    if isinstance(content, str):
        content = content.encode()
    return hashlib.sha256(content).hexdigest()[:12]


def file_hash(path: str | Path) -> str:
    """short_hash of a file, read once for as long as it does not change; "" where there is none."""
    path = Path(path)
    if not path.is_file():
        return ""
    return hash_at(path, path.stat().st_mtime_ns)


@functools.cache
def hash_at(path: Path, changed: int) -> str:
    return short_hash(path.read_bytes())


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
    """The three labels that a prompt of ImgEdit's judge asks for; () where it is unlike."""
    found = re.findall(r"(?m)^\W*([^\W\d][^:\n]*?)\W*:\W*[Aa] number\b", prompt)
    return tuple(plain_label(label) for label in found) if len(found) == 3 else ()


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
    value = rf"{NUMBER}{unit}"
    text = re.sub(r"[*`\"“”]", "", text)
    text = re.sub(rf"([:=|]\s*)\[\s*({value})\s*\]", r"\1\2", text)  # label: [4]
    text += "\n" + columns_as_lines(text)
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


def columns_as_lines(text: str) -> str:
    """A table of two rows, labels above values, as lines `label | value`; "" for any other."""
    rows = [line.strip(" |").split("|") for line in text.splitlines() if "|" in line]
    rows = [row for row in rows if re.search(r"\w", "".join(row))]  # but for |---|---|
    if len(rows) != 2:
        return ""
    return "\n".join(" | ".join(column) for column in zip(*rows, strict=False))


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
    """Lists after `score`, or alone: for quotes in the reasoning, or an answer cut short."""
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
        return official_scores(f'{{"score": {reply}}}')
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


def score_imgedit(records: Rows, mode: str = "strict") -> dict:
    """ImgEdit-Bench's result from the judge's calls: {"rows": [a dict a row], "groups": {"all":
    what tabulate gives}}.

    records: dicts with `row`, `task`, `source`, and `reply` or `failure`, perhaps `labels`, `psnr`
    and `ssim`; a row's last one counts. A row's score is the mean of its three, the floor is 1.
    official: rounded to 2 digits, as are the tasks' means.
    """
    digits = 2 if mode == "official" else None
    rows = []
    for (record,) in by_row(records, CALLS["imgedit"]):
        scores = parse_imgedit(record.get("reply", ""), mode, record.get("labels", ()))
        mean = average(scores, digits) if scores else None
        rows.append(row_result([record], mode, 1.0, score=mean))
    return {"rows": rows, "groups": grouped(rows, METRICS["imgedit"], digits)}


def score_gedit(records: Rows, mode: str = "strict") -> dict:
    """GEdit-Bench's result from the judge's calls, as score_imgedit; groups are `en`, `en
    intersection`, `cn` ...

    records: dicts with `row`, `call` ("SC" or "PQ"), `task`, `source`, `language`, `intersection`,
    and `reply` or `failure`. A row's SC and PQ are the lower of their two scores, O is
    sqrt(SC PQ); the floor is 0.
    """
    rows = []
    for both in by_row(records, CALLS["gedit"]):
        scores = [parse_gedit(record.get("reply", ""), mode) for record in both]
        sc, pq = (min(values) if values else None for values in scores)
        overall = None
        if sc is not None and pq is not None and sc * pq >= 0:
            overall = math.sqrt(sc * pq)
        rows.append(row_result(both, mode, 0.0, O=overall, SC=sc, PQ=pq))
    return {"rows": rows, "groups": grouped(rows, METRICS["gedit"])}


def score_heldout(records: Rows, mode: str = "strict") -> dict:
    """A held-out set's result, as score_imgedit: the judge's own score in `scores`, the oracle's of
    a toy row in `truth`."""
    rows = []
    for (record,) in by_row(records, CALLS["heldout"]):
        truth = record.get("truth", {})
        if not truth and "target_scene" in record:  # a toy row without an edit
            truth = dict.fromkeys(METRICS["heldout"][1:])
        score = record.get("scores", [None])[0]
        rows.append(row_result([record], mode, 0.0, judge=score, **truth))
    return {"rows": rows, "groups": grouped(rows, METRICS["heldout"])}


def by_row(records: Rows, calls: tuple) -> list[Rows]:
    """Of each row the last record of each call, in their order; an empty one for none."""
    rows = {}
    for record in records:
        row = rows.setdefault(record["row"], {call: record | {"reply": ""} for call in calls})
        row[record.get("call", calls[0])] = record
    return [list(row.values()) for row in rows.values()]


def average(values: list[float], digits: int | None = None) -> float:
    mean = sum(values) / len(values)
    return mean if digits is None else round(mean, digits)


def row_result(records: Rows, mode: str, floor: float, **metrics) -> dict:
    """A row's result. A metric without a value gets the floor; official: then none has any, NaN."""
    answered = None not in metrics.values()
    for name, value in metrics.items():
        if mode == "official" and not answered:
            metrics[name] = math.nan
        elif value is None:
            metrics[name] = floor
    said = [record.get("reply") or record.get("failure", "") for record in records]
    result = {"answered": answered, "said": "\n".join(said).strip(), **metrics}
    keys = ("row", "task", "source", "language", "intersection", *KEPT)
    return result | {key: records[0][key] for key in keys if key in records[0]}


def grouped(rows: Rows, metrics: tuple, digits: int | None = None) -> dict[str, dict]:
    """The tables of the rows of each language and of its intersection subset; else of all rows.
    What is kept of the source stands beside the metrics."""
    groups = {}
    for row in rows:
        name = row.get("language", "all")
        groups.setdefault(name, []).append(row)
        if row.get("intersection"):
            groups.setdefault(f"{name} intersection", []).append(row)
    tables = {}
    for name, members in groups.items():
        keys = set().union(*members)
        known = [metric for metric in (*metrics, *KEPT) if metric in keys]
        tables[name] = tabulate(members, known, digits)
    return tables


def tabulate(rows: Rows, metrics: list[str], digits: int | None = None) -> dict:
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
        values = [row[metric] for row in known]
        sources = [row["source"] for row in known]
        names, drawn = bootstrap(values, [row["task"] for row in known], sources)  # (D, T)
        _, overall = bootstrap(values, ["all"] * len(known), sources)  # (D, 1)
        means = {}
        for name in names:
            means[name] = average([row[metric] for row in known if row["task"] == name], digits)
        with np.errstate(all="ignore"):
            macro = np.nansum(drawn, 1) / (~np.isnan(drawn)).sum(1)  # (D,) over the drawn tasks
        found = {"macro": interval(list(means.values()), macro)}
        found["micro"] = interval(values, overall)
        for name, of_task in zip(names, drawn.T, strict=True):
            found[name] = interval([means[name]], of_task)
        table[metric] = found
    return table


def interval(values: list[float], draws: np.ndarray) -> list:
    """[mean of the values, 2.5 % and 97.5 % quantile of the draws]; None where there are none."""
    draws = draws[~np.isnan(draws)]
    ends = np.quantile(draws, (0.025, 0.975)).tolist() if len(draws) else [None, None]
    return [average(values) if values else None, *ends]


def paired_differences(a: Rows, b: Rows, metrics: tuple) -> dict[str, dict]:
    """The tables of a - b over the rows that both results have, resampled together."""
    every = (*metrics, *KEPT)
    others = {row["row"]: row for row in b}
    pairs = []
    for row in a:
        if row["row"] in others:
            other = others[row["row"]]
            pair = {key: value for key, value in row.items() if key not in every}
            pair["answered"] = row["answered"] and other["answered"]
            shared = [key for key in every if key in row and key in other]
            pairs.append(pair | {key: row[key] - other[key] for key in shared})
    return grouped(pairs, metrics)


def verdict(difference: list, a: str, b: str, kept: list | None = None) -> str:
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
        words += f"; {a} keeps {abs(mean):.1f} dB {'more' if mean > 0 else 'less'} of the source"
        words += f" ({low:+.1f} to {high:+.1f} dB)"
    return words


# ---------------------------------------------------------------- benchmarks

IMGEDIT_TASKS = (
    "add",
    "adjust",
    "extract",
    "replace",
    "remove",
    "background",
    "style",
    "compose",
    "action",
)
GEDIT_KEYS = ("key", "task_type", "instruction_language", "instruction")
GEDIT_TASKS = (
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
)


def load_benchmark(settings: Settings) -> tuple[Rows, dict, dict]:
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


def read_heldout(folder: Path) -> Rows:
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
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,80}", text):
        return text
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)[:80] + "-" + short_hash(text)


def read_imgedit(folder: Path, prompts_file: str) -> tuple[Rows, dict, str]:
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
    check_entry(entry, ("id", "prompt", "edit_type"), where)
    # two versions circulate
    task = "adjust" if entry["edit_type"] == "alter" else entry["edit_type"]
    check_task(task, IMGEDIT_TASKS, where)
    inside(folder, f"{key}.png", where)
    return {
        "row": key,
        "prompt": entry["prompt"],
        "images": [inside(folder, entry["id"], where)],
        "task": task,
        "source": entry["id"],
        "files": [key],
    }


def check_entry(entry: dict, keys: tuple[str, ...], where: str) -> None:
    """BadInput for an entry of a benchmark that lacks one of these texts."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
        raise BadInput(f"{where} lacks {' or '.join(keys)}; take the benchmark's own metadata")


def check_task(task: str, tasks: tuple[str, ...], where: str) -> None:
    if task not in tasks:
        raise BadInput(f"{where}: unknown task {task!r}; the benchmark has {', '.join(tasks)}")


def read_gedit(
    folder: Path, prompts_file: str, languages: tuple[str, ...], out: str
) -> tuple[Rows, dict]:
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
        check_entry(entry, GEDIT_KEYS, where)
        check_task(entry["task_type"], GEDIT_TASKS, where)
        if entry["instruction_language"] not in ("en", "cn"):
            raise BadInput(f"{where}: is in {entry['instruction_language']!r}, not in en or cn")
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


# ---------------------------------------------------------------- one evaluation


@dataclass(frozen=True)
class Job:
    """What an evaluation works on."""

    settings: Settings
    accelerator: Accelerator
    stop: threading.Event  # set by a signal
    rows: Rows  # as load_benchmark tells
    prompts: dict[str, str]
    version: dict

    @property
    def mine(self) -> Rows:
        """This process's share of the rows."""
        return self.rows[self.accelerator.process_index :: self.accelerator.num_processes]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.accelerator.device.type == "cuda" else torch.float32

    def refuse_when_stopped(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def warn(self, text: str) -> None:
        """Says something once, whatever the number of processes."""
        if self.accelerator.is_main_process:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def bar(self, work: Iterable, name: str, total: int | None = None) -> tqdm:
        """A progress bar, shown by one process."""
        quiet = not self.accelerator.is_main_process
        return tqdm(work, desc=name, total=total, disable=quiet)


def subjects_of(settings: Settings) -> dict[str, Path]:
    """{name: folder of its edits}, the one in question first; `source` needs no folder."""
    names = sorted(settings.baselines)
    if settings.edits:
        names.insert(0, "edits")
    elif settings.lora:
        names.insert(0, "trained")
    elif settings.base or "source" not in names:
        names.insert(0, "base")
    folders = {name: Path(settings.out, name) for name in names}
    if settings.edits:
        folders["edits"] = Path(settings.edits)
    return folders


def find_picture(folder: str | Path, stems: list[str]) -> Path | None:
    """The first picture of these names, without their endings, in a folder."""
    for stem, ending in itertools.product(stems, ENDINGS):
        path = Path(folder, f"{stem}{ending}")
        if path.is_file():
            return path
    return None


def find_edit(row: dict, subject: str, folder: Path) -> Path | None:
    """Where a row's edit lies, None where there is none."""
    if subject == "source":
        return Path(row["images"][0])
    return find_picture(folder, row["files"] if subject == "edits" else row["files"][:1])


def check_folder(job: Job, flag: str, folder: str) -> None:
    """BadInput when a folder of --edits or --masks is for no row; a warning when it misses some."""
    missing = [row for row in job.rows if find_picture(folder, row["files"]) is None]
    if missing:
        first = f"{folder}/{missing[0]['files'][0]}{ENDINGS[0]}"
        lost = (
            f"{flag} {folder}: has nothing for {len(missing)} of {len(job.rows)} rows, no {first}"
        )
        if len(missing) == len(job.rows):
            raise BadInput(f"{lost}; name a folder in the benchmark's layout")
        job.warn(lost)


# ---------------------------------------------------------------- sample: the edits


def weights_hash(place: str) -> str:
    """A hash of the names, sizes and first megabytes of a model's or LoRA's files; a hub id is its
    own."""
    files = [Path(place), *sorted(Path(place).rglob("*"))]
    files = [file for file in files if file.is_file()]
    known = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stored:
            known.update(f"{file.name} {file.stat().st_size}".encode() + stored.read(2**20))
    return known.hexdigest()[:12] if files else place


def recipe_of(settings: Settings, subject: str) -> dict:
    """All that the edits of a subject are made from, but for their rows."""
    recipe = {name: getattr(settings, name) for name in DRAWN_WITH}
    recipe["base"] = weights_hash(settings.base)
    recipe["lora"] = weights_hash(settings.lora) if subject == "trained" else ""
    return recipe


def is_current(path: Path, recipe: str) -> bool:
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
    recipe: str


def find_undrawn(job: Job) -> list[Undrawn]:
    """What is not there as it should be of this process's share of the edits."""
    todo = []
    for subject, folder in subjects_of(job.settings).items():
        if subject not in ("trained", "base"):
            continue
        if not job.settings.base:
            raise BadInput("--base is missing; name the editor, or a folder of finished --edits")
        recipe = recipe_of(job.settings, subject)
        for row in job.mine:
            recipe["prompt"] = row["prompt"]
            recipe["sources"] = [file_hash(path) for path in row["images"]]
            path = folder / f"{row['files'][0]}.png"
            if not is_current(path, json.dumps(recipe)):
                todo.append(Undrawn(subject, row, path, json.dumps(recipe)))
    return todo


def draw_edits(job: Job) -> None:
    """Draws what has to be; an edit's noise comes from its seed alone."""
    settings = job.settings
    todo = find_undrawn(job)
    if not todo:
        return
    trust = settings.trust_remote_code
    place = (job.accelerator.device, job.dtype, settings.resolution)
    editor = load_editor(settings.base, *place, trust_remote_code=trust)
    if settings.lora:
        add_policies(editor, averages=(), start=settings.lora)
    for edit in job.bar(todo, "edits"):
        job.refuse_when_stopped()
        sources = [load_image(path) for path in edit.row["images"]]
        noise = [torch.Generator().manual_seed(settings.seed)]
        how = (edit.row["prompt"], noise, settings.steps, settings.guidance)
        with policy(editor, "new" if edit.subject == "trained" else "base"):
            group = rollout(editor, sources, *how, evaluation=True)
        if settings.benchmark == "gedit":  # its layout has the source beside
            with whole_file(edit.path.with_name(f"{edit.path.stem}_SRCIMG.png")) as part:
                load_image(edit.row["shown"]).save(part, "PNG")
        info = PngImagePlugin.PngInfo()
        info.add_text(MADE_FROM, edit.recipe)
        with whole_file(edit.path) as part:
            group.images[0].save(part, "PNG", pnginfo=info)


# ---------------------------------------------------------------- judge: the calls


class Call(NamedTuple):
    """One question about one edit."""

    record: dict  # `subject`, `row`, `call`, `key`: a hash of what an answer must be for
    row: dict
    text: str
    path: Path | None  # of the edit


def find_calls(job: Job, rows: Rows) -> list[Call]:
    """The questions about every edit of these rows, also about those that are missing."""
    calls = []
    for subject, folder in subjects_of(job.settings).items():
        for row, name in itertools.product(rows, CALLS[job.settings.benchmark]):
            path = find_edit(row, subject, folder)
            text = question(job, row, name)
            pictures = [*row["images"], row.get("shown", ""), path or ""]
            asked = [row["row"], name, text, [file_hash(picture) for picture in pictures]]
            record = {"subject": subject, "row": row["row"], "call": name}
            record["key"] = short_hash(json.dumps(asked))
            calls.append(Call(record, row, text, path))
    return calls


def question(job: Job, row: dict, call: str) -> str:
    """What the judge is asked: the prompt with the instruction in its place."""
    if job.settings.benchmark == "heldout":
        return f"{row['prompt']}\n{requirement_of(row)}"
    text = job.prompts.get(call) or job.prompts[row["task"]]
    # one pass: an instruction may itself hold such words
    return re.sub("<edit_prompt>|<instruction>", lambda place: row["prompt"], text)


def read_answers(job: Job, label: str) -> dict[str, dict]:
    """{key: its newest record} of all processes' files of a judge; what cannot be read is none."""
    records = []
    faults = []
    for file in Path(job.settings.out).glob(f"calls-{label}-*.jsonl"):
        records += [record for _, record in read_json_lines(file, faults)]
    if faults:
        job.warn(f"{len(faults)} calls do not count, such as {faults[0]}")
    records.sort(key=recorded_at)
    return {str(record.get("key")): record for record in records}


def recorded_at(record: dict) -> float:
    seconds = record.get("time")
    return seconds if isinstance(seconds, float) else 0.0


def label_of(job: Job, judge: Judge) -> str:
    """The judge's name and a hash of how it is asked: results of two labels never mix."""
    asked = job.prompts or [judge.prompts, *(getattr(job.settings, name) for name in HOW_ASKED)]
    known = short_hash(json.dumps([judge.name, asked], sort_keys=True))
    return "-".join([*re.findall(r"[\w.]+", judge.name), known])


def judge_edits(job: Job) -> None:
    """Asks the judge what has no good answer yet, several calls at a time, and appends each as one
    line as it comes."""
    settings = job.settings
    judge = load_judge(settings, job.accelerator.device, job.dtype, stop=job.stop)
    label = label_of(job, judge)
    answers = read_answers(job, label)
    unknown = {"failure": "not asked"}
    todo = [call for call in find_calls(job, job.mine) if call.path]
    todo = [call for call in todo if "failure" in answers.get(call.record["key"], unknown)]
    warn_of_own_judge(job, judge)
    file = Path(settings.out, f"calls-{label}-{job.accelerator.process_index}.jsonl")
    pool = ThreadPoolExecutor(settings.judge_in_flight * (1 + settings.judge.count(",")))
    calls = {pool.submit(answer, job, judge, call): call for call in todo}
    failures = []
    try:
        for future in job.bar(as_completed(calls), "judge", len(todo)):
            record = future.result()
            if job.stop.is_set() and "failure" in record:
                continue  # given up, not answered
            append_json_line(file, calls[future].record | record | {"time": time.time()})
            failures.append(record.get("failure"))
            if len(failures) == 8 and None not in failures:
                raise BadInput(
                    f"{settings.judge}: its first 8 calls all failed ({failures[-1]}); see to the "
                    "judge, which must take pictures, and start again"
                )
    finally:
        pool.shutdown(cancel_futures=True)
        judge.close()


def warn_of_own_judge(job: Job, judge: Judge) -> None:
    """A warning when the LoRA was trained with this very judge."""
    lora = job.settings.lora
    config = Path(lora).parent / "config.json"
    if not lora or not config.is_file():
        return
    if read_json(config, "take a run's own folder").get("judge") == job.settings.judge:
        job.warn(
            f"{judge.name} is the judge that {lora} was trained with; its scores tell how well it "
            "is pleased: let another judge have the last word"
        )


def answer(job: Job, judge: Judge, call: Call) -> dict:
    """The record of a call: its answer, or the cause of its failure."""
    if job.stop.is_set():
        return {"failure": "stopped"}
    try:
        *sources, edit = (load_image(path) for path in (*call.row["images"], call.path))
        if job.settings.benchmark == "heldout":
            return heldout_answer(judge, call.row, sources, edit)
        if job.settings.benchmark == "gedit":
            source, edit = as_gedit_shows(load_image(call.row["shown"]), edit)
            # quality is judged without the source
            sources = [] if call.record["call"] == "PQ" else [source]
        return {"reply": judge.ask(call.text, [*sources, edit], job.settings.reply_tokens)}
    except (JudgeFailure, BadInput) as failure:
        return {"failure": str(failure)}


def heldout_answer(judge: Judge, row: dict, sources: list[Image.Image], edit: Image.Image) -> dict:
    """The judge's own score of an edit, and the oracle's where there is one."""
    scores = judge.score(row, sources, [edit])
    score = scores.score.item()
    record = {"scores": [score], "reply": "".join(scores.words)}
    if math.isnan(score):
        record = {"failure": "".join(scores.causes) or "no score"}
    truth = oracle(row, edit)
    if truth:
        values = [float(value) for value in truth]
        record["truth"] = dict(zip(METRICS["heldout"][1:], values, strict=True))
    return record


def as_gedit_shows(source: Image.Image, edit: Image.Image) -> list[Image.Image]:
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


def kept_of_source(job: Job, call: Call) -> dict[str, float]:
    """PSNR and SSIM of an edit to its first source, outside the mask if there is one."""
    mask = call.row.get("mask")
    if job.settings.masks:
        mask = find_picture(job.settings.masks, call.row["files"])
    try:
        source, edit = load_image(call.row["images"][0]), load_image(call.path)
        mask = load_image(mask) if mask else None
    except BadInput:
        return {}
    psnr = plain_terms(source, [edit], mask)["psnr"].item()
    return {"psnr": psnr, "ssim": ssim(source, edit, mask)}


def ssim(source: Image.Image, edit: Image.Image, mask: Image.Image | None = None) -> float:
    """Structural similarity of two pictures' luminance, in [-1, 1], at the edit's size: the mean
    over what is not white in the mask, NaN where all is.

    7 x 7 windows, sample covariance, as scikit-image's default (Wang et al., 2004).
    """

    def plane(picture):
        grey = picture.convert("L").resize(edit.size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(grey, np.float64) / 255)[None]  # (1, H, W)

    def mean(x):
        return F.avg_pool2d(x, 7, stride=1)  # (1, H - 6, W - 6)

    x, y = plane(source), plane(edit)
    product = mean(x) * mean(y)
    squares = mean(x) ** 2 + mean(y) ** 2
    covariance = 49 / 48 * (mean(x * y) - product)
    variances = 49 / 48 * (mean(x * x + y * y) - squares)
    light, detail = 0.01**2, 0.03**2  # keep flat and dark places stable
    alike = (2 * product + light) / (squares + light)
    alike = alike * (2 * covariance + detail) / (variances + detail)
    if mask is not None:
        alike = alike[plane(mask)[:, 3:-3, 3:-3] < 0.5]
    return alike.mean().item()


# ---------------------------------------------------------------- score: tables and report

SCORERS = {"imgedit": score_imgedit, "gedit": score_gedit, "heldout": score_heldout}
ROW_KEYS = ("row", "task", "source", "language", "intersection", "labels", "target_scene")


def score_calls(job: Job) -> Rows:
    """Adds up each judge's calls into scores-JUDGE-MODE.json and returns what was written.

    What lay there before goes: calls of other edits or other questions do not count.
    """
    out = Path(job.settings.out)
    mode = job.settings.mode
    calls = find_calls(job, job.rows)
    known = known_of_rows(job, calls)
    stems = sorted(file.stem.removeprefix("calls-") for file in out.glob("calls-*.jsonl"))
    results = {}
    for label in dict.fromkeys(stem.rpartition("-")[0] for stem in stems):
        answers = read_answers(job, label)
        if any(call.record["key"] in answers for call in calls):
            records = records_of(calls, known, answers)
            score = SCORERS[job.settings.benchmark]
            results[out / f"scores-{label}-{mode}.json"] = {
                "benchmark": job.settings.benchmark,
                "judge": label,
                "mode": mode,
                "metadata": job.version,
                "subjects": {subject: score(records[subject], mode) for subject in records},
            }
    if not results:
        raise BadInput(f"{out}: holds no calls of a judge on these edits; run --stage judge first")
    for file, result in results.items():
        with whole_file(file) as part:
            part.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    for file in set(out.glob("scores-*.json")) - results.keys():
        file.unlink()
    return list(results.values())


def records_of(calls: list[Call], known: Rows, answers: dict) -> dict[str, Rows]:
    """{subject: a record of each of its calls, answered or not}."""
    records = {}
    for call, row in zip(calls, known, strict=True):
        empty = {"failure": "not judged" if call.path else MISSING}
        said = answers.get(call.record["key"], empty)
        records.setdefault(call.record["subject"], []).append(said | call.record | row)
    return records


def known_of_rows(job: Job, calls: list[Call]) -> Rows:
    """Of each call what its record has of the row, and what the edit keeps of the source."""

    def known(call):
        job.refuse_when_stopped()
        row = {key: call.row[key] for key in ROW_KEYS if key in call.row}
        if call.path is None or call.record["subject"] == "source":
            return row
        return row | kept_of_source(job, call)

    with ThreadPoolExecutor() as pool:
        return list(job.bar(pool.map(known, calls), "kept of the source", len(calls)))


def shown(mean: list, form: str = ".3f") -> str:
    """A mean with its interval as text."""
    value, low, high = mean
    if value is None:
        return "-"
    if low is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def as_text(groups: dict[str, dict], title: str) -> str:
    """A result's tables: for each group its coverage, and a line a task with the mean and interval
    of each metric."""
    lines = []
    for group, table in groups.items():
        names = metrics_in(table)
        lines.append(f"{title}, {group}: {table['answered']} of {table['rows']} rows answered")
        lines.append(f"  {'':16} " + " ".join(f"{name:26}" for name in names).rstrip())
        for task in table[names[0]]:
            means = [shown(table[name].get(task, [None] * 3)) for name in names]
            lines.append(f"  {task:16} " + " ".join(f"{mean:26}" for mean in means).rstrip())
    return "\n".join(lines)


def metrics_in(table: dict) -> list[str]:
    return [name for name in table if name not in ("rows", "answered")]


def differences(a: Rows, b: Rows, benchmark: str, names: tuple[str, str]) -> str:
    """The paired differences of two lists of row results as tables and in words."""
    groups = paired_differences(a, b, METRICS[benchmark])
    lines = [as_text(groups, " - ".join(names))]
    for group, table in groups.items():
        kept = table.get("psnr", {}).get("macro")
        lines.append(f"{group}: " + verdict(table[METRICS[benchmark][0]]["macro"], *names, kept))
    return "\n".join(lines)


def describe(settings: Settings, result: dict) -> str:
    """What a person reads first: every table, the gain over the baselines, and a row for a table of
    published numbers."""
    number = result["metadata"]["rows"]
    lines = [
        f"{settings.benchmark}, {result['mode']} reading, judge and prompts {result['judge']}, "
        f"{number} rows, metadata sha256 {result['metadata']['sha256']}"
    ]
    published = PUBLISHED_ROWS.get(settings.benchmark, number)
    if settings.language == "both" and settings.benchmark == "gedit":
        published = 2 * published
    if number != published:
        lines.append(
            f"warning: the published metadata has {published} rows; these numbers stand beside no "
            "published ones"
        )
    rows = {subject: content["rows"] for subject, content in result["subjects"].items()}
    for subject, content in result["subjects"].items():
        lines.append(as_text(content["groups"], subject))
        silent = [row["said"] for row in content["rows"] if not row["answered"]]
        missing = sum(MISSING in said for said in silent)
        if silent:
            unread = len(silent) - missing
            lines.append(f"warning: {subject}: {missing} edits missing, {unread} without a score")
    first, *others = rows
    for other in others:
        names = (first, other)
        lines.append(differences(rows[first], rows[other], settings.benchmark, names))
    return "\n".join([*lines, *pasted_row(settings, result, first)])


def pasted_row(settings: Settings, result: dict, subject: str) -> list[str]:
    """A subject as a row of a Markdown table, with its header."""
    name = settings.edits or settings.base or subject
    if subject == "trained":
        name += f" + {settings.lora}"
    cells = {"model": name, "judge": result["judge"]}
    for group, table in result["subjects"][subject]["groups"].items():
        for metric in metrics_in(table):
            cells[f"{group} {metric}"] = shown(table[metric]["macro"])
    rows = result["subjects"][subject]["rows"]
    cells["mode"] = result["mode"]
    cells["rows answered"] = f"{sum(row['answered'] for row in rows)} of {len(rows)}"
    lines = (cells, ["---"] * len(cells), cells.values())
    return [f"| {' | '.join(line)} |" for line in lines]


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
    """An edit in the report."""

    picture: Image.Image | None
    caption: str
    html: str


def write_report(job: Job, results: Rows, summary: str) -> None:
    """report.html with small pictures beside it, and grid.png: of each task the row with the median
    score."""
    out = Path(job.settings.out)
    subjects = subjects_of(job.settings)
    found = {}  # (row, subject) -> its result under each judge
    for result, name in itertools.product(results, subjects):
        for row in result["subjects"][name]["rows"]:
            found.setdefault((row["row"], name), []).append(row | {"by": result["judge"]})
    main_metric = METRICS[job.settings.benchmark][0]
    articles = []
    by_task = {}
    for number, row in enumerate(job.bar(job.rows, "report")):
        job.refuse_when_stopped()
        edits = []
        for name in dict.fromkeys(["source", *reversed(subjects)]):  # source, base, trained
            path = find_edit(row, name, subjects.get(name))
            small = out / f"report/{number:05}-{name}.jpg"
            edits.append(show_edit(name, path, small, found.get((row["row"], name), [])))
        first = found[row["row"], next(iter(subjects))][0]
        score = -1.0 if math.isnan(first[main_metric]) else first[main_metric]
        articles.append(article(row, first["answered"], score, edits))
        by_task.setdefault(row["task"], []).append((score, number, edits))
    page = PAGE.replace("@SUMMARY@", escape(summary)).replace("@ROWS@", "".join(articles))
    with whole_file(out / "report.html") as part:
        part.write_text(page, encoding="utf-8")
    pictures = []
    captions = []
    for task in sorted(by_task):
        _, number, edits = sorted(by_task[task])[len(by_task[task]) // 2]
        pictures.append([edit.picture for edit in edits])
        captions.append([edit.caption for edit in edits])
        captions[-1][0] = job.rows[number]["prompt"]  # below the source
    title = f"of each task the row with the median {main_metric}"
    with whole_file(out / "grid.png") as part:
        picture_grid(pictures, captions, title).save(part)


def show_edit(name: str, path: Path | None, small: Path, found: Rows) -> Shown:
    """An edit with its scores under each judge and what was said of it; its small picture is
    written to `small`."""
    caption = name
    for row in found:
        values = " ".join(f"{key} {row[key]:.2f}" for key in SHOWN_METRICS if key in row)
        caption += f" {values.replace('nan', 'missing')} by {row['by']};"
    picture, image = None, MISSING
    with suppress(BadInput):
        picture = load_image(path) if path else None
    if picture:
        picture.thumbnail((384, 384))
        with whole_file(small) as part:
            picture.save(part, quality=95, subsampling=0)
        style = "tiny" if max(picture.size) <= 128 else ""
        image = f'<img class="{style}" loading="lazy" src="report/{small.name}">'
    words = escape("\n".join(row["said"] for row in found).strip())
    if words:
        words = f"<details><summary>the judge's words</summary>{words}</details>"
    html = f"<figure><figcaption>{escape(caption)}</figcaption>{image}{words}</figure>"
    return Shown(picture, caption, html)


def article(row: dict, answered: bool, score: float, edits: list[Shown]) -> str:
    """A row of the report."""
    task, prompt, name = (escape(row[key]) for key in ("task", "prompt", "row"))
    kinds = row.get("language", "")
    if not answered:
        kinds += " failed"
    figures = "".join(edit.html for edit in edits)
    return (
        f'<article data-task="{task}" data-kinds="{kinds}" data-score="{score}"><div><b>{prompt}'
        f"</b><p>{task}</p><small>{name}</small></div>{figures}</article>\n"
    )


# ---------------------------------------------------------------- two runs


def compare(places: list[str]) -> None:
    """Prints the paired differences of two runs' first subjects under each judge and reading that
    both have."""
    if len(places) != 2:
        raise BadInput("compare: name two runs, python evaluate.py compare RUN_A RUN_B")
    first, second = (read_results(Path(place)) for place in places)
    both = " and ".join(places)
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise BadInput(
            f"{both}: no result under one judge, prompts and reading, but {', '.join(first)} "
            f"against {', '.join(second)}; score both alike"
        )
    for name in shared:
        a, b = first[name], second[name]
        if a["metadata"] != b["metadata"]:
            raise BadInput(f"{both}: another version of the benchmark in each; score both on one")
        print(f"judge and prompts {a['judge']}, {a['mode']} reading")
        rows = [next(iter(result["subjects"].values()))["rows"] for result in (a, b)]
        print(differences(*rows, a["benchmark"], places))


def read_results(place: Path) -> dict[str, dict]:
    """{file name: result} of an --out folder; BadInput for none, or for a damaged one."""
    results = {}
    for file in place.glob("scores-*.json"):
        result = read_json(file, "run --stage score again")
        try:  # whether it can be added up
            first = next(iter(result["subjects"].values()))
            grouped(first["rows"], METRICS[result["benchmark"]])
            results[file.name] = {"metadata": None, "judge": "", "mode": ""} | result
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
            raise BadInput(f"{file}: is damaged; run --stage score again") from None
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
    for row in read_rows(file.parent, file.stem):
        try:
            labels = row.get("scores") or [1 - row["preference"], row["preference"]]
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
        groups.append(Rated(row, [load_image(path) for path in row["images"]], edits, labels))
    return groups


def ordered_pairs(scores: list[float], labels: list[float]) -> list[float]:
    """Of each pair of edits that labels tell apart: 1 if the scores order them alike, 0 if not,
    0.5 if they tie. Pairs with a score that is NaN are left out."""
    outcomes = []
    for (a, x), (b, y) in itertools.combinations(zip(scores, labels, strict=True), 2):
        if abs(a - b) < 1e-6 and x != y:
            outcomes.append(0.5)
        elif abs(a - b) >= 1e-6 and x != y:
            outcomes.append(1.0 if (a > b) == (x > y) else 0.0)
    return outcomes


@dataclass(frozen=True)
class AgreeSettings(JudgeSettings):
    """A judge and what to compare."""

    strategies: list[str] = setting(["logits"], f"To compare, of {', '.join(STRATEGIES)}.")

    def __post_init__(self):
        super().__post_init__()
        for name in self.strategies:
            if name not in STRATEGIES:
                known = ", ".join(STRATEGIES)
                raise BadInput(f"--strategies {name}: no strategy; take of {known}")


def agree(words: list[str]) -> None:
    """Prints, for each strategy, how far the judge orders edits as people do."""
    if not words or not words[0].endswith(".jsonl"):
        raise BadInput("agree: names no file; write evaluate.py agree FILE.jsonl --judge ...")
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
            print(f"{strategy:12} {agreement(judge, groups)}")
        except BadInput as error:
            print(f"{strategy:12} {error}")
    judge.close()


def agreement(judge: Judge, groups: list[Rated]) -> str:
    """A line of agree's table."""
    start = time.perf_counter()
    results = [judge.score(group.row, group.sources, group.edits) for group in groups]
    seconds = time.perf_counter() - start
    outcomes = []
    places = []  # the group of each pair
    spreads = []
    for group, result in zip(groups, results, strict=True):
        pairs = ordered_pairs(result.score.tolist(), group.labels)
        outcomes += pairs
        places += [str(id(group))] * len(pairs)
        spreads.append(result.score[~result.score.isnan()].std(unbiased=False))
    _, draws = bootstrap(outcomes, ["all"] * len(outcomes), places)
    right = shown(interval(outcomes, draws), ".1%")
    ties = outcomes.count(0.5) / max(len(outcomes), 1)
    scores = torch.cat([result.score for result in results])  # (all edits,)
    labels = torch.cat([torch.tensor(group.labels) for group in groups])
    known = ~scores.isnan()
    order = spearman(scores[known], labels[known])
    spread = torch.stack(spreads).nanmean()
    mass = torch.cat([result.mass for result in results]).nanmean()
    failed = 1 - known.float().mean()
    pace = seconds / len(scores)
    return f"{right:26} {order:8.3f} {ties:6.1%} {spread:7.3f} {mass:6.3f} {failed:6.1%} {pace:.4f}"


# ---------------------------------------------------------------- the command


def claim(settings: Settings) -> Settings:
    """Settings with what --out was begun with; BadInput when edits of another making lie there."""
    file = Path(settings.out, "config.json")
    if file.is_file():
        before = read_json(file, "give another --out")
        if not before.keys() >= {*DRAWN, "baselines"}:
            raise BadInput(f"{settings.out}: belongs to another program; give another --out")
        begun = {key: before[key] for key in DRAWN}
        if settings.stage in ("judge", "score"):
            baselines = sorted({*before["baselines"], *settings.baselines})
            return replace(settings, baselines=baselines, **begun)
        for key, value in begun.items():
            if value != getattr(settings, key):
                said = f"was begun with --{key} {value}, not {getattr(settings, key)}"
                raise BadInput(f"{settings.out}: {said}; give another --out")
    with whole_file(file) as part:
        part.write_text(json.dumps(asdict(settings), indent=1))
    return settings


def begin(settings: Settings, accelerator: Accelerator, stop: threading.Event) -> Job:
    """What is to be done, checked; parts of it are written into --out."""
    settings = claim(settings)
    job = Job(settings, accelerator, stop, *load_benchmark(settings))
    for flag in ("edits", "masks"):
        if getattr(settings, flag):
            check_folder(job, f"--{flag}", getattr(settings, flag))
    return job


def run_stages(settings: Settings, accelerator: Accelerator, stop: threading.Event) -> None:
    """Draws, judges and adds up. Raises Stopped on all processes when one has to stop."""
    job = None
    with ExitStack() as held:
        with together(accelerator, stop):
            if accelerator.is_main_process:  # first: it writes
                held.enter_context(locked(settings.out))
                job = begin(settings, accelerator, stop)
        with together(accelerator, stop):
            job = job or begin(settings, accelerator, stop)
        for stage, work in (("sample", draw_edits), ("judge", judge_edits)):
            with together(accelerator, stop):
                if settings.stage in ("all", stage):
                    work(job)
        if settings.stage in ("all", "score") and accelerator.is_main_process:
            results = score_calls(job)
            summary = "\n".join(describe(job.settings, result) for result in results)
            write_report(job, results, summary)
            print(summary, f"wrote {settings.out}/report.html and grid.png", sep="\n")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "no command"
    if command in ("compare", "agree"):
        return {"compare": compare, "agree": agree}[command](argv[1:])
    if command not in METRICS:
        known = f"{', '.join(METRICS)}; or compare RUN_A RUN_B, or agree FILE.jsonl"
        raise BadInput(f"{command}: say what to score: {known}")
    about = __doc__.splitlines()[0]
    settings = parse_settings(Settings, ["--benchmark", *argv], description=about)
    stop = catch_signals()
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))  # one may be done long before
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patient])
    try:
        run_stages(settings, accelerator, stop)
    except Stopped as stopped:
        if stopped.__cause__ and not isinstance(stopped.__cause__, Stopped):
            raise stopped.__cause__ from None
        if accelerator.is_main_process:
            kept = f"every finished edit and call is kept in {settings.out}"
            print(f"stopped: {kept}; the same command goes on", file=sys.stderr)
        sys.exit(1)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
