"""The judge: its score against closed forms, its tokens, its batching, and its command, on a tiny random Qwen2.5-VL."""

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
    assert torch.allclose(score, torch.tensor([0.5, 0.5])) and torch.allclose(mass, torch.tensor(6 / 30).expand(2))


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
    assert score.dtype == torch.float32 and torch.equal(score, expected_score(logits.float(), DIGITS)[0])


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
    prompts = ["make the red circle blue", "remove the green square at the top left", "add a red circle at the top right"]
    rows = [{"prompt": prompts[i // 2]} for i in range(6)]
    sources = [picture("source", i) for i in range(3)]
    return rows, [[sources[i // 2]] for i in range(6)], [picture("edit", i) for i in range(6)]


def test_the_score_is_that_of_a_plain_forward_of_the_model(judge, judge_folder):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    source, edit, text = picture("s"), picture("e"), "make the red circle blue"
    tokenizer, model = AutoTokenizer.from_pretrained(judge_folder), Qwen2_5_VLForConditionalGeneration.from_pretrained(judge_folder)
    seen = "<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"
    ids = tokenizer(f"<|im_start|>{text}{seen}{seen}<|im_end|><|im_start|>", return_tensors="pt").input_ids
    pixels = torch.stack([torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1) / 255 for p in (source, edit)])
    logits = model(input_ids=ids, pixel_values=data_prep.judge_patches(pixels), image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
                   mm_token_type_ids=(ids == model.config.image_token_id).int()).logits[:, -1]  # fmt: skip
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
    alone = torch.cat([judge.score([row], [source], [edit]).score for row, source, edit in zip(*asked)])
    first = judge.score([rows[0]] * 6, sources, edits).score
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together - first)[2:].abs().max() > 1e-3


def test_source_and_edit_are_not_exchanged(judge):
    one, other, row = picture("a"), picture("b"), [{"prompt": "make the red circle blue"}]
    assert abs(judge.score(row, [[one]], [other]).score - judge.score(row, [[other]], [one]).score) > 1e-3


def test_several_source_pictures_are_all_seen(judge):
    row, edit = [{"prompt": "make the red circle blue"}], [picture("edit")]
    scores = [judge.score(row, [[picture("a"), picture(second)]], edit).score.item() for second in ("b", "c")]
    assert abs(scores[0] - scores[1]) > 1e-4


def test_pictures_of_other_sizes_are_judged_in_one_batch(judge):
    rows = [{"prompt": "make the red circle blue"}] * 2
    sources, edits = [[picture("a")], [picture("b", size=(64, 32))]], [picture("c"), picture("d", size=(64, 32))]
    both = judge.score(rows, sources, edits).score
    assert both[1] == pytest.approx(judge.score(rows[1:], sources[1:], edits[1:]).score.item(), abs=1e-5)


def test_pixels_reach_the_model_unchanged(judge, monkeypatch):
    seen, shown = {}, [picture("source"), picture("edit")]
    forward = judge.model.forward
    monkeypatch.setattr(judge.model, "forward", lambda **kwargs: seen.update(kwargs) or forward(**kwargs))
    judge.score([{"prompt": "make the red circle blue"}], [shown[:1]], shown[1:])
    pixels = torch.stack([torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1) / 255 for p in shown])
    assert torch.allclose(seen["pixel_values"], data_prep.judge_patches(pixels), atol=1e-6)


def test_many_edits_take_two_forwards_and_no_generate(judge, asked, monkeypatch):
    calls, forward = [], judge.model.forward
    monkeypatch.setattr(judge.model, "forward", lambda **kwargs: calls.append(1) or forward(**kwargs))
    monkeypatch.setattr(judge.model, "generate", lambda *a, **k: pytest.fail("generate was called"))
    judge.score(*asked)
    assert len(calls) == 2  # what the edits share, then the edits


def test_a_source_shown_with_several_edits_is_prepared_once(judge, monkeypatch):
    sizes, prepare = [], judge.processor.image_processor.preprocess
    monkeypatch.setattr(judge.processor.image_processor, "preprocess",
                        lambda images, *a, **k: sizes.append(sum(map(len, images))) or prepare(images, *a, **k))  # fmt: skip
    source = picture("source")
    judge.score([{"prompt": "make the red circle blue"}] * 4, [[source]] * 4, [picture(i) for i in range(4)])
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


# ---------------------------------------------------------------- tokens and prompts


def word_tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]"))
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
    assert question.index("make") < question.index("<|image_pad|>") and question.count("<|image_pad|>") == 2


def test_a_judge_may_bring_its_own_prompt(tmp_path):
    read = lambda *files: reward_mllm.read_prompts(JudgeSettings(judge=f"local:{tmp_path}", judge_prompt=list(files)))  # noqa: E731
    assert read() == reward_mllm.PROMPTS
    (tmp_path / "judge_prompt.txt").write_text("mine: {prompt}")
    assert read() == reward_mllm.PROMPTS | {"execution": "mine: {prompt}"}
    (tmp_path / "other.txt").write_text("other: {prompt}")
    assert read(f"{tmp_path}/other.txt")["execution"] == "other: {prompt}"
    named = read(f"consistency={tmp_path}/other.txt")
    assert (named["consistency"], named["execution"]) == ("other: {prompt}", "mine: {prompt}")


# ---------------------------------------------------------------- the command and bad input


def test_the_command_prints_score_mass_terms_and_likely_words(judge_folder, tmp_path, capsys):
    picture("a").save(tmp_path / "a.png")
    picture("b").save(tmp_path / "b.png")
    reward_mllm.main(["--source", str(tmp_path / "a.png"), "--edited", str(tmp_path / "b.png"),
                      "--prompt", "make the red circle blue", "--judge", f"local:{judge_folder}"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "score 0." in printed and "mass on answers" in printed and "it would say '" in printed and "execution 0." in printed


@pytest.mark.parametrize("change, message", [
    ({"--judge": "ftp://localhost"}, "not of the form local:MODEL"),
    ({"--judge": "local:nowhere"}, "nowhere: no such model folder"),
    ({"--edited": "nowhere.png"}, "nowhere.png: no such picture"),
    ({"--prompt": ""}, "--prompt is missing"),
    ({"--judge_prompt": "nowhere.txt"}, "nowhere.txt: no such file"),
])  # fmt: skip
def test_bad_input_is_one_line_with_the_mend(judge_folder, tmp_path, change, message):
    picture("a").save(tmp_path / "a.png")
    words = {"--source": str(tmp_path / "a.png"), "--edited": str(tmp_path / "a.png"), "--prompt": "make",
             "--judge": f"local:{judge_folder}"} | change  # fmt: skip
    with pytest.raises(BadInput, match=message) as error:
        reward_mllm.main([word for pair in words.items() for word in pair])
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_multimodal_model_is_refused(kontext_folder):
    with pytest.raises(BadInput, match="not a multimodal LLM"):
        load_judge(JudgeSettings(judge=f"local:{kontext_folder / 'text_encoder'}"))


def test_importing_does_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import reward_mllm"],
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir())
