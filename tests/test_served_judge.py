"""The served judge: its scores, its load, and every fault of a server, against a real HTTP server on loopback."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

import data_prep  # noqa: E402
import reward_mllm  # noqa: E402
from data_prep import BadInput, load_image, read_rows, seeded  # noqa: E402
from judge_server import JudgeServer, rule  # noqa: E402
from reward_mllm import JudgeFailure, JudgeSettings, load_judge, refuse_silent_judge  # noqa: E402


def grey(level, size=(16, 16)):
    return Image.new("RGB", size, (level,) * 3)


SOURCE = grey(40)
EDITS = [grey(level) for level in (10, 60, 110, 160, 210, 250)]
ROW = {"prompt": "make it brighter"}
ASKED = ([ROW] * 6, [[SOURCE]] * 6, EDITS)
WANTED = torch.tensor([rule(edit) for edit in EDITS])


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("JUDGE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def served(*servers, **changes):
    return load_judge(
        JudgeSettings(
            judge=",".join(server.url for server in servers), **{"judge_patience": 5.0} | changes
        )
    )


# ---------------------------------------------------------------- scores


def test_a_served_score_is_the_expected_digit_of_its_own_edit(server):
    scores = served(server).score(*ASKED)
    assert torch.allclose(scores.score, WANTED, atol=1e-4)
    assert (
        torch.allclose(scores.mass, torch.full((6,), 0.98), atol=1e-4) and scores.causes == [""] * 6
    )


def test_pictures_travel_as_png_and_arrive_pixel_for_pixel(server):
    noise = Image.fromarray((torch.rand(24, 40, 3, generator=seeded("noise")) * 255).byte().numpy())
    served(server).score([ROW], [[SOURCE, noise]], [noise])
    first, second, edit = server.pictures[0]
    assert {picture.format for picture in server.pictures[0]} == {"PNG"}
    assert (
        np.array_equal(first, SOURCE)
        and np.array_equal(second, noise)
        and np.array_equal(edit, noise)
    )


def test_a_request_asks_for_one_word_with_its_likeliest_neighbours(server):
    served(server).score([ROW], [[SOURCE]], EDITS[:1])
    body = server.requests[0]["body"]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["model"]) == (
        1,
        True,
        20,
        "judge",
    )
    assert [part["type"] for part in body["messages"][0]["content"]] == [
        "text",
        "image_url",
        "image_url",
    ]
    assert "make it brighter" in body["messages"][0]["content"][0]["text"]


def test_a_submitted_group_is_judged_while_the_caller_goes_on():
    with JudgeServer(delay=0.3) as server:
        judge = served(server)
        start = time.monotonic()
        futures = [judge.submit(ROW, [SOURCE], EDITS) for _ in range(2)]
        assert time.monotonic() - start < 0.2 and not futures[0].done()
        assert all(torch.allclose(future.result().score, WANTED, atol=1e-4) for future in futures)
        assert time.monotonic() - start < 1.2  # 12 requests of 0.3 s side by side


def test_ask_returns_the_raw_reply_from_many_threads_within_the_bound():
    with JudgeServer(delay=0.05) as server:
        judge, replies = served(server, judge_in_flight=2), []
        threads = [
            threading.Thread(target=lambda: replies.append(judge.ask("what moved?", [SOURCE])))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (
        replies == ["It was moved."] * 8
        and server.requests[0]["body"]["temperature"] == 0
        and server.most_busy == 2
    )


# ---------------------------------------------------------------- strategies


@pytest.mark.parametrize(
    "strategy, wanted", [("logits", WANTED[3]), ("sampled", 0.6), ("yes_no", 0.75)]
)
@pytest.mark.parametrize("thought", ["", "_cot"])
def test_each_strategy_reads_its_own_answer(server, strategy, wanted, thought):
    judge = served(server, judge_strategy=strategy + thought)
    score = judge.score([ROW], [[SOURCE]], EDITS[3:4])
    assert score.score.item() == pytest.approx(float(wanted), abs=1e-4)
    assert len(server.requests) == (2 if thought else 1)


def test_a_chain_of_thought_goes_back_to_the_judge_before_it_answers(server):
    served(server, judge_strategy="logits_cot").score([ROW], [[SOURCE]], EDITS[:1])
    first, second = (request["body"]["messages"] for request in server.requests)
    assert (
        reward_mllm.THINK in first[0]["content"][0]["text"]
        and reward_mllm.DIGIT not in first[0]["content"][0]["text"]
    )
    assert [turn["role"] for turn in second] == ["user", "assistant", "user"]
    assert (
        second[1]["content"][0]["text"] == "It was moved."
        and second[2]["content"][0]["text"] == reward_mllm.DIGIT
    )


def test_a_sampled_answer_depends_on_the_picture_and_not_on_when_it_is_asked(server):
    judge = served(server, judge_strategy="sampled")
    judge.score(*ASKED)
    judge.score(*ASKED)
    seeds = Counter(request["body"]["seed"] for request in server.requests)
    assert len(seeds) == 6 and set(seeds.values()) == {2}


# ---------------------------------------------------------------- several servers


def test_requests_in_flight_are_bounded_for_each_server():
    with JudgeServer(delay=0.05) as one, JudgeServer(delay=0.05) as two:
        judge = served(one, two, judge_in_flight=3)
        futures = [judge.submit(ROW, [SOURCE], EDITS) for _ in range(6)]
        assert all(torch.allclose(future.result().score, WANTED, atol=1e-4) for future in futures)
        assert one.most_busy <= 3 and two.most_busy <= 3 and max(one.most_busy, two.most_busy) == 3


def test_the_faster_server_gets_more_to_do():
    with JudgeServer(delay=0.3) as slow, JudgeServer(delay=0.01) as fast:
        served(slow, fast, judge_in_flight=2).score(*(items * 5 for items in ASKED))
        assert len(fast.requests) > 3 * len(slow.requests) > 0


def test_when_one_server_dies_the_other_answers():
    with JudgeServer() as good:
        with JudgeServer() as bad:
            judge = served(good, bad)
        scores = judge.score(*ASKED)
    assert torch.allclose(scores.score, WANTED, atol=1e-4)


def test_a_server_with_another_model_is_refused(server):
    with pytest.raises(BadInput, match="serves judge, not mine"):
        served(server, judge_model="mine")
    with JudgeServer(models=("judge", "mine")) as both:
        assert served(both, judge_model="mine").name == "mine"


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["drop", "429", "500", "html", "truncated"])
def test_a_passing_fault_costs_a_retry_and_no_score(server, fault):
    judge = served(server)
    server.faults = [fault] * 2
    scores = judge.score(*ASKED)
    assert torch.allclose(scores.score, WANTED, atol=1e-4) and len(server.requests) == 8


@pytest.mark.parametrize(
    "fault, cause, most",
    [
        ("drop", "no connection", 5),
        ("429", "HTTP 429", 4),
        ("500", "HTTP 500", 5),
        ("html", "a reply that is not JSON", 5),
        ("truncated", "", 5),
        ("400", "HTTP 400", 1),
        ("no logprobs", "no logprobs in the reply", 1),
        ("missing", "answers missing from top_logprobs", 1),
        ("some missing", "answers missing from top_logprobs", 1),
        ("low mass", "answers missing from top_logprobs", 1),
        ("nan", "logprobs that are not finite", 1),
        ("no choices", "0 choices instead of 1", 1),
        ("two choices", "2 choices instead of 1", 1),
        ("thinks", "the judge thinks before it answers", 1),
    ],
)
def test_a_lasting_fault_is_no_score_with_its_cause_after_bounded_tries(server, fault, cause, most):
    judge = served(server, judge_patience=1.6)
    server.always = fault
    scores = judge.score([ROW], [[SOURCE]], EDITS[:1])
    assert scores.score.isnan().all() and scores.causes[0].startswith(cause) and scores.causes[0]
    assert len(server.requests) <= most


def test_a_probability_of_zero_is_a_sound_answer(server):
    judge = served(server)
    server.always = "-inf"
    assert torch.allclose(judge.score([ROW], [[SOURCE]], EDITS[3:4]).score, WANTED[3:4], atol=1e-4)


def test_a_timeout_is_tried_again_and_then_counted(server):
    judge = served(server, judge_timeout=0.4, judge_patience=4.0)
    server.faults = ["hang"]
    assert not judge.score([ROW], [[SOURCE]], EDITS[:1]).score.isnan()
    server.always = "hang"
    judge = served(server, judge_timeout=0.4, judge_patience=0.5)
    scores = judge.score([ROW], [[SOURCE]], EDITS[:1])
    assert scores.score.isnan().all() and scores.causes == ["timeout"]


def test_what_the_server_refuses_does_not_take_its_batch_with_it(server):
    judge = served(server, judge_in_flight=1)
    server.faults = [None, None, "400"]
    scores = judge.score(*ASKED)
    failed = scores.score.isnan()
    assert failed.sum() == 1 and torch.allclose(scores.score[~failed], WANTED[~failed], atol=1e-4)
    assert Counter(cause[:8] for cause in scores.causes) == {"": 5, "HTTP 400": 1}


def test_a_server_that_is_gone_and_comes_back_costs_no_score():
    away = float(os.environ.get("JUDGE_SERVER_AWAY", 3))  # seconds; also tried with 30
    with JudgeServer(delay=0.05) as server:
        judge = load_judge(
            JudgeSettings(judge=server.url, judge_in_flight=2)
        )  # the default patience
        future = judge.submit(ROW, [SOURCE], EDITS * 4)
        time.sleep(0.2)
    time.sleep(away)
    with JudgeServer(port=server.port) as again:
        scores = future.result()
        assert len(again.requests) > 0
    assert torch.allclose(scores.score, WANTED.repeat(4), atol=1e-4) and scores.causes == [""] * 24


def test_the_default_patience_outlasts_a_restart_of_half_a_minute():
    assert JudgeSettings().judge_patience > 60


def test_ask_raises_its_cause(server):
    judge = served(server)
    server.always = "400"
    with pytest.raises(JudgeFailure, match="HTTP 400"):
        judge.ask("what moved?", [SOURCE])
    server.always = "no choices"
    with pytest.raises(JudgeFailure, match="0 choices instead of 1"):
        judge.ask("what moved?", [SOURCE])


def test_no_server_at_the_start_is_refused_at_once():
    with JudgeServer() as server:
        pass
    start = time.monotonic()
    with pytest.raises(BadInput, match="no connection; start the server"):
        served(server)
    assert time.monotonic() - start < 1


def test_the_key_comes_from_the_environment_and_is_shown_to_nobody_else(server, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key")
    judge = served(server)
    server.always = "400"  # this server repeats the key in what it says
    scores = judge.score([ROW], [[SOURCE]], EDITS[:1])
    assert server.requests[0]["headers"]["Authorization"] == "Bearer secret-key"
    assert "refused" in scores.causes[0] and "secret-key" not in scores.causes[0]


# ---------------------------------------------------------------- start-up


@pytest.mark.parametrize(
    "fault, message",
    [
        ("missing", "rather say 'The' 70%"),
        ("thinks", "rather say '<think>' 99%"),
        ("400", "4 x HTTP 400"),
        ("no logprobs", "4 x no logprobs"),
    ],
)
def test_a_judge_without_answers_is_refused_with_what_it_said_instead(server, fault, message):
    judge = served(server)
    server.always = fault
    with pytest.raises(BadInput, match=message):
        refuse_silent_judge(judge.score([ROW] * 4, [[SOURCE]] * 4, EDITS[:4]), "judge")


# ---------------------------------------------------------------- requirements


def rows_folder(folder, number=6):
    SOURCE.save(folder / "a.png")
    rows = [{"prompt": f"édit {i}", "image": "a.png", "mine": i} for i in range(number)]
    rows[1]["requirement"] = "what a person wrote"
    (folder / "train.jsonl").write_text(
        "\n\n".join(json.dumps(row) for row in rows), encoding="utf-8"
    )
    return lambda: [
        json.loads(line)
        for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_a_judge_writes_the_requirements_that_nobody_wrote(server, tmp_path, capsys):
    read = rows_folder(tmp_path)
    data_prep.main(["requirements", str(tmp_path), "--judge", server.url])
    rows = read()
    assert [row["requirement"] for row in rows] == ["It was moved.", "what a person wrote"] + [
        "It was moved."
    ] * 4
    assert [row["mine"] for row in rows] == list(range(6)) and rows[3]["prompt"] == "édit 3"
    assert "5 requirements written, 1 kept" in capsys.readouterr().out
    asked = {request["body"]["messages"][0]["content"][0]["text"] for request in server.requests}
    assert (
        len(asked) == 5
        and all("édit" in text for text in asked)
        and np.array_equal(server.pictures[0][0], SOURCE)
    )


def test_a_second_call_asks_only_for_what_failed(server, tmp_path, capsys):
    read = rows_folder(tmp_path)
    server.faults = ["400", "400"]
    data_prep.main(["requirements", str(tmp_path), "--judge", server.url])
    assert (
        sum("requirement" not in row for row in read()) == 2
        and "2 failed: HTTP 400" in capsys.readouterr().out
    )
    data_prep.main(["requirements", str(tmp_path), "--judge", server.url])
    assert all(row["requirement"] for row in read()) and len(server.requests) == 7


def test_what_was_written_before_a_kill_stays(server, tmp_path, monkeypatch):
    read = rows_folder(tmp_path, 80)
    ask, calls = reward_mllm.ServedJudge.ask, []

    def killed(*args):
        calls.append(1)
        if len(calls) > 50:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(reward_mllm.ServedJudge, "ask", killed)
    with pytest.raises(KeyboardInterrupt):
        data_prep.main(["requirements", str(tmp_path), "--judge", server.url])
    assert sum("requirement" in row for row in read()) == 33 and len(read()) == 80


def test_requirements_names_its_folder_and_the_script_refuses_in_one_line():
    with pytest.raises(BadInput, match="names no folder"):
        data_prep.main(["requirements", "--judge", "local:x"])
    words = [sys.executable, data_prep.__file__, "requirements", "x", "--judge", "ftp://x"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "not of the form" in done.stderr and "Traceback" not in done.stderr
    )


# ---------------------------------------------------------------- a real server


@pytest.mark.skipif(
    "JUDGE_SERVER_URL" not in os.environ,
    reason="needs JUDGE_SERVER_URL and JUDGE_SERVER_DATA, a toy",
)
@pytest.mark.parametrize("strategy", ["logits", "logits_cot"])
def test_a_real_server_and_the_local_judge_give_the_same_scores(strategy):
    folder = Path(os.environ["JUDGE_SERVER_DATA"])
    common = dict(
        judge_prompt=[str(folder / "judge" / "judge_prompt.txt")],
        judge_strategy=strategy,
        judge_thought=8,
    )
    rows = read_rows(folder, "test")[:16]
    sources = [[load_image(row["images"][0])] for row in rows]
    edits = [
        Image.blend(source, load_image(row["target"]), i / 15)
        for i, (row, (source,)) in enumerate(zip(rows, sources))
    ]
    local, remote = (
        load_judge(JudgeSettings(judge=judge, **common)).score(rows, sources, edits)
        for judge in (f"local:{folder / 'judge'}", os.environ["JUDGE_SERVER_URL"])
    )
    difference = (local.score - remote.score).abs().max().item()
    print(
        f"{strategy}: largest difference of {len(rows)} scores {difference:.1e}, of their mass "
        f"{(local.mass - remote.mass).abs().max().item():.1e}; scores from {local.score.min():.2f} to {local.score.max():.2f}"
    )
    assert difference < 1e-3 and (local.mass - remote.mass).abs().max() < 1e-3
