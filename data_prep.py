"""Rows and pictures, what every script shares, and the toy world with its two tiny models.

    python data_prep.py toy                          # builds data/toy: rows, pictures, two models
    python data_prep.py check DIR                    # lists every fault of a dataset folder
    python data_prep.py check DIR --against BENCH    # and a benchmark's pictures in it

A dataset is a folder with train.jsonl and test.jsonl (or *_metadata.jsonl) and pictures. A row is a
JSON object: `prompt`, `image` (a path in the folder, or a list of them), and optional `id`,
`requirement`, `task`, `target` (a picture of a right edit) and `mask` (a picture of the size of the
first, white where the edit may change); other keys are kept. Pictures are upright RGB PIL images;
those of the toy are also float tensors (B, 3, 32, 32) in [0, 1].

Departures from Edit-R1, paper and released code:
1. The paper's 27,572 rows are not released: any folder of rows will do, and a toy world stands in.
2. Its rows hold source and instruction; ours may have a target, a mask, a requirement of their own.
3. Draws have no state: `seeded` names each, `rows_of_epoch` counts. The released sampler of rows
   never learns which epoch it is, and draws the same ones each time.
4. Rows are checked before training, not when it comes to them.
"""

import difflib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, dataclass, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

# ---------------------------------------------------------------- errors, output, signals, seeds


class BadInput(Exception):
    """A mistake in what the user gave: one line that names the file, line or value, and the fix."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a name may hold a line break


def run_script(main: Callable[[], None]) -> None:
    """Calls a script's `main`. BadInput, or a GPU that is too small, ends it in one line, code 2.

    Where nobody reads stdout any more (`| head`) it ends without a word, code 141 as in a shell.
    """
    sys.stderr = Lasting(sys.stderr)
    try:
        try:
            main()
        finally:
            print(end="", flush=True)  # here, where a broken pipe can still be caught
    except BadInput as error:
        fail(str(error))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". GPU ")[0]
        fail(
            f"the GPU is too small ({reason}); lower --rollout_batch, --train_batch or "
            "--judge_batch, put the judge elsewhere (--judge_device or a server), or spread the "
            "base over several GPUs with --shard"
        )
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            drop_output(sys.stdout)
            sys.exit(141)
        raise  # it was not stdout


def fail(message: str) -> None:
    """Ends the program with one line on stderr and code 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # What all processes meet is told by the first one; their launcher then ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line, above all progress bars; file: None is stdout.

    Where nobody reads that any more, this and what follows goes nowhere.
    """
    file = file or sys.stdout
    try:
        tqdm.write(text, file)
        file.flush()
    except OSError:
        drop_output(file)


def say_once(text: str, file: TextIO | None = None) -> None:
    """As `say`, by the first of several processes alone: for what all of them have to tell."""
    if os.environ.get("RANK", "0") == "0":
        say(text, file)


def drop_output(file: TextIO) -> None:
    """Leads a stream nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class Lasting:
    """A stream that leads nowhere once nobody reads it any more; progress bars would raise."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except OSError:
            drop_output(self.stream)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            drop_output(self.stream)


def one_line(error: Exception) -> str:
    """What an exception says, or its name, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def catch_signals() -> threading.Event:
    """An event that SIGTERM, SIGHUP or Ctrl-C sets, so that loops and waits can end well.

    A second Ctrl-C ends the program at once. A second SIGTERM does not: launchers send it to the
    group and then to each worker. Under nohup SIGHUP stays ignored.
    """
    stop = threading.Event()

    def catch(number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        stop.set()

    signal.signal(signal.SIGTERM, catch)
    signal.signal(signal.SIGINT, catch)
    # Windows has no SIGHUP
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, catch)
    return stop


def seeded(*key) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`: draws name themselves, so they have no state.

    key: anything whose repr is stable, as in seeded(seed, "noise", epoch, group, copy).
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


# ---------------------------------------------------------------- settings

LARGEST = 2**63  # what no number of a setting reaches


def setting(
    default: Any,
    help: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Field:
    """A field of a settings dataclass: default, help, and the range of its number or numbers."""
    limits = {"at least": at_least, "above": above, "at most": at_most}
    limits = {words: limit for words, limit in limits.items() if limit is not None}
    help = help.replace("%", "%%")  # argparse fills in %(default)s
    if limits:
        help = f"{help} ({in_words(limits)})"
    options = {"help": help, "metadata": {"limits": limits}}
    if isinstance(default, list):
        return HfArg(default_factory=default.copy, **options)
    return HfArg(default=default, **options)


def in_words(limits: dict[str, float]) -> str:
    """Limits in words: at least 0 and at most 1."""
    return " and ".join(f"{words} {limit:g}" for words, limit in limits.items())


@dataclass(frozen=True)
class CheckedSettings:
    """Settings whose numbers lie in the ranges that their fields name, and whose texts are text."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value == [] and field.default_factory is not MISSING and field.default_factory():
                raise BadInput(f"--{field.name}: is empty; give at least one value")
            for part in value if isinstance(value, list) else [value]:
                if type(part) in (int, float):
                    check_range(field, part)
                elif isinstance(part, str):
                    check_text(field, part)


def check_range(field: Field, number: float) -> None:
    """BadInput for a number outside the limits of its setting, not finite, or beyond all sense."""
    limits = field.metadata.get("limits", {})
    fits = (
        abs(number) < LARGEST  # not so for nan
        and number >= limits.get("at least", -LARGEST)
        and number > limits.get("above", -LARGEST)
        and number <= limits.get("at most", LARGEST)
    )
    if not fits:
        wanted = in_words(limits) or "between -2^63 and 2^63"
        raise BadInput(f"--{field.name} {number}: give a number {wanted}")


def check_text(field: Field, text: str) -> None:
    """BadInput for a text that no file, path or message can hold: with NUL, or not utf-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"--{field.name} {text!r}: is not utf-8; write or rename it") from None
    if "\0" in text:
        raise BadInput(f"--{field.name} {text!r}: holds a NUL character; leave it out")


class SettingsParser(HfArgumentParser):
    """transformers' parser of dataclasses; a mistake is one line, and fields may carry limits."""

    def add_argument(self, *names, limits=None, **options):
        return super().add_argument(*names, **options)

    def error(self, message):
        raise BadInput(f"{message}; --help lists what there is")


def parse_settings(cls, argv: list[str] | None = None, description: str = "", **defaults):
    """The command line as an instance of the dataclass `cls`, `--name value` for each field.

    argv: None means sys.argv[1:]; defaults: in place of the dataclass's own. BadInput for a name
    that is none, or a value of another type or outside its range.
    """
    parser = SettingsParser(cls, description=description, allow_abbrev=False)
    parser.set_defaults(**defaults)
    return cls(**vars(parser.parse_args(argv)))


def changed(before: dict, now: dict, harmless: str) -> list[str]:
    """In words, which settings are not what they were; harmless: names that do not count."""
    changes = []
    for name, value in now.items():
        if before.get(name) != value and name not in harmless.split():
            changes.append(f"{name} was {before.get(name)} and is {value}")
    return changes


# ---------------------------------------------------------------- files, whole or not at all


@contextmanager
def disk_faults(path: str | Path) -> Iterator[None]:
    """Makes one BadInput of whatever a full, read-only or broken disk raises in the block."""
    try:
        yield
    except Exception as error:
        # safetensors and torch.save have errors of their own for a disk that is full
        known = re.search("I/O error|IoError|inline_container", str(error))
        if not known and not isinstance(error, OSError):
            raise
        reason = one_line(error)
        raise BadInput(
            f"{path}: cannot be written ({reason}); make room or name another place"
        ) from error


def to_disk(path: Path) -> None:
    """Waits until a file or a folder's list of files is on the disk, to outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks cannot, for a folder
            raise
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to be written; it becomes `path` when the block ends.

    An error leaves what was there, and nothing else. BadInput for one of the disk or the folder.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{path}: is no plain file; name another")
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part-{os.getpid()}-{path.name}")  # Pillow reads the ending
        try:
            yield part
            to_disk(part)
            part.replace(path)
            to_disk(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a new folder to be filled; it becomes `folder` when the block ends.

    It then also holds hashes.json, a hash of every file, by which `is_whole` knows it. A folder of
    that name is replaced if it holds nothing but what an earlier call wrote; any other is moved
    aside and said. BadInput for an error of the disk, and where another process is at it.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file; name a folder")
    if Path.cwd().is_relative_to(folder):
        raise BadInput(f"{folder}: holds the folder you work in; name another")
    room = folder.with_name(f".part-{folder.name}")  # stays after a kill
    part = room / "whole"
    if room.exists() and not (room / ".lock").is_file():
        raise BadInput(f"{room}: is in the way; move it elsewhere")
    with disk_faults(folder), locked(room):
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            yield part
            (part / "hashes.json").write_text(json.dumps(file_hashes(part), indent=1))
            for path in [part, *part.rglob("*")]:
                to_disk(path)
            move_in(part, folder)
        finally:
            shutil.rmtree(room, ignore_errors=True)


def move_in(part: Path, folder: Path) -> None:
    """Gives `part` the name `folder`; what had it goes if it was ours, else it is moved aside."""
    aside = folder
    for number in itertools.count(1):
        if not os.path.lexists(aside):
            break
        aside = folder.with_name(f"{folder.name}.old-{number}")
    if aside == folder:
        part.rename(folder)
    else:
        folder.rename(aside)
        part.rename(folder)
        if holds_only_ours(aside):
            shutil.rmtree(aside)
        else:
            print(f"{folder}: held files of others; moved to {aside}", file=sys.stderr)
    to_disk(folder.parent)


def file_hashes(folder: Path) -> dict[str, str]:
    """{relative path: sha256} of all plain files below a folder but its own hashes.json."""
    hashes = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != "hashes.json":
            hashes[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashes


def recorded_hashes(folder: Path) -> dict[str, str]:
    """What a folder's hashes.json says; nothing where it has none that can be read."""
    try:
        return parse_json_object((folder / "hashes.json").read_bytes(), "")
    except (OSError, BadInput):
        return {}


def is_whole(folder: str | Path) -> bool:
    """Whether all files of a folder are there as whole_folder wrote them; others do not matter."""
    recorded = recorded_hashes(Path(folder))
    try:
        return bool(recorded) and recorded.items() <= file_hashes(Path(folder)).items()
    except OSError:
        return False


def holds_only_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but what whole_folder wrote there, unchanged."""
    names = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            names.add(path.relative_to(folder).as_posix())
    found = file_hashes(folder)
    return names <= {"hashes.json", *found} and found.items() <= recorded_hashes(folder).items()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Within, no other process holds this folder; BadInput if one does. Ends with the process."""
    from filelock import FileLock, Timeout

    folder = Path(folder)
    lock = FileLock(folder / ".lock", blocking=False)
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise BadInput(
                f"{folder}: another run is at work there, maybe one that a killed launcher left; "
                f"end it (fuser {folder}/.lock names it), or name another folder"
            ) from None
    try:
        yield
    finally:
        lock.release()


def newest_whole(folder: Path, name: str) -> Path | None:
    """Of the folders NAME-<digits> the one with the highest number that is whole; None without any.

    Names on stderr the damaged ones that it passes over; BadInput when all of them are.
    """
    folders = numbered_folders(folder, name)
    for path in folders:
        if is_whole(path):
            return path
        say(f"{path}: damaged; going back to the one before", sys.stderr)
    if folders:
        raise BadInput(f"{folder}: every {name} is damaged; mend one, or name another folder")
    return None


def numbered_folders(folder: Path, name: str) -> list[Path]:
    """The folders NAME-<digits>, highest number first; what has another name is not ours.

    BadInput for a file with such a name: it would be in the way.
    """
    folders = []
    for path in folder.glob(f"{name}-*"):
        if re.fullmatch(rf"{name}-[0-9]+", path.name):
            folders.append(path)
    check_names(folder, [], [path.name for path in folders])
    return sorted(folders, key=number_of, reverse=True)


def number_of(folder: Path) -> int:
    """The number at the end of a folder's name."""
    return int(folder.name.split("-")[-1])


def prune_folders(newest: Path, keep: int, best: int) -> None:
    """Of the folders NAME-<digits> up to `newest`, leaves the last `keep` and the one with `best`.

    Those with higher numbers stay: they are not what `newest` follows. What a kill left goes.
    """
    name = newest.name.split("-")[0]
    last = number_of(newest)
    older = [path for path in numbered_folders(newest.parent, name) if number_of(path) <= last]
    with disk_faults(newest.parent):
        for path in older[keep:]:
            if number_of(path) != best:
                path.rename(newest.parent / f".part-{path.name}-{os.getpid()}")  # never half of it
        for path in newest.parent.glob(f".part-{name}-[0-9]*"):
            shutil.rmtree(path, ignore_errors=True)


def check_names(folder: str | Path, files: list[str], folders: list[str]) -> None:
    """BadInput where one of these is to be written in a folder and something else has its name."""
    for name in files:
        if os.path.exists(Path(folder, name)) and not os.path.isfile(Path(folder, name)):
            raise BadInput(f"{folder}/{name}: is no plain file; move it, or name another folder")
    for name in folders:
        if os.path.exists(Path(folder, name)) and not os.path.isdir(Path(folder, name)):
            raise BadInput(f"{folder}/{name}: is a file; move it, or name another folder")


# ---------------------------------------------------------------- JSON lines


def check_plain(path: str | Path, fix: str, kind: str = "file") -> None:
    """BadInput unless there is a plain file, or a link to one: a pipe or a device could hang."""
    if not os.path.exists(path):
        raise BadInput(f"{path}: no such {kind}; {fix}")
    if not os.path.isfile(path):
        raise BadInput(f"{path}: is no plain file; {fix}")


def read_json_lines(path: str | Path, faults: list | None = None) -> list[tuple[int, dict]]:
    """(line number, object) of each line of a JSON lines file; lines end at b"\\n" alone.

    utf-8 with or without BOM; empty lines are passed over. The first line that is no JSON object
    raises BadInput; with a list as `faults` it is left out and the message appended.
    """
    check_plain(path, "name another")
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error}); name another file") from None
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                objects.append((number, parse_json_object(line, f"{path}:{number}")))
        except BadInput as fault:
            if faults is None:
                raise
            faults.append(str(fault))
    return objects


def parse_json_object(line: bytes, where: str) -> dict:
    """The JSON object in a line; BadInput, naming `where` it stands, if there is none."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
        json_line(value, errors="strict")  # half of a surrogate pair could be written nowhere
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({one_line(error)}); write one object a line") from None
    if not isinstance(value, dict):
        raise BadInput(f"{where}: not an object; write one object a line")
    return value


def json_line(value: Any, errors: str = "replace") -> bytes:
    """A value as a line of a JSON lines file, in utf-8."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode(errors=errors)


def write_json_lines(path: str | Path, objects: Iterable[dict]) -> None:
    """Writes a JSON lines file anew, whole or not at all."""
    with whole_file(path) as part:
        part.write_bytes(b"".join(map(json_line, objects)))


def keep_json_lines(path: str | Path, key: str, last: int) -> None:
    """Leaves of a JSON lines file, if there is one, the objects whose `key` is a number <= last."""
    if os.path.exists(path):
        kept = []
        for _, value in read_json_lines(path, faults=[]):
            if isinstance(value.get(key), int) and value[key] <= last:
                kept.append(value)
        write_json_lines(path, kept)


def append_json_line(path: str | Path, value: dict) -> None:
    """Adds one whole line to a log, or nothing: BadInput where the disk has no room for it.

    A last line that a kill cut short is cut off first; one that lacks only its end gets it.
    """
    path = Path(path)
    if os.path.exists(path):
        check_plain(path, "name another")
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            end_last_line(file)
            size = file.seek(0, os.SEEK_END)
            line = json_line(value)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, "no space for a whole line")
            except OSError:
                file.truncate(size)
                raise


def end_last_line(file: io.FileIO) -> None:
    """Makes an open file end with a whole line of JSON."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() == b"\n":
        return
    file.seek(0)
    content = file.readall()
    start = content.rfind(b"\n") + 1
    try:
        parse_json_object(content[start:], "")
        file.write(b"\n")
    except BadInput:
        file.truncate(start)


# ---------------------------------------------------------------- several processes


PATIENCE = timedelta(hours=2)  # one process may be done so long before another


class Stopped(Exception):
    """All processes leave what they do: a signal came to one, or an error, which is the cause."""


def start_processes(out: str = "", report_to: str = "none") -> Accelerator:
    """This process's place among those that `accelerate launch` started.

    report_to: a tracker of accelerate's, which may write below `out`. BadInput where it is not
    installed, and on a CPU node whose name means itself to the others: all would wait in vain.
    """
    if report_to != "none" and not find_spec(report_to):
        raise BadInput(f"--report_to {report_to}: is not installed; pip install {report_to}")
    is_one_node = os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not (is_one_node or torch.cuda.is_available() or "GLOO_SOCKET_IFNAME" in os.environ):
        name = socket.gethostname()
        try:
            address = socket.gethostbyname(name)
        except OSError:
            address = "unknown"
        if address == "unknown" or address.startswith("127."):
            raise BadInput(
                f"this node's name {name} is {address} to itself, so other nodes cannot be told of "
                "it; set GLOO_SOCKET_IFNAME to the network interface that leads to them, on each"
            )
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=cpu,
        project_dir=out or None,
        log_with=None if report_to == "none" else report_to,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if cpu:
        torch.set_num_threads(max(1, os.cpu_count() // accelerator.num_processes))
    return accelerator


def start_trackers(
    accelerator: Accelerator, project: str, settings: dict, run: str, step: int
) -> None:
    """Starts the tracker; the same `run` is the same run there, to go on after its step `step`."""
    same_run = {"id": run, "resume": "allow"}
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": same_run,
        "trackio": {"name": run, "resume": "allow"},
        "swanlab": same_run,
    }
    shown = {name: str(value) for name, value in settings.items()}
    accelerator.init_trackers(project, shown, options)


def any_rank(accelerator: Accelerator, here: bool) -> bool:
    """Whether something is so on any of the processes: the same answer on all.

    BadInput where one of them does not answer any more.
    """
    flag = torch.tensor([float(here)], device=accelerator.device)
    try:
        return accelerator.reduce(flag, "sum").item() > 0
    except RuntimeError as error:
        raise BadInput(
            f"another process is gone ({one_line(error)[:80]} ...); see what it said, and go on "
            "with all of them"
        ) from error


@contextmanager
def together(accelerator: Accelerator, stop: threading.Event) -> Iterator[None]:
    """A piece of work that all processes do, and at whose end they look at each other.

    When a signal came to one of them, or one raised an error, all raise Stopped here, so that none
    waits for another in vain.
    """
    fault = None
    try:
        yield
    except Stopped:
        stop.set()
    except Exception as error:  # whatever it is, the others must learn of it
        fault = error
    if any_rank(accelerator, fault is not None or stop.is_set()):
        told = gather_object([repr(fault)])
        if repr(fault) in told[: accelerator.process_index]:
            fault = None  # said by one process is enough
        raise Stopped from fault


def from_main(accelerator: Accelerator, stop: threading.Event, function: Callable, *args) -> Any:
    """What a function returns in the main process, told to all of them."""
    result = None
    with together(accelerator, stop):
        if accelerator.is_main_process:
            result = function(*args)
    return gather_object([result])[0]


def heed_stop(module: torch.nn.Module, stop: threading.Event) -> None:
    """Makes each forward of a module raise Stopped once a signal came: for work in `together`."""

    def check(module, arguments):
        if stop.is_set():
            raise Stopped

    module.register_forward_pre_hook(check)


# ---------------------------------------------------------------- models without torchvision


def load_processor(kind: type, place: str | Path, **options):
    """A multimodal processor of the class `kind`; without torchvision, all of it but its videos.

    place: folder or hub id; options: as from_pretrained takes them. BadInput where its pictures
    need torchvision, too.
    """
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return kind.from_pretrained(place, **options)
    try:
        pictures = AutoImageProcessor.from_pretrained(place, **options)
        words = AutoTokenizer.from_pretrained(place, **options)
        return without_videos(kind)(pictures, words, None, chat_template=words.chat_template)
    except (ImportError, TypeError):
        raise BadInput(
            f"{place}: its processor needs torchvision; pip install torchvision"
        ) from None


def without_videos(kind: type) -> type:
    """A processor class that may lack its video part, which torchvision alone can build."""

    class PictureProcessor(kind):
        def check_argument_for_proper_class(self, name, value):
            if name != "video_processor":
                super().check_argument_for_proper_class(name, value)

    return PictureProcessor


# ---------------------------------------------------------------- pictures

MAX_PIXELS = 2**26  # a picture with more is never decoded
MIN_SIDE = 16  # pixels; a shorter side is a fault of a dataset


@contextmanager
def opened(picture: str | Path | io.IOBase) -> Iterator[Image.Image]:
    """A picture's file, opened but not decoded; all that Pillow raises in the block is BadInput."""
    name = picture
    if isinstance(picture, io.IOBase):
        name = getattr(picture, "name", "a picture")
    else:
        check_plain(picture, "correct the path in the row, or add the file", "picture")
    try:
        with Image.open(picture) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise BadInput(f"{name}: {size} pixels, above {MAX_PIXELS:,}; make it smaller")
            yield image
    except BadInput:
        raise
    except Exception as error:  # its readers let anything through that a broken file causes
        raise BadInput(
            f"{name}: not a readable picture ({one_line(error)}); replace it or remove its row"
        ) from None


def load_image(path: str | Path | io.IOBase) -> Image.Image:
    """The picture at `path`, or in a binary file, upright, in RGB; transparent parts are white.

    BadInput when it is missing, is no plain file, does not decode, or has more than MAX_PIXELS.
    """
    with opened(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise BadInput(f"{path}: holds floats of no known range; save it with 8 bits")
        if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would cut them at 255
            values = np.asarray(image).clip(0, 65535) / 257
            image = Image.fromarray(values.round().astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def check_side(path: str, image: Image.Image) -> None:
    """BadInput for a picture with a side below MIN_SIDE."""
    if min(image.size) < MIN_SIDE:
        size = f"{image.width} x {image.height}"
        raise BadInput(f"{path}: {size} pixels, below {MIN_SIDE}; replace it or remove its row")


def header_fault(path: str) -> str:
    """What a picture's header alone shows to be wrong with it; "" for nothing."""
    try:
        with opened(path) as image:
            check_side(path, image)
    except BadInput as fault:
        return str(fault)
    return ""


# ---------------------------------------------------------------- rows

SPLITS = ("train", "test")
TEXT_KEYS = ("requirement", "task", "target", "mask")  # optional
KEYS = ("prompt", "image", *TEXT_KEYS)  # what a row may hold beside its id; others are kept


def split_file(folder: Path, split: str) -> Path | None:
    """The file that holds a split's rows, if there is one."""
    for name in (f"{split}.jsonl", f"{split}_metadata.jsonl"):
        if (folder / name).is_file():
            return folder / name
    return None


def read_rows(folder: str | Path, split: str, faults: list | None = None) -> list[dict]:
    """The rows of a dataset folder's `train` or `test` split, checked, pictures not yet opened.

    A row gets `images` (the absolute paths in `image`), `id` (text) and `where` ("FILE:LINE");
    `target` and `mask` become absolute paths; all else stays. The first bad row raises BadInput,
    naming file and line; with a list as `faults` it is left out and the message appended.
    """
    folder = Path(folder).resolve()
    file = split_file(folder, split)
    if file is None:
        wanted = f"{split}.jsonl nor {split}_metadata.jsonl"
        raise BadInput(f"{folder}: holds neither {wanted}; name a dataset folder")
    rows = []
    places = {}  # of the ids and contents so far
    for number, row in read_json_lines(file, faults):
        row["where"] = f"{file}:{number}"
        try:
            check_keys(row)
            find_pictures(row, folder)
            row["id"] = str(row.get("id", f"{split}-{number}"))
            check_repeat(row, places)
            rows.append(row)
        except BadInput as fault:
            if faults is None:
                raise
            faults.append(str(fault))
    if not rows and not faults:
        raise BadInput(f"{file}: holds no rows; add some")
    return rows


def check_keys(row: dict) -> None:
    """BadInput for a row with a misspelt key, or without the texts that it must hold."""
    where = row["where"]
    for key in sorted(row.keys() - set(KEYS)):
        for meant in difflib.get_close_matches(key, KEYS, 1, 0.8):
            if meant not in row:
                raise BadInput(f"{where}: unknown key `{key}`; write `{meant}`")
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise BadInput(f"{where}: the row has no `prompt`; add the instruction or remove the row")
    if not isinstance(row.get("id", ""), (str, int)):
        raise BadInput(f"{where}: `id` is {row['id']!r}; write a text or a number")
    for key in TEXT_KEYS:
        if not isinstance(row.get(key, ""), str):
            fix = "write it in quotes or leave it out"
            raise BadInput(f"{where}: `{key}` is {row[key]!r}, not text; {fix}")


def find_pictures(row: dict, folder: Path) -> None:
    """Gives a row its `images` and makes all its paths absolute; BadInput where one leaves."""
    names = row.get("image")
    if isinstance(names, str):
        names = [names]
    is_list = isinstance(names, list) and names
    if not is_list or not all(isinstance(name, str) for name in names):
        fix = f"add a path, or a list of paths, relative to {folder}"
        raise BadInput(f"{row['where']}: the row has no `image`; {fix}")
    row["images"] = [inside(folder, name, row["where"]) for name in names]
    for key in ("target", "mask"):
        if key in row:
            row[key] = inside(folder, row[key], row["where"])


def check_repeat(row: dict, places: dict) -> None:
    """BadInput for an id or a content that an earlier row has; `places` tells where those stand."""
    content = {key: value for key, value in row.items() if key not in ("id", "where")}
    keys = {
        f"id {row['id']}": f"the id {row['id']!r} again",
        json.dumps(content, sort_keys=True): "the row again",
    }
    for key, words in keys.items():
        if key in places:
            earlier = Path(places[key]).name
            raise BadInput(f"{row['where']}: {words} that {earlier} has; remove or change one")
    places.update(dict.fromkeys(keys, row["where"]))


def inside(folder: str | Path, name: str, where: str) -> str:
    """The path of `name` in `folder`, links followed later; BadInput when its words leave it."""
    if "\0" in name:
        raise BadInput(f"{where}: picture {name!r} is no path; correct it")
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        fix = f"move or link it inside {folder}"
        raise BadInput(f"{where}: picture {name} leaves the dataset folder; {fix}")
    return str(Path(folder, name))


@contextmanager
def faults_of(row: dict, skip: bool, is_told: bool = True) -> Iterator[None]:
    """Makes a BadInput in the block one of this row; with `skip` it is told, but no error."""
    try:
        yield
    except BadInput as fault:
        fault = f"{row['where']}, row {row['id']}: {fault}"
        if not skip:
            raise BadInput(fault) from None
        if is_told:
            say(f"skipped: {fault}", sys.stderr)


def faultless(
    rows: list[dict], fault_of: Callable[[dict], str], skip: bool, is_told: bool = True
) -> list[dict]:
    """The rows of which `fault_of` says nothing; as `faults_of` for the others, if any are left."""
    kept = []
    for row in rows:
        with faults_of(row, skip, is_told):
            fault = fault_of(row)
            if fault:
                raise BadInput(fault)
            kept.append(row)
    if not kept:
        raise BadInput(f"{rows[0]['where']} and all other rows have faults; none is left")
    return kept


def row_pictures(row: dict) -> list[str]:
    """The paths of all pictures of a row: sources, target, mask."""
    return [*row["images"], *(row[key] for key in ("target", "mask") if key in row)]


def load_sources(row: dict) -> list[Image.Image]:
    """A row's source pictures; BadInput where one cannot be had, nor its target or mask."""
    pictures = [load_image(path) for path in row_pictures(row)]
    return pictures[: len(row["images"])]


def picture_paths(rows: Iterable[dict]) -> list[str]:
    """The paths of all pictures of rows, each once, sorted."""
    return sorted(set(itertools.chain.from_iterable(map(row_pictures, rows))))


def load_rows(
    folder: str | Path, skip: bool = False, accelerator: Accelerator | None = None
) -> dict[str, list[dict]]:
    """{"train": rows, "test": rows} of a dataset, by the headers of its pictures fit for training.

    The first fault raises BadInput; with `skip` faulty rows are left out, with a line on stderr for
    each fault. With an accelerate.Accelerator the processes of a node share the work, all drop the
    same rows or raise the same error, and rows that differ between them are an error.
    """
    is_main = accelerator is None or accelerator.is_main_process
    rows, faults = read_splits(folder)
    every = rows["train"] + rows["test"]
    paths = picture_paths(every)
    if accelerator is not None:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        paths = paths[rank :: int(os.environ.get("LOCAL_WORLD_SIZE", 1))]
    report = (fingerprint(every), faults | header_faults(paths, is_main))
    reports = gathered(report, accelerator)
    faults = {}  # of all processes, in the same order in each
    for _, found in reports:
        faults |= found
    if faults and not skip:
        raise BadInput(next(iter(faults.values())))
    if len(dict(reports)) > 1:
        raise BadInput(f"{folder}: its rows differ between processes; give each node the same ones")
    if is_main:
        print("".join(f"skipped: {fault}\n" for fault in faults.values()), end="", file=sys.stderr)
    for split in SPLITS:
        rows[split] = [row for row in rows[split] if faults.keys().isdisjoint(row_pictures(row))]
        if not rows[split]:
            fix = f"python data_prep.py check {folder} lists what to mend"
            raise BadInput(f"{folder}: no faultless row is left in {split}; {fix}")
    return rows


def read_splits(folder: str | Path) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """The rows of each split, pictures not opened, and {fault: fault} of what is wrong."""
    rows = {}
    faults = []
    for split in SPLITS:
        rows[split] = []
        try:
            rows[split] = read_rows(folder, split, faults)
        except BadInput as fault:
            faults.append(str(fault))
    return rows, dict(zip(faults, faults, strict=True))


def gathered(value: Any, accelerator: Accelerator | None) -> list:
    """A value of every process, in the order of their ranks."""
    if accelerator is None:
        return [value]
    return gather_object([value])


def fingerprint(rows: list[dict]) -> str:
    """A hash of what rows hold, the same wherever their folder lies."""
    kept = [[row["id"], row["prompt"], row["image"], row.get("requirement")] for row in rows]
    return hashlib.sha256(json_line(kept)).hexdigest()


def header_faults(paths: list[str], show: bool) -> dict[str, str]:
    """{path: fault} of the pictures whose headers show one; `show`: with a progress bar."""
    broken = {}
    with ThreadPoolExecutor() as pool:  # for disks in the network: they answer late
        faults = pool.map(header_fault, paths)
        bar = tqdm(faults, "pictures", len(paths), leave=False, disable=not show)
        for path, fault in zip(paths, bar, strict=True):
            if fault:
                broken[path] = fault
    return broken


def rows_of_epoch(number: int, rows: int, seed: int, epoch: int) -> Iterator[int]:
    """Indices of an epoch's `number` rows: the data shuffled anew each time it is used up.

    Without any state: the same arguments give the same indices.
    """
    for position in range(epoch * number, (epoch + 1) * number):
        turn, place = divmod(position, rows)
        yield torch.randperm(rows, generator=seeded(seed, "rows", turn))[place].item()


# ---------------------------------------------------------------- the check

NEAR = 0.05  # root mean square difference of two thumbnails below which they show one picture


@dataclass(frozen=True)
class CheckSettings(CheckedSettings):
    """What `data_prep.py check DIR` is told."""

    dataset: str = setting("", "The dataset folder; also the first word after check.")
    against: str = setting("", "A benchmark's folder: its pictures must not be in the dataset.")


@dataclass(frozen=True)
class Look:
    """What there is to see in a decoded picture; nothing if it has a fault."""

    fault: str = ""
    size: tuple[int, int] = (0, 0)  # width, height
    hash: bytes = b""  # of size and pixels
    thumbnail: np.ndarray | None = None  # (768,) float32 in [0, 1]: 16 x 16 pixels


def look_at(picture: str | Path | io.IOBase) -> Look:
    """Decodes a picture and looks at it."""
    try:
        image = load_image(picture)
        check_side(picture, image)
    except BadInput as fault:
        return Look(str(fault))
    small = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32) / 255
    content = repr(image.size).encode() + image.tobytes()
    return Look("", image.size, hashlib.blake2b(content).digest(), small.flatten())


def check_dataset(settings: CheckSettings) -> None:
    """Reads a dataset once and prints every fault on a line of its own; BadInput when there is one.

    Rows that are alike though their files differ are no fault of the data, training takes them:
    they are notes.
    """
    if not settings.dataset:
        usage = "python data_prep.py check DIR [--against BENCH]"
        raise BadInput(f"check: no dataset is named; {usage}")
    folder = Path(settings.dataset).resolve()
    splits = [split for split in SPLITS if split_file(folder, split)]
    rows = []
    faults = []
    for split in splits or SPLITS:
        rows += read_rows(folder, split, faults)
    paths = picture_paths(rows)
    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(look_at, paths), "pictures", len(paths), leave=False)
        looks = dict(zip(paths, bar, strict=True))
    faults += filter(None, (look.fault for look in looks.values()))
    broken = {path for path, look in looks.items() if look.fault}
    rows = [row for row in rows if broken.isdisjoint(row_pictures(row))]
    faults += mask_faults(rows, looks)
    if settings.against:
        faults += copies_of(looks, settings.against)
    for line in alike_rows(rows, looks) + faults:
        print(line)
    counts = f"{len(rows)} good rows in {' and '.join(splits)}, {len(looks)} pictures"
    if faults:
        raise BadInput(f"{folder}: {len(faults)} faults, one a line above; {counts}")
    if settings.against:
        counts += f"; nothing of {settings.against}"
    print(f"{folder}: no faults; {counts}")


def mask_faults(rows: list[dict], looks: dict[str, Look]) -> list[str]:
    """A line for each mask that has not the size of its row's first picture; its row is removed."""
    faults = []
    for row in list(rows):
        if "mask" in row and looks[row["mask"]].size != looks[row["images"][0]].size:
            faults.append(
                f"{row['where']}: `mask` has not the size of the row's first picture; resize it"
            )
            rows.remove(row)
    return faults


def alike_rows(rows: list[dict], looks: dict[str, Look]) -> list[str]:
    """A line for each row with the prompt and the pixels of an earlier one."""
    notes = []
    seen = {}
    for row in rows:
        content = (row["prompt"], *(looks[path].hash for path in row["images"]))
        earlier = seen.setdefault(content, row["id"])
        if earlier != row["id"]:
            notes.append(
                f"note: row {row['id']} has the prompt and the very pictures of row {earlier}"
            )
    return notes


def copies_of(looks: dict[str, Look], folder: str) -> list[str]:
    """A line for each fit picture that shows one of a benchmark's, exactly or nearly."""
    paths = [path for path, look in looks.items() if not look.fault]
    own = np.array([looks[path].thumbnail for path in paths]).reshape(-1, 768)
    found = {}
    theirs = None
    for name, picture in benchmark_pictures(folder):
        theirs = look_at(picture)
        if theirs.fault:
            continue
        distance = np.sqrt(np.square(own - theirs.thumbnail).mean(1))  # (paths,)
        for i in np.flatnonzero(distance < NEAR):
            path = paths[i]
            if looks[path].hash == theirs.hash:
                found[path] = f"an exact copy of {name}"
            else:
                found.setdefault(path, f"a near copy of {name} (difference {distance[i]:.3f})")
    if theirs is None:
        raise BadInput(f"{folder}: holds no pictures; name a benchmark's folder")
    return [f"{path}: {words}; remove its rows" for path, words in found.items()]


def benchmark_pictures(folder: str) -> Iterator[tuple[str, Path | io.BytesIO]]:
    """(name, file) of every picture in a benchmark's folder, its parquet and arrow files too."""
    known = Image.registered_extensions()
    for file in sorted(Path(folder).rglob("*")):
        if file.suffix.lower() in known:
            yield str(file.relative_to(folder)), file
    for number, row in enumerate(read_table(folder)):
        for column, value in row.items():
            if isinstance(value, dict) and value.get("bytes"):
                yield f"row {number}, {column}", io.BytesIO(value["bytes"])


def read_table(folder: str | Path) -> Iterator[dict]:
    """The rows of all parquet and arrow files below a folder, a few at a time; none without files.

    A picture is a dict with its file's `bytes`. Arrow files are streams, as `datasets` writes them.
    """
    files = [file for file in Path(folder).rglob("*") if file.suffix in (".parquet", ".arrow")]
    if not files:
        return
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadInput(f"{files[0]}: reading it needs pyarrow; pip install pyarrow") from None
    for file in sorted(files):
        try:
            if file.suffix == ".parquet":
                batches = ParquetFile(file).iter_batches(16)
            else:
                batches = pyarrow.ipc.open_stream(file)
            for batch in batches:
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            reason = one_line(error)
            raise BadInput(f"{file}: not a readable table ({reason}); get it again") from None


# ---------------------------------------------------------------- statistics


def bootstrap(
    values, groups: list, clusters: list, draws: int = 2000, seed: int = 0
) -> tuple[list[str], np.ndarray]:
    """Resamples clusters, each with all its values: the names of the T groups, means (draws, T).

    values, groups, clusters: of n entries; no value is NaN. The mean of a group that was not drawn
    is NaN. A single cluster tells nothing of the spread: all means are NaN.
    """
    names, group = np.unique(np.array(groups, str), return_inverse=True)
    known, cluster = np.unique(np.array(clusters, str), return_inverse=True)
    number = len(known)
    if number < 2:
        return names.tolist(), np.full((draws, len(names)), np.nan)
    totals = np.zeros((number, len(names)))
    np.add.at(totals, (cluster, group), values)
    counts = np.zeros((number, len(names)))
    np.add.at(counts, (cluster, group), 1)
    random_times = np.random.default_rng(seed)
    times = random_times.multinomial(number, np.full(number, 1 / number), draws)  # (draws, number)
    with np.errstate(all="ignore"):
        return names.tolist(), (times @ totals) / (times @ counts)


def paired_gain(base: list[dict], now: list[dict], key: str) -> dict[str, float]:
    """Mean of result[key] before and after, and the paired difference with its 95 % interval.

    base, now: results of the same edits in the same order, each with `row` and `key`. A pair with a
    NaN is left out and counted as missing. The interval is a bootstrap over rows.
    """
    before = np.array([result[key] for result in base], float)
    after = np.array([result[key] for result in now], float)
    gains = after - before
    kept = ~np.isnan(gains)
    rows = np.array([str(result["row"]) for result in base])[kept]
    _, draws = bootstrap(gains[kept], ["all"] * len(rows), rows)
    low, high = np.nan, np.nan
    if draws.size:
        low, high = np.nanquantile(draws, (0.025, 0.975))
    return {
        "base": np.nanmean(before),
        "now": np.nanmean(after),
        "gain": gains[kept].mean(),
        "low": low,
        "high": high,
        "missing": int((~kept).sum()),
    }


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two (n,) tensors, ties at their mean rank."""
    ranks = []
    for values in (a, b):
        _, index, counts = values.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[index])
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


# ---------------------------------------------------------------- pictures of results

GAP = 4  # pixels between the pictures of a grid
LINE = 12  # pixels from line to line of its texts
LETTER = 6  # pixels of a letter's width


def picture_grid(
    rows: list[list[Image.Image | None]],
    captions: list[list[str]] | None = None,
    title: str = "",
    cell: int = 96,
) -> Image.Image:
    """One picture out of rows of pictures (None for a gap), under `title`.

    captions: texts of the same layout, written below the pictures. Pictures smaller than `cell`
    pixels are enlarged by a whole factor without smoothing.
    """
    pictures = {}  # by (row, column)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image:
                pictures[i, j] = enlarged(image, cell)
    columns = max(map(len, rows))
    width = max(cell, *(image.width for image in pictures.values()))
    height = max(image.height for image in pictures.values())
    texts = {}  # lines, by (row, column)
    for i, row in enumerate(captions or []):
        for j, text in enumerate(row):
            texts[i, j] = wrapped(text, width)
    deepest = max(map(len, texts.values()), default=0)  # lines below a picture
    head = wrapped(title, columns * (width + GAP))

    top = GAP + LINE * len(head)
    across = width + GAP  # from column to column
    down = height + GAP + LINE * deepest + GAP  # from row to row
    sheet = Image.new("RGB", (GAP + across * columns, top + GAP + down * len(rows)), "white")
    for (i, j), image in pictures.items():
        sheet.paste(image, (GAP + across * j, top + down * i))
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP // 2), "\n".join(head), fill="black", spacing=0)
    for (i, j), lines in texts.items():
        place = (GAP + across * j, top + down * i + height + 1)
        draw.multiline_text(place, "\n".join(lines), fill="black", spacing=0)
    return sheet


def enlarged(image: Image.Image, cell: int) -> Image.Image:
    """A picture at least `cell` pixels wide or high, by a whole factor, without smoothing."""
    factor = max(1, math.ceil(cell / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def wrapped(text: str, pixels: int) -> list[str]:
    """The lines of a text in a column of that width."""
    lines = []
    for line in str(text).splitlines():
        lines += textwrap.wrap(line, pixels // LETTER)
    return lines


# ---------------------------------------------------------------- the toy world: rows and oracle

SIZE = 32  # pixels of a picture's side: 2 x 2 cells
CELL = 16  # pixels of a cell's side
COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 170, 50),
    "blue": (50, 80, 220),
    "yellow": (240, 200, 40),
    "purple": (150, 40, 190),
}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = {
    "white": (245, 245, 245),
    "gray": (140, 140, 140),
    "black": (25, 25, 25),
    "cyan": (130, 210, 220),
    "pink": (250, 180, 200),
}
CELLS = ("top left", "top right", "bottom left", "bottom right")
THINGS = [(colour, shape) for shape, colour in itertools.product(SHAPES, COLOURS)]
OBJECTS = [None, *THINGS]  # by number; 0 is an empty cell
TASKS = ("recolour", "remove", "add", "replace", "background")


class Scene(NamedTuple):
    """A picture in five numbers: its background, and the object in each cell."""

    background: int
    top_left: int
    top_right: int
    bottom_left: int
    bottom_right: int


class Change(NamedTuple):
    """What an instruction asks for: `new` in place of `old`, both objects or both backgrounds."""

    task: str
    cell: int | None  # None: wherever the old object is
    old: int
    new: int


class Example(NamedTuple):
    """An edit: the scene before, the scene after, and the instruction between them."""

    source: Scene
    target: Scene
    task: str
    text: str


@functools.cache
def cell_templates() -> Tensor:
    """Every picture a cell can show: (80, 3, 16, 16) in [0, 1], an object on a background each."""
    templates = []
    for background, thing in itertools.product(BACKGROUNDS.values(), OBJECTS):
        # drawn large, then averaged: smooth edges
        big = Image.new("RGB", (8 * CELL, 8 * CELL), background)
        if thing:
            colour, shape = thing
            draw = ImageDraw.Draw(big)
            if shape == "circle":
                draw.ellipse((20, 20, 107, 107), COLOURS[colour])
            elif shape == "square":
                draw.rectangle((16, 16, 111, 111), COLOURS[colour])
            else:
                draw.polygon([(64, 12), (116, 110), (12, 110)], COLOURS[colour])
        templates.append(to_tensor(big.resize((CELL, CELL), Image.Resampling.BOX)))
    return torch.stack(templates)


def shown_in(scenes: Tensor) -> Tensor:
    """The template that each cell of scenes shows: int (B, 5) -> (B, 4)."""
    backgrounds, cells = scenes.split((1, 4), 1)
    return backgrounds * len(OBJECTS) + cells


def render(scenes: Tensor) -> Tensor:
    """Pictures of scenes: int (B, 5) -> float (B, 3, 32, 32) in [0, 1]."""
    cells = cell_templates()[shown_in(scenes)]  # (B, 4, 3, 16, 16)
    grid = cells.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5)  # (B, 3, row, 16, column, 16)
    return grid.reshape(-1, 3, SIZE, SIZE)


def to_pil(picture: Tensor) -> Image.Image:
    """float (3, H, W) in [0, 1] -> PIL.Image."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """RGB PIL.Image -> float (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@functools.cache
def instructions() -> dict[str, Change]:
    """What each instruction that there is asks for."""
    changes = {}
    for old, (colour, shape) in enumerate(THINGS, 1):
        for new, (new_colour, new_shape) in enumerate(THINGS, 1):
            if new != old:
                text = f"replace the {colour} {shape} with a {new_colour} {new_shape}"
                changes[text] = Change("replace", None, old, new)
            if new != old and new_shape == shape:
                text = f"make the {colour} {shape} {new_colour}"
                changes[text] = Change("recolour", None, old, new)
        for cell, place in enumerate(CELLS):
            changes[f"add a {colour} {shape} at the {place}"] = Change("add", cell, 0, old)
            changes[f"remove the {colour} {shape} at the {place}"] = Change("remove", cell, old, 0)
    for (old, name), (new, new_name) in itertools.permutations(enumerate(BACKGROUNDS), 2):
        text = f"change the {name} background to {new_name}"
        changes[text] = Change("background", None, old, new)
    return changes


def texts_of(task: str) -> list[str]:
    """The instructions of one task, sorted."""
    return sorted(text for text, change in instructions().items() if change.task == task)


@functools.cache
def held_out() -> set[str]:
    """An eighth of each task's instructions, never seen in training."""
    held = set()
    for task in TASKS:
        texts = texts_of(task)
        order = torch.randperm(len(texts), generator=seeded("toy held-out instructions", task))
        held.update(texts[i] for i in order[: len(texts) // 8].tolist())
    return held


def is_test_scene(scene: Iterable[int]) -> bool:
    """An eighth of all scenes is never seen in training, neither as a source nor as a target."""
    return zlib.crc32(bytes(scene)) % 8 == 0


def apply_change(scene: Scene, change: Change) -> Scene | None:
    """The scene after a change; None where it does not apply (no such object, cell taken)."""
    if change.task == "background":
        if scene.background != change.old:
            return None
        return scene._replace(background=change.new)
    background, *cells = scene
    cell = change.cell
    if cell is None and change.old in cells:
        cell = cells.index(change.old)
    if cell is None or cells[cell] != change.old:
        return None
    if change.new and change.new in cells:
        return None
    cells[cell] = change.new
    return Scene(background, *cells)


def toy_examples(number: int, split: str, *key) -> list[Example]:
    """Seeded examples of one split; tasks take turns, the objects of a scene are distinct."""
    is_test = split == "test"
    texts = {task: texts_of(task) for task in TASKS}
    for task in TASKS:
        texts[task] = [text for text in texts[task] if (text in held_out()) == is_test]
    rng = random.Random(seeded("toy", split, *key).initial_seed())
    examples = []
    while len(examples) < number:
        task = TASKS[len(examples) % len(TASKS)]
        filled = rng.choice((1, 2, 2, 3, 3))
        cells = rng.sample(range(1, len(OBJECTS)), filled) + (4 - filled) * [0]
        rng.shuffle(cells)
        source = Scene(rng.randrange(len(BACKGROUNDS)), *cells)
        text = rng.choice(texts[task])
        target = apply_change(source, instructions()[text])
        if target is None or is_test_scene(source) != is_test:
            continue
        if is_test or not is_test_scene(target):
            examples.append(Example(source, target, task, text))
    return examples


def scenes_of(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """(source scenes, target scenes) of examples, int (n, 5) each."""
    sources = torch.tensor([example.source for example in examples])
    return sources, torch.tensor([example.target for example in examples])


@functools.cache
def object_credit() -> Tensor:
    """credit[source, target, seen] in [0, 1] of an object.

    1 for the wanted one, 0 for the old one, else 0.3 each for the wanted colour and shape.
    """
    credit = torch.zeros(len(OBJECTS), len(OBJECTS), len(OBJECTS))
    for source, target, seen in itertools.product(range(len(OBJECTS)), repeat=3):
        if seen == target:
            credit[source, target, seen] = 1
        elif seen != source and OBJECTS[target] and OBJECTS[seen]:
            alike = len(set(OBJECTS[target]) & set(OBJECTS[seen]))
            credit[source, target, seen] = 0.3 * alike
    return credit


def cell_distances(pictures: Tensor) -> Tensor:
    """Mean squared error of each cell to each of the 80 templates: (B, 3, 32, 32) -> (B, 4, 80)."""
    cells = pictures.unflatten(3, (2, CELL)).unflatten(2, (2, CELL))  # (B, 3, 2, 16, 2, 16)
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(4 * len(pictures), -1)  # (4 B, 768)
    distances = torch.cdist(cells, cell_templates().flatten(1))  # (4 B, 80)
    return (distances.square() / cells.shape[1]).unflatten(0, (-1, 4))


def oracle_scores(pictures: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Score and success by program: float (B, 3, 32, 32) in [0, 1], int (B, 5) -> float, bool (B,).

    Each cell is compared with all that a cell can show; score = (edit done) x (rest kept), each the
    mean credit of what should change and of what should not. Success: every cell is nearest to its
    target, and near it.
    """
    distance = cell_distances(pictures)  # (B, 4, 80)
    seen = (-distance / 0.001).softmax(-1).unflatten(-1, (len(BACKGROUNDS), len(OBJECTS)))
    old_ground, old_things = sources.split((1, 4), 1)
    new_ground, new_things = targets.split((1, 4), 1)
    index = new_ground.expand(-1, 4).unsqueeze(2)  # (B, 4, 1)
    ground = seen.sum(3).gather(2, index).squeeze(2)  # (B, 4) share of the right background
    credit = object_credit()[old_things, new_things]  # (B, 4, 16)
    thing = (seen.sum(2) * credit).sum(2)  # (B, 4)

    is_changed = old_things != new_things  # (B, 4)
    changed_thing = torch.where(is_changed, thing, 0.0).sum(1)
    is_background = (old_ground != new_ground).squeeze(1)  # (B,) whether that was the task
    done = torch.where(is_background, ground.sum(1) / 4, changed_thing)
    kept = torch.where(is_changed, 0.0, thing).sum(1) / (~is_changed).sum(1)
    kept_ground = torch.where(is_background[:, None], 1.0, ground).mean(1)

    wanted = shown_in(targets)  # (B, 4)
    near = distance.gather(2, wanted[..., None]).squeeze(2) < 0.015
    return done * (kept_ground * kept), ((distance.argmin(2) == wanted) & near).all(1)


def oracle(row: dict, image: Image.Image) -> tuple[float, bool] | None:
    """(score in [0, 1], success) of an edit of a toy row by program; None for any other row."""
    if "target_scene" not in row:
        return None
    picture = to_tensor(image.convert("RGB").resize((SIZE, SIZE)))[None]
    source = torch.tensor([row["source_scene"]])
    target = torch.tensor([row["target_scene"]])
    score, success = oracle_scores(picture, source, target)
    return score.item(), success.item()


# ---------------------------------------------------------------- building the toy

TOY_FILES = (
    "train.jsonl",
    "test.jsonl",
    "pictures/train-0000-source.png",
    "editor/model_index.json",
    "editor/transformer/diffusion_pytorch_model.safetensors",
    "judge/config.json",
    "judge/model.safetensors",
)


COUNT = {"at_least": 1, "at_most": 1e6}  # the range of numbers of rows and of steps


@dataclass(frozen=True)
class ToySettings(CheckedSettings):
    """What makes the toy what it is: a folder built with other values than these is built anew."""

    out: str = setting("data/toy", "The folder that holds it.")
    seed: int = setting(0, "Seed of rows, pictures and models.", at_least=0)
    train_rows: int = setting(480, "Rows of train.jsonl.", **COUNT)
    test_rows: int = setting(240, "Rows of test.jsonl: other scenes, other instructions.", **COUNT)
    pool: int = setting(
        8000, "Examples that the two models are trained on.", at_least=128, at_most=1e6
    )
    vae_steps: int = setting(360, "Training steps of the autoencoder.", **COUNT)
    editor_steps: int = setting(900, "Training steps of the editor.", **COUNT)
    wrong_share: float = setting(
        0.6, "Share of wrong targets in the last 30 % of them.", at_least=0, at_most=1
    )
    judge_steps: int = setting(700, "Training steps of the judge on graded corruptions.", **COUNT)
    check: bool = setting(True, "Stop if a model is not what the reinforcement learning needs.")


def build_toy(settings: ToySettings) -> None:
    """The toy in settings.out: rows, pictures, editor, judge. One made with the same values stays.

    BadInput where the folder holds something else, or only a part of a toy, and is left as it is.
    """
    folder = Path(settings.out)
    recipe = asdict(settings)
    del recipe["out"], recipe["check"]
    if is_built(folder, recipe):
        return
    start = time.time()
    say(f"toy: building {folder} once: rows, a tiny editor, a tiny judge; minutes on two cores")
    with whole_folder(folder) as part:
        write_rows(part, settings)
        train_models(part, settings)
        (part / "toy.json").write_text(json.dumps(recipe))
    say(f"toy: built in {(time.time() - start) / 60:.1f} min")


def is_built(folder: Path, recipe: dict) -> bool:
    """Whether a folder holds the toy of a recipe; BadInput if it holds part of one, or no toy."""
    made = folder / "toy.json"
    fix = "move the folder away, or name another with --out"
    if not made.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise BadInput(f"{folder}: is not empty and holds no toy; {fix}")
        return False
    try:
        found = parse_json_object(made.read_bytes(), str(made))
    except (OSError, BadInput):
        raise BadInput(f"{made}: is not whole; {fix}") from None
    for key, value in recipe.items():
        if found.get(key) != value:
            say(f"toy: {folder} was built with {key} {found.get(key)}, not {value}")
            return False
    for name in TOY_FILES:
        if not (folder / name).is_file():
            raise BadInput(f"{folder}: has lost {name}; {fix}")
    return True


def write_rows(folder: Path, settings: ToySettings) -> None:
    """train.jsonl and test.jsonl with source and target pictures."""
    (folder / "pictures").mkdir(parents=True)
    for split, number in (("train", settings.train_rows), ("test", settings.test_rows)):
        rows = []
        for i, example in enumerate(toy_examples(number, split, settings.seed, "rows")):
            row = {"id": f"{split}-{i:04}", "prompt": example.text}
            for key, kind in (("image", "source"), ("target", "target")):
                row[key] = f"pictures/{row['id']}-{kind}.png"
                picture = render(torch.tensor([getattr(example, kind)]))
                to_pil(picture.squeeze(0)).save(folder / row[key])
            row["task"] = example.task
            row["source_scene"] = example.source
            row["target_scene"] = example.target
            rows.append(row)
        write_json_lines(folder / f"{split}.jsonl", rows)


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    """python data_prep.py COMMAND ..."""
    command, *words = (sys.argv[1:] if argv is None else argv) or ["no command"]
    if command == "check":
        if words and not words[0].startswith("-"):
            words = ["--dataset", *words]
        about = "Lists every fault of a dataset folder."
        check_dataset(parse_settings(CheckSettings, words, about))
    elif command == "toy":
        about = "Builds the toy world and its two tiny models."
        build_toy(parse_settings(ToySettings, words, about))
    else:
        raise BadInput(
            f"{command}: say what to do: python data_prep.py toy [--out DIR], or check DIR "
            "[--against BENCH]"
        )


# ------------- how the toy's two models were grown: not needed to read the method

TEXT_TOKENS = 10  # the longest instruction has eight words and an end token
DIGITS = "012345"  # the judge's answers
# the tiny judge knows a few dozen words: it is asked with the instruction alone
TOY_JUDGE_PROMPT = "{prompt}"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def train_models(folder: Path, settings: ToySettings) -> None:
    """Trains the editor here and the judge in a process beside it, and writes both to `folder`."""
    judge = multiprocessing.get_context("spawn").Process(
        target=build_judge, args=(folder / "judge", settings)
    )
    judge.start()
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            torch.set_num_threads(1)  # one core for each of the two processes
            pipe = new_editor()
            pipe.set_progress_bar_config(disable=True)
            train_vae(pipe.vae, settings.vae_steps)
            train_editor(pipe, settings)
            pipe.save_pretrained(folder / "editor")
            judge.join()
            if judge.exitcode:
                raise BadInput("toy: the judge's training failed; its own message stands above")
            torch.set_num_threads(os.cpu_count())
            check_toy(pipe, folder / "judge", settings)
    finally:
        judge.terminate()
        torch.set_num_threads(threads)


def build_judge(folder: Path, settings: ToySettings) -> None:
    """Trains the judge on graded corruptions, in a process of its own that ends with its parent."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    tokenizer = new_judge_tokenizer()
    model = new_judge(tokenizer)
    train_judge(model, tokenizer, settings)
    save_judge(model, tokenizer, folder)


def end_with_parent() -> None:
    """Ends this process when the one that started it has ended, killed or not."""
    multiprocessing.parent_process().join()
    os._exit(1)


def check_toy(pipe, judge: Path, settings: ToySettings) -> None:
    """Prints the editor's success and the judge's rank correlation with the oracle, held out.

    BadInput where either is not what the reinforcement learning needs, if settings.check.
    """
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

    examples = []
    for example in toy_examples(settings.test_rows, "test", settings.seed, "rows"):
        examples += 4 * [example]
    edits = draw_edits(pipe, examples, settings.seed, "check")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(judge)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(judge)
    scores, successes = oracle_scores(edits, *scenes_of(examples))
    success = successes.float().mean().item()
    agreement = spearman(judge_scores(model, tokenizer, examples, edits), scores)
    say(
        f"toy: the base editor succeeds on {success:.1%} of {len(edits)} held-out edits with 6 "
        "steps (wanted 25-60 %); Spearman correlation of judge and oracle on them "
        f"{agreement:.3f} (wanted 0.75)"
    )
    if settings.check and not 0.25 <= success <= 0.60:
        raise BadInput(
            f"toy: the base editor's success {success:.1%} is not in 25-60 %; change --wrong_share"
        )
    if settings.check and agreement < 0.75:
        raise BadInput(
            f"toy: the judge's correlation {agreement:.3f} is below 0.75; raise --judge_steps"
        )


def toy_words() -> list[str]:
    """All words of the instructions, sorted."""
    return sorted(set(" ".join(instructions()).split()))


def parameters_of(*models: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of all of them."""
    return list(itertools.chain.from_iterable(model.named_parameters() for model in models))


def fit(
    name: str,
    parameters: list[tuple[str, torch.nn.Parameter]],
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float,
    position: int = 0,
) -> None:
    """Minimises loss(step): Muon for matrices and convolutions, AdamW for the rest, linear decay.

    position: the line of the progress bar, which tells the time left.
    """
    wide = []
    rest = []
    for key, parameter in parameters:
        if parameter.ndim > 1 and "embed" not in key and "shared" not in key:
            wide.append(parameter)
        else:
            rest.append(parameter)
    # views: Muon takes two dimensions
    flat = [torch.nn.Parameter(parameter.data.view(len(parameter), -1)) for parameter in wide]
    muon = torch.optim.Muon(flat, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    optimizers = [muon, torch.optim.AdamW(rest, 2e-3, weight_decay=0.0)]

    def rate(step):
        return min((step + 1) / 50, 1) * max(1 - step / steps, 0.01)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    bar = tqdm(range(steps), desc=name, position=position, mininterval=1)
    for step in bar:
        value = loss(step)
        value.backward()
        for parameter, view in zip(wide, flat, strict=True):
            view.grad = parameter.grad.view_as(view)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        for parameter in wide + rest:
            parameter.grad = None
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)


# ------------- its editor: FLUX.1-Kontext in miniature


def new_editor():
    """An untrained FluxKontextPipeline of the real classes, 1.6 M parameters."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxKontextPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_tokenizer, t5_tokenizer = new_editor_tokenizers()
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS + 2,
        eos_token_id=clip_tokenizer.eos_token_id,
        bos_token_id=clip_tokenizer.bos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    vae = AutoencoderKL(
        down_block_types=4 * ("DownEncoderBlock2D",),
        up_block_types=4 * ("UpDecoderBlock2D",),
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    text_encoder = CLIPTextModel(clip)
    text_encoder_2 = T5EncoderModel(t5)
    return FluxKontextPipeline(
        scheduler, vae, text_encoder, clip_tokenizer, text_encoder_2, t5_tokenizer, transformer
    )


def new_editor_tokenizers() -> tuple:
    """A CLIP tokenizer and a T5 one to which each word of an instruction is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer, T5TokenizerFast

    words = toy_words()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -1.0) for word in words]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    # the trainer numbers word ends in random order, which decides ties, unless they have theirs
    ends = [letter + "</w>" for letter in sorted(set("".join(words)))]
    trainer = trainers.BpeTrainer(
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>", *ends],
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    clip = CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=TEXT_TOKENS + 2)
    return clip, t5


def train_vae(vae, steps: int) -> None:
    """Reconstruction with a noisy code, then the scale and shift that make the codes standard."""

    def loss(step):
        pictures = render(random_scenes(16)) * 2 - 1
        code = vae.encode(pictures).latent_dist.mean  # (B, 16, 4, 4)
        error = vae.decode(code + 0.4 * torch.randn_like(code)).sample - pictures
        return error.abs().mean() + error.square().mean() + 1e-3 * code.square().mean()

    fit("autoencoder", parameters_of(vae), loss, steps, lr=0.02)
    with torch.no_grad():
        code = vae.encode(render(random_scenes(256)) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / code.std().item(), shift_factor=code.mean().item())


def random_scenes(number: int) -> Tensor:
    """Scenes with all four cells drawn freely, none of them a test scene: int (number, 5)."""
    backgrounds = torch.randint(len(BACKGROUNDS), (2 * number, 1))
    cells = torch.randint(len(OBJECTS), (2 * number, 4))
    scenes = torch.cat([backgrounds, cells], 1).tolist()
    return torch.tensor([scene for scene in scenes if not is_test_scene(scene)][:number])


def spoil(example: Example, rng: random.Random) -> Scene:
    """A scene that is not the one asked for.

    Nothing was done, or another change, or cells moved that should not have.
    """
    source, target = example.source, example.target
    kind = rng.random()
    if kind < 0.3:
        return source
    if kind < 0.6:
        for text in rng.sample(sorted(instructions()), 60):
            other = apply_change(source, instructions()[text])
            if other not in (None, target):
                return other
    scene = list(target if kind < 0.9 else source)
    for cell in rng.sample(range(1, 5), rng.choice((1, 1, 2))):
        scene[cell] = rng.choice((0, source[cell], target[cell], rng.randrange(len(OBJECTS))))
    if rng.random() < 0.1:
        scene[0] = rng.randrange(len(BACKGROUNDS))
    return Scene(*scene)


def train_editor(pipe, settings: ToySettings) -> None:
    """Flow matching from the source's and the instruction's side.

    The last 30 % sees wrong targets on purpose: a cleanly trained editor draws the same edit every
    time, and a group without spread teaches nothing. The wrong share makes the imperfect base that
    RL starts from.
    """
    examples = toy_examples(settings.pool, "train", settings.seed, "editor")
    rng = random.Random(settings.seed)
    wrong = torch.tensor([spoil(example, rng) for example in examples])
    scenes = torch.stack([*scenes_of(examples), wrong])  # (3, n, 5)
    codes, index = encoded(pipe, scenes)
    source_of, target_of, wrong_of = index

    texts = [example.text for example in examples]
    fixed = {"padding": "max_length", "return_tensors": "pt"}
    clip_ids = pipe.tokenizer(texts, max_length=TEXT_TOKENS + 2, **fixed).input_ids
    t5_ids = pipe.tokenizer_2(texts, max_length=TEXT_TOKENS, **fixed).input_ids
    places = pipe._prepare_latent_image_ids(1, 2, 2, "cpu", torch.float32)  # (4, 3)
    source_places = places + torch.tensor([1.0, 0.0, 0.0])  # differ in the first number
    places = torch.cat([places, source_places])

    def loss(step):
        rows = torch.randint(len(examples), (128,))
        x_0 = codes[target_of[rows]]  # (B, 4, 64)
        source = codes[source_of[rows]]  # (B, 4, 64)
        if step > 0.7 * settings.editor_steps:
            is_wrong = torch.rand(len(rows), 1, 1) < settings.wrong_share
            x_0 = torch.where(is_wrong, codes[wrong_of[rows]], x_0)
        # more noise than not: that is where the edit is decided
        t = 1 - torch.rand(len(rows), 1, 1) ** 2.5
        noise = torch.randn_like(x_0)
        x_t = (1 - t) * x_0 + t * noise
        output = pipe.transformer(
            hidden_states=torch.cat([x_t, source], 1),
            timestep=t.flatten(),
            guidance=1 + 3 * torch.rand(len(rows)),
            pooled_projections=pipe.text_encoder(clip_ids[rows]).pooler_output,
            encoder_hidden_states=pipe.text_encoder_2(t5_ids[rows]).last_hidden_state,
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            img_ids=places,
        )
        v = output.sample[:, :4]
        changes = (x_0 - source).abs().amax(-1, keepdim=True) > 0.3  # (B, 4, 1)
        weight = torch.where(changes, 5.0, 1.0)
        return (weight * (v - (noise - x_0)).square()).mean()

    parameters = parameters_of(pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    fit("editor", parameters, loss, settings.editor_steps, lr=0.02)


@torch.no_grad()
def encoded(pipe, scenes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (m, 4, 64) of all different scenes, and where those of scenes (3, n, 5) are: (3, n)."""
    unique, index = scenes.flatten(0, 1).unique(dim=0, return_inverse=True)
    codes = []
    for part in unique.split(256):
        codes.append(pipe.vae.encode(render(part) * 2 - 1).latent_dist.mean)
    codes = (torch.cat(codes) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return pipe._pack_latents(codes, len(codes), *codes.shape[1:]), index.view(3, -1)


@torch.no_grad()
def draw_edits(pipe, examples: list[Example], *key) -> Tensor:
    """One edit of each example in 6 Euler steps: float (n, 3, 32, 32) in [0, 1], in 1/255 steps."""
    pictures = []
    for first in tqdm(range(0, len(examples), 128), desc="editor's own edits", leave=False):
        part = examples[first : first + 128]
        sources, _ = scenes_of(part)
        output = pipe(
            image=render(sources),
            prompt=[example.text for example in part],
            height=SIZE,
            width=SIZE,
            max_area=SIZE * SIZE,
            _auto_resize=False,
            num_inference_steps=6,
            max_sequence_length=TEXT_TOKENS,
            guidance_scale=2.5,
            output_type="pt",
            generator=[seeded(*key, first + i) for i in range(len(part))],
        )
        pictures.append(output.images)
    return (torch.cat(pictures) * 255).round() / 255


# ------------- its judge: Qwen2.5-VL in miniature


def new_judge_tokenizer():
    """A word-level tokenizer with Qwen's special tokens, one token a digit, padding on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = "endoftext im_start im_end vision_start vision_end image_pad video_pad"
    special = [f"<|{name}|>" for name in names.split()]
    vocabulary = {word: i for i, word in enumerate([*special, *DIGITS, *toy_words()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def new_judge(tokenizer):
    """An untrained Qwen2_5_VLForConditionalGeneration of 0.5 M parameters: a cell is one token."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def number(name):
        return tokenizer.convert_tokens_to_ids(f"<|{name}|>")

    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        bos_token_id=number("endoftext"),
        eos_token_id=number("im_end"),
        pad_token_id=number("endoftext"),
        # rotary base 3: with the usual 1e6 the places of a 2 x 2 grid are nearly the same
        rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 3.0},
    )
    vision = dict(
        depth=1,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        patch_size=8,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=32,
        out_hidden_size=96,
        fullatt_block_indexes=[0],
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=number("image_pad"),
        video_token_id=number("video_pad"),
        vision_start_token_id=number("vision_start"),
        vision_end_token_id=number("vision_end"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def save_judge(model, tokenizer, folder: Path) -> None:
    """Writes the judge as one from the hub, with its image processor and its prompt."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 16 * 16, "longest_edge": 1024 * 1024},
    )
    processor.save_pretrained(folder)
    (folder / "judge_prompt.txt").write_text(TOY_JUDGE_PROMPT)


def judge_patches(pictures: Tensor) -> Tensor:
    """What the judge's image processor makes of (B, 3, 32, 32) in [0, 1]: (16 B, 384)."""
    halves = (2, 2, 8)  # cell, patch in the cell, pixel
    grid = (pictures * 2 - 1).unflatten(3, halves).unflatten(2, halves)
    grid = grid.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, row, column, sub, sub, 3, 8, 8)
    grid = grid.unsqueeze(6).expand(*grid.shape[:6], 2, 8, 8)  # as a video of two frames
    return grid.reshape(-1, 3 * 2 * 8 * 8)


def judge_inputs(model, tokenizer) -> Callable[..., dict]:
    """A function texts, sources, edits (B, 3, 32, 32) -> the model's arguments.

    Token ids, masks and places of every instruction's question are made once.
    """
    texts = sorted(instructions())
    chats = []
    for text in texts:
        content = [{"type": "text", "text": text}, {"type": "image"}, {"type": "image"}]
        chats.append([{"role": "user", "content": content}])
    written = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    # four cells, four tokens
    written = [text.replace("<|image_pad|>", 4 * "<|image_pad|>") for text in written]
    fixed = tokenizer(written, padding=True, return_tensors="pt", add_special_tokens=False)
    kind = (fixed.input_ids == model.config.image_token_id).int()
    grids = torch.tensor([[1, 4, 4]]).expand(2 * len(texts), -1)
    places, _ = model.model.get_rope_index(
        fixed.input_ids, kind, grids, attention_mask=fixed.attention_mask
    )

    def arguments(asked, sources, edits):
        rows = torch.tensor([texts.index(text) for text in asked])
        pairs = torch.stack([sources, edits], 1).flatten(0, 1)  # source, edit, source, edit ...
        return dict(
            input_ids=fixed.input_ids[rows],
            attention_mask=fixed.attention_mask[rows],
            mm_token_type_ids=kind[rows],
            position_ids=places[:, rows],
            pixel_values=judge_patches(pairs),
            use_cache=False,
            image_grid_thw=grids[:1].expand(len(pairs), -1),
        )

    return arguments


def graded_corruptions(examples: list[Example], *key) -> Tensor:
    """Edits of every quality: float (n, 3, 32, 32); a third right, the rest spoiled, many worn."""
    rng = random.Random(repr(key))
    seen = []
    for example in examples:
        is_right = rng.random() < 0.33
        seen.append(example.target if is_right else spoil(example, rng))
    others = [rng.choice((example.source, example.target)) for example in examples]
    pictures = render(torch.tensor(seen))
    return worn(pictures, render(torch.tensor(others)), seeded("corruptions", *key))


def worn(pictures: Tensor, others: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures as an imperfect editor leaves them: blended with `others`, blur, noise, tint."""

    def share(*shape):
        return torch.rand(len(pictures), *shape, generator=rng)

    amount = 0.7 * share(4)  # (B, 4) how much of the other picture
    chosen = share(4) < 0.25
    chosen = chosen & (share(1) < 0.6)
    amount = torch.where(chosen, amount, 0.0).view(-1, 1, 2, 1, 2, 1)
    cells = amount.expand(-1, 1, 2, CELL, 2, CELL).reshape(-1, 1, SIZE, SIZE)
    pictures = torch.lerp(pictures, others, cells)

    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = share(1, 1, 1)
    amount = torch.where(share(1, 1, 1) < 0.5, amount, 0.0)
    pictures = torch.lerp(pictures, blurred, amount)

    pictures = pictures + 0.06 * share(1, 1, 1) * torch.randn(pictures.shape, generator=rng)
    tint = 0.05 * torch.randn(len(pictures), 3, 1, 1, generator=rng)
    tint = torch.where(share(1, 1, 1) < 0.5, tint, 0.0)
    return (pictures + tint).clamp(0, 1)


def train_judge(model, tokenizer, settings: ToySettings) -> None:
    """Teaches the judge the oracle's score as digits, on graded corruptions.

    The answer alone is too little signal for a tiny model: side heads, discarded later, ask each
    picture token what its cell should become (source) and what it shows, should show, and whether
    that is right (edit).
    """
    pool = toy_examples(settings.pool, "train", settings.seed, "judge")
    arguments = judge_inputs(model, tokenizer)
    width = model.config.text_config.hidden_size
    kinds = len(cell_templates())
    heads = torch.nn.ModuleDict()
    for name, size in (("wanted", kinds), ("seen", kinds), ("copied", kinds), ("right", 2)):
        heads[name] = torch.nn.Linear(width, size)
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list(DIGITS)))

    def loss(step):
        examples = random.Random(f"{settings.seed} {step}").sample(pool, 128)
        edits = graded_corruptions(examples, settings.seed, step)
        sources, targets = scenes_of(examples)
        texts = [example.text for example in examples]
        inputs = arguments(texts, render(sources), edits)
        output = model.model(**inputs, output_hidden_states=True)
        logits = model.lm_head(output.last_hidden_state[:, -1])
        log_p = logits.log_softmax(-1)[:, digits]  # (B, 6)
        scores, _ = oracle_scores(edits, sources, targets)
        # a score between two digits has both for an answer
        shares = (1 - (5 * scores[:, None] - torch.arange(6)).abs()).clamp(min=0)
        answer = -(log_p * shares).sum(1).mean()

        is_picture = inputs["mm_token_type_ids"].bool()

        def cells_at(layer):
            hidden = model.model.language_model.norm(output.hidden_states[layer])
            return hidden[is_picture].view(-1, 8, width).chunk(2, 1)  # (B, 4, width) each

        early_source, early_edit = cells_at(2)
        _, late_edit = cells_at(3)
        seen = cell_distances(edits).argmin(2)  # (B, 4)
        wanted = shown_in(targets)  # (B, 4)
        right_ground = seen // len(OBJECTS) == wanted // len(OBJECTS)
        right_thing = seen % len(OBJECTS) == wanted % len(OBJECTS)
        right = torch.stack([right_ground, right_thing], 2).float()
        return (
            answer
            + F.cross_entropy(heads["wanted"](early_source).flatten(0, 1), wanted.flatten())
            + F.cross_entropy(heads["seen"](early_edit).flatten(0, 1), seen.flatten())
            + F.cross_entropy(heads["copied"](late_edit).flatten(0, 1), wanted.flatten())
            + F.binary_cross_entropy_with_logits(heads["right"](late_edit), right)
        )

    fit("judge ", parameters_of(model, heads), loss, settings.judge_steps, lr=0.01, position=1)


@torch.no_grad()
def judge_scores(model, tokenizer, examples: list[Example], edits: Tensor) -> Tensor:
    """The judge's expected score in [0, 1] of each edit, (n,), as reward_mllm.py reads it."""
    arguments = judge_inputs(model, tokenizer)
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list(DIGITS)))
    scores = []
    for first in range(0, len(edits), 256):
        part = examples[first : first + 256]
        sources, _ = scenes_of(part)
        texts = [example.text for example in part]
        inputs = arguments(texts, render(sources), edits[first : first + 256])
        logits = model(**inputs, logits_to_keep=1).logits[:, -1, digits]
        scores.append(logits.softmax(-1) @ torch.arange(6.0) / 5)
    return torch.cat(scores)


if __name__ == "__main__":
    run_script(main)
