"""The judge: its score against closed forms, its tokens, its batching, and its command, on a tiny random Qwen2.5-VL."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_prep
import reward_mllm
from data_prep import BadInput, seeded
from reward_mllm import JudgeSettings, answer_token_ids, expected_score, load_judge

ROOT = Path(__file__).parents[1]
DIGITS = torch.arange(3, 9)  # where "0" to "5" stand in the made-up vocabularies below

# ---------------------------------------------------------------- expected_score


def test_equal_logits_score_one_half_with_six_words_mass():
    score, mass = expected_score(torch.zeros(2, 30), DIGITS)
    assert torch.allclose(score, torch.tensor([0.5, 0.5])) and torch.allclose(
        mass, torch.tensor(6 / 30).expand(2)
    )


@pytest.mark.parametrize("digit", range(6))
def test_a_certain_digit_scores_itself_over_five(digit):
    logits = torch.zeros(1, 30)
    logits[0, 3 + digit] = 60.0
    score, mass = expected_score(logits, DIGITS)
    assert score.item() == pytest.approx(digit / 5) and mass.item() == pytest.approx(1.0)


def test_other_words_change_the_mass_and_not_the_score():
    logits = torch.randn(1, 30, generator=seeded("logits"))
    louder = logits.clone()
    louder[0, 20] += 5
    (score, mass), (same, less) = expected_score(logits, DIGITS), expected_score(louder, DIGITS)
    assert torch.allclose(score, same) and less < mass


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_nan_in_their_row_alone(value):
    logits = torch.zeros(3, 30)
    logits[1, 25] = value
    score, mass = expected_score(logits, DIGITS)
    assert score.isnan().tolist() == mass.isnan().tolist() == [False, True, False]


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(4, 30, generator=seeded("half")).bfloat16()
    score, _ = expected_score(logits, DIGITS)
    assert score.dtype == torch.float32 and torch.equal(
        score, expected_score(logits.float(), DIGITS)[0]
    )


def test_logits_of_the_wrong_shape_are_refused():
    with pytest.raises(AssertionError, match=r"\(B, V\)"):
        expected_score(torch.zeros(30), DIGITS)


# ---------------------------------------------------------------- a tiny judge


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory):
    """The toy's judge with random weights, as data_prep saves it."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    tokenizer = data_prep.new_judge_tokenizer()
    model = data_prep.new_judge(tokenizer)
    for p in model.parameters():
        p.data *= 3  # loud enough that different questions get different answers
    data_prep.save_judge(model, tokenizer, folder)
    return folder


def local(folder, prompt="{prompt}", **changes):
    """The judge of a folder, asked by `prompt`."""
    (folder / "judge_prompt.txt").write_text(prompt)
    return load_judge(JudgeSettings(judge=f"local:{folder}", **changes))


@pytest.fixture(scope="session")
def judge(judge_folder):
    return local(judge_folder)


def picture(*key, size=(32, 32)):
    noise = torch.rand(size[1], size[0], 3, generator=seeded("picture", *key))
    return Image.fromarray((noise * 255).byte().numpy())


@pytest.fixture
def asked():
    """Six edits of three rows with instructions of different lengths."""
    prompts = [
        "make the red circle blue",
        "remove the green square at the top left",
        "add a red circle at the top right",
    ]
    rows = [{"prompt": prompts[i // 2]} for i in range(6)]
    sources = [picture("source", i) for i in range(3)]
    return rows, [[sources[i // 2]] for i in range(6)], [picture("edit", i) for i in range(6)]


def test_the_score_is_that_of_a_plain_forward_of_the_model(judge, judge_folder):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    source, edit, text = picture("s"), picture("e"), "make the red circle blue"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(judge_folder),
        Qwen2_5_VLForConditionalGeneration.from_pretrained(judge_folder),
    )
    seen = "<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"
    ids = tokenizer(
        f"<|im_start|>{text}{seen}{seen}<|im_end|><|im_start|>", return_tensors="pt"
    ).input_ids
    pixels = torch.stack(
        [torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1) / 255 for p in (source, edit)]
    )
    logits = model(
        input_ids=ids,
        pixel_values=data_prep.judge_patches(pixels),
        image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
    ).logits[:, -1]
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "012345"]
    wanted = logits[0, digits].softmax(0)
    scores = judge.score([{"prompt": text}], [[source]], [edit])
    assert scores.mass.item() == pytest.approx(logits.softmax(1)[0, digits].sum().item(), abs=1e-5)
    assert scores.score.item() == pytest.approx((wanted @ torch.arange(6.0) / 5).item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_scores_do_not_depend_on_the_batch(judge, judge_folder, asked, batch_size):
    other = local(judge_folder, judge_batch=batch_size)
    assert torch.allclose(judge.score(*asked).score, other.score(*asked).score, atol=1e-5)


def test_scores_do_not_depend_on_the_order(judge, asked):
    backwards = judge.score(*(items[::-1] for items in asked)).score
    assert torch.allclose(judge.score(*asked).score, backwards.flip(0), atol=1e-5)


def test_each_edit_is_judged_under_its_own_instruction(judge_folder, asked):
    rows, sources, edits = asked
    judge = local(judge_folder, judge_batch=4)
    together = judge.score(rows, sources, edits).score
    alone = torch.cat(
        [judge.score([row], [source], [edit]).score for row, source, edit in zip(*asked)]
    )
    first = judge.score([rows[0]] * 6, sources, edits).score
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together - first)[2:].abs().max() > 1e-3


def test_source_and_edit_are_not_exchanged(judge):
    one, other, row = picture("a"), picture("b"), [{"prompt": "make the red circle blue"}]
    assert (
        abs(judge.score(row, [[one]], [other]).score - judge.score(row, [[other]], [one]).score)
        > 1e-3
    )


def test_several_source_pictures_are_all_seen(judge):
    row, edit = [{"prompt": "make the red circle blue"}], [picture("edit")]
    scores = [
        judge.score(row, [[picture("a"), picture(second)]], edit).score.item()
        for second in ("b", "c")
    ]
    assert abs(scores[0] - scores[1]) > 1e-4


def test_pictures_of_other_sizes_are_judged_in_one_batch(judge):
    rows = [{"prompt": "make the red circle blue"}] * 2
    sources, edits = (
        [[picture("a")], [picture("b", size=(64, 32))]],
        [picture("c"), picture("d", size=(64, 32))],
    )
    both = judge.score(rows, sources, edits).score
    assert both[1] == pytest.approx(
        judge.score(rows[1:], sources[1:], edits[1:]).score.item(), abs=1e-5
    )


def test_pixels_reach_the_model_unchanged(judge, monkeypatch):
    seen, shown = {}, [picture("source"), picture("edit")]
    forward = judge.model.forward
    monkeypatch.setattr(
        judge.model, "forward", lambda **kwargs: seen.update(kwargs) or forward(**kwargs)
    )
    judge.score([{"prompt": "make the red circle blue"}], [shown[:1]], shown[1:])
    pixels = torch.stack(
        [torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1) / 255 for p in shown]
    )
    assert torch.allclose(seen["pixel_values"], data_prep.judge_patches(pixels), atol=1e-6)


def test_many_edits_take_two_forwards_and_no_generate(judge, asked, monkeypatch):
    calls, forward = [], judge.model.forward
    monkeypatch.setattr(
        judge.model, "forward", lambda **kwargs: calls.append(1) or forward(**kwargs)
    )
    monkeypatch.setattr(judge.model, "generate", lambda *a, **k: pytest.fail("generate was called"))
    judge.score(*asked)
    assert len(calls) == 2  # what the edits share, then the edits


def test_a_source_shown_with_several_edits_is_prepared_once(judge, monkeypatch):
    sizes, prepare = [], judge.processor.image_processor.preprocess
    monkeypatch.setattr(
        judge.processor.image_processor,
        "preprocess",
        lambda images, *a, **k: sizes.append(sum(map(len, images))) or prepare(images, *a, **k),
    )
    source = picture("source")
    judge.score(
        [{"prompt": "make the red circle blue"}] * 4, [[source]] * 4, [picture(i) for i in range(4)]
    )
    assert sizes == [1, 4]


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
    assert failed.sum() == 1 and torch.equal(scores.score[~failed], clean[~failed])
    assert [cause for cause in scores.causes if cause] == ["logits that are not finite"]


def test_no_edits_give_no_scores(judge):
    assert judge.score([], [], []).score.shape == (0,)


# ---------------------------------------------------------------- a group's shared prefix


def test_a_shared_prefix_leaves_the_scores_as_they_are(judge, asked, monkeypatch):
    assert judge.shares_prefix
    shared = judge.score(*asked)
    monkeypatch.setattr(judge, "shares_prefix", False)
    whole = judge.score(*asked)
    assert torch.allclose(shared.score, whole.score, atol=1e-6) and torch.allclose(
        shared.mass, whole.mass, atol=1e-6
    )


def test_groups_of_other_lengths_and_sizes_share_their_own_prefixes(judge, monkeypatch):
    rows = [{"prompt": "make the red circle blue"}] * 3 + [
        {"prompt": "remove the green square at the top left"}
    ] * 3
    one, two = [picture("one")], [picture("two"), picture("three", size=(64, 32))]
    asked = (
        rows,
        [one] * 3 + [two] * 3,
        [picture("edit", i, size=(32, 32) if i % 2 else (32, 64)) for i in range(6)],
    )
    shared = judge.score(*asked).score
    monkeypatch.setattr(judge, "shares_prefix", False)
    assert torch.allclose(shared, judge.score(*asked).score, atol=1e-6)


@pytest.mark.parametrize("fault", ["mixes up the prefixes", "refuses the cache"])
def test_a_model_that_cannot_share_a_prefix_is_judged_whole(
    judge_folder, asked, judge, monkeypatch, fault
):
    from transformers import DynamicCache

    reorder, wrong, right = (
        DynamicCache.reorder_cache,
        local(judge_folder),
        judge.score(*asked).score,
    )
    if fault == "mixes up the prefixes":
        monkeypatch.setattr(
            DynamicCache,
            "reorder_cache",
            lambda cache, owner: reorder(cache, torch.zeros_like(owner)),
        )
    else:
        monkeypatch.setattr(wrong, "cache_name", "no_such_argument")
    wrong.use("logits")
    assert not wrong.shares_prefix and torch.allclose(wrong.score(*asked).score, right, atol=1e-5)


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
def test_other_families_are_judged_and_share_their_prefix(family, tmp_path, asked, monkeypatch):
    torch.manual_seed(0)
    tokenizer = data_prep.new_judge_tokenizer()
    if family == "InternVL":
        pytest.importorskip("torchvision")
        save_tiny_internvl(tokenizer, tmp_path)
    else:
        model = tiny_qwen3_vl(tokenizer)
        for p in model.parameters():
            p.data *= 3
        data_prep.save_judge(model, tokenizer, tmp_path)
    judge = local(tmp_path)
    assert judge.shares_prefix
    shared = judge.score(*asked)
    monkeypatch.setattr(judge, "shares_prefix", False)
    assert (
        torch.allclose(shared.score, judge.score(*asked).score, atol=1e-5)
        and shared.score.std() > 0.01
    )


# ---------------------------------------------------------------- what the model refuses


def test_a_refused_picture_does_not_take_its_batch_with_it(judge, asked):
    rows, sources, edits = asked
    clean = judge.score(*asked).score
    scores = judge.score(rows, sources, [*edits[:3], picture("thin", size=(2000, 4)), *edits[4:]])
    assert scores.score.isnan().tolist() == [False, False, False, True, False, False]
    assert scores.causes[3].startswith("refused: ") and scores.causes[:3] == [""] * 3
    assert torch.allclose(scores.score[[0, 1, 2, 4, 5]], clean[[0, 1, 2, 4, 5]], atol=1e-5)


def test_an_instruction_that_holds_the_picture_mark_is_refused_alone(judge, asked):
    rows, sources, edits = asked
    scores = judge.score([*rows[:5], {"prompt": "make <|image_pad|> blue"}], sources, edits)
    assert scores.score.isnan().tolist() == [False] * 5 + [True] and "refused" in scores.causes[5]


def test_a_silent_judge_is_refused_with_what_it_would_say(judge, asked):
    scores = judge.score(*asked)
    reward_mllm.refuse_silent_judge(scores, "judge", least=0.0)
    with pytest.raises(
        BadInput,
        match=r"puts .*% of its probability on the answers that count and would rather say '.*' \d+%",
    ):
        reward_mllm.refuse_silent_judge(scores._replace(mass=scores.mass * 0.1), "judge")
    failed = scores._replace(
        score=scores.score * torch.nan, mass=scores.mass * torch.nan, causes=["timeout"] * 6
    )
    with pytest.raises(BadInput, match="gave no score: 6 x timeout"):
        reward_mllm.refuse_silent_judge(failed, "judge")


def test_submit_judges_one_group_and_ask_returns_text(judge, asked):
    rows, sources, edits = asked
    future = judge.submit(rows[0], sources[0], edits[:3])
    assert torch.allclose(
        future.result().score,
        judge.score([rows[0]] * 3, [sources[0]] * 3, edits[:3]).score,
        atol=1e-6,
    )
    assert isinstance(judge.ask("make the red circle blue", [edits[0]], max_tokens=4), str)
    with pytest.raises(reward_mllm.JudgeFailure, match="refused"):
        judge.ask("make", [picture("thin", size=(2000, 4))], max_tokens=4)


# ---------------------------------------------------------------- strategies


def test_after_a_chain_of_thought_the_answer_follows_the_thought(judge_folder):
    judge = local(judge_folder, judge_strategy="logits_cot", judge_thought=3)
    seen, make = [], judge.processor.apply_chat_template
    row, source, edit = {"prompt": "make the red circle blue"}, picture("s"), picture("e")
    judge._chat = lambda turns, pictures: (
        seen.append(turns)
        or make(
            reward_mllm.chat(turns, [{"type": "image"}] * pictures),
            tokenize=False,
            add_generation_prompt=True,
        )
    )
    score = judge.score([row], [[source]], [edit]).score
    (question,), (same, thought, ending) = seen[0], seen[-1]
    assert question == same and ending == reward_mllm.DIGIT
    assert thought == judge.ask(question, [source, edit], max_tokens=3)
    logits = judge._logits(
        [judge._chat((question, thought, ending), 2)], [[source, edit]], share=False
    )
    assert score.item() == pytest.approx(
        expected_score(logits, judge.token_ids)[0].item(), abs=1e-6
    )


def test_a_sampled_score_is_a_digit_drawn_from_the_judges_own_distribution(judge_folder):
    judge = local(judge_folder, judge_strategy="sampled", judge_batch=64)
    row, source = {"prompt": "make the red circle blue"}, picture("s")
    edits = [picture("e", i) for i in range(200)]
    asked = ([row] * 200, [[source]] * 200, edits)
    scores = judge.score(*asked)
    assert set(scores.causes) == {"", "sampled no digit"} and scores.score.isnan().tolist() == list(
        map(bool, scores.causes)
    )
    assert all(
        min(abs(5 * score - k) for k in range(6)) < 1e-5
        for score in scores.score[~scores.score.isnan()].tolist()
    )
    assert torch.equal(scores.score.nan_to_num(9), judge.score(*asked).score.nan_to_num(9))
    share = (
        (~scores.score.isnan()).float().mean().item()
    )  # of 200 draws; its standard error is below 0.036
    assert abs(share - scores.mass.mean().item()) < 0.11


def test_yes_against_no_is_read_off_the_logits(judge_folder, tmp_path):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    tokenizer, model = (
        AutoTokenizer.from_pretrained(judge_folder),
        Qwen2_5_VLForConditionalGeneration.from_pretrained(judge_folder),
    )
    tokenizer.add_tokens(["yes", "Yes", "no", "No"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    data_prep.save_judge(model, tokenizer, tmp_path)
    judge = local(tmp_path, "{prompt} {answer}", judge_strategy="yes_no")
    row, source, edit = {"prompt": "make the red circle blue"}, picture("s"), picture("e")
    logits = judge._logits([judge._chat((judge.question(row),), 2)], [[source, edit]], share=False)[
        0
    ]
    yes, Yes, no, No = (
        logits[tokenizer.convert_tokens_to_ids(word)].exp() for word in ("yes", "Yes", "no", "No")
    )
    scores = judge.score([row], [[source]], [edit])
    assert scores.score.item() == pytest.approx(
        ((yes + Yes) / (yes + Yes + no + No)).item(), abs=1e-5
    )
    assert reward_mllm.YES_NO in judge.question(row)


def test_a_strategy_that_the_judge_cannot_follow_is_refused(judge_folder):
    with pytest.raises(BadInput, match="has no {answer} for --judge_strategy yes_no"):
        local(judge_folder, judge_strategy="yes_no")
    with pytest.raises(BadInput, match="the answer yes is not one token"):
        local(judge_folder, "{prompt} {answer}", judge_strategy="yes_no")


# ---------------------------------------------------------------- aspects, formula, plain terms


def test_every_aspect_has_its_own_question_and_the_formula_joins_them(
    judge_folder, tmp_path, asked
):
    (tmp_path / "other.txt").write_text("remove {prompt}")
    both = local(
        judge_folder,
        judge_formula="execution * (0.6 + 0.4 * kept)",
        judge_prompt=[f"kept={tmp_path}/other.txt"],
    )
    scores, rows = both.score(*asked), asked[0]
    alone = local(judge_folder).score(*asked).score
    kept = local(judge_folder, "remove {prompt}").score(*asked).score
    assert torch.allclose(scores.terms["execution"], alone, atol=1e-5) and torch.allclose(
        scores.terms["kept"], kept, atol=1e-5
    )
    assert (alone - kept).abs().max() > 1e-3
    assert torch.allclose(scores.score, alone * (0.6 + 0.4 * kept), atol=1e-5)
    assert (
        set(scores.terms)
        == {"execution", "kept", "pixel_distance", "brightness_drift", "sharpness_drift"}
        and len(rows) == 6
    )


def formula(text):
    tree, aspects = reward_mllm.read_formula(text, reward_mllm.PROMPTS)
    values = {
        "execution": torch.tensor([0.5, torch.nan]),
        "consistency": torch.tensor([0.25, 0.5]),
        "quality": torch.tensor([0.8, 0.1]),
        "pixel_distance": torch.tensor([0.1, 0.1]),
        "brightness_drift": torch.tensor([-0.5, 0.5]),
    }
    return reward_mllm.evaluate_formula(tree, values), aspects


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("execution", 0.5),
        ("execution * (0.6 + 0.4 * consistency)", 0.35),
        ("(execution + consistency) * 0.5", 0.375),
        ("min(execution, consistency)", 0.25),
        ("execution * (1 - abs(brightness_drift))", 0.25),
        ("1 - -execution * 0 - 0.5", 0.5),
        ("max(execution, 0.9) * quality", 0.72),
        ("execution * (1 - pixel_distance)", 0.45),
    ],
)
def test_a_formula_is_its_arithmetic_and_a_missing_aspect_leaves_no_score(text, wanted):
    values, _ = formula(text)
    assert values[0].item() == pytest.approx(wanted) and values[1].isnan()


def test_a_formula_names_the_aspects_that_are_asked():
    assert formula("execution * consistency * (1 - pixel_distance)")[1] == [
        "consistency",
        "execution",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "execution.__class__",
        "execution ** 9",
        "execution if 1 else 0",
        "[execution]",
        "execution[0]",
        "(lambda: execution)()",
        "'a' * 9",
        "execution / 2",
        "execution and 1",
        "min(execution)",
        "abs(execution, 1)",
        "",
        "execution +",
        "1e999 * execution",
        "execution + consistency",
        "execution - consistency",
        "2 * execution",
        "execution * brightness_drift",
        "1",
        "(" * 300 + "execution" + ")" * 300,
        "min(*[execution, 1])",
        "execution\x00",
    ],
)
def test_anything_else_is_no_formula(text):
    with pytest.raises(BadInput, match="judge_formula"):
        formula(text)


def test_an_unknown_aspect_is_refused_with_the_mend(judge_folder):
    with pytest.raises(
        BadInput,
        match="--judge_formula: kept is neither an aspect .* give it a prompt, --judge_prompt kept=FILE",
    ):
        local(judge_folder, judge_formula="execution * kept")


def test_plain_terms_know_an_untouched_a_blurred_and_a_brighter_picture():
    from PIL import ImageFilter

    source = picture("source", size=(64, 48)).resize((256, 192))
    brighter = Image.eval(source, lambda level: level // 2 + 100)
    edits = [source, source.filter(ImageFilter.GaussianBlur(3)), brighter, source.resize((128, 96))]
    terms = data_prep.plain_terms([[source]] * 4, edits)
    assert all(abs(terms[name][0]) < 1e-6 for name in terms)
    assert terms["sharpness_drift"][1] < -0.5 and abs(terms["brightness_drift"][1]) < 0.01
    change = (np.asarray(brighter, float) - np.asarray(source, float)) / 255
    assert terms["brightness_drift"][2] == pytest.approx(change.mean(), abs=1e-5)
    assert terms["pixel_distance"][2] == pytest.approx(np.abs(change).mean(), abs=1e-5)
    assert abs(terms["pixel_distance"][3]) < 0.05 and set(terms) == set(data_prep.PLAIN_TERMS)


# ---------------------------------------------------------------- requirements


IMGEDIT = "add adjust alter background replace remove extract style action compose hybrid".split()
GEDIT = """background_change color_alter material_alter motion_change ps_human style_change subject-add subject-remove
    subject-replace text_change tone_transfer""".split()
TRAINING = [
    "Replace",
    "Adjust",
    "Remove",
    "Background",
    "Hybrid",
    "Action",
    "Text",
    "Red-box",
    "Reference",
    "Extract",
]


@pytest.mark.parametrize("task", IMGEDIT + GEDIT + TRAINING)
def test_every_task_has_a_requirement_of_its_own(task):
    text = data_prep.requirement_of({"prompt": "x", "task": task})
    assert text != data_prep.requirement_of({"prompt": "x"}) and text.endswith(".")


def test_a_rows_own_requirement_comes_first():
    assert data_prep.requirement_of({"task": "add", "requirement": "mine"}) == "mine"
    assert (
        data_prep.requirement_of({"task": "unheard of"})
        == data_prep.requirement_of({})
        == data_prep.REQUIREMENTS[""]
    )


# ---------------------------------------------------------------- agreement with people


def test_pairs_are_counted_as_right_wrong_or_half():
    assert data_prep.ordered_pairs([0.9, 0.1, 0.5], [3, 1, 2]) == (3, 3, 0)
    assert data_prep.ordered_pairs([0.1, 0.9], [3, 1]) == (1, 0, 0)
    assert data_prep.ordered_pairs([0.5, 0.5, 0.7], [1, 2, 2]) == (
        2,
        1.5,
        1,
    )  # one tie, one right, one without a label
    assert data_prep.ordered_pairs([0.5, float("nan")], [1, 2]) == (0, 0, 0)


def ratings(folder, *lines):
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
    lines = [{"prompt": "make the red circle blue", "image": "0.png"} | line for line in lines]
    (folder / "ratings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "ratings.jsonl"


def test_agree_prints_a_line_for_each_strategy(judge_folder, judge, tmp_path, capsys):
    local(judge_folder)
    marks = judge.score(
        [{"prompt": "make the red circle blue"}] * 3,
        [[picture(0)]] * 3,
        [picture(i) for i in (1, 2, 3)],
    ).score.tolist()
    better = float(marks[1] > marks[0])
    file = ratings(
        tmp_path,
        {"edits": ["1.png", "2.png", "3.png"], "scores": marks},
        {"edits": ["1.png", "2.png"], "preference": better},
    )
    reward_mllm.main(
        [
            "agree",
            str(file),
            "--judge",
            f"local:{judge_folder}",
            "--strategies",
            "logits",
            "yes_no",
            "sampled",
        ]
    )
    printed = capsys.readouterr().out.splitlines()
    assert (
        "5 edits in 2 groups" in printed[0]
        and printed[2].startswith("logits")
        and "100.0%" in printed[2]
    )
    assert "has no {answer}" in printed[3] and printed[4].startswith("sampled")


@pytest.mark.parametrize(
    "line, message",
    [
        ({"edits": ["1.png", "2.png"]}, "lacks `edits` with `scores` or a `preference`"),
        ({"scores": [1]}, "lacks `edits`"),
        ({"edits": ["1.png"], "scores": [1, 2]}, "has 1 edits and 2 scores"),
        ({"edits": ["9.png"], "scores": [1]}, "9.png: no such picture"),
        ({"edits": ["1.png"], "scores": ["good"]}, "lacks `edits`"),
    ],
)
def test_a_rating_that_cannot_be_read_is_refused(tmp_path, line, message):
    with pytest.raises(BadInput, match=message):
        data_prep.read_ratings(ratings(tmp_path, line))


def test_agree_refuses_what_it_does_not_know(judge_folder, tmp_path):
    with pytest.raises(BadInput, match="names no file"):
        reward_mllm.main(["agree", "--judge", f"local:{judge_folder}"])
    with pytest.raises(BadInput, match="--strategies guess: no strategy"):
        reward_mllm.main(["agree", str(ratings(tmp_path)), "--strategies", "guess"])


# ---------------------------------------------------------------- tokens and prompts


def word_tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[unk]")


def test_digit_ids_are_asked_of_the_tokenizer():
    assert answer_token_ids(word_tokenizer(["[unk]", *"012345"])) == [1, 2, 3, 4, 5, 6]
    assert answer_token_ids(word_tokenizer(["[unk]", "x", *"543210"])) == [7, 6, 5, 4, 3, 2]


def test_a_tokenizer_without_a_digit_is_refused():
    with pytest.raises(BadInput, match="the answer 4 is not one token"):
        answer_token_ids(word_tokenizer(["[unk]", *"01235"]))


def test_a_tokenizer_that_splits_a_digit_is_refused(monkeypatch):
    tokenizer = word_tokenizer(["[unk]", *"012345"])
    monkeypatch.setattr(tokenizer, "encode", lambda digit, **kwargs: [9, "012345".index(digit)])
    with pytest.raises(BadInput, match="the answer 0 is not one token"):
        answer_token_ids(tokenizer)


def test_braces_in_an_instruction_reach_the_judge_as_they_are(judge_folder):
    judge = local(judge_folder, "{requirement} | {prompt}")
    question = judge.question({"prompt": "write {x} and {requirement}", "requirement": "text {y}"})
    assert "text {y} | write {x} and {requirement}" in question


def test_the_instruction_comes_before_the_pictures(judge):
    question = judge._chat((judge.question({"prompt": "make the red circle blue"}),), 2)
    assert (
        question.index("make") < question.index("<|image_pad|>")
        and question.count("<|image_pad|>") == 2
    )


def test_a_judge_may_bring_its_own_prompt(tmp_path):
    read = lambda *files: reward_mllm.read_prompts(
        JudgeSettings(judge=f"local:{tmp_path}", judge_prompt=list(files))
    )  # noqa: E731
    assert read() == reward_mllm.PROMPTS
    (tmp_path / "judge_prompt.txt").write_text("mine: {prompt}")
    assert read() == reward_mllm.PROMPTS | {"execution": "mine: {prompt}"}
    (tmp_path / "other.txt").write_text("other: {prompt}")
    assert read(f"{tmp_path}/other.txt")["execution"] == "other: {prompt}"
    named = read(f"consistency={tmp_path}/other.txt")
    assert (named["consistency"], named["execution"]) == ("other: {prompt}", "mine: {prompt}")


# ---------------------------------------------------------------- the command and bad input


def test_the_command_prints_score_six_probabilities_mass_terms_and_likely_words(
    judge_folder, tmp_path, capsys
):
    picture("a").save(tmp_path / "a.png")
    picture("b").save(tmp_path / "b.png")
    reward_mllm.main(
        [
            "--source",
            str(tmp_path / "a.png"),
            "--edited",
            str(tmp_path / "b.png"),
            "--prompt",
            "make the red circle blue",
            "--judge",
            f"local:{judge_folder}",
        ]
    )
    printed = capsys.readouterr().out
    assert (
        "score 0." in printed
        and "mass on answers" in printed
        and "it would say '" in printed
        and "execution 0." in printed
    )
    shares = [float(re.search(rf"p\({digit}\) (0\.\d+)", printed)[1]) for digit in range(6)]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    score = float(re.search(r"score (0\.\d+)", printed)[1])
    assert sum(digit * share for digit, share in enumerate(shares)) / 5 == pytest.approx(
        score, abs=1e-3
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--judge": "ftp://localhost"}, "not of the form local:MODEL"),
        ({"--judge": "local:nowhere"}, "nowhere: no such model folder"),
        ({"--edited": "nowhere.png"}, "nowhere.png: no such picture"),
        ({"--prompt": ""}, "--prompt is missing"),
        ({"--judge_prompt": "nowhere.txt"}, "nowhere.txt: no such file"),
    ],
)
def test_bad_input_is_one_line_with_the_mend(judge_folder, tmp_path, change, message):
    picture("a").save(tmp_path / "a.png")
    words = {
        "--source": str(tmp_path / "a.png"),
        "--edited": str(tmp_path / "a.png"),
        "--prompt": "make",
        "--judge": f"local:{judge_folder}",
    } | change
    with pytest.raises(BadInput, match=message) as error:
        reward_mllm.main([word for pair in words.items() for word in pair])
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_multimodal_model_is_refused(kontext_folder):
    with pytest.raises(BadInput, match="not a multimodal LLM"):
        load_judge(JudgeSettings(judge=f"local:{kontext_folder / 'text_encoder'}"))


def test_importing_does_nothing(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reward_mllm",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir())


def test_the_functions_stay_short():
    for node in ast.walk(ast.parse((ROOT / "reward_mllm.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_a_local_judge_sits_on_its_own_device(judge_folder):
    settings = JudgeSettings(judge=f"local:{judge_folder}", judge_device="cpu")
    assert (
        load_judge(settings, device="cuda:7").model.device.type == "cpu"
    )  # not where the editor is


def test_a_setting_of_the_judge_that_cannot_work_is_refused():
    with pytest.raises(BadInput, match="--judge_batch 0: give a value above 0"):
        JudgeSettings(judge_batch=0)
