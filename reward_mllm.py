"""The judge: turns an instruction, its source pictures and an edit into a score in [0, 1].

    python reward_mllm.py --source a.png --edited b.png --prompt "remove the red circle"
    python reward_mllm.py requirements DIR --judge ...        # writes what its edits must show
    python reward_mllm.py propose PICTURES DIR --judge ...    # writes rows for a folder of pictures

--judge names it: local:MODEL of transformers, http://HOST:PORT/v1[,...] for OpenAI-compatible
servers, or FILE.py[:NAME], a function of your own. By default a multimodal LLM is told to answer
with one digit, and the score is the mean digit under its probabilities at the first answer
position, over 5 (UniWorld-V2, arXiv:2510.16888, Sec. 2.2).

To change the reward, edit `combine`. To change what is asked, edit PROMPTS and STRATEGIES.

Shapes: n edits of one row (a group), B of them in one forward, L tokens, V words.

Departures from the authors' released code:
1. A score that cannot be had is NaN with its cause. It is never 0, and spoils no other score.
2. How much probability the judge puts on answers at all (the mass) comes with every score.
3. The answers' token ids are asked of the tokenizer; a server's answers are found by their text.
4. Every edit is judged under its own row's instruction, and a source is shown with at most as many
   pixels as the edit. Pictures travel as PNG, not as JPEG.
5. The question comes before the pictures (--judge_order pictures_first for the released order),
   and the sentence that tells how to answer comes after them.
6. `sampled` draws among the answers that count, and an edit's draw is always the same.
7. A row may have a checklist, whose items are asked one by one, yes or no (the checklist aspect).
8. `propose` asks in words of ours: the paper names the kinds of its edits, not their making.
"""

import base64
import hashlib
import io
import json
import math
import os
import queue
import random
import re
import runpy
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, TimeoutError, wait
from contextlib import closing
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch
import urllib3
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from data_prep import (
    SPLITS,
    BadInput,
    CheckedSettings,
    ImportSettings,
    as_list,
    file_hashes,
    heed_stop,
    import_dataset,
    load_image,
    load_processor,
    load_sources,
    locked,
    one_line,
    parse_settings,
    read_json_lines,
    read_plain,
    read_rows,
    refuse_others,
    run_script,
    say,
    say_once,
    setting,
    split_file,
    whole_file,
    write_json_lines,
)

TOY = "local:data/toy/judge"

# ---------------------------------------------------------------- what is asked

LAYOUT = """You check edits of pictures. The last picture is an edited version of those before.
Instruction: {prompt}
"""
ASIDE = LAYOUT + "Leave aside whether the instruction was carried out. "
EXECUTION = """A good edit shows: {requirement}
The question is how well the instruction was carried out while everything it does not mention
stayed as it was. {answer}"""
CONSISTENCY = """The question is how far all that it does not ask to change, such as other objects,
faces, background, layout and style, is the same as before. {answer}"""
QUALITY = """The question is how natural the last picture looks: sharp, well lit, free of seams,
smears and noise, with no broken shapes, hands or letters. {answer}"""
CHECKLIST = """Look at this alone: {item}
{answer}"""
PROMPTS = {  # {answer}: marks that how to answer is to be told, after the pictures
    "execution": LAYOUT + EXECUTION,
    "consistency": ASIDE + CONSISTENCY,
    "quality": ASIDE + QUALITY,
    "checklist": LAYOUT + CHECKLIST,  # {item}: asked for each item of a row's checklist, yes or no
}

THINK = """Do not rate it yet. First say in a few sentences what was asked, what changed, and what
should have stayed."""
DIGIT = """Rate it from 0 (not at all, or the picture is spoiled) to 5 (completely). Answer with one
digit, nothing else."""
YES_NO = "Is it so, completely? Answer yes or no, nothing else."
WRITTEN = """Say in a few sentences what changed and what should have stayed. Then write a last line
like this one, with a number from {0:g} (not at all) to {1:g} (completely):
score: {1:g}"""
DIGITS = {str(digit): digit / 5 for digit in range(6)}
WORDS = {"yes": 1.0, "Yes": 1.0, "no": 0.0, "No": 0.0}


class Strategy(NamedTuple):
    """How an answer is asked for, and how a score is made of it."""

    ending: str  # the sentence that asks for it
    worth: dict[str, float]  # answer word -> score; empty: the judge writes a number instead
    thinks: bool = False  # it writes its thoughts first
    draws: bool = False  # one answer is drawn instead of their mean


STRATEGIES = {
    "logits": Strategy(DIGIT, DIGITS),
    "sampled": Strategy(DIGIT, DIGITS, draws=True),
    "yes_no": Strategy(YES_NO, WORDS),
}
STRATEGIES |= {f"{name}_cot": kind._replace(thinks=True) for name, kind in STRATEGIES.items()}
STRATEGIES["written"] = Strategy(WRITTEN, {})

# What a good edit must show, by a word of its task's name in ImgEdit, GEdit and training sets:
# subject-add, background_change, Red-box.
GOOD_EDITS = """
add: the new thing, once, where it was asked for, in fitting size and light, hiding nothing else.
remove: the thing gone with its shadow and reflection; there what would plausibly be behind it.
replace: the new thing where the old was, in fitting size, pose and light, and no trace of the old.
adjust: the named property changed as asked, on all of the named thing alone; its shape as before.
alter: the named property changed as asked, on all of the named thing alone; its shape as before.
color: the new colour on all of the named thing alone, its shading and texture kept.
recolour: the new colour on all of the named thing alone, its shading and texture kept.
material: the named thing plainly made of the new material, with fitting sheen, in its shape.
background: the new background all around, meeting an unchanged foreground at clean edges.
style: the new style in every part of the picture; the scene, its things and places are the same.
tone: the new light, weather, season or mood all over; things and places are the same.
action: the new pose, movement or expression, with sound anatomy; the same person or animal.
motion: the new pose, movement or expression, with sound anatomy; the same person or animal.
human: the person changed as asked and plainly the same one, with natural skin, face and hands.
text: the new text, spelled exactly as asked, in the old one's place and manner; no other changed.
hybrid: every one of the changes that were asked for, each of them complete, and no other.
compose: every one of the changes that were asked for, each of them complete, and no other.
extract: the named thing alone, whole and unaltered, on a plain background.
reference: what was asked for of the reference picture, recognisably; the rest of the edited one.
box: the change made to what the red box marks and nowhere else, and the box itself gone.
"""
REQUIREMENTS = dict(line.split(": ", 1) for line in GOOD_EDITS.strip().splitlines())
ANY_EDIT = "the change that was asked for, complete and natural, and no other change."


def requirement_of(row: dict) -> str:
    """What a good edit of a row must show: its `requirement`, or the text for its `task`."""
    words = re.findall("[a-z]+", str(row.get("task")).lower())
    known = filter(None, map(REQUIREMENTS.get, words))
    return row.get("requirement") or next(known, ANY_EDIT)


# ---------------------------------------------------------------- settings

# A host's name or [IPv6], perhaps a port and a path. No login, for it would be shown and saved.
ADDRESS = r"https?://(\[[\da-fA-F:]+\]|[\w.-]+)(:\d{1,5})?(/[^\s@,]*)?"
FUNCTION = r"(.+\.py)(?::(\w+))?"


@dataclass(frozen=True)
class JudgeSettings(CheckedSettings):
    """Which judge it is, what it is asked, and how its answer is read."""

    judge: str = setting(
        "local:Qwen/Qwen2.5-VL-7B-Instruct",
        "local:MODEL, http://HOST:PORT/v1[,...] or FILE.py[:NAME].",
    )
    judge_model: str = setting("", "A served judge's name. [the first that is listed]")
    judge_strategy: Literal[tuple(STRATEGIES)] = setting(
        "logits", "Mean digit, a drawn digit, yes against no, a written score; _cot: thinks first."
    )
    judge_order: Literal["question_first", "pictures_first"] = setting(
        "question_first", "What a judge sees first."
    )
    judge_aspects: list[str] = setting(
        [], "ASPECT=WEIGHT ...: what counts beside execution; see `combine`."
    )
    judge_prompt: list[str] = setting(
        [], "[ASPECT=]FILE ...: a text in place of ours, or for an aspect of yours."
    )
    judge_think: int = setting(1024, "Tokens of a thought or a written score, at most.", at_least=1)
    # Matches a score at the very end, such as each of: "score": 4}   **Score:** 7.5.   score: [3
    judge_reply: str = setting(
        r"(?i)score[\"'*_:=\[\s]{1,9}(\d+(?:\.\d+)?)[^\w\d]*$",
        "Regular expression whose (groups) are a written score.",
    )
    judge_range: list[float] = setting([0.0, 10.0], "The worst and the best written score.")
    judge_draws: int = setting(
        1, "Written scores of an edit by a served judge, of which the mean counts.", at_least=1
    )
    judge_check: bool = setting(True, "Stop unless right edits score above untouched sources.")
    trust_remote_code: bool = setting(False, "Run code that comes with a model, judge or editor.")
    judge_device: str = setting("", "Where a local judge runs. [beside the editor]")
    judge_batch: int = setting(16, "Edits in one forward of a local judge.", at_least=1)
    judge_in_flight: int = setting(
        16, "Requests at a time to each server, of all processes of a run.", at_least=1
    )
    judge_timeout: float = setting(60.0, "Seconds in which a server must have answered.", above=0)
    judge_patience: float = setting(120.0, "Seconds of an outage to sit out.", at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if len(self.judge_range) != 2 or self.judge_range[0] >= self.judge_range[1]:
            raise BadInput(f"--judge_range {self.judge_range}: give the worst and the best score")
        try:
            groups = re.compile(self.judge_reply).groups
        except Exception:  # too deep and too large are errors of other kinds
            groups = 0
        if groups == 0:
            raise BadInput(
                f"--judge_reply {self.judge_reply}: write a regular expression with a (group) "
                "around the number"
            )
        if not re.fullmatch(f"local:.*|{ADDRESS}(,{ADDRESS})*|{FUNCTION}", self.judge):
            raise BadInput(
                "--judge: not of the form local:MODEL, http://HOST:PORT/v1[,...] without a "
                "password (JUDGE_API_KEY holds a key), or FILE.py[:NAME]"
            )


# ---------------------------------------------------------------- terms that need no judge

PLAIN_TERMS = ("psnr", "pixel_distance", "brightness_drift", "sharpness_drift")


def plain_terms(
    source: Image.Image, edits: list[Image.Image], mask: Image.Image | None = None
) -> dict[str, Tensor]:
    """What can be seen without a judge, of n edits and their source: name -> (n,).

    psnr: of all pixels that are dark in `mask`, in dB, 60 at most, NaN where none is.
    pixel_distance: mean absolute difference, in [0, 1].
    brightness_drift: the edit's mean brightness minus the source's, in [-1, 1].
    sharpness_drift: (edit - source) / (edit + source) of the mean absolute Laplacian; -1: blurred.
    """
    found = []
    for edit in edits:
        before = pixels_of(source, edit.size)  # (H, W, 3)
        after = pixels_of(edit, edit.size)
        change = after - before
        error = change.square().mean(2)  # (H, W)
        if mask:
            must_stay = pixels_of(mask, edit.size).mean(2) < 0.5  # (H, W), black in the mask
            error = error[must_stay]  # (pixels,)
        sharp_before = _sharpness(before)
        sharp_after = _sharpness(after)
        terms = {
            "psnr": -10 * error.mean().clamp(min=1e-6).log10(),  # 1e-6 is 60 dB
            "pixel_distance": change.abs().mean(),
            "brightness_drift": change.mean(),
            "sharpness_drift": (sharp_after - sharp_before) / (sharp_after + sharp_before),
        }
        found.append(terms)
    return default_collate(found)  # a dict of tensors from a list of dicts


def pixels_of(picture: Image.Image, size: tuple) -> torch.Tensor:
    """A picture's pixels (H, W, 3) in [0, 1], at the size (W, H)."""
    picture = picture.convert("RGB").resize(size, Image.LANCZOS)
    return torch.tensor(np.array(picture)) / 255


def _sharpness(pixels):
    """The mean absolute Laplacian of the brightness, above 0, of pixels (H, W, 3)."""
    light = pixels.mean(2)
    # second differences, of the pixels that have four neighbours
    down = light.diff(2, dim=0)[:, 1:-1]
    across = light.diff(2, dim=1)[1:-1]
    return (down + across).abs().mean() + 1e-6


# ---------------------------------------------------------------- the score


class Scores(NamedTuple):
    """What a judge says of the n edits of one row."""

    score: Tensor  # (n,) in [0, 1], NaN where there is none
    mass: Tensor  # (n,) least probability of all words that count; NaN: not known
    terms: dict  # name -> (n,): each aspect's score, and the plain terms
    causes: list  # n strings: why there is no score; "" where there is one
    words: list  # n strings: the judge's likeliest first words, or what it wrote
    facts: list = ()  # n dicts, where a server gave them: its model, finish_reason, usage

    @staticmethod
    def stack(groups: list["Scores"]) -> "Scores":
        """G groups' Scores as one: (G, n) each; causes and words are those of all G n edits."""
        return Scores(
            torch.stack([group.score for group in groups]),
            torch.stack([group.mass for group in groups]),
            default_collate([group.terms for group in groups]),
            sum([group.causes for group in groups], []),
            sum([group.words for group in groups], []),
        )


class Verdict(NamedTuple):
    """What came of one question about one edit."""

    score: float = torch.nan
    mass: float = torch.nan
    cause: str = ""
    words: str = ""
    shares: dict = {}  # each word that counts, and its probability among those words
    facts: dict = {}  # what its server says of the reply


def combine(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The reward (n,) in [0, 1]. Each weighted aspect can only lower what execution earned, so
    that an untouched source, which is perfectly consistent, earns nothing."""
    reward = terms["execution"]
    for name, weight in weights.items():
        reward = reward * (1 - weight + weight * _as_factor(name, terms[name]))
    return reward


def _as_factor(name, values):
    """A term as a factor of the reward: a plain one is 1 for what did not change, 0 at worst."""
    if name == "psnr":  # over 40 dB, as in CoCoEdit; where all may change, nothing can be lost
        return (values / 40).nan_to_num(1.0).clamp(0, 1)
    if name in PLAIN_TERMS:
        return 1 - values.abs()
    return values


def expected_score(p: dict[str, float], worth: dict[str, float] = DIGITS) -> Verdict:
    """The mean worth of the answers under their probabilities (arXiv:2510.16888, Sec. 2.2).

    p: the likeliest first words, each with its probability among all words; worth: the words that
    count, each with what it is worth, in [0, 1].
    """
    p = Counter(p)  # 0 for all other words
    words = ", ".join(f"{word!r} {share:.0%}" for word, share in p.most_common(5))
    mass = sum([p[word] for word in worth], 0.0)
    # What is no answer counts for nothing: the answers' shares are of their mass alone.
    if not 0 < mass < math.inf:
        return Verdict(torch.nan, mass, "no finite probability of the answers", words)
    shares = {word: p[word] / mass for word in worth}
    score = sum(share * worth[word] for word, share in shares.items())
    # rounding may exceed 1
    return Verdict(min(score, 1.0), min(mass, 1.0), "", words, shares)


class JudgeFailure(Exception):
    """No answer. Its text is short and the same for the same fault, so that it can be counted."""


class Unavailable(JudgeFailure):
    """No answer for now: to ask again may help."""


def _cause_of(error):
    """What an exception says, in one line that is not long."""
    text = one_line(error)[:200]
    return text if isinstance(error, JudgeFailure) else f"{type(error).__name__}: {text}"


class Reply(NamedTuple):
    """What a judge wrote."""

    text: str
    is_cut: bool  # by the limit of its tokens
    facts: dict = {}  # what its server says of it: model, finish_reason, usage
    logprobs: dict = {}  # of its words and their likeliest neighbours, from a server

    def said(self) -> str:
        """What stands after its thoughts; JudgeFailure when it is cut or never leaves them."""
        said = self.text.rpartition("</think>")[2].strip()
        if self.is_cut:
            raise JudgeFailure("the reply was cut by its limit of tokens")
        # What stands in thoughts that never end is a draft, however much it looks like an answer.
        if not said or "<think>" in said:
            raise JudgeFailure("a reply without an answer")
        return said


def _read_written(replies, settings):
    """The Verdict of an edit's Replies: the mean over the readable ones, each the mean of all
    --judge_reply matches in it; of several groups in one match, the least counts."""
    low, high = settings.judge_range
    scores = []
    for reply in replies:
        try:
            found = re.finditer(settings.judge_reply, reply.said())
            numbers = [min(map(float, filter(None, find.groups()))) for find in found]
            if not numbers:
                raise JudgeFailure("no score in the reply")
            if min(numbers) < low or max(numbers) > high:
                raise JudgeFailure(f"a score out of the range {low:g} to {high:g}")
            scores.append((fmean(numbers) - low) / (high - low))
        except (JudgeFailure, ValueError) as error:  # such as 1.2.3, which is no number
            cause = _cause_of(error)
    verdict = Verdict(words=reply.text[-200:], facts=reply.facts)  # of the last one
    if scores:
        return verdict._replace(score=fmean(scores))
    return verdict._replace(cause=cause)


# ---------------------------------------------------------------- what all judges share


def _background(function, *args):
    """The Future of function(*args), which runs in a daemon thread of its own: unlike those of
    ThreadPoolExecutor it does not hold up the end of the process, whatever it waits for."""
    future = Future()

    def work():
        # Whatever is raised, SystemExit of a user's function too, must reach whoever waits.
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _message(role, *parts):
    """A chat message of texts, and of pictures as a judge's `part` makes them; "" is left out."""
    content = []
    for part in filter(None, parts):
        content.append({"type": "text", "text": part} if isinstance(part, str) else part)
    return {"role": role, "content": content}


class Judge:
    """What all judges share. Those that talk, local and served, bring three methods:

    part(picture): a picture as a part of a chat message
    write(chats, tokens, draw): a Reply to each chat; draw: the number of a random draw, or None
    weigh(chats, worth): a Verdict on each chat, from the probabilities of its next word
    """

    batch = 1  # chats in one call of write or weigh
    noise = 0.0  # how far a score moves by the judge's own arithmetic; check_judge measures it

    def __init__(self, settings, stop=None):
        self.settings = settings
        self.stop = stop or threading.Event()
        self.lock = threading.Lock()  # held by who uses the model, or calls the function
        self.name = settings.judge.removeprefix("local:")
        self.prompts = dict(PROMPTS)
        files = settings.judge_prompt
        own = f"{self.name}/judge_prompt.txt"  # in a local model's folder: its own question
        if os.path.isfile(own):
            files = [own, *files]
        for entry in files:
            # ASPECT=FILE or FILE; with a slash before its first "=" the whole is a file's path
            aspect, file = re.fullmatch("(?s)(?:([^/=]+)=)?(.*)", entry).groups("execution")
            text = read_plain(file, "name a text file").decode("utf-8-sig", "replace")
            # \ufffd stands for bytes that are no utf-8
            if "{prompt}" not in text or "\ufffd" in text:
                raise BadInput(
                    f"--judge_prompt {file}: is no utf-8, or lacks {{prompt}}, which stands where "
                    "the instruction goes; save it so"
                )
            self.prompts[aspect] = text
        known = {*self.prompts, *PLAIN_TERMS} - {"execution"}
        self.weights = {}
        for entry in settings.judge_aspects:
            aspect, _, weight = entry.partition("=")
            # a weight is written as 1, 1.0, 0.4 or .4
            if aspect not in known or not re.fullmatch(r"[01](\.0*)?|0?\.\d+", weight):
                raise BadInput(
                    f"--judge_aspects {entry}: give ASPECT=WEIGHT, a weight from 0 to 1 of one of "
                    f"{', '.join(sorted(known))}, or add --judge_prompt {aspect}=FILE"
                )
            self.weights[aspect] = float(weight)
        self.aspects = ["execution", *sorted(self.weights.keys() - PLAIN_TERMS)]
        self.strategy = STRATEGIES[settings.judge_strategy]

    # ------------------------------------------------ from a group of edits to its Scores

    def submit(self, row: dict, sources: list, edits: list) -> Future:
        """The Future of score(...): the judge works while the caller goes on."""
        return _background(self.score, row, sources, edits)

    def score(self, row: dict, sources: list, edits: list) -> Scores:
        """Judges the n edits of one row.

        row: `prompt`, and perhaps `requirement`, `task`, `checklist` (questions to which a good
        edit gets a yes) and `mask`, the path of a picture whose white is the region to edit;
        sources, edits: PIL.Images. Returns Scores on the CPU.
        """
        try:
            return self.unless_stopped(self.examine_all, row, sources, edits)
        except JudgeFailure as failure:  # one group's trouble must not end a run
            return self.missing(len(edits), str(failure))

    def missing(self, n: int, cause: str) -> Scores:
        """The Scores of n edits that could not be judged: NaN."""
        none = torch.full((n,), torch.nan)
        terms = dict.fromkeys([*PLAIN_TERMS, *self.aspects], none)
        return Scores(none, none, terms, [cause] * n, [""] * n)

    def examine_all(self, row, sources, edits):
        """The Scores of n edits under all aspects."""
        mask = load_image(row["mask"]) if row.get("mask") else None
        terms = plain_terms(sources[0], edits, mask)
        answers = []
        for aspect in self.aspects:
            verdicts = self.examine(row, aspect, sources, edits)
            terms[aspect] = torch.tensor([verdict.score for verdict in verdicts])  # (n,)
            answers.append(verdicts)
        score = combine(terms, self.weights)
        # One Verdict an edit: its score is not used, its words and facts are those of execution.
        joined = [_joined(verdicts) for verdicts in zip(*answers, strict=True)]
        causes = [
            one.cause or _range_fault(value) for one, value in zip(joined, score, strict=True)
        ]
        score[[bool(cause) for cause in causes]] = torch.nan
        return Scores(
            score,
            torch.tensor([one.mass for one in joined]),
            terms,
            causes,
            [one.words for one in joined],
            [one.facts for one in joined],
        )

    def examine(self, row, aspect, sources, edits):
        """n Verdicts on an aspect: on its one question, or on all items of a checklist."""
        strategy = self.strategy
        items = [""]
        if "{item}" in self.prompts[aspect]:
            strategy = STRATEGIES["yes_no"]
            items = as_list(row.get("checklist") or requirement_of(row))
        shown = [self.part(_shrunk(source, edits[0])) for source in sources]
        chats = []
        for item in items:
            question, ending = self.question(row, aspect, item, strategy)
            for edit in edits:
                parts = [question, *shown, self.part(edit)]
                if self.settings.judge_order == "pictures_first":
                    parts.append(parts.pop(0))  # the question
                chats.append([_message("user", *parts, ending)])
        # Servers are asked side by side; a local judge's batches take their turn at its lock.
        starts = range(0, len(chats), self.batch)
        batches = [_background(self.answer, chats[i : i + self.batch], strategy) for i in starts]
        verdicts = []
        for batch in batches:
            verdicts += batch.result()
        n = len(edits)  # they are item by item: those of edit i are i, i + n, i + 2n, ...
        verdicts = [_joined(verdicts[i::n]) for i in range(n)]
        if strategy.draws:
            verdicts = list(map(_drawn, verdicts, edits))
        return verdicts

    def question(self, row, aspect, item, strategy):
        """An aspect's question about a row, and how to answer it, which stands last."""
        question = self.prompts[aspect]
        ending = ""
        if "{answer}" in question:
            ending = THINK if strategy.thinks else strategy.ending
        question = question.replace("{answer}", "").replace("{requirement}", requirement_of(row))
        # the instruction last: it may itself contain "{item}" or the like
        question = question.replace("{item}", item).replace("{prompt}", row["prompt"])
        # only WRITTEN has fields, for the range
        return question, ending.format(*self.settings.judge_range)

    def answer(self, chats, strategy):
        """A Verdict on each chat. A batch that is refused is tried again one by one."""
        asked = chats
        tokens = self.settings.judge_think
        try:
            if strategy.thinks:
                thoughts = self.write(chats, tokens)
                ending = _message("user", strategy.ending)
                asked = [
                    [*chat, _message("assistant", thought.text), ending]
                    for chat, thought in zip(chats, thoughts, strict=True)
                ]
            if strategy.worth:
                return self.weigh(asked, strategy.worth)
            # draws x chats
            written = [self.write(asked, tokens, draw) for draw in range(self.settings.judge_draws)]
            return [_read_written(replies, self.settings) for replies in zip(*written, strict=True)]
        except Exception as error:
            if len(chats) > 1:
                return [self.answer([chat], strategy)[0] for chat in chats]
            return [Verdict(cause=_cause_of(error))]

    # ------------------------------------------------ other words with a judge, and its end

    def reply(self, text: str, pictures: list, max_tokens: int = 1024, draw=None) -> Reply:
        """The Reply to a text and PIL.Images, at temperature 0; JudgeFailure if there is none.
        draw: its number, for --judge_draws."""
        chat = [_message("user", text, *map(self.part, pictures))]
        (reply,) = self.unless_stopped(self.write, [chat], max_tokens, draw)
        return reply

    def part(self, picture):
        return {"type": "image", "image": picture}

    def write(self, chats, tokens, draw=None):
        raise JudgeFailure("this judge does not write; take another --judge")

    def unless_stopped(self, function, *args):
        """function(*args); JudgeFailure for all that it raises, and as soon as a run is stopped."""
        future = _background(function, *args)
        while not future.done():
            if self.stop.is_set():
                raise JudgeFailure("stopped")
            wait([future], 0.2)
        try:
            return future.result()
        except BaseException as error:
            raise JudgeFailure(_cause_of(error)) from error

    def close(self):
        """Waits a little for what is being worked on, and lets nothing else use the model: a
        forward that the end of Python cuts off would crash."""
        self.lock.acquire(timeout=3)


def _joined(verdicts):
    """Several Verdicts on one edit as one: the mean score, the least mass, the first cause."""
    known = [verdict.mass for verdict in verdicts if not math.isnan(verdict.mass)]
    return verdicts[0]._replace(
        score=fmean(verdict.score for verdict in verdicts),
        mass=min(known, default=torch.nan),
        cause=next((verdict.cause for verdict in verdicts if verdict.cause), ""),
    )


def _drawn(verdict, edit):
    """One digit drawn in place of their mean: the edit's own, whenever it is asked."""
    if verdict.cause:
        return verdict
    # a strategy that draws asks for digits, so the shares are theirs, in this order
    draw = random.Random(edit.tobytes()).choices(list(DIGITS.values()), verdict.shares.values())
    return verdict._replace(score=draw[0])


def _range_fault(score):
    """What is wrong with a score, "" if nothing is; NaN is in no range."""
    return "" if 0 <= score <= 1 else f"a score of {score:.3g}, not in [0, 1]"


def _shrunk(picture, edit):
    """A picture with at most about as many pixels as an edit. A photo of 12 megapixels would be
    15,000 tokens beside an edit of 324, and sharpness cannot be compared across scales."""
    factor = math.sqrt(math.prod(edit.size) / math.prod(picture.size))
    return ImageOps.scale(picture, min(factor, 1), Image.LANCZOS)


# ---------------------------------------------------------------- a function as the judge


class FileJudge(Judge):
    """A function `score(row, sources, edits)` of FILE.py, or NAME of FILE.py:NAME.

    It gets a row (a dict), its source pictures and n edits (PIL.Images): one group at a time, in
    a thread that need not be the same each time. It returns n numbers in [0, 1], NaN where it has
    none; whatever it raises is the cause of n NaNs.
    """

    def __init__(self, settings, stop=None):
        super().__init__(settings, stop)
        file, name = re.fullmatch(FUNCTION, settings.judge).groups(default="score")
        if self.aspects != ["execution"]:
            raise BadInput(f"--judge_aspects: {file} answers no questions; name plain terms alone")
        try:
            self.function = runpy.run_path(file)[name]
        except (Exception, SystemExit) as error:
            raise BadInput(
                f"--judge {file}: {_cause_of(error)}; write `def {name}(row, sources, edits)` there"
            ) from error

    def examine(self, row, aspect, sources, edits):
        with self.lock:
            values = [float(value) for value in self.function(row, sources, edits)]
        if len(values) != len(edits):
            raise JudgeFailure(f"{len(values)} scores for {len(edits)} edits")
        return [Verdict(value, cause=_range_fault(value)) for value in values]


# ---------------------------------------------------------------- a local judge


class LocalJudge(Judge):
    """A multimodal LLM of transformers on this machine. BadInput when the setting names none."""

    def __init__(self, settings, device, dtype, stop=None):
        super().__init__(settings, stop)
        self.batch = settings.judge_batch
        trusted = settings.trust_remote_code
        try:
            torch.zeros(1, device=device).item()  # before a model is read for minutes
            model = AutoModelForImageTextToText.from_pretrained(
                self.name, dtype=dtype, trust_remote_code=trusted
            )
            # the model's own class, where it is known: AutoProcessor may want torchvision
            kind = PROCESSOR_MAPPING.get(type(model.config), AutoProcessor)
            self.processor = load_processor(kind, self.name, trust_remote_code=trusted)
        except BadInput:  # such as one about torchvision
            raise
        except Exception as error:  # it may be of code that came with the model
            raise BadInput(
                f"{self.name}: not a multimodal LLM of transformers that {device} can run "
                f"({_cause_of(error)}); name one such as Qwen/Qwen2.5-VL-7B-Instruct, or a "
                "--judge_device such as cuda:0, or run python data_prep.py toy first"
            ) from error
        self.model = model.to(device)
        # On a stop a thread, perhaps one that waited long for its turn, quits at its next forward.
        heed_stop(self.model, self.stop)
        self.tokenizer = self.processor.tokenizer
        # The next word's place is then the last one in every row.
        self.tokenizer.padding_side = "left"
        _answer_token_ids(self.tokenizer, self.strategy.worth)  # refused here, if it must be

    def inputs(self, chats):
        """The model's arguments for some chats, padded on the left to (B, L)."""
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
        return inputs.to(self.model.device, self.model.dtype)

    def write(self, chats, tokens, draw=None):
        with self.lock:
            inputs = self.inputs(chats)
            whole = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        written = whole[:, inputs["input_ids"].shape[1] :]  # (B, tokens at most)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        # A finished reply has an end token (then padding); one without it hit the token limit.
        ends = torch.tensor(self.model.generation_config.eos_token_id)
        is_cut = ~torch.isin(written.cpu(), ends).any(1)
        return list(map(Reply, texts, is_cut.tolist()))

    @torch.no_grad()
    def weigh(self, chats, worth):
        with self.lock:
            inputs = self.inputs(chats)
            logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        token_ids = _answer_token_ids(self.tokenizer, worth)
        verdicts = []
        for p in logits.float().softmax(1):  # (V,), of each chat
            likeliest = p.topk(5).indices.tolist()
            # the words that count come last, and however unlikely they are
            words = [*map(self.tokenizer.decode, likeliest), *worth]
            seen = dict(zip(words, p[likeliest + token_ids].tolist(), strict=True))
            verdicts.append(expected_score(seen, worth))
        return verdicts


def _answer_token_ids(tokenizer, texts=DIGITS):
    """The token ids of the answers; BadInput when one of them is not a token of its own."""
    ids = []
    for text in texts:
        pieces = tokenizer.encode(text, add_special_tokens=False)
        # Two tokens would have no probability in one place; an unknown word becomes another.
        if len(pieces) != 1 or tokenizer.decode(pieces).strip() != text:
            raise BadInput(
                f"{tokenizer.name_or_path}: the answer {text} is not one token of its own "
                f"({pieces}); take another judge or another --judge_strategy"
            )
        ids += pieces
    return ids


# ---------------------------------------------------------------- a served judge

MAX_REPLY = 2**22  # bytes
DRAW_TEMPERATURE = 0.7  # where the mean of several written scores counts
REST = 5.0  # seconds: longest pause between tries; how long after giving up no server is asked
TELL_AT = 4  # failures in a row at which a server has stopped answering


class ServedJudge(Judge):
    """OpenAI-compatible servers with the same model. The key is JUDGE_API_KEY or OPENAI_API_KEY.

    BadInput when a server does not answer or does not have the model. (urllib3.Retry would do the
    retries, but knows neither other servers nor an outage that all requests share.)
    """

    def __init__(self, settings, stop=None):
        super().__init__(settings, stop)
        self.key = os.getenv("JUDGE_API_KEY") or os.getenv("OPENAI_API_KEY") or "EMPTY"
        in_flight = settings.judge_in_flight // int(os.getenv("WORLD_SIZE") or 1) or 1
        urls = [url.rstrip("/") for url in settings.judge.split(",")]
        # A request takes a place from the front, and puts it back at the end when it has its reply:
        # servers take turns, and a slow one, whose places come back late, has less to do.
        self.places = queue.Queue()
        for url in urls * in_flight:
            self.places.put(url)
        self.failures = Counter()  # of each server since its last good reply
        self.hopeless_until = 0.0  # requests made before this time fail at once; see complete
        self.pool = urllib3.PoolManager(  # it goes through no proxy
            num_pools=len(urls),
            maxsize=in_flight,  # as many connections are kept open
            headers={"Authorization": f"Bearer {self.key}"},
            retries=False,  # nor are redirects followed: pictures go to no other host
            timeout=2 * settings.judge_timeout,  # nobody waits so long; it ends the thread
        )
        self.is_new = False  # a server that wants the options of OpenAI's newer models
        self.name = settings.judge_model
        for url in urls:
            try:
                names = [str(model["id"]) for model in self.request(f"{url}/models")["data"]]
                self.name = self.name or names[0]
                if self.name not in names:
                    raise JudgeFailure(f"serves {str(names)[:200]}, not {self.name!r}")
            except Exception as error:  # the reply may be any JSON
                raise BadInput(
                    f"judge {url}: {_cause_of(error)}; start the server, or correct --judge, "
                    "--judge_model or JUDGE_API_KEY"
                ) from None

    def part(self, picture):
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    def write(self, chats, tokens, draw=None):
        options = {"max_tokens": tokens, "temperature": 0}
        if draw is not None and self.settings.judge_draws > 1:
            options |= {"temperature": DRAW_TEMPERATURE, "seed": draw}
        return [self.complete(chats, options)]

    def weigh(self, chats, worth):
        options = {"max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": 20}
        reply = self.complete(chats, options)
        try:
            listed = reply.logprobs["content"][0]["top_logprobs"]
            words = [str(word["token"]) for word in listed]
            values = [math.exp(word["logprob"]) for word in listed]
            least = min(values)
        except Exception:  # the reply may be any JSON
            return [Verdict(cause="no logprobs in the reply", facts=reply.facts)]
        verdict = expected_score(dict(zip(words, values, strict=True)), worth)
        # No score is guessed from impossible probabilities, or a list that may lack an answer.
        cause = verdict.cause
        is_double = max(map(words.count, worth)) > 1
        unseen = worth.keys() - set(words)  # each at most as likely as the last that is listed
        if is_double or values.count(0.0) > 1 or not sum(values) < 1.01:  # nor is NaN
            cause = "probabilities that cannot be, or were cut by top-k or top-p"
        elif len(unseen) * least > 1e-3 * verdict.mass:
            cause = "answers missing from top_logprobs"
        score = torch.nan if cause else verdict.score
        return [verdict._replace(score=score, cause=cause, facts=reply.facts)]

    def complete(self, chats, options):
        """The Reply to a chat; where no server answers it is asked again.

        After judge_patience seconds of failures the request is given up. If its server has stopped
        answering, all waiting requests fail with it: an outage is sat out once, not by each.
        """
        (chat,) = chats  # so many are in a batch
        asked = time.monotonic()
        failing = None  # since when
        failed_at = ""
        while not self.stop.is_set():
            url = self.places.get()
            if url == failed_at:  # take the next place, which may be another server's
                self.places.put(url)
                url = self.places.get()
            try:
                if asked < self.hopeless_until:
                    raise JudgeFailure("no server answers")
                return self.complete_at(url, chat, options)
            except Unavailable as failure:
                now = time.monotonic()
                failing = failing or now
                failed_at = url
                with self.lock:
                    self.failures[url] += 1
                    failures = self.failures[url]
                if failures == TELL_AT:
                    say(f"judge {url}: stopped answering: {failure}", sys.stderr)
                if now - failing >= self.settings.judge_patience:
                    if failures >= TELL_AT:
                        self.hopeless_until = now + REST  # for the next questions, too
                    raise
                # Its place stays taken for a while: a server that fails has less and less to do.
                self.stop.wait(min(failures, REST))
            finally:
                self.places.put(url)
        raise JudgeFailure("stopped")

    def complete_at(self, url, chat, options):
        """As `complete`, by one server. It is asked once more where it wants other options."""
        body = {"model": self.name, "messages": chat, **options}
        if self.is_new:
            body["max_completion_tokens"] = body.pop("max_tokens")
            del body["temperature"]
        try:
            reply = self.request(f"{url}/chat/completions", body)
        except JudgeFailure as failure:
            # judged by body: another thread may have set is_new while this was in flight
            if "temperature" not in body or not re.search("max_tokens|temperature", str(failure)):
                raise
            self.is_new = True
            return self.complete_at(url, chat, options)
        with self.lock:
            failures = self.failures.pop(url, 0)
        if failures >= TELL_AT:
            say(f"judge {url}: answers again", sys.stderr)
        match reply:
            case {"choices": [{"message": {"content": str(text)}} as choice]}:
                known = reply | choice
                facts = {key: known.get(key) for key in ("model", "finish_reason", "usage")}
                is_cut = facts["finish_reason"] == "length"
                return Reply(text, is_cut, facts, known.get("logprobs"))
        raise JudgeFailure("not one choice with a text in the reply")

    def request(self, url, body=None):
        """A reply's JSON; JudgeFailure for all else, and when judge_timeout is over."""
        try:
            # urllib3's timeout is that of each byte; this one is that of the whole reply
            return _background(self.send, url, body).result(self.settings.judge_timeout)
        except TimeoutError:
            raise Unavailable("timeout") from None

    def send(self, url, body):
        """What `request` does, however long it takes."""
        method = "POST" if body else "GET"
        try:
            with self.pool.request(method, url, json=body, preload_content=False) as reply:
                content = reply.read(MAX_REPLY)  # cut, it is no JSON
        except (urllib3.exceptions.HTTPError, ValueError):  # of a key that no header can hold
            raise Unavailable("no connection") from None
        if reply.status == 429 or reply.status >= 500:  # too many requests, or its own fault
            raise Unavailable(f"HTTP {reply.status}")
        if reply.status != 200:
            # the key goes before the text is cut: half a key leaks, too
            text = content.decode(errors="replace").replace(self.key, "***")
            raise JudgeFailure(f"HTTP {reply.status} {' '.join(text.split())[:200]}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Unavailable("a reply that is not JSON") from None


# ---------------------------------------------------------------- which judge, and is it fit?


def load_judge(
    settings: JudgeSettings,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    stop: threading.Event | None = None,
) -> Judge:
    """The judge that settings.judge names; BadInput when it cannot serve.

    device: where a local judge runs unless settings.judge_device says so, None for a GPU if there
    is one; dtype: its precision there, float32 on a CPU; stop: once it is set, all waiting ends
    within a second, and what is missing is NaN with the cause "stopped".
    """
    if settings.judge.startswith("http"):
        return ServedJudge(settings, stop)
    if not settings.judge.startswith("local:"):
        return FileJudge(settings, stop)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device = settings.judge_device or device or usual
    if str(device).startswith("cpu"):
        dtype = torch.float32
    return LocalJudge(settings, device, dtype, stop)


def refuse_silent_judge(scores: Scores, name: str, least: float = 0.5):
    """BadInput for a judge that gave no score, or whose mean mass on answers is below `least`."""
    mass = scores.mass.nanmean()
    if mass < least:  # not where nothing is known of the mass
        words = max(scores.words, key=len)  # not those of an edit that failed
        raise BadInput(
            f"{name}: puts {mass:.1%} of its probability on the answers that count and would "
            f"rather say {words}; take another judge, --judge_strategy or --judge_prompt"
        )
    if scores.score.isnan().all():
        raise BadInput(f"{name}: gave no score: {dict(Counter(scores.causes))}; see to the judge")


def check_judge(judge: Judge, rows: list[dict]):
    """Asks about a few rows, and sets judge.noise. BadInput for a silent judge, and, unless
    judge_check is off, for one that untouched sources please more than right edits (`target`)."""
    # Enough for a mean, and few enough for a start within seconds.
    examples = [row for row in rows if row.get("target")][:16]
    asked = []
    for row in examples or rows[:4]:
        sources = load_sources(row)
        source = sources[0]
        target = load_image(row["target"]) if examples else ImageOps.mirror(source)
        halfway = Image.blend(source, target.resize(source.size), 0.5)  # a score between theirs
        wide = source.resize((3 * source.width, source.height))  # more tokens: others get padded
        for first in (source, wide):
            asked.append(judge.submit(row, sources, [first, target, halfway]))
    scores = Scores.stack([future.result() for future in asked])  # (2 rows, 3)
    refuse_silent_judge(scores, judge.name)
    alone, padded = scores.score.unflatten(0, (-1, 2)).unbind(1)  # (rows, 3)
    moves = (alone - padded)[:, 1:].square().nanmean().sqrt()  # of what is shown in both
    judge.noise = moves.nan_to_num().item()
    say_once(f"judge {judge.name}: a score moves by {moves:.1g} with what is asked beside it")
    untouched, right, _ = alone.nanmean(0)
    if examples and judge.settings.judge_check and not right > untouched:
        raise BadInput(
            f"{judge.name}: scores right edits {right:.2f}, untouched sources {untouched:.2f}; "
            "take another judge or --judge_prompt, or --no_judge_check"
        )


# ---------------------------------------------------------------- what a judge writes for a dataset

ASK_REQUIREMENT = """A picture is to be edited by this instruction: {prompt}
In one or two sentences, say what a good edit of this very picture must show and what must stay as
it is, so that somebody who compares the two pictures can check it. Write these sentences alone."""
ASK_CHECKLIST = """A picture is to be edited by this instruction: {prompt}
Write questions for somebody who compares this very picture with its edit. A good edit gets a yes to
each. One to three ask whether what was wanted is done, one to three whether what nobody mentioned
is still as it was. Write each on a line of its own, as "done: question" or "kept: question".
Write these lines alone."""
ASK_EDITS = """Look at this picture. What would people want to have edited in it? Write one
instruction of each of these kinds: {kinds}. Speak only of what is to be seen. Write a JSON list
alone, with an object for each: [{"task": "the kind", "instruction": "one or two sentences",
"requirement": "what a good edit must show, and what must stay as it is"}, ...]"""
ASK_POSSIBLE = """A picture is to be edited by this instruction: {prompt}
Is everything that the instruction takes for given to be seen in this very picture, so that it can
be done here? Answer yes or no, nothing else."""
MIX = {  # percent of the paper's training rows, for the kinds that one picture is enough for
    "replace": 21,
    "adjust": 18.5,
    "remove": 15,
    "background": 11,
    "hybrid": 9,
    "action": 7,
    "text": 7,
    "extract": 2,
}
LIKE = 0.9  # likeness of two instructions for one picture, of which the second is left out
HELD_OUT = 10  # one row in so many is for test.jsonl


@dataclass(frozen=True)
class WriterSettings(JudgeSettings):
    """What a judge is to write for a dataset."""

    pictures: str = setting("", "Folder of the pictures to propose edits for; also the first word.")
    dataset: str = setting("", "The dataset's folder; also the last word.")
    form: Literal["requirement", "checklist"] = setting(
        "requirement", "What each row gets: sentences, or yes/no questions."
    )
    tasks: list[str] = setting([], "Kinds of edits, equally often. [the paper's, in its mix]")
    per_picture: int = setting(3, "Instructions for a picture.", at_least=1)


def _asked_once(judge, folder, left_out):
    """ask(text, path, ...): what the judge says of pictures; "" where it says nothing, and then the
    cause is added to the list `left_out`.

    The folder keeps each answer as it comes, in a file that is called by the content of what was
    asked: none is paid for twice, whatever stops a run.
    """

    def ask(text, *paths):
        try:
            pictures = list(map(load_image, paths))
            # not by paths: another picture may have come to lie there, or the folder have moved
            asked = repr([judge.name, text, *map(Image.Image.tobytes, pictures)])
            file = folder / ".judge_said" / hashlib.sha256(asked.encode()).hexdigest()
            if file.exists():
                return file.read_text("utf-8")
            said = judge.reply(text, pictures).said()
        except (JudgeFailure, BadInput) as failure:
            left_out.append(str(failure))
            return ""
        with whole_file(file) as part:
            part.write_bytes(said.encode())
        return said

    return ask


def _at_once(function, values):
    """[function(value), ...], many at a time: the judge bounds its requests itself."""
    # Unlike those of ThreadPoolExecutor its threads do not hold up the end after Ctrl-C.
    with ThreadPool(64) as pool:
        return list(tqdm(pool.imap(function, values), total=len(values)))


def _line_of(text):
    return " ".join(text.split())


def _checklist_in(reply):
    """The questions in a reply; [] unless some are about doing and some about keeping."""
    found = re.findall(r"(?im)^\W*(done|kept):\W*(.+\?)", reply)
    kinds = {kind.lower() for kind, _ in found}
    return [question for _, question in found] if len(kinds) > 1 else []


def write_requirements(settings: WriterSettings):
    """Lets a judge write the `requirement` or the `checklist` of every row that has none."""
    folder = Path(settings.dataset)
    form = settings.form
    template = ASK_REQUIREMENT
    read = _line_of
    if form == "checklist":
        template = ASK_CHECKLIST
        read = _checklist_in
    rows_of = {split: read_rows(folder, split) for split in SPLITS if split_file(folder, split)}
    if not rows_of:
        raise BadInput(f"{folder}: holds neither train.jsonl nor test.jsonl; name a dataset folder")
    # A folder that cannot be written is noticed before a model is loaded.
    with locked(folder), closing(load_judge(settings)) as judge:
        failed = []
        ask = _asked_once(judge, folder, failed)

        def written(row):
            if row.get(form):
                return row[form]
            reply = ask(template.replace("{prompt}", row["prompt"]), *row["images"])
            if reply and not read(reply):
                failed.append("a reply without questions of both kinds")
            return read(reply)

        for split, rows in rows_of.items():
            file = split_file(folder, split)
            lines = read_json_lines(file)
            answers = _at_once(written, rows)
            if read_json_lines(file) != lines:
                raise BadInput(f"{file}: was edited meanwhile; start again, nothing is asked twice")
            for (_, line), answer in zip(lines, answers, strict=True):
                if answer:
                    line[form] = answer
            write_json_lines(file, [line for _, line in lines])
            print(f"{file}: {sum(map(bool, answers))} of {len(rows)} rows have a {form}")
    print(f"failed: {dict(Counter(failed))}")


def propose(settings: WriterSettings):
    """Lets a judge look at the pictures of a folder, and makes a dataset of what it proposes."""
    source = Path(settings.pictures)
    folder = Path(settings.dataset)
    mix = dict.fromkeys(map(str.lower, settings.tasks), 1) or MIX
    endings = tuple(Image.registered_extensions())
    pictures = {  # by content, so that two copies are one
        content: name
        for name, content in file_hashes(source).items()
        if name.lower().endswith(endings)
    }
    if not pictures:
        raise BadInput(f"{source}: holds no pictures; name a folder that does")
    left_out = []
    with locked(folder):
        # A finished folder, and one with other things: before a judge is loaded and paid.
        refuse_others(folder, {"source": "another"})
        with closing(load_judge(settings)) as judge:
            ask = _asked_once(judge, folder, left_out)

            def rows_for(content):
                picture = source / pictures[content]
                draw = random.Random(content)
                kinds = draw.choices(list(mix), mix.values(), k=settings.per_picture)
                reply = ask(ASK_EDITS.replace("{kinds}", ", ".join(kinds)), picture)
                rows = []
                for row in _rows_in(reply, kinds, left_out):
                    said = ask(ASK_POSSIBLE.replace("{prompt}", row["instruction"]), picture)
                    if re.match(r"(?i)\W*yes\b", said):
                        rows.append(row | {"image": pictures[content]})
                    elif said:
                        left_out.append("not possible there")
                return rows

            rows = sum(_at_once(rows_for, sorted(pictures)), [])
    found = f"{source}: {len(rows)} rows; left out: {dict(Counter(left_out))}"
    if not rows:
        raise BadInput(f"{found}; see to the judge")
    print(found)
    table = folder / ".judge_said" / "proposed.jsonl"
    write_json_lines(table, rows)
    import_dataset(
        ImportSettings(
            str(table),
            settings.dataset,
            pictures=settings.pictures,
            prompt="instruction",
            task="task",
            requirement="requirement",
            test=len(rows) // HELD_OUT or 1,
        )
    )


def _rows_in(reply, tasks, left_out):
    """The rows in a judge's reply about a picture; why others are left out goes to `left_out`."""
    rows = []
    # Each object for itself: one that is cut short costs no other.
    for part in re.findall(r"\{[^{}]*\}", reply):
        try:
            found = json.loads(part, strict=False)
            row = {key: _line_of(found[key]) for key in ("instruction", "task", "requirement")}
        except Exception:  # the reply may be any JSON
            row = {"task": ""}
        row["task"] = row["task"].lower()
        known = [other["instruction"] for other in rows]
        if row["task"] not in tasks or not all(row.values()):
            left_out.append("incomplete or of another kind")
        elif get_close_matches(row["instruction"], known, 1, LIKE):  # it would be learnt twice
            left_out.append("like another")
        else:
            rows.append(row)
    if not rows:
        left_out.append("pictures without a usable instruction")
    return rows


# ---------------------------------------------------------------- the command


@dataclass(frozen=True, kw_only=True)
class Settings(JudgeSettings):
    """One edit to be judged."""

    source: list[str] = setting(MISSING, "The source picture, or several.")
    edited: str = setting(MISSING, "The edited picture.")
    prompt: str = setting(MISSING, "The instruction.")


def main(argv: list[str] | None = None):
    command, *words = argv or sys.argv[1:] or ["no command"]
    if command == "requirements":
        named = ["--dataset", *words]
        return write_requirements(parse_settings(WriterSettings, named, write_requirements.__doc__))
    if command == "propose":
        named = ["--pictures", *words[:1], "--dataset", *words[1:]]
        return propose(parse_settings(WriterSettings, named, propose.__doc__))
    settings = parse_settings(Settings, argv, Settings.__doc__, judge=TOY)
    sources = list(map(load_image, settings.source))
    edit = load_image(settings.edited)
    judge = load_judge(settings)
    scores = judge.score(vars(settings), sources, [edit])  # they hold all that a row has
    refuse_silent_judge(scores, judge.name, least=0)
    facts = {"score": scores.score, "mass on answers": scores.mass, **scores.terms}
    for name, value in facts.items():
        print(f"{name} {value.item():.4f}")
    print(f"it says {scores.words[0]}")


if __name__ == "__main__":
    run_script(main)
