"""The evaluation: parsers and arithmetic against answers known beforehand, and whole runs on small
benchmarks of our own in the official layouts, with a judge that answers by a rule over HTTP."""

import ast
import base64
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_prep
import evaluate
from data_prep import BadInput, bootstrap, load_image, seeded
from evaluate import (
    labels_of,
    paired_differences,
    parse_gedit,
    parse_imgedit,
    score,
    tabulate,
)
from reward_mllm import JudgeSettings, load_judge

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------- reading an answer

THREE = """Reasoning: the hat is there.
Prompt Compliance: {}
Visual Seamlessness: {}
Detail Fidelity: {}"""


SPELT = "Prompt Compliance{0}4{1}Visual Seamlessness{0}5{1}Detail Fidelity{0}3"


@pytest.mark.parametrize(
    "reply, scores",
    [
        (THREE.format(4, 5, 3), [4, 5, 3]),
        (THREE.format("4/5", "5 / 5", "3 out of 5"), [4, 5, 3]),
        (
            "**Prompt Compliance:** 4\n**Visual Seamlessness**: 5.\n- Detail Fidelity: **3**",
            [4, 5, 3],
        ),
        ("1. Prompt Compliance - 4\n2. Visual Seamlessness – 5\n3. Detail Fidelity = 3", [4, 5, 3]),
        (
            "Prompt Compliance: 4 (it is)\nVisual Seamlessness: 5 - none\nDetail Fidelity: 3;",
            [4, 5, 3],
        ),
        ("Prompt Compliance: 4, Visual Seamlessness: 5, Detail Fidelity: 3", [4, 5, 3]),
        ("Prompt Compliance:\n4\nVisual Seamlessness:\n5\nDetail Fidelity:\n3", [4, 5, 3]),
        (
            "| Prompt Compliance | 4 |\n| Visual Seamlessness | 5 |\n| Detail Fidelity | 3 |",
            [4, 5, 3],
        ),
        (
            '```json\n{"' + SPELT.format('": ', ', "') + "}\n```",
            [4, 5, 3],
        ),
        (SPELT.format("：", "\n"), [4, 5, 3]),
        ("Prompt Compliance: 4.5\nVisual Seamlessness: 5.0\nDetail Fidelity: 3", [4.5, 5, 3]),
        ("Prompt Compliance is 4.\nVisual Seamlessness is 5.\nDetail Fidelity is 3.", [4, 5, 3]),
        ("<think>Prompt Compliance: 1\nmaybe 2</think>\n" + THREE.format(4, 5, 3), [4, 5, 3]),
        (THREE.format(4, 5, 3) + "\nOverall: 4\nAverage score: 4.0", [4, 5, 3]),
        (
            THREE.format(1, 1, 1) + "\nOn a second look:\n" + SPELT.format(": ", "\n"),
            [4, 5, 3],
        ),
        (
            THREE.format(4, 5, 3).replace("the hat is there", 'it says "ratio: 4, fine"; 3 hats'),
            [4, 5, 3],
        ),
        (SPELT.format("\n", "\n"), [4, 5, 3]),
        (SPELT.format("\n", "/5\n\n"), [4, 5, 3]),
        (SPELT.format(": [", "]\n") + "]", [4, 5, 3]),
        (SPELT.format("：", "分，"), [4, 5, 3]),
        (SPELT.format("：", "。"), [4, 5, 3]),
        (SPELT.format(": ", "\n") + "\nSum: 12", [4, 5, 3]),
        ("<answer>" + SPELT.format(": ", "\n") + "</answer>", [4, 5, 3]),
        ("<|begin_of_box|>" + SPELT.format(": ", "\n") + "<|end_of_box|>", [4, 5, 3]),
        (SPELT.format(": \\boxed{", "}\n") + "}", [4, 5, 3]),
        (
            "| Prompt Compliance | Visual Seamlessness | Detail Fidelity |\n"
            "|---|---|---|\n| 4 | 5 | 3 |",
            [4, 5, 3],
        ),
        ("| Aspect | Score |\n|---|---|\n| " + SPELT.format(" | ", " |\n| ") + " |", [4, 5, 3]),
        (SPELT.format(": ", "\n").replace("4", "[4, 2]"), None),
        ("<think>at first\n" + THREE.format(4, 5, 3), None),
        ("a</think><think>then\n" + THREE.format(4, 5, 3), None),
        ("Scores as follows\n1. " + SPELT.format(": ", "\n2. "), [4, 5, 3]),
        (THREE.format(4, 5, "9" * 5000), None),
        (THREE.format(4, 5, 7), None),
        (THREE.format(0, 5, 3), None),
        (THREE.format(4, 5, "3/10"), None),
        (THREE.format(4, 5, "3-4"), None),
        (THREE.format(4, 5, "three"), None),
        (THREE.format(4, 5, -3), None),
        ("Prompt Compliance: 4\nVisual Seamlessness: 5", None),
        ("", None),
        ("I cannot help with that.", None),
        ("Reasoning: 3 objects were removed at 10: 45.", None),
    ],
)
def test_sensible_spellings_of_imgedit_scores_are_read_and_others_are_failures(reply, scores):
    assert parse_imgedit(reply) == scores


@pytest.mark.parametrize(
    "reply, scores",
    [
        (THREE.format(4, 5, 3), [4, 5, 3]),
        ("**A:** 5\nB: 5/5\nC: 5.\nD: 5", [5]),
        ("A: 9\nB:  3\nC : 2", [9, 2]),
        ("A: b: 4", None),
        ("", None),
        ("I cannot help with that.", None),
    ],
)
def test_the_official_imgedit_parser_loses_what_it_loses(reply, scores):
    assert parse_imgedit(reply, "official") == scores


@pytest.mark.parametrize(
    "reply, strict, official",
    [
        ('{"score": [8, 7], "reasoning": "fine"}', [8, 7], [8, 7]),
        ('```json\n{\n"score" : [8, 7],\n"reasoning" : "fine"\n}\n```', [8, 7], [8, 7]),
        (
            'Here it is:\n{"score": [8, 7], "reasoning": "it says "open" now, {really}"}',
            [8, 7],
            None,
        ),
        ("{'score': [8, 7], 'reasoning': 'fine'}", [8, 7], None),
        ('{"score": [8, 7], "reasoning": "cut short', [8, 7], [8, 7]),
        ('{"score": ["8", "7/10"], "reasoning": "fine"}', [8, 7], None),
        ("score: [8, 7]", [8, 7], [8, 7]),
        ("output score = [8.5, 7]", [8.5, 7], None),
        ("[8, 7]", [8, 7], [8, 7]),
        ("8, 7", [8, 7], None),
        ("Editing success: 8/10\nOverediting: 7/10", [8, 7], None),
        ('<think>{"score": [1, 1]}</think>{"score": [8, 7]}', [8, 7], None),
        ('{"score": [8, 7]}\nAfter a second look: {"score": [6, 5]}', [6, 5], None),
        ('||V^=^V||\n{"score": [8, 7], "reasoning": "a\nb"}\n||V^=^V||', [8, 7], [8, 7]),
        ("{score: [8, 7]}", [8, 7], None),
        ('{"score": 8, "reasoning": "fine"}', None, [8]),
        ("{score: 8}", None, [8]),
        ("7", None, [7]),
        ('{"score": [11, 7], "reasoning": "fine"}', None, [11, 7]),
        ('{"score": [8, 7, 6]}', None, [8, 7, 6]),
        ('{"score": [8], "reasoning": "[1, 2] of them"}', None, [8]),
        ('{"score": [-1, 7]}', None, [-1, 7]),
        ('{"score": [...], "reasoning": "..."}', None, None),
        ("{" * 2000, None, None),
        ("", None, None),
        ("I'm sorry, I can't assist with that.", None, None),
        ('{"reasoning": "none"}', None, None),
    ],
)
def test_gedit_answers_are_read_and_nothing_is_guessed(reply, strict, official):
    assert parse_gedit(reply) == strict and parse_gedit(reply, "official") == official


def test_only_the_labels_count_that_the_prompt_asks_for():
    labels = labels_of(
        "Rate it.\nPrompt Compliance: A number from 1 to 5.\n"
        "Visual Naturalness: A number from 1 to 5.\n"
        "Physical & Detail Integrity: A number from 1 to 5.\nIt is: <edit_prompt>"
    )
    assert labels == ["prompt compliance", "visual naturalness", "physical and detail integrity"]
    right = "Prompt Compliance: 4\nVisual naturalness score: 5\nPhysical & Detail Integrity: 3"
    assert parse_imgedit(right, "strict", labels) == [4, 5, 3]
    assert parse_imgedit(f"{right}\nMy mood: 2", "strict", labels) == [4, 5, 3]
    assert parse_imgedit(SPELT.format(": ", "\n"), "strict", labels) is None
    assert labels_of("Rate «<edit_prompt>» by three marks.") == []


@pytest.mark.parametrize(
    "reply, scores",
    [
        ('{"score": {"success": 7, "overedit": 8}, "reasoning": "r"}', [7, 8]),
        ('{"score"：[7，8]}', [7, 8]),
        ('<answer>{"score": [7, 8]}</answer>', [7, 8]),
        ('<think>{"score": [7, 8]}', None),
        ('{"a":' * 5000, None),
        ('{"score": [1e999, 7]}', None),
    ],
)
def test_more_spellings_of_gedits_scores_are_read_and_none_is_made_up(reply, scores):
    assert parse_gedit(reply) == scores


@pytest.mark.parametrize("reply", ['{"a":' * 5000, f"A: {'9' * 5000}", '{"score": [1e999]}'])
def test_no_reply_breaks_an_official_parser(reply):
    assert parse_gedit(reply, "official") is None and parse_imgedit(reply, "official") is None


# ---------------------------------------------------------------- adding up


def imgedit_record(row, task, *marks, source=None, **more):
    reply = THREE.format(*marks) if marks else "no"
    return {
        "row": row,
        "task": task,
        "source": source or row,
        "call": "edit",
        "repeat": 0,
        "reply": reply,
        **more,
    }


def gedit_records(row, task, sc, pq, source=None, language="en", intersection=False):
    for call, pair in (("SC", sc), ("PQ", pq)):
        reply = json.dumps({"score": pair, "reasoning": "r"}) if pair else "no"
        yield {
            "row": row,
            "task": task,
            "source": source or row,
            "call": call,
            "repeat": 0,
            "reply": reply,
            "language": language,
            "intersection": intersection,
        }


def test_imgedit_counts_failures_at_the_floor_and_means_are_over_tasks():
    records = [
        imgedit_record("a", "add", 5, 5, 4),
        imgedit_record("b", "add"),
        imgedit_record("c", "style", 3, 3, 3),
    ]
    table = score("imgedit", records)["groups"]["all"]
    assert (
        table["score"]["add"][0] == pytest.approx((14 / 3 + 1) / 2)
        and table["score"]["style"][0] == 3
    )
    assert table["score"]["macro"][0] == pytest.approx((17 / 6 + 3) / 2)
    assert table["score"]["micro"][0] == pytest.approx((14 / 3 + 1 + 3) / 3)
    assert (table["rows"], table["answered"]) == (3, 2)


def test_official_imgedit_rounds_as_its_scripts_do_and_leaves_failures_out():
    records = [
        imgedit_record("a", "add", 5, 5, 4),
        imgedit_record("b", "add"),
        imgedit_record("c", "add", 4, 4, 3),
        imgedit_record("d", "style", 3, 3, 3),
    ]
    result = score("imgedit", records, "official")
    assert [row["score"] for row in result["rows"]][::2] == [4.67, 3.67] and math.isnan(
        result["rows"][1]["score"]
    )
    table = result["groups"]["all"]["score"]
    assert table["add"][0] == 4.17 and table["macro"][0] == (4.17 + 3) / 2


def test_gedit_takes_the_lower_scores_the_root_per_row_and_then_means():
    records = [
        *gedit_records("a", "color_alter", [9, 4], [8, 9]),
        *gedit_records("b", "color_alter", [9, 9], [4, 6]),
        *gedit_records("c", "ps_human", [1, 0], [5, 5], intersection=True),
    ]
    groups = score("gedit", records)["groups"]
    table = groups["en"]
    assert table["SC"]["color_alter"][0] == 6.5 and table["PQ"]["color_alter"][0] == 6
    assert table["O"]["color_alter"][0] == pytest.approx((math.sqrt(32) + 6) / 2)
    assert table["O"]["macro"][0] == pytest.approx((math.sqrt(32) + 6) / 4)
    assert (
        groups["en intersection"]["rows"] == 1 and groups["en intersection"]["O"]["macro"][0] == 0
    )


def test_half_a_gedit_answer_counts_at_the_floor_and_officially_not_at_all():
    records = [
        *gedit_records("a", "ps_human", None, [8, 8]),
        *gedit_records("b", "ps_human", [4, 4], [4, 4]),
    ]
    strict, official = (
        score("gedit", records, mode)["groups"]["en"] for mode in ("strict", "official")
    )
    assert (
        strict["O"]["macro"][0] == 2 and strict["PQ"]["macro"][0] == 6 and strict["answered"] == 1
    )
    assert official["O"]["macro"][0] == 4 and official["PQ"]["macro"][0] == 4


def test_the_bootstrap_resamples_source_pictures_and_not_rows():
    rng = np.random.default_rng(0)
    pictures = [str(i // 10) for i in range(400)]  # forty pictures with ten rows each, that agree
    values = np.repeat(rng.normal(size=40), 10)

    def width(sources):
        _, draws = bootstrap(values, ["t"] * 400, sources)
        return np.ptp(np.quantile(draws, (0.025, 0.975)))

    clustered, single = width(pictures), width([str(i) for i in range(400)])
    assert clustered == pytest.approx(2 * 1.96 * values.std() / math.sqrt(40), rel=0.1)
    assert clustered > 2.5 * single


def test_an_interval_holds_the_truth_in_about_ninety_five_of_a_hundred_samples():
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        rows = [
            {"task": f"t{i % 3}", "source": str(i // 4), "answered": True, "m": value}
            for i, value in enumerate(
                (rng.normal(size=60)[:, None] + rng.normal(size=(60, 4))).flatten()
            )
        ]
        _, low, high = tabulate(rows, ["m"])["m"]["macro"]
        inside += low <= 0 <= high
    assert 88 <= inside <= 99


def test_one_source_picture_gives_no_interval():
    rows = [{"task": "t", "source": "s", "answered": True, "m": value} for value in (1.0, 2.0)]
    assert tabulate(rows, ["m"])["m"]["macro"] == [1.5, None, None]
    assert "too few source pictures" in evaluate._verdict([1.5, None, None], "a", "b")


def test_a_result_differs_from_itself_by_nothing():
    rows = score("gedit", list(gedit_records("a", "ps_human", [4, 4], [4, 4])))["rows"]
    table = paired_differences(rows, rows, ("O",))["en"]
    assert table["rows"] == 1 and table["O"]["macro"][0] == 0 and "psnr" not in table


def test_a_paired_difference_is_seen_where_the_rows_alone_are_noisy():
    rng = np.random.default_rng(0)
    a = [
        {"row": str(i), "task": "t", "source": str(i), "answered": True, "m": value}
        for i, value in enumerate(rng.normal(size=100))
    ]
    b = [row | {"m": row["m"] - 0.1 + 0.01 * rng.normal()} for row in a]
    macro = paired_differences(a, b, ["m"])["all"]["m"]["macro"]
    assert macro[0] == pytest.approx(0.1, abs=0.01) and macro[1] > 0.09
    assert tabulate(a, ["m"])["m"]["macro"][1] < 0
    assert evaluate._verdict(macro, "A", "B").startswith("A is better than B: +0.1")
    assert evaluate._verdict([-x for x in (macro[0], macro[2], macro[1])], "A", "B").startswith(
        "A is worse than B: -0.1"
    )
    assert evaluate._verdict([0.1, -0.2, 0.4], "A", "B").startswith(
        "no difference between A and B can be told"
    )


# ---------------------------------------------------------------- a judge by rule


class RuleServer(ThreadingHTTPServer):
    """An OpenAI-compatible server whose `rule(text, pictures)` is the reply, a number a status."""

    request_queue_size = 64  # a connection refused under load would be a failure

    def __init__(self, rule):
        self.rule, self.name, self.asked, self.headers_seen = rule, "rule-7b", [], []
        self.finish = "stop"
        super().__init__(("127.0.0.1", 0), Answering)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Answering(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {"data": [{"id": self.server.name}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.headers_seen.append(self.headers.get("Authorization"))
        assert body["temperature"] == 0
        text, *shown = body["messages"][0]["content"]
        shown = [
            Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
            for part in shown
            if part["type"] == "image_url"  # not what stands after the pictures
        ]
        self.server.asked.append((text["text"], shown))
        reply = self.server.rule(text["text"], shown)
        if isinstance(reply, int):
            return self.answer(reply, {"error": {"message": "this model takes no pictures"}})
        self.answer(
            200,
            {
                "model": "rule-7b-0613",
                "usage": {"prompt_tokens": 700, "completion_tokens": 30},
                "choices": [
                    {
                        "message": {"role": "assistant", "content": reply},
                        "finish_reason": self.server.finish,
                    }
                ],
            },
        )

    def answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def by_brightness(text, pictures):
    """1 to 5 for ImgEdit, 0 to 10 for GEdit: the brighter the last picture, the better."""
    bright = float(np.asarray(pictures[-1], float).mean() / 255)
    mark = round(10 * bright)
    return (
        json.dumps({"score": [mark, 10], "reasoning": "bright"})
        if "JSON" in text
        else THREE.format(*[round(1 + 4 * bright)] * 3)
    )


@pytest.fixture
def server():
    server = RuleServer(by_brightness)
    yield server
    server.shutdown()


def flat(path, value, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


@pytest.fixture
def imgedit(tmp_path):
    """Six rows on three pictures in ImgEdit-Bench's layout, with judge prompts of our own."""
    bench = tmp_path / "Benchmark"
    table, kinds = {}, ("add", "style", "alter")
    for i in range(6):
        flat(bench / "singleturn" / "animal" / f"{i // 2}.jpg", 60 * (i // 2 + 1))
        table[str(i)] = {
            "id": f"animal/{i // 2}.jpg",
            "prompt": f"make the red circle {i}",
            "edit_type": kinds[i % 3],
        }
    (bench / "singleturn" / "singleturn.json").write_text(json.dumps(table))
    texts = {
        kind: f"For {kind}, rate what became of «<edit_prompt>» by three marks."
        for kind in (*kinds, "extract")
    }
    (bench / "judge_prompt.json").write_text(json.dumps(texts))
    return bench


VIE = '''import os
os.environ["BENCH_WAS_RUN"] = "1"
_context_no_delimit = """Reply in JSON."""
_prompts_0shot_two_image_edit_rule = """Two pictures."""
_prompts_0shot_tie_rule_SC = """How well was <instruction> done?"""
_prompts_0shot_rule_PQ = """One picture."""
_unused = f"{os.getpid()}"
'''


def gedit_rows(bench):
    """Rows of GEdit-Bench with pictures of 40 x 32 pixels; the last repeats a key."""
    tasks = ("color_alter", "ps_human", "color_alter", "ps_human", "color_alter")
    for i, task in enumerate(tasks):
        flat(bench / "pictures" / f"{i}.png", 40 * i + 20)
        yield {
            "key": f"k{i % 4}",
            "task_type": task,
            "instruction": f"make the red circle {i}",
            "Intersection_exist": i < 2,
            "instruction_language": "cn" if i == 3 else "en",
            "file_name": f"pictures/{i}.png",
        }


@pytest.fixture
def gedit(tmp_path):
    bench = tmp_path / "GEdit-Bench"
    rows = list(gedit_rows(bench))
    (bench / "viescore").mkdir()
    (bench / "viescore" / "vie_prompts.py").write_text(VIE)
    (bench / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return bench


def run(kind, bench, out, server=None, **options):
    words = [kind, "--bench", str(bench), "--out", str(out), "--judge_patience", "0"]
    words += ["--judge", server.url] if server else []
    for key, value in options.items():
        words += [
            f"--{key}",
            *([str(part) for part in value] if isinstance(value, list) else [str(value)]),
        ]
    evaluate.main(words)
    return {file.name: json.loads(file.read_text()) for file in Path(out).glob("scores-*.json")}


def calls(out):
    return [
        json.loads(line)
        for file in sorted(Path(out).glob("calls-*.jsonl"))
        for line in file.read_text().splitlines()
    ]


# ---------------------------------------------------------------- whole runs


def test_edits_of_anything_in_imgedits_layout_are_judged_and_scored(
    imgedit, tmp_path, server, capsys
):
    for key in range(6):
        flat(tmp_path / "edits" / f"{key}.png", 51 * key)
    (result,) = run(
        "imgedit", imgedit, tmp_path / "out", server, edits=tmp_path / "edits", baselines=["source"]
    ).values()
    table = result["subjects"]["edits"]["groups"]["all"]["score"]
    wanted = {key: round(1 + 4 * key / 5) for key in range(6)}
    assert {task: table[task][0] for task in ("add", "style", "adjust")} == {
        task: (wanted[i] + wanted[i + 3]) / 2 for i, task in enumerate(("add", "style", "adjust"))
    }
    assert table["micro"][0] == pytest.approx(sum(wanted.values()) / 6)
    text, pictures = next((text, shown) for text, shown in server.asked if "circle 2" in text)
    assert (
        text == "For alter, rate what became of «make the red circle 2» by three marks."
        and len(pictures) == 2
    )
    assert [picture.size for picture in pictures] == [(40, 32), (40, 32)]
    said = capsys.readouterr().out
    assert "6 rows, metadata " in said
    assert (
        "edits, all: 6 of 6 rows answered" in said
        and "| model | judge | mode | all score |" in said
    )
    assert "edits and source can be told" in said or "edits is " in said


def test_nothing_is_paid_for_twice_after_a_kill_at_any_moment(imgedit, tmp_path, server):
    for key in range(6):
        flat(tmp_path / "edits" / f"{key}.png", 51 * key)
    options = [
        "--edits",
        str(tmp_path / "edits"),
        "--out",
        str(tmp_path / "out"),
        "--judge_in_flight",
        "1",
        "--stage",
        "judge",
    ]
    server.rule = lambda text, pictures: time.sleep(0.3) or by_brightness(text, pictures)
    child = subprocess.Popen(
        [
            sys.executable,
            ROOT / "evaluate.py",
            "imgedit",
            "--bench",
            imgedit,
            "--judge",
            server.url,
            *options,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 300
    while time.time() < deadline and len(calls_bytes(tmp_path / "out")) < 2:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.5)
    kept = calls(tmp_path / "out")
    assert 2 <= len(kept) < 6
    server.asked.clear()
    file = next((tmp_path / "out").glob("calls-*.jsonl"))
    with open(file, "a") as half:
        half.write('{"subject": "edits", "row": "5", "ca')
    (result,) = run("imgedit", imgedit, tmp_path / "out", server, edits=tmp_path / "edits").values()
    asked = {text for text, _ in server.asked}
    assert len(server.asked) == 6 - len(kept) and len(calls(tmp_path / "out")) == 6
    assert not any(f"circle {record['row']}»" in text for record in kept for text in asked)
    assert result["subjects"]["edits"]["groups"]["all"]["rows"] == 6
    server.asked.clear()
    run("imgedit", imgedit, tmp_path / "out", server, edits=tmp_path / "edits")
    assert not server.asked and len(calls(tmp_path / "out")) == 6


def calls_bytes(out):
    return b"".join(file.read_bytes() for file in Path(out).glob("calls-*.jsonl")).split(b"\n")[:-1]


def test_missing_edits_refusals_and_failed_calls_count_at_the_floor_and_are_asked_again_later(
    imgedit, tmp_path, server, capsys
):
    for key in range(1, 6):
        flat(tmp_path / "edits" / f"{key}.png", 255)
    server.rule = lambda text, pictures: (
        "I cannot help."
        if "circle 1" in text
        else 400
        if "circle 2" in text
        else THREE.format(5, 5, 5)
    )
    out = tmp_path / "out"
    (result,) = run("imgedit", imgedit, out, server, edits=tmp_path / "edits").values()
    table = result["subjects"]["edits"]["groups"]["all"]
    assert table["answered"] == 3 and table["score"]["micro"][0] == (3 * 5 + 3 * 1) / 6
    failures = {record["row"]: record.get("failure") for record in calls(out)}
    assert "0" not in failures and "400" in failures["2"] and failures["1"] is None
    (row,) = (row for row in result["subjects"]["edits"]["rows"] if row["row"] == "0")
    assert row["said"] == "no edit"
    assert "3 of 6 rows answered" in capsys.readouterr().out
    official = run(
        "imgedit", imgedit, out, server, edits=tmp_path / "edits", mode="official", stage="score"
    )
    table = official[f"scores-{result['judge']}-official-{result['metadata']}.json"]["subjects"][
        "edits"
    ]["groups"]["all"]
    assert table["score"]["micro"][0] == 5 and (table["rows"], table["answered"]) == (6, 3)
    flat(tmp_path / "edits" / "0.png", 255)
    server.rule, server.asked = lambda *a: THREE.format(5, 5, 5), []
    run("imgedit", imgedit, out, server, edits=tmp_path / "edits")
    assert sorted(text[-22:-19] for text, _ in server.asked) == sorted(
        text[-22:-19]
        for text in [
            "For add, rate what became of «make the red circle 0» by three marks.",
            "For alter, rate what became of «make the red circle 2» by three marks.",
        ]
    )


def test_an_edit_drawn_anew_is_judged_anew(imgedit, tmp_path, server):
    for key in range(6):
        flat(tmp_path / "edits" / f"{key}.png", 0)
    run("imgedit", imgedit, tmp_path / "out", server, edits=tmp_path / "edits")
    flat(tmp_path / "edits" / "4.png", 255)
    server.asked.clear()
    (result,) = run("imgedit", imgedit, tmp_path / "out", server, edits=tmp_path / "edits").values()
    assert len(server.asked) == 1
    assert {row["row"]: row["score"] for row in result["subjects"]["edits"]["rows"]}["4"] == 5


def test_gedit_asks_twice_and_keeps_languages_and_rows_of_one_key_apart(
    gedit, tmp_path, server, monkeypatch
):
    monkeypatch.delenv("BENCH_WAS_RUN", raising=False)
    edits = tmp_path / "edits" / "fullset"
    for i, (task, language) in enumerate(
        (("color_alter", "en"), ("ps_human", "en"), ("color_alter", "en"), ("ps_human", "cn"))
    ):
        flat(edits / task / language / f"k{i}.png", 51 * (i + 1), (64, 32))
    (result,) = run(
        "gedit", gedit, tmp_path / "out", server, edits=tmp_path / "edits", language="both"
    ).values()
    assert "BENCH_WAS_RUN" not in os.environ  # the prompts' file is read, not run
    rows = {row["row"]: row for row in result["subjects"]["edits"]["rows"]}
    assert set(rows) == {
        "color_alter/en/k0",
        "ps_human/en/k1",
        "color_alter/en/k2",
        "ps_human/cn/k3",
        "color_alter/en/k0-2",
    }
    assert rows["ps_human/en/k1"]["SC"] == 4 and rows["ps_human/en/k1"]["O"] == 4
    assert (
        rows["color_alter/en/k0-2"]["SC"] == rows["color_alter/en/k0"]["SC"] == 2
    )  # the layout has one file for both
    assert {
        group: table["rows"] for group, table in result["subjects"]["edits"]["groups"].items()
    } == {"en": 4, "cn": 1, "en intersection": 2}
    sc = next(
        shown
        for text, shown in server.asked
        if text == "Reply in JSON.\nTwo pictures.\nHow well was make the red circle 1 done?"
    )
    pq = next(shown for text, shown in server.asked if text == "Reply in JSON.\nOne picture.")
    assert (
        len(sc) == 2 and len(pq) == 1 and sc[0].size == sc[1].size == pq[0].size == (40, 32)
    )  # the size of the source, not the edit's
    assert len(server.asked) == 10


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_gedit_is_read_from_parquet_and_from_a_datasets_folder(gedit, tmp_path, server, kind):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    entries = [json.loads(line) for line in (gedit / "metadata.jsonl").read_text().splitlines()]
    for entry in entries:
        entry["input_image_raw"] = {
            "bytes": (gedit / entry.pop("file_name")).read_bytes(),
            "path": None,
        }
    (gedit / "metadata.jsonl").unlink()
    table = pyarrow.Table.from_pylist(entries)
    if kind == "parquet":
        parquet.write_table(table, gedit / "train-00000-of-00001.parquet")
    else:
        with pyarrow.ipc.new_stream(
            str(gedit / "data-00000-of-00001.arrow"), table.schema
        ) as stream:
            stream.write_table(table)
    (result,) = run("gedit", gedit, tmp_path / "out", server, baselines=["source"]).values()
    assert result["subjects"]["source"]["groups"]["en"]["answered"] == 4
    assert result["subjects"]["source"]["groups"]["en"]["SC"]["ps_human"][0] == round(60 / 25.5)


# ---------------------------------------------------------------- drawing


def test_edits_of_a_row_depend_on_its_seed_alone_and_are_not_drawn_twice(
    imgedit, tmp_path, kontext_folder, server
):
    options = dict(base=kontext_folder, steps=2, stage="sample")
    run("imgedit", imgedit, tmp_path / "one", **options)
    files = sorted(
        path.relative_to(tmp_path / "one/base") for path in (tmp_path / "one/base").rglob("*.png")
    )
    assert files == [Path(f"{i}.png") for i in range(6)]
    first = {file: (tmp_path / "one/base" / file).read_bytes() for file in files}
    (tmp_path / "one/base/3.png").unlink()
    marker = (tmp_path / "one/base/4.png").stat().st_mtime_ns
    run("imgedit", imgedit, tmp_path / "one", **options)
    assert (tmp_path / "one/base/3.png").read_bytes() == first[Path("3.png")]
    assert (tmp_path / "one/base/4.png").stat().st_mtime_ns == marker
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            ROOT / "evaluate.py",
            "imgedit",
            "--bench",
            imgedit,
            "--out",
            tmp_path / "two",
            "--base",
            kontext_folder,
            "--steps",
            "2",
            "--judge",
            server.url,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for i in range(6):
        assert (tmp_path / "two/base" / f"{i}.png").read_bytes() == first[Path(f"{i}.png")], i
    assert (
        len(server.asked) == 6 and len(calls(tmp_path / "two")) == 6
    )  # both processes asked, each its own rows
    assert len(list((tmp_path / "two").glob("calls-*.jsonl"))) == 2
    (result,) = (json.loads(file.read_text()) for file in (tmp_path / "two").glob("scores-*.json"))
    assert result["subjects"]["base"]["groups"]["all"]["answered"] == 6


@pytest.fixture
def lora(kontext_folder, tmp_path):
    import sample

    editor = sample.load_editor(kontext_folder)
    sample.add_policies(editor, 4, 8)
    for parameter in sample.lora_parameters(editor, "new").values():
        parameter.data += 0.3 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(0)
        )
    sample.save_lora(editor, tmp_path / "run" / "checkpoint-2")
    return tmp_path / "run" / "checkpoint-2"


def test_trained_base_and_source_are_drawn_judged_and_compared(
    imgedit, tmp_path, kontext_folder, server, lora, capsys
):
    (lora.parent / "config.json").write_text(json.dumps({"judge": server.url}))
    out = tmp_path / "out"
    (result,) = run(
        "imgedit",
        imgedit,
        out,
        server,
        base=kontext_folder,
        lora=lora,
        steps=2,
        baselines=["base", "source"],
    ).values()
    said = capsys.readouterr()
    assert list(result["subjects"]) == ["trained", "base", "source"]
    assert (out / "trained/0.png").read_bytes() != (out / "base/0.png").read_bytes()
    assert "trained to please this judge" in said.err
    assert f"| {kontext_folder} + {lora} | rule-7b-" in said.out
    assert load_image(out / "grid.png").width > 200
    page = (out / "report.html").read_text()
    pictures = re.findall(r'src="(.*?)"', page)
    assert (
        page.count("<article ") == 6
        and len(pictures) == 18
        and all((out / picture).is_file() for picture in pictures)
    )
    assert page.count("Prompt Compliance: ") == 18 and re.search("trained score \\d[.]\\d\\d", page)
    run("imgedit", imgedit, tmp_path / "plain", server, base=kontext_folder, steps=2)
    assert (out / "base/0.png").read_bytes() == (tmp_path / "plain/base/0.png").read_bytes()
    capsys.readouterr()
    evaluate.main(["compare", str(out), str(tmp_path / "plain")])
    again = capsys.readouterr().out
    marks = [
        result["subjects"][name]["groups"]["all"]["score"]["macro"][0]
        for name in ("trained", "base")
    ]
    for text in (said.out, again):
        assert f"macro            {marks[0] - marks[1]:.3f} [" in text and (
            "better" in text or "worse" in text or "can be told" in text
        )


def test_gedit_is_drawn_in_its_own_layout(gedit, tmp_path, kontext_folder, server):
    out = tmp_path / "out"
    (result,) = run(
        "gedit", gedit, out, server, base=kontext_folder, steps=1, language="en"
    ).values()
    drawn = {str(path.relative_to(out / "base")) for path in (out / "base").rglob("*.png")}
    names = ("color_alter/en/k0", "ps_human/en/k1", "color_alter/en/k2", "color_alter/en/k0-2")
    assert drawn == {f"fullset/{name}.png" for name in names}
    assert result["subjects"]["base"]["groups"]["en"]["answered"] == 4


def test_the_editor_gets_the_benchmarks_sampling(imgedit, tmp_path, kontext_folder, monkeypatch):
    import sample

    def call(editor, images, prompt, generators, steps, guidance):
        raise RuntimeError(
            f"seed {generators[0].initial_seed()}, {steps} steps, guidance {guidance}"
        )

    monkeypatch.setattr(sample, "_call_pipeline", call)
    with pytest.raises(
        RuntimeError, match="seed 42, 28 steps, guidance 3.5"
    ):  # Kontext's for evaluation; 2.5 in training
        run("imgedit", imgedit, tmp_path / "out", base=kontext_folder, stage="sample")


def test_the_report_shows_instructions_as_text_and_never_as_page(imgedit, tmp_path, server):
    table = json.loads((imgedit / "singleturn/singleturn.json").read_text())
    table["0"]["prompt"] = "</script><script>alert(1)</script>"
    (imgedit / "singleturn/singleturn.json").write_text(json.dumps(table))
    run("imgedit", imgedit, tmp_path / "out", server, baselines=["source"])
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>alert" not in page and page.count("<script") == 1 and "&lt;script&gt;" in page


def test_a_held_out_set_is_scored_by_the_judge_and_by_the_oracle(tmp_path, capsys):
    settings = data_prep.ToySettings(train_rows=1, test_rows=10)
    data_prep.write_rows(tmp_path / "toy", settings)
    tokenizer = data_prep.new_tokenizer()
    data_prep.save_judge(data_prep.new_judge(tokenizer), tokenizer, tmp_path / "judge")
    rows = data_prep.read_rows(tmp_path / "toy", "test")
    for row in rows[:8]:
        (tmp_path / "edits").mkdir(exist_ok=True)
        load_image(row["target"]).save(tmp_path / "edits" / f"{row['id']}.png")
    (result,) = run(
        "heldout",
        tmp_path / "toy",
        tmp_path / "out",
        edits=tmp_path / "edits",
        judge=f"local:{tmp_path}/judge",
        baselines=["source"],
    ).values()
    edits, source = (result["subjects"][name]["groups"]["all"] for name in ("edits", "source"))
    assert (
        # an edit that is not there costs the oracle's score too
        edits["success"]["micro"][0] == 0.8
        and edits["oracle"]["micro"][0] == pytest.approx(0.8)
        and source["success"]["micro"][0] == 0
        and edits["answered"] == 8
    )
    marks = [
        record["scores"][0]
        for record in calls(tmp_path / "out")
        if record["subject"] == "edits" and "scores" in record
    ]
    assert len(marks) == 8 and edits["judge"]["micro"][0] == pytest.approx(sum(marks) / 10)
    assert set(edits["judge"]) - {"macro", "micro"} == set(data_prep.TASKS)


def test_a_second_judge_is_one_more_result_and_pays_for_its_own_calls_alone(
    imgedit, tmp_path, server
):
    for key in range(6):
        flat(tmp_path / "edits" / f"{key}.png", 51 * key)
    out, other = tmp_path / "out", RuleServer(lambda *a: THREE.format(2, 2, 2))
    other.name = "strict-72b"
    run("imgedit", imgedit, out, server, edits=tmp_path / "edits")
    results = run("imgedit", imgedit, out, other, edits=tmp_path / "edits")
    assert len(server.asked) == len(other.asked) == 6
    assert {
        result["judge"].rsplit("-", 1)[0]: result["subjects"]["edits"]["groups"]["all"]["score"][
            "macro"
        ][0]
        for result in results.values()
    }["strict-72b"] == 2 and len(results) == 2
    page = (out / "report.html").read_text()
    assert re.search(r"edits score \d[.]\d\d .* psnr [\d.]+ by rule-7b-\w+;", page)
    assert re.search(r"score 2[.]00 .* psnr [\d.]+ by strict-72b-\w+;", page)
    other.shutdown()


@pytest.mark.parametrize("name", ["calls-7b", "judge-7"])
def test_a_judge_may_be_called_as_its_file_is(imgedit, edits, tmp_path, server, name):
    server.name = name
    results = run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    (result,) = results.values()
    assert result["judge"].startswith(f"{name}-") and calls(tmp_path / "out")


def test_a_local_judge_is_asked_too_and_a_call_without_an_answer_is_kept(imgedit, tmp_path):
    tokenizer = data_prep.new_tokenizer()
    data_prep.save_judge(data_prep.new_judge(tokenizer), tokenizer, tmp_path / "judge")
    table = json.loads((imgedit / "singleturn/singleturn.json").read_text())
    (imgedit / "singleturn/singleturn.json").write_text(
        json.dumps({key: table[key] for key in "05"})
    )
    for key in "05":
        flat(tmp_path / "edits" / f"{key}.png", 200, (32, 32))
    for path in (imgedit / "singleturn/animal").iterdir():
        flat(path, 100, (32, 32))
    options = {"judge": f"local:{tmp_path}/judge", "reply_tokens": 8, "stage": "judge"}
    run("imgedit", imgedit, tmp_path / "out", edits=tmp_path / "edits", **options)
    records = calls(tmp_path / "out")
    assert len(records) == 2 and all("cut by its limit" in record["failure"] for record in records)


# ---------------------------------------------------------------- comparing


def test_results_under_different_judges_readings_or_benchmarks_are_not_compared(
    imgedit, tmp_path, server, capsys
):
    for key in range(6):
        flat(tmp_path / "a" / f"{key}.png", 200 + key)
        flat(tmp_path / "b" / f"{key}.png", 20 + key)
    for name in "ab":
        run("imgedit", imgedit, tmp_path / f"out-{name}", server, edits=tmp_path / name)
    capsys.readouterr()
    evaluate.main(["compare", str(tmp_path / "out-a"), str(tmp_path / "out-b")])
    assert f"{tmp_path}/out-a is better than {tmp_path}/out-b: +3.000" in capsys.readouterr().out
    run("imgedit", imgedit, tmp_path / "out-c", server, edits=tmp_path / "a", mode="official")
    with pytest.raises(BadInput, match="no result under one judge, prompts, reading"):
        evaluate.main(["compare", str(tmp_path / "out-a"), str(tmp_path / "out-c")])
    table = json.loads((imgedit / "singleturn/singleturn.json").read_text())
    table["0"]["prompt"] += "!"
    (imgedit / "singleturn/singleturn.json").write_text(json.dumps(table))
    run("imgedit", imgedit, tmp_path / "out-d", server, edits=tmp_path / "a")
    with pytest.raises(BadInput, match="no result under .* version of the benchmark"):
        evaluate.main(["compare", str(tmp_path / "out-a"), str(tmp_path / "out-d")])
    for places, message in ((["x"], "name two runs"), (["x", "y"], "x: holds no scores")):
        with pytest.raises(BadInput, match=message):
            evaluate.main(["compare", *places])


# ---------------------------------------------------------------- curves


class Axes:
    def plot(self, epochs, means, marker):
        self.line = dict(zip(epochs, means, strict=True))

    def fill_between(self, epochs, lowest, highest, alpha):
        self.band = dict(zip(epochs, zip(lowest, highest, strict=True), strict=True))

    def set_title(self, title):
        self.title = title

    def bar(self, places, means, width, label):
        self.bars = getattr(self, "bars", {}) | {label: list(means)}

    def vlines(self, places, lows, highs, colour):
        self.intervals = [*getattr(self, "intervals", []), (list(lows), list(highs))]

    def set_xticks(self, places, names, rotation, ha):
        self.names = list(names)

    def legend(self):
        pass


class Figure:
    """What evaluate.curves uses of matplotlib's, which need not be installed here."""

    def __init__(self, size, layout):
        Figure.last = self

    def subplots(self, rows=1, columns=1):
        self.axes = [Axes() for _ in range(rows * columns)]
        if len(self.axes) == 1:
            return self.axes[0]
        return np.array(self.axes).reshape(rows, columns)

    def savefig(self, place, format):
        Path(place).write_text(format)


def logs(folder, *runs):
    for name, rewards in zip("ab", runs, strict=True):
        lines = [{"epoch": i, "reward/mean": value} for i, value in enumerate(rewards, 1)]
        data_prep.write_json_lines(folder / name / "log.jsonl", lines)
    return [str(folder / name) for name in "ab"]


def test_curves_draw_the_mean_of_runs_and_the_band_between_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=Figure))
    runs = logs(tmp_path, [0.25, 0.5, 0.75], [0.75, 1.0])
    evaluate.main(["curves", *runs, "--out", str(tmp_path / "x/c.png")])
    first, *others = Figure.last.axes
    assert first.title == "reward/mean" and first.line == {1: 0.5, 2: 0.75, 3: 0.75}
    assert first.band == {1: (0.25, 0.75), 2: (0.5, 1.0), 3: (0.75, 0.75)}
    assert {axes.title for axes in others} == set(evaluate.CURVES) - {"reward/mean"}
    assert not any(axes.line for axes in others) and (tmp_path / "x/c.png").read_text() == "png"


@pytest.mark.parametrize("number", [1, 9])
def test_curves_may_be_of_any_number_of_scalars(tmp_path, monkeypatch, number):
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=Figure))
    names = [f"scalar/{i}" for i in range(number)]
    monkeypatch.setattr(evaluate, "CURVES", names)
    evaluate.main(["curves", *logs(tmp_path, [1], [2]), "--out", str(tmp_path / "c.png")])
    assert [axes.title for axes in Figure.last.axes if hasattr(axes, "title")] == names


def test_curves_of_what_is_no_run_or_without_matplotlib_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match="curves.png: needs matplotlib; pip install matplotlib"):
        evaluate.main(["curves", *logs(tmp_path, [1], [2])])
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=Figure))
    for words in (["nowhere"], []):
        with pytest.raises(BadInput, match="nowhere/log.jsonl|--runs"):
            evaluate.main(["curves", *words])


# ---------------------------------------------------------------- agreement with people


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    """The toy's judge with random weights, loud enough that questions get different answers."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    tokenizer = data_prep.new_tokenizer()
    model = data_prep.new_judge(tokenizer)
    for parameter in model.parameters():
        parameter.data *= 3
    data_prep.save_judge(model, tokenizer, folder)
    (folder / "judge_prompt.txt").write_text("{prompt}")
    return folder


def noise_picture(*key):
    noise = torch.rand(32, 32, 3, generator=seeded("picture", *key))
    return Image.fromarray((noise * 255).byte().numpy())


def test_pairs_are_counted_as_right_wrong_or_half():
    assert evaluate._ordered_pairs([0.9, 0.1, 0.5], [3, 1, 2]) == [1, 1, 1]
    assert evaluate._ordered_pairs([0.1, 0.9], [3, 1]) == [0]
    # one tie, one right, one without a label
    assert evaluate._ordered_pairs([0.5, 0.5, 0.7], [1, 2, 2]) == [0.5, 1]
    assert evaluate._ordered_pairs([0.5, float("nan")], [1, 2]) == []


def ratings(folder, *lines):
    for i in range(4):
        noise_picture(i).save(folder / f"{i}.png")
    lines = [{"prompt": "make the red circle blue", "image": "0.png"} | line for line in lines]
    (folder / "ratings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "ratings.jsonl"


def test_agree_prints_a_line_for_a_strategy(judge_folder, tmp_path, capsys):
    settings = JudgeSettings(judge=f"local:{judge_folder}")
    edits = [noise_picture(i) for i in (1, 2, 3)]
    row = {"prompt": "make the red circle blue"}
    marks = load_judge(settings).score(row, [noise_picture(0)], edits).score.tolist()
    better = float(marks[1] > marks[0])
    file = ratings(
        tmp_path,
        {"edits": ["1.png", "2.png", "3.png"], "scores": marks},
        {"edits": ["1.png", "2.png"], "preference": better},
    )
    words = ["agree", str(file), "--judge", f"local:{judge_folder}"]
    for strategy in ("logits", "sampled"):
        evaluate.main([*words, "--judge_strategy", strategy])
    first, second = capsys.readouterr().out.splitlines()
    assert f"{judge_folder}, logits: 5 edits of 2 sources; right pairs 100.0%" in first
    assert "ties 0.0%, Spearman 0.9" in first and "failed 0.0%" in first
    assert re.search(r"spread within sources 0\.[1-9]\d\d, mass on answers \d", first)
    assert re.search(r"\d seconds a score", first)
    assert ", sampled: 5 edits" in second


@pytest.mark.parametrize(
    "line, message",
    [
        (
            {"edits": ["1.png", "2.png"]},
            "`edits` with as many `scores`, or with a `preference`",
        ),
        ({"scores": [1]}, "lacks .*`edits`"),
        ({"edits": ["1.png"], "scores": [1, 2]}, "lacks .*`edits` with as many `scores`"),
        ({"edits": ["9.png"], "scores": [1]}, "9.png: no such file"),
        ({"edits": ["1.png", "2.png"], "scores": None, "preference": None}, "lacks `prompt`"),
        ({"edits": ["1.png"], "scores": ["good"]}, "lacks .*`edits`"),
    ],
)
def test_a_rating_that_cannot_be_read_is_refused(tmp_path, line, message):
    with pytest.raises(BadInput, match=message):
        list(evaluate.read_ratings(ratings(tmp_path, line)))


def test_agree_takes_a_public_table_whose_columns_are_named(judge_folder, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def cell(*key):
        content = io.BytesIO()
        noise_picture(*key).save(content, "PNG")
        return {"bytes": content.getvalue(), "path": None}

    names = ("instruction", "before", "left", "right", "vote")
    rows = []
    for i in range(3):
        cells = ("make it", cell(i), cell(i, 1), cell(i, 2), i % 2)
        rows.append(dict(zip(names, cells, strict=True)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    columns = ["prompt=instruction", "image=before", "edits=left,right", "preference=vote"]
    words = ["agree", str(tmp_path / "pairs.parquet"), "--judge", f"local:{judge_folder}"]
    evaluate.main([*words, "--columns", *columns])
    assert "logits: 6 edits of 3 sources" in capsys.readouterr().out
    found = list(evaluate.read_ratings(tmp_path / "pairs.parquet", columns))
    assert [row["labels"] for row in found] == [[1, 0], [0, 1], [1, 0]]
    assert np.array_equal(found[2]["edits"][1], noise_picture(2, 2))


def test_pictures_of_a_folder_of_ratings_lie_in_that_folder(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    line = {"prompt": "make it", "image": "0.png", "edits": ["1.png", "2.png"], "preference": 1}
    ratings(tmp_path)
    parquet.write_table(pyarrow.Table.from_pylist([line]), tmp_path / "pairs.parquet")
    (row,) = evaluate.read_ratings(tmp_path)
    assert np.array_equal(row["edits"][1], noise_picture(2))


def test_agree_refuses_a_table_without_the_columns_before_it_loads_a_judge(tmp_path):
    file = ratings(tmp_path, {"edits": ["1.png", "2.png"], "preference": 1})
    with pytest.raises(BadInput, match="say in --columns what they are called"):
        evaluate.main(["agree", str(file), "--judge", "local:nowhere", "--columns", "prompt=text"])


def test_agree_refuses_what_it_does_not_know(judge_folder, tmp_path):
    with pytest.raises(BadInput, match="--table: expected one argument"):
        evaluate.main(["agree", "--judge", f"local:{judge_folder}"])
    with pytest.raises(BadInput, match="--judge_strategy"):
        evaluate.main(["agree", str(ratings(tmp_path)), "--judge_strategy", "guess"])


# ---------------------------------------------------------------- nothing stale


@pytest.fixture
def edits(tmp_path):
    """Edits of the small ImgEdit benchmark, the brighter the higher the key."""
    for key in range(6):
        flat(tmp_path / "edits" / f"{key}.png", 51 * key)
    return tmp_path / "edits"


def scores_of(result, subject="edits", metric="score"):
    return {row["row"]: row[metric] for row in result["subjects"][subject]["rows"]}


@pytest.mark.parametrize("newer", [0, 7])
def test_the_newest_answer_counts_whatever_process_wrote_it(
    imgedit, edits, tmp_path, server, newer
):
    out = tmp_path / "out"
    run("imgedit", imgedit, out, server, edits=edits)
    (file,) = out.glob("calls-*-0.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    other = file.with_name(file.name.replace("-0.jsonl", "-7.jsonl"))
    for record in records:
        record["reply"] = THREE.format(*[5 if newer else 1] * 3)
        record["time"] += 10 if newer else -10
    other.write_text("".join(json.dumps(record) + "\n" for record in records))
    (result,) = run("imgedit", imgedit, out, edits=edits, stage="score").values()
    assert scores_of(result)["2"] == (5 if newer else round(1 + 4 * 2 / 5))


def test_an_answer_counts_only_for_the_very_edit_source_and_text(imgedit, edits, tmp_path, server):
    out = tmp_path / "out"
    run("imgedit", imgedit, out, server, edits=edits)
    flat(edits / "0.png", 250)  # another edit
    flat(imgedit / "singleturn/animal/1.jpg", 7)  # the source of rows 2 and 3
    table = json.loads((imgedit / "singleturn/singleturn.json").read_text())
    table["5"]["prompt"] += " now"
    (imgedit / "singleturn/singleturn.json").write_text(json.dumps(table))
    (result,) = run("imgedit", imgedit, out, edits=edits, stage="score").values()
    said = {row["row"]: row["said"] for row in result["subjects"]["edits"]["rows"]}
    assert [row for row in "012345" if said[row] == "not judged"] == ["0", "2", "3", "5"]
    server.asked.clear()
    run("imgedit", imgedit, out, server, edits=edits)
    assert len(server.asked) == 4


def test_results_of_calls_that_no_longer_count_go(imgedit, edits, tmp_path, server):
    out = tmp_path / "out"
    (old,) = run("imgedit", imgedit, out, server, edits=edits)
    texts = json.loads((imgedit / "judge_prompt.json").read_text())
    texts = {kind: f"Strictly: {text}" for kind, text in texts.items()}
    (imgedit / "judge_prompt.json").write_text(json.dumps(texts))
    (new,) = run("imgedit", imgedit, out, server, edits=edits)
    assert new != old


def times_of(folder):
    return {path.stem: path.stat().st_mtime_ns for path in folder.rglob("*.png")}


def drawn_again(folder, before):
    now = times_of(folder)
    return {name for name in now if before.get(name) != now[name]}


def test_a_lora_trained_further_at_its_place_gives_new_edits(
    imgedit, tmp_path, kontext_folder, lora
):
    from safetensors.torch import load_file, save_file

    options = dict(base=kontext_folder, lora=lora, steps=1, stage="sample", baselines=["base"])
    run("imgedit", imgedit, tmp_path / "out", **options)
    before = {name: times_of(tmp_path / "out" / name) for name in ("trained", "base")}
    run("imgedit", imgedit, tmp_path / "out", **options)
    assert not drawn_again(tmp_path / "out/trained", before["trained"])
    (file,) = lora.glob("*.safetensors")
    save_file({key: value + 0.1 for key, value in load_file(file).items()}, file)
    run("imgedit", imgedit, tmp_path / "out", **options)
    assert drawn_again(tmp_path / "out/trained", before["trained"]) == set("012345")
    assert not drawn_again(tmp_path / "out/base", before["base"])


def test_another_source_or_prompt_gives_a_new_edit_of_that_row_alone(
    imgedit, tmp_path, kontext_folder
):
    options = dict(base=kontext_folder, steps=1, stage="sample")
    run("imgedit", imgedit, tmp_path / "out", **options)
    before = times_of(tmp_path / "out/base")
    flat(imgedit / "singleturn/animal/0.jpg", 99)  # the source of rows 0 and 1
    table = json.loads((imgedit / "singleturn/singleturn.json").read_text())
    table["4"]["prompt"] = "remove the red circle"
    (imgedit / "singleturn/singleturn.json").write_text(json.dumps(table))
    run("imgedit", imgedit, tmp_path / "out", **options)
    assert drawn_again(tmp_path / "out/base", before) == set("014")


def test_an_edit_that_is_cut_short_is_drawn_again(imgedit, tmp_path, kontext_folder):
    options = dict(base=kontext_folder, steps=1, stage="sample")
    run("imgedit", imgedit, tmp_path / "out", **options)
    before = times_of(tmp_path / "out/base")
    whole = (tmp_path / "out/base/3.png").read_bytes()
    (tmp_path / "out/base/3.png").write_bytes(whole[: len(whole) // 2])
    run("imgedit", imgedit, tmp_path / "out", **options)
    assert drawn_again(tmp_path / "out/base", before) == {"3"}
    assert (tmp_path / "out/base/3.png").read_bytes() == whole


@pytest.fixture
def heldout(tmp_path):
    """Four toy rows with ids, and their targets as edits."""
    data_prep.write_rows(tmp_path / "toy", data_prep.ToySettings(train_rows=1, test_rows=4))
    for row in data_prep.read_rows(tmp_path / "toy", "test"):
        (tmp_path / "edits").mkdir(exist_ok=True)
        load_image(row["target"]).save(tmp_path / "edits" / f"{row['id']}.png")
    return tmp_path / "toy"


def test_a_row_put_in_front_shifts_nothing(heldout, tmp_path, judge_folder):
    options = dict(edits=tmp_path / "edits", judge=f"local:{judge_folder}")
    (before,) = run("heldout", heldout, tmp_path / "out", **options).values()
    lines = (heldout / "test.jsonl").read_text()
    first = json.loads(lines.splitlines()[0]) | {"id": "front", "prompt": "another one"}
    (heldout / "test.jsonl").write_text(json.dumps(first) + "\n" + lines)
    (after,) = run("heldout", heldout, tmp_path / "out", **options).values()
    assert scores_of(after, metric="success")["front"] == 0
    known = scores_of(before, metric="judge")
    assert {row: scores_of(after, metric="judge")[row] for row in known} == known
    assert set(scores_of(before, metric="success").values()) == {1.0}


def test_held_out_answers_of_another_strategy_do_not_count(heldout, tmp_path, judge_folder):
    options = dict(edits=tmp_path / "edits", judge=f"local:{judge_folder}")
    (old,) = run("heldout", heldout, tmp_path / "out", **options)
    results = run("heldout", heldout, tmp_path / "out", **options, judge_strategy="sampled")
    assert len(results) == 2 and old in results  # beside each other, like those of two judges
    assert len(calls(tmp_path / "out")) == 8


def test_a_held_out_row_whose_checklist_changed_is_judged_again(heldout, tmp_path, judge_folder):
    options = dict(edits=tmp_path / "edits", judge=f"local:{judge_folder}")
    run("heldout", heldout, tmp_path / "out", **options)
    first, *others = (heldout / "test.jsonl").read_text().splitlines()
    first = json.dumps(json.loads(first) | {"checklist": ["Is it red?"]})
    (heldout / "test.jsonl").write_text("\n".join([first, *others]))
    run("heldout", heldout, tmp_path / "out", **options)
    assert len(calls(tmp_path / "out")) == 4 + 1


def test_an_id_names_its_edit_and_never_leaves_the_folder(heldout, tmp_path, judge_folder):
    lines = [json.loads(line) for line in (heldout / "test.jsonl").read_text().splitlines()]
    first = lines[0].get("id", "test-1")
    lines[0]["id"] = "a b/ä"
    (heldout / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "edits/a b").mkdir()
    (tmp_path / f"edits/{first}.png").rename(tmp_path / "edits/a b/ä.png")
    options = dict(edits=tmp_path / "edits", judge=f"local:{judge_folder}")
    (result,) = run("heldout", heldout, tmp_path / "out", **options).values()
    assert scores_of(result, metric="success")["a b/ä"] == 1
    lines[0]["id"] = "../x"
    (heldout / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(BadInput, match=r"row \.\./x: .*\.\./x.png leaves"):
        run("heldout", heldout, tmp_path / "other", **options)


# ---------------------------------------------------------------- edits that are not there


@pytest.mark.parametrize("place", ["none", "empty"])
def test_edits_that_match_no_row_are_refused_with_a_file_that_was_looked_for(
    imgedit, tmp_path, server, place
):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=f"/{place}: has nothing for any row, no 0.png"):
        run("imgedit", imgedit, tmp_path / "out", server, edits=tmp_path / place)
    assert not server.asked and not list((tmp_path / "out").glob("scores-*"))


def test_missing_and_unreadable_edits_are_told_and_counted_in_the_pasted_row(
    imgedit, edits, tmp_path, server, capsys
):
    (edits / "2.png").unlink()
    (edits / "3.png").write_bytes(b"no picture")
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    said = capsys.readouterr()
    assert "warning: edits: 1 edits missing, 1 without a score" in said.out
    (row,) = (line for line in said.out.splitlines() if line.startswith(f"| {edits}"))
    assert "| strict |" in row and row.endswith("| 4 of 6 |")


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "webp"])
def test_edits_with_other_endings_are_found(imgedit, tmp_path, server, ending):
    for key in range(6):
        flat(tmp_path / "edits" / f"{key}.{ending}", 51 * key)
    (result,) = run("imgedit", imgedit, tmp_path / "out", server, edits=tmp_path / "edits").values()
    assert result["subjects"]["edits"]["groups"]["all"]["answered"] == 6


@pytest.mark.parametrize("layout", ["{task}/{key}", "{task}/en/{key}", "fullset/{task}/en/{key}"])
def test_every_layout_of_gedit_is_found(gedit, tmp_path, server, layout):
    tasks = ("color_alter", "ps_human", "color_alter")
    for i, task in enumerate(tasks):
        flat(tmp_path / "edits" / f"{layout.format(task=task, key=f'k{i}')}.png", 51 * i)
    (result,) = run("gedit", gedit, tmp_path / "out", server, edits=tmp_path / "edits").values()
    assert result["subjects"]["edits"]["groups"]["en"]["answered"] == 4


def test_a_reply_cut_by_the_token_limit_is_no_answer_and_is_asked_again(
    imgedit, edits, tmp_path, server
):
    server.finish = "length"
    with pytest.raises(BadInput, match="holds no judge's answer"):
        run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    assert all("cut by its limit" in record["failure"] for record in calls(tmp_path / "out"))
    server.finish = "stop"
    (result,) = run("imgedit", imgedit, tmp_path / "out", server, edits=edits).values()
    assert result["subjects"]["edits"]["groups"]["all"]["answered"] == 6


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_call_records_what_the_server_said_of_it_and_the_date(
    imgedit, edits, tmp_path, server, finish
):
    server.finish = finish
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits, stage="judge")
    record = calls(tmp_path / "out")[0]
    assert record["model"] == "rule-7b-0613" and record["finish_reason"] == finish
    assert record["usage"] == {"prompt_tokens": 700, "completion_tokens": 30}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", record["date"])


def test_a_held_out_call_records_what_the_server_said_of_it(heldout, tmp_path, server):
    server.rule = lambda text, shown: "score: 7"
    options = {"edits": tmp_path / "edits", "judge_strategy": "written"}
    run("heldout", heldout, tmp_path / "out", server, **options)
    record = calls(tmp_path / "out")[0]
    assert record["scores"] == [pytest.approx(0.7)]
    assert (record["model"], record["finish_reason"]) == ("rule-7b-0613", "stop")
    assert record["usage"] == {"prompt_tokens": 700, "completion_tokens": 30}


# ---------------------------------------------------------------- what is kept of the source


def test_ssim_is_that_of_its_paper_on_flat_pictures_and_one_on_equal_ones():
    a, b = (Image.new("RGB", (32, 24), (value,) * 3) for value in (51, 102))
    x, y, c = 51 / 255, 102 / 255, 0.01**2
    assert evaluate._ssim(a, b) == pytest.approx((2 * x * y + c) / (x * x + y * y + c))
    noise = noise_picture("ssim")
    assert evaluate._ssim(noise, noise) == pytest.approx(1)
    assert evaluate._ssim(noise, noise_picture("other")) < 0.3


def test_what_lies_in_the_mask_does_not_count_as_lost(imgedit, edits, tmp_path, server):
    for key in range(6):
        source = load_image(imgedit / f"singleturn/animal/{key // 2}.jpg")
        source.paste((255, 0, 0), (0, 0, 16, 32))
        source.save(edits / f"{key}.png")
        mask = Image.new("L", source.size)
        mask.paste(255, (0, 0, 24, 32))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{key}.png")
    (plain,) = run("imgedit", imgedit, tmp_path / "out", server, edits=edits).values()
    masked = run(
        "imgedit", imgedit, tmp_path / "out", edits=edits, stage="score", masks=tmp_path / "masks"
    )
    (masked,) = masked.values()
    for metric, whole in (("psnr", 40), ("ssim", 0.99)):
        assert scores_of(plain, metric=metric)["3"] < 0.9 * whole
        assert scores_of(masked, metric=metric)["3"] > whole


def test_lpips_stands_beside_psnr_where_it_is_installed_and_leaves_the_mask_out(
    imgedit, edits, tmp_path, server, monkeypatch
):
    class Distance(torch.nn.Module):
        """In place of LPIPS, which is called with two pictures (1, 3, H, W) in [0, 1]."""

        def forward(self, before, after, normalize):
            assert before.shape == after.shape and before.shape[:2] == (1, 3)
            assert normalize and before.min() >= 0 and after.max() <= 1
            return (before - after).abs().mean().view(1, 1, 1, 1)

    lpips = types.ModuleType("lpips")
    lpips.LPIPS = lambda net, verbose: Distance()
    (without,) = run("imgedit", imgedit, tmp_path / "out", server, edits=edits).values()
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    evaluate._lpips_network.cache_clear()
    for key in range(6):
        mask = Image.new("L", (32, 32), 255)
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{key}.png")
    again = {"edits": edits, "stage": "score"}
    (plain,) = run("imgedit", imgedit, tmp_path / "out", **again).values()
    (masked,) = run(
        "imgedit", imgedit, tmp_path / "out", **again, masks=tmp_path / "masks"
    ).values()
    assert "lpips" not in without["subjects"]["edits"]["rows"][0]
    assert 0 < scores_of(plain, metric="lpips")["3"] <= 2
    assert scores_of(masked, metric="lpips")["3"] == 0


def test_a_mask_that_cannot_be_read_is_told(imgedit, edits, tmp_path, server):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/0.png").write_text("no picture")
    with pytest.raises(BadInput, match="masks/0.png: not a readable picture"):
        run("imgedit", imgedit, tmp_path / "out", server, edits=edits, masks=tmp_path / "masks")


def test_masks_for_no_row_are_refused(imgedit, edits, tmp_path, server):
    with pytest.raises(BadInput, match="nowhere: has nothing for any row"):
        run("imgedit", imgedit, tmp_path / "out", server, edits=edits, masks="nowhere")


def test_a_verdict_says_how_much_of_the_source_is_kept(imgedit, edits, tmp_path, server, capsys):
    for key in range(6):
        source = 60 * (key // 2 + 1)
        flat(tmp_path / "near" / f"{key}.png", source + 2 + key)
    for name, folder in (("a", edits), ("b", tmp_path / "near")):
        run("imgedit", imgedit, tmp_path / f"out-{name}", server, edits=folder)
    capsys.readouterr()
    evaluate.main(["compare", str(tmp_path / "out-a"), str(tmp_path / "out-b")])
    said = capsys.readouterr().out
    assert re.search(r"out-a keeps \d+\.\d dB less of the source \(-[\d.]+ to -[\d.]+ dB\)", said)
    words = evaluate._verdict([0.2, 0.1, 0.3], "A", "B", [-1.3, -2.0, -0.6])
    assert words.startswith("A is better than B: +0.200") and words.endswith(
        "A keeps 1.3 dB less of the source (-2.0 to -0.6 dB)"
    )


# ---------------------------------------------------------------- what a table needs


def test_the_parts_of_imgedits_score_stand_in_the_order_of_the_prompts_labels():
    labels = ["prompt compliance", "visual seamlessness", "detail fidelity"]
    reply = "Detail Fidelity: 3\nPrompt Compliance: 4\nVisual Seamlessness: 5"
    record = imgedit_record("a", "add", labels=labels) | {"reply": reply}
    (row,) = score("imgedit", [record])["rows"]
    assert (row["adherence"], row["quality"], row["preservation"]) == (4, 5, 3)


def test_gedits_four_scores_stand_beside_what_is_made_of_them():
    (row,) = score("gedit", list(gedit_records("a", "ps_human", [9, 4], [8, 7])))["rows"]
    parts = [row[name] for name in evaluate.METRICS["gedit"][3:]]
    assert parts == [9, 4, 8, 7] and row["SC"] == 4 and row["PQ"] == 7


def test_parts_without_a_score_count_at_the_floor_too():
    (row,) = score("imgedit", [imgedit_record("a", "add")])["rows"]
    assert [row[name] for name in evaluate.METRICS["imgedit"]] == [1, 1, 1, 1]


def test_official_reading_tells_no_parts():
    table = score("imgedit", [imgedit_record("a", "add", 4, 5, 3)], "official")["groups"]["all"]
    assert set(table) == {"rows", "answered", "score"}


def in_turn(*marks):
    """A rule that answers every instruction with these scores, one after the other."""
    times = {}

    def rule(text, pictures):
        times[text] = times.get(text, -1) + 1
        return THREE.format(*[marks[times[text] % len(marks)]] * 3)

    return rule


def test_repeats_are_asked_apart_and_paid_for_once(imgedit, edits, tmp_path, server):
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits, repeats=3)
    assert (
        len(server.asked) == 18 and len({record["key"] for record in calls(tmp_path / "out")}) == 18
    )
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits, repeats=3)
    assert len(server.asked) == 18


def test_a_row_counts_with_the_mean_of_its_repeats(imgedit, edits, tmp_path, server):
    server.rule = in_turn(2, 5)
    (result,) = run("imgedit", imgedit, tmp_path / "out", server, edits=edits, repeats=2).values()
    table = result["subjects"]["edits"]["groups"]["all"]
    assert table["rows"] == 6 and table["score"]["macro"][0] == 3.5


def test_the_spread_of_repeats_is_told_apart_from_that_of_rows(
    imgedit, edits, tmp_path, server, capsys
):
    server.rule = in_turn(2, 4)
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits, repeats=2)
    within = math.sqrt(2)
    wanted = f"standard deviation {within:.3f} between the repeats of a row, 0.000 between rows"
    assert f"edits: {wanted}" in capsys.readouterr().out


def test_unread_replies_are_asked_again_where_that_is_wanted(imgedit, edits, tmp_path, server):
    server.rule = lambda text, shown: "no" if "circle 2" in text else THREE.format(5, 5, 5)
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    server.rule = lambda *a: THREE.format(4, 4, 4)
    server.asked.clear()
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    assert not server.asked
    options = dict(edits=edits, ask_again="unread")
    (result,) = run("imgedit", imgedit, tmp_path / "out", server, **options).values()
    assert len(server.asked) == 1 and scores_of(result)["2"] == 4 and scores_of(result)["1"] == 5


def test_seeds_are_a_mean_and_a_spread_and_not_more_rows(imgedit, edits, tmp_path, server, capsys):
    for mark in (2, 3, 4):
        server.rule = in_turn(mark)
        run("imgedit", imgedit, tmp_path / str(mark), server, edits=edits)
    capsys.readouterr()
    evaluate.main(["seeds", *(str(tmp_path / str(mark)) for mark in (2, 3, 4))])
    assert re.search(
        r"all score +3\.000, standard deviation 1\.000 over 3 runs", capsys.readouterr().out
    )


def test_a_row_for_latex_is_printed_with_its_marks_escaped(
    imgedit, edits, tmp_path, server, capsys
):
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits.rename(tmp_path / "my_50%"))
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.endswith("\\\\"))
    assert r"/my\_50\% & rule-7b-" in row and row.endswith(r" & 6 of 6 \\")


def test_the_picture_by_task_has_a_bar_with_its_interval_for_each_subject(
    imgedit, edits, tmp_path, server, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=Figure))
    out = tmp_path / "out"
    options = dict(edits=edits, baselines=["source"])
    (result,) = run("imgedit", imgedit, out, server, **options).values()
    (axes,) = Figure.last.axes
    assert axes.names == ["all macro", "all micro", "all add", "all adjust", "all style"]
    assert set(axes.bars) == {"edits", "source"} and (out / "tasks.png").read_text() == "png"
    lows, highs = axes.intervals[0]
    style = result["subjects"]["edits"]["groups"]["all"]["score"]["style"]
    assert [axes.bars["edits"][4], lows[4], highs[4]] == style


def test_bars_stand_under_their_tasks_though_a_subject_lacks_one(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=Figure))
    tables = {"a": {"add": [4, 4, 4], "style": [5, 5, 5]}, "b": {"style": [2, 2, 2]}}
    subjects = {name: {"groups": {"all": {"score": table}}} for name, table in tables.items()}
    result = {"benchmark": "imgedit", "judge": "j", "subjects": subjects}
    places = []
    monkeypatch.setattr(Axes, "bar", lambda self, lefts, *rest, **how: places.append(lefts))
    evaluate.draw_bars(result, tmp_path / "tasks.png")
    (axes,) = Figure.last.axes
    assert axes.names == ["all add", "all style"] and places == [[0, 1], [1.4]]


def test_settings_that_are_refused_may_be_corrected(imgedit, edits, tmp_path, server):
    for wrong in ({"edits": tmp_path / "nowhere"}, {}):  # a mistyped folder; nothing to draw with
        with pytest.raises(BadInput, match="has nothing for any row|--base is missing"):
            run("imgedit", imgedit, tmp_path / "out", server, **wrong)
    assert run("imgedit", imgedit, tmp_path / "out", server, edits=edits)


def test_a_config_in_the_working_folder_is_not_taken_for_the_loras_run(
    imgedit, edits, tmp_path, server, monkeypatch, capsys
):
    (tmp_path / "config.json").write_text(json.dumps({"judge": server.url}))
    monkeypatch.chdir(tmp_path)
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    assert "please this judge" not in capsys.readouterr().err


def test_without_matplotlib_the_picture_by_task_is_a_line(
    imgedit, edits, tmp_path, server, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    assert "tasks.png: needs matplotlib; pip install matplotlib" in capsys.readouterr().out


def test_a_score_that_is_missing_is_shown_as_missing(imgedit, edits, tmp_path, server):
    server.rule = lambda text, shown: "no" if "circle 2" in text else THREE.format(5, 5, 5)
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("edits missing, counts as score 1.00") == 1
    assert page.count('data-answered="False"') == 1


def test_an_instruction_that_the_grids_font_has_not_is_named_by_its_row(
    imgedit, edits, tmp_path, server, monkeypatch
):
    table = json.loads((imgedit / "singleturn/singleturn.json").read_text())
    table["0"]["prompt"] = table["3"]["prompt"] = "把圆变成蓝色"
    (imgedit / "singleturn/singleturn.json").write_text(json.dumps(table))
    seen = []
    draw = evaluate.picture_grid
    monkeypatch.setattr(evaluate, "picture_grid", lambda *a: seen.append(a[1]) or draw(*a))
    run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    (captions,) = seen
    assert captions[0][0] in ("source: 0", "source: 3")
    assert "把圆变成蓝色" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_edits_are_drawn_by_one_thread_whatever_the_number_of_cores(
    imgedit, tmp_path, kontext_folder, monkeypatch
):
    threads = []
    draw = evaluate.rollout

    def watched(*args, **options):
        threads.append(torch.get_num_threads())
        return draw(*args, **options)

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(evaluate, "rollout", watched)
    run("imgedit", imgedit, tmp_path / "out", base=kontext_folder, steps=1, stage="sample")
    assert set(threads) == {1}


def test_several_processes_have_the_weights_where_one_has_them(monkeypatch):
    """A device of another name, as accelerate's cpu:0, would be another place."""
    devices = []
    monkeypatch.setattr("sample.load_editor", lambda base, device, *rest: devices.append(device))
    evaluate.load_to_draw(evaluate.Settings())
    weights = torch.zeros(3)
    assert [weights.to(device).data_ptr() for device in devices] == [weights.data_ptr()]


# ---------------------------------------------------------------- a stop


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """What a signal does, put back after each test; and one thread, as several processes have."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    known = {
        name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    yield
    for name, handler in known.items():
        signal.signal(name, handler)


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])  # SIGTERM: with two processes, below
def test_a_stop_gives_up_the_wait_keeps_what_is_finished_and_says_how_to_go_on(
    imgedit, edits, tmp_path, server, capsys, name
):
    def rule(text, pictures):
        if "circle 4" in text or "circle 5" in text:
            time.sleep(60)
        return by_brightness(text, pictures)

    def interrupt():
        wait_for(lambda: len(calls_bytes(tmp_path / "out")) == 4)
        os.kill(os.getpid(), getattr(signal, name))

    server.rule = rule
    threading.Thread(target=interrupt, daemon=True).start()
    begun = time.time()
    with pytest.raises(SystemExit, match="1"):
        run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    assert time.time() - begun < 8 and "the same command goes on" in capsys.readouterr().err
    assert len(calls(tmp_path / "out")) == 4
    server.rule = by_brightness
    server.asked.clear()
    (result,) = run("imgedit", imgedit, tmp_path / "out", server, edits=edits).values()
    assert len(server.asked) == 2
    assert result["subjects"]["edits"]["groups"]["all"]["answered"] == 6


def test_a_stop_reaches_all_processes_and_is_said_once(imgedit, edits, tmp_path, server):
    def rule(text, pictures):
        if "circle 5" in text:
            time.sleep(300)
        return by_brightness(text, pictures)

    server.rule = rule
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "evaluate.py", "imgedit", "--bench", imgedit, "--judge", server.url]
    command += ["--edits", edits, "--out", tmp_path / "out"]
    child = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(calls_bytes(tmp_path / "out")) == 5, seconds=400)
    begun = time.time()
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=200)
    # well before the judge's reply, and before its timeout
    assert time.time() - begun < 50 and len(calls(tmp_path / "out")) == 5
    assert said.count("the same command goes on") == 1


def test_a_stop_while_drawing_keeps_the_finished_edits(imgedit, tmp_path, kontext_folder, capsys):
    drawn = []
    draw = evaluate.rollout

    def slow(*args, **options):
        drawn.append(1)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "rollout", slow)
        with pytest.raises(SystemExit, match="1"):
            run("imgedit", imgedit, tmp_path / "out", base=kontext_folder, steps=1, stage="sample")
    assert sorted(times_of(tmp_path / "out/base")) == ["0", "1", "2"]
    assert "the same command goes on" in capsys.readouterr().err


def test_a_stop_while_adding_up_ends_too(imgedit, edits, tmp_path, server, monkeypatch, capsys):
    def terms(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"psnr": torch.zeros(1)}

    monkeypatch.setattr(evaluate, "plain_terms", terms)
    with pytest.raises(SystemExit, match="1"):
        run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    assert "the same command goes on" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("scores-*"))


def test_two_runs_never_share_a_folder(imgedit, edits, tmp_path, server):
    with data_prep.locked(tmp_path / "out"), pytest.raises(BadInput, match="another run is"):
        run("imgedit", imgedit, tmp_path / "out", server, edits=edits)


# ---------------------------------------------------------------- damage and full disks


def test_an_out_of_another_program_is_refused_in_one_line(imgedit, edits, tmp_path, server):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"judge": "x", "seed": 0, "out": "run"}))
    with pytest.raises(BadInput, match="benchmark was None and is imgedit; .*give another --out"):
        run("imgedit", imgedit, tmp_path / "run", server, edits=edits)
    assert json.loads((tmp_path / "run/config.json").read_text())["judge"] == "x"


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0\0", '"x"'])
def test_a_damaged_config_is_one_line(imgedit, edits, tmp_path, server, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text(content)
    with pytest.raises(BadInput, match="config.json.*give another --out") as error:
        run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    assert "\n" not in str(error.value)


def test_garbage_among_the_calls_is_told_and_asked_again(imgedit, edits, tmp_path, server, capsys):
    out = tmp_path / "out"
    run("imgedit", imgedit, out, server, edits=edits)
    (file,) = out.glob("calls-*.jsonl")
    first, second, *rest = file.read_bytes().splitlines()
    damaged = [b"\0\0\0", b"3", b"\xff\xfe", b'{"key": [1], "time": "x"}', *rest]
    file.write_bytes(b"\n".join([*damaged, b'{"subject": "ed']))
    server.asked.clear()
    (result,) = run("imgedit", imgedit, out, server, edits=edits).values()
    assert len(server.asked) == 2 and "calls do not count, such as" in capsys.readouterr().err
    assert result["subjects"]["edits"]["groups"]["all"]["answered"] == 6


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_scores_are_one_line(imgedit, edits, tmp_path, server, content):
    run("imgedit", imgedit, tmp_path / "a", server, edits=edits)
    run("imgedit", imgedit, tmp_path / "b", server, edits=edits)
    (file,) = (tmp_path / "b").glob("scores-*.json")
    file.write_text(content)
    with pytest.raises(BadInput, match="scores-.*run --stage score again") as error:
        evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["report", "report.html", "grid.png", "calls"])
def test_a_path_in_the_way_is_one_line(imgedit, edits, tmp_path, server, name):
    out = tmp_path / "out"
    (scores,) = run("imgedit", imgedit, out, server, edits=edits)
    label = re.sub(r"^scores-|-strict-\w+\.json$", "", scores)
    path = out / (f"calls-{label}-0.jsonl" if name == "calls" else name)
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        path.write_text("in the way")
    else:
        path.unlink()
        path.mkdir()
        (path / "x").write_text("in the way")
    with pytest.raises(BadInput) as error:
        run("imgedit", imgedit, out, server, edits=edits)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_an_out_that_is_a_file_is_one_line(imgedit, edits, tmp_path, server):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(BadInput, match="out"):
        run("imgedit", imgedit, tmp_path / "out", server, edits=edits)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "0"],
        ["--steps", "-3"],
        ["--steps", "1e30"],
        ["--seed", "-1"],
        ["--seed", "99999999999999999999999"],
        ["--guidance", "nan"],
        ["--guidance", "inf"],
        ["--guidance", "-1"],
        ["--resolution", "0"],
        ["--resolution", "1000000"],
        ["--reply_tokens", "0"],
        ["--judge_in_flight", "0"],
        ["--judge_timeout", "nan"],
        ["--mode", "lenient"],
        ["--language", "de"],
        ["--baselines", "mine"],
        ["--copies", "2"],
    ],
)
def test_a_hostile_setting_is_one_line(words, imgedit, edits, tmp_path):
    command = ["imgedit", "--bench", str(imgedit), "--edits", str(edits), "--out"]
    with pytest.raises(BadInput, match=words[0]) as error:
        evaluate.main([*command, str(tmp_path / "out"), *words])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- bad input


def test_a_judge_without_pictures_stops_after_a_few_calls_in_one_line(imgedit, tmp_path, server):
    table = json.loads((imgedit / "singleturn/singleturn.json").read_text())
    more = {f"{key}{i}": value for i in range(9) for key, value in table.items()}
    (imgedit / "singleturn/singleturn.json").write_text(json.dumps(more))
    server.rule = lambda *a: 400
    with pytest.raises(
        BadInput, match=r"its first \d+ calls all failed .*takes no pictures"
    ) as error:
        run(
            "imgedit",
            imgedit,
            tmp_path / "out",
            server,
            baselines=["source"],
            judge_in_flight=2,
        )
    assert "\n" not in str(error.value) and len(server.asked) < 16


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "singleturn/singleturn.json").unlink(), "holds no singleturn.json"),
        (lambda f: (f / "judge_prompt.json").unlink(), "holds no (judge_prompt|vie_prompts)"),
        (lambda f: (f / "singleturn/singleturn.json").write_text("{"), "not JSON"),
        (
            lambda f: (f / "singleturn/singleturn.json").write_text("[]"),
            "not an object; take the benchmark's own",
        ),
        (lambda f: (f / "singleturn/singleturn.json").write_text("{}"), "holds no rows"),
        (lambda f: (f / "singleturn/animal/1.jpg").unlink(), "the picture of row 2 is not there"),
        ({"edit_type": "remove"}, r"judge_prompt.json \(for row 3\) lacks remove; take"),
        ({"id": "../../x.jpg"}, "leaves the dataset folder"),
        ({"prompt": 3}, "lacks id or prompt or edit_type"),
    ],
)
def test_a_wrong_imgedit_folder_is_one_clear_line(imgedit, tmp_path, change, message):
    if callable(change):
        change(imgedit)
    else:
        table = json.loads((imgedit / "singleturn/singleturn.json").read_text())
        table["3"] |= change
        (imgedit / "singleturn/singleturn.json").write_text(json.dumps(table))
    with pytest.raises(BadInput, match=message) as error:
        run("imgedit", imgedit, tmp_path / "out", edits=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": "../../../../k"}, "leaves the dataset folder"),
        ({"key": None}, "lacks key"),
        ({"file_name": None}, "row 2: picture None is no path"),
        ({"file_name": "../x.png"}, "leaves the dataset folder"),
        (lambda f: (f / "metadata.jsonl").unlink(), "holds no rows in --language en"),
        (lambda f: (f / "metadata.jsonl").write_text("{"), "not JSON"),
        (
            lambda f: (f / "viescore/vie_prompts.py").write_text("x = 1"),
            "has not the texts of VIEScore",
        ),
        (
            lambda f: (f / "viescore/vie_prompts.py").write_text("x ="),
            "has not the texts of VIEScore",
        ),
        (lambda f: (f / "viescore/vie_prompts.py").unlink(), "holds no (judge_prompt|vie_prompts)"),
    ],
)
def test_a_wrong_gedit_folder_is_one_clear_line(gedit, tmp_path, change, message):
    if callable(change):
        change(gedit)
    else:
        rows = [json.loads(line) for line in (gedit / "metadata.jsonl").read_text().splitlines()]
        rows[1] |= change
        (gedit / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match=message) as error:
        run("gedit", gedit, tmp_path / "out", edits=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no command: say what to score"),
        (["imagedit"], "imagedit: say what to score"),
        (["imgedit"], "holds no singleturn.json .*name the benchmark in --bench"),
        (["imgedit", "--bench", "nowhere"], "nowhere: holds no singleturn.json"),
        (["imgedit", "--baselines", "mine"], "--baselines mine"),
        (["imgedit", "--steps", "0"], "--steps 0"),
        (["imgedit", "--stage", "draw"], "--stage"),
    ],
)
def test_a_wrong_command_is_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message) as error:
        evaluate.main(words)
    assert "\n" not in str(error.value)


def test_edits_of_another_making_are_not_mixed_in(imgedit, tmp_path, kontext_folder):
    out = tmp_path / "out"
    with pytest.raises(BadInput, match="--base is missing"):
        run("imgedit", imgedit, out, stage="sample")
    run("imgedit", imgedit, tmp_path / "out2", base=kontext_folder, steps=1, stage="sample")
    with pytest.raises(BadInput, match="steps was 1 and is 2; give another --out"):
        run("imgedit", imgedit, tmp_path / "out2", base=kontext_folder, steps=2, stage="sample")
    with pytest.raises(BadInput, match="holds no judge's answer"):
        run("imgedit", imgedit, tmp_path / "out2", base=kontext_folder, steps=1, stage="score")


def test_the_judges_key_comes_from_the_environment_and_is_written_nowhere(
    imgedit, tmp_path, server, monkeypatch
):
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key")
    run("imgedit", imgedit, tmp_path / "out", server, baselines=["source"])
    assert set(server.headers_seen) == {"Bearer secret-key"}
    assert not any(
        b"secret-key" in file.read_bytes()
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    )


def test_the_script_needs_no_training_script_and_loads_matplotlib_for_curves_alone():
    tree = ast.parse((ROOT / "evaluate.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "train_nft" not in imported and "matplotlib.figure" in imported
    at_the_top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "matplotlib.figure" not in at_the_top


def test_spearman_is_the_correlation_of_mean_ranks():
    a = torch.rand(50, generator=seeded("ranks"))
    assert evaluate.spearman(a, a.exp()) == pytest.approx(1) and evaluate.spearman(
        a, -a
    ) == pytest.approx(-1)
    tied = evaluate.spearman(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert tied == pytest.approx(0.9486833)
