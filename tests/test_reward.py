"""The judge: scores against closed forms, batching, strategies, terms and the command.

On a tiny random Qwen2.5-VL; the served judge's tests are in test_served_judge.py.
"""

import ast
import functools
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import data_prep
import reward_mllm
from data_prep import BadInput, parse_settings, seeded
from reward_mllm import (
    PLAIN_TERMS,
    STRATEGIES,
    JudgeFailure,
    JudgeSettings,
    Scores,
    _answer_token_ids,
    check_judge,
    expected_score,
    load_judge,
    plain_terms,
    refuse_silent_judge,
    requirement_of,
)

ROOT = Path(__file__).parents[1]
ROW = {"prompt": "make the red circle blue"}

# ---------------------------------------------------------------- expected_score


def test_equal_probabilities_score_one_half_with_their_words_mass():
    verdict = expected_score(dict.fromkeys([*"012345", "a", "b"], 0.1))
    assert verdict.score == pytest.approx(0.5) and verdict.mass == pytest.approx(0.6)
    assert list(verdict.shares.values()) == pytest.approx([1 / 6] * 6) and verdict.cause == ""


@pytest.mark.parametrize("digit", range(6))
def test_a_certain_digit_scores_itself_over_five(digit):
    verdict = expected_score({str(digit): 1.0})
    assert verdict.score == pytest.approx(digit / 5) and verdict.mass == 1.0
    assert verdict.words == f"'{digit}' 100%"


def test_other_words_change_the_mass_and_not_the_score():
    few, many = expected_score({"1": 0.6, "4": 0.3}), expected_score({"1": 0.2, "4": 0.1, "x": 0.7})
    assert few.score == pytest.approx(many.score) == pytest.approx((0.2 * 2 + 0.8) / 3)
    assert many.mass == pytest.approx(0.3) and many.words.startswith("'x' 70%")


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_no_finite_probability_is_no_score_with_its_cause(value):
    verdict = expected_score({"3": value})
    assert math.isnan(verdict.score) and verdict.cause == "no finite probability of the answers"


# ---------------------------------------------------------------- a tiny judge


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory):
    """The toy's judge with random weights, as data_prep saves it."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    tokenizer = data_prep.new_tokenizer()
    model = data_prep.new_judge(tokenizer)
    for p in model.parameters():
        p.data *= 3  # loud enough that different questions get different answers
    data_prep.save_judge(model, tokenizer, folder)
    return folder


def local(folder, prompt="{prompt}", stop=None, **changes):
    """The judge of a folder, asked by `prompt`."""
    (folder / "judge_prompt.txt").write_text(prompt)
    return load_judge(JudgeSettings(judge=f"local:{folder}", **changes), stop=stop)


@pytest.fixture(scope="session")
def judge(judge_folder):
    return local(judge_folder)


def picture(*key, size=(32, 32)):
    noise = torch.rand(size[1], size[0], 3, generator=seeded("picture", *key))
    return Image.fromarray((noise * 255).byte().numpy())


@pytest.fixture
def asked():
    """A row, its source, and six edits."""
    return ROW, [picture("source")], [picture("edit", i) for i in range(6)]


def plain_forward(folder, text, pictures):
    """The logits (V,) of the next word, from the model's own class and tensors made by hand."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    seen = "<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"
    text = text.replace("[picture]", seen)
    ids = tokenizer(f"<|im_start|>{text}<|im_end|><|im_start|>", return_tensors="pt").input_ids
    arrays = [torch.from_numpy(np.asarray(shown).copy()) for shown in pictures]
    pixels = torch.stack([array.permute(2, 0, 1) / 255 for array in arrays])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values=data_prep.judge_patches(pixels),
            image_grid_thw=torch.tensor([[1, 4, 4]] * len(pictures)),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
        ).logits[0, -1]
    return logits, tokenizer.convert_tokens_to_ids


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ("question_first", "make the red circle blue[picture][picture]"),
        ("pictures_first", "[picture][picture]make the red circle blue"),
    ],
)
def test_the_score_is_that_of_a_plain_forward_of_the_model(judge_folder, order, text):
    judge = local(judge_folder, judge_order=order)
    source, edit = picture("s"), picture("e")
    logits, token = plain_forward(judge_folder, text, [source, edit])
    digits = [token(digit) for digit in "012345"]
    wanted = logits[digits].softmax(0)
    scores = judge.score(ROW, [source], [edit])
    assert scores.mass.item() == pytest.approx(logits.softmax(0)[digits].sum().item(), abs=1e-5)
    assert scores.score.item() == pytest.approx((wanted @ torch.arange(6.0) / 5).item(), abs=1e-5)


def test_the_sentence_that_tells_how_to_answer_stands_after_the_pictures(judge_folder, monkeypatch):
    judge = local(judge_folder, "{prompt} {answer}")
    make, texts = judge.processor.tokenizer.__class__.__call__, []
    monkeypatch.setattr(
        judge.processor.tokenizer.__class__,
        "__call__",
        lambda self, text, **options: texts.extend(text) or make(self, text, **options),
    )
    judge.score(ROW, [picture("s")], [picture("e")])
    (text,) = texts
    assert text.index("blue") < text.index("<|image_pad|>")
    assert text.rindex("<|image_pad|>") < text.index(reward_mllm.DIGIT)


def test_a_prompt_without_answer_gets_nothing_appended(judge):
    asked = ({"prompt": "make {answer} blue"}, "execution", "", judge.strategy)
    assert judge.question(*asked) == ("make {answer} blue", "")


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_scores_do_not_depend_on_the_batch(judge, judge_folder, asked, batch_size):
    other = local(judge_folder, judge_batch=batch_size)
    assert torch.allclose(judge.score(*asked).score, other.score(*asked).score, atol=1e-5)


def test_scores_do_not_depend_on_the_order(judge, asked):
    row, sources, edits = asked
    backwards = judge.score(row, sources, edits[::-1]).score
    assert torch.allclose(judge.score(*asked).score, backwards.flip(0), atol=1e-5)


def test_each_group_is_judged_under_its_own_instruction(judge, asked):
    _, sources, edits = asked
    rows = [{"prompt": text} for text in ("remove the green square", "add a red circle", "make")]
    futures = [judge.submit(row, sources, edits) for row in rows]
    together = torch.stack([future.result().score for future in futures])
    alone = torch.stack([judge.score(row, sources, edits).score for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_source_and_edit_are_not_exchanged(judge):
    one, other = picture("a"), picture("b")
    forth, back = judge.score(ROW, [one], [other]), judge.score(ROW, [other], [one])
    assert abs(forth.score - back.score) > 1e-3


def test_several_source_pictures_are_all_seen(judge):
    edits = [picture("edit")]
    b, c = (judge.score(ROW, [picture("a"), picture(second)], edits) for second in "bc")
    assert abs(b.score - c.score) > 1e-4


def test_pictures_of_other_sizes_are_judged_in_one_batch(judge):
    source, edits = [picture("b")], [picture("c"), picture("d", size=(64, 32))]
    both = judge.score(ROW, source, edits).score
    assert both[1] == pytest.approx(judge.score(ROW, source, edits[1:]).score.item(), abs=1e-5)


def seen_by(judge, monkeypatch, *asked):
    """The arguments of the model's forwards while something is asked."""
    calls, forward = [], judge.model.forward

    def recorded(**kwargs):
        calls.append(kwargs)
        return forward(**kwargs)

    monkeypatch.setattr(judge.model, "forward", recorded)
    judge.score(*asked)
    return calls


def test_pixels_reach_the_model_unchanged(judge, monkeypatch):
    shown = [picture("source"), picture("edit")]
    (seen,) = seen_by(judge, monkeypatch, ROW, shown[:1], shown[1:])
    arrays = [torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1) / 255 for p in shown]
    wanted = data_prep.judge_patches(torch.stack(arrays))
    assert torch.allclose(seen["pixel_values"], wanted, atol=1e-6)


def test_a_large_source_is_shown_with_about_as_many_pixels_as_the_edit(judge, monkeypatch):
    large = picture("large", size=(400, 400))
    (seen,) = seen_by(judge, monkeypatch, ROW, [large], [picture("edit")])
    assert seen["image_grid_thw"].tolist() == [[1, 4, 4]] * 2


def test_a_group_takes_one_plain_forward_and_no_generate(judge, asked, monkeypatch):
    monkeypatch.setattr(judge.model, "generate", lambda *a, **k: pytest.fail("generate was called"))
    assert len(seen_by(judge, monkeypatch, *asked)) == 1


def test_a_score_that_failed_is_nan_and_never_zero(judge, asked, monkeypatch):
    forward = judge.model.forward

    def spoiled(**kwargs):
        output = forward(**kwargs)
        output.logits[2] = torch.nan
        return output

    clean = judge.score(*asked).score
    monkeypatch.setattr(judge.model, "forward", spoiled)
    scores = judge.score(*asked)
    failed = scores.score.isnan()
    assert failed.tolist() == [False, False, True, False, False, False]
    assert torch.equal(scores.score[~failed], clean[~failed])
    assert [cause for cause in scores.causes if cause] == ["no finite probability of the answers"]


def test_no_edits_give_no_scores(judge):
    assert judge.score(ROW, [picture("s")], []).score.shape == (0,)


def test_missing_scores_are_nan_with_their_cause_and_stack_with_others(judge, asked):
    scores = judge.score(*asked)
    both = Scores.stack([judge.missing(6, "gone"), scores])
    assert both.score.shape == both.mass.shape == (2, 6) and both.score[0].isnan().all()
    assert torch.equal(both.score[1], scores.score)
    assert both.causes == ["gone"] * 6 + [""] * 6 and both.words == [""] * 6 + scores.words
    assert both.terms.keys() == scores.terms.keys()
    assert both.terms["psnr"][0].isnan().all()
    assert torch.equal(both.terms["psnr"][1], scores.terms["psnr"])


# ---------------------------------------------------------------- other families


def tiny_qwen3_vl(tokenizer):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=token("<|im_end|>"),
        rope_parameters={
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 1e4,
            "mrope_interleaved": True,
        },
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        patch_size=8,
        spatial_merge_size=2,
        out_hidden_size=64,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=True,
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )
    )


def save_tiny_internvl(tokenizer, folder):
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks.values())})
    tokenizer.chat_template = data_prep.CHAT_TEMPLATE.replace(
        "<|vision_start|><|image_pad|><|vision_end|>", " <IMG_CONTEXT> "
    )
    text = dict(
        model_type="qwen2",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=2,
    )
    vision = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        patch_size=[8, 8],
        image_size=[32, 32],
    )
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=4,
        )
    )
    for p in model.parameters():
        p.data *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "extra_special_tokens": marks
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=False
    ).save_pretrained(folder)
    (folder / "processor_config.json").write_text(
        json.dumps({"image_seq_length": 4, "processor_class": "InternVLProcessor"})
    )


@pytest.mark.parametrize("family", ["Qwen3-VL", "InternVL"])
def test_other_families_are_judged_alike_in_a_batch_and_alone(family, tmp_path, asked):
    torch.manual_seed(0)
    tokenizer = data_prep.new_tokenizer()
    if family == "InternVL":
        pytest.importorskip("torchvision")
        save_tiny_internvl(tokenizer, tmp_path)
    else:
        model = tiny_qwen3_vl(tokenizer)
        for p in model.parameters():
            p.data *= 3
        data_prep.save_judge(model, tokenizer, tmp_path)
    together = local(tmp_path).score(*asked)
    alone = local(tmp_path, judge_batch=1).score(*asked)
    assert torch.allclose(together.score, alone.score, atol=1e-5) and together.score.std() > 0.01


# ---------------------------------------------------------------- what the model refuses


def test_a_refused_picture_does_not_take_its_batch_with_it(judge, asked):
    row, sources, edits = asked
    clean = judge.score(*asked).score
    thin = picture("thin", size=(2000, 4))
    scores = judge.score(row, sources, [*edits[:3], thin, *edits[4:]])
    assert scores.score.isnan().tolist() == [False, False, False, True, False, False]
    assert scores.causes[3].startswith("ValueError: ") and scores.causes[:3] == [""] * 3
    assert torch.allclose(scores.score[[0, 1, 2, 4, 5]], clean[[0, 1, 2, 4, 5]], atol=1e-5)


def test_an_instruction_that_holds_the_picture_mark_is_refused(judge, asked):
    _, sources, edits = asked
    scores = judge.score({"prompt": "make <|image_pad|> blue"}, sources, edits)
    assert scores.score.isnan().all() and all(scores.causes)


def test_a_silent_judge_is_refused_with_what_it_would_say(judge, asked):
    scores = judge.score(*asked)
    refuse_silent_judge(scores, "judge", least=0.0)
    message = r"judge: puts .*% of its probability on the answers .* rather say '.*' \d+%"
    with pytest.raises(BadInput, match=message):
        refuse_silent_judge(scores._replace(mass=scores.mass * 0.1), "judge")
    with pytest.raises(BadInput, match="gave no score: {'timeout': 6}"):
        refuse_silent_judge(judge.missing(6, "timeout"), "judge")


def test_submit_judges_one_group_and_reply_returns_text(judge, asked):
    row, sources, edits = asked
    future = judge.submit(row, sources, edits[:3])
    assert torch.allclose(future.result().score, judge.score(*asked).score[:3], atol=1e-6)
    with pytest.raises(JudgeFailure, match="cut by its limit|without an answer"):
        judge.reply("make the red circle blue", [edits[0]], max_tokens=2).said()
    with pytest.raises(JudgeFailure, match="ValueError"):
        judge.reply("make", [picture("thin", size=(2000, 4))], max_tokens=4)


# ---------------------------------------------------------------- strategies


def test_all_strategies_are_names_of_settings_and_a_judge_can_follow_each(judge_folder):
    kinds = ("logits", "sampled", "yes_no", "logits_cot", "sampled_cot", "yes_no_cot", "written")
    assert tuple(STRATEGIES) == kinds
    for name in ("sampled", "written", "logits_cot", "logits"):
        judge = local(judge_folder, judge_strategy=name)
        assert judge.score(ROW, [picture("s")], [picture("e")]).score.shape == (1,)
    with pytest.raises(BadInput, match="invalid choice: 'guess'"):
        parse_settings(JudgeSettings, ["--judge_strategy", "guess"])


def test_after_a_chain_of_thought_the_answer_follows_the_thought(judge_folder, monkeypatch):
    judge = local(judge_folder, judge_strategy="logits_cot", judge_think=3)
    source, edit, texts = picture("s"), picture("e"), []
    make = judge.processor.apply_chat_template

    def recorded(chats, **options):
        texts.append(make(chats, tokenize=False, add_generation_prompt=True)[0])
        return make(chats, **options)

    monkeypatch.setattr(judge.processor, "apply_chat_template", recorded)
    score = judge.score(ROW, [source], [edit]).score.item()
    first, second = texts
    parts = map(judge.part, (source, edit))
    (reply,) = judge.write([[reward_mllm._message("user", ROW["prompt"], *parts)]], 3)
    start = first.removesuffix("<|im_start|>")
    said = f"<|im_start|>{reply.text}<|im_end|><|im_start|>{reward_mllm.DIGIT}<|im_end|>"
    assert second == f"{start}{said}<|im_start|>"
    middle = second.removeprefix("<|im_start|>").removesuffix("<|im_end|><|im_start|>")
    middle = middle.replace("<|vision_start|><|image_pad|><|vision_end|>", "[picture]")
    logits, token = plain_forward(judge_folder, middle, [source, edit])
    wanted = logits[[token(digit) for digit in "012345"]].softmax(0) @ torch.arange(6.0) / 5
    assert score == pytest.approx(wanted.item(), abs=1e-5)


def test_a_sampled_score_is_a_digit_drawn_from_the_judges_own_distribution(judge_folder):
    judge = local(judge_folder, judge_strategy="sampled", judge_batch=64)
    edits = [picture("e", i) for i in range(200)]
    scores = judge.score(ROW, [picture("s")], edits)
    again = judge.score(ROW, [picture("s")], edits[::-1])
    assert torch.equal(scores.score, again.score.flip(0))  # an edit's draw is its own
    assert torch.allclose((5 * scores.score).round(), 5 * scores.score, atol=1e-5)
    mean = local(judge_folder, judge_batch=64).score(ROW, [picture("s")], edits).score.mean()
    assert abs(scores.score.mean() - mean) < 0.1  # its standard error is below 0.03


def test_yes_against_no_is_read_off_the_logits(judge_folder, tmp_path):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(judge_folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(judge_folder)
    tokenizer.add_tokens(["yes", "Yes", "no", "No"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    data_prep.save_judge(model, tokenizer, tmp_path)
    judge = local(tmp_path, "{prompt}{answer}", judge_strategy="yes_no")
    source, edit = picture("s"), picture("e")
    text = f"{ROW['prompt']}[picture][picture]{reward_mllm.YES_NO}"
    logits, token = plain_forward(tmp_path, text, [source, edit])
    yes, big_yes, no, big_no = logits[[token(word) for word in ("yes", "Yes", "no", "No")]].exp()
    wanted = (yes + big_yes) / (yes + big_yes + no + big_no)
    assert judge.score(ROW, [source], [edit]).score.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_a_strategy_that_the_judge_cannot_follow_is_refused(judge_folder):
    with pytest.raises(BadInput, match="the answer yes is not one token"):
        local(judge_folder, "{prompt} {answer}", judge_strategy="yes_no")


# ---------------------------------------------------------------- a stop


@pytest.mark.parametrize("strategy", ["logits", "written"])
def test_a_stop_ends_a_local_judges_waits(judge_folder, monkeypatch, asked, strategy):
    stop = threading.Event()
    judge = local(judge_folder, stop=stop, judge_batch=3, judge_strategy=strategy)
    forward = judge.model.forward

    calls = []

    @functools.wraps(forward)  # generate reads its names
    def slow(**kwargs):
        calls.append(1)
        time.sleep(2)
        return forward(**kwargs)

    monkeypatch.setattr(judge.model, "forward", slow)
    future = judge.submit(*asked)
    while not calls:
        time.sleep(0.01)
    stop.set()
    start = time.monotonic()
    assert future.result().causes == ["stopped"] * 6 and time.monotonic() - start < 1
    assert judge.score(*asked).causes == ["stopped"] * 6
    judge.close()
    assert time.monotonic() - start < 5 and len(calls) == 1  # what waited for the model gave up


# ---------------------------------------------------------------- aspects and their weights


def test_every_aspect_has_its_own_question_and_lowers_what_execution_earned(
    judge_folder, tmp_path, asked
):
    (tmp_path / "other.txt").write_text("remove {prompt}")
    prompt = [f"kept={tmp_path}/other.txt"]
    weights = ["kept=0.4", "psnr=0.25"]
    both = local(judge_folder, judge_aspects=weights, judge_prompt=prompt).score(*asked)
    alone = local(judge_folder).score(*asked).score
    kept = local(judge_folder, "remove {prompt}").score(*asked).score
    assert torch.allclose(both.terms["execution"], alone, atol=1e-5)
    assert torch.allclose(both.terms["kept"], kept, atol=1e-5) and (alone - kept).abs().max() > 1e-3
    wanted = alone * (0.6 + 0.4 * kept) * (0.75 + 0.25 * both.terms["psnr"] / 40)
    assert torch.allclose(both.score, wanted, atol=1e-5)
    assert set(both.terms) == {"execution", "kept", *PLAIN_TERMS}


def combined(weights, **terms):
    terms = {name: torch.tensor([value]) for name, value in terms.items()}
    return reward_mllm.combine(terms, weights).item()


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ({}, 0.5),
        ({"consistency": 0.4}, 0.5 * (0.6 + 0.4 * 0.25)),  # FIRM's formula
        ({"consistency": 0.4, "quality": 0.2}, 0.5 * (0.6 + 0.4 * 0.25) * (0.8 + 0.2 * 0.8)),
        ({"consistency": 1.0}, 0.5 * 0.25),
        ({"psnr": 1.0}, 0.5 * 0.75),
        ({"brightness_drift": 0.5}, 0.5 * (0.5 + 0.5 * 0.9)),
        ({"pixel_distance": 1.0}, 0.5 * 0.8),
    ],
)
def test_the_reward_is_execution_times_what_each_weight_leaves(weights, wanted):
    terms = {"consistency": 0.25, "quality": 0.8, "psnr": 30.0}
    terms |= {"brightness_drift": -0.1, "pixel_distance": 0.2}
    assert combined(weights, execution=0.5, **terms) == pytest.approx(wanted)


def test_an_untouched_source_earns_nothing_and_a_missing_aspect_leaves_no_score():
    assert combined({"consistency": 0.4}, execution=0.0, consistency=1.0) == 0
    assert math.isnan(combined({"consistency": 0.4}, execution=0.9, consistency=math.nan))
    assert combined({"psnr": 0.4}, execution=0.9, psnr=math.nan) == pytest.approx(0.9)


def test_the_reward_stays_in_range_for_all_terms_and_weights():
    draw = random.Random(0)
    for _ in range(300):
        weights = {name: draw.random() for name in ("consistency", *PLAIN_TERMS)}
        drifts = {name: draw.uniform(-1, 1) for name in PLAIN_TERMS[2:]}
        terms = {"psnr": draw.uniform(-5, 60), "pixel_distance": draw.random(), **drifts}
        reward = combined(weights, execution=draw.random(), consistency=draw.random(), **terms)
        assert 0 <= reward <= 1


def test_a_reward_outside_its_range_is_no_score(judge, asked, monkeypatch):
    monkeypatch.setattr(reward_mllm, "combine", lambda terms, weights: terms["execution"] + 7)
    scores = judge.score(*asked)
    assert scores.score.isnan().all() and "not in [0, 1]" in scores.causes[0]


# ---------------------------------------------------------------- plain terms


def test_plain_terms_know_an_untouched_a_blurred_and_a_brighter_picture():
    source = picture("source", size=(64, 48)).resize((256, 192))
    brighter = Image.eval(source, lambda level: level // 2 + 100)
    blurred = source.filter(ImageFilter.GaussianBlur(3))
    terms = plain_terms(source, [source, blurred, brighter, source.resize((128, 96))])
    assert set(terms) == set(PLAIN_TERMS) and terms["psnr"][0] == pytest.approx(60)
    assert all(abs(terms[name][0]) < 1e-6 for name in PLAIN_TERMS[1:])
    assert terms["sharpness_drift"][1] < -0.5 and abs(terms["brightness_drift"][1]) < 0.01
    change = (np.asarray(brighter, float) - np.asarray(source, float)) / 255
    assert terms["brightness_drift"][2] == pytest.approx(change.mean(), abs=1e-5)
    assert terms["pixel_distance"][2] == pytest.approx(np.abs(change).mean(), abs=1e-5)
    assert terms["psnr"][2] == pytest.approx(-10 * math.log10((change**2).mean()), abs=1e-3)
    assert abs(terms["pixel_distance"][3]) < 0.05


def test_sharpness_is_the_mean_absolute_laplacian():
    light = np.asarray(picture("s").convert("L"), float) / 255
    light = np.repeat(light[..., None], 3, 2)
    inner = light[1:-1, 1:-1, 0]
    around = light[2:, 1:-1, 0] + light[:-2, 1:-1, 0] + light[1:-1, 2:, 0] + light[1:-1, :-2, 0]
    wanted = np.abs(4 * inner - around).mean()
    found = reward_mllm._sharpness(torch.from_numpy(light)).item()
    assert found == pytest.approx(wanted, rel=1e-4)


def test_psnr_counts_only_what_is_outside_the_mask():
    source, white = picture("source"), Image.new("L", (16, 16))
    white.paste(255, (0, 0, 8, 16))  # the left half may change; the mask has another size
    left, right = source.copy(), source.copy()
    left.paste("red", (0, 0, 16, 32))
    right.paste("red", (16, 0, 32, 32))
    psnr = plain_terms(source, [left, right], white)["psnr"]
    assert psnr[0] == pytest.approx(60) and psnr[1] < 20
    assert plain_terms(source, [left], Image.new("L", (4, 4), 255))["psnr"].isnan().all()


def test_a_rows_mask_is_looked_at_whatever_judge_is_used(tmp_path, judge):
    source, edit = picture("source"), picture("source")
    edit.paste("red", (0, 0, 16, 32))
    Image.new("L", (32, 32), 255).crop((0, 0, 16, 32)).save(tmp_path / "half.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    row = ROW | {"mask": str(tmp_path / "mask.png")}
    for one in (
        judge,
        in_file(tmp_path, "def score(row, sources, edits): return [1] * len(edits)"),
    ):
        assert one.score(row, [source], [edit]).terms["psnr"].item() == pytest.approx(60)
        assert one.score(ROW, [source], [edit]).terms["psnr"].item() < 20


# ---------------------------------------------------------------- a function as the judge


def in_file(folder, text, name="", **changes):
    (folder / "mine.py").write_text(text)
    stop = changes.pop("stop", None)
    return load_judge(JudgeSettings(judge=f"{folder}/mine.py{name}", **changes), stop=stop)


EXAMPLE = """
import torch

def score(row, sources, edits):  # in [0, 1], NaN where there is none
    scores = []
    for edit in edits:
        red, green, blue = edit.resize((1, 1)).getpixel((0, 0))
        scores.append(red / 255 if "red" in row["prompt"] else float("nan"))
    return torch.tensor(scores)
"""


def test_a_function_of_a_file_is_a_judge(tmp_path):
    judge = in_file(tmp_path, EXAMPLE)
    edits = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 51, 255)]
    scores = judge.submit(ROW, [edits[0]], edits).result()
    assert torch.allclose(scores.score, torch.tensor([0.0, 0.2, 1.0])) and scores.mass.isnan().all()
    assert torch.equal(scores.terms["execution"], scores.score) and "psnr" in scores.terms
    none = judge.score({"prompt": "blue"}, [edits[0]], edits)
    assert none.score.isnan().all() and none.causes == ["a score of nan, not in [0, 1]"] * 3


def test_the_readmes_function_is_a_judge(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(def score.*?)```", readme, re.DOTALL)
    for block in blocks:
        judge = in_file(tmp_path, block)
        scores = judge.score(ROW, [picture("s")], [picture("e"), picture("w", size=(64, 32))])
        assert scores.score[0] == 1 and scores.score[1].isnan()


def test_a_function_may_have_another_name_and_plain_terms_beside_it(tmp_path):
    text = "def mine(row, sources, edits): return [0.5] * len(edits)"
    judge = in_file(tmp_path, text, ":mine", judge_aspects=["pixel_distance=1"])
    white, black = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8))
    assert judge.score(ROW, [white], [white, black]).score.tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("return [1.0]", "1 scores for 2 edits"),
        ("return [0, 7]", "a score of 7, not in [0, 1]"),
        ("return [0, -0.1]", "a score of -0.1, not in [0, 1]"),
        ("return [0, float('inf')]", "a score of inf, not in [0, 1]"),
        ("return 0.5", "TypeError: 'float' object is not iterable"),
        ("return None", "TypeError: 'NoneType' object is not iterable"),
        ("return [0, 'good']", "ValueError: could not convert string to float"),
        ("return [0, [1]]", "TypeError: float() argument must be a string or a real number"),
        ("raise RuntimeError('no\\nGPU')", "RuntimeError: no GPU"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_what_a_function_gives_wrong_is_a_cause(tmp_path, body, cause):
    judge = in_file(tmp_path, f"def score(row, sources, edits):\n    {body}\n")
    scores = judge.score(ROW, [picture("s")], [picture("e"), picture("f")])
    assert scores.causes[1].startswith(cause) and scores.score[1].isnan()
    assert scores.score[0].item() == 0 or scores.causes[0] == scores.causes[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(): pass", "KeyError: 'score'; write `def score.row, sources, edits.` there"),
        ("def score(", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("import sys; sys.exit(1)", "SystemExit"),
    ],
)
def test_a_file_without_a_function_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(BadInput, match=message) as error:
        in_file(tmp_path, text)
    assert "mine.py" in str(error.value) and "\n" not in str(error.value)


def test_a_file_judge_says_what_it_cannot_do(tmp_path):
    with pytest.raises(BadInput, match="nowhere.py: FileNotFoundError"):
        load_judge(JudgeSettings(judge="nowhere.py"))
    with pytest.raises(BadInput, match="answers no questions"):
        in_file(tmp_path, EXAMPLE, judge_aspects=["consistency=0.4"])
    with pytest.raises(JudgeFailure, match="does not write"):
        in_file(tmp_path, EXAMPLE).reply("what moved?", [picture("s")])


def test_a_function_is_called_for_one_group_at_a_time_in_another_thread(tmp_path):
    text = """
import threading, time
busy, most, names = 0, 0, set()
def score(row, sources, edits):
    global busy, most
    busy += 1; most = max(most, busy); names.add(threading.current_thread().name)
    time.sleep(0.02); busy -= 1
    return [most / 10] * len(edits)
"""
    judge = in_file(tmp_path, text)
    groups = [judge.submit(ROW, [picture("s")], [picture("e")]) for _ in range(6)]
    assert all(group.result().score.item() == pytest.approx(0.1) for group in groups)
    assert "MainThread" not in judge.function.__globals__["names"]


def test_a_function_that_never_returns_does_not_hold_up_a_stop(tmp_path):
    stop = threading.Event()
    text = "import time\ndef score(row, sources, edits): time.sleep(30)"
    judge = in_file(tmp_path, text, stop=stop)
    groups = [judge.submit(ROW, [picture("s")], [picture("e")]) for _ in range(3)]
    time.sleep(0.2)
    stop.set()
    start = time.monotonic()
    assert [group.result().causes for group in groups] == [["stopped"]] * 3
    assert time.monotonic() - start < 1
    judge.close()
    assert time.monotonic() - start < 5


# ---------------------------------------------------------------- the check at the start


def rows_with_targets(folder, number=4):
    rows = []
    for i in range(number):
        for name in ("source", "target"):
            picture(name, i).save(folder / f"{i}-{name}.png")
        images = [str(folder / f"{i}-source.png")]
        rows.append(ROW | {"images": images, "target": str(folder / f"{i}-target.png")})
    return rows


LIKES = """
import numpy as np
def score(row, sources, edits):
    same = [np.array_equal(sources[0], edit) for edit in edits]
    return [{untouched} if one else {right} for one in same]
"""


def test_a_judge_that_untouched_sources_please_more_is_refused_unless_told_otherwise(tmp_path):
    rows = rows_with_targets(tmp_path)
    good = in_file(tmp_path, LIKES.format(untouched=0.2, right=0.3))
    check_judge(good, rows)
    bad = in_file(tmp_path, LIKES.format(untouched=0.3, right=0.2))
    with pytest.raises(BadInput, match="right edits 0.20, untouched sources 0.30.*no_judge_check"):
        check_judge(bad, rows)
    judge_check = parse_settings(JudgeSettings, ["--no_judge_check"]).judge_check
    text = LIKES.format(untouched=0.3, right=0.2)
    check_judge(in_file(tmp_path, text, judge_check=judge_check), rows)
    for row in rows:
        del row["target"]
    check_judge(bad, rows)  # nothing to compare with


def test_a_function_that_gives_nothing_is_refused_at_the_start_with_its_cause(tmp_path):
    rows = rows_with_targets(tmp_path)
    for text, cause in {
        "def score(row, sources, edits): return [1, 2, 3, 4]": "4 scores for 3 edits",
        "def score(row): return [1]": r"TypeError: score\(\) takes 1 .* but 3 were given",
        "score = 3": "TypeError: 'int' object is not callable",
    }.items():
        judge = in_file(tmp_path, text)
        with pytest.raises(BadInput, match=f"gave no score: {{['\"]{cause}['\"]: 24}}"):
            check_judge(judge, rows)


def test_the_judges_noise_is_measured_printed_and_kept(tmp_path, judge_folder, capsys):
    rows = rows_with_targets(tmp_path)
    noisy = """
import random
draw = random.Random(0)
def score(row, sources, edits): return [draw.gauss(0.5, 0.01) for _ in edits]
"""
    judge = in_file(tmp_path, noisy, judge_check=False)
    assert judge.noise == 0.0
    check_judge(judge, rows)
    assert 0.005 < judge.noise < 0.03  # two draws lie 0.014 apart, rms
    assert f"moves by {judge.noise:.1g}" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("3", 0)])
def test_the_noise_is_told_by_one_process_of_a_run(tmp_path, monkeypatch, capsys, rank, lines):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    judge = in_file(tmp_path, LIKES.format(untouched=0.2, right=0.3))
    check_judge(judge, rows_with_targets(tmp_path))
    assert capsys.readouterr().out.count("a score moves by") == lines


def test_a_bfloat16_judge_moves_more_than_a_float32_judge(tmp_path, judge_folder, monkeypatch):
    rows = rows_with_targets(tmp_path)
    monkeypatch.setattr(reward_mllm, "refuse_silent_judge", lambda *_: None)  # it is random
    (judge_folder / "judge_prompt.txt").write_text("{prompt}")
    settings = JudgeSettings(judge=f"local:{judge_folder}", judge_check=False)
    exact = reward_mllm.LocalJudge(settings, "cpu", torch.float32)
    rough = reward_mllm.LocalJudge(settings, "cpu", torch.bfloat16)
    for judge in (exact, rough):
        check_judge(judge, rows)
    assert exact.noise < 1e-5 and rough.noise > 1e-4


# ---------------------------------------------------------------- requirements of an edit

IMGEDIT = "add adjust alter background replace remove extract style action compose hybrid"
GEDIT = """background_change color_alter material_alter motion_change ps_human style_change
    subject-add subject-remove subject-replace text_change tone_transfer"""
TRAINING = "Replace Adjust Remove Background Hybrid Action Text Red-box Reference Extract"


@pytest.mark.parametrize("task", f"{IMGEDIT} {GEDIT} {TRAINING} recolour".split())
def test_every_task_has_a_requirement_of_its_own(task):
    text = requirement_of({"prompt": "x", "task": task})
    assert text != reward_mllm.ANY_EDIT and text.endswith(".")


def test_a_task_is_known_by_the_first_word_of_its_name_that_names_a_kind():
    for task, kind in {"Red-box": "box", "color_alter": "color", "Add a thing": "add"}.items():
        assert requirement_of({"task": task}) == reward_mllm.REQUIREMENTS[kind]
    assert requirement_of({"task": "padding"}) == reward_mllm.ANY_EDIT  # no part of a word


def test_a_rows_own_requirement_comes_first():
    assert requirement_of({"task": "add", "requirement": "mine"}) == "mine"
    assert requirement_of({"task": "unheard of"}) == requirement_of({}) == reward_mllm.ANY_EDIT
    assert requirement_of({"task": None, "requirement": ""}) == reward_mllm.ANY_EDIT


# ---------------------------------------------------------------- tokens and prompts


def word_tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbered = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(numbered, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[unk]")


def test_digit_ids_are_asked_of_the_tokenizer():
    assert _answer_token_ids(word_tokenizer(["[unk]", *"012345"])) == [1, 2, 3, 4, 5, 6]
    assert _answer_token_ids(word_tokenizer(["[unk]", "x", *"543210"])) == [7, 6, 5, 4, 3, 2]


def test_a_tokenizer_without_a_digit_is_refused():
    with pytest.raises(BadInput, match="the answer 4 is not one token"):
        _answer_token_ids(word_tokenizer(["[unk]", *"01235"]))


def test_a_tokenizer_that_splits_a_digit_is_refused(monkeypatch):
    tokenizer = word_tokenizer(["[unk]", *"012345"])
    monkeypatch.setattr(tokenizer, "encode", lambda digit, **kwargs: [9, "012345".index(digit)])
    with pytest.raises(BadInput, match="the answer 0 is not one token"):
        _answer_token_ids(tokenizer)


def test_braces_in_an_instruction_reach_the_judge_as_they_are(judge_folder):
    judge = local(judge_folder, "{requirement} | {prompt}{answer}")
    row = {"prompt": "write {x} and {requirement}", "requirement": "text {y}"}
    question, ending = judge.question(row, "execution", "", judge.strategy)
    assert question == "text {y} | write {x} and {requirement}"
    assert ending == reward_mllm.DIGIT


def test_a_judge_may_bring_its_own_prompt(tmp_path):
    def read(*files):
        settings = JudgeSettings(judge=f"local:{tmp_path}", judge_prompt=list(files))
        return reward_mllm.Judge(settings).prompts

    assert read() == reward_mllm.PROMPTS
    (tmp_path / "judge_prompt.txt").write_text("mine: {prompt}")
    assert read() == reward_mllm.PROMPTS | {"execution": "mine: {prompt}"}
    (tmp_path / "other.txt").write_text("\ufeffother: {prompt}", encoding="utf-8")
    assert read(f"{tmp_path}/other.txt")["execution"] == "other: {prompt}"
    named = read(f"consistency={tmp_path}/other.txt")
    assert (named["consistency"], named["execution"]) == ("other: {prompt}", "mine: {prompt}")
    (tmp_path / "a=b.txt").write_text("odd: {prompt}")
    assert read(f"{tmp_path}/a=b.txt")["execution"] == "odd: {prompt}"


def test_our_questions_name_the_instruction_and_end_in_how_to_answer():
    for prompt in reward_mllm.PROMPTS.values():
        assert "{prompt}" in prompt and prompt.endswith("{answer}")


# ---------------------------------------------------------------- the command and bad input


def command(folder, judge, **changes):
    picture("a").save(folder / "a.png")
    picture("b").save(folder / "b.png")
    words = {"--source": f"{folder}/a.png", "--edited": f"{folder}/b.png", "--judge": judge}
    words |= {"--prompt": "make the red circle blue"} | changes
    line = []
    for name, value in words.items():
        if name == "--judge_range":
            line += [name, *value.split(" ")]
        else:
            line += [f"{name}={value}"]
    reward_mllm.main(line)


def test_the_command_prints_one_fact_a_line(judge_folder, tmp_path, capsys):
    (judge_folder / "judge_prompt.txt").write_text("{prompt}")
    command(tmp_path, f"local:{judge_folder}")
    facts = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert any(name.startswith("it says '") for name in facts)
    names = ["score", "mass on answers", "execution", *PLAIN_TERMS]
    assert all(re.fullmatch(r"-?\d+\.\d{4}", facts[name]) for name in names)
    assert facts["score"] == facts["execution"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--judge": "ftp://localhost"}, "not of the form local:MODEL"),
        ({"--edited": "nowhere.png"}, "nowhere.png: not a readable picture .no such file"),
        ({"--judge_prompt": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"--judge_prompt": "/dev/zero"}, "/dev/zero: no such file"),
        ({"--judge_prompt": sys.executable}, "is no utf-8, or lacks {prompt}"),
        ({"--judge_prompt": __file__.replace("test_reward", "toy_ratings")}, "lacks {prompt}"),
        ({"--judge_device": "toaster"}, "that toaster can run .*a --judge_device such as cuda:0"),
        ({"--judge_device": "meta"}, "that meta can run"),
        ({"--judge_device": "cuda:99"}, "that cuda:99 can run"),
        ({"--judge_aspects": "kept=0.4"}, "kept=0.4: give ASPECT=WEIGHT.* one of .*kept=FILE"),
        (
            {"--judge_aspects": "execution=0.4"},
            "execution=0.4: give .* of one of brightness_drift, checklist, cons",
        ),
        (
            {"--judge_aspects": "quality=1.5"},
            "quality=1.5: give ASPECT=WEIGHT, a weight from 0 to 1",
        ),
        ({"--judge_aspects": "quality=-1"}, "give ASPECT=WEIGHT, a weight from 0 to 1"),
        ({"--judge_aspects": "quality=nan"}, "give ASPECT=WEIGHT, a weight from 0 to 1"),
        ({"--judge_aspects": "quality"}, "give ASPECT=WEIGHT, a weight from 0 to 1"),
        ({"--judge_range": "5"}, "--judge_range .* give the worst and the best score"),
        ({"--judge_range": "5 5"}, "give the worst and the best score"),
        ({"--judge_range": "nan 1"}, "--judge_range nan"),
        ({"--judge_range": "0 1e309"}, "--judge_range inf"),
        ({"--judge_range": "5 1"}, "give the worst and the best score"),
        ({"--judge_reply": "(\\d+"}, "write a regular expression with a .group."),
        ({"--judge_reply": "\\d+"}, "write a regular expression with a .group."),
        ({"--judge_reply": "(" * 500 + ")" * 500}, "regular expression"),
        ({"--judge_batch": "0"}, "--judge_batch 0: give a number at least 1"),
        ({"--judge_think": "1e9"}, "--judge_think.*: invalid int value"),
        ({"--judge_draws": "0"}, "--judge_draws 0: give a number"),
        ({"--judge_in_flight": "-1"}, "--judge_in_flight -1: give a number"),
        ({"--judge_timeout": "nan"}, "--judge_timeout nan"),
        ({"--judge_timeout": "0"}, "--judge_timeout 0.0: give a number above 0"),
        ({"--judge_timeout": "1e30"}, "--judge_timeout 1e\\+30"),
        ({"--judge_patience": "-1"}, "--judge_patience -1"),
        ({"--judge_patience": "inf"}, "--judge_patience inf"),
        ({"--judge_order": "sideways"}, "invalid choice"),
    ],
)
def test_bad_input_is_one_line_with_the_fix_before_a_model_is_loaded(
    judge_folder, tmp_path, monkeypatch, change, message
):
    def load(*args, **options):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(reward_mllm.AutoModelForImageTextToText, "from_pretrained", load)
    with pytest.raises(BadInput, match=message) as error:
        command(tmp_path, f"local:{judge_folder}", **change)
    assert "\n" not in str(error.value)


def test_the_command_says_what_it_lacks(tmp_path):
    with pytest.raises(BadInput, match="required: --source, --edited; --help"):
        reward_mllm.main(["--prompt", "make it blue"])


def test_a_folder_that_is_no_multimodal_model_is_refused(kontext_folder):
    for folder in (kontext_folder / "text_encoder", "nowhere", "data/toy/nowhere", ""):
        with pytest.raises(BadInput, match="not a multimodal LLM.* or run .* toy first") as error:
            load_judge(JudgeSettings(judge=f"local:{folder}"))
        assert "\n" not in str(error.value)


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reward_mllm"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir())


def test_the_functions_stay_short():
    for node in ast.walk(ast.parse((ROOT / "reward_mllm.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_a_local_judge_sits_on_its_own_device(judge_folder):
    (judge_folder / "judge_prompt.txt").write_text("{prompt}")
    settings = JudgeSettings(judge=f"local:{judge_folder}", judge_device="cpu")
    found = load_judge(settings, device="cuda:7")  # where the editor is
    assert found.model.device.type == "cpu" and found.model.dtype == torch.float32


def test_an_unknown_mass_hides_no_known_one():
    known = reward_mllm.Verdict(0.5, 0.3)
    unknown = reward_mllm.Verdict(0.5)
    for verdicts in ([known, unknown], [unknown, known]):
        assert reward_mllm._joined(verdicts).mass == 0.3
    assert math.isnan(reward_mllm._joined([unknown]).mass)
