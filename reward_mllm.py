"""The judge: an untrained multimodal LLM, local or served, that scores an edit by the logits of its answer.

    python reward_mllm.py --source a.png --edited b.png --prompt "remove the red circle" [--judge local:MODEL]
    python reward_mllm.py agree FILE.jsonl --judge http://localhost:8000/v1 --strategies logits sampled

It sees the instruction, the source picture and the edit, and is told to answer with one digit. The score is the mean of
the digits under their probabilities at the first answer position, over 5 (UniWorld-V2, arXiv:2510.16888): no sampling,
one forward for many edits. Other strategies of the paper's Table 4, several questions an edit and plain terms are settings.

Shapes: n edits, B of them in one forward, V words of the vocabulary.

Departures from the authors' released code:
1. The answers' token ids are asked of the tokenizer, and a served judge's are found by their text.
2. How much probability the judge puts on answers at all (the mass) comes with every score.
3. A score that cannot be had is NaN with its cause; it is never 0, and it takes no other score with it.
4. Every edit is judged under its own row's instruction, on the pixels themselves: PNG over the wire, no JPEG, no pickle.
5. Instruction and source of a group are processed once, not once an edit.
"""

import ast
import base64
import copy
import inspect
import io
import itertools
import os
import random
import re
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import requests
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.hf_argparser import HfArg

from data_prep import BadInput, load_image, parse_settings, run_script

TOY = "local:data/toy/judge"

# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class JudgeSettings:
    judge: str = HfArg(default="local:Qwen/Qwen2.5-VL-7B-Instruct", help="local:MODEL or http://HOST:PORT/v1[,http://...].")
    judge_model: str = HfArg(default="", help="A served judge's name. [the first one that the server lists]")
    judge_strategy: Literal["logits", "sampled", "yes_no", "logits_cot", "sampled_cot", "yes_no_cot"] = HfArg(
        default="logits", help="Expected digit, one sampled digit, or yes against no; _cot: after a chain of thought.")  # fmt: skip
    judge_formula: str = HfArg(default="execution", help="The reward: execution * (0.6 + 0.4 * consistency), ...")
    judge_prompt: list[str] = HfArg(default_factory=list, help="FILE or ASPECT=FILE: texts in place of the judge's prompts.")
    judge_thought: int = HfArg(default=512, help="Tokens of a chain of thought at most.")
    judge_device: str = HfArg(default="", help="Where a local judge runs. [beside the editor]")
    judge_batch: int = HfArg(default=16, help="Edits in one forward of a local judge.")
    judge_in_flight: int = HfArg(default=16, help="Requests at a time to each server.")
    judge_logprobs: int = HfArg(default=20, help="Words whose probability a server is asked for.")
    judge_timeout: float = HfArg(default=60.0, help="Seconds that a server may take for one answer.")
    judge_patience: float = HfArg(default=120.0, help="Seconds to try again for, where that may help.")

    def __post_init__(self):
        for name in ("judge_thought", "judge_batch", "judge_in_flight", "judge_logprobs", "judge_timeout"):
            if getattr(self, name) <= 0:
                raise BadInput(f"--{name} {getattr(self, name)}: give a value above 0")


# ---------------------------------------------------------------- what is asked

THINK = "Do not rate it yet: first say in a few sentences what was asked, what changed, and what should not have changed."
ENDINGS = {
    "digit": "Give your rating from 0 (not at all, or the picture is spoiled) to 5 (completely). Answer with one digit and "
             "nothing else.",
    "yes_no": "Is that the case? Answer yes or no and nothing else.",
}  # fmt: skip
LAYOUT = "You check edits of pictures. The last picture is an edited version of what comes before it.\nInstruction: {prompt}\n"
PROMPTS = {
    "execution": LAYOUT + "A good edit shows: {requirement}\nRate how well the instruction was carried out while everything "
    "it does not mention stayed as it was. {answer}",
    "consistency": LAYOUT + "Leave aside whether the instruction was carried out. Rate how far everything that it does not ask "
    "to change, such as other objects, faces, background, layout and style, is the same in both pictures. {answer}",
    "quality": LAYOUT + "Leave aside whether the instruction was carried out. Rate how natural the last picture looks: sharp, "
    "well lit, free of seams, smears, noise, and broken shapes, hands and letters. {answer}",
}  # fmt: skip
REQUIREMENT = "the change that was asked for, complete and natural, and no other change."
PLAIN = ("pixel_distance", "brightness_drift", "sharpness_drift")


class Scores(NamedTuple):
    score: torch.Tensor  # (n,) in [0, 1], NaN where the judge gave none
    mass: torch.Tensor  # (n,) the judge's probability of giving an answer that counts at all; the least over the aspects
    terms: dict = {}  # name -> (n,): each aspect's score, and the plain terms
    causes: list = ()  # n strings: why there is no score; "" where there is one
    words: list = ()  # n strings: what the judge would most likely say; "" where not known


class Answer(NamedTuple):
    score: float = torch.nan
    mass: float = torch.nan
    cause: str = ""
    words: str = ""


class JudgeFailure(Exception):
    """No answer, and why: `cause` is short and the same for the same fault, to be counted."""

    def __init__(self, cause, may_help=False, wait=0.0):
        super().__init__(cause)
        self.cause, self.may_help, self.wait = cause, may_help, wait


def expected_score(logits, token_ids, values=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0)):
    """Expected value and probability mass of the answers, from the logits at the first answer position.

    logits: (B, V); token_ids: those of "0" to "5", or of other answers with their values in [0, 1]. Returns score (B,) in
    [0, 1] and mass (B,) in [0, 1], float32; both NaN in a row whose logits are not finite. Source: UniWorld-V2
    (arXiv:2510.16888), Sec. 2.2.
    """
    assert logits.ndim == 2, f"logits are (B, V), not {tuple(logits.shape)}"
    assert len(token_ids) == len(values), f"{len(values)} answers are scored, not {len(token_ids)}"
    logits = logits.float()
    logits = logits.masked_fill(~logits.isfinite().all(1, keepdim=True), torch.nan)  # spoils its own row alone
    answers = logits[:, torch.as_tensor(token_ids, device=logits.device)]  # (B, answers)
    mass = (answers.logsumexp(1) - logits.logsumexp(1)).exp()
    return answers.softmax(1) @ torch.tensor(values, device=logits.device), mass


def digit_token_ids(tokenizer):
    """The token ids of "0" to "5", in this order; BadInput when one of them is not a token of its own."""
    return _answer_token_ids(tokenizer, "012345")


def _answer_token_ids(tokenizer, texts):
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for text, pieces in zip(texts, ids):
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id or ids.count(pieces) > 1:
            kind = "digit" if text.isdigit() else "word"
            raise BadInput(f"{tokenizer.name_or_path}: the {kind} {text} is not one token of its own ({pieces}); "
                           f"take a judge whose tokenizer keeps {kind}s apart, or another --judge_strategy")  # fmt: skip
    return [pieces[0] for pieces in ids]


def answers_of(strategy):
    """The texts that count as answers under a strategy, and their values in [0, 1]."""
    if strategy.startswith("yes_no"):
        return ("yes", "Yes", "no", "No"), (1.0, 1.0, 0.0, 0.0)
    return tuple("012345"), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def read_prompts(settings):
    """The prompt of every aspect: ours, the judge's own judge_prompt.txt for `execution`, or the files that were named."""
    own = Path(settings.judge.removeprefix("local:")) / "judge_prompt.txt"
    files = {"execution": own} if settings.judge.startswith("local:") and own.is_file() else {}
    for entry in settings.judge_prompt:
        name, _, file = entry.rpartition("=")
        files[name or "execution"] = Path(file)
    prompts = dict(PROMPTS)
    for name, file in files.items():
        if not file.is_file():
            raise BadInput(f"--judge_prompt {file}: no such file; name a text file")
        prompts[name] = file.read_text(encoding="utf-8")
        if "{prompt}" not in prompts[name]:
            raise BadInput(f"{file}: has no {{prompt}}; write it where the instruction goes")
    return prompts


# ---------------------------------------------------------------- the judge


class Judge:
    """What a local and a served judge share: questions, terms and formula. `pool` runs what is submitted."""

    def __init__(self, settings, workers):
        self.settings, self.prompts = settings, read_prompts(settings)
        self.aspects = ["execution"]
        self.pool = ThreadPoolExecutor(workers)

    def question(self, row, aspect="execution"):
        """The text of an aspect's question on a row: instruction, requirement, and how to answer."""
        kind = "yes_no" if self.settings.judge_strategy.startswith("yes_no") else "digit"
        values = {"prompt": row["prompt"], "requirement": row.get("requirement") or REQUIREMENT, "answer": ENDINGS[kind]}
        return re.sub(r"\{(prompt|requirement|answer)\}", lambda mark: values[mark[1]], self.prompts[aspect])

    def score(self, rows, sources, edits):
        """Judges each edit under its own row's instruction: n rows, n lists of source pictures, n edits -> Scores on CPU.

        rows: dicts with `prompt` and perhaps `requirement` and `task`; pictures are PIL.Images.
        """
        assert len(rows) == len(sources) == len(edits), "one row and one list of sources for each edit"
        n, times = len(edits), len(self.aspects)
        answers = self._answers([self.question(row, aspect) for aspect in self.aspects for row in rows],
                                [[*shown, edit] for shown, edit in zip(sources, edits)] * times)  # fmt: skip
        score, mass = (torch.tensor([getattr(a, key) for a in answers]).view(times, n) for key in ("score", "mass"))
        causes = [next((a.cause for a in answers[i::n] if a.cause), "") for i in range(n)]
        words = [next((a.words for a in answers[i::n] if a.words), "") for i in range(n)]
        return Scores(score[0], mass.amin(0), dict(zip(self.aspects, score)), causes, words)

    def submit(self, row, sources, edits):
        """The Future of one group's Scores: the judge works while the caller goes on."""
        return self.pool.submit(self.score, [row] * len(edits), [sources] * len(edits), edits)


class PictureProcessor:
    """Text and pictures to model inputs for judges of Qwen2-VL's kind, where their own processor needs torchvision.

    That one handles videos as well, and transformers cannot build it without torchvision. Pictures need only the image
    processor and the tokenizer: each placeholder becomes one token for every merge_size x merge_size patches.
    """

    def __init__(self, model, config):
        self.image_processor = AutoImageProcessor.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.image_token = self.tokenizer.convert_ids_to_tokens(config.image_token_id)
        self.image_token_id = config.image_token_id
        self.apply_chat_template = self.tokenizer.apply_chat_template

    def __call__(self, text, images, **kwargs):
        made = self.image_processor(images=[picture for shown in images for picture in shown], return_tensors="pt")
        sizes = iter((made.image_grid_thw.prod(1) // self.image_processor.merge_size**2).tolist())
        texts = [re.sub(re.escape(self.image_token), lambda mark: mark[0] * next(sizes), words) for words in text]
        inputs = self.tokenizer(texts, add_special_tokens=False, **kwargs) | dict(made)
        return inputs | {"mm_token_type_ids": (inputs["input_ids"] == self.image_token_id).int()}


def _load_processor(model, config):
    try:
        return AutoProcessor.from_pretrained(model)
    except ImportError as error:
        if "orchvision" not in str(error):
            raise
        image_processor = AutoImageProcessor.from_pretrained(model)
        if not hasattr(image_processor, "merge_size") or not hasattr(config, "image_token_id"):
            raise BadInput(f"{model}: its processor needs torchvision; pip install torchvision") from None
        return PictureProcessor(model, config)


class LocalJudge(Judge):
    """A multimodal LLM of transformers, on this machine. Raises BadInput when `settings.judge` names none."""

    def __init__(self, settings, device="cpu", dtype=torch.float32):
        super().__init__(settings, workers=1)
        model = settings.judge.removeprefix("local:")
        if not Path(model).is_dir() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
            mend = "run python data_prep.py toy first" if settings.judge == TOY else "name a folder or a hub id owner/name"
            raise BadInput(f"{model}: no such model folder; {mend}")
        try:
            self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
            self.processor = _load_processor(model, self.model.config)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"{model}: not a multimodal LLM of transformers ({reason}); name one such as "
                           "Qwen/Qwen2.5-VL-7B-Instruct") from error  # fmt: skip
        self.model.requires_grad_(False)
        self.lock = threading.RLock()
        self.processor.tokenizer.padding_side = "left"  # the answer's place is the last one in every row
        texts, self.values = answers_of(settings.judge_strategy)
        self.token_ids = _answer_token_ids(self.processor.tokenizer, texts)
        options = inspect.signature(self.model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in options else {}
        self.cache_name = "cache" if "cache" in options else "past_key_values"  # its older name
        self.shares_prefix = self._prefix_works()

    def _chat(self, turns, pictures):
        """The chat-formatted text of what user and judge said in turn: instruction first, then `pictures` pictures."""
        said = [[{"type": "text", "text": turn}] for turn in turns]
        said[0] += [{"type": "image"}] * pictures
        chat = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def _inputs(self, texts, pictures):
        mark = getattr(self.processor, "image_token", None)
        for text, shown in zip(texts, pictures):
            if mark and text.count(mark) != len(shown):
                raise ValueError(f"the text holds the picture mark {mark}")
        inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    @torch.no_grad()
    def _logits(self, texts, pictures, share=None):
        """(B, V) at the first answer position. What comes before the last picture is computed once for all who share it."""
        mark = getattr(self.processor, "image_token", None)
        heads = [text.rpartition(mark)[0] if mark else "" for text in texts]
        keys = [(head, *map(id, shown[:-1])) for head, shown in zip(heads, pictures)]
        first = [keys.index(key) for key in dict.fromkeys(keys)]
        if not (self.shares_prefix if share is None else share) or len(first) == len(texts):
            return self.model(**self._inputs(texts, pictures), **self.last_only, use_cache=False).logits[:, -1]
        owner = torch.tensor([first.index(keys.index(key)) for key in keys], device=self.model.device)  # (B,)
        prefix = self._inputs([heads[i] for i in first], [pictures[i][:-1] for i in first])
        rest = self._inputs([text[len(head) :] for text, head in zip(texts, heads)], [shown[-1:] for shown in pictures])
        cache = self.model(**prefix, **self.last_only, use_cache=True)[self.cache_name]
        cache.reorder_cache(owner)
        both = {key: torch.cat([prefix[key][owner], rest[key]], 1) for key in ("input_ids", "attention_mask")}
        places = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)  # (B, length)
        if hasattr(self.model.model, "get_rope_index"):  # Qwen's pictures have places in three directions
            both["mm_token_type_ids"] = torch.cat([prefix["mm_token_type_ids"][owner], rest["mm_token_type_ids"]], 1)
            grids = prefix["image_grid_thw"].split([len(pictures[i]) - 1 for i in first])
            grids = [grid for i, own in zip(owner.tolist(), rest["image_grid_thw"][:, None]) for grid in (grids[i], own)]
            places, _ = self.model.model.get_rope_index(**both, image_grid_thw=torch.cat(grids))  # (3, B, length)
        start = prefix["input_ids"].shape[1]
        rest |= {"attention_mask": both["attention_mask"], "position_ids": places[..., start:], self.cache_name: cache}
        return self.model(**rest, **self.last_only).logits[:, -1]

    def _prefix_works(self):
        """Whether this model's scores stay the same with a shared prefix: tried on two questions and four noisy pictures."""
        noise = [Image.effect_noise((56, 56), 64).convert("RGB") for _ in range(4)]
        texts = [self._chat([self.question({"prompt": prompt})], 2) for prompt in ("remove it", "remove it", "make it blue, then", "make it blue, then")]
        pictures = [[noise[i // 2], noise[3 - i]] for i in range(4)]
        try:
            whole, shared = (expected_score(self._logits(texts, pictures, share), self.token_ids, self.values)[0] for share in (False, True))
        except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, IndexError):
            return False
        return torch.allclose(whole, shared, atol=1e-4 if self.model.dtype == torch.float32 else 0.02)

    def _answers(self, questions, pictures):
        texts = [self._chat([question], len(shown)) for question, shown in zip(questions, pictures)]
        with self.lock:
            starts, size = range(0, len(texts), self.settings.judge_batch), self.settings.judge_batch
            return [answer for i in starts for answer in self._safely(texts[i : i + size], pictures[i : i + size])]

    def _safely(self, texts, pictures):
        """An Answer for each; what the model refuses is halved until the refused one stands alone."""
        try:
            logits = self._logits(texts, pictures)
        except (ValueError, RuntimeError) as error:
            if len(texts) == 1:
                return [Answer(cause=f"refused: {' '.join(str(error).split())[:80]}")]
            half = len(texts) // 2
            return self._safely(texts[:half], pictures[:half]) + self._safely(texts[half:], pictures[half:])
        score, mass = expected_score(logits, self.token_ids, self.values)
        causes = ["logits not finite" if bad else "" for bad in score.isnan().tolist()]
        return list(map(Answer, score.tolist(), mass.tolist(), causes, self._words(logits)))

    def _words(self, logits):
        values, ids = logits.float().softmax(1).topk(min(5, logits.shape[1]))
        said = self.processor.tokenizer.batch_decode(ids.flatten()[:, None])
        return [", ".join(f"{word!r} {p:.0%}" for word, p in zip(said[5 * i : 5 * i + 5], row))
                for i, row in enumerate(values.tolist())]  # fmt: skip

    @torch.no_grad()
    def ask(self, text, pictures, max_tokens=1024):
        """The reply to one user message of `text` and PIL pictures, at temperature 0; JudgeFailure where there is none."""
        with self.lock:
            try:
                inputs = self._inputs([self._chat([text], len(pictures))], [pictures])
                made = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            except (ValueError, RuntimeError) as error:
                raise JudgeFailure(f"refused: {' '.join(str(error).split())[:80]}") from error
        return self.processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _png_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class ServedJudge(Judge):
    """Any OpenAI-compatible server, or several with the same model. The key comes from JUDGE_API_KEY or OPENAI_API_KEY.

    Raises BadInput when a server does not answer or does not have the model.
    """

    def __init__(self, settings):
        self.urls = [url.strip().rstrip("/") for url in settings.judge.split(",")]
        super().__init__(settings, workers=64)
        self.requests = ThreadPoolExecutor(settings.judge_in_flight * len(self.urls))
        self.key = os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
        self.session = requests.Session()
        self.session.mount("http", requests.adapters.HTTPAdapter(len(self.urls), settings.judge_in_flight))
        self.session.headers.update({"Authorization": f"Bearer {self.key}"} if self.key else {})
        self.load, self.rest, self.free = dict.fromkeys(self.urls, 0), dict.fromkeys(self.urls, 0.0), threading.Condition()
        self.name = settings.judge_model
        for url in self.urls:
            self._check_server(url)

    def _check_server(self, url):
        try:
            names = [model["id"] for model in self._once(url + "/models")["data"]]
        except (JudgeFailure, KeyError, TypeError) as failure:
            reason = getattr(failure, "cause", "it lists no models")
            raise BadInput(f"judge {url}: {reason}; start the server, or correct the address") from None
        self.name = self.name or (names or [""])[0]
        if self.name not in names:
            raise BadInput(f"judge {url}: serves {', '.join(names) or 'nothing'}, not {self.name}; see to --judge_model")

    def _once(self, url, body=None):
        """One request: the reply's JSON, or a JudgeFailure that knows whether trying again may help."""
        try:
            reply = self.session.request("POST" if body else "GET", url, json=body, timeout=self.settings.judge_timeout)
        except requests.Timeout:
            raise JudgeFailure("timeout", may_help=True) from None
        except requests.ConnectionError:
            raise JudgeFailure("no connection", may_help=True) from None
        except requests.RequestException as error:
            raise JudgeFailure(f"broken reply ({type(error).__name__})", may_help=True) from None
        if reply.status_code != 200:
            again = reply.status_code in (408, 425, 429) or reply.status_code >= 500
            said = " ".join(reply.text.split())[:120].replace(self.key or "\0", "***")
            wait = reply.headers.get("Retry-After", "")
            raise JudgeFailure(f"HTTP {reply.status_code}" + (f" {said}" if said and not again else ""), again,
                               float(wait) if wait.isdigit() else 0.0)  # fmt: skip
        try:
            return reply.json()
        except ValueError:
            raise JudgeFailure("the reply is not JSON", may_help=True) from None

    def _take(self):
        """The least loaded server that did not just fail, once it has room."""
        with self.free:
            while True:
                awake = [url for url in self.urls if self.rest[url] <= time.monotonic()] or self.urls
                url = min(awake, key=self.load.get)
                if self.load[url] < self.settings.judge_in_flight:
                    self.load[url] += 1
                    return url
                self.free.wait(1.0)

    def _complete(self, messages, **options):
        """The one choice of a chat completion; tries again, ever more slowly, for judge_patience seconds."""
        body, deadline = {"model": self.name, "messages": messages, **options}, time.monotonic() + self.settings.judge_patience
        for attempt in itertools.count():
            url = self._take()
            try:
                choices = self._once(url + "/chat/completions", body)["choices"]
                break
            except JudgeFailure as failure:
                wait = max(failure.wait, min(2**attempt, 16) * random.uniform(0.5, 1))
                if not failure.may_help or time.monotonic() + wait > deadline:
                    raise
                self.rest[url] = time.monotonic() + wait
            except (KeyError, TypeError):
                raise JudgeFailure("no choices in the reply") from None
            finally:
                with self.free:
                    self.load[url] -= 1
                    self.free.notify()
            time.sleep(wait)
        if not isinstance(choices, list) or len(choices) != 1:
            raise JudgeFailure(f"{len(choices)} choices instead of 1")
        return choices[0]

    def ask(self, text, pictures, max_tokens=1024):
        """The reply to one user message of `text` and PIL pictures, at temperature 0; JudgeFailure where there is none."""
        choice = self._complete(self._message(text, map(_png_url, pictures)), max_tokens=max_tokens, temperature=0)
        try:
            reply = choice["message"]["content"]
        except (KeyError, TypeError):
            raise JudgeFailure("no message in the reply") from None
        if not reply:
            raise JudgeFailure("an empty reply")
        return reply

    def _message(self, text, urls):
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return [{"role": "user", "content": [{"type": "text", "text": text}, *content]}]

    def _answers(self, questions, pictures):
        return list(self.requests.map(self._answer, questions, pictures))

    def _answer(self, question, pictures):
        try:
            choice = self._complete(self._message(question, map(_png_url, pictures)), max_tokens=1, temperature=1, logprobs=True,
                                    top_logprobs=self.settings.judge_logprobs)  # fmt: skip
            return read_choice(choice, self.settings.judge_strategy)
        except JudgeFailure as failure:
            return Answer(cause=failure.cause)


def read_choice(choice, strategy="logits"):
    """The Answer in a choice of a chat completion: answers found by their text among the likeliest first words."""
    try:
        first = choice["logprobs"]["content"][0]
        listed = {word["token"]: float(word["logprob"]) for word in (first, *first["top_logprobs"])}
    except (KeyError, TypeError, IndexError, ValueError):
        return Answer(cause="no logprobs in the reply")
    if any(np.isnan(value) or value > 1e-3 for value in listed.values()):
        return Answer(cause="logprobs that are none")
    p = {word: float(np.exp(value)) for word, value in listed.items()}
    words = ", ".join(f"{word!r} {p[word]:.0%}" for word in sorted(p, key=p.get, reverse=True)[:5])
    texts, values = answers_of(strategy)
    mass, unseen = sum(p.get(text, 0) for text in texts), min(p.values()) * sum(text not in p for text in texts)
    if unseen > 1e-3 * mass or mass == 0:
        return Answer(torch.nan, mass, "answers missing from top_logprobs", words)
    return Answer(sum(p.get(text, 0) * value for text, value in zip(texts, values)) / mass, mass, "", words)


def load_judge(settings, device="cpu", dtype=torch.float32):
    """The judge that settings.judge names: local:MODEL or http://host:port/v1[,...]. BadInput when it cannot serve."""
    if settings.judge.startswith(("http://", "https://")):
        return ServedJudge(settings)
    if not settings.judge.startswith("local:") or settings.judge == "local:":
        raise BadInput(f"judge {settings.judge!r}: not of the form local:MODEL or http://host:port/v1; name one such as "
                       "local:Qwen/Qwen2.5-VL-7B-Instruct")  # fmt: skip
    device = torch.device(settings.judge_device or device)
    return LocalJudge(settings, device, torch.float32 if device.type == "cpu" else dtype)


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Settings(JudgeSettings):
    source: list[str] = HfArg(default_factory=list, help="The source picture, or several.")
    edited: str = HfArg(default="", help="The edited picture.")
    prompt: str = HfArg(default="", help="The instruction.")
    requirement: str = HfArg(default="", help="What a good edit must show.")
    task: str = HfArg(default="", help="The kind of edit, for its default requirement.")

    def __post_init__(self):
        super().__post_init__()
        for name, mend in (("source", "name the source picture"), ("edited", "name the edit"), ("prompt", "say what was asked")):
            if not getattr(self, name):
                raise BadInput(f"--{name} is missing; {mend}")


def main(argv=None):
    settings = parse_settings(Settings, argv, description=__doc__.splitlines()[0], judge=TOY)
    sources, edit = [load_image(path) for path in settings.source], load_image(settings.edited)
    cuda = torch.cuda.is_available()
    judge = load_judge(settings, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    row = {"prompt": settings.prompt, "requirement": settings.requirement, "task": settings.task}
    scores = judge.score([row], [sources], [edit])
    if scores.causes[0]:
        raise BadInput(f"{settings.judge}: no score, {scores.causes[0]}; it would say {scores.words[0] or 'nothing'}")
    print(f"score {scores.score.item():.4f}   mass on answers {scores.mass.item():.4f}   it would say {scores.words[0]}")
    print("   ".join(f"{name} {value.item():.4f}" for name, value in scores.terms.items()))


if __name__ == "__main__":
    run_script(main)
