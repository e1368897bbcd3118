"""What a judge writes for a dataset: rows for a folder of pictures, and checklists.

The judge is a rule server that knows the scene in each of the toy's pictures.
"""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from judge_server import JudgeServer

import data_prep
import evaluate
import reward_mllm
from data_prep import BadInput, CheckSettings, DiskFault, check_dataset, read_rows
from reward_mllm import Judge, JudgeFailure, JudgeSettings, Verdict, load_judge


def scene_words(number):
    """What an object's number stands for: "red circle"; "" for an empty cell."""
    return data_prep.OBJECTS[number]


def things_in(picture):
    """The objects in a toy picture, in words, each at its place."""
    pixels = data_prep._to_tensor(picture.convert("RGB"))[None]
    shown = data_prep._cell_distances(pixels).argmin(2)[0] % len(data_prep.OBJECTS)
    found = zip(data_prep.CELLS, map(scene_words, shown.tolist()), strict=True)
    return {place: words for place, words in found if words}


def edit_of(task, thing):
    return {
        "task": task,
        "instruction": f"{task} the {thing}",
        "requirement": f"the {thing} after {task}, all else as before",
    }


def writer(question, pictures):
    """A judge that writes one edit of each kind that it is asked for, of what it sees."""
    kinds = re.search("of these kinds: (.*?)\\. Speak", question, re.DOTALL).group(1).split(", ")
    things = [*things_in(pictures[-1]).values()] * len(kinds)
    return json.dumps([edit_of(*pair) for pair in zip(kinds, things, strict=False)])


def looker(question, pictures):
    """A judge that says yes where it sees the thing that an instruction names."""
    instruction = re.search("instruction: (.*)", question).group(1)
    seen = things_in(pictures[-1]).values()
    return "Yes." if any(thing in instruction for thing in seen) else "No, it is not there."


def answers(write=writer, look=looker):
    """The rule of a server that proposes by `write`, and says by `look` what is possible."""

    def says(question, pictures):
        rule = look if "Answer yes or no" in question else write
        return rule(question, pictures)

    return says


@pytest.fixture
def server():
    with JudgeServer() as server:
        server.says = answers()
        yield server


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No keys of the user's, and the signals as they were."""
    for name in ("JUDGE_API_KEY", "OPENAI_API_KEY", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def toy_pictures(folder, number):
    """A folder of toy pictures, in two folders below."""
    sources, _ = data_prep.scenes_of(data_prep._toy_rows(number, "train", "propose"))
    for i, pixels in enumerate(data_prep._render(sources)):
        below = folder / f"part{i % 2}"
        below.mkdir(parents=True, exist_ok=True)
        data_prep.to_pil(pixels).save(below / f"{i}.png")
    return folder


def propose(server, pictures, folder, *words):
    judge = ["--judge", server.url, "--judge_patience", "5"]
    reward_mllm.main(["propose", str(pictures), str(folder), *judge, *words])


def questions(server):
    """Every request as (text, bytes of its last picture), and how often it came."""
    asked = Counter()
    for request in server.requests:
        content = request["body"]["messages"][0]["content"]
        asked[content[0]["text"], content[-1]["image_url"]["url"]] += 1
    return asked


# ---------------------------------------------------------------- rows from pictures


def test_a_folder_of_pictures_becomes_a_dataset_that_check_finds_faultless(
    server, tmp_path, capsys
):
    toy_pictures(tmp_path / "mine", 20)
    propose(server, tmp_path / "mine", tmp_path / "data")
    check_dataset(CheckSettings(dataset=str(tmp_path / "data")))
    assert "no faults" in capsys.readouterr().out
    splits = [read_rows(tmp_path / "data", split) for split in ("train", "test")]
    images = [{row["image"] for row in rows} for rows in splits]
    assert not images[0] & images[1] and images[1]  # held out by picture
    assert len(splits[1]) == (len(splits[0]) + len(splits[1])) // 10  # one in ten
    for row in splits[0] + splits[1]:
        assert row["task"] in reward_mllm.REQUIREMENTS and row["requirement"].endswith("as before")
        things = things_in(Image.open(row["images"][0])).values()
        assert any(thing in row["prompt"] for thing in things)


def test_the_kinds_that_are_asked_for_come_in_the_papers_mix(server, tmp_path):
    server.says = lambda question, pictures: "nothing"
    toy_pictures(tmp_path / "mine", 50)
    with pytest.raises(BadInput, match="mine: 0 rows; left out: .*usable"):
        propose(server, tmp_path / "mine", tmp_path / "data", "--per_picture", "20")
    kinds = Counter()
    for text, _ in questions(server):
        kinds.update(re.search("kinds: (.*?)\\. Speak", text, re.DOTALL).group(1).split(", "))
    total = sum(reward_mllm.MIX.values())
    for kind, percent in reward_mllm.MIX.items():
        assert abs(kinds[kind] / 1000 - percent / total) < 0.05  # three standard errors
    assert kinds.keys() == reward_mllm.MIX.keys()


def test_the_user_may_name_the_kinds_and_their_number(server, tmp_path):
    toy_pictures(tmp_path / "mine", 4)
    words = ["--tasks", "remove", "--per_picture", "1"]
    propose(server, tmp_path / "mine", tmp_path / "data", *words)
    rows = read_rows(tmp_path / "data", "train") + read_rows(tmp_path / "data", "test")
    assert {row["task"] for row in rows} == {"remove"} and len(rows) == 4
    assert len(server.requests) == 8


GOOD = edit_of("remove", "cup")
OTHER = edit_of("replace", "large brown table with a lamp on it")


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        (json.dumps([GOOD, OTHER]), 2),
        (f"Here they are:\n```json\n{json.dumps([GOOD, OTHER], indent=2)}\n```\nHave fun!", 2),
        (json.dumps(GOOD), 1),
        (json.dumps({"edits": [GOOD, OTHER]}), 2),
        (f"{json.dumps(GOOD)}\n{json.dumps(OTHER)}", 2),
        (json.dumps([GOOD, OTHER])[:-40], 1),  # the second object has no end
        ("[1] I see a cup. {cup}" + json.dumps(GOOD), 1),
        (json.dumps(GOOD | {"task": " Remove\n"}), 1),
        (json.dumps([GOOD, "remove the cup", 3, None]), 1),
        (json.dumps(GOOD | {"instruction": ["remove the cup"]}), 0),
        (json.dumps(GOOD | {"instruction": "  "}), 0),
        (json.dumps(GOOD | {"requirement": 3}), 0),
        (json.dumps(GOOD | {"task": "style"}), 0),  # nobody asked for it
        (json.dumps({"instruction": "remove the cup"}), 0),
        ("remove the cup", 0),
        ("[" * 100000, 0),
        ("{" * 100000, 0),
        ('{"a":' * 100000, 0),
    ],
)
def test_a_reply_is_read_with_care_and_nothing_is_invented(reply, number):
    left_out = []
    rows = reward_mllm._rows_in(reply, ["remove", "replace"], left_out)
    assert len(rows) == number
    for row, wanted in zip(rows, [GOOD, OTHER], strict=False):
        assert row == wanted
    assert rows or left_out.count("pictures without a usable instruction") == 1


@pytest.mark.parametrize(
    ("first", "second", "number"),
    [
        ("remove the red car", "Remove the red car.", 1),
        ("make the car red", "make the car green", 2),
        ("remove the dog on the left", "remove the dog on the left side", 1),
        ("remove the dog", "remove the tree", 2),
    ],
)
def test_the_second_of_two_near_duplicates_is_left_out_and_counted(first, second, number):
    reply = json.dumps([GOOD | {"instruction": first}, GOOD | {"instruction": second}])
    left_out = []
    assert len(reward_mllm._rows_in(reply, ["remove"], left_out)) == number
    assert left_out.count("like another") == 2 - number


def test_what_is_not_possible_in_the_picture_is_left_out_and_counted(server, tmp_path, capsys):
    def dreamer(question, pictures):
        edits = json.loads(writer(question, pictures))
        return json.dumps([*edits, edit_of(edits[0]["task"], "dragon")])

    server.says = answers(dreamer)
    toy_pictures(tmp_path / "mine", 6)
    propose(server, tmp_path / "mine", tmp_path / "data", "--tasks", "remove", "adjust")
    rows = read_rows(tmp_path / "data", "train") + read_rows(tmp_path / "data", "test")
    assert rows and not any("dragon" in row["prompt"] for row in rows)
    assert "'not possible there': 6" in capsys.readouterr().out


def test_two_copies_of_a_picture_are_one(server, tmp_path):
    toy_pictures(tmp_path / "mine", 3)
    Image.open(tmp_path / "mine/part0/0.png").save(tmp_path / "mine/copy.png")
    propose(server, tmp_path / "mine", tmp_path / "data")
    rows = read_rows(tmp_path / "data", "train") + read_rows(tmp_path / "data", "test")
    assert len({row["image"] for row in rows}) == 3


def test_a_picture_that_cannot_be_read_is_counted_and_the_others_go_on(server, tmp_path, capsys):
    toy_pictures(tmp_path / "mine", 3)
    (tmp_path / "mine/broken.png").write_bytes(b"no picture")
    propose(server, tmp_path / "mine", tmp_path / "data")
    assert re.search("left out: .*broken.png: not a readable", capsys.readouterr().out)
    rows = read_rows(tmp_path / "data", "train") + read_rows(tmp_path / "data", "test")
    assert len({row["image"] for row in rows}) == 3


def test_a_picture_that_check_would_refuse_gets_no_rows(server, tmp_path, capsys):
    toy_pictures(tmp_path / "mine", 3)
    Image.new("RGB", (8, 40)).save(tmp_path / "mine/thin.png")
    server.says = answers(lambda *_: json.dumps(GOOD), lambda *_: "Yes")
    propose(server, tmp_path / "mine", tmp_path / "data", "--tasks", "remove")
    check_dataset(CheckSettings(dataset=str(tmp_path / "data")))
    assert "no faults" in capsys.readouterr().out
    assert "below 16" in (tmp_path / "data/left_out.jsonl").read_text()


# ---------------------------------------------------------------- nothing is paid for twice


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_and_started_again_asks_nothing_twice(server, tmp_path, number):
    toy_pictures(tmp_path / "mine", 12)
    words = ["propose", str(tmp_path / "mine"), str(tmp_path / "data"), "--judge", server.url]
    words += ["--judge_in_flight", "2"]
    server.delay = 0.1
    for least in (5, 16):  # in the first questions, and in those whether an edit is possible
        run = partial(data_prep.run_script, partial(reward_mllm.main, words))
        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        while len(server.requests) < least:
            time.sleep(0.02)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == -number
    assert not (tmp_path / "data/train.jsonl").exists()
    server.delay = 0
    reward_mllm.main(words)
    again = [times for times in questions(server).values() if times > 1]
    # at each of two stops the two that were on their way, and those that were just being kept
    assert sum(again) <= 2 * 8
    check_dataset(CheckSettings(dataset=str(tmp_path / "data")))


def test_another_judge_is_asked_anew(server, tmp_path):
    toy_pictures(tmp_path / "mine", 3)
    propose(server, tmp_path / "mine", tmp_path / "data")
    number = len(server.requests)
    (tmp_path / "data/train.jsonl").unlink()
    propose(server, tmp_path / "mine", tmp_path / "data")
    assert len(server.requests) == number
    (tmp_path / "data/train.jsonl").unlink()
    server.models = ["another"]
    propose(server, tmp_path / "mine", tmp_path / "data")
    assert len(server.requests) == 2 * number


def test_what_failed_is_counted_and_asked_again(server, tmp_path, capsys):
    toy_pictures(tmp_path / "mine", 4)
    server.faults = ["400"]
    propose(server, tmp_path / "mine", tmp_path / "data")
    assert "'HTTP 400" in capsys.readouterr().out
    (tmp_path / "data/train.jsonl").unlink()
    propose(server, tmp_path / "mine", tmp_path / "data")
    rows = read_rows(tmp_path / "data", "train") + read_rows(tmp_path / "data", "test")
    assert len({row["image"] for row in rows}) == 4
    assert set(questions(server).values()) <= {1, 2}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["propose"], "argument --pictures: expected one argument"),
        (["propose", "{}/mine"], "argument --dataset: expected one argument"),
        (["propose", "{}/mine", "--judge", "x"], "argument --dataset: expected one argument"),
        (["propose", "{}/nowhere", "{}/data"], "nowhere: holds no pictures; name a folder"),
        (["propose", "{}/empty", "{}/data"], "empty: holds no pictures"),
        (["propose", "{}/mine", "{}/data", "--per_picture", "0"], "--per_picture 0: give a number"),
        (
            ["propose", "{}/mine", "{}/full"],
            "full: holds something else, or other settings' import; name a new one",
        ),
        (
            ["propose", "{}/mine", "{}/other"],
            "other: holds something else, or other settings' import; name a new one",
        ),
        (["propose", "{}/mine", "{}/file"], "file.*cannot be written"),
        (["propose", "{}/mine", "{}/data", "--judge", "local:nowhere"], "not a multimodal LLM"),
        (["requirements", "{}/full", "--form", "song"], "invalid choice: 'song'"),
    ],
)
def test_bad_input_is_one_line_before_a_judge_is_asked(server, tmp_path, words, message):
    toy_pictures(tmp_path / "mine", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/pictures").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/train.jsonl").write_text("{}")
    words = [word.replace("{}", str(tmp_path)) for word in words]
    if "--judge" not in words:
        words += ["--judge", server.url]
    with pytest.raises(BadInput, match=message) as error:
        reward_mllm.main(words)
    assert "\n" not in str(error.value) and not server.requests
    assert not (tmp_path / "data/train.jsonl").exists()


def test_a_function_as_judge_cannot_propose(tmp_path):
    toy_pictures(tmp_path / "mine", 2)
    (tmp_path / "mine.py").write_text("def score(row, sources, edits): return [1] * len(edits)")
    words = ["propose", str(tmp_path / "mine"), str(tmp_path / "data")]
    with pytest.raises(BadInput, match="this judge does not write"):
        reward_mllm.main([*words, "--judge", f"{tmp_path}/mine.py"])


def test_a_full_disk_stops_the_questions_at_once(server, tmp_path, monkeypatch):
    toy_pictures(tmp_path / "mine", 40)

    def full(path):
        raise DiskFault(f"{path}: cannot be written (no space); make room")

    monkeypatch.setattr(reward_mllm, "whole_file", full)
    server.delay = 0.1
    with pytest.raises(DiskFault, match="judge_said/.*: cannot be written"):
        propose(server, tmp_path / "mine", tmp_path / "data", "--judge_in_flight", "2")
    assert len(server.requests) < 8


def test_a_full_disk_while_pictures_are_copied_costs_no_answer(server, tmp_path, monkeypatch):
    toy_pictures(tmp_path / "mine", 3)

    def full(cell, key, place, settings):
        raise DiskFault(
            f"{settings.dataset}/pictures/a.png: cannot be written (no space); make room"
        )

    with monkeypatch.context() as patch:
        patch.setattr(data_prep, "_keep_picture", full)
        with pytest.raises(DiskFault, match="a.png: cannot be written .no space.; make room"):
            propose(server, tmp_path / "mine", tmp_path / "data")
    propose(server, tmp_path / "mine", tmp_path / "data")
    assert set(questions(server).values()) == {1}


def test_a_folder_that_is_called_like_a_picture_is_counted(server, tmp_path, capsys):
    toy_pictures(tmp_path / "mine", 3)
    (tmp_path / "mine/album.png").mkdir()
    propose(server, tmp_path / "mine", tmp_path / "data")
    assert re.search("left out: .*album.png.*no such", capsys.readouterr().out)


# ---------------------------------------------------------------- checklists: written


ITEMS = ["Is the circle blue?", "Is the square as before?"]
LISTS = f"- done: {ITEMS[0]}\nKept: {ITEMS[1]}"


def checklist(server, folder):
    reward_mllm.main(["requirements", str(folder), "--judge", server.url, "--form", "checklist"])
    return [json.loads(line) for line in (folder / "train.jsonl").open("rb")]


@pytest.fixture
def folder(tmp_path):
    toy_pictures(tmp_path, 3)
    rows = [{"prompt": f"edit {i}", "image": f"part{i % 2}/{i}.png"} for i in range(3)]
    rows[1] |= {"checklist": ["mine?"], "requirement": "as I said"}
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_judge_writes_checklists_about_doing_and_about_keeping(server, folder, capsys):
    server.says = lambda question, pictures: f"Here they are:\n\n{LISTS}\n\nHave fun!"
    rows = checklist(server, folder)
    assert [row["checklist"] for row in rows] == [ITEMS, ["mine?"], ITEMS]
    assert rows[1]["requirement"] == "as I said" and "requirement" not in rows[0]
    assert "3 of 3 rows have a checklist" in capsys.readouterr().out
    check_dataset(CheckSettings(dataset=str(folder)))


@pytest.mark.parametrize(
    "reply",
    [
        "Is the circle blue?",
        "done: Is the circle blue?",
        "done: Is the circle blue?\nkept: nothing",
        "kept: Is the square there?\nkept: Is the ground grey?",
        "done: 3\nkept: ?",
        "Have I done: is it blue? No. Is it kept: yes?",
    ],
)
def test_a_reply_without_both_kinds_of_questions_is_no_checklist(server, folder, capsys, reply):
    server.says = lambda question, pictures: reply
    rows = checklist(server, folder)
    assert "checklist" not in rows[0] and "checklist" not in rows[2]
    assert "1 of 3 rows have a checklist" in capsys.readouterr().out


def test_rows_whose_checklist_cannot_be_read_are_counted(server, folder, capsys):
    server.says = lambda question, pictures: "done: Is the circle blue?"
    checklist(server, folder)
    assert "failed: {'a reply without questions of both kinds': 2}" in capsys.readouterr().out


def test_requirements_that_were_paid_for_before_a_kill_are_not_asked_again(server, folder):
    server.says = lambda question, pictures: LISTS
    before = (folder / "train.jsonl").read_bytes()
    checklist(server, folder)
    (folder / "train.jsonl").write_bytes(before)  # as if it was killed before the rows were written
    assert all(row["checklist"] for row in checklist(server, folder))
    assert len(server.requests) == 2


def test_another_picture_under_the_same_path_is_asked_about_anew(server, folder):
    server.says = lambda question, pictures: LISTS
    before = (folder / "train.jsonl").read_bytes()
    checklist(server, folder)
    (folder / "train.jsonl").write_bytes(before)
    Image.new("RGB", (32, 32), "red").save(folder / "part0/0.png")
    server.says = lambda question, pictures: LISTS.replace("circle blue", "picture red")
    rows = checklist(server, folder)
    assert len(server.requests) == 3
    assert rows[0]["checklist"][0] == "Is the picture red?"
    assert rows[2]["checklist"] == ITEMS


def test_a_picture_that_has_only_moved_is_not_asked_about_again(server, folder):
    server.says = lambda question, pictures: LISTS
    before = (folder / "train.jsonl").read_text()
    checklist(server, folder)
    (folder / "part0").rename(folder / "first")
    (folder / "train.jsonl").write_text(before.replace("part0", "first"))
    assert all(row["checklist"] for row in checklist(server, folder))
    assert len(server.requests) == 2


def test_rows_that_are_edited_while_a_judge_is_asked_are_kept_and_a_second_start_goes_on(
    server, folder
):
    def says(question, pictures):
        rows = [json.loads(line) for line in (folder / "train.jsonl").open("rb")]
        if len(rows) == 3:  # somebody puts a row in front
            rows.insert(0, {"prompt": "a new one", "image": "part0/0.png"})
            (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return LISTS

    server.says = says
    with pytest.raises(BadInput, match="train.jsonl: was edited meanwhile; start again"):
        checklist(server, folder)
    rows = checklist(server, folder)
    assert [row["prompt"] for row in rows] == ["a new one", "edit 0", "edit 1", "edit 2"]
    assert [row["checklist"] for row in rows] == [ITEMS, ITEMS, ["mine?"], ITEMS]
    assert len(server.requests) == 3  # of which two before the second start


def test_a_list_that_a_person_wrote_stays_where_another_row_asks_the_same(server, folder):
    row = {"prompt": "edit 0", "image": "part0/0.png", "checklist": ["mine, too?"]}
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps(row))
    server.says = lambda question, pictures: LISTS
    rows = checklist(server, folder)
    assert rows[0]["checklist"] == ITEMS and rows[3]["checklist"] == ["mine, too?"]


# ---------------------------------------------------------------- checklists: judged

ROW = {"prompt": "make the circle blue", "checklist": ["is it blue?", "is the square there?"]}


def items_of(server):
    texts = [request["body"]["messages"][0]["content"][0]["text"] for request in server.requests]
    return [text.splitlines()[-1] for text in texts if "Look at this alone" in text]


def test_each_item_is_judged_by_yes_and_no_and_their_mean_is_an_aspect():
    source, edit = (Image.new("RGB", (16, 16), level) for level in ("gray", "white"))
    with JudgeServer() as server:
        judge = load_judge(JudgeSettings(judge=server.url, judge_aspects=["checklist=0.5"]))
        server.believes = lambda question, pictures: 0.9 if "is it blue" in question else 0.4
        scores = judge.score(ROW, [source], [edit])
    assert scores.terms["checklist"].item() == pytest.approx(0.65, abs=1e-3)
    items = ["Look at this alone: is it blue?", "Look at this alone: is the square there?"]
    assert sorted(items_of(server)) == items
    ends = [request["body"]["messages"][0]["content"][-1]["text"] for request in server.requests]
    assert ends.count(reward_mllm.YES_NO) == 2 and ends.count(reward_mllm.DIGIT) == 1


class Believer(Judge):
    """A judge that answers yes by a rule: (question, the edit) -> probability; digits as 4 of 5."""

    def __init__(self, rule, **changes):
        super().__init__(JudgeSettings(**changes))
        self.rule = rule

    def weigh(self, chats, worth):
        verdicts = []
        for (message,) in chats:
            texts = [part["text"] for part in message["content"] if part["type"] == "text"]
            images = [part["image"] for part in message["content"] if part["type"] == "image"]
            p = self.rule(texts[0], images[-1])
            verdicts.append(Verdict(p if "yes" in worth else 0.8, mass=p))
        return verdicts


def score(rule, row, **changes):
    edit = Image.new("RGB", (16, 16))
    return Believer(rule, **changes).score(row, [edit], [edit, edit])


def test_a_checklist_lowers_what_execution_earned_by_its_weight():
    scores = score(lambda text, edit: 0.5, ROW, judge_aspects=["checklist=0.5"])
    assert scores.score.tolist() == pytest.approx([0.8 * (0.5 + 0.5 * 0.5)] * 2)


def test_a_row_without_a_checklist_is_asked_whether_its_requirement_is_met():
    asked = []

    def rule(text, edit):
        asked.append(text)
        return 0.5

    row = {"prompt": "make it blue", "requirement": "the circle is blue."}
    scores = score(rule, row, judge_aspects=["checklist=1"])
    assert scores.terms["checklist"].tolist() == [0.5, 0.5]
    assert sum("Look at this alone: the circle is blue." in text for text in asked) == 2


def test_an_item_without_an_answer_is_no_score_with_its_cause():
    def rule(text, edit):
        if "square" in text:
            raise JudgeFailure("no answer")
        return 0.5

    scores = score(rule, ROW, judge_aspects=["checklist=0.5"])
    assert scores.score.isnan().all() and scores.causes == ["no answer"] * 2


@pytest.mark.parametrize("wrong", [{"a": 1}, [3], 7])
def test_a_checklist_of_another_form_is_a_cause(wrong):
    scores = score(
        lambda text, edit: 0.5, ROW | {"checklist": wrong}, judge_aspects=["checklist=1"]
    )
    assert scores.score.isnan().all() and all(scores.causes)


def test_a_checklist_can_be_the_whole_reward(tmp_path):
    (tmp_path / "items.txt").write_text(reward_mllm.PROMPTS["checklist"])
    words = {"judge_prompt": [f"{tmp_path}/items.txt"]}
    scores = score(lambda text, edit: 0.25 if "square" in text else 0.75, ROW, **words)
    assert scores.score.tolist() == pytest.approx([0.5, 0.5])


def test_no_item_is_asked_where_nobody_wants_it():
    scores = score(lambda text, edit: pytest.fail(text) if "alone" in text else 0.5, ROW)
    assert scores.score.tolist() == pytest.approx([0.8, 0.8])


# ---------------------------------------------------------------- checklists and the toy's oracle


def checklist_of(source, target):
    """Questions about a toy edit: what should change, and all that should stay."""
    done, kept = [], []
    for cell, place in enumerate(data_prep.CELLS, 1):
        words = scene_words(target[cell]) or "nothing"
        items = kept if source[cell] == target[cell] else done
        items.append(f"Is there {words} at the {place}?")
    items = kept if source[0] == target[0] else done
    items.append(f"Is the background {[*data_prep.BACKGROUNDS][target[0]]}?")
    return done + kept


def sees(text, edit):
    """How much a toy picture shows what an item asks about, by the distance to all cells."""
    item = text.splitlines()[-1]
    distance = data_prep._cell_distances(data_prep._to_tensor(edit)[None])[0]  # (4, 80)
    seen = (-distance / 0.003).softmax(1).unflatten(1, (len(data_prep.BACKGROUNDS), -1))
    ground = re.search("background (.+)\\?", item)
    if ground:
        return seen.sum(2)[:, [*data_prep.BACKGROUNDS].index(ground.group(1))].mean().item()
    words, place = re.search("there (.+) at the (.+)\\?", item).groups()
    number = 0 if words == "nothing" else data_prep.OBJECTS.index(words)
    return seen.sum(1)[data_prep.CELLS.index(place), number].item()


def toy_ranks(number=300):
    """Spearman correlations with the oracle on spoiled toy edits, and scores of sources."""
    rows = data_prep._toy_rows(number, "test", "checklist")
    sources, targets = data_prep.scenes_of(rows)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        edits = data_prep._graded_corruptions(sources, targets)
    oracle, _ = data_prep.oracle_scores(edits, sources, targets)
    judge = Believer(sees, judge_aspects=["checklist=1"])
    found, untouched = [], []
    for row, edit, source in zip(rows, edits, data_prep._render(sources), strict=True):
        row["checklist"] = checklist_of(row["source_scene"], row["target_scene"])
        pictures = [data_prep.to_pil(edit), data_prep.to_pil(source)]
        scores = judge.score(row, pictures[1:], pictures).terms["checklist"]
        found.append(scores[0])
        untouched.append(scores[1])
    return evaluate.spearman(torch.stack(found), oracle), torch.stack(untouched).mean().item()


def test_a_checklists_mean_ranks_toy_edits_much_as_the_oracle_does():
    correlation, untouched = toy_ranks()
    print(f"Spearman {correlation:.3f}; untouched sources score {untouched:.2f}")
    assert correlation > 0.75
    assert untouched > 0.5  # so it is no reward of its own: most items ask what stayed
