"""The served judge: its scores, its load, and every fault of a server, on a real HTTP server."""

import json
import os
import re
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

from judge_server import JudgeServer, rule

import reward_mllm
from data_prep import BadInput, load_image, read_rows, seeded
from reward_mllm import JudgeFailure, JudgeSettings, load_judge, refuse_silent_judge

ROOT = Path(__file__).parents[1]


def grey(level, size=(16, 16)):
    return Image.new("RGB", size, (level,) * 3)


SOURCE = grey(40)
EDITS = [grey(level) for level in (10, 60, 110, 160, 210, 250)]
ROW = {"prompt": "make it brighter"}
ASKED = (ROW, [SOURCE], EDITS)
ONE = (ROW, [SOURCE], EDITS[3:4])
WANTED = torch.tensor([rule(edit) for edit in EDITS])


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("JUDGE_API_KEY", "OPENAI_API_KEY", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def served(*servers, stop=None, **changes):
    urls = ",".join(server.url for server in servers)
    changes = {"judge_patience": 5.0} | changes
    return load_judge(JudgeSettings(judge=urls, **changes), stop=stop)


# ---------------------------------------------------------------- scores


def test_a_served_score_is_the_expected_digit_of_its_own_edit(server):
    scores = served(server).score(*ASKED)
    assert torch.allclose(scores.score, WANTED, atol=1e-4)
    assert torch.allclose(scores.mass, torch.full((6,), 0.98), atol=1e-4)
    assert scores.causes == [""] * 6


def test_pictures_travel_as_png_and_arrive_pixel_for_pixel(server):
    noise = Image.fromarray((torch.rand(24, 40, 3, generator=seeded("noise")) * 255).byte().numpy())
    served(server).score(ROW, [SOURCE, noise], [noise])
    first, second, edit = server.pictures[0]
    assert {picture.format for picture in server.pictures[0]} == {"PNG"}
    assert np.array_equal(first, SOURCE)
    assert np.array_equal(second, noise) and np.array_equal(edit, noise)


def test_a_source_is_shown_with_about_as_many_pixels_as_the_edit(server):
    served(server).score(ROW, [grey(40, (400, 300)), grey(9, (20, 16))], [grey(80, (24, 18))])
    large, small, edit = server.pictures[0]
    assert large.size == edit.size == (24, 18)  # 12 megapixels would be 15,000 tokens
    assert small.size == (20, 16)


def test_a_request_asks_for_one_word_with_its_likeliest_neighbours(server):
    served(server).score(*ONE)
    body = server.requests[0]["body"]
    options = {name: body[name] for name in ("max_tokens", "logprobs", "top_logprobs", "model")}
    assert options == {"max_tokens": 1, "logprobs": True, "top_logprobs": 20, "model": "judge"}


def test_the_sentence_that_tells_how_to_answer_stands_last_in_both_orders(server):
    for order, kinds in {
        "question_first": ["text", "image_url", "image_url", "text"],
        "pictures_first": ["image_url", "image_url", "text", "text"],
    }.items():
        served(server, judge_order=order).score(*ONE)
        (message,) = server.requests[-1]["body"]["messages"]
        assert [part["type"] for part in message["content"]] == kinds
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        assert "make it brighter" in texts[0] and texts[1] == reward_mllm.DIGIT


def test_a_submitted_group_is_judged_while_the_caller_goes_on():
    with JudgeServer(delay=0.3) as server:
        judge = served(server)
        start = time.monotonic()
        futures = [judge.submit(*ASKED) for _ in range(2)]
        assert time.monotonic() - start < 0.2 and not futures[0].done()
        assert all(torch.allclose(future.result().score, WANTED, atol=1e-4) for future in futures)
        assert time.monotonic() - start < 1.2  # 12 requests of 0.3 s side by side


def test_reply_returns_what_was_said_to_many_threads_within_the_bound():
    with JudgeServer(delay=0.05) as server:
        judge, replies = served(server, judge_in_flight=2), []
        threads = [
            threading.Thread(target=lambda: replies.append(judge.reply("moved?", [SOURCE]).said()))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert replies == ["It was moved."] * 8
    assert server.requests[0]["body"]["temperature"] == 0 and server.most_busy == 2


# ---------------------------------------------------------------- strategies


@pytest.mark.parametrize("thought", ["", "_cot"])
@pytest.mark.parametrize(("strategy", "wanted"), [("logits", WANTED[3]), ("yes_no", 0.75)])
def test_each_strategy_reads_its_own_answer(server, strategy, wanted, thought):
    judge = served(server, judge_strategy=strategy + thought)
    assert judge.score(*ONE).score.item() == pytest.approx(float(wanted), abs=1e-4)
    assert len(server.requests) == (2 if thought else 1)


@pytest.mark.parametrize("strategy", ["sampled", "sampled_cot"])
def test_a_sampled_digit_is_drawn_by_its_probability_and_again_the_same(server, strategy):
    judge = served(server, judge_strategy=strategy)
    edits = [Image.eval(grey(128, (8, 8)), lambda level, i=i: level) for i in range(1)]
    for i in range(200):  # 2.5 on the scale: "2" and "3" with one half each
        edit = grey(127 + i % 2, (8, 8))
        edit.putpixel((i % 8, i // 8 % 8), (120, 130 + i // 64, 133))
        edits.append(edit)
    first, again = judge.score(ROW, [SOURCE], edits), judge.score(ROW, [SOURCE], edits)
    assert torch.equal(first.score, again.score)
    digits = Counter((5 * first.score).round().int().tolist())
    assert set(digits) == {2, 3} and 60 < digits[2] < 140


def test_a_chain_of_thought_goes_back_to_the_judge_before_it_answers(server):
    served(server, judge_strategy="logits_cot").score(*ONE)
    first, second = (request["body"]["messages"] for request in server.requests)
    said = [part.get("text", "") for part in first[0]["content"]]
    assert said[-1] == reward_mllm.THINK and reward_mllm.DIGIT not in "".join(said)
    assert [turn["role"] for turn in second] == ["user", "assistant", "user"]
    assert second[1]["content"][0]["text"] == "It was moved."
    assert second[2]["content"][0]["text"] == reward_mllm.DIGIT


# ---------------------------------------------------------------- critics: written scores


def critic(server, tmp_path, **changes):
    file = tmp_path / "critic.txt"
    file.write_text('Judge the edit "{prompt}" and answer in JSON {"score": ...}.\n')
    return served(server, judge_strategy="written", judge_prompt=[str(file)], **changes)


EDITSCORE = {
    "judge_reply": r'"score"\s*:\s*\[\s*([\d.]+)\s*,\s*([\d.]+)',
    "judge_range": [0.0, 25.0],
}
FIRM = {"judge_reply": r'"score"\s*:\s*"?([\d.]+)', "judge_range": [1.0, 5.0]}
RATIONAL = {"judge_reply": r"(?m)^## Score: ([\d.]+)", "judge_range": [1.0, 4.0]}
LINES = "## Instruction\nfine\n## Score: {}\n## Fidelity\n## Score: {}\n## Physics\n## Score: {}\n"


@pytest.mark.parametrize(
    ("recipe", "reply", "wanted"),
    [
        (EDITSCORE, '{"reasoning": "x", "score": [20, 15]}', 15 / 25),  # the least, as VIEScore
        (EDITSCORE, '```json\n{"score" : [25.0 , 25], "reasoning": "5"}\n```', 1.0),
        (FIRM, '{"reasoning": "score 2 of 5", "score": 4}', 3 / 4),
        (FIRM, '<think>{"score": 1}</think> {"reasoning": "", "score": "3.5"}', 2.5 / 4),
        (RATIONAL, LINES.format("4.0", "N/A", "2"), 2 / 3),  # the mean of those that apply
        ({}, "It moved.\nscore: 10", 1.0),
        ({}, "score: 3 at first; then\n**Score:** 7.5.", 0.75),
        ({}, '{"reasoning": "", "score": 4}', 0.4),
    ],
)
def test_a_written_score_is_read_in_the_critics_own_format(server, tmp_path, recipe, reply, wanted):
    judge = critic(server, tmp_path, **recipe)
    server.written = [reply]
    scores = judge.score(*ONE)
    assert scores.score.item() == pytest.approx(wanted) and scores.mass.isnan().all()
    assert scores.words[0] == reply[-200:]
    body = server.requests[0]["body"]
    assert (body["max_tokens"], body["temperature"], "logprobs" in body) == (1024, 0, False)
    texts = [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]
    assert texts == ['Judge the edit "make it brighter" and answer in JSON {"score": ...}.\n']


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (('{"score": 4', "length"), "the reply was cut"),
        ("I cannot judge this.", "no score in the reply"),
        ('{"score": 9}', "a score out of the range 1 to 5"),
        ('{"score": ' + "9" * 400 + "}", "a score out of the range 1 to 5"),
        ('{"score": 1.2.3}', "ValueError: could not convert string to float: '1.2.3'"),
        ('<think>perhaps {"score": 4}', "a reply without an answer"),
        ('<think>{"score": 4}</think>', "a reply without an answer"),
        ('<think>{"score": 4}</think> none', "no score in the reply"),
        ("", "a reply without an answer"),
    ],
)
def test_a_reply_without_a_whole_score_in_range_is_a_cause(server, tmp_path, reply, cause):
    judge = critic(server, tmp_path, **FIRM)
    server.written = [reply]
    scores = judge.score(*ONE)
    assert scores.score.isnan().all() and scores.causes[0].startswith(cause)


def test_the_mean_of_several_draws_counts_and_an_unread_draw_does_not(server, tmp_path):
    judge = critic(server, tmp_path, judge_draws=3, **FIRM)
    server.written = ['{"score": 1}', "hm", '{"score": 3}']
    assert judge.score(*ONE).score.item() == pytest.approx(1 / 4)
    bodies = [request["body"] for request in server.requests]
    assert [body["seed"] for body in bodies] == [0, 1, 2]
    assert {body["temperature"] for body in bodies} == {reward_mllm.DRAW_TEMPERATURE}
    server.written = ["hm", "hm", "hm"]
    assert judge.score(*ONE).causes == ["no score in the reply"]


def test_only_a_written_score_is_drawn_at_random(server, tmp_path):
    judge = critic(server, tmp_path, judge_draws=3, **FIRM)
    server.written = ["a requirement"]
    judge.reply("What must a good edit show?", ONE[1])
    assert server.requests[0]["body"]["temperature"] == 0


def test_a_general_judge_is_told_how_to_write_its_score(server):
    judge = served(server, judge_strategy="written", judge_range=[1.0, 7.0])
    server.written = ["Fine.\nscore: 4"]
    assert judge.score(*ONE).score.item() == pytest.approx(0.5)
    last = server.requests[0]["body"]["messages"][0]["content"][-1]["text"]
    assert "from 1 (not at all) to 7 (completely)" in last and last.endswith("score: 7")


# ---------------------------------------------------------------- several servers


def test_requests_in_flight_are_bounded_for_each_server():
    with JudgeServer(delay=0.05) as one, JudgeServer(delay=0.05) as two:
        judge = served(one, two, judge_in_flight=3)
        futures = [judge.submit(*ASKED) for _ in range(6)]
        assert all(torch.allclose(future.result().score, WANTED, atol=1e-4) for future in futures)
        assert max(one.most_busy, two.most_busy) == 3


def test_the_bound_is_that_of_all_processes_of_a_run(server, monkeypatch):
    server.delay = 0.05
    for processes, most in {"2": 3, "16": 1}.items():
        monkeypatch.setenv("WORLD_SIZE", processes)
        server.most_busy = 0
        served(server, judge_in_flight=6).score(*ASKED)
        assert server.most_busy == most


def test_as_many_connections_are_kept_open_as_requests_are_in_flight(server):
    server.delay = 0.02
    judge = served(server, judge_in_flight=24)
    for _ in range(3):
        judge.score(ROW, [SOURCE], EDITS * 8)
    assert len(server.open) <= 25  # 144 requests, and the one for the model's name


def test_the_faster_server_gets_more_to_do():
    with JudgeServer(delay=0.3) as slow, JudgeServer(delay=0.01) as fast:
        served(slow, fast, judge_in_flight=2).score(ROW, [SOURCE], EDITS * 5)
        assert len(fast.requests) > 3 * len(slow.requests) > 0


def test_when_one_server_dies_the_other_answers():
    with JudgeServer() as good:
        with JudgeServer() as bad:
            judge = served(good, bad)
        scores = judge.score(*ASKED)
    assert torch.allclose(scores.score, WANTED, atol=1e-4)


def test_what_failed_at_a_dead_server_goes_to_another_next():
    with JudgeServer() as good, JudgeServer() as bad:
        bad.always = "500"
        scores = served(good, bad).score(*ASKED)
    assert torch.allclose(scores.score, WANTED, atol=1e-4)
    assert len(bad.requests) <= 3  # half of six, each once


def test_a_server_that_hangs_has_less_and_less_to_do_while_another_answers():
    with JudgeServer(delay=0.3) as good, JudgeServer() as bad:
        judge = served(good, bad, judge_timeout=1.2, judge_patience=60.0, judge_in_flight=4)
        bad.always = "hang"
        scores = judge.score(ROW, [SOURCE], EDITS * 10)
    assert not scores.score.isnan().any()
    assert 4 <= len(bad.requests) <= 10  # some four seconds in which four at a time would be 16


def test_a_server_with_another_model_is_refused(server):
    with pytest.raises(BadInput, match="serves .*judge.*, not 'mine'; .* --judge_model"):
        served(server, judge_model="mine")
    with JudgeServer(models=("judge", "mine")) as both:
        assert served(both, judge_model="mine").name == "mine"


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["drop", "429", "500", "html", "truncated", "retry ²"])
def test_a_passing_fault_costs_a_retry_and_no_score(server, fault):
    judge = served(server)
    server.faults = [fault] * 2
    scores = judge.score(*ASKED)
    assert torch.allclose(scores.score, WANTED, atol=1e-4) and len(server.requests) == 8


@pytest.mark.parametrize(
    ("fault", "cause", "most"),
    [
        ("drop", "no connection", 5),
        ("429", "HTTP 429", 5),
        ("retry ²", "HTTP 429", 5),
        ("500", "HTTP 500", 5),
        ("html", "a reply that is not JSON", 5),
        ("brackets", "a reply that is not JSON", 5),
        ("a number", "not one choice", 1),
        ("huge", "a reply that is not JSON", 5),
        ("truncated", "no connection", 5),
        ("307", "HTTP 307", 1),
        ("400", "HTTP 400", 1),
        ("no logprobs", "no logprobs in the reply", 1),
        ("400 digits", "no logprobs in the reply", 1),
        ("missing", "answers missing from top_logprobs", 1),
        ("some missing", "answers missing from top_logprobs", 1),
        ("low mass", "answers missing from top_logprobs", 1),
        ("nan", "probabilities that cannot be", 1),
        ("twice", "probabilities that cannot be", 1),
        ("above one", "probabilities that cannot be", 1),
        ("top-k", "probabilities that cannot be, or were cut by top-k", 1),
        ("no choices", "not one choice", 1),
        ("two choices", "not one choice", 1),
        ("thinks", "answers missing from top_logprobs", 1),
        ("reasoning", "not one choice with a text", 1),
    ],
)
def test_a_lasting_fault_is_no_score_with_its_cause_after_bounded_tries(server, fault, cause, most):
    judge = served(server, judge_patience=1.6)
    server.always = fault
    scores = judge.score(*ONE)
    assert scores.score.isnan().all() and scores.causes[0].startswith(cause)
    assert len(server.requests) <= most


def test_a_list_where_text_should_be_is_a_cause(server):
    server.always = "list text"
    judge = served(server, judge_strategy="written")
    assert judge.score(*ONE).causes == ["not one choice with a text in the reply"]


@pytest.mark.parametrize("reply", [[], 3, None, {"choices": 1}, {"choices": [{"message": 1}]}])
def test_json_of_any_form_is_a_cause(server, monkeypatch, reply):
    judge = served(server)
    monkeypatch.setattr(server, "answer", lambda body, fault: reply)
    scores = judge.score(*ONE)
    assert scores.score.isnan().all() and "choice" in scores.causes[0]


def test_a_probability_of_zero_is_a_sound_answer(server):
    judge = served(server)
    server.always = "-inf"
    assert torch.allclose(judge.score(*ONE).score, WANTED[3:4], atol=1e-4)


def test_a_timeout_is_tried_again_and_then_counted(server):
    judge = served(server, judge_timeout=0.4, judge_patience=4.0)
    server.faults = ["hang"]
    assert not judge.score(*ONE).score.isnan()
    server.always = "hang"
    judge = served(server, judge_timeout=0.4, judge_patience=0.5)
    assert judge.score(*ONE).causes == ["timeout"]


@pytest.mark.parametrize("fault", ["slow body", "slow head"])
def test_a_request_has_a_total_time_however_the_bytes_drip(server, fault):
    judge = served(server, judge_timeout=0.8, judge_patience=0.0)
    server.always = fault
    start = time.monotonic()
    assert judge.score(*ONE).causes == ["timeout"]
    assert time.monotonic() - start < 2


def test_what_the_server_refuses_does_not_take_its_batch_with_it(server):
    judge = served(server, judge_in_flight=1)
    server.faults = [None, None, "400"]
    scores = judge.score(*ASKED)
    failed = scores.score.isnan()
    assert failed.sum() == 1 and torch.allclose(scores.score[~failed], WANTED[~failed], atol=1e-4)
    assert Counter(cause[:8] for cause in scores.causes) == {"": 5, "HTTP 400": 1}


@pytest.mark.parametrize("strategy", ["logits", "written"])
def test_a_400_about_old_options_is_answered_with_what_newer_models_want(server, strategy):
    judge = served(server, judge_strategy=strategy, judge_in_flight=1)
    server.always, server.written = "new models", ["score: 10"] * 9
    scores = judge.score(ROW, [SOURCE], EDITS[3:5])
    assert not scores.score.isnan().any()
    last = server.requests[-1]["body"]
    assert "max_tokens" not in last and "temperature" not in last
    assert "max_completion_tokens" in last
    assert len(server.requests) == 3  # it costs one request, once


def test_reply_raises_its_cause(server):
    judge = served(server)
    for fault, cause in {"400": "HTTP 400", "no choices": "not one choice"}.items():
        server.always = fault
        with pytest.raises(JudgeFailure, match=cause):
            judge.reply("what moved?", [SOURCE])
    server.always = None
    server.written = [("half an ans", "length"), "<think>a draft"]
    for cause in ("cut", "without an answer"):
        with pytest.raises(JudgeFailure, match=cause):
            judge.reply("what moved?", [SOURCE]).said()


# ---------------------------------------------------------------- outages


def test_a_server_that_is_gone_and_comes_back_costs_no_score_and_is_told_in_two_lines(capsys):
    away = float(os.environ.get("JUDGE_SERVER_AWAY", 5))  # seconds; also tried with 30
    with JudgeServer(delay=0.05) as server:
        judge = load_judge(JudgeSettings(judge=server.url, judge_in_flight=2))
        future = judge.submit(ROW, [SOURCE], EDITS * 4)
        time.sleep(0.2)
    time.sleep(away)
    with JudgeServer(port=server.port) as again:
        scores = future.result()
        assert len(again.requests) > 0
    assert torch.allclose(scores.score, WANTED.repeat(4), atol=1e-4) and scores.causes == [""] * 24
    told = [line for line in capsys.readouterr().err.splitlines() if "judge http" in line]
    assert len(told) == 2, told
    assert "stopped answering: no connection" in told[0] and "answers again" in told[1]


def test_a_server_that_answers_500_to_everything_is_told_once(server, capsys):
    judge = served(server, judge_patience=3.0)
    server.always = "500"
    judge.score(*ASKED)
    told = capsys.readouterr().err
    assert told.count("stopped answering: HTTP 500") == 1 and "answers again" not in told


def test_one_refused_picture_among_good_ones_is_no_outage(server, capsys):
    judge = served(server, judge_patience=2.0, judge_in_flight=2)
    server.delay, server.faults = 0.1, ["500"]
    assert not judge.score(ROW, [SOURCE], EDITS * 4).score.isnan().any()
    assert "stopped" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["drop", "hang", "500"])
def test_a_dead_server_is_waited_for_once_and_not_by_every_request(server, fault, monkeypatch):
    monkeypatch.setattr(reward_mllm, "REST", 0.5)  # else long beside this patience
    judge = served(server, judge_patience=2.0, judge_timeout=0.5)
    server.always = fault
    start = time.monotonic()
    groups = [judge.submit(ROW, [SOURCE], EDITS * 2) for _ in range(24)]
    scores = [group.result() for group in groups]
    assert time.monotonic() - start < 12  # 18 rounds of the patience before
    assert all(group.score.isnan().all() and all(group.causes) for group in scores)


def test_an_outage_is_sat_out_once_and_then_there_is_new_patience(server, monkeypatch):
    monkeypatch.setattr(reward_mllm, "REST", 1.0)
    judge = served(server, judge_patience=1.5, judge_in_flight=2, judge_aspects=["quality=1"])
    server.always = "500"
    scores = judge.score(ROW, [SOURCE], EDITS * 6)
    assert set(scores.causes) == {"HTTP 500", "no server answers"}
    assert len(server.requests) <= 8  # of 36, and as many about quality
    time.sleep(1)
    start = time.monotonic()
    assert judge.score(*ONE).score.isnan().all() and time.monotonic() - start > 1.5
    server.always = None
    time.sleep(1)
    assert not judge.score(*ONE).score.isnan().any()


def test_one_picture_that_a_server_cannot_bear_is_given_up_while_others_are_answered(server):
    judge = served(server, judge_patience=1.0, judge_in_flight=2)
    server.delay, answer = 0.05, server.answer

    def choosy(body, fault):
        reply = answer(body, fault)
        return "[" if "unbearable" in str(body) else reply

    server.answer = choosy
    bad = judge.submit({"prompt": "unbearable"}, [SOURCE], EDITS[:1])
    start = time.monotonic()
    while not bad.done():
        assert not judge.score(*ASKED).score.isnan().any()
    assert time.monotonic() - start < 5 and bad.result().score.isnan().all()


def test_the_default_patience_outlasts_a_restart_of_half_a_minute():
    assert JudgeSettings().judge_patience > 60


@pytest.mark.parametrize("fault", ["hang", "500", None])
def test_a_stop_makes_every_wait_give_up_within_about_a_second(server, fault):
    stop = threading.Event()
    judge = served(server, stop=stop, judge_in_flight=1)
    server.always, server.delay = fault, 0.5
    groups = [judge.submit(*ASKED) for _ in range(4)]
    asked = threading.Thread(target=lambda: pytest.raises(JudgeFailure, judge.reply, "x", [SOURCE]))
    asked.start()
    time.sleep(0.3)
    stop.set()
    start = time.monotonic()
    scores = [group.result() for group in groups]
    asked.join()
    assert time.monotonic() - start < 1.2
    causes = Counter(cause for group in scores for cause in group.causes)
    assert causes["stopped"] >= 22 and set(causes) <= {"stopped", ""}


def test_the_process_ends_within_seconds_with_a_request_hanging(server):
    server.always, server.hangs = "hang", 60
    code = f"""
import reward_mllm
from PIL import Image
from reward_mllm import JudgeSettings, load_judge
judge = load_judge(JudgeSettings(judge={server.url!r}))
picture = Image.new("RGB", (16, 16))
for _ in range(3):
    judge.submit({{"prompt": "x"}}, [picture], [picture] * 40)
import time; time.sleep(0.5)
judge.close()
print("closed", flush=True)
"""
    words = [sys.executable, "-c", code]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "closed\n"
    start = time.monotonic()
    assert process.wait(timeout=40) == 0
    assert time.monotonic() - start < 20  # loaded machines take some seconds without a judge


# ---------------------------------------------------------------- addresses, keys, proxies


def test_no_server_at_the_start_is_refused_at_once():
    with JudgeServer() as server:
        pass
    start = time.monotonic()
    with pytest.raises(BadInput, match="no connection; start the server"):
        served(server)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://,",
        "http://[::1",
        "http://a b/v1",
        "http://127.0.0.1:99999/v1",
        "http://x:y",
    ],
)
def test_an_address_that_is_none_is_refused_in_one_line(url):
    with pytest.raises(BadInput) as error:
        load_judge(JudgeSettings(judge=url))
    assert "\n" not in str(error.value)


def test_pictures_never_follow_a_redirect(server):
    judge = served(server)
    server.always = "307"
    assert judge.score(*ONE).causes[0].startswith("HTTP 307")


@pytest.mark.parametrize("fault", ["400", "400 late"])
def test_the_key_comes_from_the_environment_and_is_shown_to_nobody_else(server, monkeypatch, fault):
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key-of-mine-that-is-long")
    judge = served(server)
    server.always = fault  # this server repeats the key in what it says
    scores = judge.score(*ONE)
    sent = server.requests[0]["headers"]["Authorization"]
    assert sent == "Bearer secret-key-of-mine-that-is-long"
    assert "HTTP 400" in scores.causes[0] and "secr" not in scores.causes[0]


@pytest.mark.parametrize("login", ["me:secret", "me:s%40cret", "token"])
def test_a_password_in_the_address_is_refused_and_not_shown(server, login):
    with pytest.raises(BadInput, match="JUDGE_API_KEY") as error:
        JudgeSettings(judge=server.url.replace("//", f"//{login}@"))
    assert not re.search("s.{0,3}cret|token", str(error.value))


@pytest.mark.parametrize("key", ["a\nb", "5 €"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(server, monkeypatch, key):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    with pytest.raises(BadInput, match="correct .* or JUDGE_API_KEY") as error:
        served(server)
    assert key not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_not_sent_through_a_proxy(server, monkeypatch, host):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    judge = load_judge(JudgeSettings(judge=server.url.replace("127.0.0.1", host)))
    assert torch.allclose(judge.score(*ONE).score, WANTED[3:4], atol=1e-4)
    with pytest.raises(BadInput, match="no connection"):  # others are
        load_judge(JudgeSettings(judge="http://192.0.2.1/v1", judge_timeout=2.0))


# ---------------------------------------------------------------- start-up


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "rather say 'The' 70%"),
        ("thinks", "rather say '<think>' 99%"),
        ("400", "{'HTTP 400 .*': 4}"),
        ("no logprobs", "{'no logprobs in the reply': 4}"),
    ],
)
def test_a_judge_without_answers_is_refused_with_what_it_said_instead(server, fault, message):
    judge = served(server)
    server.always = fault
    with pytest.raises(BadInput, match=message):
        refuse_silent_judge(judge.score(ROW, [SOURCE], EDITS[:4]), "judge")


# ---------------------------------------------------------------- requirements


def rows_folder(folder, number=6):
    SOURCE.save(folder / "a.png")
    rows = [{"prompt": f"édit {i}", "image": "a.png", "mine": i} for i in range(number)]
    rows[1]["requirement"] = "what a person wrote"
    text = "\n\n".join(json.dumps(row) for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return lambda: [json.loads(line) for line in (folder / "train.jsonl").open("rb")]


def requirements(folder, server):
    reward_mllm.main(["requirements", str(folder), "--judge", server.url])


def test_a_judge_writes_the_requirements_that_nobody_wrote(server, tmp_path, capsys):
    read = rows_folder(tmp_path)
    requirements(tmp_path, server)
    rows = read()
    written = [row["requirement"] for row in rows]
    assert written == ["It was moved.", "what a person wrote"] + ["It was moved."] * 4
    assert [row["mine"] for row in rows] == list(range(6)) and rows[3]["prompt"] == "édit 3"
    assert "6 of 6 rows have a requirement" in capsys.readouterr().out
    asked = {request["body"]["messages"][0]["content"][0]["text"] for request in server.requests}
    assert len(asked) == 5 and all("édit" in text for text in asked)
    assert np.array_equal(server.pictures[0][0], SOURCE)


def test_a_second_call_asks_only_for_what_failed(server, tmp_path, capsys):
    read = rows_folder(tmp_path)
    server.faults = ["400", "400"]
    requirements(tmp_path, server)
    assert sum("requirement" not in row for row in read()) == 2
    assert re.search("failed: {'HTTP 400 .*': 2}", capsys.readouterr().out)
    requirements(tmp_path, server)
    assert all(row["requirement"] for row in read()) and len(server.requests) == 7


def test_a_file_with_odd_breaks_keys_and_a_bom_keeps_all_but_what_is_added(server, tmp_path):
    rows_folder(tmp_path)
    rows = [
        {"zeta": 1, "prompt": "a\u2028b\u0085c", "image": "a.png", "alpha": {"b": 1, "a": 2}},
        {"prompt": "second", "image": ["a.png"], "requirement": "mine\u2029", "id": 7},
        {"prompt": "third", "image": "a.png"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n\n")
    requirements(tmp_path, server)
    found = [json.loads(line) for line in (tmp_path / "train.jsonl").read_bytes().splitlines()]
    for before, after in zip(rows, found, strict=True):
        wanted = {"requirement": "It was moved."} if "requirement" not in before else {}
        assert list((before | wanted).items()) == list(after.items())


def test_what_was_written_before_a_kill_is_not_asked_again(server, tmp_path, monkeypatch):
    read = rows_folder(tmp_path, 80)
    reply, calls = reward_mllm.ServedJudge.reply, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 51:
            raise MemoryError
        return reply(*args)

    monkeypatch.setattr(reward_mllm.ServedJudge, "reply", killed)
    words = ["requirements", str(tmp_path), "--judge", server.url, "--judge_in_flight", "1"]
    with pytest.raises(MemoryError):
        reward_mllm.main(words)
    reward_mllm.main(words)
    assert len(read()) == 80 and all(row["requirement"] for row in read())
    assert len(server.requests) <= 79 + 1  # 79 rows lacked one; one reply may have been on its way


def test_a_folder_that_cannot_be_written_is_noticed_before_the_judge_is_asked(
    server, tmp_path, monkeypatch
):
    rows_folder(tmp_path)
    before = (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / ".lock").mkdir()  # it cannot be opened, by root neither
    monkeypatch.setattr(reward_mllm, "load_judge", lambda *_: pytest.fail("a judge was loaded"))
    with pytest.raises(BadInput, match="cannot be written .*; make room or name another"):
        requirements(tmp_path, server)
    assert (tmp_path / "train.jsonl").read_bytes() == before and not server.requests


def test_a_row_that_cannot_be_read_leaves_the_file_alone(server, tmp_path):
    rows_folder(tmp_path)
    with (tmp_path / "train.jsonl").open("ab") as file:
        file.write(b'\n{"prompt": "x"\n')
    before = (tmp_path / "train.jsonl").read_bytes()
    with pytest.raises(BadInput, match="train.jsonl:12: not JSON"):
        requirements(tmp_path, server)
    assert (tmp_path / "train.jsonl").read_bytes() == before and not server.requests


def test_requirements_names_its_folder_and_the_script_refuses_in_one_line(tmp_path):
    with pytest.raises(BadInput, match="argument --dataset: expected one argument"):
        reward_mllm.main(["requirements", "--judge", "local:x"])
    with pytest.raises(BadInput, match="holds neither train.jsonl"):
        reward_mllm.main(["requirements", str(tmp_path), "--judge", "local:x"])
    rows_folder(tmp_path)
    script = [sys.executable, reward_mllm.__file__]
    words = [*script, "requirements", str(tmp_path), "--judge", "ftp://x"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "not of the form" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- a real server


@pytest.mark.skipif(
    "JUDGE_SERVER_URL" not in os.environ,
    reason="needs JUDGE_SERVER_URL and JUDGE_SERVER_DATA, a toy",
)
@pytest.mark.parametrize("strategy", ["logits", "logits_cot"])
def test_a_real_server_and_the_local_judge_give_the_same_scores(strategy):
    folder = Path(os.environ["JUDGE_SERVER_DATA"])
    prompt = str(folder / "judge" / "judge_prompt.txt")
    common = {"judge_prompt": [prompt], "judge_strategy": strategy, "judge_think": 8}
    local = load_judge(JudgeSettings(judge=f"local:{folder / 'judge'}", **common))
    remote = load_judge(JudgeSettings(judge=os.environ["JUDGE_SERVER_URL"], **common))
    pairs = []
    for i, row in enumerate(read_rows(folder, "test")[:16]):
        source, target = load_image(row["images"][0]), load_image(row["target"])
        edits = [Image.blend(source, target, i / 15)]
        pairs.append([judge.score(row, [source], edits) for judge in (local, remote)])
    ours, theirs = (reward_mllm.Scores.stack(column) for column in zip(*pairs, strict=True))
    differences = [
        (getattr(ours, name) - getattr(theirs, name)).abs().max().item()
        for name in ("score", "mass")
    ]
    print(
        f"{strategy}: largest differences of 16 scores and their mass {differences}; "
        f"scores from {ours.score.min():.2f} to {ours.score.max():.2f}"
    )
    assert max(differences) < 1e-3
