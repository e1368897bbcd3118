"""The judge: an untrained multimodal LLM that reads its score of an edit off the logits of the digits 0-5.

    python reward_mllm.py --source a.png --edited b.png --prompt "remove the red circle" [--judge local:MODEL]

It sees the instruction, the source picture and the edit, and is told to answer with one digit. The score is the mean of
the digits under their probabilities at the first answer position, over 5 (UniWorld-V2, arXiv:2510.16888): no sampling,
one forward for many edits.

Shapes: B edits, V words of the vocabulary.

Departures from the authors' released code:
1. The digits' token ids are asked of the tokenizer, and each must be one token.
2. How much probability the judge puts on digits at all (the mass) comes with every score.
3. A score that cannot be had is NaN; it is never 0.
4. Every edit is judged under its own row's instruction, on the pixels themselves: no JPEG.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.hf_argparser import HfArg

from data_prep import BadInput, load_image, parse_settings, run_script

TOY = "local:data/toy/judge"
JUDGE_PROMPT = """You check edits of pictures. The last picture is an edited version of what comes before it.
Instruction: {prompt}
A good edit shows: {requirement}
Rate how well the instruction was carried out while everything it does not mention stayed as it was, from 0 (not at all,
or the picture is spoiled) to 5 (completely, and nothing else changed). Answer with one digit and nothing else."""
REQUIREMENT = "the change that was asked for, complete and natural, and no other change."


class Scores(NamedTuple):
    score: torch.Tensor  # (n,) in [0, 1], NaN where the judge gave none
    mass: torch.Tensor  # (n,) probability of the six digits among all words
    probabilities: torch.Tensor  # (n, 6) of the digits among themselves


# ---------------------------------------------------------------- the score


def expected_score(logits, digit_ids):
    """Expected digit over 5, and the digits' probability mass, from the logits at the first answer position.

    logits: (B, V); digit_ids: the six token ids of "0" to "5". Returns score (B,) in [0, 1] and mass (B,) in [0, 1], as
    float32; both NaN in a row whose logits are not finite. Source: UniWorld-V2 (arXiv:2510.16888), Sec. 2.2.
    """
    assert logits.ndim == 2, f"logits are (B, V), not {tuple(logits.shape)}"
    assert len(digit_ids) == 6, f"six digits are scored, not {len(digit_ids)}"
    probabilities, mass = _digit_probabilities(logits, digit_ids)
    return probabilities @ torch.arange(6.0, device=logits.device) / 5, mass


def _digit_probabilities(logits, digit_ids):
    """((B, 6) among the digits, (B,) of the digits among all words) of logits (B, V), float32."""
    logits = logits.float()
    logits = logits.masked_fill(~logits.isfinite().all(1, keepdim=True), torch.nan)  # spoils its own row alone
    digits = logits[:, torch.as_tensor(digit_ids, device=logits.device)]  # (B, 6)
    return digits.softmax(1), (digits.logsumexp(1) - logits.logsumexp(1)).exp()


def digit_token_ids(tokenizer):
    """The token ids of "0" to "5", in this order; BadInput when one of them is not a token of its own."""
    ids = [tokenizer.encode(digit, add_special_tokens=False) for digit in "012345"]
    for digit, pieces in zip("012345", ids):
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id or ids.count(pieces) > 1:
            raise BadInput(f"{tokenizer.name_or_path}: the digit {digit} is not one token of its own ({pieces}); "
                           "take a judge whose tokenizer keeps digits apart")  # fmt: skip
    return [pieces[0] for pieces in ids]


def read_prompt(file, judge):
    """The judge's prompt: the text of `file`, else of the judge's own judge_prompt.txt, else JUDGE_PROMPT."""
    own = Path(judge.removeprefix("local:")) / "judge_prompt.txt"
    if not file and not own.is_file():
        return JUDGE_PROMPT
    file = Path(file or own)
    if not file.is_file():
        raise BadInput(f"--judge_prompt {file}: no such file; name a text file")
    text = file.read_text(encoding="utf-8")
    if "{prompt}" not in text:
        raise BadInput(f"{file}: has no {{prompt}}; write it where the instruction goes")
    return text


# ---------------------------------------------------------------- a local judge


class PictureProcessor:
    """Text and pictures to model inputs for judges of Qwen2-VL's kind, where their own processor needs torchvision.

    That one handles videos as well, and transformers cannot build it without torchvision. Pictures need only the image
    processor and the tokenizer: each placeholder becomes one token for every merge_size x merge_size patches.
    """

    def __init__(self, model, config):
        self.image_processor = AutoImageProcessor.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.image_token = self.tokenizer.convert_ids_to_tokens(config.image_token_id)
        self.apply_chat_template = self.tokenizer.apply_chat_template

    def __call__(self, text, images, **kwargs):
        distinct = {id(picture): picture for pictures in images for picture in pictures}  # a source comes K times
        made = self.image_processor(images=list(distinct.values()), return_tensors="pt")
        patches = dict(zip(distinct, made.pixel_values.split(made.image_grid_thw.prod(1).tolist())))
        grids = dict(zip(distinct, made.image_grid_thw))
        texts = []
        for words, pictures in zip(text, images):
            pieces = words.split(self.image_token)
            if len(pieces) != len(pictures) + 1:
                raise BadInput(f"the judge's prompt holds the picture mark {self.image_token}; remove it: {words[:80]!r}")
            marks = [self.image_token * (grids[id(p)].prod() // self.image_processor.merge_size**2) for p in pictures]
            texts.append("".join(piece + mark for piece, mark in zip(pieces, [*marks, ""])))
        inputs = self.tokenizer(texts, add_special_tokens=False, **kwargs)
        shown = [id(picture) for pictures in images for picture in pictures]
        inputs["pixel_values"] = torch.cat([patches[key] for key in shown])
        inputs["image_grid_thw"] = torch.stack([grids[key] for key in shown])
        token = self.tokenizer.convert_tokens_to_ids(self.image_token)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int()
        return inputs


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


class LocalJudge:
    """A multimodal LLM of transformers, on this machine. Raises BadInput when `model` is none."""

    def __init__(self, model, device="cpu", dtype=torch.float32, batch_size=16, prompt=JUDGE_PROMPT):
        if not Path(model).is_dir() and (str(model).count("/") != 1 or str(model).startswith((".", "/", "~"))):
            mend = "run python data_prep.py toy first" if f"local:{model}" == TOY else "name a folder or a hub id owner/name"
            raise BadInput(f"{model}: no such model folder; {mend}")
        try:
            self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
            self.processor = _load_processor(model, self.model.config)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"{model}: not a multimodal LLM of transformers ({reason}); name one such as "
                           "Qwen/Qwen2.5-VL-7B-Instruct") from error  # fmt: skip
        self.model.requires_grad_(False)
        self.processor.tokenizer.padding_side = "left"  # the answer's place is the last one in every row
        self.digit_ids = digit_token_ids(self.processor.tokenizer)
        self.batch_size, self.prompt = batch_size, prompt
        last_only = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.forward_options = {"use_cache": False} | ({"logits_to_keep": 1} if last_only else {})

    def question(self, row, pictures):
        """The chat-formatted text for one edit: instruction first, then `pictures` pictures, then room for the answer."""
        text = self.prompt.replace("{requirement}", row.get("requirement") or REQUIREMENT)
        content = [{"type": "text", "text": text.replace("{prompt}", row["prompt"])}] + [{"type": "image"}] * pictures
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def score(self, rows, sources, edits):
        """Judges each edit under its own row's instruction: n rows, n lists of source pictures, n edits -> Scores on CPU.

        rows: dicts with `prompt` and perhaps `requirement`; pictures are PIL.Images. batch_size edits go in one forward.
        """
        assert len(rows) == len(sources) == len(edits), "one row and one list of sources for each edit"
        results = []
        for first in range(0, len(edits), self.batch_size):
            part = slice(first, first + self.batch_size)
            pictures = [[*source, edit] for source, edit in zip(sources[part], edits[part])]
            text = [self.question(row, len(shown)) for row, shown in zip(rows[part], pictures)]
            inputs = self.processor(text=text, images=pictures, padding=True, return_tensors="pt").to(self.model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            logits = self.model(**inputs, **self.forward_options).logits[:, -1]  # (B, V)
            probabilities, mass = _digit_probabilities(logits, self.digit_ids)
            results.append((expected_score(logits, self.digit_ids)[0].cpu(), mass.cpu(), probabilities.cpu()))
        if not results:
            return Scores(torch.empty(0), torch.empty(0), torch.empty(0, 6))
        return Scores(*map(torch.cat, zip(*results)))


def load_judge(spec, device="cpu", dtype=torch.float32, batch_size=16, prompt=JUDGE_PROMPT):
    """The judge that `spec` names: local:MODEL, a folder or hub id. BadInput for anything else."""
    kind, _, model = spec.partition(":")
    if kind != "local" or not model:
        raise BadInput(f"judge {spec!r}: not of the form local:MODEL; name one such as local:Qwen/Qwen2.5-VL-7B-Instruct")
    return LocalJudge(model, device, dtype, batch_size, prompt)


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Settings:
    source: list[str] = HfArg(default_factory=list, help="The source picture, or several.")
    edited: str = HfArg(default="", help="The edited picture.")
    prompt: str = HfArg(default="", help="The instruction.")
    requirement: str = HfArg(default="", help="What a good edit must show.")
    judge: str = HfArg(default=TOY, help="The judge, local:MODEL.")
    judge_prompt: str = HfArg(default="", help="A file whose text replaces the judge's prompt.")

    def __post_init__(self):
        for name, mend in (("source", "name the source picture"), ("edited", "name the edit"), ("prompt", "say what was asked")):
            if not getattr(self, name):
                raise BadInput(f"--{name} is missing; {mend}")


def main(argv=None):
    args = parse_settings(Settings, argv, description=__doc__.splitlines()[0])
    sources, edit = [load_image(path) for path in args.source], load_image(args.edited)
    cuda = torch.cuda.is_available()
    judge = load_judge(args.judge, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32,
                       prompt=read_prompt(args.judge_prompt, args.judge))  # fmt: skip
    row = {"prompt": args.prompt, "requirement": args.requirement}
    score, mass, probabilities = (value[0] for value in judge.score([row], [sources], [edit]))
    print(f"score {score:.4f}   mass on digits {mass:.4f}")
    print("   ".join(f"p({digit}) {p:.4f}" for digit, p in enumerate(probabilities.tolist())))


if __name__ == "__main__":
    run_script(main)
