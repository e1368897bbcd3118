"""Training with a judge that answers by a rule; also a script, for runs of several processes.

python tests/rule_judge.py --base ... --out ...    # train_nft.py with this judge
python tests/rule_judge.py serve                   # forks such runs on demand, see `serve`
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch
from accelerate.state import AcceleratorState
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_nft  # noqa: E402  the scripts lie one folder above
from data_prep import seeded  # noqa: E402
from reward_mllm import JudgeSettings, Scores  # noqa: E402

PROMPTS = ("make the red circle blue", "make the red circle blue", "remove the green square")
PROMPTS += ("add red triangle",)


class RuleJudge:
    """Likes some brightnesses more than others, without a jump.

    Rows with `flat` get one score for all edits, rows with `broken` none for every other edit.
    """

    name = "rule"
    noise = 0.0
    settings = JudgeSettings()

    def __init__(self, mass=1.0, pitch=40.0):
        self.mass = mass
        self.pitch = pitch

    def score(self, row, sources, edits):
        light = [np.asarray(edit, float).mean() / 255 for edit in edits]
        score = ((self.pitch * torch.tensor(light, dtype=torch.float32)) % 2 - 1).abs()
        if row.get("flat"):
            score[:] = 0.95
        if row.get("broken"):
            score[1::2] = torch.nan
        causes = ["broken" if failed else "" for failed in score.isnan().tolist()]
        mass = torch.full_like(score, self.mass)
        return Scores(score, mass, {"execution": score}, causes, [""] * len(score))

    def missing(self, n, cause):
        none = torch.full((n,), torch.nan)
        return Scores(none, none, {"execution": none}, [cause] * n, [""] * n)

    def submit(self, row, sources, edits):
        done = Future()
        done.set_result(self.score(row, sources, edits))
        return done

    def close(self):
        pass


def write_dataset(folder):
    """Eight training rows, two with one prompt and other pictures, and two held-out ones."""
    folder.mkdir(exist_ok=True)
    for split, number in (("train", 8), ("test", 2)):
        rows = []
        for i in range(number):
            noise = torch.rand(32, 32, 3, generator=seeded("picture", split, i))
            Image.fromarray((noise * 255).byte().numpy()).save(folder / f"{split}{i}.png")
            row = {"prompt": PROMPTS[i % 4], "image": f"{split}{i}.png"}
            if i in (1, 3, 4):
                row["flat"] = True
            rows.append(row)
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(editor, dataset, out, **changes):
    """The command line of a run of seconds on a tiny editor for 32 x 32 pictures; None: no word."""
    values = {
        "base": editor,
        "data": dataset,
        "out": out,
        "judge": "local:rule",
        "resolution": 32,
        "epochs": 2,
        "groups": 4,
        "group_size": 4,
        "rollout_steps": 4,
        "train_timesteps": 2,
        "train_batch": 6,
        "rollout_batch": 4,
        "eval_rows": 2,
        "eval_steps": 2,
        "eval_every": 2,
        "save_every": 1,
        "lora_rank": 4,
        "lora_alpha": 4,
        "lr": 1e-2,
        "decay_rate": 0.3,
        "gradient_checkpointing": False,
    }
    words = []
    for name, value in (values | changes).items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


def lora(folder, name=""):
    return load_file(folder / name / "pytorch_lora_weights.safetensors")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoints(out):
    """The numbers of the checkpoints in a run's folder, the newest first."""
    names = [folder.name.removeprefix("checkpoint-") for folder in out.glob("checkpoint-*")]
    return sorted([int(name) for name in names if name.isdigit()], reverse=True)


# ---------------------------------------------------------------- processes, forked


def after_epoch_1(owner, name, fault):
    """From the second epoch on, calls `fault` before a function, or in a class's method."""
    call = getattr(owner, name)
    close_epoch = train_nft.close_epoch
    closed = []

    def noting(*args):
        close_epoch(*args)
        closed.append(args)

    def faulty(*args, **kwargs):
        if closed:
            fault()
        return call(*args, **kwargs)

    train_nft.close_epoch = noting
    setattr(owner, name, faulty)


def hang():
    """What a judge that never answers does."""
    RuleJudge.submit = lambda *args: Future()


def run_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. GPU 1 has a total capacity of 8 GiB")


def run_out_of_memory_on_rank_1():
    if os.environ["RANK"] == "1":
        run_out_of_memory()


def rest():
    time.sleep(0.4)


def leave_alone(*streams):
    """Nobody reads these streams any more."""
    reader, writer = os.pipe()
    os.close(reader)
    for stream in streams:
        os.dup2(writer, stream)


def other_rows():
    """The second rank finds another folder under the dataset's name."""
    load_rows = train_nft.load_rows

    def load(folder, *args):
        if os.environ["RANK"] == "1":
            folder = Path(folder).with_name("theirs")
        return load_rows(folder, *args)

    train_nft.load_rows = load


# What is wrong in a forked run; each is called in the child, after everything is imported.
FAULTS = {
    "": lambda: None,
    "slow rollout": lambda: after_epoch_1(FluxTransformer2DModel, "forward", rest),
    "slow update": lambda: after_epoch_1(train_nft, "nft_loss", rest),
    "long update": lambda: after_epoch_1(train_nft, "nft_loss", lambda: time.sleep(2)),
    "slow evaluation": lambda: after_epoch_1(train_nft, "oracle", rest),
    "hanging judge": lambda: after_epoch_1(train_nft, "mean_gradient", hang),
    "memory": lambda: after_epoch_1(train_nft, "nft_loss", run_out_of_memory),
    "memory on rank 1": lambda: after_epoch_1(train_nft, "nft_loss", run_out_of_memory_on_rank_1),
    "forward of a shard": lambda: after_epoch_1(
        FluxTransformer2DModel, "forward", run_out_of_memory_on_rank_1
    ),
    "backward of a shard": lambda: after_epoch_1(
        train_nft, "nft_loss", run_out_of_memory_on_rank_1
    ),
    "other rows on rank 1": other_rows,
    "no reader of stdout": lambda: after_epoch_1(
        train_nft, "mean_gradient", lambda: leave_alone(1)
    ),
    "no reader": lambda: after_epoch_1(train_nft, "mean_gradient", lambda: leave_alone(1, 2)),
}


def fork(words, said, fault="", rank=0, ranks=1, port=0):
    """A child of this process that trains and appends what it says to the file `said`: its pid."""
    child = os.fork()
    if child:
        return child
    sink = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    code = 1
    try:
        if ranks > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        AcceleratorState._reset_state(reset_partial_state=True)
        FAULTS[fault]()
        train_nft.load_judge = lambda *args: RuleJudge()
        train_nft.run_script(lambda: train_nft.main(words))
        code = 0
    except SystemExit as end:
        if isinstance(end.code, int):
            code = end.code
        else:  # a text, which Python would print before it ends with code 1
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def fork_ranks(words, said, ranks=1, fault=""):
    """Forks the processes of one run: their pids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(words, said, fault, rank, ranks, port) for rank in range(ranks)]


def serve():
    """Reads the keywords of fork_ranks, a line of JSON each; answers with pids, then exit codes.

    Everything is imported once: a run of two processes then takes seconds. The processes of the
    tests cannot be forked themselves, as PyTorch allows no backward in a fork after one before.
    """
    torch.set_num_threads(1)
    os.cpu_count = lambda: 1
    for line in sys.stdin:
        pids = fork_ranks(**json.loads(line))
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


class ForkServer:
    """The other side of `serve`: one run at a time."""

    def __init__(self, process, said):
        self.process = process
        self.file = said  # what the run says
        self.is_running = False

    def start(self, words, ranks=1, fault=""):
        if self.is_running:
            self.codes(seconds=0)
        self.file.unlink(missing_ok=True)
        job = {"words": words, "said": str(self.file), "ranks": ranks, "fault": fault}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.pids = json.loads(self.process.stdout.readline())
        self.is_running = True

    def said(self):
        return self.file.read_text() if self.file.exists() else ""

    def wait_for(self, text, seconds=60):
        """Returns once the run has said something; fails after so many seconds."""
        end = time.monotonic() + seconds
        while text not in self.said():
            running = [psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in self.pids]
            assert any(running) and time.monotonic() < end, self.said()
            time.sleep(0.02)

    def send(self, number, ranks=None):
        """A signal to some of the processes; None: to all."""
        for rank, pid in enumerate(self.pids):
            if ranks is None or rank in ranks:
                os.kill(pid, number)

    def codes(self, seconds=90):
        """The exit codes, once all processes have ended; they are killed after so many seconds."""
        timer = threading.Timer(seconds, self.send, [signal.SIGKILL])
        timer.start()
        codes = json.loads(self.process.stdout.readline())
        timer.cancel()
        self.is_running = False
        return codes


@contextmanager
def fork_server():
    """A ForkServer, as long as it is needed."""
    with (
        TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, __file__, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        server = ForkServer(process, Path(folder, "said.txt"))
        yield server
        if server.is_running:  # a test failed before its end
            server.codes(seconds=0)
        process.stdin.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        train_nft.load_judge = lambda *args: RuleJudge()
        train_nft.run_script(train_nft.main)
