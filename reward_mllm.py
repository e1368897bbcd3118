"""The judge: an untrained multimodal LLM, local or served, that scores an edit by the logits of its answer.

    python reward_mllm.py --source a.png --edited b.png --prompt "remove the red circle" [--judge local:MODEL]
    python reward_mllm.py requirements DIR --judge ...   # writes what a good edit of each row must show

It sees instruction, source and edit and is told to answer with one digit. The score is the mean of the digits under
their probabilities at the first answer position, over 5 (UniWorld-V2, arXiv:2510.16888); the paper's other strategies,
more questions about an edit and plain terms are settings.

Shapes: n edits, B of them in one forward, V words of the vocabulary.

Departures from the authors' released code:
1. The answers' token ids are asked of the tokenizer; in a server's reply answers are found by their text.
2. How much probability the judge puts on answers at all (the mass) comes with every score.
3. A score that cannot be had is NaN with its cause; it is never 0, and it takes no other score with it.
4. Every edit is judged under its own row's instruction, on the pixels themselves: PNG over the wire, no JPEG, no pickle.
5. Instruction and source of a group are processed once, not once an edit.
"""

import ast
import base64
import functools
import inspect
import io
import itertools
import json
import operator
import os
import random
import re
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import requests
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText
from transformers.hf_argparser import HfArg
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from data_prep import (
    BadInput,
    load_image,
    load_processor,
    parse_settings,
    read_rows,
    run_script,
    seeded,
)

TOY = "local:data/toy/judge"
STRATEGIES = ("logits", "sampled", "yes_no", "logits_cot", "sampled_cot", "yes_no_cot")

# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class JudgeSettings:
    judge: str = HfArg(
        default="local:Qwen/Qwen2.5-VL-7B-Instruct",
        help="local:MODEL or http://HOST:PORT/v1[,...].",
    )
    judge_model: str = HfArg(
        default="", help="A served judge's name. [the first one that the server lists]"
    )
    judge_strategy: Literal[STRATEGIES] = HfArg(
        default="logits",
        help="Expected digit, a sampled digit, yes against no; _cot: thinks first.",
    )
    judge_formula: str = HfArg(
        default="execution", help="The reward: execution * (0.6 + 0.4 * consistency), ..."
    )
    judge_prompt: list[str] = HfArg(
        default_factory=list, help="FILE or ASPECT=FILE: texts in place of ours."
    )
    judge_thought: int = HfArg(default=512, help="Tokens of a chain of thought, at most.")
    trust_remote_code: bool = HfArg(
        default=False, help="Run code that comes with a model, judge or editor."
    )
    judge_device: str = HfArg(default="", help="Where a local judge runs. [beside the editor]")
    judge_batch: int = HfArg(default=16, help="Edits in one forward of a local judge.")
    judge_in_flight: int = HfArg(default=16, help="Requests at a time to each server.")
    judge_logprobs: int = HfArg(default=20, help="Likeliest words that a server is asked for.")
    judge_timeout: float = HfArg(default=60.0, help="Seconds that a server may take for an answer.")
    judge_patience: float = HfArg(
        default=120.0, help="Seconds to go on trying, where that may help."
    )

    def __post_init__(self):
        for name in (
            "judge_thought",
            "judge_batch",
            "judge_in_flight",
            "judge_logprobs",
            "judge_timeout",
        ):
            if getattr(self, name) <= 0:
                raise BadInput(f"--{name} {getattr(self, name)}: give a value above 0")


# ---------------------------------------------------------------- what is asked

THINK = "Do not rate it yet. First say in a few sentences what was asked, what changed, and what should have stayed."
DIGIT = "Rate it from 0 (not at all, or the picture is spoiled) to 5 (completely). Answer with one digit, nothing else."
YES_NO = "Is it so, completely? Answer yes or no, nothing else."
DIGITS = {
    "0": 0.0,
    "1": 0.2,
    "2": 0.4,
    "3": 0.6,
    "4": 0.8,
    "5": 1.0,
}  # the answers that count, and what they are worth
WORDS = {"yes": 1.0, "Yes": 1.0, "no": 0.0, "No": 0.0}
LAYOUT = "You check edits of pictures. The last picture is an edited version of those before.\nInstruction: {prompt}\n"
ASIDE = LAYOUT + "Leave aside whether the instruction was carried out. "
PROMPTS = {
    "execution": LAYOUT
    + "A good edit shows: {requirement}\nThe question is how well the instruction was carried out "
    "while everything it does not mention stayed as it was. {answer}",
    "consistency": ASIDE
    + "The question is how far all that it does not ask to change, such as other objects, faces, "
    "background, layout and style, is the same as before. {answer}",
    "quality": ASIDE
    + "The question is how natural the last picture looks: sharp, well lit, free of seams, smears and "
    "noise, with no broken shapes, hands or letters. {answer}",
}


def read_prompts(settings):
    """Every aspect's prompt: ours, the judge's own judge_prompt.txt for `execution`, or the files that were named."""
    own = Path(settings.judge.removeprefix("local:")) / "judge_prompt.txt"
    files = {"execution": own} if settings.judge.startswith("local:") and own.is_file() else {}
    for entry in settings.judge_prompt:
        name, file = re.fullmatch(r"(?:(\w+)=)?(.*)", entry).groups()
        files[name or "execution"] = Path(file)
    prompts = dict(PROMPTS)
    for name, file in files.items():
        if not file.is_file():
            raise BadInput(f"--judge_prompt {file}: no such file; name a text file")
        prompts[name] = file.read_text(encoding="utf-8")
        if "{prompt}" not in prompts[name]:
            raise BadInput(f"{file}: has no {{prompt}}; write it where the instruction goes")
    return prompts


# ---------------------------------------------------------------- what a good edit shows

REQUIREMENTS = {  # what a good edit must show, by the names of its task in ImgEdit, GEdit and training sets
    "add subject_add": "the new thing, once, where it was asked for, in fitting size and light, hiding nothing without need.",
    "remove subject_remove": "the thing gone with its shadow and reflection; in its place what would plausibly be behind it.",
    "replace subject_replace": "the new thing where the old one was, in fitting size, pose and light, and no trace of the old.",
    "adjust alter": "the named property changed as asked, on all of the named thing and on nothing else; its shape is the same.",
    "color_alter recolour": "the new colour on all of the named thing, its shading and texture kept, and on nothing else.",
    "material_alter": "the named thing plainly made of the new material, with fitting sheen and texture; its shape is the same.",
    "background background_change": "the new background all around, meeting an unchanged foreground at clean edges.",
    "style style_change": "the new style in every part of the picture; the scene, its things and places are still the same.",
    "tone_transfer": "the new light, weather, season or mood over the whole picture; things and places are the same.",
    "action motion_change": "the new pose, movement or expression, with sound anatomy; the same person or animal as before.",
    "ps_human": "the person changed as asked and still plainly the same person, with natural skin, face and hands.",
    "text text_change": "the new text, spelled exactly as asked, in the old one's place and manner; other text is the same.",
    "hybrid compose": "every one of the changes that were asked for, each of them complete, and no other.",
    "extract": "the named thing alone, whole and unaltered, on a plain background.",
    "reference": "what was asked for of the reference picture, recognisably the same; the rest is that of the edited picture.",
    "red_box": "the change made to what the red box marks and nowhere else, and the box itself gone.",
    "": "the change that was asked for, complete and natural, and no other change.",
}


def requirement_of(row):
    """What a good edit of a row must show: the row's own `requirement`, or the default text of its `task`."""
    task = str(row.get("task") or "").strip().lower().replace("-", "_").replace(" ", "_")
    own = next(
        (text for names, text in REQUIREMENTS.items() if task in names.split()), REQUIREMENTS[""]
    )
    return row.get("requirement") or own


# ---------------------------------------------------------------- terms that need no judge

PLAIN_TERMS = {
    "pixel_distance": (0, 1),
    "brightness_drift": (-1, 1),
    "sharpness_drift": (-1, 1),
}  # and their ranges


def plain_terms(sources, edits):
    """Terms that need no judge, to watch for copying, blur and drift: a dict name -> (n,), all 0 for an untouched source.

    pixel_distance: mean absolute difference in [0, 1]; brightness_drift: edit's mean minus source's; sharpness_drift:
    (edit - source) / (edit + source) of the mean absolute Laplacian, -1 all blurred. Of a row's first source picture.
    """

    @functools.lru_cache(4)  # a group's source is looked at once
    def seen(number, size):
        picture = pictures[number].convert("RGB")
        pixels = np.asarray(
            picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS),
            np.float32,
        )
        light = pixels.mean(2) / 255
        bend = (
            4 * light[1:-1, 1:-1]
            - light[2:, 1:-1]
            - light[:-2, 1:-1]
            - light[1:-1, 2:]
            - light[1:-1, :-2]
        )
        return pixels / 255, light.mean(), np.abs(bend).mean() + 1e-6

    pictures, rows = (
        {id(picture): picture for picture in (*edits, *(shown[0] for shown in sources))},
        [],
    )
    for shown, edit in zip(sources, edits):
        (before, dark, dull), (after, light, sharp) = (
            seen(id(picture), edit.size) for picture in (shown[0], edit)
        )
        rows.append((np.abs(after - before).mean(), light - dark, (sharp - dull) / (sharp + dull)))
    return dict(
        zip(PLAIN_TERMS, torch.tensor(np.array(rows, np.float32).reshape(-1, len(PLAIN_TERMS))).T)
    )


# ---------------------------------------------------------------- the score


class Scores(NamedTuple):
    score: torch.Tensor  # (n,) in [0, 1], NaN where the judge gave none
    mass: (
        torch.Tensor
    )  # (n,) probability of all answers that count, the least over the aspects; NaN where not known
    terms: dict = {}  # name -> (n,): each aspect's score, and the plain terms
    causes: list = ()  # n strings: why there is no score; "" where there is one
    words: list = ()  # n strings: what the judge would most likely say; "" where not known
    shares: list = ()  # n tuples: probability of each answer that counts, among them, of the first aspect; () where not known

    @staticmethod
    def missing(n, cause):
        """The Scores of n edits that could not be judged."""
        none = torch.full((n,), torch.nan)
        return Scores(none, none, {}, [cause] * n, [""] * n)

    @staticmethod
    def stack(groups):
        """G groups' Scores as one, (G, n); its causes are those of all G n edits."""
        known = {}
        for group in groups:
            known |= group.terms
        nothing = torch.full_like(groups[0].score, torch.nan)
        terms = {name: torch.stack([g.terms.get(name, nothing) for g in groups]) for name in known}
        causes = []
        for group in groups:
            causes += group.causes
        score = torch.stack([group.score for group in groups])
        return Scores(score, torch.stack([group.mass for group in groups]), terms, causes)


class Answer(NamedTuple):
    score: float = torch.nan
    mass: float = torch.nan
    cause: str = ""
    words: str = ""
    shares: tuple = ()


class JudgeFailure(Exception):
    """No answer; `cause` is short and the same for the same fault, so that it can be counted."""

    def __init__(self, cause, may_help=False, wait=0.0):
        super().__init__(cause)
        self.cause, self.may_help, self.wait = (
            cause,
            may_help,
            wait,
        )  # may_help: trying again, after `wait` seconds


def expected_score(logits, token_ids, values=tuple(DIGITS.values())):
    """Expected value and probability mass of the answers, from the logits at the first answer position.

    logits: (B, V); token_ids: those of "0" to "5", or of other answers, whose values in [0, 1] are given. Returns score
    (B,) in [0, 1] and mass (B,) in [0, 1], float32; both NaN in a row whose logits are not finite. Source: UniWorld-V2
    (arXiv:2510.16888), Sec. 2.2.
    """
    assert logits.ndim == 2, f"logits are (B, V), not {tuple(logits.shape)}"
    assert len(token_ids) == len(values), f"{len(values)} answers are scored, not {len(token_ids)}"
    logits = logits.float()
    logits = logits.masked_fill(
        ~logits.isfinite().all(1, keepdim=True), torch.nan
    )  # spoils its own row alone
    answers = logits[:, torch.as_tensor(token_ids, device=logits.device)]  # (B, answers)
    mass = (answers.logsumexp(1) - logits.logsumexp(1)).exp()
    return answers.softmax(1) @ torch.tensor(values, device=logits.device), mass


def answer_token_ids(tokenizer, texts=tuple(DIGITS)):
    """The token ids of the answers, in their order; BadInput when one of them is not a token of its own."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for text, pieces in zip(texts, ids):
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id or ids.count(pieces) > 1:
            raise BadInput(
                f"{tokenizer.name_or_path}: the answer {text} is not one token of its own ({pieces}); take "
                "a judge whose tokenizer keeps it apart, or another --judge_strategy"
            )
    return [pieces[0] for pieces in ids]


def read_choice(choice, answers=DIGITS, sampled=False):
    """The Answer in one choice of a chat completion; answers are found by their text among the likeliest first words."""
    try:
        message, first = choice["message"], choice["logprobs"]["content"][0]
        p = {
            str(word["token"]): float(np.exp(float(word["logprob"])))
            for word in (first, *first["top_logprobs"])
        }
    except (KeyError, TypeError, IndexError, ValueError):
        return Answer(cause="no logprobs in the reply")
    words = ", ".join(f"{word!r} {p[word]:.0%}" for word in sorted(p, key=p.get, reverse=True)[:5])
    if not all(
        0 <= value < 1.01 for value in p.values()
    ):  # NaN is neither; e to the minus infinity is a sound 0
        return Answer(cause="logprobs that are not finite", words=words)
    if (
        message.get("reasoning_content")
        or message.get("reasoning")
        or str(first["token"]).strip().startswith("<think")
    ):
        return Answer(torch.nan, 0.0, "the judge thinks before it answers", words)
    mass = sum(p.get(text, 0.0) for text in answers)
    if sampled:
        said = str(message.get("content")).strip()
        return Answer(
            answers.get(said, torch.nan), mass, "" if said in answers else "sampled no digit", words
        )
    unseen = min(p.values()) * sum(
        text not in p for text in answers
    )  # what unlisted answers may hold at most
    if mass == 0 or unseen > 1e-3 * mass:
        return Answer(torch.nan, mass, "answers missing from top_logprobs", words)
    shares = tuple(p.get(text, 0.0) / mass for text in answers)
    return Answer(
        sum(share * value for share, value in zip(shares, answers.values())),
        mass,
        "",
        words,
        shares,
    )


# ---------------------------------------------------------------- the formula

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
FUNCTIONS = {"min": torch.minimum, "max": torch.maximum, "abs": torch.abs}


def evaluate_formula(node, terms):
    """The value (n,) of a parsed formula; + - * numbers, names of `terms`, min, max and abs; BadInput for all else."""
    match node:
        case ast.Constant(value=int() | float()):
            return torch.tensor(float(node.value))
        case ast.Name(id=name) if name in terms:
            return terms[name]
        case ast.UnaryOp(op=ast.USub()):
            return -evaluate_formula(node.operand, terms)
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            return OPERATORS[type(op)](
                *(evaluate_formula(side, terms) for side in (node.left, node.right))
            )
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS and len(
            node.args
        ) == 2 - (name == "abs"):
            return FUNCTIONS[name](*(evaluate_formula(inner, terms) for inner in node.args))
    raise BadInput(
        f"--judge_formula: {ast.unparse(node)[:80]!r} is not + - * min max abs, a number or a name"
    )


def read_formula(text, prompts):
    """A formula's syntax tree and the aspects it names; BadInput unless it stays within 0 and 1 for all their values."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        names = sorted(
            {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(FUNCTIONS)
        )
        if unknown := [name for name in names if name not in prompts and name not in PLAIN_TERMS]:
            raise BadInput(
                f"--judge_formula: {unknown[0]} is neither an aspect ({', '.join(prompts)}) nor a plain term "
                f"({', '.join(PLAIN_TERMS)}); give it a prompt, --judge_prompt {unknown[0]}=FILE"
            )
        ends, draws = (
            torch.tensor([PLAIN_TERMS.get(name, (0, 1)) for name in names]).float(),
            seeded("formula"),
        )
        place = (
            torch.randint(3, (len(names), 4096), generator=draws) / 2
        )  # of each name's range: low, middle, high
        tried = torch.lerp(ends[:, :1], ends[:, 1:], place)
        values = evaluate_formula(tree, dict(zip(names, tried)))
    except (SyntaxError, ValueError, RecursionError, MemoryError, IndexError):
        raise BadInput(
            f"--judge_formula {text!r}: no formula; write one such as execution * (0.6 + 0.4 * consistency)"
        ) from None
    if not (values.min() >= -1e-6 and values.max() <= 1 + 1e-6):
        raise BadInput(
            f"--judge_formula {text}: goes from {values.min():.2f} to {values.max():.2f}; keep it within 0 and 1"
        )
    return tree, [name for name in names if name not in PLAIN_TERMS]


# ---------------------------------------------------------------- the judge


def chat(turns, pictures):
    """What user and judge said in turn, as messages; `pictures`, parts of a message, stand after the first text."""
    said = [[{"type": "text", "text": turn}] for turn in turns]
    return [
        {"role": ("user", "assistant")[i % 2], "content": said[i] + pictures * (i == 0)}
        for i in range(len(said))
    ]


class Judge:
    """What a local and a served judge share. A backend gives `_answers(questions, pictures)` and `ask`."""

    def __init__(self, settings, *workers):
        self.settings, self.prompts = settings, read_prompts(settings)
        self.formula, self.aspects = read_formula(settings.judge_formula, self.prompts)
        self.pools = [
            ThreadPoolExecutor(number) for number in workers
        ]  # the first for what is submitted
        self.use(settings.judge_strategy)

    def use(self, strategy):
        """Turns to a strategy; BadInput when this judge cannot follow it."""
        self.strategy, self.thinks, self.samples = (
            strategy,
            strategy.endswith("_cot"),
            strategy.startswith("sampled"),
        )
        self.ending, self.answers = (
            (YES_NO, WORDS) if strategy.startswith("yes_no") else (DIGIT, DIGITS)
        )
        for aspect in self.aspects:
            if self.ending == YES_NO and "{answer}" not in self.prompts[aspect]:
                raise BadInput(
                    f"{aspect}'s prompt: has no {{answer}} for --judge_strategy {strategy} to fill; write one"
                )

    def question(self, row, aspect="execution"):
        """The text of an aspect's question about a row: instruction, requirement, and how to answer."""
        filled = {"{prompt}": row["prompt"], "{requirement}": requirement_of(row)}
        filled["{answer}"] = THINK if self.thinks else self.ending
        return re.sub(
            "|".join(map(re.escape, filled)), lambda mark: filled[mark[0]], self.prompts[aspect]
        )

    def score(self, rows, sources, edits):
        """Judges each edit under its own row's instruction: n rows, n lists of source pictures, n edits -> Scores on CPU.

        rows: dicts with `prompt` and perhaps `requirement` and `task`; pictures are PIL.Images. Neighbours with the same
        question and source objects share their forward up to the edit.
        """
        assert len(rows) == len(sources) == len(edits), (
            "one row and one list of sources for each edit"
        )
        n, times = len(edits), len(self.aspects)
        answers = self._answers(
            [self.question(row, aspect) for aspect in self.aspects for row in rows],
            [[*shown, edit] for shown, edit in zip(sources, edits)] * times,
        )
        score, mass = (
            torch.tensor([getattr(a, key) for a in answers]).view(times, n)
            for key in ("score", "mass")
        )
        terms = dict(zip(self.aspects, score)) | plain_terms(sources, edits)
        first = lambda key: [
            next(filter(None, (getattr(a, key) for a in answers[i::n])), "") for i in range(n)
        ]  # noqa: E731
        causes, words = first("cause"), first("words")
        score = evaluate_formula(self.formula, terms).clamp(0, 1)
        return Scores(
            score, mass.amin(0), terms, causes, words, [answer.shares for answer in answers[:n]]
        )

    def submit(self, row, sources, edits):
        """The Future of one group's Scores: the judge works while the caller goes on."""
        return self.pools[0].submit(self.score, [row] * len(edits), [sources] * len(edits), edits)

    def close(self):
        """Forgets what was submitted and has not begun; for a caller that gives up."""
        for pool in self.pools:
            pool.shutdown(wait=False, cancel_futures=True)


def refuse_silent_judge(scores, name, least=0.5):
    """BadInput for a judge that gave no score at all, or whose mass on answers is below `least` on average."""
    causes, words = (
        Counter(filter(None, scores.causes)),
        next(filter(None, scores.words), "nothing"),
    )
    mass = scores.mass[~scores.mass.isnan()]
    if len(mass) and not mass.mean() >= least:
        raise BadInput(
            f"{name}: puts {mass.mean():.1%} of its probability on the answers that count and would rather say "
            f"{words}; take another judge, --judge_strategy or --judge_prompt"
        )
    if scores.score.isnan().all():
        causes = ", ".join(f"{number} x {cause}" for cause, number in causes.most_common(3))
        raise BadInput(f"{name}: gave no score: {causes}; see to the judge")


def check_judge(judge, name, rows):
    """Stops a run whose judge is useless: a silent one, or one that untouched sources please more than right edits.

    Asks about a few rows with a `target`, or, where there is none, only whether it answers. Raises BadInput.
    """
    asked = [row for row in rows if "target" in row][:16] or rows[:4]
    sources = [[load_image(path) for path in row["images"]] for row in asked]
    untouched = judge.score(asked, sources, [pictures[0] for pictures in sources])
    refuse_silent_judge(untouched, name)
    if "target" in asked[0]:
        right = judge.score(asked, sources, [load_image(row["target"]) for row in asked])
        if not right.score.nanmean() > untouched.score.nanmean():
            raise BadInput(
                f"{name}: scores right edits {right.score.nanmean():.2f} and untouched sources "
                f"{untouched.score.nanmean():.2f}; take another judge or another --judge_prompt"
            )


# ---------------------------------------------------------------- a local judge


class LocalJudge(Judge):
    """A multimodal LLM of transformers, on this machine. Raises BadInput when `settings.judge` names none."""

    def __init__(self, settings, device="cpu", dtype=torch.float32):
        model = settings.judge.removeprefix("local:")
        if not Path(model).is_dir() and (
            model.count("/") != 1 or model.startswith((".", "/", "~"))
        ):
            mend = (
                "run python data_prep.py toy first"
                if settings.judge == TOY
                else "name a folder or a hub id owner/name"
            )
            raise BadInput(f"{model}: no such model folder; {mend}")
        try:
            options = {"trust_remote_code": settings.trust_remote_code}
            self.model = (
                AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, **options)
                .to(device)
                .eval()
            )
            self.processor = load_processor(
                PROCESSOR_MAPPING[type(self.model.config)], model, **options
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadInput(
                f"{model}: not a multimodal LLM of transformers ({reason}); name one such as "
                "Qwen/Qwen2.5-VL-7B-Instruct"
            ) from error
        self.model.requires_grad_(False)
        self.processor.tokenizer.padding_side = (
            "left"  # the answer's place is the last one in every row
        )
        options = inspect.signature(self.model.forward).parameters
        # the last place alone, as an index: a slice of 1 is not contiguous, and would read the vocabulary once an edit
        self.last_only = (
            {"logits_to_keep": torch.tensor([-1])} if "logits_to_keep" in options else {}
        )
        self.cache_name = "cache" if "cache" in options else "past_key_values"  # its older name
        self.lock, self._chat = threading.RLock(), functools.lru_cache(1024)(self._chat)
        super().__init__(settings, 1)

    def use(self, strategy):
        super().use(strategy)
        self.token_ids = answer_token_ids(self.processor.tokenizer, tuple(self.answers))
        self.shares_prefix = self._prefix_works()

    def _chat(self, turns, pictures):
        """The chat-formatted text of what user and judge said in turn: instruction first, then `pictures` pictures."""
        messages = chat(turns, [{"type": "image"}] * pictures)
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _inputs(self, texts, pictures):
        inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(
            self.model.device
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _logits(self, texts, pictures, share):
        """(B, V) at the first answer position; with `share`, what comes before the last picture is computed once."""
        heads = [
            text.rpartition(self.processor.image_token)[0] if share else text for text in texts
        ]
        keys = [(head, *map(id, shown[:-1])) for head, shown in zip(heads, pictures)]
        first = [keys.index(key) for key in dict.fromkeys(keys)]
        if not share or len(first) == len(texts):
            return self.model(
                **self._inputs(texts, pictures), **self.last_only, use_cache=False
            ).logits[:, -1]
        owner = torch.tensor(
            [first.index(keys.index(key)) for key in keys], device=self.model.device
        )  # (B,)
        prefix = self._inputs([heads[i] for i in first], [pictures[i][:-1] for i in first])
        rest = self._inputs(
            [text[len(head) :] for text, head in zip(texts, heads)],
            [shown[-1:] for shown in pictures],
        )
        three = hasattr(
            self.model.model, "get_rope_index"
        )  # Qwen's picture tokens have places in three directions
        count = lambda mask: (mask.cumsum(1) - 1).clamp(min=0)  # noqa: E731
        prefix.update({} if three else {"position_ids": count(prefix["attention_mask"])})
        cache = self.model(**prefix, **self.last_only, use_cache=True)[self.cache_name]
        cache.reorder_cache(owner)
        keys = [
            key for key in rest if rest[key].shape == rest["input_ids"].shape
        ]  # what there is of each token
        both = {key: torch.cat([prefix[key][owner], rest[key]], 1) for key in keys}
        places = count(both["attention_mask"])  # (B, length)
        if three:
            kinds = [
                (text, *(picture.size for picture in shown)) for text, shown in zip(texts, pictures)
            ]
            some = [
                kinds.index(kind) for kind in dict.fromkeys(kinds)
            ]  # the places of the rest are as one of these
            grids = prefix["image_grid_thw"].split([len(pictures[i]) - 1 for i in first])
            grids = [
                grid for i in some for grid in (grids[owner[i]], rest["image_grid_thw"][i : i + 1])
            ]
            given = {key: both[key][some] for key in both} | {"image_grid_thw": torch.cat(grids)}
            places, _ = self.model.model.get_rope_index(**given)
            places = places[:, [some.index(kinds.index(kind)) for kind in kinds]]  # (3, B, length)
        rest.update(
            {
                "attention_mask": both["attention_mask"],
                self.cache_name: cache,
                "position_ids": places[..., prefix["input_ids"].shape[1] :],
            }
        )
        return self.model(**rest, **self.last_only).logits[:, -1]

    def _expected(self, logits):
        return expected_score(logits, self.token_ids, tuple(self.answers.values()))

    @torch.no_grad()
    def _prefix_works(self):
        """Whether a shared prefix leaves this model's scores as they are, tried on two questions and four pictures."""
        shown = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "white", "black")]
        asked = [
            self.question({"prompt": prompt}, self.aspects[0])
            for prompt in ("0 1 2", "0 1 2", "5", "5")
        ]
        texts = [self._chat((question,), 2) for question in asked]
        pictures = [[shown[i // 2], shown[3 - i]] for i in range(4)]
        try:
            whole, shared = (
                self._expected(self._logits(texts, pictures, share))[0] for share in (False, True)
            )
        except (ValueError, RuntimeError, TypeError, KeyError, AttributeError):
            return False
        return torch.allclose(
            whole, shared, atol=1e-5 if self.model.dtype == torch.float32 else 0.02
        )

    def _generate(self, turns, pictures, max_tokens):
        inputs = self._inputs(
            [self._chat(said, len(shown)) for said, shown in zip(turns, pictures)], pictures
        )
        made = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
        return self.processor.tokenizer.batch_decode(made, skip_special_tokens=True)

    def _answers(self, questions, pictures):
        """Batches of neighbours in length; a group stays together."""
        size = lambda i: (sum(p.width * p.height for p in pictures[i]), len(questions[i]))  # noqa: E731
        order, found = sorted(range(len(questions)), key=size), {}
        with self.lock, torch.no_grad():
            for first in range(0, len(order), self.settings.judge_batch):
                part = order[first : first + self.settings.judge_batch]
                found |= zip(
                    part, self._safely([(questions[i],) for i in part], [pictures[i] for i in part])
                )
        return [found[i] for i in range(len(questions))]

    def _safely(self, turns, pictures):
        """An Answer for each; a batch that the model refuses is halved until the refused picture stands alone."""
        try:
            if self.thinks and len(turns[0]) == 1:
                thoughts = self._generate(turns, pictures, self.settings.judge_thought)
                turns = [
                    (question, thought, self.ending)
                    for (question,), thought in zip(turns, thoughts)
                ]
            texts = [self._chat(said, len(shown)) for said, shown in zip(turns, pictures)]
            logits = self._logits(texts, pictures, self.shares_prefix)
        except (ValueError, RuntimeError) as error:
            if len(turns) == 1:
                return [Answer(cause=f"refused: {error!s:.80}")]
            half = len(turns) // 2
            return self._safely(turns[:half], pictures[:half]) + self._safely(
                turns[half:], pictures[half:]
            )
        score, mass = self._expected(logits)
        causes = ["logits that are not finite" if bad else "" for bad in score.isnan().tolist()]
        p, ids = logits.float().softmax(1).topk(min(5, logits.shape[1]))
        said = [self.processor.tokenizer.batch_decode(row[:, None]) for row in ids]
        words = [
            ", ".join(f"{word!r} {share:.0%}" for word, share in zip(*row))
            for row in zip(said, p.tolist())
        ]
        for i in range(len(turns) * self.samples):
            draws = seeded(zlib.crc32(pictures[i][-1].tobytes()))
            word = torch.multinomial(
                logits[i].float().nan_to_num().softmax(0).cpu(), 1, generator=draws
            ).item()
            score[i] = dict(zip(self.token_ids, self.answers.values())).get(word, torch.nan)
            causes[i] = causes[i] or "sampled no digit" * bool(score[i].isnan())
        shares = map(tuple, logits[:, self.token_ids].float().softmax(1).tolist())
        return list(map(Answer, score.tolist(), mass.tolist(), causes, words, shares))

    def ask(self, text, pictures, max_tokens=1024):
        """The reply to one message of `text` and PIL pictures, at temperature 0; JudgeFailure where there is none."""
        try:
            with self.lock, torch.no_grad():
                return self._generate([(text,)], [pictures], max_tokens)[0]
        except (ValueError, RuntimeError) as error:
            raise JudgeFailure(f"refused: {error!s:.80}") from error


# ---------------------------------------------------------------- a served judge


class ServedJudge(Judge):
    """One OpenAI-compatible server, or several with the same model. The key comes from JUDGE_API_KEY or OPENAI_API_KEY.

    Raises BadInput when a server does not answer or does not have the model.
    """

    def __init__(self, settings):
        self.urls = [url.strip().rstrip("/") for url in settings.judge.split(",")]
        super().__init__(settings, 64, settings.judge_in_flight * len(self.urls))
        self.key = os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
        self.session = requests.Session()
        self.session.mount(
            "http", requests.adapters.HTTPAdapter(len(self.urls), settings.judge_in_flight)
        )
        self.session.headers.update({"Authorization": f"Bearer {self.key}"} if self.key else {})
        self.load, self.rest, self.free = (
            dict.fromkeys(self.urls, 0),
            dict.fromkeys(self.urls, 0.0),
            threading.Condition(),
        )
        self.name = settings.judge_model
        for url in self.urls:
            try:
                names = [model["id"] for model in self._once(url + "/models")["data"]]
            except (JudgeFailure, KeyError, TypeError) as failure:
                reason = getattr(failure, "cause", "it lists no models")
                raise BadInput(
                    f"judge {url}: {reason}; start the server, or correct the address"
                ) from None
            self.name = self.name or (names or [""])[0]
            if self.name not in names:
                raise BadInput(
                    f"judge {url}: serves {', '.join(names) or 'nothing'}, not {self.name}; see --judge_model"
                )

    def _once(self, url, body=None):
        """One request: the reply's JSON, or a JudgeFailure that knows whether trying again may help."""
        try:
            reply = self.session.request(
                "POST" if body else "GET", url, json=body, timeout=self.settings.judge_timeout
            )
        except requests.RequestException as error:
            kinds = {requests.Timeout: "timeout", requests.ConnectionError: "no connection"}
            cause = next(
                (kinds[kind] for kind in kinds if isinstance(error, kind)), "a broken reply"
            )
            raise JudgeFailure(cause, may_help=True) from None
        if reply.status_code != 200:
            again = reply.status_code in (408, 425, 429) or reply.status_code >= 500
            said = (
                ""
                if again
                else " " + " ".join(reply.text.split())[:120].replace(self.key or "\0", "***")
            )
            wait = reply.headers.get("Retry-After", "")
            raise JudgeFailure(
                f"HTTP {reply.status_code}{said}", again, float(wait) if wait.isdigit() else 0.0
            )
        try:
            return reply.json()
        except ValueError:
            raise JudgeFailure("a reply that is not JSON", may_help=True) from None

    def _take(self):
        """The least loaded server that did not just fail, as soon as it has room."""
        with self.free:
            while True:
                awake = [
                    url for url in self.urls if self.rest[url] <= time.monotonic()
                ] or self.urls
                url = min(awake, key=self.load.get)
                if self.load[url] < self.settings.judge_in_flight:
                    self.load[url] += 1
                    return url
                self.free.wait(1.0)

    def _complete(self, turns, urls, **options):
        """The one choice of a chat completion; tries again, ever more slowly, for judge_patience seconds."""
        messages = chat(turns, [{"type": "image_url", "image_url": {"url": url}} for url in urls])
        body = {"model": self.name, "messages": messages, **options}
        deadline = time.monotonic() + self.settings.judge_patience
        for attempt in itertools.count():
            url = self._take()
            try:
                reply = self._once(url + "/chat/completions", body)
                break
            except JudgeFailure as failure:
                wait = max(failure.wait, min(2**attempt, 16) * random.uniform(0.5, 1))
                if not failure.may_help or time.monotonic() + wait > deadline:
                    raise
                self.rest[url] = time.monotonic() + wait
            finally:
                with self.free:
                    self.load[url] -= 1
                    self.free.notify()
            time.sleep(wait)
        match reply:
            case {"choices": [{"message": {}} as choice]}:
                return choice
            case {"choices": [*choices]}:
                raise JudgeFailure(
                    f"{len(choices)} choices instead of 1"
                    if len(choices) != 1
                    else "a choice without message"
                )
        raise JudgeFailure("no choices in the reply")

    def _reply(self, turns, urls, max_tokens):
        reply = self._complete(turns, urls, max_tokens=max_tokens, temperature=0)["message"].get(
            "content"
        )
        if not reply:
            raise JudgeFailure("an empty reply")
        return reply

    def ask(self, text, pictures, max_tokens=1024):
        """The reply to one message of `text` and PIL pictures, at temperature 0; JudgeFailure where there is none."""
        return self._reply([text], list(map(png_url, pictures)), max_tokens)

    def _answers(self, questions, pictures):
        sources = {id(picture): picture for shown in pictures for picture in shown[:-1]}
        sources = {key: png_url(picture) for key, picture in sources.items()}  # once a group

        def answer(question, shown):
            try:
                turns, urls = (
                    [question],
                    [*(sources[id(picture)] for picture in shown[:-1]), png_url(shown[-1])],
                )
                if self.thinks:
                    turns += [self._reply(turns, urls, self.settings.judge_thought), self.ending]
                seed = {"seed": zlib.crc32(shown[-1].tobytes()) >> 1} if self.samples else {}
                choice = self._complete(
                    turns,
                    urls,
                    max_tokens=1,
                    temperature=1,
                    logprobs=True,
                    top_logprobs=self.settings.judge_logprobs,
                    **seed,
                )
                return read_choice(choice, self.answers, self.samples)
            except JudgeFailure as failure:
                return Answer(cause=failure.cause)

        return list(self.pools[1].map(answer, questions, pictures))


def png_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def load_judge(settings, device=None, dtype=torch.bfloat16):
    """The judge that settings.judge names: local:MODEL or http://host:port/v1[,...]. BadInput when it cannot serve.

    device: where a local judge runs unless settings.judge_device says so, None for a GPU if there is one; dtype: its
    precision there; float32 on a CPU.
    """
    if settings.judge.startswith(("http://", "https://")):
        return ServedJudge(settings)
    if not settings.judge.startswith("local:") or settings.judge == "local:":
        raise BadInput(
            f"judge {settings.judge!r}: not of the form local:MODEL or http://host:port/v1; name one such as "
            "local:Qwen/Qwen2.5-VL-7B-Instruct"
        )
    device = torch.device(
        settings.judge_device or device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    return LocalJudge(settings, device, torch.float32 if device.type == "cpu" else dtype)


# ---------------------------------------------------------------- does it agree with people?


# ---------------------------------------------------------------- what a judge writes for a dataset

ASK_REQUIREMENT = """A picture is to be edited by this instruction: {prompt}
In one or two sentences, say what a good edit of this very picture must show and what must stay as it is, so that somebody
who compares the two pictures can check it. Write these sentences alone."""


def write_requirements(argv, part=32):
    """Lets a judge write the `requirement` of every row that has none; what is there stays, so a killed call is resumed."""
    if not argv or argv[0].startswith("--"):
        raise BadInput(
            "requirements: names no folder; write python reward_mllm.py requirements DIR --judge ..."
        )
    folder, judge = (
        Path(argv[0]),
        load_judge(parse_settings(JudgeSettings, argv[1:], description=write_requirements.__doc__)),
    )

    def ask(row):
        try:
            pictures = [load_image(path) for path in row["images"]]
            reply = judge.ask(ASK_REQUIREMENT.replace("{prompt}", row["prompt"]), pictures, 1024)
            return " ".join(reply.rpartition("</think>")[2].split()), "an empty reply"
        except JudgeFailure as failure:
            return "", failure.cause

    for split in ("train", "test"):
        file = next(
            (
                folder / f"{split}{end}.jsonl"
                for end in ("", "_metadata")
                if (folder / f"{split}{end}.jsonl").is_file()
            ),
            None,
        )
        if file is None:
            continue
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        todo, causes = (
            [
                (i, row)
                for i, row in enumerate(read_rows(folder, split))
                if not row.get("requirement")
            ],
            Counter(),
        )
        with ThreadPoolExecutor(part) as pool:
            for first in tqdm(range(0, len(todo), part), desc=file.name):
                for (i, _), (text, cause) in zip(
                    todo[first:], pool.map(ask, [row for _, row in todo[first : first + part]])
                ):
                    causes.update([] if text else [cause])
                    lines[i] = (
                        json.dumps(json.loads(lines[i]) | {"requirement": text}, ensure_ascii=False)
                        if text
                        else lines[i]
                    )
                whole = file.with_name(f".{file.name}.part")
                whole.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
                whole.replace(file)
        print(
            f"{file}: {len(todo) - causes.total()} requirements written, {len(lines) - len(todo)} kept"
            + "".join(f", {number} failed: {cause}" for cause, number in causes.items())
        )


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Settings(JudgeSettings):
    source: list[str] = HfArg(default_factory=list, help="The source picture, or several.")
    edited: str = HfArg(default="", help="The edited picture.")
    prompt: str = HfArg(default="", help="The instruction.")
    requirement: str = HfArg(default="", help="What a good edit must show.")
    task: str = HfArg(default="", help="The kind of edit, for its default requirement.")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["requirements"]:
        return write_requirements(argv[1:])
    settings = parse_settings(Settings, argv, description=__doc__.splitlines()[0], judge=TOY)
    for name in ("source", "edited", "prompt"):
        if not getattr(settings, name):
            raise BadInput(
                f"--{name} is missing; give the source picture, the edited picture and the instruction"
            )
    sources, edit = [load_image(path) for path in settings.source], load_image(settings.edited)
    row = {"prompt": settings.prompt, "requirement": settings.requirement, "task": settings.task}
    judge = load_judge(settings)
    scores = judge.score([row], [sources], [edit])
    refuse_silent_judge(scores, settings.judge, least=0)
    print(
        f"score {scores.score.item():.4f}   mass on answers {scores.mass.item():.4f}   it would say {scores.words[0]}"
    )
    print(
        "   ".join(f"p({text}) {share:.4f}" for text, share in zip(judge.answers, scores.shares[0]))
    )
    print("   ".join(f"{name} {value.item():.4f}" for name, value in scores.terms.items()))


if __name__ == "__main__":
    run_script(main)
