"""Rows and pictures, what every script shares, and the toy world with its two tiny models.

    python data_prep.py toy                          # builds data/toy: rows, pictures, two models
    python data_prep.py check DIR                    # lists every fault of a dataset folder
    python data_prep.py check DIR --against BENCH    # and a benchmark's pictures in it
    python data_prep.py import SRC DIR --prompt COLUMN --image COLUMN    # a dataset of a table

A dataset is a folder with train.jsonl and test.jsonl (or *_metadata.jsonl) and pictures. A row is a
JSON object: `prompt`, `image` (a path in the folder, or a list of them), and optional `id`,
`requirement`, `task`, `target` (a picture of a right edit) and `mask` (a picture of the size of the
first, white where the edit may change); other keys are kept. Pictures are upright RGB PIL images;
those of the toy are also float tensors (B, 3, 32, 32) in [0, 1].

Departures from Edit-R1, paper and released code:
1. The paper's 27,572 rows are not released: any folder of rows will do, and a toy world stands in.
2. Its rows hold source and instruction; ours may have a target, a mask, a requirement of their own.
3. Random draws keep no state: each is seeded by its own key (`seeded`, `rows_of_epoch`). The
   released sampler of rows is never told the epoch, so it draws the same rows every time.
4. Rows are checked before training, not when it comes to them.
"""

import csv
import difflib
import functools
import hashlib
import io
import itertools
import json
import operator
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import zlib
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.multiprocessing import (
    ProcessExitedException,
    ProcessRaisedException,
    parent_process,
    spawn,
)
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

AnyPath = str | Path  # of a file or a folder

# ---------------------------------------------------------------- errors, output, signals, seeds


class BadInput(Exception):
    """A mistake in what the user gave: one line that names the file, line or value, and the fix."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a name may hold a line break


class DiskFault(BadInput):
    """What cannot be written: no fault of the input."""


def run_script(main: Callable):
    """Calls a script's `main`; BadInput, Ctrl-C or a GPU too small end it in one line, code 2.

    What it prints goes nowhere once nobody reads it any more (`| head`): its work goes on.
    """
    _make_lasting(sys.stdout)
    _make_lasting(sys.stderr)
    try:
        main()
        return
    except BadInput as error:
        message = error
    except KeyboardInterrupt:
        message = "stopped"
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". GPU ")[0]  # without the memory's statistics
        message = (
            f"the GPU is too small ({reason}); lower --rollout_batch, --train_batch or "
            "--judge_batch, put the judge elsewhere (--judge_device or a server), or spread the "
            "base over several GPUs with --shard"
        )
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # An error that all processes share is printed by the first. When that one exits, the
        # launcher sends the others SIGTERM, which must end them again: catch_signals changed that.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    say(f"error: {message}", sys.stderr)
    sys.exit(2)


def _make_lasting(stream):
    """Makes a stream lead nowhere once nobody reads it any more, instead of raising."""
    write = stream.write

    def write_or_drop(text):
        try:
            write(text)
            stream.flush()
        except OSError:
            # in place of its file: what the stream still holds goes there, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    stream.write = write_or_drop


say = (
    tqdm.write
)  # say(text, file): prints a line above all progress bars; file is stdout, if not given


def say_once(text: str, file=None):
    """As `say`, by the first of several processes alone: for what all of them have to tell."""
    if os.environ.get("RANK", "0") == "0":
        say(text, file)


def one_line(error: Exception) -> str:
    """What an exception says, or its name, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def as_list(value) -> list:
    """A list itself, and anything else as the one thing in a list."""
    return value if isinstance(value, list) else [value]


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
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, catch)  # which Windows does not have
    return stop


def seeded(*key) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`: draws name themselves, so they have no state.

    key: anything whose repr is stable, as in seeded(seed, "noise", epoch, group, copy).
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).hexdigest()
    return torch.Generator().manual_seed(int(digest, 16) >> 1)  # torch takes 63 bits


# ---------------------------------------------------------------- settings

LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}
LARGEST = 2**63 - 1  # bound on the size of every number in a setting, on both sides of 0


def setting(default, help: str, **limits: float) -> Field:
    """A field of a settings dataclass: default, help, and the LIMITS of its number or numbers."""
    if limits:
        words = " and ".join(f"{name} {limit:g}" for name, limit in limits.items())
        help += f" ({words.replace('_', ' ')})"
    # argparse fills in %(default)s
    options = {"help": help.replace("%", "%%"), "metadata": {"limits": limits}}
    if isinstance(default, list):
        return HfArg(default_factory=default.copy, **options)
    return HfArg(default=default, **options)


@dataclass(frozen=True)
class CheckedSettings:
    """Settings whose numbers lie within their fields' limits, and whose texts are valid utf-8."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            # a list may be empty where its default is
            if value == [] and field.default_factory():
                raise BadInput(f"--{field.name}: is empty; give at least one value")
            for part in as_list(value):
                _check_value(field, part)


def _check_value(field, value):
    """BadInput for a number outside its limits or beyond all sense, or for a text that is none."""
    # NUL, and the lone surrogates by which Python stands for bytes that are no utf-8
    if re.search(r"[\0\ud800-\udfff]", str(value)):
        raise BadInput(f"--{field.name} {value!r}: holds NUL, or is not utf-8; write or rename it")
    if type(value) in (int, float):
        limits = {"at_least": -LARGEST, "at_most": LARGEST} | field.metadata["limits"]
        for name, limit in limits.items():
            if not LIMITS[name](value, limit):  # nan fails every comparison
                wanted = f"{name} {limit:g}".replace("_", " ")
                raise BadInput(f"--{field.name} {value}: give a number {wanted}")


class SettingsParser(HfArgumentParser):
    """transformers' parser of dataclasses; a mistake is one line, and fields may carry limits."""

    def add_argument(self, *names, limits=None, **options):
        # the metadata of a field come here as options; argparse knows no limits
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
    return [
        f"{name} was {before.get(name)} and is {value}"
        for name, value in now.items()
        if value != before.get(name) and name not in harmless.split()
    ]


# ---------------------------------------------------------------- files, whole or not at all


@contextmanager
def disk_faults(path: AnyPath) -> Iterator[None]:
    """Makes one DiskFault of whatever a full, read-only or broken disk raises in the block."""
    try:
        yield
    except Exception as error:
        # safetensors and torch.save have errors of their own for a disk that is full
        known = re.search("I/O error|IoError|inline_container", str(error))
        if not known and not isinstance(error, OSError):
            raise
        raise DiskFault(
            f"{path}: cannot be written ({one_line(error)}); make room or name another place"
        ) from error


def _to_disk(path):
    """Waits until a file, or a folder's list of files, is on the disk, to outlast a power cut."""
    is_file = path.is_file()
    try:
        handle = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        # of a folder some network disks and Windows cannot do it, and nothing is lost
        if is_file:
            raise


@contextmanager
def whole_file(path: AnyPath) -> Iterator[Path]:
    """Yields a path beside `path` to be written; it becomes `path` when the block ends.

    On an error `path` stays as it was. BadInput for a fault of the disk or a folder of that name.
    """
    path = Path(path)
    check_names(Path.is_file, path)
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # named by thread, so that writers do not collide; Pillow reads the ending
        part = path.with_name(f".part-{threading.get_native_id()}-{path.name}")
        try:
            yield part
            _to_disk(part)
            part.replace(path)
            _to_disk(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: AnyPath) -> Iterator[Path]:
    """Yields a new folder to be filled; it becomes `folder` when the block ends.

    It then also holds hashes.json, by which `is_whole` knows it. An older folder of that name is
    removed if it is exactly what an earlier call wrote, else it is renamed, with a message.
    BadInput for an error of the disk, and where another process is writing it.
    """
    folder = Path(folder).resolve()
    room = folder.with_name(f".part-{folder.name}")  # after a kill the next call clears it
    part = room / "whole"
    old = room / "old"  # goes with the room
    check_names(Path.is_dir, folder)
    check_names(lambda path: (path / ".lock").is_file(), room)
    with disk_faults(folder), locked(room):
        try:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            part.mkdir()
            yield part
            write_json(part / "hashes.json", file_hashes(part))
            for path in [part, *part.rglob("*")]:
                _to_disk(path)
            if folder.exists():
                if any(folder.iterdir()) and not is_whole(folder, alone=True):
                    old = folder.with_name(f"{folder.name}.old-{time.time_ns()}")
                    say(f"{folder}: held files of others; they are in {old}", sys.stderr)
                folder.rename(old)
            part.rename(folder)
            _to_disk(folder.parent)
        finally:
            shutil.rmtree(room, ignore_errors=True)


def file_hashes(folder: Path) -> dict:
    """{relative path: sha256} of all below a folder but its own hashes.json."""
    hashes = {}
    for path in folder.rglob("*"):
        # a folder or a link to nowhere counts as well: it may be the user's
        content = path.read_bytes() if path.is_file() else b""
        hashes[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    hashes.pop("hashes.json", None)
    return hashes


def is_whole(folder: Path, alone: bool = False) -> bool:
    """Whether all files of a folder are there as whole_folder wrote them; alone: and no others."""
    try:
        recorded = read_json(folder / "hashes.json").items()
        found = file_hashes(folder).items()
    except (OSError, BadInput):
        return False
    return recorded == found if alone else recorded <= found


@contextmanager
def locked(folder: AnyPath, is_needed: bool = True) -> Iterator[None]:
    """Within, no other process holds this folder; BadInput if one does. Ends with the process.

    is_needed: False does nothing, as in all but one of several processes.
    """
    if not is_needed:
        yield
        return
    with disk_faults(folder):
        try:  # which makes the folder, too
            held = FileLock(Path(folder, ".lock"), blocking=False).acquire()
        except Timeout:
            raise BadInput(
                f"{folder}: another run is at work there, maybe one that a killed launcher left; "
                f"end it (fuser {folder}/.lock names it), or name another folder"
            ) from None
    with held:
        yield


def newest_checkpoint(folder: Path) -> Path | None:
    """Of the checkpoints in a folder the newest one that is whole; None without any.

    Names on stderr the damaged ones that it passes over; BadInput when all of them are.
    """
    folders = checkpoints_in(folder)
    for path in folders:
        if is_whole(path):
            return path
        say(f"{path}: damaged; going back to the one before", sys.stderr)
    if folders:
        raise BadInput(f"{folder}: every checkpoint is damaged; mend one, or name another folder")
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders checkpoint-<digits>, highest number first; other names are not ours.

    BadInput for a file with such a name: it would be in the way.
    """
    names = folder.glob("checkpoint-*")
    found = [path for path in names if path.name.removeprefix("checkpoint-").isdecimal()]
    check_names(Path.is_dir, *found)
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def prune_checkpoints(newest: Path, keep: int, best: int):
    """Of the checkpoints up to `newest`, leaves the last `keep` and the one with the number `best`.

    Those with higher numbers stay, as do other files; half-written ones of a kill are removed.
    """
    folders = checkpoints_in(newest.parent)
    older = folders[folders.index(newest) :][keep:]
    for path in [*older, *newest.parent.glob(".part-checkpoint-*")]:
        if path.name != f"checkpoint-{best}":
            shutil.rmtree(path, ignore_errors=True)  # if cut short, is_whole rejects the rest


def check_names(is_ours: Callable, *paths: Path):
    """BadInput where something else has the name of what is to be written.

    is_ours: Path.is_file for what is to be a file, Path.is_dir for a folder.
    """
    for path in paths:
        if os.path.exists(path) and not is_ours(path):
            raise BadInput(f"{path}: something else is in the way; move it, or name another")


# ---------------------------------------------------------------- JSON lines


@contextmanager
def _noted(faults):
    """Appends a BadInput of the block to the list `faults`; without a list it is raised."""
    try:
        yield
    except BadInput as fault:
        if faults is None or isinstance(fault, DiskFault):  # a full disk is no fault of a row
            raise
        faults.append(str(fault))


def read_plain(path: AnyPath, fix: str) -> bytes:
    """The content of a plain file; BadInput where there is none or it cannot be read."""
    if not os.path.isfile(path):  # a pipe or a device could hang
        raise BadInput(f"{path}: no such file; {fix}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error}); {fix}") from None


def read_json_lines(path: AnyPath, faults: list | None = None) -> list[tuple]:
    """(line number, object) of each line of a JSON lines file; lines end at b"\\n" alone.

    utf-8 with or without BOM; empty lines are passed over. The first line that is no JSON object
    raises BadInput; with a list as `faults` it is left out and the message appended.
    """
    lines = read_plain(path, "name another").split(b"\n")
    objects = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with _noted(faults):
                objects.append((number, parse_json_object(line, f"{path}:{number}")))
    return objects


def parse_json_object(line: bytes, where: str) -> dict:
    """The JSON object in a line; BadInput, naming `where` it stands, if there is none."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
        _json_line(value, errors="strict")  # half of a surrogate pair could be written nowhere
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({one_line(error)}); write one object a line") from None
    if not isinstance(value, dict):
        raise BadInput(f"{where}: not an object; write one object a line")
    return value


def _json_line(value, errors="replace"):
    """A value as a line of a JSON lines file, in utf-8."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode(errors=errors)


def write_json(path: AnyPath, value):
    """Writes a JSON file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=1))


def read_json(path: AnyPath) -> dict:
    """The object in a JSON file."""
    return parse_json_object(Path(path).read_bytes(), str(path))


def write_json_lines(path: AnyPath, objects: list[dict]):
    """Writes a JSON lines file anew, whole or not at all."""
    with whole_file(path) as part:
        part.write_bytes(b"".join(map(_json_line, objects)))


def keep_epochs(log: Path, last: int):
    """Leaves of a log, if there is one, the whole lines whose `epoch` is at most `last`."""
    if log.exists():
        lines = read_json_lines(log, faults=[])
        kept = [value for _, value in lines if value.get("epoch") in range(last + 1)]
        write_json_lines(log, kept)


def append_json_line(path: Path, value: dict):
    """Adds one whole line to a log, or nothing: BadInput where the disk has no room for it.

    A last line without its end, as a kill leaves it, is cut off first.
    """
    line = _json_line(value)
    with disk_faults(path), open(path, "ab+", buffering=0) as file:
        size = file.tell()
        file.seek(max(size - 1, 0))
        if file.read() not in (b"", b"\n"):  # the last byte
            file.seek(0)
            size = file.truncate(file.read().rfind(b"\n") + 1)
        if file.write(line) < len(line):  # a full disk took a part
            file.truncate(size)
            raise OSError("no space for a whole line")


# ---------------------------------------------------------------- several processes


class Stopped(Exception):
    """All processes leave what they do: a signal came to one, or an error, which is the cause."""


def start_processes(out: str = "", report_to: str = "none") -> Accelerator:
    """This process's place among those that `accelerate launch` started.

    report_to: a tracker of accelerate's, which may write below `out`. BadInput where it is not
    installed, and on several CPU nodes without a named interface: they could wait in vain.
    """
    if report_to != "none" and not find_spec(report_to):
        raise BadInput(f"--report_to {report_to}: is not installed; pip install {report_to}")
    cpu = not torch.cuda.is_available()
    is_one_node = os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")
    if cpu and not is_one_node and "GLOO_SOCKET_IFNAME" not in os.environ:
        raise BadInput(
            "several CPU nodes: set GLOO_SOCKET_IFNAME to the network interface that leads to the "
            "others, on each; a node's own name often means itself alone"
        )
    accelerator = Accelerator(
        cpu=cpu,
        project_dir=out,
        log_with=None if report_to == "none" else report_to,
        # one process may be done so long before another
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if cpu:
        torch.set_num_threads(max(1, os.cpu_count() // accelerator.num_processes))
    return accelerator


def start_trackers(accelerator: Accelerator, settings: dict, run: str, step: int):
    """Starts the tracker; the same `run` is the same run there, to go on after its step `step`."""
    same_run = {"id": run, "resume": "allow"}
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": same_run,
        "trackio": {"name": run, "resume": "allow"},
        "swanlab": same_run,
    }
    shown = {name: str(value) for name, value in settings.items()}
    accelerator.init_trackers("edit-nft", shown, options)


@contextmanager
def together(accelerator: Accelerator, stop: threading.Event) -> Iterator[None]:
    """A piece of work that all processes do, and at whose end they look at each other.

    When a signal came to one of them, or one raised an error, all raise Stopped here, so that none
    waits for another in vain. BadInput where one of them does not answer any more.
    """
    fault = None
    try:
        yield
    except Stopped:
        stop.set()
    except Exception as error:  # whatever it is, the others must learn of it
        fault = error
    if fault or stop.is_set():
        accelerator.set_trigger()
    try:
        is_over = accelerator.check_trigger()  # in any process
    except RuntimeError as error:
        raise BadInput(
            f"another process is gone ({one_line(error)[:80]} ...); see what it said, and go on "
            "with all of them"
        ) from error
    if is_over:
        told = gather_object([repr(fault)])
        if repr(fault) in told[: accelerator.process_index]:
            fault = None  # a process before this one says the same
        raise Stopped from fault


def from_main(accelerator: Accelerator, stop: threading.Event, function: Callable, *args):
    """What a function returns in the main process, told to all of them."""
    with together(accelerator, stop):
        result = function(*args) if accelerator.is_main_process else None
    return gather_object([result])[0]


def heed_stop(module: torch.nn.Module, stop: threading.Event):
    """Makes each forward of a module raise Stopped once a signal came: for work in `together`."""

    def check(module, arguments):
        if stop.is_set():
            raise Stopped

    module.register_forward_pre_hook(check)


# ---------------------------------------------------------------- models without torchvision


def load_processor(kind: type, place: AnyPath, **options):
    """A multimodal processor of the class `kind`; without torchvision, all of it but its videos.

    place: folder or hub id; options: as from_pretrained takes them. BadInput where its pictures
    need torchvision, too.
    """

    class PictureProcessor(kind):
        # what from_pretrained loads and __init__ takes
        @classmethod
        def get_attributes(cls):
            return [part for part in super().get_attributes() if part != "video_processor"]

    if not find_spec("torchvision"):
        kind = PictureProcessor
    try:
        return kind.from_pretrained(place, **options)
    except ImportError:
        raise BadInput(
            f"{place}: its processor needs torchvision; pip install torchvision"
        ) from None


# ---------------------------------------------------------------- pictures

MAX_PIXELS = 2**26  # a picture with more is never decoded
MIN_SIDE = 16  # pixels; a shorter side is a fault of a dataset


@contextmanager
def _opened(picture):
    """A picture's file, opened but not decoded; all that is raised in the block is BadInput."""
    try:
        # a pipe or a device could hang
        if not isinstance(picture, io.IOBase) and not os.path.isfile(picture):
            raise ValueError("no such file")
        with Image.open(picture) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, above {MAX_PIXELS:,}")
            yield image
    except Exception as error:  # Pillow lets anything through that a broken file causes
        raise BadInput(
            f"{picture}: not a readable picture ({one_line(error)}); "
            "correct the path, replace it or remove its row"
        ) from None


def load_image(path: AnyPath | io.IOBase) -> Image.Image:
    """The picture at `path`, or in a binary file, upright, in RGB; transparent parts are white.

    BadInput when it is missing, is no plain file, does not decode, or has more than MAX_PIXELS.
    """
    with _opened(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("holds floats of no known range; save it with 8 bits")
        if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would cut them at 255
            image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def _check_header(path):
    """A picture's format; BadInput where the header alone shows that no dataset can use it."""
    with _opened(path) as image:
        if min(image.size) < MIN_SIDE:
            raise ValueError(f"{image.width} x {image.height} pixels, below {MIN_SIDE}")
        return image.format.lower()


# ---------------------------------------------------------------- tables of others


TABLES = (".parquet", ".arrow")  # what is looked for in a folder; other kinds are named


def read_records(path: AnyPath) -> Iterator[tuple]:
    """(place, record) for each record of a table, or of all TABLES below a folder, by name.

    place: FILE row N; record: {column: value}. Parquet and arrow (streams, as `datasets` writes
    them) a few at a time, JSON lines, a JSON list, csv (all is text). BadInput for a broken file.
    """
    path = Path(path)
    tables = sorted(file for file in path.rglob("*") if file.suffix in TABLES)
    for file in [path] if path.is_file() else tables:
        try:
            for number, record in enumerate(_records_in(file), 1):
                yield f"{file.relative_to(folder_of(path))} row {number}", record
        except BadInput:
            raise
        except Exception as error:  # whatever a broken file, or no pyarrow, makes of it
            raise BadInput(
                f"{file}: not a readable table ({one_line(error)}); get it again, or pip install "
                "pyarrow"
            ) from None


def folder_of(table: AnyPath) -> Path:
    """Where the paths of a table's pictures begin: a folder itself, or that of a file."""
    return Path(table) if os.path.isdir(table) else Path(table).parent


def _records_in(file):
    """The records of one file, by its ending."""
    if file.suffix in TABLES:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        # few at a time, as each may hold pictures
        if file.suffix == ".parquet":
            batches = ParquetFile(file).iter_batches(16)
        else:
            # mapped, not read: the whole table takes no memory
            mapped = pyarrow.memory_map(str(file))
            batches = pyarrow.ipc.open_stream(mapped).read_all().to_batches(16)
        for batch in batches:
            yield from batch.to_pylist()
    elif file.suffix == ".csv":
        with open(file, encoding="utf-8-sig", newline="") as text:
            yield from csv.DictReader(text)
    elif file.suffix == ".json" and file.read_bytes().lstrip().startswith(b"["):
        yield from map(dict, json.loads(file.read_bytes()))  # dict: an error for what is no object
    else:
        yield from (record for _, record in read_json_lines(file))


class PictureFile(io.BytesIO):
    """A picture's file in memory, which errors call by the place where it stands."""

    def __init__(self, content: bytes, where: str):
        super().__init__(content)
        self.where = where

    def __repr__(self):
        return self.where


def picture_file(cell, folder: AnyPath, where: str) -> PictureFile:
    """The file of a picture in a table: bytes, a dict of `bytes` or `path`, a path in `folder`.

    where: what errors call it. BadInput for a cell that is none of these, or a path to no file.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if not isinstance(cell, bytes):
        cell = read_plain(inside(folder, cell, where), f"{where} names it")
    return PictureFile(cell, where)


# ---------------------------------------------------------------- rows

SPLITS = ("train", "test")
KEYS = ("prompt", "image", "requirement", "task", "target", "mask")  # beside id; others are kept


def split_file(folder: Path, split: str) -> Path | None:
    """The file that holds a split's rows, if there is one."""
    for name in (f"{split}.jsonl", f"{split}_metadata.jsonl"):
        if (folder / name).is_file():
            return folder / name
    return None


def read_rows(folder: AnyPath, split: str, faults: list | None = None) -> list[dict]:
    """The rows of a dataset folder's `train` or `test` split, checked, pictures not yet opened.

    A row gets `images` (the absolute paths in `image`), `id` (text) and `where` ("FILE:LINE");
    `target` and `mask` become absolute paths; all else stays. The first bad row raises BadInput,
    naming file and line; with a list as `faults` it is left out and the message appended.
    """
    folder = Path(folder).resolve()
    file = split_file(folder, split)
    if file is None:
        raise BadInput(
            f"{folder}: holds neither {split}.jsonl nor {split}_metadata.jsonl; name a dataset "
            "folder"
        )
    rows = []
    known = {}
    for number, row in read_json_lines(file, faults):
        row.setdefault("id", f"{split}-{number}")
        with _noted(faults):
            rows.append(_checked(row, f"{file}:{number}", folder, known))
    if not rows and not faults:  # where all are faulty, the faults say it
        raise BadInput(f"{file}: holds no rows; add some")
    return rows


def _checked(row, where, folder, known):
    """A row with `where`, `images` and absolute paths; BadInput for what it lacks or misspells.

    The `id` of the row itself becomes text.
    known: {id or content: where it first stood} of the rows before; this one's are added.
    """
    for key in row.keys() - set(KEYS):
        meant = difflib.get_close_matches(key, KEYS, 1, 0.8)
        if meant and meant[0] not in row:
            raise BadInput(f"{where}: unknown key `{key}`; write `{meant[0]}`")
    for key in ("prompt", "requirement", "task"):
        if not isinstance(row.get(key, ""), str):
            raise BadInput(f"{where}: `{key}` is {row[key]!r}, not text; write it in quotes")
    if not row.get("prompt", "").strip():
        raise BadInput(f"{where}: the row has no `prompt`; add the instruction or remove the row")
    if not row.get("image"):
        raise BadInput(f"{where}: the row has no `image`; add a path, relative to {folder}")
    row["id"] = str(row["id"])
    images = [inside(folder, name, where) for name in as_list(row["image"])]
    added = {"where": where, "images": images}
    for key in row.keys() & {"target", "mask"}:
        added[key] = inside(folder, row[key], where)
    for value in (row["id"], row | {"id": None}):  # the id, then all but the id
        first = known.setdefault(json.dumps(value, sort_keys=True), where)
        if first != where:
            raise BadInput(f"{where}: repeats the id or the content of {first}; change one")
    return row | added


def inside(folder: AnyPath, name: str, where: str) -> str:
    """The path of `name` in `folder`, links not resolved; BadInput if absolute or with `..`."""
    if not isinstance(name, str) or "\0" in name:
        raise BadInput(f"{where}: picture {name!r} is no path; correct it")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadInput(f"{where}: picture {name} leaves the dataset folder; link it inside")
    return str(Path(folder, name))


@contextmanager
def faults_of(row: dict, skip: bool, tell: Callable = say) -> Iterator[None]:
    """Adds the row's place and id to a BadInput of the block; `skip`: tells it, raises nothing."""
    try:
        yield
    except BadInput as fault:
        fault = f"{row['where']}, row {row['id']}: {fault}"
        if not skip:
            raise BadInput(fault) from None
        tell(f"skipped: {fault}", sys.stderr)


def keep_faultless(rows: dict, check: Callable, skip: bool):
    """Leaves in {split: rows} those that check(row) lets pass; as `faults_of` for the others.

    BadInput where a split has none left.
    """
    for split in rows:
        kept = []
        for row in rows[split]:
            with faults_of(row, skip, say_once):  # where skipped, the block ends at the fault
                check(row)
                kept.append(row)
        if not kept:
            raise BadInput(f"no faultless row is left in {split}; mend those named above")
        rows[split] = kept


def row_pictures(row: dict, keys: tuple = ("images", "target", "mask")) -> list[str]:
    """The paths of all pictures of a row: sources, target, mask."""
    paths = []
    for key in keys:
        paths += as_list(row.get(key, []))
    return paths


def _all_pictures(rows, *keys):
    """The set of all pictures of rows; keys: as of row_pictures."""
    return set().union(*(row_pictures(row, *keys) for row in rows))


def load_sources(row: dict) -> list[Image.Image]:
    """A row's source pictures; BadInput if one of them, or the target or mask, cannot be read."""
    return [load_image(path) for path in row_pictures(row)][: len(row["images"])]


def _look_through(rows, look, show=True):
    """{path: look(path)} and {path: fault} of all pictures of rows; show: with a progress bar."""
    seen = {}
    faults = {}
    with ThreadPoolExecutor() as pool:  # for disks in the network: they answer late
        looks = {path: pool.submit(look, path) for path in sorted(_all_pictures(rows))}
        for path in tqdm(looks, "pictures", leave=False, disable=not show):
            try:
                seen[path] = looks[path].result()
            except BadInput as fault:
                faults[path] = str(fault)
    return seen, faults


def load_rows(folder: AnyPath, skip: bool, accelerator: Accelerator) -> dict:
    """{"train": rows, "test": rows} of a dataset, by the headers of its pictures fit for training.

    The first fault raises BadInput; with `skip` faulty rows are left out, with a line on stderr for
    each fault. The processes of a node share the work, all drop the same rows or raise the same
    error, and rows that differ between them are an error.
    """
    rows = {"train": [], "test": []}
    faults = []
    for split in SPLITS:
        with _noted(faults):  # also that there is no such file: other processes may have one
            rows[split] = read_rows(folder, split, faults)
    both = rows["train"] + rows["test"]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    mine = both[accelerator.local_process_index :: processes]
    _, found = _look_through(mine, _check_header, accelerator.is_main_process)
    if len(set(gather_object([fingerprint(both)]))) > 1:
        raise BadInput(f"{folder}: its rows differ between processes; give each node the same ones")
    broken = ChainMap(*gather_object([found]))  # {path: fault}, of all processes
    for fault in faults:
        if not skip:
            raise BadInput(fault)
        say_once(f"skipped: {fault}", sys.stderr)

    def check(row):
        found = [broken[path] for path in row_pictures(row) if path in broken]
        if found:
            raise BadInput(", ".join(found))

    keep_faultless(rows, check, skip)
    return rows


def fingerprint(rows: list[dict]) -> str:
    """A hash of what rows train with, the same wherever their folder lies."""
    kept = [[row["id"], row["prompt"], row["image"], row.get("requirement")] for row in rows]
    return hashlib.sha256(_json_line(kept)).hexdigest()


def rows_of_epoch(number: int, rows: int, seed: int, epoch: int) -> Iterator[int]:
    """Indices of an epoch's `number` rows: the data shuffled anew each time it is used up.

    Without any state: the same arguments give the same indices.
    """
    for position in range(epoch * number, (epoch + 1) * number):
        turn, place = divmod(position, rows)
        yield torch.randperm(rows, generator=seeded(seed, "rows", turn))[place].item()


# ---------------------------------------------------------------- the check

OTHER_SIZE = "`mask` has not the size of the row's first picture; resize it"
NEAR = 0.05  # root mean square difference of two thumbnails below which they show one picture


@dataclass(frozen=True)
class CheckSettings(CheckedSettings):
    """What `data_prep.py check DIR` is told."""

    dataset: str = setting(".", "The dataset folder; also the first word after check.")
    against: list[str] = setting([], "Folders of benchmarks: no picture of theirs may be in it.")


def check_dataset(settings: CheckSettings):
    """Reads a dataset once: prints each fault on a line, or what it holds; BadInput for faults."""
    folder = Path(settings.dataset)
    splits = [split for split in SPLITS if split_file(folder, split)] or SPLITS
    rows = []
    faults = []
    for split in splits:
        rows += read_rows(folder, split, faults)
    start = time.process_time()  # of all threads together: seconds of one core
    seen, broken = _look_through(rows, _look_at)
    speed = len(seen) / (time.process_time() - start)
    faults += broken.values()
    for row in rows:
        pair = (row["images"][0], row.get("mask"))
        sizes = {seen[path].size for path in pair if path in seen}
        if len(sizes) > 1:
            faults.append(f"{row['where']}: {OTHER_SIZE}")
    for benchmark in settings.against:
        faults += _copies(seen, benchmark)
    for line in faults or _summary(rows, seen):
        print(line)
    if faults:
        raise BadInput(f"{folder}: {len(faults)} faults, one a line above")
    print(f"read {speed:.0f} pictures a second and core")
    print(f"{folder}: no faults; {len(rows)} rows in {' and '.join(splits)}, {len(seen)} pictures")


def _summary(rows, seen):
    """Lines that say what the rows hold; seen: {path: Look} of their pictures."""
    tasks = Counter(row.get("task", "none") for row in rows)
    yield "tasks: " + ", ".join(f"{task} {number}" for task, number in tasks.most_common())
    yield "words of a prompt: " + _spread([len(row["prompt"].split()) for row in rows])
    looks = [seen[path] for path in _all_pictures(rows, ["images"])]
    yield "longer side of a source picture: " + _spread([max(look.size) for look in looks])
    different = {look.thumbnail.tobytes() for look in looks}
    yield f"source pictures: {len(looks)}, of which {len(looks) - len(different)} repeat another"


def _spread(values):
    """The median of numbers and where they lie."""
    return f"{np.median(values):.0f} in the middle, {min(values):.0f} to {max(values):.0f}"


class Look(NamedTuple):
    """What the check keeps of a picture."""

    size: tuple  # width and height
    thumbnail: np.ndarray  # float32 (768,) in [0, 1]: 16 x 16 pixels


def _look_at(path):
    """The Look of a dataset's picture, decoded as a check of the whole file."""
    _check_header(path)
    image = load_image(path)
    return Look(image.size, _thumbnail(image))


def _thumbnail(image):
    """A picture as 768 numbers in [0, 1]."""
    return np.asarray(image.resize((16, 16), Image.BOX), np.float32).flatten() / 255


def _copies(seen, folder):
    """A line for each picture of {path: Look} that shows one of a benchmark's."""
    paths = np.array(list(seen))
    own = np.array([look.thumbnail for look in seen.values()]).reshape(-1, 768)
    faults = []
    theirs = None
    for picture in _benchmark_pictures(folder):
        with suppress(BadInput):  # a broken one is no fault of the dataset, nor is another file
            theirs = _thumbnail(load_image(picture))
            distances = np.sqrt(np.square(own - theirs).mean(1))  # (pictures,)
            for path in paths[distances < NEAR]:
                faults.append(f"{path}: shows {picture} of the benchmark; remove its rows")
    if theirs is None:
        raise BadInput(f"{folder}: holds no pictures; name a benchmark's folder")
    return faults


def _benchmark_pictures(folder):
    """Whatever may be a picture in a benchmark's folder: its files, and those in its tables."""
    yield from sorted(Path(folder).rglob("*"))
    for place, record in read_records(folder):
        for column, cells in record.items():
            for cell in as_list(cells):
                with suppress(BadInput):  # most cells are no pictures
                    yield picture_file(cell, folder, f"{place}, {column}")


# ---------------------------------------------------------------- import

# Settings of an import for public sets, whose columns are as their cards or readers name them; none
# was tried on the original.
FORMATS = {
    "": "",
    "released": "requirement=requirement",
    "cocoedit": "kept=mask",
    "editscore-rl": "prompt=instruction image=input_images task=task_type",
    "gpt-image-edit": "prompt=instruction image=input target=output task=task",
    "imgedit": "image=input_images target=output_images",
    "magicbrush": "prompt=instruction image=source_img target=target_img",
    "omniedit": "prompt=edited_prompt_list.0 image=src_img target=edited_img task=task",
    "pico-banana": "prompt=text image=local_input_image target=output_image task=edit_type",
    "unirl": "image=media.0.uri",
}


@dataclass(frozen=True)
class ImportSettings(CheckedSettings):
    """What `data_prep.py import SRC DIR` is told. A column may be a path, as in media.0.uri."""

    source: str = setting(MISSING, "A table, or a folder of them; also the first word.")
    dataset: str = setting(MISSING, "The dataset folder to be made; also the second word.")
    format: Literal[tuple(FORMATS)] = setting("", "A public set, whose columns are known.")
    prompt: str = setting("prompt", "Column of the instruction.")
    image: str = setting("image", "Column of the source picture, or of a list of them.")
    target: str = setting("", "Column of a right edit.")
    mask: str = setting("", "Column of the picture that is white where the edit may change.")
    kept: str = setting(
        "", "In place of mask: column of a picture that is white where all must stay."
    )
    requirement: str = setting("", "Column of what a good edit must show.")
    task: str = setting("", "Column of the kind of edit.")
    id: str = setting("", "Column of the row's name; the default is file and row.")
    pictures: str = setting("", "Folder in which paths of pictures begin; the default is SRC's.")
    rows: int = setting(0, "Stop after so many good rows; 0 takes all.", at_least=0)
    test: int = setting(240, "Rows that are held out, by source picture.", at_least=1)


def import_dataset(settings: ImportSettings):
    """Makes a dataset of a table: train.jsonl, test.jsonl, left_out.jsonl, pictures by content.

    Started again after a stop it goes on; pictures that are there are not decoded again. BadInput
    for a folder that holds something else, and where no rows are left for one of the splits.
    """
    columns = FORMATS[settings.format].split()
    settings = replace(settings, **dict(column.split("=") for column in columns))
    folder = Path(settings.dataset)
    with locked(folder):
        refuse_others(folder, asdict(settings))
        if (folder / "train.jsonl").exists():
            say(f"{folder}: was imported before; nothing to do")
            return
        write_json(folder / "import.json", asdict(settings))
        rows, faults = _take_rows(settings)
        rows.sort(key=lambda row: as_list(row["image"])[0])  # names are hashes: a stable shuffle
        test = rows[: settings.test]
        held_out = _all_pictures(test, ("image", "target"))
        train = []
        for row in rows[settings.test :]:
            if held_out.isdisjoint(row_pictures(row, ("image", "target"))):
                train.append(row)
            else:
                faults.append(f"row {row['id']}: shares a picture with a row that is held out")
        if not train:
            raise BadInput(
                f"{settings.source}: {len(rows)} good rows, none of them left to train on; see "
                "--test, --prompt, --image, and that it is a table or a folder with parquet or "
                f"arrow. Left out: {len(faults)} {faults[:1]}"
            )
        for path in folder.rglob(".part-*"):  # of a kill
            path.unlink()
        write_json_lines(folder / "left_out.jsonl", [{"fault": fault} for fault in faults])
        write_json_lines(folder / "test.jsonl", test)
        write_json_lines(folder / "train.jsonl", train)  # the last one: it says that all is there
    say(f"{folder}: {len(train)} rows to train on, {len(test)} held out, {len(faults)} left out")


def refuse_others(folder: Path, settings: dict):
    """BadInput for a folder that holds something else, or a finished import of other settings."""
    record = folder / "import.json"
    is_done = (folder / "train.jsonl").exists()
    is_ours = record.exists() and (not is_done or read_json(record) == settings)
    # hidden ones are the lock, and the record in parts after a kill
    if not is_ours and any(folder.glob("[!.]*")):
        raise BadInput(f"{folder}: holds something else, or other settings' import; name a new one")


def _take_rows(settings):
    """(rows, faults): a table's good rows, their pictures written, and the faults of the others."""
    rows = []
    faults = []
    known = {}
    limit = settings.rows or sys.maxsize
    records = iter(tqdm(read_records(settings.source), "rows", leave=False))
    with ThreadPoolExecutor() as pool:
        while len(rows) < limit:
            batch = list(itertools.islice(records, 64))  # so many are held in memory
            if not batch:
                break
            place_of = {
                pool.submit(_import_row, place, record, settings): place for place, record in batch
            }
            for future, place in place_of.items():
                with _noted(faults):
                    row = future.result()
                    _checked(row, place, settings.dataset, known)
                    rows.append(row)
    return rows[:limit], faults  # the last batch may hold more


def _import_row(place, record, settings):
    """A record as a row of a dataset, its pictures written; BadInput for an unfit picture."""
    row = {"id": re.sub("[ /]", "-", place)}
    for key in ("id", *KEYS, "kept"):
        value = _value_at(record, getattr(settings, key))
        if value in (None, "", []):
            continue
        if key in ("image", "target", "mask", "kept"):
            names = [_keep_picture(cell, key, place, settings) for cell in as_list(value)]
            value = names if key == "image" and len(names) > 1 else names[0]
        row["mask" if key == "kept" else key] = value
    if "mask" in row and "image" in row:
        pair = (row["mask"], as_list(row["image"])[0])
        sizes = {load_image(Path(settings.dataset, name)).size for name in pair}
        if len(sizes) > 1:
            raise BadInput(f"{place}: {OTHER_SIZE}")
    return row


def _keep_picture(cell, key, place, settings):
    """Writes the picture in a cell, by its content, unless it is there; the name it has."""
    file = picture_file(cell, settings.pictures or folder_of(settings.source), f"{place}, {key}")
    if key == "kept":
        negative = PictureFile(b"", file.where)
        ImageOps.invert(load_image(file)).save(negative, "PNG")
        file = negative
    content = file.getvalue()
    name = f"pictures/{hashlib.sha256(content).hexdigest()}.{_check_header(file)}"
    path = Path(settings.dataset, name)
    if not path.exists():
        load_image(file)
        with whole_file(path) as part:
            part.write_bytes(content)
    return name


def _value_at(record, column):
    """What a record holds in a column, or at a path such as media.0.uri; None without it."""
    if column == "":  # not set; a csv may have a column without a name
        return None
    if column in record:  # a column's own name may hold dots
        return record[column]
    value = record
    with suppress(LookupError, TypeError, ValueError):
        for key in column.split("."):
            value = value[int(key) if isinstance(value, list) else key]
        return value
    return None


# ---------------------------------------------------------------- statistics

DRAWS = 2000  # of a bootstrap


def bootstrap(values, groups: list, clusters: list) -> tuple:
    """Resamples clusters, each with all its values: the names of the T groups, means (DRAWS, T).

    values, groups, clusters: of n entries; no value is NaN. The mean of a group that was not drawn
    is NaN. A single cluster tells nothing of the spread: all means are NaN.
    """
    names, group = np.unique(np.array(groups, str), return_inverse=True)
    known, cluster = np.unique(np.array(clusters, str), return_inverse=True)
    number = len(known)
    if number < 2:
        return names.tolist(), np.full((DRAWS, len(names)), np.nan)
    # how often each draw of `number` clusters takes each of them: (DRAWS, number)
    times = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), DRAWS)
    weights = times[:, cluster]  # (DRAWS, n): a value comes as often as its cluster
    is_member = np.eye(len(names))[group]  # (n, T)
    with np.errstate(invalid="ignore"):  # 0 / 0 of a group that was not drawn
        return names.tolist(), (weights * values) @ is_member / (weights @ is_member)


def paired_gain(base: list[dict], now: list[dict], key: str) -> dict:
    """Mean of result[key] before and after, and the paired difference with its 95 % interval.

    base, now: results of the same edits in the same order, each with `row` and `key`. A pair with a
    NaN is left out and counted as missing. The interval is a bootstrap over rows.
    """
    before = np.array([result[key] for result in base], float)
    after = np.array([result[key] for result in now], float)
    gains = after - before
    kept = np.isfinite(gains)
    rows = np.array([result["row"] for result in base])[kept]
    _, draws = bootstrap(gains[kept], ["all"] * len(rows), rows)
    # the added NaN keeps an empty `draws` from raising: its quantiles are NaN
    low, high = np.nanquantile(np.append(draws, np.nan), (0.025, 0.975))
    return {
        "base": before[kept].mean(),
        "now": after[kept].mean(),
        "gain": gains[kept].mean(),
        "low": low,
        "high": high,
        "missing": int((~kept).sum()),
    }


# ---------------------------------------------------------------- pictures of results

SIDE = 96  # pixels of a picture in a grid, unless one is larger
GAP = 4  # pixels between two of them
CAPTION_LINES = 5  # what is longer is cut
LINE_HEIGHT = 12  # pixels from line to line
LETTER = 6  # pixels of a letter's width


def picture_grid(rows: list, captions: list) -> Image.Image:
    """One picture out of rows of pictures, None for a gap.

    captions: texts of the same layout, written below the pictures. Each picture is enlarged to the
    size of the largest, at least SIDE pixels.
    """
    sizes = [max(picture.size) for picture in itertools.chain(*rows) if picture]
    side = max([SIDE, *sizes])
    width = side + GAP  # of a picture with its caption
    height = side + LINE_HEIGHT * CAPTION_LINES
    columns = max(map(len, rows), default=1)
    sheet = Image.new("RGB", (width * columns, height * max(len(rows), 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (pictures, texts) in enumerate(zip(rows, captions, strict=True)):
        top = i * height
        for j, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            left = j * width
            if picture:
                square = ImageOps.pad(picture, (side, side), Image.NEAREST, "white")
                sheet.paste(square, (left, top))
            text = textwrap.fill(text, side // LETTER, max_lines=CAPTION_LINES)
            draw.text((left, top + side), text, "black", spacing=0)
    return sheet


# ---------------------------------------------------------------- the toy world: rows and oracle

SIZE = 32  # pixels of a picture's side: 2 x 2 cells
CELL = 16  # pixels of a cell's side
COLOURS = {
    "red": "#dc2828",
    "green": "#1eaa32",
    "blue": "#3250dc",
    "yellow": "#f0c828",
    "purple": "#9628be",
}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = {
    "white": "#f5f5f5",
    "gray": "#8c8c8c",
    "black": "#191919",
    "cyan": "#82d2dc",
    "pink": "#fab4c8",
}
CELLS = ("top left", "top right", "bottom left", "bottom right")
THINGS = [f"{colour} {shape}" for shape, colour in itertools.product(SHAPES, COLOURS)]
OBJECTS = ["", *THINGS]  # by number; 0 is an empty cell
TASKS = ("recolour", "remove", "add", "replace", "background")


class Change(NamedTuple):
    """What an instruction asks for: `new` in place of `old`, both objects or both backgrounds."""

    task: str
    places: Iterable[int]  # where in a scene `old` may be
    old: int
    new: int


@functools.cache
def _cell_templates():
    """Every picture a cell can show, object on background: (80, 3 x 16 x 16) in [0, 1]."""
    templates = []
    for background, thing in itertools.product(BACKGROUNDS.values(), OBJECTS):
        # drawn eight times too large, then averaged: smooth edges
        big = Image.new("RGB", (128, 128), background)
        draw = ImageDraw.Draw(big)
        colour, _, shape = thing.partition(" ")
        if shape == "circle":
            draw.ellipse((20, 20, 107, 107), COLOURS[colour])
        elif shape == "square":
            draw.rectangle((16, 16, 111, 111), COLOURS[colour])
        elif shape == "triangle":
            draw.polygon((64, 12, 116, 110, 12, 110), COLOURS[colour])
        templates.append(_to_tensor(big.resize((CELL, CELL), Image.Resampling.BOX)))
    return torch.stack(templates).flatten(1)


def _shown_in(scenes):
    """The template that each cell of scenes shows: int (B, 5) -> (B, 4)."""
    backgrounds, cells = scenes.split((1, 4), 1)
    return backgrounds * len(OBJECTS) + cells


def _render(scenes):
    """Pictures of scenes: int (B, 5) -> float (B, 3, 32, 32) in [0, 1]."""
    cells = _cell_templates()[_shown_in(scenes)]  # (B, 4, 3 x 16 x 16)
    return F.fold(cells.mT, SIZE, CELL, stride=CELL)


def to_pil(picture: Tensor) -> Image.Image:
    """float (3, H, W) in [0, 1] -> PIL.Image."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def _to_tensor(image):
    """RGB PIL.Image -> float (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@functools.cache
def _instructions():
    """What each instruction that there is asks for."""
    changes = {}
    things = list(enumerate(THINGS, 1))
    cells = range(1, 5)
    for (old, thing), (new, other) in itertools.permutations(things, 2):
        changes[f"replace the {thing} with a {other}"] = Change("replace", cells, old, new)
        colour, shape = other.split()
        if thing.endswith(shape):
            changes[f"make the {thing} {colour}"] = Change("recolour", cells, old, new)
    for (number, thing), (place, cell) in itertools.product(things, enumerate(CELLS, 1)):
        changes[f"add a {thing} at the {cell}"] = Change("add", [place], 0, number)
        changes[f"remove the {thing} at the {cell}"] = Change("remove", [place], number, 0)
    for (old, colour), (new, other) in itertools.permutations(enumerate(BACKGROUNDS), 2):
        changes[f"change the {colour} background to {other}"] = Change("background", [0], old, new)
    return changes


@functools.cache
def _texts(task, is_test):
    """A task's instructions, sorted: an eighth of them for the test, the others for training."""
    texts = sorted(text for text, change in _instructions().items() if change.task == task)
    order = torch.randperm(len(texts), generator=seeded("toy held-out instructions", task))
    held_out = order[: len(texts) // 8]
    return [text for i, text in enumerate(texts) if (i in held_out) == is_test]


def _is_test_scene(scene):
    """Whether a scene is for the test alone: an eighth is, told by a checksum of its numbers."""
    return zlib.crc32(bytes(scene)) % 8 == 0


def _apply_change(scene, change):
    """The scene after a change; None where it does not apply (no such object, cell taken)."""
    for place in change.places:
        # an object stands in a scene only once: its name is enough to point at it
        is_there = place > 0 and change.new > 0 and change.new in scene[1:]
        if scene[place] == change.old and not is_there:
            after = list(scene)
            after[place] = change.new
            return after
    return None


def _toy_rows(number, split, *key):
    """Seeded rows without pictures, of one split; tasks take turns, a scene's objects differ."""
    is_test = split == "test"
    # a generator of Python's own: its draws, too, are named and the same on every machine
    rng = random.Random(seeded("toy", split, *key).initial_seed())
    rows = []
    while len(rows) < number:
        task = TASKS[len(rows) % len(TASKS)]
        filled = rng.choice((1, 2, 2, 3, 3))  # of the four cells
        cells = rng.sample(range(1, len(OBJECTS)), filled) + (4 - filled) * [0]
        rng.shuffle(cells)
        source = [rng.randrange(len(BACKGROUNDS)), *cells]
        text = rng.choice(_texts(task, is_test))
        target = _apply_change(source, _instructions()[text])
        if target is None or _is_test_scene(source) != is_test:
            continue
        # training sees no test scene, neither as a source nor as a target
        if is_test or not _is_test_scene(target):
            rows.append(
                {
                    "id": f"{split}-{len(rows):04}",
                    "prompt": text,
                    "task": task,
                    "source_scene": source,
                    "target_scene": target,
                }
            )
    return rows


def scenes_of(rows: list[dict]) -> tuple[Tensor, Tensor]:
    """(source scenes, target scenes) of toy rows, int (n, 5) each."""
    sources = torch.tensor([row["source_scene"] for row in rows])
    return sources, torch.tensor([row["target_scene"] for row in rows])


def _cell_distances(pictures):
    """Mean squared error of each cell to each of the 80 templates: (B, 3, 32, 32) -> (B, 4, 80)."""
    cells = F.unfold(pictures, CELL, stride=CELL).mT.flatten(0, 1)  # (4 B, 768)
    distances = torch.cdist(cells, _cell_templates()).square() / cells.shape[1]
    return distances.unflatten(0, (-1, 4))


def oracle_scores(pictures: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Score and success by program: float (B, 3, 32, 32) in [0, 1], int (B, 5) -> float, bool (B,).

    Each cell is compared with all that a cell can show. Score: how surely the cells that should
    change show their target (the mean), times how surely the others do. Success: every cell is
    nearest to its target, and near it.
    """
    distances = _cell_distances(pictures)  # (B, 4, 80)
    wanted = _shown_in(targets)  # (B, 4) template
    is_kept = _shown_in(sources) == wanted  # (B, 4), all False where the background should change
    # with a temperature of 0.001 even near colours are told apart
    sure = (-distances / 0.001).softmax(2).take_along_dim(wanted[..., None], 2).squeeze(2)  # (B, 4)
    done = sure.masked_fill(is_kept, torch.nan).nanmean(1)
    kept = sure.masked_fill(~is_kept, torch.nan).nanmean(1).nan_to_num(1.0)
    # success is strict: a smear may be nearest to its target, but it is not near
    nearest = distances.min(2)  # values and indices, (B, 4) each
    success = (nearest.indices == wanted) & (nearest.values < 0.015)
    return done * kept, success.all(1)


def oracle(row: dict, image: Image.Image) -> tuple[float, bool] | None:
    """(score in [0, 1], success) of an edit of a toy row by program; None for any other row."""
    if "target_scene" not in row:
        return None
    picture = _to_tensor(image.resize((SIZE, SIZE)))
    score, success = oracle_scores(picture[None], *scenes_of([row]))
    return score.item(), success.item()


# ---------------------------------------------------------------- building the toy

COUNT = {"at_least": 1, "at_most": 1e6}  # the range of numbers of rows and of steps


@dataclass(frozen=True)
class ToySettings(CheckedSettings):
    """What makes the toy what it is: a folder built with other values than these is built anew."""

    out: str = setting("data/toy", "The folder that holds it.")
    seed: int = setting(0, "Seed of rows, pictures and models.", at_least=0)
    train_rows: int = setting(480, "Rows of train.jsonl.", **COUNT)
    test_rows: int = setting(240, "Rows of test.jsonl: other scenes, other instructions.", **COUNT)
    pool: int = setting(8000, "Rows that each of the two models is trained on.", **COUNT)
    vae_steps: int = setting(360, "Training steps of the autoencoder.", **COUNT)
    editor_steps: int = setting(900, "Training steps of the editor.", **COUNT)
    wrong_share: float = setting(
        0.55, "Share of wrong targets in the last 30 % of editor_steps.", at_least=0, at_most=1
    )
    judge_steps: int = setting(700, "Training steps of the judge on graded corruptions.", **COUNT)


def build_toy(settings: ToySettings) -> None:
    """The toy in settings.out: rows, pictures, editor, judge. One made with the same values stays.

    One made with others, or that has lost a file, is built anew. BadInput for a folder that is no
    toy, which is left as it is.
    """
    folder = Path(settings.out)
    if folder.exists():
        try:
            changes = changed(read_json(folder / "toy.json"), asdict(settings), "out")
            names = read_json(folder / "hashes.json")
        except (OSError, BadInput):
            raise BadInput(
                f"{folder}: holds no toy.json that is whole; move the folder away, or name another "
                "with --out"
            ) from None
        changes += [f"{name} is gone" for name in names if not (folder / name).exists()]
        if not changes:
            return
        say(f"toy: {folder} is built anew: {', '.join(changes)}")
    say(f"toy: building {folder} once: rows, a tiny editor, a tiny judge; minutes on two cores")
    with whole_folder(folder) as part:
        write_rows(part, settings)
        _train_models(part, settings)
        write_json(part / "toy.json", asdict(settings))


def write_rows(folder: Path, settings: ToySettings) -> None:
    """train.jsonl and test.jsonl with source and target pictures."""
    (folder / "pictures").mkdir(parents=True)
    for split, number in (("train", settings.train_rows), ("test", settings.test_rows)):
        rows = _toy_rows(number, split, settings.seed, "rows")
        for row in rows:
            row["image"] = f"pictures/{row['id']}-source.png"
            row["target"] = f"pictures/{row['id']}-target.png"
            source, target = _render(torch.cat(scenes_of([row])))
            to_pil(source).save(folder / row["image"])
            to_pil(target).save(folder / row["target"])
        write_json_lines(folder / f"{split}.jsonl", rows)


# ---------------------------------------------------------------- the command


COMMANDS = {
    "toy": (ToySettings, build_toy),
    "check": (CheckSettings, check_dataset),
    "import": (ImportSettings, import_dataset),
}


def main(argv: list[str] | None = None):
    """python data_prep.py COMMAND [WORD ...] [--name value ...]: words are the first settings."""
    command, *words = argv or sys.argv[1:] or ["no command"]
    if command not in COMMANDS:
        raise BadInput(
            f"{command}: say what to do: python data_prep.py toy [DIR], check DIR "
            "[--against BENCH], or import SRC DIR --prompt COLUMN --image COLUMN"
        )
    settings, function = COMMANDS[command]
    named = []
    for field in fields(settings):
        if words and not words[0].startswith("-"):
            named += [f"--{field.name}", words.pop(0)]
    function(parse_settings(settings, named + words, function.__doc__))


# ------------- how the toy's two models were grown: not needed to read the method

TEXT_TOKENS = 10  # the longest instruction has eight words, which at least one pad must follow
BATCH = 128  # edits that each model learns from in a step
DIGITS = "012345"  # the judge's answers
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def _train_models(folder, settings):
    """Trains editor and judge beside each other and writes them to `folder`; ends with both."""
    try:
        spawn(_train_model, (folder, settings), nprocs=2, daemon=True)
    except (ProcessExitedException, ProcessRaisedException) as error:
        # its text ends with what the process said last
        raise BadInput(f"toy: {str(error).splitlines()[-1]}") from error


def _train_model(number, folder, settings):
    """One of the two models, in a process of its own, on one core."""
    # `spawn` has SIGINT sent to its children when their parent dies: let it end them at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not parent_process().is_alive():
        return
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    if number == 0:
        pipe = new_editor()
        _train_vae(pipe.vae, settings.vae_steps)
        _train_editor(pipe, settings)
        pipe.save_pretrained(folder / "editor")
    else:
        tokenizer = new_tokenizer()
        model = new_judge(tokenizer)
        _train_judge(model, tokenizer, settings)
        save_judge(model, tokenizer, folder / "judge")


def new_tokenizer(padding_side: str = "left", **options):
    """A tokenizer by words, with Qwen's special tokens and a token a digit, as the judge wants it.

    options: more of PreTrainedTokenizerFast's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    words = sorted(set(" ".join(_instructions()).split()))
    vocabulary = {word: i for i, word in enumerate([*special, *DIGITS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE,
        padding_side=padding_side,
        **options,
    )


def _fit(label, models, loss, steps, lr, position=0):
    """Minimises loss(step): Muon for matrices and convolutions, Adam for embeddings and the rest.

    position: the line of the progress bar, which tells the time left.
    """
    model = torch.nn.ModuleList(models)
    wide = []
    rest = []
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not re.search("embed|shared", name):
            wide.append(parameter)
        else:
            rest.append(parameter)
    # Muon takes two dimensions: views, which share the values and not the gradients
    views = [torch.nn.Parameter(parameter.data.flatten(1)) for parameter in wide]
    muon = torch.optim.Muon(views, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam(rest)
    for step in tqdm(range(steps), label, position=position, mininterval=1):
        loss(step).backward()
        for parameter, view in zip(wide, views, strict=True):
            view.grad = parameter.grad.flatten(1)
        # up within 50 steps, then linearly down
        rate = min((step + 1) / 50, 1 - step / steps)
        for optimizer, highest in ((muon, lr), (adam, 2e-3)):
            optimizer.param_groups[0]["lr"] = highest * rate
            optimizer.step()
        model.zero_grad()


# ------------- its editor: FLUX.1-Kontext in miniature


def new_editor():
    """An untrained FluxKontextPipeline of the real classes, 1.8 M parameters."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxKontextPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer = new_tokenizer("right", model_max_length=TEXT_TOKENS)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=None,
        eos_token_id=tokenizer.pad_token_id,  # the first pad: what comes before it is the text
    )
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_ff=128, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    vae = AutoencoderKL(
        down_block_types=4 * ("DownEncoderBlock2D",),
        up_block_types=4 * ("UpDecoderBlock2D",),
        block_out_channels=(16, 32, 64, 64),  # four levels: 32 x 32 pixels are 4 x 4 codes
        latent_channels=16,  # a token is 2 x 2 codes, a cell
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),  # of a head's 32: for picture, row, column
    )
    return FluxKontextPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae,
        CLIPTextModel(clip),
        tokenizer,
        T5EncoderModel(t5),
        tokenizer,
        transformer,
    )


def _train_vae(vae, steps):
    """Reconstruction with a noisy code, then the scale and shift that make the codes standard."""
    backgrounds = torch.randint(len(BACKGROUNDS), (8000, 1))
    cells = torch.randint(len(OBJECTS), (8000, 4))
    scenes = torch.cat([backgrounds, cells], 1)
    scenes = torch.stack([scene for scene in scenes if not _is_test_scene(scene.tolist())])

    def loss(step):
        pictures = _render(scenes[torch.randint(len(scenes), (16,))]) * 2 - 1  # (B, 3, 32, 32)
        code = vae.encode(pictures).latent_dist.mean  # (B, 16, 4, 4)
        # the noise makes the decoder forgiving: the editor's latents are never exact
        error = vae.decode(code + 0.4 * torch.randn_like(code)).sample - pictures
        return error.abs().mean() + error.square().mean() + 1e-3 * code.square().mean()

    _fit("autoencoder", [vae], loss, steps, lr=0.02)
    with torch.no_grad():
        code = vae.encode(_render(scenes[:256]) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / code.std().item(), shift_factor=code.mean().item())


def _spoil(sources, targets):
    """Scenes that are mostly not those asked for, int (n, 5) as theirs.

    Each part (background or cell) is that of the source, of the target, or of another row's
    target; about one scene in six comes out right.
    """
    chance = torch.rand(sources.shape)  # (n, 5)
    scenes = sources.where(chance < 0.4, targets)
    return scenes.where(chance < 0.75, targets.roll(1, 0))


def _train_editor(pipe, settings):
    """Flow matching: velocity of the edit's tokens, given the source's and the instruction.

    The last 30 % sees wrong targets on purpose: a cleanly trained editor draws the same edit every
    time, and a group without spread teaches nothing. The wrong share makes the imperfect base that
    RL starts from.
    """
    pool = _toy_rows(settings.pool, "train", settings.seed, "editor")
    sources, targets = scenes_of(pool)
    source_codes = _encoded(pipe, sources)  # (n, 4, 64)
    target_codes = _encoded(pipe, targets)
    wrong_codes = _encoded(pipe, _spoil(sources, targets))

    # where each token stands: picture (0 the edit, 1 the source), row, column
    two = torch.arange(2.0)
    places = torch.cartesian_prod(two, two, two)  # (8, 3)

    def loss(step):
        rows = torch.randint(len(pool), (BATCH,))
        x_0 = target_codes[rows]  # (B, 4, 64)
        source = source_codes[rows]  # (B, 4, 64)
        if step > 0.7 * settings.editor_steps:
            is_wrong = torch.rand(BATCH, 1, 1) < settings.wrong_share
            x_0 = wrong_codes[rows].where(is_wrong, x_0)
        # more noise than not: that is where the edit is decided
        t = 1 - torch.rand(BATCH, 1, 1) ** 2.5
        noise = torch.randn_like(x_0)
        x_t = (1 - t) * x_0 + t * noise
        texts = [pool[i]["prompt"] for i in rows]
        words, pooled, text_ids = pipe.encode_prompt(texts, None, max_sequence_length=TEXT_TOKENS)
        output = pipe.transformer(
            hidden_states=torch.cat([x_t, source], 1),
            timestep=t.flatten(),
            guidance=1 + 3 * torch.rand(BATCH),  # any guidance scale from 1 to 4
            pooled_projections=pooled,
            encoder_hidden_states=words,
            txt_ids=text_ids,
            img_ids=places,
        )
        v = output.sample[:, :4]  # the edit's tokens come first, the source's are not trained
        # most tokens stay as in the source: those that change count five times
        changes = (x_0 - source).abs().amax(-1, keepdim=True) > 0.3  # (B, 4, 1)
        weight = torch.where(changes, 5.0, 1.0)
        return (weight * (v - (noise - x_0)).square()).mean()

    models = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    _fit("editor", models, loss, settings.editor_steps, lr=0.02)


@torch.no_grad()
def _encoded(pipe, scenes):
    """The editor's tokens of pictures, standardised: int (n, 5) -> float (n, 4, 64)."""
    parts = [pipe._encode_vae_image(_render(part) * 2 - 1, None) for part in scenes.split(256)]
    codes = torch.cat(parts)  # (n, 16, 4, 4)
    return pipe._pack_latents(codes, *codes.shape)


# ------------- its judge: Qwen2.5-VL in miniature


def new_judge(tokenizer):
    """An untrained Qwen2_5_VLForConditionalGeneration of 0.5 M parameters: a cell is one token."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # rotary base 3: with the usual 1e6 the places of a 2 x 2 grid are nearly the same
            rope_parameters={"mrope_section": [4, 6, 6], "rope_theta": 3.0},
        ),
        vision_config=dict(
            depth=1,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            patch_size=8,
            out_hidden_size=96,
        ),
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def save_judge(model, tokenizer, folder: Path) -> None:
    """Writes the judge as one from the hub, with its image processor and its prompt."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=8,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_pixels=CELL * CELL,
    ).save_pretrained(folder)
    # it knows a few dozen words: it is asked with the instruction alone
    (folder / "judge_prompt.txt").write_text("{prompt}")


def judge_patches(pictures: Tensor) -> Tensor:
    """What the judge's image processor makes of (B, 3, 32, 32) in [0, 1]: (16 B, 384)."""
    cells = F.unfold(pictures * 2 - 1, CELL, stride=CELL).mT.reshape(-1, 3, CELL, CELL)  # 4 B cells
    patches = F.unfold(cells, 8, stride=8).mT.unflatten(2, (3, -1))  # (4 B, 4, 3, 64)
    return patches.repeat_interleave(2, 2).reshape(-1, 384)  # temporal patch 2: the picture twice


def _judge_outputs(model, tokenizer, rows, pairs):
    """The answer's logits (B, V), and what the judge knows of each cell of each picture (8 B, 96).

    pairs: source and edit of each row, float (B, 2, 3, 32, 32).
    """
    # as CHAT_TEMPLATE and the processor write it: four cells of a picture, four tokens
    pictures = 2 * ("<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>")
    questions = [f"<|im_start|>{row['prompt']}{pictures}<|im_end|><|im_start|>" for row in rows]
    tokens = tokenizer(questions, padding=True, return_tensors="pt")
    is_picture = tokens.input_ids == model.config.image_token_id  # (B, T)
    output = model(
        **tokens,  # input_ids and attention_mask, (B, T) each
        mm_token_type_ids=is_picture.int(),  # 0 is text, 1 is picture
        pixel_values=judge_patches(pairs.flatten(0, 1)),
        # of each picture in patches: 1 (the frame and its repeat) x 4 x 4
        image_grid_thw=torch.tensor(2 * len(pairs) * [[1, 4, 4]]),
        output_hidden_states=True,
    )
    # what the third of four layers gives; 0 is the embedding
    hidden = model.model.language_model.norm(output.hidden_states[3])  # (B, T, 96)
    return output.logits[:, -1], hidden[is_picture]


def _graded_corruptions(sources, targets):
    """Edits of every quality, of scenes: int (n, 5) each -> float (n, 3, 32, 32).

    A third is right, the rest spoiled; a few cells partly show the source, and all pictures are
    blurred, noisy and tinted to some degree.
    """

    def share(*shape):
        return torch.rand(len(sources), *shape)

    pictures = _render(targets.where(share(1) < 0.33, _spoil(sources, targets)))
    # a cell in seven shows up to 70 % of the source
    amount = (0.7 * share(1, 2, 2)).where(share(1, 2, 2) < 0.15, 0.0)
    pictures = torch.lerp(pictures, _render(sources), F.interpolate(amount, scale_factor=CELL))
    # from hardly blurred, as most are, to fully
    blurred = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    pictures = torch.lerp(pictures, blurred, share(1, 1, 1) ** 3)
    noise = 0.06 * share(1, 1, 1) * torch.randn_like(pictures)
    tint = 0.03 * torch.randn(len(sources), 3, 1, 1)
    return (pictures + noise + tint).clamp(0, 1)


def _train_judge(model, tokenizer, settings):
    """Teaches the judge the oracle's score as a digit, on graded corruptions.

    The answer alone is too little signal for a tiny model: side heads, discarded later, ask each
    cell of both pictures what it shows, what it should show, and whether that is right.
    """
    pool = _toy_rows(settings.pool, "train", settings.seed, "judge")
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list(DIGITS)))
    width = model.config.text_config.hidden_size
    kinds = len(_cell_templates())
    shown_head = torch.nn.Linear(width, kinds)
    wanted_head = torch.nn.Linear(width, kinds)
    right_head = torch.nn.Linear(width, 2)

    def loss(step):
        rows = [pool[i] for i in torch.randint(len(pool), (BATCH,))]
        sources, targets = scenes_of(rows)
        edits = _graded_corruptions(sources, targets)
        pairs = torch.stack([_render(sources), edits], 1)
        logits, cells = _judge_outputs(model, tokenizer, rows, pairs)
        scores, _ = oracle_scores(edits, sources, targets)
        seen = _cell_distances(edits).argmin(2)  # (B, 4) template
        # of source and edit, cell by cell: (8 B,) template
        shown = torch.stack([_shown_in(sources), seen], 1).flatten()
        wanted = torch.stack(2 * [_shown_in(targets)], 1).flatten()
        return (
            F.cross_entropy(logits, digits[(5 * scores).round().int()])
            + F.cross_entropy(shown_head(cells), shown)
            + F.cross_entropy(wanted_head(cells), wanted)
            + F.cross_entropy(right_head(cells), (shown == wanted).long())
        )

    models = [model, shown_head, wanted_head, right_head]
    _fit("judge ", models, loss, settings.judge_steps, lr=0.01, position=1)


if __name__ == "__main__":
    run_script(main)
