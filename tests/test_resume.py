"""Nothing is lost: kills, signals, faults in mid-run, full disks, damaged files, other settings.

`--resume auto` goes on from the newest whole checkpoint, and ends with the same bits as a run that
was never stopped (on the CPU, with the same number of processes).

What happens                        what the user sees                          what is kept
SIGKILL at any moment, also inside  nothing; --resume auto goes on              all up to the last
  a checkpoint's writing                                                          checkpoint
SIGTERM (twice, to one rank, to     within seconds "stopped after epoch N of    all finished epochs
  the group), SIGHUP, Ctrl-C          M, evaluated and logged up to N; go on
  in rollout, judgement, update,      with --resume auto", code 0
  evaluation
... in an evaluation that was due   "evaluated and logged up to N-1"; --resume  all finished epochs
                                      auto makes up for it
a second Ctrl-C                     the program ends at once                    the last checkpoint
| head, 2>&1 | head                 nothing; the training goes on               everything
any error in the loop, on any rank  its message, once; all ranks leave          all finished epochs
                                      together
out of memory, a thread's error,    one line or the traceback, "stopped"        all finished epochs
  an error of ours, within a step
... inside a sharded forward        one line of each process, code 1            all finished epochs
a picture gone in mid-run           file, line and row, and "stopped after"     all finished epochs
... with --bad_rows skip            "skipped: FILE:LINE, row ID"; counted       the run goes on
a faulty row at the start           file, line and fix; with --bad_rows skip    all finished epochs
                                      "skipped: ..." and the run goes on
the judge fails on an edit          counted by cause in the log; the edit is    its group, if two
                                      dropped                                     edits are left
... on more than --max_failed       the causes, as soon as it is certain        all finished epochs
a full or unwritable disk: log,     "FILE: cannot be written (...)"             all finished epochs,
  grid, checkpoint                                                                old files whole
a file where a folder goes          "is in the way; move it", before the models everything
a second run in one --out           "another run is at work there"              the first goes on
an older run in --out               "holds a run already; give --resume auto"   everything
newest checkpoint damaged           "checkpoint-N: damaged; going back to the   the one before, and
                                      one before"                                 its log
every checkpoint damaged            "every checkpoint is damaged", code 2       everything
checkpoint-1-good, checkpoint-best  nothing: they are the user's                everything
bad lines in log.jsonl              nothing; on resume they are dropped         every whole line
another setting on resume           "lr was .. and is ..; give .. or --force"   everything
a step not finite                   STEP SKIPPED in the epoch's line            the weights before
three in a row, or an exploded loss "three steps in a row"; bad-steps.json      rows, times, losses
nothing kept for ten epochs         "nothing was kept", counts, settings        all finished epochs
a lost node (network namespaces)    "another process is gone", in 2 s           all finished epochs
... the first node                  the same                                    the last checkpoint

Always kept: the newest --keep_checkpoints (three) and the best held-out one. A SIGTERM to
`accelerate launch` with one process reaches the launcher alone: send it to the python process, or
to the group. With several, the launcher passes it on and grants 30 s, which
TORCH_ELASTIC_SHUTDOWN_TIMEOUT changes. The judge's failures are tested in test_train_nft.py.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from rule_judge import RuleJudge, arguments, checkpoints, fork_server, log, lora

import data_prep
import train_nft
from data_prep import BadInput, Stopped, file_hashes
from train_nft import nft_loss

ROOT = Path(__file__).parents[1]


def assert_same_end(one, other):
    """Two runs whose newest checkpoints and logs hold the same bits."""
    ends = [out / f"checkpoint-{checkpoints(out)[0]}" for out in (one, other)]
    assert ends[0].name == ends[1].name
    for name in ("", "old", "ema"):
        for key, weights in lora(ends[0], name).items():
            assert torch.equal(weights, lora(ends[1], name)[key]), (name, key)
    moments = [torch.load(end / "optimizer.pt", weights_only=True) for end in ends]
    for number, state in moments[0].items():
        for key, value in state.items():
            assert torch.equal(value, moments[1][number][key]), (number, key)
    assert timeless(one) == timeless(other)


def timeless(out):
    """A run's log without what its clock said, and what only the end of a run has."""
    lines = []
    for line in log(out):
        own = ("seconds/", "heldout/old/", "heldout/ema/")
        lines.append({key: value for key, value in line.items() if not key.startswith(own)})
    ends = {key: value for key, value in log(out)[-1].items() if "heldout" in key}
    return lines, ends


@pytest.fixture(scope="module")
def whole(kontext_folder, dataset, tmp_path_factory):
    """An undisturbed run of four epochs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        patch.setattr(train_nft, "load_judge", lambda *args: RuleJudge())
        train_nft.main(arguments(kontext_folder, dataset, out, epochs=4, save_every=30))
    return out


class At(RuleJudge):
    """Does something when it is asked about its number-th group of four edits."""

    def __init__(self, number, action):
        super().__init__()
        self.left = number
        self.action = action

    def submit(self, row, sources, edits):
        self.left -= int(len(edits) == 4)
        if self.left == 0:
            self.left = -1
            return self.action() or super().submit(row, sources, edits)
        return super().submit(row, sources, edits)


def send(number):
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


# ---------------------------------------------------------------- kills and signals


def test_a_resumed_run_ends_with_the_same_bits(run, whole):
    halves = run("halves", epochs=2, save_every=30)
    (halves / ".part-checkpoint-3").mkdir()  # what a kill leaves behind
    (halves / ".part-checkpoint-3" / ".lock").touch()
    (halves / ".part-checkpoint-1-77").mkdir()
    with open(halves / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "rew')
    run("halves", epochs=4, save_every=30)
    assert_same_end(whole, halves)
    assert not list(halves.glob(".part*"))


def test_a_run_ended_again_and_again_ends_with_the_same_bits(tmp_path):
    script = ROOT / "tests" / "kill_train.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "6", "--epochs", "6", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "6 kills, the same bits" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_with_a_checkpoint_and_a_line(run, capsys, number):
    out = run("broken", judge=At(7, send(number)), epochs=4, save_every=30)
    assert (
        "stopped after epoch 1 of 4, evaluated and logged up to 1; go on" in capsys.readouterr().out
    )
    assert checkpoints(out) == [1]


def test_a_run_that_a_signal_stopped_goes_on_as_if_nothing_had_been(run, whole):
    out = run("broken", judge=At(15, send(signal.SIGTERM)), epochs=4, save_every=30)
    assert checkpoints(out) == [3, 2]  # the newest, and the best
    run("broken", epochs=4, save_every=30)
    assert_same_end(whole, out)


def test_a_signal_in_the_last_evaluation_is_told_and_the_evaluation_made_up_for(
    run, whole, monkeypatch, capsys
):
    evaluate = train_nft.evaluate

    def interrupted(run, name):
        if name == "old" and checkpoints(run.out) == [2]:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(run, name)

    monkeypatch.setattr(train_nft, "evaluate", interrupted)
    out = run("late", epochs=4, save_every=30)
    said = capsys.readouterr().out
    assert "stopped after epoch 4 of 4, evaluated and logged up to 3; go on" in said
    assert checkpoints(out)[0] == 4
    assert [line["epoch"] for line in log(out)] == [1, 2, 3]
    run("late", epochs=4, save_every=30)
    assert_same_end(whole, out)
    assert "stopped" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def server():
    """serve() of rule_judge.py in a process of its own."""
    with fork_server() as started:
        yield started


@pytest.fixture
def words(kontext_folder, dataset, tmp_path):
    """The command line of a run of many epochs in tmp_path / "run", saved rarely."""

    def command(**changes):
        how = {"epochs": 90, "eval_every": 90, "save_every": 90} | changes
        return arguments(kontext_folder, dataset, tmp_path / "run", **how)

    return command


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "fault, changes",
    [
        ("slow rollout", {"rollout_steps": 40}),
        ("slow update", {"train_batch": 1}),
        ("slow evaluation", {"eval_every": 2}),
        ("hanging judge", {}),
    ],
)
def test_work_that_takes_long_is_left_within_seconds(
    server, words, tmp_path, ranks, fault, changes
):
    server.start(words(**changes), ranks, fault)
    server.wait_for("epoch 2 " if fault == "hanging judge" else "epoch 1 ")
    time.sleep(1)
    begun = time.monotonic()
    # One process alone is enough, but others then end the group that they draw.
    server.send(signal.SIGTERM, None if fault == "slow rollout" else [ranks - 1])
    assert server.codes() == [0] * ranks
    assert time.monotonic() - begun < 8
    last = log(tmp_path / "run")[-1]["epoch"]
    assert server.said().count("stopped after epoch") == 1
    assert checkpoints(tmp_path / "run")[0] >= last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_second_signal_ends_the_run_at_once_only_if_it_is_ctrl_c(server, words, tmp_path, number):
    server.start(words(train_batch=1), fault="long update")
    server.wait_for("epoch 1 ")
    time.sleep(0.5)
    server.send(number)
    time.sleep(0.1)
    server.send(number)
    if number == signal.SIGINT:
        assert server.codes() == [-signal.SIGINT]
    else:
        assert server.codes() == [0]
        assert checkpoints(tmp_path / "run") == [1]


def test_the_launcher_and_its_workers_may_all_get_sigterm(words, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += ["--num_processes", "2", "--main_process_port", "0"]
    script = ROOT / "tests" / "rule_judge.py"
    with open(tmp_path / "said.txt", "w") as said:
        process = subprocess.Popen(
            [*launcher, script, *words()],
            stdout=said,
            stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    end = time.monotonic() + 120
    while "epoch 2 " not in (tmp_path / "said.txt").read_text():
        assert time.monotonic() < end, (tmp_path / "said.txt").read_text()
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    begun = time.monotonic()
    for pid in [process.pid, *[worker.pid for worker in workers]]:
        os.kill(pid, signal.SIGTERM)
    process.wait(60)
    assert not psutil.wait_procs(workers, 10)[1]
    assert time.monotonic() - begun < 20
    assert checkpoints(tmp_path / "run")[0] >= log(tmp_path / "run")[-1]["epoch"]
    assert (tmp_path / "said.txt").read_text().count("stopped after epoch") == 1


@pytest.mark.parametrize("fault", ["no reader of stdout", "no reader"])
def test_a_run_whose_output_nobody_reads_any_more_goes_on(server, words, tmp_path, fault):
    server.start(words(epochs=3), fault=fault)
    assert server.codes() == [0]
    assert [line["epoch"] for line in log(tmp_path / "run")] == [1, 2, 3]
    assert checkpoints(tmp_path / "run") == [3]


def test_lines_stand_alone_and_not_at_the_end_of_a_bar(server, words):
    server.start(words(epochs=3))
    assert server.codes() == [0]
    for number in (1, 2, 3):
        place = server.said().index(f"epoch {number} ")
        assert server.said()[place - 1] in "\r\n"


# ---------------------------------------------------------------- faults in mid-run


@pytest.mark.parametrize("fault, codes", [("memory on rank 1", [0, 2]), ("memory", [2, 0])])
def test_an_error_of_one_rank_or_all_ends_both_and_is_told_once(
    server, words, tmp_path, fault, codes
):
    server.start(words(), ranks=2, fault=fault)
    assert server.codes() == codes
    assert server.said().count("the GPU is too small") == 1
    assert server.said().count("stopped after epoch 1") == 1
    assert checkpoints(tmp_path / "run") == [1]


def test_an_error_of_a_rollout_keeps_the_finished_epochs(run, monkeypatch, tmp_path, whole):
    def fail():
        raise ZeroDivisionError("of ours")

    with pytest.raises(ZeroDivisionError, match="of ours"):
        run(judge=At(13, fail), epochs=4, save_every=30)
    assert checkpoints(tmp_path / "run")[0] == 3
    run(epochs=4, save_every=30)
    assert_same_end(whole, tmp_path / "run")


def test_an_error_in_a_thread_of_the_judge_keeps_the_finished_epochs(run, tmp_path):
    broken = Future()
    broken.set_exception(ZeroDivisionError("in a thread"))
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        run(judge=At(7, lambda: broken), epochs=4, save_every=30)
    assert checkpoints(tmp_path / "run") == [1]


def raise_at(monkeypatch, owner, name, number, error):
    """Makes the number-th call of a function raise."""
    call = getattr(owner, name)
    calls = []

    def faulty(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise error
        return call(*args, **kwargs)

    monkeypatch.setattr(owner, name, faulty)


@pytest.mark.parametrize("name", ["group_advantages", "mean_gradient", "epoch_record"])
def test_an_error_anywhere_in_an_epoch_keeps_those_before(run, monkeypatch, tmp_path, whole, name):
    raise_at(monkeypatch, train_nft, name, 3, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        run(epochs=4, save_every=30)
    run(epochs=4, save_every=30)
    assert_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("owner, call", [("optimizer", 4), ("soft_update", 7), ("soft_update", 8)])
def test_an_error_within_a_step_leaves_no_half_of_it(
    run, monkeypatch, tmp_path, whole, owner, call
):
    """Of the fourth epoch: in AdamW, its step made; before old follows; before the EMA does."""
    with monkeypatch.context() as patch:
        error = torch.OutOfMemoryError("CUDA out of memory")
        if owner == "optimizer":
            raise_after(patch, torch.optim.AdamW, "step", call, error)
        else:
            raise_at(patch, train_nft, owner, call, error)
        with pytest.raises(torch.OutOfMemoryError):
            run(epochs=4, save_every=30)
    assert checkpoints(tmp_path / "run")[0] == 3  # saved by then, not before
    run(epochs=4, save_every=30)
    assert_same_end(whole, tmp_path / "run")


def raise_after(monkeypatch, owner, name, number, error):
    """Makes the number-th call of a function raise when its work is done."""
    call = getattr(owner, name)
    calls = []

    def faulty(*args, **kwargs):
        result = call(*args, **kwargs)
        calls.append(1)
        if len(calls) == number:
            raise error
        return result

    monkeypatch.setattr(owner, name, faulty)


@pytest.mark.parametrize("fault", ["forward of a shard", "backward of a shard"])
def test_a_fault_inside_a_sharded_forward_hangs_nobody_and_costs_no_epoch(
    server, words, tmp_path, fault
):
    server.start(words(shard=True), ranks=2, fault=fault)
    assert server.codes() == [1, 1], server.said()  # by themselves: none is killed
    assert "CUDA out of memory" in server.said()
    assert checkpoints(tmp_path / "run") == [1]


def test_with_a_sharded_base_each_epoch_is_saved(server, words, tmp_path):
    """A rank that waits inside a forward for one that is gone may be killed there."""
    server.start(words(shard=True, epochs=3), ranks=2)
    assert server.codes() == [0, 0]
    assert checkpoints(tmp_path / "run") == [3, 2, 1]


def test_a_picture_gone_in_mid_run_is_named_and_keeps_the_finished_epochs(
    run, dataset, tmp_path, monkeypatch
):
    folder, gone = vanishing(dataset, tmp_path)
    with pytest.raises(BadInput, match=r"train.jsonl:\d, row train-\d: .*no such file"):
        run(judge=At(5, gone), data=folder, epochs=4, save_every=30)
    assert checkpoints(tmp_path / "run") == [1]


def vanishing(dataset, tmp_path):
    """A copy of a dataset, and a function that takes away a picture of the second epoch."""
    folder = shutil.copytree(dataset, tmp_path / "data")
    numbers = list(data_prep.rows_of_epoch(4, 8, 0, 1))
    return folder, (folder / f"train{numbers[-1]}.png").unlink


@pytest.mark.parametrize("ranks", [1, 2])
def test_with_bad_rows_skip_a_picture_gone_in_mid_run_costs_its_group_alone(
    server, words, dataset, tmp_path, ranks
):
    folder, gone = vanishing(dataset, tmp_path)
    # Four epochs use each row twice. A sharded base must stay in step.
    server.start(
        words(data=folder, bad_rows="skip", epochs=400, shard=ranks == 2, train_batch=1),
        ranks,
        "slow update",
    )
    server.wait_for("epoch 1 ")
    gone()
    server.wait_for("skipped: ", 120)
    server.send(signal.SIGTERM)
    assert server.codes() == [0] * ranks
    assert "no such file" in server.said()
    assert "train.jsonl:" in server.said()
    assert ", row train-" in server.said()


def test_a_group_that_was_skipped_is_counted(run, dataset, tmp_path):
    folder, gone = vanishing(dataset, tmp_path)
    out = run(judge=At(4, gone), data=folder, bad_rows="skip", epochs=2)
    first, second = log(out)
    assert "judge/failed/bad row" not in first
    assert second["judge/failed/bad row"] == 4
    assert second["groups/failed"] == 1


def test_a_skipped_row_is_not_counted_as_a_failure_of_the_judge(run, dataset, tmp_path):
    folder, gone = vanishing(dataset, tmp_path)
    out = run(judge=At(4, gone), data=folder, bad_rows="skip", epochs=2, max_failed=0)
    assert len(log(out)) == 2


def test_a_target_gone_in_mid_run_does_not_end_a_run_that_skips(
    run, dataset, tmp_path, capsys, monkeypatch
):
    folder = shutil.copytree(dataset, tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    rows[0]["target"] = "target.png"
    shutil.copy(folder / "test0.png", folder / "target.png")
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    show = train_nft._show_edits

    def late(*args):
        (folder / "target.png").unlink()
        return show(*args)

    monkeypatch.setattr(train_nft, "_show_edits", late)
    out = run(data=folder, bad_rows="skip", epochs=1, eval_every=1)
    assert "skipped: " in capsys.readouterr().err
    assert len(log(out)) == 1


# ---------------------------------------------------------------- the disk


def on_a_full_disk(function):
    """A function while which no file of this process can grow above one byte."""

    def limited(*args, **kwargs):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
        try:
            return function(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited


@pytest.mark.parametrize(
    "place, owner, name, kept",
    [
        ("log.jsonl", train_nft, "append_json_line", [2, 1]),
        ("epoch-0002.png", Image.Image, "save", [2, 1]),
        ("checkpoint-2", train_nft, "save_lora", [1]),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there_whole(
    run, monkeypatch, place, owner, name, kept
):
    out = run(epochs=1, save_every=30)
    before = file_hashes(out)
    monkeypatch.setattr(owner, name, on_a_full_disk(getattr(owner, name)))
    with pytest.raises(BadInput, match=f"{place}: cannot be written") as error:
        run(epochs=2, save_every=30)
    assert "\n" not in str(error.value)
    assert checkpoints(out) == kept
    if name != "save_lora":
        del before["config.json"]
        assert before.items() <= file_hashes(out).items()
    assert not list(out.rglob(".part*"))


def test_an_epoch_that_could_not_be_logged_is_saved_and_logged_on_resume(
    run, monkeypatch, tmp_path, whole
):
    with monkeypatch.context() as patch:
        raise_at(patch, train_nft, "append_json_line", 3, BadInput("log.jsonl: no space"))
        with pytest.raises(BadInput, match="no space"):
            run(epochs=4, save_every=30)
    assert checkpoints(tmp_path / "run")[0] == 3
    assert len(log(tmp_path / "run")) == 2
    run(epochs=4, save_every=30)
    assert_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
def test_a_folder_where_a_file_goes_is_known_before_models_are_loaded(
    run, monkeypatch, tmp_path, name
):
    (tmp_path / "run" / name).mkdir(parents=True)
    monkeypatch.setattr(train_nft, "load_editor", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(BadInput, match=f"{name}: something else is in the way; move it"):
        run()


@pytest.mark.parametrize("name", ["samples", "checkpoint-2", "."])
def test_a_file_where_a_folder_goes_is_known_before_models_are_loaded(
    run, monkeypatch, tmp_path, name
):
    if name == ".":
        (tmp_path / "run").write_text("a file")
    else:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).write_text("a file")
    monkeypatch.setattr(train_nft, "load_editor", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(BadInput) as error:
        run()
    assert "\n" not in str(error.value)
    assert str(tmp_path / "run") in str(error.value)


# ---------------------------------------------------------------- only what is ours, only whole


def test_an_older_run_is_not_overwritten(run, kontext_folder, dataset):
    out = run(epochs=1)
    words = arguments(kontext_folder, dataset, out)
    text = (out / "log.jsonl").read_text()
    (out / "log.jsonl").unlink()  # its checkpoints are enough
    with pytest.raises(BadInput, match="holds a run already; give --resume auto"):
        train_nft.main(words)
    shutil.rmtree(out / "checkpoint-1")
    (out / "log.jsonl").write_text(text)  # and so is its log
    with pytest.raises(BadInput, match="holds a run already; give --resume auto"):
        train_nft.main(words)


def test_a_second_run_in_one_folder_is_refused_in_one_line(run, server, words, monkeypatch):
    server.start(words())
    server.wait_for("epoch 1 ")
    monkeypatch.setattr(train_nft, "load_editor", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(BadInput, match="another run is at work there") as error:
        run()
    assert "\n" not in str(error.value)
    server.send(signal.SIGTERM)
    assert server.codes() == [0]


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run, capsys, whole):
    out = run(epochs=3)
    file = out / "checkpoint-3" / "old" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\0" * 7 + b"\1")
    run(epochs=4)
    said = capsys.readouterr().err
    assert said.count("checkpoint-3: damaged; going back to the one before") == 1
    assert_same_end(whole, out)


def test_a_damaged_newest_checkpoint_does_not_count_among_those_that_are_kept(run):
    out = run(epochs=3, eval_every=9)
    (out / "checkpoint-3" / "state.json").unlink()
    run(
        judge=At(3, send(signal.SIGTERM)),
        epochs=9,
        eval_every=9,
        keep_checkpoints=1,
    )
    assert checkpoints(out) == [3, 2]


def test_with_every_checkpoint_damaged_the_run_stops_in_one_line_and_touches_nothing(run):
    out = run(epochs=2)
    for number in checkpoints(out):
        (out / f"checkpoint-{number}" / "state.json").unlink()
    before = file_hashes(out)
    with pytest.raises(BadInput, match="every checkpoint is damaged") as error:
        run(epochs=3)
    assert "\n" not in str(error.value)
    assert file_hashes(out) == before


def test_what_has_another_name_than_checkpoint_and_digits_is_the_users(run, tmp_path):
    out = tmp_path / "run"
    for name in ("checkpoint-1-good", "checkpoint-best", "checkpoint-"):
        (out / name).mkdir(parents=True)
        (out / name / "mine").write_text("mine")
    run(epochs=2, keep_checkpoints=1)
    run(epochs=4, keep_checkpoints=1)
    for name in ("checkpoint-1-good", "checkpoint-best", "checkpoint-"):
        assert (out / name / "mine").read_text() == "mine"


BAD_LINES = [b"\0\0\0\0", b"3", b"{}", b'{"epoch": "two"}', '{"epoch": "é"}'.encode("latin-1")]


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_in_the_log_costs_no_other_line(run, bad):
    out = run(epochs=2, eval_every=9)
    lines = (out / "log.jsonl").read_bytes().splitlines()
    (out / "log.jsonl").write_bytes(b"\n".join([bad, lines[0], bad, lines[1], bad]))
    run(epochs=3, eval_every=9)
    assert [line["epoch"] for line in log(out)] == [1, 2, 3]


def test_the_newest_and_the_best_checkpoints_are_kept(run, monkeypatch):
    marks = iter([0.5, 0.9, 0.2, 0.1, 0.3])
    gain = train_nft.paired_gain
    mark = []

    def marked(run, name):
        if name == "new":
            mark[:] = [next(marks)]
        return evaluate(run, name)

    evaluate = train_nft.evaluate
    monkeypatch.setattr(train_nft, "evaluate", marked)
    monkeypatch.setattr(train_nft, "paired_gain", lambda *args: gain(*args) | {"now": mark[0]})
    out = run(epochs=5, eval_every=1, keep_checkpoints=2)
    assert checkpoints(out) == [5, 4, 2]
    state = json.loads((out / "checkpoint-5" / "state.json").read_text())
    assert state["best"] == 0.9
    assert state["best_epoch"] == 2


# ---------------------------------------------------------------- the same run


def test_another_setting_is_named_and_needs_force(run, capsys):
    out = run(epochs=1)
    with pytest.raises(BadInput, match="lr was 0.01 and is 0.02; give what it was, or --force"):
        run(epochs=2, lr=0.02)
    run(epochs=2, lr=0.02, eval_every=1, force=True)
    said = capsys.readouterr().out
    assert said.count("resuming although") == 1
    assert "resuming although lr was 0.01 and is 0.02" in said
    assert len(log(out)) == 2
    state = json.loads((out / "checkpoint-2" / "state.json").read_text())
    assert state["settings"]["lr"] == 0.02


def test_what_does_not_change_the_training_may_change_in_silence(run, capsys):
    run(epochs=1)
    run(epochs=2, eval_every=1, train_batch=3, save_every=2, max_failed=0.3)
    assert "although" not in capsys.readouterr().out


def test_other_rows_make_it_another_run(run, dataset, tmp_path):
    folder = shutil.copytree(dataset, tmp_path / "data")
    run(epochs=1)
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(BadInput, match="rows was"):
        run(epochs=2, data=folder)


def test_a_resumed_run_is_the_same_run_to_every_tracker(run, monkeypatch):
    given = []

    def noted(self, project, config, options):
        given.append(options)

    monkeypatch.setattr(train_nft.Accelerator, "init_trackers", noted)
    run(epochs=1)
    run(epochs=2)
    for name in ("wandb", "trackio", "swanlab"):
        assert given[0][name] == given[1][name]
        assert given[0][name]["resume"] == "allow"
    assert len(given[0]["swanlab"]["id"]) == 21  # older versions refuse others
    assert [options["tensorboard"]["purge_step"] for options in given] == [1, 2]


# ---------------------------------------------------------------- a run that cannot learn


def spoil(monkeypatch, calls, factor):
    """Multiplies the loss of some calls by a factor; calls: their numbers."""
    made = []

    def spoiled(*args):
        made.append(1)
        loss = nft_loss(*args)
        return loss * factor if len(made) in calls else loss

    monkeypatch.setattr(train_nft, "nft_loss", spoiled)


def test_a_step_that_is_not_finite_is_skipped(run, monkeypatch, capsys):
    spoil(monkeypatch, [2], torch.nan)
    out = run("once", epochs=2)
    assert [line["steps/skipped"] for line in log(out)] == [1, 0]
    assert log(out)[0]["steps/made"] == 0
    assert capsys.readouterr().out.count("STEP SKIPPED") == 1
    for key, weights in lora(out / "checkpoint-1").items():
        assert not ("lora_B" in key and weights.any())
    assert all(weights.isfinite().all() for weights in lora(out / "checkpoint-2").values())


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 1e6])
def test_three_steps_in_a_row_that_do_harm_stop_the_run(run, monkeypatch, tmp_path, factor):
    spoil(monkeypatch, range(1000), factor)
    message = "three steps in a row were not finite, had a loss above 100 .*lower --lr"
    with pytest.raises(BadInput, match=message):
        run(epochs=9)
    out = tmp_path / "run"
    assert checkpoints(out)[0] == 3
    guilty = json.loads((out / "bad-steps.json").read_text())
    assert {"row", "copy", "t", "loss"} <= guilty.keys()
    assert guilty["row"][0].startswith("train-")
    assert all(weights.isfinite().all() for weights in lora(out / "checkpoint-3").values())


def test_two_bad_steps_and_a_good_one_stop_nothing(run, monkeypatch):
    def spoiled(v, v_old, x_t, x_0, t, r, beta):
        factor = 1e6 if epochs[0] % 3 else 1
        return factor * nft_loss(v, v_old, x_t, x_0, t, r, beta)

    epochs = [0]
    gradient = train_nft.mean_gradient

    def counted(run, groups, r, epoch):
        epochs[0] = epoch
        return gradient(run, groups, r, epoch)

    monkeypatch.setattr(train_nft, "nft_loss", spoiled)
    monkeypatch.setattr(train_nft, "mean_gradient", counted)
    assert len(log(run(epochs=6))) == 6


def test_a_learning_rate_that_throws_the_policy_far_off_stops_the_run(run):
    with pytest.raises(BadInput, match="three steps in a row .* lower --lr"):
        run(epochs=12, lr=1.0, eval_every=30)


def test_a_constant_reward_stops_the_run_after_ten_epochs_with_the_counts(run, monkeypatch):
    class Constant(RuleJudge):
        def score(self, row, sources, edits):
            scores = super().score(row, sources, edits)
            scores.score.fill_(0.5)
            return scores

    with pytest.raises(BadInput, match="nothing was kept for 10 .*no spread.*--judge") as error:
        run(judge=Constant(), epochs=30, eval_every=30)
    assert "\n" not in str(error.value)


def test_a_signal_breaks_off_a_forward_only_where_ranks_need_not_stay_in_step(run, monkeypatch):
    heeded = []
    monkeypatch.setattr(train_nft, "heed_stop", lambda module, stop: heeded.append(stop))
    run("one", epochs=1, eval_every=9)
    assert len(heeded) == 1
    module = torch.nn.Linear(1, 1)
    data_prep.heed_stop(module, heeded[0])
    module(torch.zeros(1))
    heeded[0].set()
    with pytest.raises(Stopped):
        module(torch.zeros(1))
