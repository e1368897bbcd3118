"""Errors, settings, whole files, JSON lines, rows, pictures, and the toy world with its models."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

import data_prep
from data_prep import (
    BadInput,
    CheckedSettings,
    CheckSettings,
    ToySettings,
    _apply_change,
    _graded_corruptions,
    _instructions,
    _is_test_scene,
    _render,
    _spoil,
    _texts,
    _toy_rows,
    append_json_line,
    build_toy,
    is_whole,
    load_image,
    load_rows,
    locked,
    oracle,
    oracle_scores,
    parse_settings,
    picture_grid,
    read_json_lines,
    read_rows,
    run_script,
    scenes_of,
    seeded,
    setting,
    to_pil,
    whole_file,
    whole_folder,
    write_json_lines,
)

ROOT = Path(__file__).parents[1]
ALONE = SimpleNamespace(local_process_index=0, is_main_process=True)

# ---------------------------------------------------------------- errors, output, signals


def python(code, environment=os.environ, **options):
    """A running python process of its own that knows data_prep; its stdout is a pipe."""
    lines = [f"import sys; sys.path.insert(0, {str(ROOT)!r})", "from data_prep import *", code]
    command = [sys.executable, "-c", "\n".join(lines)]
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys):
    def main():
        raise BadInput("x.png: broken; mend it")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: x.png: broken; mend it\n"


# less than a buffer holds, and more
@pytest.mark.parametrize("lines, end, code", [(3, "raise BadInput('x')", 2), (99999, "pass", 0)])
def test_a_script_whose_output_nobody_reads_goes_on_to_its_end(tmp_path, lines, end, code):
    done = tmp_path / "done"
    program = f"""
def main():
    print("one", flush=True)
    sys.stdin.read()
    for i in range({lines}):
        print("line", i)
    Path({str(done)!r}).touch()
    {end}
run_script(main)
"""
    process = python(program, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "one\n"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ("error: x\n" if code else "")
    assert process.wait(60) == code and done.exists()


def test_a_fault_is_one_line_whatever_a_name_holds():
    assert str(BadInput("a\nb\u2028c: broken")) == "a b c: broken"


def test_ctrl_c_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: stopped\n"


def test_a_broken_pipe_that_is_not_stdout_is_not_hidden():
    def main():
        raise BrokenPipeError("a judge's server")

    with pytest.raises(BrokenPipeError, match="a judge's server"):
        run_script(main)


def test_say_goes_on_when_nobody_reads_stdout(tmp_path):
    code = f"""
def main():
    say("one")
    sys.stdin.readline()
    say("two")
    print("three")
    Path({str(tmp_path / "done")!r}).touch()
run_script(main)
"""
    process = python(code, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "one\n"
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""
    assert (tmp_path / "done").exists()


WAITER = """
stop = catch_signals()
print("ready", flush=True)
while True:
    stop.wait()
    time.sleep(0.05)
    if sys.stdin.readline():
        sys.exit(7)
"""


def test_a_signal_sets_the_flag_and_does_not_end_the_program():
    process = python(WAITER, stdin=subprocess.PIPE)
    process.stdout.readline()
    for name in ("SIGTERM", "SIGTERM", "SIGHUP", "SIGTERM", "SIGINT"):
        process.send_signal(getattr(signal, name))
        time.sleep(0.2)
    process.communicate("go\n", timeout=60)
    assert process.returncode == 7


def test_a_second_ctrl_c_ends_the_program_at_once():
    process = python(WAITER, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(60) == -signal.SIGINT


def test_where_there_is_no_sighup_and_no_folder_can_be_opened_files_are_written(
    monkeypatch, tmp_path
):
    """As on Windows, for what scores and reports finished edits."""
    opened = os.open

    def without_folders(path, flags, *mode):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        if flags == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")  # what fsync says of a file that is only read
        return opened(path, flags, *mode)

    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(os, "open", without_folders)
    assert not data_prep.catch_signals().is_set()
    with data_prep.whole_file(tmp_path / "a.txt") as part:
        part.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_under_nohup_a_closed_terminal_is_no_stop(before):
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    kept = {name: signal.getsignal(name) for name in names}
    try:
        signal.signal(signal.SIGHUP, before)
        stop = data_prep.catch_signals()
        if before == signal.SIG_IGN:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
        else:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.wait(1)
    finally:
        for name, handler in kept.items():
            signal.signal(name, handler)


# ---------------------------------------------------------------- settings and seeds


@dataclass(frozen=True)
class Demo(CheckedSettings):
    sizes: list[int] = setting([1, 2], "Sizes of 5 % each.", at_least=1, at_most=9)
    nothing: list[str] = setting([], "May be empty.")
    free: float = setting(0.0, "Any number.")
    share: float = setting(0.5, "A share.", above=0, at_most=1)


def test_an_unknown_key_and_an_abbreviation_are_refused():
    for word in ("--nonsense", "--test_row"):
        with pytest.raises(BadInput, match=f"unrecognized arguments: {word} 3; --help"):
            parse_settings(ToySettings, [word, "3"])
    wanted = ToySettings(test_rows=3, seed=7)
    assert parse_settings(ToySettings, ["--test_rows", "3"], seed=7) == wanted


NAN = float("nan")
INFINITE = float("inf")


@pytest.mark.parametrize(
    "kind, name, value",
    [
        *((ToySettings, "wrong_share", value) for value in (NAN, INFINITE, -1.0, 1.01, 1e30)),
        *(
            (ToySettings, name, value)
            for name in ("train_rows", "test_rows", "pool", "vae_steps", "editor_steps")
            for value in (-1, 0, 10**30, 1e30, NAN)
        ),
        *((ToySettings, "judge_steps", value) for value in (-1, 0, 10**400)),
        *((ToySettings, "seed", value) for value in (-1, 2**63, 10**400, INFINITE)),
        *((ToySettings, "out", value) for value in ("a\0b", "\udcff")),
        *((CheckSettings, "dataset", value) for value in ("a\0b", "\udcff")),
        *((CheckSettings, "against", value) for value in ("a\0b", "\udcff")),
        *((Demo, "sizes", value) for value in ([], [0], [3, 10], [NAN], [10**400])),
        *((Demo, "free", value) for value in (NAN, INFINITE, -INFINITE, 1e30, -1e30)),
        *((Demo, "share", value) for value in (0.0, -0.1, 1.1)),
        (Demo, "nothing", ["a\0"]),
    ],
)
def test_a_value_outside_its_range_is_refused_by_the_settings_name(kind, name, value):
    with pytest.raises(BadInput, match=f"^--{name}") as error:
        kind(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--wrong_share", "nan"],
        ["--wrong_share", "1e400"],
        ["--train_rows", "1e30"],
        ["--train_rows", "-1"],
        ["--train_rows", "9" * 400],
        ["--train_rows", "9" * 5000],
        ["--seed"],
        ["--check", "false"],
    ],
)
def test_a_hostile_command_line_is_one_line(words):
    with pytest.raises(BadInput) as error:
        parse_settings(ToySettings, words)
    assert "\n" not in str(error.value)


def test_values_at_the_ends_of_a_range_are_taken():
    assert Demo(sizes=[1, 9], share=1.0).nothing == []
    assert parse_settings(ToySettings, ["--wrong_share", "0"]).wrong_share == 0


def test_help_shows_ranges_and_percent_signs(capsys):
    for kind, wanted in (
        (Demo, "Sizes of 5 % each. (at least 1 and at most 9)"),
        (Demo, "A share. (above 0 and at most 1)"),
        (ToySettings, "last 30 % of editor_steps. (at least 0 and at most 1)"),
    ):
        with pytest.raises(SystemExit):
            parse_settings(kind, ["--help"])
        assert wanted in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- files, whole or not at all


@pytest.fixture
def full_disk():
    """full_disk() makes every file of this process end at 10,000 bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_tensors(path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(10_000)}, path)


@pytest.mark.parametrize(
    "write_to",
    [
        lambda path: path.write_bytes(bytes(20_000)),
        lambda path: torch.save(torch.zeros(10_000), path),
        save_tensors,
    ],
)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, full_disk, write_to):
    (tmp_path / "x").write_text("old")
    full_disk()
    with (
        pytest.raises(BadInput, match="x: cannot be written .*; make room") as error,
        whole_file(tmp_path / "x") as part,
    ):
        write_to(part)
    assert "\n" not in str(error.value)
    assert (tmp_path / "x").read_text() == "old" and len(os.listdir(tmp_path)) == 1


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(tmp_path, full_disk):
    with whole_folder(tmp_path / "x") as part:
        (part / "a").write_text("old")
    full_disk()
    with (
        pytest.raises(BadInput, match="x: cannot be written"),
        whole_folder(tmp_path / "x") as part,
    ):
        (part / "a").write_bytes(bytes(20_000))
    assert (tmp_path / "x" / "a").read_text() == "old" and is_whole(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


def test_two_threads_may_write_one_file_at_once(tmp_path):
    def write(text):
        with whole_file(tmp_path / "x") as part:
            part.write_text(text)

    with whole_file(tmp_path / "x") as part:
        part.write_text("first")
        other = threading.Thread(target=write, args=["second"])
        other.start()
        other.join()
        assert part.read_text() == "first"
    assert (tmp_path / "x").read_text() == "first" and os.listdir(tmp_path) == ["x"]


def test_an_error_of_the_writer_leaves_nothing_and_stays_what_it_is(tmp_path):
    for whole in (whole_file, whole_folder):
        with pytest.raises(ZeroDivisionError), whole(tmp_path / "x") as part:
            assert part.parent != part
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("whole", [whole_file, whole_folder, locked])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, whole):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "x" / "y", "/proc/nowhere/x"):
        with pytest.raises(BadInput, match="cannot be written") as error, whole(place):
            pass
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_folder_is_one_line(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")  # root, who runs CI, may write anywhere

    monkeypatch.setattr(os, "mkdir", refuse)
    for whole in (whole_file, whole_folder, locked):
        with pytest.raises(BadInput, match="cannot be written"), whole(tmp_path / "x"):
            pass


def test_only_a_plain_file_is_replaced_by_a_file_and_a_folder_by_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, "", ".", "/", tmp_path / "pipe"):
        with pytest.raises(BadInput, match="is in the way; move"), whole_file(place):
            pass
    with pytest.raises(BadInput, match="pipe: .*in the way"), whole_folder(tmp_path / "pipe"):
        pass


def test_files_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file))
    )
    with whole_file(tmp_path / "x") as part:
        part.write_text("new")
    assert (tmp_path / "x").stat().st_ino in synced and tmp_path.stat().st_ino in synced
    with whole_folder(tmp_path / "y") as part:
        (part / "deep").mkdir()
        (part / "deep" / "a").write_text("a")
    for path in ("y", "y/deep", "y/deep/a", "y/hashes.json"):
        assert (tmp_path / path).stat().st_ino in synced


def test_a_folder_is_whole_while_its_files_are_what_was_written(tmp_path):
    folder = tmp_path / "x"
    assert not is_whole(folder)
    with whole_folder(folder) as part:
        (part / "a").write_text("a")
    (folder / "more").write_text("mine")
    assert is_whole(folder)
    (folder / "a").write_text("b")
    assert not is_whole(folder)
    for content in ("{", "3", "[" * 100_000, "\xff"):
        (folder / "hashes.json").write_text(content, encoding="latin-1")
        assert not is_whole(folder)


def test_a_folder_of_ours_is_replaced_and_anything_of_others_is_moved_aside(tmp_path, capsys):
    def fill(text):
        with whole_folder(tmp_path / "x") as part:
            (part / "a").write_text(text)
            (part / "nested").mkdir()
            (part / "nested" / "hashes.json").write_text(text)

    fill("1")
    fill("2")
    assert os.listdir(tmp_path) == ["x"] and capsys.readouterr().err == ""
    (tmp_path / "x" / "a").write_text("changed")
    fill("3")
    (tmp_path / "x" / "mine").symlink_to("nowhere")
    fill("4")
    (tmp_path / "x" / "deep").mkdir()
    (tmp_path / "x" / "deep" / "hashes.json").write_text("mine")
    fill("5")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all("they are in" in line for line in said)
    assert (tmp_path / "x" / "a").read_text() == "5"
    first, second, third = sorted(tmp_path.glob("x.old-*"))
    assert (first / "a").read_text() == "changed"
    assert (second / "mine").is_symlink()
    assert (third / "deep" / "hashes.json").read_text() == "mine"


def test_an_empty_folder_is_no_loss_and_a_link_is_followed(tmp_path):
    (tmp_path / "disk" / "x").mkdir(parents=True)
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "x")
    for text in ("1", "2"):
        with whole_folder(tmp_path / "x") as part:
            (part / "a").write_text(text)
    assert (tmp_path / "x").is_symlink() and (tmp_path / "disk" / "x" / "a").read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == ["disk", "x"]
    assert os.listdir(tmp_path / "disk") == ["x"]


HOLDER = "with {what}({place!r}) as part:\n  print('held', flush=True)\n  sys.stdin.read()"


def test_a_folder_that_another_process_writes_is_refused_and_what_its_kill_left_goes(tmp_path):
    holder = python(
        HOLDER.format(what="whole_folder", place=str(tmp_path / "x")), stdin=subprocess.PIPE
    )
    holder.stdout.readline()
    with pytest.raises(BadInput, match="another run is at work"), whole_folder(tmp_path / "x"):
        pass
    holder.kill()
    holder.wait()
    assert os.listdir(tmp_path) == [".part-x"]
    with whole_folder(tmp_path / "x"):
        pass
    assert os.listdir(tmp_path) == ["x"]


def test_an_old_folder_that_a_kill_left_in_the_room_is_cleared(tmp_path):
    for name in ("x", ".part-x/old"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".part-x" / ".lock").touch()
    with whole_folder(tmp_path / "x") as part:
        (part / "file").write_text("new")
    assert (tmp_path / "x" / "file").read_text() == "new"


def test_a_part_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / ".part-x").mkdir()
    (tmp_path / ".part-x" / "mine").write_text("mine")
    with pytest.raises(BadInput, match="is in the way"), whole_folder(tmp_path / "x"):
        pass
    assert (tmp_path / ".part-x" / "mine").exists()


def test_a_locked_folder_is_refused_until_its_process_ends(tmp_path):
    code = HOLDER.format(what="locked", place=str(tmp_path))
    holder = python(code, stdin=subprocess.PIPE, start_new_session=True)  # as an orphan is
    holder.stdout.readline()
    words = "another run is at work there.*fuser"
    with pytest.raises(BadInput, match=words) as error, locked(tmp_path):
        pass
    assert "\n" not in str(error.value)
    holder.kill()
    holder.wait()
    for _ in range(2):
        with locked(tmp_path):
            pass


def numbered(folder, *names):
    for name in names:
        with whole_folder(folder / name) as part:
            (part / "a").write_text(name)


def test_the_newest_whole_folder_is_found_and_damaged_ones_are_said(tmp_path, capsys):
    assert data_prep.newest_checkpoint(tmp_path) is None
    numbered(
        tmp_path,
        "checkpoint-2",
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-11-mine",
        "checkpoint-best",
    )
    assert data_prep.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "a").write_text("b")
    assert data_prep.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert "checkpoint-10: damaged; going back" in capsys.readouterr().err
    for name in ("checkpoint-2", "checkpoint-9"):
        (tmp_path / name / "a").unlink()
    with pytest.raises(BadInput, match="every checkpoint is damaged"):
        data_prep.newest_checkpoint(tmp_path)


def test_pruning_keeps_the_newest_the_best_the_later_and_what_has_another_name(tmp_path):
    numbered(
        tmp_path,
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-10",
        "checkpoint-11",
        "checkpoint-1-good",
        "other-1",
    )
    (tmp_path / ".part-checkpoint-1-77").mkdir()  # of a kill
    data_prep.prune_checkpoints(tmp_path / "checkpoint-10", keep=1, best=2)
    assert set(os.listdir(tmp_path)) == {
        "checkpoint-2",
        "checkpoint-10",
        "checkpoint-11",
        "checkpoint-1-good",
        "other-1",
    }


def test_a_file_with_the_name_of_a_folder_is_said(tmp_path):
    (tmp_path / "checkpoint-3").touch()
    with pytest.raises(BadInput, match="checkpoint-3: something else is in the way"):
        data_prep.checkpoints_in(tmp_path)
    data_prep.check_names(Path.is_file, tmp_path / "checkpoint-3", tmp_path / "new")
    data_prep.check_names(Path.is_dir, tmp_path, tmp_path / "new")
    with pytest.raises(BadInput, match=f"{tmp_path}: something else is in the way"):
        data_prep.check_names(Path.is_file, tmp_path)


# ---------------------------------------------------------------- JSON lines

BAD_LINES = {
    "zeros": b"\0\0\0\0",
    "a number": b"3",
    "a list": b"[]",
    "latin-1": b'{"a": "\xe9"}',
    "half a pair": b'{"a": "\\ud800"}',
    "very deep": b'{"a": ' + b"[" * 100_000,
    "cut": b'{"a": ',
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_object_is_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n\n{"a": 2}')
    with pytest.raises(BadInput, match=f"^{path}:2: not ") as error:
        read_json_lines(path)
    assert "\n" not in str(error.value)
    faults = []
    assert read_json_lines(path, faults) == [(1, {"a": 1}), (4, {"a": 2})]
    assert faults == [str(error.value)]


def test_json_lines_end_at_newlines_alone_and_may_begin_with_a_bom(tmp_path):
    objects = [{"b": "one\u2028two\u0085three\x0bfour", "a": {"z": None}}, {}, {"\ufeff": "é 🙂"}]
    path = tmp_path / "x.jsonl"
    write_json_lines(path, objects)
    assert path.read_bytes().count(b"\n") == 3
    assert "é 🙂".encode() in path.read_bytes()  # as it was, not escaped
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    read = read_json_lines(path)
    assert [number for number, _ in read] == [1, 2, 3]
    assert [list(value.items()) for _, value in read] == [list(o.items()) for o in objects]


def test_a_file_of_lines_that_is_none_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, "nowhere", tmp_path / "pipe"):
        with pytest.raises(BadInput, match="no such file"):
            read_json_lines(place)
    with pytest.raises(BadInput, match="pipe: cannot be written"):
        append_json_line(tmp_path / "pipe", {})


@pytest.mark.parametrize(
    "before, kept",
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}', b""),
        (b'{"a": 1}\n{"a"', b'{"a": 1}\n'),
        (b'{"a"', b""),
        (b'{"a": 1}\n\0\0\0', b'{"a": 1}\n'),
        (b'{"a": 1}\n\0\0\n', b'{"a": 1}\n\0\0\n'),
    ],
)
def test_a_line_is_appended_whole_after_a_last_line_that_a_kill_cut_short(tmp_path, before, kept):
    path = tmp_path / "log.jsonl"
    path.write_bytes(before)
    append_json_line(path, {"é": float("nan"), "b": "\ud800"})
    assert path.read_bytes() == kept + '{"é": NaN, "b": "?"}\n'.encode()


def test_a_log_on_a_full_disk_keeps_its_whole_lines(tmp_path, full_disk):
    path = tmp_path / "log.jsonl"
    append_json_line(path, {"a": 1})
    full_disk()
    with pytest.raises(BadInput, match="log.jsonl: cannot be written"):
        append_json_line(path, {"a": "x" * 20_000})
    assert path.read_bytes() == b'{"a": 1}\n'
    for place in (path / "x", Path("/proc/nowhere/log")):
        with pytest.raises(BadInput, match="cannot be written"):
            append_json_line(place, {})


def test_only_whole_lines_that_are_wanted_are_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    data_prep.keep_epochs(path, 2)
    assert not path.exists()
    path.write_bytes(b'{"epoch": 1}\n\0\0\n{"epoch": 9}\n3\n{"b": 1}\n{"epoch": 2}\n{"epoch"')
    data_prep.keep_epochs(path, 2)
    assert path.read_bytes() == b'{"epoch": 1}\n{"epoch": 2}\n'


# ---------------------------------------------------------------- several processes


class Ranks:
    """What `together` sees of accelerate: this process is the second of two."""

    process_index = 1
    is_triggered = False

    def __init__(self, other):
        self.other = other

    def set_trigger(self):
        self.is_triggered = True

    def check_trigger(self):
        return self.is_triggered or self.other != "None"

    def gather(self, told):
        return [self.other, *told]


@pytest.mark.parametrize(
    "here, other, cause",
    [
        (None, "None", "goes on"),
        (ValueError("x"), "None", "ValueError('x')"),
        (ValueError("x"), "ValueError('x')", "None"),  # said by the first process
        (None, "ValueError('x')", "None"),
    ],
)
def test_all_processes_stop_together_and_one_of_them_says_why(monkeypatch, here, other, cause):
    ranks = Ranks(other)
    monkeypatch.setattr(data_prep, "gather_object", ranks.gather)
    found = "goes on"
    try:
        with data_prep.together(ranks, threading.Event()):
            if here:
                raise here
    except data_prep.Stopped as stopped:
        found = repr(stopped.__cause__)
    assert found == cause


def test_a_signal_stops_all_processes(monkeypatch):
    ranks = Ranks("None")
    monkeypatch.setattr(data_prep, "gather_object", ranks.gather)
    stop = threading.Event()
    stop.set()
    with pytest.raises(data_prep.Stopped), data_prep.together(ranks, stop):
        pass


def test_changes_of_settings_are_told_but_for_harmless_ones():
    before = {"a": 1, "b": 2, "c": 3}
    assert data_prep.changed(before, {"a": 1, "b": 5, "c": 4, "d": None}, "c e") == [
        "b was 2 and is 5"
    ]


# ---------------------------------------------------------------- rows and pictures


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def write(folder, *rows, name="train.jsonl"):
    (folder / name).write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    )


def test_a_row_keeps_what_it_holds_and_gets_absolute_paths(folder):
    write(
        folder,
        {"prompt": "p", "image": "a.png", "target": "a.png", "extra": 3},
        {"prompt": "q", "image": ["a.png"] * 2},
    )
    first, second = read_rows(folder, "train")
    assert (
        first["images"] == [str(folder / "a.png")]
        and first["target"] == str(folder / "a.png")
        and first["extra"] == 3
    )
    assert len(second["images"]) == 2 and first["id"] != second["id"]


def test_the_released_file_names_are_read_too(folder):
    write(folder, {"prompt": "p", "image": "a.png"}, name="train_metadata.jsonl")
    assert len(read_rows(folder, "train")) == 1


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "train.jsonl:2: not JSON"),
        ("[]", "train.jsonl:2: not an object"),
        ({"image": "a.png"}, "train.jsonl:2: the row has no `prompt`"),
        ({"prompt": " ", "image": "a.png"}, "train.jsonl:2: the row has no `prompt`"),
        ({"prompt": "p"}, "train.jsonl:2: the row has no `image`"),
        ({"prompt": "p", "image": 3}, "train.jsonl:2: picture 3 is no path"),
        ({"prompt": "p", "image": "../a.png"}, "leaves the dataset folder"),
        ({"prompt": "p", "image": "/etc/passwd"}, "leaves the dataset folder"),
        ({"prompt": "p", "image": "a\0.png"}, "is no path"),
        ({"prompt": "p", "image": "b.png", "target": 3}, "picture 3 is no path"),
        ({"prompts": "p", "image": "b.png"}, "unknown key `prompts`; write `prompt`"),
        (
            {"prompt": "p", "image": "b.png", "requirment": "r"},
            "unknown key `requirment`; write `requirement`",
        ),
        ({"prompt": "p", "image": "a.png"}, "repeats the id or the content of .*train.jsonl:1"),
        (
            {"prompt": "p", "image": "b.png", "id": "train-1"},
            "repeats the id or the content of .*train.jsonl:1",
        ),
        ("[" * 100000, "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(folder, row, message):
    (folder / "link.png").symlink_to("/etc/hostname")
    write(folder, {"prompt": "p", "image": "a.png"}, row, {"prompt": "q", "image": "a.png"})
    with pytest.raises(BadInput, match=message) as error:
        read_rows(folder, "train")
    assert "\n" not in str(error.value)
    faults = []
    assert [row["prompt"] for row in read_rows(folder, "train", faults)] == ["p", "q"]
    assert len(faults) == 1 and faults[0] == str(error.value)


def test_a_line_that_is_not_utf_8_is_one_bad_row(folder):
    (folder / "train.jsonl").write_bytes(
        b'{"prompt": "\xff", "image": "a.png"}\n{"prompt": "a\xe2\x80\xa8b", "image": "a.png"}'
    )
    faults = []
    assert [row["prompt"] for row in read_rows(folder, "train", faults)] == ["a\u2028b"]
    assert len(faults) == 1 and "train.jsonl:1: not JSON" in faults[0]


def test_a_folder_without_rows_is_refused(folder):
    with pytest.raises(BadInput, match="holds neither train.jsonl"):
        read_rows(folder, "train")
    write(folder, "")
    with pytest.raises(BadInput, match="holds no rows"):
        read_rows(folder, "train")


def test_pictures_of_every_mode_come_upright_in_rgb(folder):
    def saved(image, name, **options):
        image.save(folder / name, **options)
        return load_image(folder / name)

    for mode in ("L", "P", "RGB", "1", "LA", "RGBA"):
        assert saved(Image.new(mode, (8, 4)), "x.png").mode == "RGB"
    cyan = np.asarray(saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "x.jpg", quality=95)).mean(
        (0, 1)
    )
    assert cyan[0] < 60 and cyan[1] > 150 and cyan[2] > 150
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[274] = 6
    assert saved(turned, "turned.jpg", exif=exif).size == (4, 8)


def test_sixteen_bits_are_scaled_and_not_cut(folder):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    for name in ("x.png", "x.tiff"):
        Image.fromarray(ramp).save(folder / name)
        seen = np.asarray(load_image(folder / name))[..., 0]
        assert np.abs(seen - ramp / 257).max() <= 0.5
    Image.fromarray(ramp.astype(np.float32)).save(folder / "f.tiff")
    with pytest.raises(BadInput, match="floats of no known range"):
        load_image(folder / "f.tiff")


def test_transparent_parts_are_white_and_not_what_lies_behind(folder):
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    hidden.save(folder / "x.png")
    assert load_image(folder / "x.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8))
    palette.save(folder / "p.png", transparency=0)
    assert load_image(folder / "p.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_bomb_is_refused_by_its_header_before_it_is_decoded(folder, monkeypatch):
    def chunk(kind, data):
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    def png(width, height):
        head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(bytes(99)))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")

    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("decoded"))
    monkeypatch.setattr(PngImageFile, "load", lambda *a: pytest.fail("decoded"))
    (folder / "bomb.png").write_bytes(png(9000, 9000))
    with pytest.raises(
        BadInput, match="bomb.png: not a readable picture .9000 x 9000 pixels, above"
    ):
        load_image(folder / "bomb.png")
    (folder / "bomb.png").write_bytes(png(2**30, 2**30))
    with pytest.raises(BadInput, match="bomb.png: not a readable picture"):
        load_image(folder / "bomb.png")


@pytest.mark.parametrize("content", [b"text", "cut"])
def test_a_broken_picture_among_many_is_found_and_named(folder, content, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for i in range(5):
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(
        (folder / "3.png").read_bytes()[:300] if content == "cut" else content
    )
    write(folder, *({"prompt": "p", "image": f"{i}.png"} for i in range(5)))
    write(folder, {"prompt": "p", "image": "0.png"}, name="test.jsonl")
    with pytest.raises(BadInput, match="1 faults, one a line above"):
        data_prep.main(["check", str(folder)])
    assert "3.png: not a readable picture" in capsys.readouterr().out


# ---------------------------------------------------------------- the check


def draw(path, seed, size=(96, 64), **options):
    """A picture of smooth random colours, another for every seed."""
    path.parent.mkdir(exist_ok=True, parents=True)
    rough = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(path, **options)


@pytest.mark.parametrize("name", ["pipe", "link to a pipe", ""])
def test_only_plain_files_are_opened(folder, name):
    os.mkfifo(folder / "pipe")
    (folder / "link to a pipe").symlink_to("pipe")
    with pytest.raises(BadInput, match="not a readable picture .no such file"):
        load_image(folder / name)


@pytest.mark.parametrize("error", [MemoryError, KeyError, IndexError, RuntimeError, OSError])
def test_whatever_pillow_raises_is_a_fault_of_that_picture(folder, monkeypatch, error):
    def fail(*args, **options):
        raise error("two\nlines")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BadInput, match="a.png: not a readable picture .*two.*lines") as raised:
        load_image(folder / "a.png")
    assert "\n" not in str(raised.value)
    with pytest.raises(BadInput) as other:
        data_prep._check_header(folder / "a.png")
    assert str(other.value) == str(raised.value)


BROKEN_EXIF = {
    "TypeError": ("110f", "011a0007"),
    "AttributeError": ("010f", "014d0005"),
    "struct.error": ("010f", "010a0005"),
}


@pytest.mark.parametrize("tags", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
def test_a_jpeg_with_broken_exif_is_a_fault_whatever_pillow_makes_of_it(folder, tags):
    count = "1a03" if tags[1] == "014d0005" else "0003"
    exif = f"4d4d002a00000008{count}{tags[0]}00020000000600000032011200030000000100060000"
    exif += f"{tags[1]}00000001000000380000" + "00006d616b6572000000000300000002"
    path = folder / "x.jpg"
    Image.new("RGB", (32, 32)).save(path, exif=b"Exif\0\0" + bytes.fromhex(exif))
    with pytest.raises(BadInput, match="x.jpg: not a readable picture"):
        load_image(path)
    write(folder, {"prompt": "p", "image": "x.jpg"})
    with pytest.raises(BadInput, match="1 faults"):
        data_prep.main(["check", str(folder)])


def test_links_are_followed(tmp_path):
    """A snapshot of the hub is all links; `images -> /bigdisk` is a user's own choice."""
    for name in ("blob", "disk/a.png"):
        draw(tmp_path / Path(name).with_suffix(".png"), 0)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    rows = [{"prompt": "p", "image": "b.png"}, {"prompt": "q", "image": "images/a.png"}]
    write(tmp_path, *rows)
    for split in ("train", "test"):
        (snapshot / f"{split}.jsonl").symlink_to("../train.jsonl")
    (snapshot / "b.png").symlink_to("../blob.png")
    (snapshot / "images").symlink_to(tmp_path / "disk")
    data_prep.main(["check", str(snapshot)])
    for row in load_rows(snapshot, False, ALONE)["train"]:
        assert load_image(row["images"][0]).size == (96, 64)


def test_a_row_tells_where_it_stands_and_keeps_its_order(folder):
    write(folder, "", {"z": 1, "prompt": "p", "image": "a.png", "a": 2})
    row = read_rows(folder, "train")[0]
    assert row["where"] == f"{folder}/train.jsonl:2"
    assert [key for key in row if key in "za"] == ["z", "a"]


# ---------------------------------------------------------------- the start


def small_dataset(folder, number=4):
    for i in range(number):
        draw(folder / f"{i}.png", i)
    write(folder, *({"prompt": "p", "image": f"{i}.png"} for i in range(number)))
    write(folder, {"prompt": "q", "image": "0.png", "mask": "1.png"}, name="test.jsonl")


def test_the_start_looks_at_headers_alone(tmp_path, monkeypatch):
    small_dataset(tmp_path)
    monkeypatch.setattr(PngImageFile, "load", lambda *a: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "tobytes", lambda *a: pytest.fail("hashed"))
    assert [len(rows) for rows in load_rows(tmp_path, False, ALONE).values()] == [4, 1]


@pytest.mark.parametrize("content", ["text", "small", "missing", "pipe"])
def test_a_fault_that_a_header_shows_stops_the_start_or_is_skipped(tmp_path, capsys, content):
    small_dataset(tmp_path)
    (tmp_path / "2.png").unlink()
    if content == "text":
        (tmp_path / "2.png").write_text("text")
    elif content == "small":
        Image.new("RGB", (15, 64)).save(tmp_path / "2.png")
    elif content == "pipe":
        os.mkfifo(tmp_path / "2.png")
    with pytest.raises(BadInput, match="2.png: ") as error:
        load_rows(tmp_path, False, ALONE)
    rows = load_rows(tmp_path, True, ALONE)
    assert [row["id"] for row in rows["train"]] == ["train-1", "train-2", "train-4"]
    assert f"skipped: {error.value}\n" in capsys.readouterr().err


def test_a_mask_counts_as_a_picture_of_its_row(tmp_path):
    small_dataset(tmp_path)
    (tmp_path / "1.png").write_text("text")
    with pytest.raises(BadInput, match="no faultless row is left in test"):
        load_rows(tmp_path, True, ALONE)


def test_a_missing_split_is_said_also_where_faults_are_skipped(tmp_path, capsys):
    for skip in (False, True):
        with pytest.raises(BadInput, match="holds neither train.jsonl|no faultless row"):
            load_rows(tmp_path, skip, ALONE)
    assert "holds neither train.jsonl" in capsys.readouterr().err


RANKS = """
import accelerate, data_prep
accelerator = accelerate.Accelerator(cpu=True)
rank = accelerator.process_index
look = data_prep._check_header
def header_fault(path):
    seen.append(Path(path).name)
    if case == "unreadable" and rank == 1:
        raise BadInput(f"{path}: cannot be read on this node")
    return look(path)
data_prep._check_header = header_fault
for case in ("good", "unreadable", "broken", "differ"):
    seen = []
    folder = "good"
    if case == "broken":
        folder = "broken"
    if case == "differ" and rank == 1:
        folder = "other"
    try:
        rows = load_rows(Path(sys.argv[1], folder), case != "broken", accelerator)
        said = [row["id"] for row in rows["train"]]
    except BadInput as fault:
        said = str(fault)
    print(json.dumps([seen, said]), flush=True)
    print(f"end of {case}", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{case: [(pictures looked at, ids or error, stderr) of each of two processes]}."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, number in (("good", 4), ("broken", 4), ("other", 3)):
        small_dataset(folder / name, number)
        write(folder / name, {"prompt": "q", "image": "0.png"}, name="test.jsonl")
    (folder / "broken" / "3.png").write_text("text")
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + os.getpid() % 20_000),
    }
    processes = []
    for rank in "01":
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        code = RANKS.replace("sys.argv[1]", repr(str(folder)))
        processes.append(python(code, environment=environment, stderr=subprocess.PIPE))
    found = {case: [] for case in ("good", "unreadable", "broken", "differ")}
    for process in processes:
        out, err = process.communicate(timeout=120)
        for case, line in zip(found, out.splitlines(), strict=True):
            told, err = err.split(f"end of {case}\n")
            found[case].append((*json.loads(line), told))
    return found


def test_processes_share_the_pictures(ranks):
    (seen, said, _), (other_seen, other_said, told) = ranks["good"]
    assert sorted(seen + other_seen) == ["0.png", "1.png", "2.png", "3.png"] and len(seen) == 2
    assert said == other_said == ["train-1", "train-2", "train-3", "train-4"]
    assert "pictures" not in told  # the bar is the main process's


def test_a_picture_that_one_process_cannot_read_is_dropped_by_all_and_said_by_one(ranks):
    (_, said, told), (_, other_said, other_told) = ranks["unreadable"]
    assert said == other_said == ["train-1", "train-3"]
    assert "skipped: " in told and "skipped: " not in other_told


def test_a_fault_that_one_process_finds_stops_all_with_the_same_words(ranks):
    (_, said, _), (_, other_said, _) = ranks["broken"]
    assert said == other_said and "3.png: not a readable picture" in said


def test_processes_that_hold_different_rows_stop(ranks):
    for _, said, _ in ranks["differ"]:
        assert "its rows differ between processes" in said


def faulty(folder):
    """A dataset with one fault of each kind in nine rows, the ninth being good."""
    for i in range(9):
        draw(folder / f"{i}.png", i)
    (folder / "1.png").write_bytes(b"text")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:300])
    (folder / "3.png").unlink()
    Image.new("RGB", (64, 8)).save(folder / "4.png")
    lines = [{"prompt": "p", "image": f"{i}.png"} for i in range(9)]
    lines[5]["image"], lines[6]["prompt"], lines[7]["image"] = "../x.png", "", "8.png"
    lines[8]["image"] = "8.png"
    write(folder, *lines)


def test_check_lists_all_faults_together_and_training_can_skip_them(tmp_path, capsys):
    faulty(tmp_path)
    with pytest.raises(BadInput, match="7 faults, one a line above"):
        data_prep.main(["check", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    wanted = [
        "leaves the dataset",
        "has no `prompt`",
        "repeats the id",
        "1.png: not a readable",
        "2.png: not a readable",
        "3.png: not a readable picture (no such file)",
        "4.png: not a readable picture (64 x 8 pixels, below 16)",
    ]
    assert len(said) == 7
    assert all(words in line for words, line in zip(wanted, said, strict=True))
    write(tmp_path, {"prompt": "p", "image": "0.png"}, name="test.jsonl")
    rows = data_prep.load_rows(tmp_path, True, ALONE)["train"]
    assert [Path(row["images"][0]).name for row in rows] == ["0.png", "2.png", "8.png"]


def test_check_says_when_nothing_is_wrong(tmp_path, capsys):
    for i in range(2):
        draw(tmp_path / f"{i}.png", i)
    write(tmp_path, *({"prompt": "p", "image": f"{i}.png"} for i in range(2)))
    write(tmp_path, {"prompt": "q", "image": "0.png"}, name="test.jsonl")
    data_prep.main(["check", str(tmp_path)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{tmp_path}: no faults; 3 rows in train and test, 2 pictures"


def test_check_sums_up_what_a_dataset_holds(tmp_path, capsys):
    for i in range(4):
        draw(tmp_path / f"{i}.png", i, size=(96 + 32 * i, 64))
    (tmp_path / "again.png").write_bytes((tmp_path / "0.png").read_bytes())
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 24, 64))
    mask.save(tmp_path / "mask.png")
    write(
        tmp_path,
        {"prompt": "a b c", "image": "0.png", "task": "add", "mask": "mask.png"},
        {"prompt": "a", "image": "1.png", "task": "add"},
        {"prompt": "a b", "image": ["2.png", "3.png"], "task": "remove"},
        {"prompt": "a b c d e", "image": "again.png"},
    )
    data_prep.main(["check", str(tmp_path)])
    tasks, words, sides, repeats, speed, _ = capsys.readouterr().out.splitlines()
    assert tasks == "tasks: add 2, remove 1, none 1"
    assert words == "words of a prompt: 2 in the middle, 1 to 5"
    assert sides == "longer side of a source picture: 128 in the middle, 96 to 192"
    assert repeats == "source pictures: 5, of which 1 repeat another"
    assert re.fullmatch("read [0-9]+ pictures a second and core", speed)


def test_check_compares_with_several_benchmarks(tmp_path, capsys):
    for i in range(3):
        draw(tmp_path / "data" / f"{i}.png", i)
        draw(tmp_path / f"bench{i}" / "x.png", i)
    write(tmp_path / "data", {"prompt": "p", "image": "0.png"}, {"prompt": "p", "image": "1.png"})
    benches = [str(tmp_path / f"bench{i}") for i in range(3)]
    with pytest.raises(BadInput, match="2 faults"):
        data_prep.main(["check", str(tmp_path / "data"), "--against", *benches])
    first, second = capsys.readouterr().out.splitlines()
    assert f"0.png: shows {benches[0]}/x.png of" in first
    assert f"1.png: shows {benches[1]}/x.png of" in second
    data_prep.main(["check", str(tmp_path / "data"), "--against", benches[2]])
    assert "no faults" in capsys.readouterr().out


def test_check_finds_exact_resized_and_recompressed_benchmark_pictures(tmp_path, capsys):
    data, bench = tmp_path / "data", tmp_path / "bench"
    for i in range(4):
        draw(bench / "singleturn" / f"{i}.png", i)
    original = load_image(bench / "singleturn" / "0.png")
    for i in range(10, 14):
        draw(data / f"{i}.png", i)
    original.save(data / "same.bmp")
    original.save(data / "recompressed.jpg", quality=40)
    original.resize((50, 31)).save(data / "resized.png")
    names = sorted(path.name for path in data.iterdir())
    write(data, *({"prompt": "p", "image": name} for name in names))
    with pytest.raises(BadInput, match="3 faults"):
        data_prep.main(["check", str(data), "--against", str(bench)])
    said = capsys.readouterr().out
    assert f"same.bmp: shows {bench}/singleturn/0.png of the benchmark" in said
    assert f"resized.png: shows {bench}/singleturn/0.png of" in said
    assert f"recompressed.jpg: shows {bench}/singleturn/0.png of" in said
    (data / "train.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "p", "image": f"{i}.png"}) for i in range(10, 14))
    )
    data_prep.main(["check", str(data), "--against", str(bench)])
    assert "no faults" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no pictures"):
        data_prep.main(["check", str(data), "--against", str(tmp_path / "empty")])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_pictures_inside_a_parquet_or_arrow_benchmark_are_compared_too(tmp_path, capsys, kind):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data, bench = tmp_path / "data", tmp_path / "bench"
    draw(data / "0.png", 0)
    write(data, {"prompt": "p", "image": "0.png"})
    bench.mkdir()
    table = pyarrow.table(
        {"key": ["k"], "input_image": [{"bytes": (data / "0.png").read_bytes(), "path": None}]}
    )
    if kind == "parquet":
        parquet.write_table(table, bench / "0.parquet")
    else:
        with pyarrow.ipc.new_stream(str(bench / "data-0.arrow"), table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(BadInput, match="1 fault"):
        data_prep.main(["check", str(data), "--against", str(bench)])
    assert re.search(r"0.png: shows \S*0.\w+ row 1, input_image of", capsys.readouterr().out)


def test_a_benchmarks_pictures_are_found_in_lists_and_as_bytes(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for number in range(2):
        draw(tmp_path / "data" / f"{number}.png", number)
    contents = [(tmp_path / "data" / f"{number}.png").read_bytes() for number in range(2)]
    rows = [{"prompt": f"p{number}", "image": f"{number}.png"} for number in range(2)]
    write(tmp_path / "data", *rows)
    table = pyarrow.table({"plain": [contents[0]], "listed": [[contents[1]]], "text": ["words"]})
    (tmp_path / "bench").mkdir()
    parquet.write_table(table, tmp_path / "bench" / "0.parquet")
    with pytest.raises(BadInput, match="2 faults"):
        data_prep.main(["check", str(tmp_path / "data"), "--against", str(tmp_path / "bench")])
    said = capsys.readouterr().out
    assert "row 1, plain of" in said and "row 1, listed of" in said


def test_check_wants_a_mask_of_the_size_of_its_rows_first_picture(tmp_path, capsys):
    draw(tmp_path / "a.png", 0)
    draw(tmp_path / "good.png", 1)
    draw(tmp_path / "bad.png", 2, size=(64, 96))
    write(
        tmp_path,
        {"prompt": "p", "image": "a.png", "mask": "good.png"},
        {"prompt": "q", "image": "a.png", "mask": "bad.png"},
        {"prompt": "r", "image": "a.png", "mask": "none.png"},
    )
    with pytest.raises(BadInput, match="2 faults, one a line above"):
        data_prep.main(["check", str(tmp_path)])
    missing, other = capsys.readouterr().out.splitlines()
    assert "none.png: not a readable picture (no such file)" in missing
    assert other.startswith(f"{tmp_path}/train.jsonl:2: `mask` has not the size")


def test_a_broken_table_is_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_text("text")
        with pytest.raises(BadInput, match=f"{name}: not a readable table") as error:
            list(data_prep.read_records(tmp_path))
        assert "\n" not in str(error.value)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "words, message",
    [
        (["cheque"], "cheque: say what to do"),
        (["check", "nowhere"], "nowhere: holds neither train.jsonl"),
        (["check", ".", "--gainst", "x"], "unrecognized"),
    ],
)
def test_a_wrong_command_is_one_line(words, message):
    with pytest.raises(BadInput, match=message) as error:
        data_prep.main(words)
    assert "\n" not in str(error.value)


def test_words_before_the_first_name_are_the_first_settings(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match=f"{tmp_path}: holds no toy.json"):
        data_prep.main(["toy", str(tmp_path), "--seed", "1"])


def test_a_broken_picture_of_a_benchmark_is_no_fault_of_the_dataset(tmp_path, capsys):
    draw(tmp_path / "data" / "0.png", 0)
    draw(tmp_path / "bench" / "b.png", 0)
    (tmp_path / "bench" / "a.png").write_text("text")
    write(tmp_path / "data", {"prompt": "p", "image": "0.png"})
    with pytest.raises(BadInput, match="1 faults"):
        data_prep.main(["check", str(tmp_path / "data"), "--against", str(tmp_path / "bench")])
    assert "bench/b.png of the benchmark" in capsys.readouterr().out


def test_without_a_command_it_says_which_there_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data_prep.py"])
    with pytest.raises(BadInput, match="no command: say what to do"):
        data_prep.main()


def test_a_seed_is_a_hash_of_its_key_and_nothing_else():
    assert seeded(1, "a").initial_seed() == 2461651067226055738  # on every machine
    assert (
        len({seeded(*key).initial_seed() for key in ((1, "a"), (1, "b"), (2, "a"), (1, "a", 0))})
        == 4
    )


# ---------------------------------------------------------------- pictures of results


def colours(image):
    """How many pixels of a picture have each colour."""
    return {colour: number for number, colour in image.getcolors(1 << 24)}


def test_a_grid_enlarges_small_pictures_and_shows_all_of_a_wide_one():
    red = Image.new("RGB", (32, 32), "red")
    blue = Image.new("RGB", (120, 60), "blue")
    assert colours(picture_grid([[red, None]], [["", ""]]))[255, 0, 0] == 96 * 96
    found = colours(picture_grid([[red, None], [red, blue]], [["", ""]] * 2))
    assert found[255, 0, 0] == 2 * 120 * 120 and found[0, 0, 255] == 120 * 60


def test_captions_are_written_below():
    red = Image.new("RGB", (96, 96), "red")
    plain = picture_grid([[red, red]], [["", ""]])
    told = picture_grid([[red, red]], [["a", "a caption of two lines or three " * 9]])
    assert told.size == plain.size  # what is too long is cut
    assert colours(told)[255, 0, 0] == 2 * 96 * 96
    letters = np.asarray(told).max(2) < 128
    assert letters[96:].sum() > 50
    assert picture_grid([], []).size == plain.crop((0, 0, 100, plain.height)).size


# ---------------------------------------------------------------- the toy world


def test_test_scenes_and_instructions_do_not_occur_in_training():
    for row in _toy_rows(3000, "train", 0):
        text, task = row["prompt"], row["task"]
        assert not _is_test_scene(row["source_scene"]) and not _is_test_scene(row["target_scene"])
        assert text in _texts(task, is_test=False) and text not in _texts(task, is_test=True)
    for row in _toy_rows(300, "test", 0):
        assert _is_test_scene(row["source_scene"])
        assert row["prompt"] in _texts(row["task"], is_test=True)
    for task in data_prep.TASKS:
        test, train = len(_texts(task, is_test=True)), len(_texts(task, is_test=False))
        assert test == (test + train) // 8 > 0


def test_the_five_tasks_take_equal_parts_and_every_edit_changes_the_scene():
    rows = _toy_rows(500, "train", 0)
    tasks = [row["task"] for row in rows]
    assert all(tasks.count(task) == 100 for task in data_prep.TASKS)
    assert all(row["source_scene"] != row["target_scene"] for row in rows)


def test_an_instruction_that_does_not_fit_the_scene_is_none():
    def after(background, cell, text):
        return _apply_change([background, cell, 0, 0, 0], _instructions()[text])

    red_circle = data_prep.OBJECTS.index("red circle")
    blue_circle = data_prep.OBJECTS.index("blue circle")
    text = "make the red circle blue"
    assert after(0, red_circle, text) == [0, blue_circle, 0, 0, 0]
    assert after(0, 0, text) is None
    assert after(0, red_circle, "remove the red circle at the top right") is None
    assert after(0, red_circle, "add a red circle at the top right") is None  # there is one
    assert after(0, red_circle, "change the black background to white") is None
    assert after(2, red_circle, "change the black background to white")[0] == 0


def test_the_number_of_a_background_is_not_taken_for_that_of_an_object():
    red_circle = data_prep.OBJECTS.index("red circle")
    scene = [red_circle, 0, red_circle, 0, 0]
    after = _apply_change(scene, _instructions()["replace the red circle with a blue square"])
    assert after == [red_circle, 0, data_prep.OBJECTS.index("blue square"), 0, 0]
    after = _apply_change(scene, _instructions()["change the gray background to pink"])
    assert after == [list(data_prep.BACKGROUNDS).index("pink"), 0, red_circle, 0, 0]


@pytest.fixture(scope="module")
def world():
    rows = _toy_rows(200, "test", 0)
    return rows, *scenes_of(rows)


def test_the_oracle_gives_one_to_the_target_and_nothing_to_the_untouched_source(world):
    _, sources, targets = world
    score, success = oracle_scores(_render(targets), sources, targets)
    assert score.min() > 0.99 and success.all()
    score, success = oracle_scores(_render(sources), sources, targets)
    assert score.max() < 0.01 and not success.any()


def test_an_edit_that_ruins_something_else_scores_between(world):
    _, sources, targets = world
    ruined = targets.clone()
    for scene, source, target in zip(ruined, sources, targets, strict=True):
        cell = next(i for i in range(1, 5) if source[i] == target[i])
        scene[cell] = 0 if scene[cell] else 7
    score, success = oracle_scores(_render(ruined), sources, targets)
    assert not success.any() and (score > 0.3).all() and (score < 0.95).all()


def test_a_grey_smear_is_no_success(world):
    _, sources, targets = world
    score, success = oracle_scores(0.4 * _render(targets) + 0.3, sources, targets)
    assert not success.any()


def test_a_pale_edit_that_is_nearest_to_its_target_but_not_near_is_no_success(world):
    _, sources, targets = world
    pale = 0.5 * _render(targets) + 0.5 * _render(targets).mean((2, 3), keepdim=True)
    nearest = data_prep._cell_distances(pale).argmin(2)
    is_target = (nearest == data_prep._shown_in(targets)).all(1)
    _, success = oracle_scores(pale, sources, targets)
    assert is_target.sum() > 100 and success[is_target].float().mean() < 0.5


def test_spoiled_scenes_are_mostly_wrong(world):
    _, sources, targets = world
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spoiled = _spoil(sources, targets)
    _, success = oracle_scores(_render(spoiled), sources, targets)
    assert success.float().mean() < 0.2


def test_corruptions_have_every_quality(world):
    _, sources, targets = world
    with torch.random.fork_rng():
        torch.manual_seed(0)
        edits = _graded_corruptions(sources, targets)
    score, _ = oracle_scores(edits, sources, targets)
    assert (score < 0.1).float().mean() > 0.2 and (score > 0.9).float().mean() > 0.2
    assert ((score > 0.1) & (score < 0.9)).float().mean() > 0.1


def test_no_word_is_unknown_and_the_longest_instruction_fits():
    pipe, judge = data_prep.new_editor(), data_prep.new_tokenizer()
    for text in _instructions():
        ids = pipe.tokenizer_2(text).input_ids
        # CLIP's vector of a whole text is that of the first pad
        assert len(ids) < data_prep.TEXT_TOKENS and pipe.tokenizer_2.unk_token_id not in ids
        assert len(pipe.tokenizer(text).input_ids) == len(text.split())
        assert judge.unk_token_id not in judge(text).input_ids


def test_fit_trains_vectors_matrices_and_convolutions():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 1)
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.randn(16, 1, 8, 8, generator=seeded("fit"))
    losses = []

    def loss(step):
        losses.append((model(x) - 1).square().mean())
        return losses[-1]

    data_prep._fit("test", [model], loss, 60, lr=0.05)
    assert losses[-1] < 0.1 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------- building it


def tiny(out, **changes):
    values = dict(
        out=str(out),
        vae_steps=2,
        editor_steps=2,
        judge_steps=2,
        pool=200,
        train_rows=5,
        test_rows=5,
    )
    return ToySettings(**(values | changes))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "toy"
    build_toy(tiny(folder))
    return folder


def test_both_models_load_as_from_the_hub(toy):
    from diffusers import DiffusionPipeline
    from transformers import AutoModelForImageTextToText

    assert type(DiffusionPipeline.from_pretrained(toy / "editor")).__name__ == "FluxKontextPipeline"
    assert (
        type(AutoModelForImageTextToText.from_pretrained(toy / "judge")).__name__
        == "Qwen2_5_VLForConditionalGeneration"
    )


def test_written_rows_are_scored_by_the_oracle_and_others_are_not(toy):
    rows = read_rows(toy, "test")
    for row in rows:
        assert oracle(row, load_image(row["target"])) == (pytest.approx(1, abs=0.01), True)
        assert oracle(row, load_image(row["images"][0])) == (pytest.approx(0, abs=0.01), False)
    assert oracle({"prompt": "p"}, Image.new("RGB", (32, 32))) is None


def test_two_machines_make_the_same_rows_and_another_seed_others(toy, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        data_prep.write_rows(tmp_path / name, tiny("", seed=seed))
    rows = {
        path: (path / "train.jsonl").read_text()
        for path in (toy, tmp_path / "same", tmp_path / "other")
    }
    assert rows[toy] == rows[tmp_path / "same"] != rows[tmp_path / "other"]
    picture = "pictures/train-0000-source.png"
    assert load_image(toy / picture).tobytes() == load_image(tmp_path / "same" / picture).tobytes()


def test_the_same_settings_rebuild_nothing_and_others_do(toy, monkeypatch, capsys):
    monkeypatch.setattr(data_prep, "write_rows", lambda *a: pytest.fail("built again"))
    build_toy(tiny(toy))
    with pytest.raises(pytest.fail.Exception, match="built again"):
        build_toy(tiny(toy, editor_steps=3))
    assert "built anew: editor_steps was 2 and is 3" in capsys.readouterr().out
    assert (toy / "toy.json").exists()  # what was there stays until the new one is whole


def test_a_toy_that_was_moved_or_knows_no_place_is_not_built_again(toy, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(data_prep, "write_rows", lambda *a: pytest.fail("built again"))
    shutil.copytree(toy, tmp_path / "toy")
    build_toy(tiny(tmp_path / "toy"))
    recipe = json.loads((tmp_path / "toy" / "toy.json").read_text())
    del recipe["out"]  # as toys made before have it
    (tmp_path / "toy" / "toy.json").write_text(json.dumps(recipe))
    build_toy(tiny(tmp_path / "toy"))


def made_of(folder, recipe="{}"):
    folder.mkdir()
    (folder / "toy.json").write_text(recipe)
    (folder / "hashes.json").write_text('{"toy.json": ""}')
    (folder / "mine.txt").write_text("mine")


def quick_build(monkeypatch):
    """Makes the building of a toy the writing of one file."""
    monkeypatch.setattr(data_prep, "_train_models", lambda *a: None)
    monkeypatch.setattr(data_prep, "write_rows", lambda part, _: (part / "new").touch())


@pytest.mark.parametrize("recipe", ["", '{"seed": 0, "trai', "3", "\0\0", "[" * 100_000])
def test_a_toy_json_that_is_cut_short_is_said_and_nothing_is_touched(tmp_path, monkeypatch, recipe):
    quick_build(monkeypatch)
    made_of(tmp_path / "toy", recipe)
    with pytest.raises(BadInput, match="holds no toy.json that is whole; move"):
        build_toy(tiny(tmp_path / "toy"))
    assert sorted(os.listdir(tmp_path / "toy")) == ["hashes.json", "mine.txt", "toy.json"]


def test_a_toy_of_another_recipe_with_files_of_the_user_is_moved_aside(
    tmp_path, monkeypatch, capsys
):
    quick_build(monkeypatch)
    made_of(tmp_path / "toy", json.dumps({"seed": 5}))
    build_toy(tiny(tmp_path / "toy"))
    (old,) = tmp_path.glob("toy.old-*")
    assert (old / "mine.txt").read_text() == "mine"
    assert (tmp_path / "toy" / "new").exists()
    said = capsys.readouterr()
    assert "seed was 5 and is 0" in said.out and str(old) in said.err


def test_a_toy_of_another_recipe_without_other_files_is_replaced(tmp_path, monkeypatch):
    quick_build(monkeypatch)
    for seed in (0, 1):
        build_toy(tiny(tmp_path / "toy", seed=seed))
    assert os.listdir(tmp_path) == ["toy"]


def test_a_toy_that_has_lost_a_model_is_built_anew(tmp_path, monkeypatch, capsys):
    quick_build(monkeypatch)
    build_toy(tiny(tmp_path / "toy"))
    (tmp_path / "toy" / "mine.txt").touch()
    (tmp_path / "toy" / "new").unlink()
    build_toy(tiny(tmp_path / "toy"))
    assert "toy is built anew: new is gone" in capsys.readouterr().out
    assert (tmp_path / "toy" / "new").exists()
    (old,) = tmp_path.glob("toy.old-*")
    assert (old / "mine.txt").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="holds no toy.json"):
        build_toy(tiny(tmp_path))
    with pytest.raises(BadInput, match="holds no toy.json"):
        build_toy(tiny(tmp_path / "mine.txt"))
    assert (tmp_path / "mine.txt").read_text() == "x" and os.listdir(tmp_path) == ["mine.txt"]


def test_a_toy_that_another_process_builds_is_refused(tmp_path):
    with (
        whole_folder(tmp_path / "toy") as part,
        pytest.raises(BadInput, match="another run is at work there"),
    ):
        (part / "new").touch()
        build_toy(tiny(tmp_path / "toy"))
    assert os.listdir(tmp_path) == ["toy"]


BUILD = """
import sys
sys.path.insert(0, {root!r})
from data_prep import ToySettings, build_toy
if __name__ == "__main__":
    build_toy(ToySettings(out={out!r}, pool=128, vae_steps=10**6, judge_steps=10**6))
"""


@pytest.mark.parametrize(
    "number, is_early",
    [
        (signal.SIGKILL, True),
        (signal.SIGTERM, False),
        (signal.SIGINT, False),
    ],
)
def test_no_models_process_outlives_the_one_that_builds_the_toy(tmp_path, number, is_early):
    code = BUILD.format(root=str(ROOT), out=str(tmp_path / "toy"))
    (tmp_path / "build.py").write_text(code)
    command = [sys.executable, tmp_path / "build.py"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seen = b""
    while is_early and not list(tmp_path.glob(".part-toy/whole/test.jsonl")):
        time.sleep(0.1)
    time.sleep(0.5)  # early: they have been started, and know nothing yet
    while not is_early and not (b"judge" in seen and b"autoencoder" in seen):  # at work, by bars
        seen += parent.stderr.read1()
    parent.send_signal(number)
    ended = threading.Thread(target=parent.stderr.read)  # ends when no process holds the pipe
    ended.start()
    ended.join(30)
    assert not ended.is_alive() and parent.wait(30) != 0


@pytest.mark.parametrize(
    "fault, message",
    [
        ("raise OSError(28, 'No space left')", r"toy: OSError: \[Errno 28\] No space left"),
        ("os.kill(os.getpid(), signal.SIGINT)", "toy: process 1 terminated with signal SIGINT"),
    ],
)
def test_a_model_that_cannot_be_built_ends_the_other_and_is_one_line(tmp_path, fault, message):
    faulty = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import data_prep
def train(number, folder, settings):
    if number == 0:
        time.sleep(600)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    {fault}
data_prep._train_model = train
if __name__ == "__main__":
    try:
        data_prep.build_toy(data_prep.ToySettings(out="toy", train_rows=1, test_rows=1))
    except data_prep.BadInput as error:
        print(error)
"""
    (tmp_path / "build.py").write_text(faulty)
    command = [sys.executable, "build.py"]
    done = subprocess.run(command, cwd=tmp_path, timeout=60, capture_output=True, text=True)
    assert re.search(message, done.stdout.splitlines()[-1])
    assert os.listdir(tmp_path) == ["build.py"]


def test_a_toy_that_is_too_bad_to_learn_from_is_said_in_one_line(toy, tmp_path, monkeypatch):
    import shutil

    import toy_ratings

    shutil.copytree(toy, tmp_path / "toy")
    monkeypatch.setattr(sys, "argv", ["toy_ratings.py", str(tmp_path / "toy")])
    with pytest.raises(BadInput, match="no good start for RL"):
        toy_ratings.main()
    lines = [line for _, line in read_json_lines(tmp_path / "toy" / "ratings.jsonl")]
    assert [len(line["edits"]) for line in lines] == [4] * 5
    assert (tmp_path / "toy" / lines[0]["edits"][0]).is_file()


def test_pictures_survive_being_written(world, tmp_path):
    picture = _render(world[1][:1])[0]
    to_pil(picture).save(tmp_path / "x.png")
    back = (
        torch.from_numpy(np.asarray(load_image(tmp_path / "x.png")).copy()).permute(2, 0, 1) / 255
    )
    assert (back - picture).abs().max() < 1 / 255


def test_the_toys_editor_is_the_same_at_every_build():
    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe = data_prep.new_editor()
        return (
            pipe.tokenizer.get_vocab(),
            pipe.tokenizer.backend_tokenizer.to_str(),
            pipe.transformer.state_dict(),
        )

    first, *others = [build() for _ in range(3)]
    for vocabulary, tokenizer, weights in others:
        assert (vocabulary, tokenizer) == first[:2] and all(
            torch.equal(first[2][key], weights[key]) for key in weights
        )


def test_importing_does_nothing_and_loads_neither_diffusers_nor_a_model_class(tmp_path):
    code = """
import data_prep
heavy = [name for name in sys.modules if name.startswith(("diffusers", "transformers.models."))]
print(heavy)
"""
    process = python(code, stderr=subprocess.PIPE, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "[]\n" and err == ""
    assert not list(tmp_path.iterdir())
