"""Scores an editor on ImgEdit-Bench, GEdit-Bench or a held-out set: draws, asks a judge, adds up.

    python evaluate.py imgedit --bench DIR --base MODEL --lora RUN/checkpoint-N --judge URL
    python evaluate.py gedit --language both ...     # the same settings
    python evaluate.py heldout --bench DATASET ...   # the test split of a dataset folder
    python evaluate.py compare RUN_A RUN_B           # the paired difference with its interval
    python evaluate.py seeds RUN RUN [RUN ...]       # mean and spread over runs, e.g. of seeds
    python evaluate.py agree TABLE --judge ...       # how far a judge orders edits as people do
    python evaluate.py curves RUN [RUN ...]          # training runs as curves.png (matplotlib)

Three stages, each resumable, each alone with --stage: `sample` draws the edits in the benchmark's
own layout, `judge` appends every finished call as a JSON line, `score` adds those up. `accelerate
launch` splits the rows of the first two over processes. A *subject* is one source of edits: trained
(the model with --lora), base (without), edits (a folder, made by anything), source (nothing done).

Nothing stale counts: an edit is drawn again when its weights, source, prompt or settings are not
those whose hash is written in its PNG file; an answer counts for the very edit, sources, text and
judge that it was given for, and of several the newest.

Departures from the benchmarks' own scripts, the first three undone by --mode official:
1. Every sensible spelling of a score is understood, and its range is checked.
2. An answer without a score, a failed call and a missing edit count at the floor, 1 in ImgEdit and
   0 elsewhere.
3. Means are not rounded on the way.
4. Edits are stored as PNG. GEdit's are still shown at the size and through the JPEG of its scorer
   (at the raw picture's size in a copy without `input_image`), but the judge answers at temperature
   0, unless its server takes none or --judge_draws is over 1.
5. PSNR, SSIM and, where it is installed, LPIPS to the source stand beside the scores of every
   subject but the source itself, and in strict reading the scores that a benchmark's are made of.
6. With --repeats a row counts with the mean of its answers, and as answered if all can be read.
Never reproduced, in no mode: random scores for answers that cannot be read, endless retries, rows
that count twice, and scores out of thoughts (<think>) or out of a reply cut by its token limit.
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
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jinja2 import Template
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from data_prep import (
    BadInput,
    CheckedSettings,
    Stopped,
    append_json_line,
    bootstrap,
    catch_signals,
    changed,
    folder_of,
    from_main,
    inside,
    load_image,
    locked,
    one_line,
    oracle,
    parse_settings,
    picture_file,
    picture_grid,
    read_json,
    read_json_lines,
    read_records,
    read_rows,
    run_script,
    say_once,
    setting,
    start_processes,
    together,
    whole_file,
    write_json,
)
from reward_mllm import (
    TOY,
    JudgeFailure,
    JudgeSettings,
    load_judge,
    pixels_of,
    plain_terms,
    requirement_of,
)
from sample import load_to_draw, policy, rollout

METRICS = {  # by benchmark: the main metric, its parts, then the judge's single scores in order
    "imgedit": ("score", "adherence", "quality", "preservation"),
    "gedit": ("O", "SC", "PQ", "success", "overediting", "naturalness", "artifacts"),
    "heldout": ("judge",),
}
# of each benchmark the questions on an edit, and how many scores the answer holds
CALLS = {"imgedit": {"edit": 3}, "gedit": {"SC": 2, "PQ": 2}, "heldout": {"judge": 1}}
# measured without a judge: oracle and success (toy rows only, by the oracle), and how much of the
# source an edit keeps: psnr, ssim and, if it is installed, lpips
SEEN = ("oracle", "success", "psnr", "ssim", "lpips")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")  # of pictures, ours first
MADE_FROM = "made from"  # the key of the PNG text with the hash of what an edit was drawn from
DRAWN = {"trained": "new", "base": "base"}  # subjects that we draw: the editor's policy for each
UNROUNDED = 99  # digits for round(): so many that it leaves a value as it is
FIX = "take the benchmark's own"
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
    repeats: int = setting(1, "How often each question is asked.", at_least=1, at_most=1000)
    ask_again: Literal["failed", "unread"] = setting(
        "failed", "What a next run asks again: failed calls, or replies without scores, too."
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
        if not {"source", "base"}.issuperset(self.baselines):
            raise BadInput(f"--baselines {' '.join(self.baselines)}: there are source and base")


# Settings that may differ between runs into one --out. No other may: edits and calls of two
# models would pass for those of one.
HARMLESS = """out stage mode baselines masks repeats ask_again reply_tokens trust_remote_code judge
judge_model judge_strategy judge_order judge_aspects judge_prompt judge_think judge_reply
judge_range judge_draws judge_check judge_device judge_batch judge_in_flight judge_timeout
judge_patience"""
JUDGE_FLAGS = (  # what a held-out score depends on; a benchmark's prompts are its own
    "judge_strategy",
    "judge_think",
    "judge_aspects",
    "judge_reply",
    "judge_range",
    "judge_order",
    "judge_draws",
)


def _hash_of(value):
    """12 hex digits of the sha256 of bytes, or of any other value's JSON."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def _read_json(file, fix):
    """The object in a JSON file; BadInput with the fix for anything else."""
    try:
        return read_json(file)
    except (OSError, BadInput) as error:
        raise BadInput(f"{one_line(error).partition(';')[0]}; {fix}") from None


# ---------------------------------------------------------------- reading an answer

# A labelled score is a start, LABEL, SEPARATOR, value and VALUE_END: "2) Detail Fidelity: 4.5,".
LINE_START = r"(?m:^)"
PHRASE_START = r"(?m:^|[,;{(|.。、])"  # or after punctuation, for several scores in one line
LABEL = r"\W*?(?:\d+[.)]\s*)?([^\W\d][\w &/()'’-]{1,60}?)"  # bullets, perhaps "2)", then words
SEPARATOR = r"(?:\s*[:=|]+|\s+[-–—]|\s+is\b)\s*"
NUMBER = r"(\d+(?:\.\d+)?)(?!\.?\d)"  # whole: not the 4.5 of 4.56
VALUE_END = r"(?=\s*(?:[,;.|(){}。、\n]|$)|\s+[-–—]\s)"  # else "4 objects" or "3-4" would be scores
# a line with exactly one ": " and an integer behind it; (?!: ) keeps out an earlier ": "
OFFICIAL_LINE = r"(?m)^(?:(?!: ).)*: (\d{1,9})\s*$"
# labels such as "overall" or "reason": their number must not stand in for a missing score
UNWANTED = r"(?i)reason|overall|average|total|\bsum\b|final|expla|analysis|rationale"


def _final_answer(reply):
    """A reply without thoughts and marks around the answer; "" where the thoughts never end."""
    text = reply.rpartition("</think>")[2]
    if "<think" in text:
        return ""
    text = unicodedata.normalize("NFKC", text)  # full-width digits, colons ...
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"</?answer>|<\|(?:begin|end)_of_box\|>", "\n", text)


def labels_of(prompt: str) -> list[str]:
    """The three labels that a prompt of ImgEdit's judge asks for, lower case; [] where it does not
    ask in ImgEdit's way."""
    # lines such as "Prompt Compliance: A number from 1 to 5."
    found = re.findall(r"(?m)^\W*([^\W\d][^:\n]*?)\W*:\W*[Aa] number\b", prompt)
    return [_plain_label(label) for label in found] if len(found) == 3 else []


def _plain_label(label):
    """A label in the one spelling in which labels are compared."""
    return label.strip().lower().replace("_", " ").replace("&", "and")


def parse_imgedit(reply: str, mode: str = "strict", labels: list = ()) -> list[float] | None:
    """The list of scores in an answer of ImgEdit's judge; None where it cannot be read.

    strict: exactly three, from 1 to 5, differently labelled; with `labels` (of labels_of) under
    those. official: of each line with one ": " the whole number behind it, in any number and of any
    size, as ImgEdit's own script splits lines.
    """
    if mode == "official":
        lines = "\n".join(reply.splitlines())  # every kind of line end as \n, which $ needs
        return list(map(int, re.findall(OFFICIAL_LINE, lines))) or None
    text = _final_answer(reply)
    # Lines first: the reasoning may hold "..., seams: 2". Only then several scores in one line.
    scores = _labelled_scores(text, LINE_START, 5, labels)
    if len(scores) != 3:
        scores = _labelled_scores(text, PHRASE_START, 5, labels)
    return _if_valid(scores, 3, 1, 5)


def _if_valid(scores, count, low, high):
    """The scores; None unless there are `count`, all within [low, high] (NaN is not)."""
    valid = len(scores) == count and all(low <= score <= high for score in scores)
    return scores if valid else None


def _labelled_scores(text, start, top, labels=()):
    """The values of `label: 4`, `**Label** - 4/5`, `| label | [4.0] |` ..., the last of each label.

    start: LINE_START or PHRASE_START; top: the best score, the only one that may stand behind a
    slash. With `labels` only the values of labels that contain one of those.
    """
    # 4, 4/5, 4 out of 5, 4 points; a "4/10" on a scale to 5 is no value
    value = NUMBER + rf"\s*(?:/\s*{top}(?!\d)|(?:out )?of {top}(?!\d))?\s*(?:points?|stars?|分)?"
    text = re.sub(r"[*`\"“”]", "", text)  # emphasis and quotes
    text = re.sub(rf"([:=|]\s*)[\[【「]\s*({value})\s*[\]】」]", r"\1\2", text)  # label: [4]
    text += "\n" + _columns_as_lines(text)
    # a value alone on the line below its label
    text = re.sub(rf"(?m)^([^\n\d:=|]{{2,60}}?)\s*\n\s*({value})\s*$", r"\1: \2", text)
    found = {}  # by label: a later value is the judge's second thought
    for label, number in re.findall(start + LABEL + SEPARATOR + value + VALUE_END, text):
        name = _plain_label(label)
        wanted = next((known for known in labels if known in name), "")
        # without known labels every label counts that is not plainly something else
        if wanted or not (labels or re.search(UNWANTED, name)):
            found[wanted or name] = float(number)
    # in the order of the prompt, or else of the answer
    return [found[name] for name in labels or found if name in found]


def _columns_as_lines(text):
    """A table of two rows, labels above values, as lines `label | value`; "" for any other."""
    rows = re.findall(r"(?m)^(?=.*\|)(?=.*\w).*$", text)  # lines with | and a word: not |---|---|
    if len(rows) != 2:
        return ""
    # zip(*rows) turns the table: each column becomes (label, value)
    columns = zip(*(row.strip(" |").split("|") for row in rows), strict=False)
    return "\n".join(map(" | ".join, columns))


def parse_gedit(reply: str, mode: str = "strict") -> list[float] | None:
    """The list of scores in an answer of GEdit's judge (VIEScore); None where it cannot be read.

    strict: exactly two, from 0 to 10, out of JSON or what nearly is, or labelled. official: what
    VIEScore's parser reads, in any number and of any size, but None where it would draw a random
    score.
    """
    if mode == "official":
        return _official_gedit(reply)
    text = _final_answer(reply)
    found = _listed_scores(text)
    if found:
        scores = list(map(_score_of_ten, re.split("[,、]", found[-1])))  # the judge's last word
    else:
        scores = _labelled_scores(text, PHRASE_START, 10)
    return _if_valid(scores, 2, 0, 10)


def _listed_scores(text):
    """The inside of every bracket behind `score`, or else of a text that is nothing but scores. By
    regex, as quotes in the reasoning or a cut end may have broken the JSON."""
    brackets = r"\s*[:=]\s*[\"']?[\[({【「]([^\])}】」]*)[\])}】」]"
    return (
        # the key of an object; in a text within JSON there would be a backslash before the quote
        re.findall(r"(?i)(?<!\\)[\"']scores?[\"']" + brackets, text)
        or re.findall(r"(?i)scores?[\"']?" + brackets, text)  # score: [8, 7], scores = (8, 7) ...
        # nothing but 8, 7
        or re.findall(r"^\s*[\[【「]?((?:[\d./\s]+[,、])+[\d./\s]+)[\]】」]?\s*$", text)
    )


def _score_of_ten(value):
    """8, "8", "8/10" or "success": 8 as a number; NaN for anything else."""
    key = r"\s*(?:[\"'][^\"']*[\"']\s*:)?\s*"  # the "success": of an object, if there is one
    number = re.fullmatch(key + r"[\"']?(\d+(?:\.\d+)?)(?:\s*/\s*10)?\s*分?[\"']?\s*", value)
    return float(number[1]) if number else math.nan


def _official_gedit(reply):
    """What VIEScore's parser reads: JSON between its delimiters or the outer braces; or else two
    numbers in brackets, or nothing but a number from 0 to 10. None where it draws at random."""
    fenced = reply.split("||V^=^V||")  # the delimiters that VIEScore's prompts ask for
    # [8, 7] among other words, as long as these hold no bracket; or one number alone
    bare = re.fullmatch(r"[^\[]*(\[\d+, ?\d+\])[^\]]*|\s*(\d|10)\s*", reply)
    if len(fenced) == 3:
        text = fenced[1]
    elif "{" in reply and "}" in reply:
        text = reply[reply.find("{") : reply.rfind("}") + 1]
    elif bare:
        text = f'{{"score": {bare[1] or bare[2]}}}'
    else:
        return None
    text = text.strip().replace("\n", "")  # JSON has no line ends within a text
    return _official_scores(text) or _official_scores(_repaired(text))


def _official_scores(text):
    """`score` of a JSON text, a list of numbers or one, as a list; None when it is neither, or when
    the least, which is what counts, is not finite."""
    try:
        scores = json.loads(text)["score"]
        if not isinstance(scores, list):
            scores = [scores]
        return scores if math.isfinite(min(scores)) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _repaired(text):
    """Quotes round bare keys and values, brackets round lone numbers, as VIEScore repairs JSON."""
    text = re.sub(r"(\w+)(?=:)", r'"\1"', text)  # {score: 8} -> {"score": 8}
    text = re.sub(r'("[^\n]*?"):\s*([^\n]*?)\s*([,}])', r'\1: "\2"\3', text)  # -> {"score": "8"}
    return re.sub(r': "(-?\d+(?:\.\d+)?)"(?=[,}])', r": [\1]", text)  # -> {"score": [8]}


# ---------------------------------------------------------------- adding up


def score(benchmark: str, records: Rows, mode: str = "strict") -> dict:
    """A benchmark's result from the judge's calls.

    Returns {"rows": one dict for each row of the benchmark, "groups": {"all" or a language: what
    tabulate gives}}. A row's dict is its first record with METRICS, `answered`, `said` (text) and
    `repeats`, the main metric in each round of questions; METRICS are the means over the rounds.

    records: the calls, sorted by row, then by round; one record for each of CALLS in each round, in
    their order. A record has `row`, `task`, `source`, `call` (of CALLS), `repeat` (the number of
    its round), and `reply` or `failure`; it may have SEEN, ImgEdit's `labels`, GEdit's `language`
    and `intersection`. In a held-out set `scores` is [the judge's own score].

    strict: a metric without a value counts at the floor, ImgEdit's 1 or else 0. official: a row
    that lacks one has none (NaN), and ImgEdit's rows and tasks are rounded to 2 digits.
    """
    digits = 2 if (benchmark, mode) == ("imgedit", "official") else UNROUNDED
    by_row = itertools.groupby(records, itemgetter("row"))
    rows = [_scored_row(benchmark, list(calls), mode, digits) for _, calls in by_row]
    return {"rows": rows, "groups": _grouped(rows, METRICS[benchmark], digits)}


def _scored_row(benchmark, calls, mode, digits):
    """A row of `score` from all of its calls."""
    main = METRICS[benchmark][0]
    floor = 1.0 if benchmark == "imgedit" else 0.0  # what counts in place of no score
    by_round = itertools.groupby(calls, itemgetter("repeat"))
    rounds = [_measured(benchmark, list(asked), mode) for _, asked in by_round]
    repeats = [found[main] for found in rounds]
    said = [record.get("reply") or record.get("failure", "") for record in calls]
    is_answered = not any(map(math.isnan, repeats))
    row = calls[0] | {"repeats": repeats, "said": "\n".join(said), "answered": is_answered}
    row[main] = math.nan
    if is_answered or mode == "strict":
        for name in rounds[0]:
            values = [found[name] for found in rounds]
            row[name] = _average(np.nan_to_num(values, nan=floor), digits)
    return row


def _scores_in(benchmark, record, mode="strict"):
    """The list of scores in the answer to one call, None where there are none."""
    reply = record.get("reply", "")
    if benchmark == "imgedit":
        return parse_imgedit(reply, mode, record.get("labels", ()))
    if benchmark == "gedit":
        return parse_gedit(reply, mode)
    return record.get("scores")  # the judge's own


def _measured(benchmark, calls, mode):
    """{metric: its value in one round of calls about a row}, NaN where there is none."""
    scores = []
    for call in calls:
        unread = [math.nan] * CALLS[benchmark][call["call"]]
        scores.append(_scores_in(benchmark, call, mode) or unread)
    values = [_average(scores[0])]
    if benchmark == "gedit":
        sc, pq = map(min, scores)
        # false for NaN, and for what official reading lets through: a negative score
        overall = math.sqrt(sc * pq) if sc * pq >= 0 else math.nan
        values = [overall, sc, pq]
    if mode == "strict":  # official reading may find any number of scores, which have no names
        values += itertools.chain(*scores)
    return dict(zip(METRICS[benchmark], values, strict=False))


def _average(values, digits=UNROUNDED):
    """The mean of a sequence that is not empty, rounded to `digits`."""
    return round(float(sum(values) / len(values)), digits)


def _grouped(rows, metrics, digits=UNROUNDED):
    """{group: its table of metrics and SEEN}. GEdit's groups are each language and its intersection
    subset; all other rows are in one group, "all"."""
    groups = defaultdict(list)
    for row in rows:
        name = row.get("language", "all")
        groups[name].append(row)
        if row.get("intersection"):
            groups[f"{name} intersection"].append(row)
    return {name: tabulate(members, (*metrics, *SEEN), digits) for name, members in groups.items()}


def tabulate(rows: Rows, metrics: tuple, digits: int = UNROUNDED) -> dict:
    """Means with 95 % intervals.

    Returns {"rows": how many, "answered": how many, metric: {"macro": [mean, low, high], "micro":
    ..., task: ...}}. macro is the mean of the tasks' means, micro that of the rows. [None] * 3
    stands where no row has a value, [mean, None, None] where there is but one source picture.

    rows: dicts with `task`, `source`, `answered` and the metrics, NaN or none where there is no
    value; of metrics that no row has only the first is shown. digits: of the tasks' means.
    Intervals are bootstrapped over source pictures, each with all its rows: edits of one picture
    are alike.
    """
    table = {"rows": len(rows), "answered": sum(row["answered"] for row in rows)}
    for metric in metrics:
        known = [row for row in rows if not math.isnan(row.get(metric, math.nan))]
        if not known and metric != metrics[0]:
            continue
        values = np.array([row[metric] for row in known])
        tasks = np.array([row["task"] for row in known])
        sources = [row["source"] for row in known]
        names, draws = bootstrap(values, tasks, sources)  # (D draws, T)
        # the same pictures are drawn, as bootstrap always begins with one seed
        _, overall = bootstrap(values, ["all"] * len(known), sources)  # (D, 1)
        # a draw may hold no picture of a rare task, NaN: its mean is over the tasks that it holds
        macro = np.ma.masked_invalid(draws).mean(1)  # (D,)
        by_task = {}
        for name, of_task in zip(names, draws.T, strict=True):  # (D,) of each task
            by_task[name] = _interval(values[tasks == name], of_task, digits)
        means = [mean for mean, *_ in by_task.values()]
        table[metric] = {
            "macro": _interval(means, macro),
            "micro": _interval(values, overall),
            **by_task,
        }
    return table


def _interval(values, draws, digits=UNROUNDED):
    """[mean of the values, 2.5 % and 97.5 % quantile of the draws (D,) or (D, 1)]; None in place of
    a mean of nothing, and of both quantiles when all draws are NaN."""
    draws = np.ma.masked_invalid(draws).compressed()
    ends = np.quantile(draws, (0.025, 0.975)).tolist() if len(draws) else [None, None]
    return [_average(values, digits) if len(values) else None, *ends]


def paired_differences(a: Rows, b: Rows, metrics: tuple) -> dict[str, dict]:
    """{group: the table of a - b}, for two results of the same rows in one order.

    Each row's difference is one value, so that a drawn picture brings both of its edits: what is
    hard about it cancels. ValueError when one has more rows.
    """
    pairs = []
    for row, other in zip(a, b, strict=True):
        pair = row | {"answered": row["answered"] and other["answered"]}
        for metric in (*metrics, *SEEN):
            pair[metric] = row.get(metric, math.nan) - other.get(metric, math.nan)
        pairs.append(pair)
    return _grouped(pairs, metrics)


def _verdict(difference, a, b, psnr=None):
    """In words: the difference a - b [mean, low, high] of two subjects (or runs) and, if given,
    that of their PSNR in dB, as a gain may come at the cost of the source picture."""
    mean, low, high = difference
    if low is None:  # of one picture nothing can be resampled
        return f"too few source pictures to tell {a} from {b}"
    words = f"no difference between {a} and {b} can be told"
    if low > 0 or high < 0:
        words = f"{a} is {'better' if mean > 0 else 'worse'} than {b}"
    words += f": {mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
    if psnr and psnr[1] is not None:
        mean, low, high = psnr
        words += (
            f"; {a} keeps {abs(mean):.1f} dB {'more' if mean > 0 else 'less'} of the source "
            f"({low:+.1f} to {high:+.1f} dB)"
        )
    return words


# ---------------------------------------------------------------- benchmarks


def _read_heldout(folder, settings):
    """The test split of a dataset folder, which has no prompts: the judge brings its own."""
    rows = read_rows(folder, "test")
    for row in rows:
        row.setdefault("task", "all")
        # an edit is called by its row's id
        row.update(row=row["id"], files=[row["id"]])
    return rows, {}


def _read_imgedit(folder, settings):
    """ImgEdit-Bench, single turn: a file {key: {id, prompt, edit_type}}, where id is the picture's
    path, and a file {edit_type: the judge's prompt}. Its archive and its repository name both
    differently."""
    file = _find_file((folder, folder / "singleturn"), ("singleturn.json", "basic_edit.json"))
    folders = (file.parent, file.parent.parent)
    prompt_file = _find_file(folders, ("judge_prompt.json", "prompts.json"))
    texts = _read_json(prompt_file, FIX)
    # two versions circulate, one of which says alter for adjust
    prompts = {kind.replace("alter", "adjust"): text for kind, text in texts.items()}
    rows = []
    for key, entry in _read_json(file, FIX).items():
        where = f"{file}: row {key}"
        _check_entry(entry, ("id", "prompt", "edit_type"), where)
        task = entry["edit_type"].replace("alter", "adjust")
        _check_entry(prompts, (task,), f"{prompt_file} (for row {key})")
        rows.append(
            {
                "row": key,
                "prompt": entry["prompt"],
                "images": [inside(file.parent, entry["id"], where)],
                "task": task,
                "files": [key],
                "labels": labels_of(prompts[task]),
            }
        )
    return rows, prompts


def _check_entry(entry, keys, where):
    """BadInput for an entry of a benchmark that has not a text under each of these keys."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
        raise BadInput(f"{where} lacks {' or '.join(keys)}; {FIX} metadata")


def _read_gedit(folder, settings):
    """GEdit-Bench: parquet or arrow files, or metadata.jsonl with `file_name` beside pictures; and
    vie_prompts.py. The raw picture is edited, the resized one is shown to the judge; either stands
    in for the other."""
    folders = (folder, folder / "viescore", folder.parent / "viescore")
    prompts = _read_vie_prompts(_find_file(folders, ("vie_prompts.py",)))
    listed = folder / "metadata.jsonl"
    rows = []
    times = Counter()  # how often each place has come so far
    for where, entry in read_records(listed if listed.is_file() else folder):
        _check_entry(entry, ("key", "task_type", "instruction_language", "instruction"), where)
        if settings.language not in (entry["instruction_language"], "both"):
            continue
        place = f"{entry['task_type']}/{entry['instruction_language']}/{entry['key']}"
        times[place] += 1
        # a few keys repeat, for rows of their own
        name = place if times[place] == 1 else f"{place}-{times[place]}"
        short = f"{entry['task_type']}/{entry['key']}"  # what the method's authors write
        resized = entry.get("input_image")
        raw = entry.get("input_image_raw") or resized or entry.get("file_name")
        rows.append(
            {
                "row": name,
                "prompt": entry["instruction"],
                "images": [_stored(raw, folder, where, settings.out)],
                "shown": [_stored(resized or raw, folder, where, settings.out)],
                "task": entry["task_type"],
                "files": [f"fullset/{name}", f"fullset/{place}", name, place, short],
                "language": entry["instruction_language"],
                "intersection": entry.get("Intersection_exist"),
            }
        )
    return rows, prompts


def _stored(cell, folder, where, out):
    """The path in `out` of a table's picture, which is written there under its content's hash."""
    content = picture_file(cell, folder, where).getvalue()
    path = Path(f"{out}/sources/{_hash_of(content)}.png")
    if not path.is_file():
        with whole_file(path) as part:
            part.write_bytes(content)
    return str(path)


VIE_TEXTS = {  # the constants of vie_prompts.py that VIEScore joins for each call
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
        # a constant that is not there is None, which join refuses: TypeError
        return {call: "\n".join(map(texts.get, names)) for call, names in VIE_TEXTS.items()}
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        raise BadInput(
            f"{file}: has not the texts of VIEScore ({error}); take GEdit-Bench's vie_prompts.py"
        ) from None


def _find_file(folders, names):
    """The first of `names` in the first of `folders` that has one; BadInput when none has."""
    for folder, name in itertools.product(folders, names):
        if (folder / name).is_file():
            return folder / name
    raise BadInput(f"{folders[0]}: holds no {' or '.join(names)}; name the benchmark in --bench")


READERS = {"imgedit": _read_imgedit, "gedit": _read_gedit, "heldout": _read_heldout}


def load_benchmark(settings: Settings) -> tuple[Rows, dict]:
    """(rows, the judge's prompts by task for ImgEdit, by call for GEdit, none for a held-out set).

    rows: dicts with `row` (its name), `prompt`, `images` (paths of its sources), `shown` (those as
    the judge sees them), `task`, `source` (a hash, the same for all rows on one picture), `files`
    (where its edit may lie in a subject's folder, without ending; the first is ours), `hash` (of
    name, prompt and pictures), ImgEdit's `labels` and GEdit's `language`.
    BadInput when a file or picture is missing or not as the benchmark has it, and when --edits or
    --masks holds nothing for any row.
    """
    folder = Path(settings.bench).resolve()
    rows, prompts = READERS[settings.benchmark](folder, settings)
    if not rows:
        raise BadInput(
            f"{folder}: holds no rows in --language {settings.language}; name the benchmark's "
            "folder, with parquet, arrow or metadata.jsonl for GEdit-Bench"
        )
    for row in rows:
        # only the check: a name may hold ".."
        inside(folder, f"{row['row']}.png", f"{folder}: row {row['row']}")
        row.setdefault("shown", row["images"])
        hashes = []
        for path in map(Path, row["images"] + row["shown"]):
            if not path.is_file():
                raise BadInput(f"{path}: the picture of row {row['row']} is not there; add it")
            hashes.append(_hash_of(path.read_bytes()))
        row["source"] = hashes[0]
        row["hash"] = _hash_of([row["row"], row["prompt"], hashes])
    for folder in filter(None, (settings.edits, settings.masks)):
        # a wrong folder would read as a bad editor
        if not any(_find_picture(folder, row["files"]) for row in rows):
            raise BadInput(
                f"{folder}: has nothing for any row, no {rows[0]['files'][0]}.png; name a folder "
                "in the benchmark's layout"
            )
    return rows, prompts


# ---------------------------------------------------------------- one evaluation


@dataclass(frozen=True)
class Job:
    """What an evaluation works on."""

    settings: Settings
    accelerator: Accelerator
    stop: threading.Event  # set by a signal
    out: Path  # the folder of edits, calls, scores and report
    rows: Rows  # as load_benchmark tells
    mine: Rows  # this process's share of them
    prompts: dict[str, str]  # of the judge, by task or by call

    def each(self, work, name: str) -> Iterator:
        """One after the other, with a progress bar of one process; Stopped once a signal came."""
        for part in tqdm(work, name, disable=not self.accelerator.is_main_process):
            if self.stop.is_set():
                raise Stopped
            yield part


def _subjects_of(settings):
    """The names of the subjects: first the one in question (edits before trained before base), then
    the baselines. With none set it is base, so that the missing --base is told."""
    made_by = {"edits": settings.edits, "trained": settings.lora, "base": settings.base}
    given = [name for name in made_by if made_by[name]]
    names = [*given[:1], *settings.baselines] or ["base"]
    return list(dict.fromkeys(names))  # base may be both


def _find_picture(folder, stems):
    """The first of `stems` (paths without ending) that is a picture in a folder; None without."""
    paths = (Path(f"{folder}/{stem}{ending}") for stem, ending in itertools.product(stems, ENDINGS))
    return next(filter(Path.is_file, paths), None)


def _find_edit(job, row, subject):
    """The path of a subject's edit of a row; None where there is none."""
    if subject == "source":
        return Path(row["images"][0])
    if subject == "edits":
        return _find_picture(job.settings.edits, row["files"])
    return _find_picture(job.out / subject, row["files"][:1])  # only what we wrote


# ---------------------------------------------------------------- sample: the edits


def _weights_hash(place):
    """A hash of the first megabyte of each file of a model or LoRA, as all of them would take
    minutes; of a hub id, that of its name."""
    known = b""
    # `place` itself first: it may be a file, of which rglob finds nothing
    for file in [Path(place), *sorted(Path(place).rglob("*"))]:
        if file.is_file():
            with open(file, "rb") as stored:
                known += stored.read(2**20)
    return _hash_of(known or place)


def _is_current(path, recipe):
    """Whether a drawn edit is there, whole and of this recipe."""
    # not there, cut, broken: what Pillow raises
    with suppress(OSError, ValueError, SyntaxError), Image.open(path) as image:
        image.load()
        return image.info.get(MADE_FROM) == recipe
    return False


def draw_edits(job: Job) -> None:
    """Draws this process's missing and stale edits as PNG into --out/SUBJECT. BadInput when the
    editor cannot be loaded or cannot take a row, Stopped after a signal.

    Every row has the same seed and its own generator: an edit does not depend on which others are
    drawn before it.
    """
    settings = job.settings
    editor = None
    # Several processes on a CPU have fewer threads each, which add up in another order: a grey
    # level may then differ from what one process draws.
    torch.set_num_threads(1)
    for subject in filter(DRAWN.get, _subjects_of(settings)):
        made_from = [
            _weights_hash(settings.base),
            settings.steps,
            settings.seed,
            settings.guidance,
            settings.resolution,
        ]
        if subject == "trained":
            made_from.append(_weights_hash(settings.lora))
        for row in job.each(job.mine, f"{subject} edits"):
            path = job.out / subject / f"{row['files'][0]}.png"
            recipe = _hash_of([made_from, row["hash"]])
            if _is_current(path, recipe):
                continue
            editor = editor or load_to_draw(settings)
            with policy(editor, DRAWN[subject]):
                group = rollout(
                    editor,
                    list(map(load_image, row["images"])),
                    row["prompt"],
                    [torch.Generator().manual_seed(settings.seed)],
                    settings.steps,
                    settings.guidance,
                    evaluation=True,
                )
            info = PngInfo()
            info.add_text(MADE_FROM, recipe)
            with whole_file(path) as part:
                group.images[0].save(part, pnginfo=info)


# ---------------------------------------------------------------- judge: the calls


def _find_calls(job, rows):
    """The questions on each edit of these rows, missing ones too, subject by subject: a row each,
    with `subject`, `call` (of CALLS), `repeat`, the path of the `edit` ("" for none) and `key`, a
    hash of what the answer is for."""
    calls = []
    for subject in _subjects_of(job.settings):
        for row in rows:
            path = _find_edit(job, row, subject)
            edit_hash = path and _hash_of(path.read_bytes())
            names = CALLS[job.settings.benchmark]
            for repeat, name in itertools.product(range(job.settings.repeats), names):
                call = row | {
                    "subject": subject,
                    "edit": str(path or ""),
                    "call": name,
                    "repeat": repeat,
                }
                call["key"] = _hash_of([name, repeat, _question(job, call), row["hash"], edit_hash])
                calls.append(call)
    return calls


def _question(job, call):
    """The prompt for the judge with the instruction filled in. A held-out set's judge words its
    own; this text then only enters the call's key, so that a changed instruction is asked anew."""
    if job.settings.benchmark == "heldout":
        return f"{call['prompt']}\n{requirement_of(call)}\n{call.get('checklist')}"
    text = job.prompts.get(call["call"]) or job.prompts[call["task"]]
    # A function, as a backslash in a replacement text has a meaning; one pass for both names, as an
    # instruction may itself hold the other.
    return re.sub("<edit_prompt>|<instruction>", lambda place: call["prompt"], text)


def _read_answers(job, label):
    """{key: its newest record} of all processes' files of a judge; a line that cannot be
    read, such as one cut short by a crash, does not count."""
    records = []
    faults = []
    for file in job.out.glob(f"calls-{label}-*.jsonl"):
        for _, record in read_json_lines(file, faults):
            if isinstance(record.get("time"), float):
                records.append(record)
    if faults:
        say_once(f"warning: {len(faults)} calls do not count, such as {faults[0]}", sys.stderr)
    records.sort(key=itemgetter("time"))  # in a dict the last of a key stays
    return {str(record.get("key")): record for record in records}


def _is_trained_by(settings):
    """Whether the LoRA's run had this judge for its reward."""
    run = Path(settings.lora).parent / "config.json"  # of RUN/checkpoint-N
    if not settings.lora or not run.is_file():
        return False
    return _read_json(run, "take a run's own folder").get("judge") == settings.judge


def judge_edits(job: Job) -> None:
    """Asks the judge what has no answer yet, several calls at a time, and appends each to
    calls-LABEL-PROCESS.jsonl as it comes. Failures are asked again in the next run.

    BadInput when the judge cannot be loaded.
    """
    settings = job.settings
    judge = load_judge(settings, stop=job.stop)
    if _is_trained_by(settings):
        say_once(
            f"warning: {settings.lora} was trained to please this judge; ask another one, too",
            sys.stderr,
        )
    # The label is the judge's name, fit for a file's, and a hash of how it is asked: two never mix.
    asked = job.prompts or [judge.prompts, *(getattr(settings, name) for name in JUDGE_FLAGS)]
    name = re.sub(r"[^\w.]+", "-", judge.name).strip("-")
    label = f"{name}-{_hash_of([judge.name, asked])}"
    answers = _read_answers(job, label)  # of every process: their number may have changed
    calls = _find_calls(job, job.mine)
    todo = [call for call in calls if _is_asked(settings, _record(call, answers))]
    file = job.out / f"calls-{label}-{job.accelerator.process_index}.jsonl"
    # So many calls at once for each server (--judge may name several, with commas); threads
    # suffice, as a call only waits.
    pool = ThreadPoolExecutor(settings.judge_in_flight * (1 + settings.judge.count(",")))
    futures = [pool.submit(_answer, job, judge, call) for call in todo]
    try:
        # not job.each: after a stop, too, what is finished is kept
        failures = []
        finished = as_completed(futures)
        is_main = job.accelerator.is_main_process
        for future in tqdm(finished, "judge", len(todo), disable=not is_main):
            record = future.result()
            if job.stop.is_set() and "failure" in record:
                continue  # given up because of the stop, no failure of the judge
            date = time.strftime("%Y-%m-%d %H:%M:%S %z")
            append_json_line(file, record | {"time": time.time(), "date": date})
            failures.append(record.get("failure"))
            if len(failures) == 8 and all(failures):
                raise BadInput(
                    f"{settings.judge}: its first 8 calls all failed ({failures[-1]}); see to the "
                    "judge, which must take pictures, and start again"
                )
    finally:
        pool.shutdown(cancel_futures=True)
        judge.close()


def _record(call, answers):
    """A call with its answer, or with `failure` where it has none."""
    unanswered = {"failure": "not judged" if call["edit"] else "no edit"}
    # `call` last: an old record may tell another place of the same edit
    return answers.get(call["key"], unanswered) | call


def _is_asked(settings, record):
    """Whether a call is to be made: there is an edit, and no answer, or none that counts."""
    is_unread = settings.ask_again == "unread" and not _scores_in(settings.benchmark, record)
    return record["edit"] and (is_unread or "failure" in record)


def _answer(job, judge, call):
    """The record of a call: its answer, or the cause of its failure, and what a server says of
    either: `model`, `finish_reason` and `usage` in tokens."""
    record = call
    try:
        if job.stop.is_set():
            raise JudgeFailure("stopped")
        shown = list(map(load_image, [*call["shown"], call["edit"]]))
        if job.settings.benchmark == "heldout":
            scores = judge.score(call, shown[:-1], shown[-1:])
            for facts in scores.facts:  # of the one edit, where a server was asked
                record = call | facts
            if scores.score.isnan():
                raise JudgeFailure("".join(scores.causes) or "no score")
            return record | {"scores": scores.score.tolist(), "reply": "".join(scores.words)}
        if job.settings.benchmark == "gedit":
            shown = _as_gedit_shows(shown)
        if call["call"] == "PQ":  # VIEScore judges quality without the source
            shown = shown[-1:]
        question = _question(job, call)
        reply = judge.reply(question, shown, job.settings.reply_tokens, call["repeat"])
        record = call | reply.facts
        return record | {"reply": reply.said()}
    except (JudgeFailure, BadInput) as failure:
        return record | {"failure": str(failure)}


def _as_gedit_shows(pictures):
    """Source and edit as GEdit's scorer shows them: at the source's size, and through JPEG."""
    shown = []
    for picture in pictures:
        content = io.BytesIO()
        picture.resize(pictures[0].size).save(content, "JPEG")
        shown.append(load_image(content))
    return shown


# ---------------------------------------------------------------- what is seen without a judge


def _seen(job, call):
    """SEEN of an edit. oracle, success: of toy rows, 0 where there is no edit. psnr (dB), ssim,
    lpips (if installed): against the first source, outside the mask if there is one; not for the
    subject source, which would be perfect, nor for an edit that is missing or cannot be opened."""
    source = _picture_or_none(call["images"][0])
    edit = _picture_or_none(call["edit"])
    seen = {}
    if "target_scene" in call:
        truth = oracle(call, edit) if edit else (0.0, 0.0)
        seen["oracle"], seen["success"] = map(float, truth)
    mask = call.get("mask")
    if job.settings.masks:
        mask = _find_picture(job.settings.masks, call["files"])
    mask = mask and load_image(mask)
    if source and edit and call["subject"] != "source":
        seen["psnr"] = plain_terms(source, [edit], mask)["psnr"].item()
        seen["ssim"] = _ssim(source, edit, mask)
        with suppress(ImportError):  # the package lpips may not be installed
            seen["lpips"] = _lpips(source, edit, mask)
    return seen


def _luminance(picture, size):
    """A picture's luminance (H, W) in [0, 1], at the size (W, H)."""
    # the three channels are alike; float64, as SSIM's variances are small differences
    return pixels_of(picture.convert("L"), size).double().mean(2)


def _ssim(source, edit, mask=None):
    """Structural similarity of two pictures' luminance, in [-1, 1], at the edit's size: the mean
    over what is not white in the mask, NaN where all is.

    SSIM of Wang et al. (2004) in 7 x 7 windows with the sample covariance, as scikit-image's
    default.
    """
    x = _luminance(source, edit.size)
    y = _luminance(edit, edit.size)
    moments = torch.stack([x, y, x * x + y * y, x * y])
    # of each window; (H - 6, W - 6) each
    mean_x, mean_y, squares, product = F.avg_pool2d(moments, 7, stride=1)
    means = mean_x**2 + mean_y**2
    # n / (n - 1) of the n = 49 pixels of a window makes sample moments of them
    variances = 49 / 48 * (squares - means)  # of x and y, added
    covariance = 49 / 48 * (product - mean_x * mean_y)
    # Eq. 13, brightness times structure; the paper's 0.01^2 and 0.03^2 keep dark and flat places
    # stable
    ssim = (2 * mean_x * mean_y + 1e-4) / (means + 1e-4)
    ssim *= (2 * covariance + 9e-4) / (variances + 9e-4)
    if mask:
        # by the middle pixel of each window
        ssim = ssim[_luminance(mask, edit.size)[3:-3, 3:-3] < 0.5]
    return ssim.mean().item()


@functools.cache
def _lpips_network():
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


@torch.no_grad()
def _lpips(source, edit, mask=None):
    """Perceptual distance of two pictures by AlexNet (Zhang et al. 2018), 0 where they are equal,
    at the edit's size; what is white in the mask is taken from the source, so that it is equal."""
    network = _lpips_network()
    before = pixels_of(source, edit.size)  # (H, W, 3)
    after = pixels_of(edit, edit.size)
    if mask:
        after = after.where(pixels_of(mask, edit.size) < 0.5, before)
    pair = torch.stack([before, after]).permute(0, 3, 1, 2)  # (2, 3, H, W)
    return network(*pair.split(1), normalize=True).item()


# ---------------------------------------------------------------- score: tables and report


def score_calls(job: Job) -> Rows:
    """Adds up each judge's calls into scores-LABEL-MODE-METADATA.json and returns what was written,
    a dict for each judge. Results with one such name are comparable.

    Scores that lay there before go: they were of other edits or questions, or in the other mode.
    BadInput when no judge has answered anything on the edits as they are now.
    """
    settings = job.settings
    calls = _find_calls(job, job.rows)
    calls_per_row = len(CALLS[settings.benchmark]) * settings.repeats
    # once for each edit, by the first call on it; `score` makes a row of that one
    for first in job.each(calls[::calls_per_row], "seen without a judge"):
        first.update(_seen(job, first))
    metadata = _hash_of([row["hash"] for row in job.rows])
    results = {}
    # of calls-LABEL-PROCESS.jsonl the LABELs
    labels = {re.sub(r"^calls-|-\d+$", "", file.stem) for file in job.out.glob("calls-*-*.jsonl")}
    for label in sorted(labels):
        answers = _read_answers(job, label)
        records = [_record(call, answers) for call in calls]
        if all("failure" in record for record in records):
            continue
        subjects = {
            subject: score(settings.benchmark, of_subject, settings.mode)
            for subject, of_subject in itertools.groupby(records, itemgetter("subject"))
        }
        file = job.out / f"scores-{label}-{settings.mode}-{metadata}.json"
        results[file] = {
            "benchmark": settings.benchmark,
            "judge": label,
            "mode": settings.mode,
            "metadata": metadata,
            "subjects": subjects,
        }
        write_json(file, results[file])
    if not results:
        raise BadInput(
            f"{job.out}: holds no judge's answer on these edits; run --stage judge, or see in "
            "calls-*.jsonl why all calls failed"
        )
    for file in job.out.glob("scores-*.json"):
        if file not in results:
            file.unlink()
    return list(results.values())


def _interval_text(mean, form=".3f"):
    """A mean with its interval as text."""
    value, low, high = mean
    if value is None:
        return "-"
    if low is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _line(first, cells):
    """A line of a table, in columns wide enough for a mean with its interval."""
    return f"  {first:16} " + " ".join(f"{cell:26}" for cell in cells).rstrip()


def _metrics_in(table):
    """The metrics that a table of tabulate shows."""
    return [name for name in table if name not in ("rows", "answered")]


def _as_text(groups, title):
    """A result's tables as lines: for each group its coverage, and a line a task with the mean and
    interval of each metric."""
    lines = []
    for group, table in groups.items():
        names = _metrics_in(table)
        lines.append(f"{title}, {group}: {table['answered']} of {table['rows']} rows answered")
        lines.append(_line("", names))
        for task in table[names[0]]:  # macro and micro, then the tasks
            means = [table[name].get(task, [None] * 3) for name in names]
            lines.append(_line(task, map(_interval_text, means)))
    return lines


def _differences(benchmark, a, b, names):
    """The paired differences of two subjects, or of those of two runs, as tables and in words."""
    groups = paired_differences(a["rows"], b["rows"], METRICS[benchmark])
    lines = _as_text(groups, " - ".join(names))
    for group, table in groups.items():  # its verdict is on means over tasks, as published
        main = table[METRICS[benchmark][0]]["macro"]
        psnr = table.get("psnr", {}).get("macro")
        lines.append(f"{group}: {_verdict(main, *names, psnr)}")
    return lines


def _describe(settings, result):
    """What a person reads first: every table, the gain over the baselines, and rows for tables of
    published numbers."""
    subjects = result["subjects"]
    first, *others = subjects
    lines = [
        f"{settings.benchmark}, {result['mode']} reading, judge and prompts {result['judge']}, "
        f"{len(subjects[first]['rows'])} rows, metadata {result['metadata']}"
    ]
    for subject, content in subjects.items():
        lines += _as_text(content["groups"], subject)
        missing = sum(not row["edit"] for row in content["rows"])
        unread = sum(not row["answered"] for row in content["rows"]) - missing
        if missing or unread:
            lines.append(f"warning: {subject}: {missing} edits missing, {unread} without a score")
        if settings.repeats > 1:
            lines.append(_spread(subject, content["rows"]))
    for other in others:
        pair = (first, other)
        lines += _differences(settings.benchmark, subjects[first], subjects[other], pair)
    name = settings.edits or settings.base or first
    if first == "trained":
        name += f" + {settings.lora}"
    return "\n".join([*lines, *_pasted_rows(result, name)])


def _spread(subject, rows):
    """How far the judge's answers on one edit lie apart, and how far the rows do, in one line."""
    scores = np.array([row["repeats"] for row in rows])  # (rows, repeats)
    # a mean of variances, not of deviations, which would be too small for few repeats
    within = np.sqrt(np.nanmean(scores.var(1, ddof=1)))
    between = np.nanstd(scores.mean(1), ddof=1)
    return (
        f"{subject}: standard deviation {within:.3f} between the repeats of a row, {between:.3f} "
        "between rows"
    )


def _pasted_rows(result, name):
    """The row of the subject in question under its name, to be pasted beside published ones: the
    lines of a Markdown table, and the same row for LaTeX."""
    cells = {"model": name, "judge": result["judge"], "mode": result["mode"]}
    for group, table in _first_subject(result)["groups"].items():
        for metric in _metrics_in(table):
            cells[f"{group} {metric}"] = _interval_text(table[metric]["macro"])
        cells[f"{group} rows answered"] = f"{table['answered']} of {table['rows']}"
    lines = (cells, ["---"] * len(cells), cells.values())
    # a backslash before what LaTeX takes for its own
    latex = [re.sub(r"([#$%&_{}])", r"\\\1", cell) for cell in cells.values()]
    return [*(f"| {' | '.join(line)} |" for line in lines), rf"{' & '.join(latex)} \\"]


# The report is one page that loads nothing: rows are filtered by task, language and failure.
PAGE = """<!doctype html><meta charset="utf-8"><title>edit-nft: evaluation</title><style>
body {font: 14px system-ui, sans-serif; margin: 1.5em; color: #222}
pre {background: #f4f4f4; padding: .8em; overflow: auto}
article {display: flex; flex-wrap: wrap; gap: 12px; border-top: 1px solid #ddd; padding: 12px 0}
[hidden] {display: none !important} article > div {flex: 0 0 230px}
figure {margin: 0; width: 260px} small {color: #666} details {white-space: pre-wrap}
img {width: 260px; height: 260px; object-fit: contain; background: #f4f4f4}
.tiny {image-rendering: pixelated} figcaption {min-height: 2.5em}
details:has(span:empty) {display: none}</style>
<h1>edit-nft: evaluation</h1><pre>{{ summary }}</pre>
<label>task <select id="task"><option value="">all</option></select></label>
<label>language <select id="language"><option value="">all</option></select></label>
<label>answered <select id="answered"><option value="">all</option></select></label>
<label>order <select id="order"><option value="1">worst first</option>
<option value="-1">best first</option></select></label>
<span id="count"></span><main>{% for row in rows %}
<article data-task="{{ row.task }}" data-language="{{ row.language }}"
 data-answered="{{ row.answered }}" data-score="{{ row[main] }}">
<div><b>{{ row.prompt }}</b><p>{{ row.task }}</p><small>{{ row.row }}</small></div>
{% for picture in row.pictures %}<figure><figcaption>{{ picture.caption }}</figcaption>
<img alt="no edit" loading="lazy" src="{{ picture.link }}">
<details><summary>the judge's words</summary><span>{{ picture.said }}</span></details></figure>
{% endfor %}</article>{% endfor %}</main><script>
for (const image of document.querySelectorAll("img"))
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth <= 128);
const rows = [...document.querySelectorAll("article")];
const [task, language, answered, order, count] =
  ["task", "language", "answered", "order", "count"].map(id => document.getElementById(id));
const menus = [task, language, answered];
for (const menu of menus) {
  const names = rows.map(row => row.dataset[menu.id]).filter(name => name);
  for (const name of [...new Set(names)].sort()) menu.add(new Option(name, name));
}
const shown = row => menus.every(menu => !menu.value || row.dataset[menu.id] === menu.value);
task.onchange = language.onchange = answered.onchange = order.onchange = () => {
  const score = row => +(row.dataset.score || -1);  // of no score: below the worst
  rows.sort((a, b) => order.value * (score(a) - score(b)));
  rows.forEach(row => row.parentNode.append(row));
  rows.forEach(row => row.hidden = !shown(row));
  count.textContent = rows.filter(row => !row.hidden).length + " rows";
};
order.onchange();</script>
"""


def write_report(job: Job, results: Rows, summary: str) -> None:
    """Writes report.html, small pictures beside it, and grid.png: the first row of each task.
    results: as score_calls returns them; the first one's judge orders the rows.
    """
    main = METRICS[job.settings.benchmark][0]  # orders the rows
    rows = []
    first = {}  # what is shown of the first row of each task
    for number, row in enumerate(job.each(_first_subject(results[0])["rows"], "report")):
        shown = _shown(job, results, number)
        first.setdefault(row["task"], shown)
        rows.append(row | {"pictures": shown})
    # autoescape: texts are shown and never taken for HTML
    page = Template(PAGE, autoescape=True).render(summary=summary, rows=rows, main=main)
    with whole_file(job.out / "report.html") as part:
        part.write_text(page, encoding="utf-8")
    pictures = []
    captions = []
    for shown in first.values():
        pictures.append([_picture_or_none(job.out / picture["link"]) for picture in shown])
        captions.append([picture["caption"] for picture in shown])
    with whole_file(job.out / "grid.png") as part:
        picture_grid(pictures, captions).save(part)


def _picture_or_none(path):
    """The picture at a path; None where there is none that can be read."""
    with suppress(BadInput):
        return load_image(path)


def _shown(job, results, number):
    """What is shown of a row: for source, base, trained the `caption` with the scores under each
    judge, the `link` of the picture, which is written, small, and what was `said`."""
    shown = []
    # from what was given to what came of it; `source` may be a subject, too
    for name in dict.fromkeys(["source", *reversed(results[0]["subjects"])]):
        row = job.rows[number]
        picture = _picture_or_none(_find_edit(job, row, name) or "")
        link = ""
        if picture:
            picture.thumbnail((384, 384))
            link = f"report/{number:05}-{name}.jpg"
            with whole_file(job.out / link) as part:
                picture.save(part, quality=95, subsampling=0)
        caption = name
        if name == "source":  # the grid's font is ASCII: other prompts give way to row names
            caption += f": {row['prompt'] if row['prompt'].isascii() else row['row']}"
        said = ""
        for result in results:
            if name in result["subjects"]:
                scored = result["subjects"][name]["rows"][number]
                caption += _scores_text(scored, result)
                said += scored["said"] + "\n"
        shown.append({"caption": caption, "link": link, "said": said})
    return shown


def _scores_text(scored, result):
    """A row's scores under a judge; where one is missing it is said what counts."""
    text = "" if scored["answered"] else " missing, counts as"
    for name in (*METRICS[result["benchmark"]], "oracle", "psnr"):
        if name in scored:
            text += f" {name} {scored[name]:.2f}"
    return f"{text} by {result['judge']};"


# ---------------------------------------------------------------- two runs


def compare(runs: list[str]) -> None:
    """Prints the paired differences of the first subjects of --out folders, the first folder's
    against each of the others', under each judge and mode that all have. BadInput when they have
    none in common, or not the same rows."""
    for benchmark, (first, *others) in _shared_results(runs):
        for run, other in zip(runs[1:], others, strict=True):
            print("\n".join(_differences(benchmark, first, other, (runs[0], run))))


def seeds(runs: list[str]) -> None:
    """Prints the mean of several --out folders' first subjects, such as one for each --seed, and
    how far apart they are: rows are not pooled. BadInput as for compare."""
    for _, subjects in _shared_results(runs):
        for group, table in subjects[0]["groups"].items():
            for name in _metrics_in(table):
                tables = [subject["groups"][group] for subject in subjects]
                # a run may have no value of a metric
                macros = [table[name]["macro"] for table in tables if name in table]
                means = np.array([mean for mean, *_ in macros if mean is not None])
                spread = f"standard deviation {means.std(ddof=1):.3f} over {len(means)} runs"
                print(_line(f"{group} {name}", [f"{means.mean():.3f}, {spread}"]))


def _shared_results(runs):
    """(benchmark, the first subject of each run) of each file of scores that all runs have."""
    if len(runs) < 2:
        raise BadInput("compare, seeds: name two runs or more, evaluate.py compare RUN_A RUN_B")
    found = [_read_results(run) for run in runs]
    shared = set(found[0]).intersection(*found)
    if not shared:
        raise BadInput(
            f"{' and '.join(runs)}: no result under one judge, prompts, reading and version of the "
            "benchmark; score all alike"
        )
    for file in sorted(shared):
        results = [run[file] for run in found]
        first = results[0]
        print(f"judge and prompts {first['judge']}, {first['mode']} reading")
        yield first["benchmark"], list(map(_first_subject, results))


def _first_subject(result):
    """The rows and tables of the subject in question."""
    return next(iter(result["subjects"].values()))


def _read_results(run):
    """{file name: result} of an --out folder; BadInput for none, or for one that is no JSON."""
    files = Path(run).glob("scores-*.json")
    results = {file.name: _read_json(file, "run --stage score again") for file in files}
    if not results:
        raise BadInput(f"{run}: holds no scores; name an --out folder of evaluate.py")
    return results


# ---------------------------------------------------------------- does a judge agree with people?


@dataclass(frozen=True)
class AgreeSettings(JudgeSettings):
    """Edits that people rated, and the judge that is to rate them, too."""

    table: str = setting("", "Parquet, arrow, jsonl, json or csv; also the first word.")
    columns: list[str] = setting(
        [], "NAME=COLUMN[,COLUMN] ...: where prompt, image, edits, scores, preference stand."
    )


def read_ratings(table: str, columns: list[str] = ()) -> Iterator[dict]:
    """The rows of a table of edits that people rated, one by one, as a judge takes them, with
    `image` and `edits`, lists of pictures, and `labels`, a float for each edit.

    table: as read_records takes it. A record has `prompt`, `image`, `edits` and `scores`, a number
    for each edit, the higher the better; for two edits also `preference` in place of scores: 0 the
    first is better, 1 the second, 0.5 neither. columns: "NAME=COLUMN" for what is called otherwise,
    with several columns for a list. BadInput for a record without them.
    """
    for where, record in read_records(table):
        try:
            for entry in columns:
                name, _, places = entry.partition("=")
                record[name] = itemgetter(*places.split(","))(record)  # a tuple of several
            scores = record.get("scores")
            if not scores:
                second = float(record["preference"])
                scores = [1 - second, second]
            row = record | {"prompt": str(record["prompt"]), "labels": list(map(float, scores))}
            row["mask"] = None  # a judge would take it for a path
            for name in ("image", "edits"):
                cells = record[name]
                if not isinstance(cells, (list, tuple)):
                    cells = [cells]
                row[name] = [
                    load_image(picture_file(cell, folder_of(table), where)) for cell in cells
                ]
            if len(scores) != len(row["edits"]):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise BadInput(
                f"{where} lacks `prompt`, `image` or `edits` with as many `scores`, or with a "
                "`preference`; add them, or say in --columns what they are called"
            ) from None
        yield row


def _ordered_pairs(scores, labels):
    """For each pair of a row's edits that labels tell apart: 1 if the scores order it alike, 0 if
    not, 0.5 if they tie. Pairs with a score that is NaN are left out."""
    gains = np.subtract.outer(scores, scores)  # (n, n), of a pair's first edit over its second
    gains = gains[np.greater.outer(labels, labels)]  # (pairs,), the better edit is the first
    gains = gains[~np.isnan(gains)]
    # nearly equal is the same to a judge of finite precision
    return np.where(abs(gains) < 1e-6, 0.5, gains > 0).tolist()


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two (n,) tensors, ties at their mean rank."""

    def ranks(values):
        ordered = values.sort().values
        # first place + last place = twice the mean place, which correlates just as well
        return torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]).double())[0, 1].item()


def agree(words: list[str]) -> None:
    """Prints how far the judge orders edits as people do."""  # also what --help says
    settings = parse_settings(AgreeSettings, ["--table", *words], agree.__doc__, judge=TOY)
    judge = None
    outcomes = []  # of all pairs
    sources = []  # of each pair its record: a record's pairs are resampled together
    scores = []
    masses = []
    spreads = []  # of each record's scores
    labels = []
    for number, row in enumerate(read_ratings(settings.table, settings.columns), 1):
        if judge is None:  # not before a row is known to be whole
            stop = catch_signals()
            judge = load_judge(settings, stop=stop)
            begun = time.time()
        said = judge.score(row, row["image"], row["edits"])
        if stop.is_set():
            judge.close()
            raise KeyboardInterrupt
        found = said.score.tolist()
        scores += found
        masses += said.mass.tolist()
        spreads.append(said.score.std(unbiased=False).item())
        labels += row["labels"]
        ordered = _ordered_pairs(found, row["labels"])
        outcomes += ordered
        sources += [number] * len(ordered)
    if judge is None:
        raise BadInput(f"agree {settings.table}: holds no records; name a table of rated edits")
    seconds = (time.time() - begun) / len(scores)
    judge.close()
    _, draws = bootstrap(outcomes, ["all"] * len(outcomes), sources)
    right = _interval_text(_interval(outcomes, draws), ".1%")
    ties = outcomes.count(0.5) / max(len(outcomes), 1)
    scores, labels = torch.tensor([scores, labels])  # (all edits,) each
    known = ~scores.isnan()
    order = spearman(scores[known], labels[known])
    print(
        f"{settings.judge}, {settings.judge_strategy}: {len(scores)} edits of {number} sources; "
        f"right pairs {right}, ties {ties:.1%}, Spearman {order:.3f}, "
        f"failed {1 - known.float().mean():.1%}, spread within sources "
        f"{torch.tensor(spreads).nanmean():.3f}, mass on answers "
        f"{torch.tensor(masses).nanmean():.1%}, {seconds:.2g} seconds a score"
    )


# ---------------------------------------------------------------- training runs as curves

CURVES = (  # keys of log.jsonl, any number of them, four in a row
    "reward/mean",
    "heldout/new/judge",
    "heldout/new/oracle",
    "heldout/new/success",
    "groups/kept",
    "update/drift_base",
    "update/norm_ratio",
    "reward/psnr",
)


@contextmanager
def _figure(file):
    """A figure of matplotlib's, written at the end; BadInput where that is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput(f"{file}: needs matplotlib; pip install matplotlib") from None
    figure = Figure((14, 7), layout="constrained")
    yield figure
    with whole_file(file) as part:
        figure.savefig(part, format="png")
    print(f"wrote {file}")


def draw_bars(result: dict, file: Path) -> None:
    """Draws a result's main metric by task, a bar with its interval for each subject."""
    metric = METRICS[result["benchmark"]][0]
    subjects = result["subjects"]
    width = 0.8 / len(subjects)
    places = {}  # of each task, where its bars begin
    with _figure(file) as figure:
        axes = figure.subplots()
        for number, (name, content) in enumerate(subjects.items()):
            bars = {}
            for group, table in content["groups"].items():
                bars |= {f"{group} {task}": mean for task, mean in table[metric].items()}
            means, lows, highs = np.array(list(bars.values()), float).T  # None is NaN
            lefts = [places.setdefault(task, len(places)) + number * width for task in bars]
            axes.bar(lefts, means, width, label=name)
            axes.vlines(lefts, lows, highs, "black")
        axes.set_xticks(range(len(places)), places, rotation=45, ha="right")
        axes.set_title(f"{metric} by {result['judge']}")
        axes.legend()


@dataclass(frozen=True)
class CurvesSettings(CheckedSettings):
    """Training runs of one setting, such as its seeds."""

    runs: list[str] = setting([], "Folders with a log.jsonl; also the first words.")
    out: str = setting("curves.png", "The picture.")


def curves(words: list[str]) -> None:
    """Draws what runs logged, by epoch: their mean as a line, from lowest to highest as a band."""
    settings = parse_settings(CurvesSettings, ["--runs", *words], curves.__doc__)
    records = []
    for run in settings.runs:
        # with a list for faults, a last line that a crash cut short is passed over
        records += read_json_lines(Path(run, "log.jsonl"), faults=[])
    with _figure(settings.out) as figure:
        panels = figure.subplots(math.ceil(len(CURVES) / 4), 4).flat
        for axes, name in zip(panels, CURVES, strict=False):
            by_epoch = defaultdict(list)  # epoch: values of the runs that reached it
            for _, record in records:
                if name in record:
                    by_epoch[record["epoch"]].append(record[name])
            epochs = sorted(by_epoch)
            values = [by_epoch[epoch] for epoch in epochs]
            axes.plot(epochs, list(map(np.mean, values)), marker=".")
            axes.fill_between(epochs, list(map(min, values)), list(map(max, values)), alpha=0.3)
            axes.set_title(name)


# ---------------------------------------------------------------- the command


def _begin(settings):
    """(rows, prompts) of load_benchmark; config.json is written into --out. BadInput when that was
    begun with other settings that are not HARMLESS."""
    file = Path(settings.out, "config.json")
    if file.is_file():
        changes = changed(_read_json(file, "give another --out"), asdict(settings), HARMLESS)
        if changes:
            raise BadInput(f"{settings.out}: {'; '.join(changes)}; give another --out")
    benchmark = load_benchmark(settings)
    is_drawn = any(map(DRAWN.get, _subjects_of(settings)))
    if settings.stage in ("all", "sample") and is_drawn and not settings.base:
        raise BadInput("--base is missing; name the editor, or a folder of finished --edits")
    write_json(file, asdict(settings))  # not before: settings that are refused may be corrected
    return benchmark


def _run_stages(settings, accelerator, stop):
    """Draws, judges and adds up. Raises Stopped on all processes when one has to stop."""
    rows, prompts = from_main(accelerator, stop, _begin, settings)
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    job = Job(settings, accelerator, stop, Path(settings.out), rows, mine, prompts)
    for stage, work in (("sample", draw_edits), ("judge", judge_edits)):
        with together(accelerator, stop):  # all processes wait here for the slowest
            if settings.stage in ("all", stage):
                work(job)
    if settings.stage in ("all", "score") and accelerator.is_main_process:
        results = score_calls(job)
        summary = "\n".join(_describe(settings, result) for result in results)
        write_report(job, results, summary)
        print(f"{summary}\nwrote {settings.out}/report.html and grid.png")
        try:
            draw_bars(results[0], job.out / "tasks.png")
        except BadInput as fault:  # there is no matplotlib
            print(fault)


def main(argv: list[str] | None = None) -> None:
    """The command. argv: its words, None for those of the command line. BadInput for wrong ones;
    after a signal it exits with 1, and the same command goes on."""
    argv = sys.argv[1:] if argv is None else argv
    command, *words = argv or ["no command"]
    others = {"compare": compare, "seeds": seeds, "agree": agree, "curves": curves}
    if command in others:
        return others[command](words)
    if command not in METRICS:
        raise BadInput(
            f"{command}: say what to score: {', '.join(METRICS)}; or {', '.join(others)}"
        )
    settings = parse_settings(Settings, ["--benchmark", *argv], __doc__.splitlines()[0])
    stop = catch_signals()
    accelerator = start_processes()
    try:
        with locked(settings.out, accelerator.is_main_process):
            _run_stages(settings, accelerator, stop)
    except Stopped as stopped:
        if stopped.__cause__:  # the process that failed says why; the others only stop with it
            raise stopped.__cause__ from None
        say_once(
            f"stopped: {settings.out}: every finished edit and call is kept; the same command goes "
            "on",
            sys.stderr,
        )
        sys.exit(1)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
