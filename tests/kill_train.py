"""Ends a training run again and again, resumes it, and compares its end with an undisturbed run's.

    python tests/kill_train.py --kills 20                  # one process
    python tests/kill_train.py --kills 20 --processes 2    # two, under accelerate launch

By SIGKILL at random moments, and with one process in aimed ones: inside a rollout, a judgement, an
update, the writing of a checkpoint's files (left half written), its renaming, the removal of an old
one. By SIGTERM, SIGHUP and SIGINT at random moments, and SIGTERM to the launcher and all its
processes at once, as systemd sends it. After these a run must end by itself and have kept all
epochs that its log names. Exit code 0 when the newest checkpoints hold the same bits.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import rule_judge
import torch
from conftest import tiny_kontext
from rule_judge import FAULTS, RuleJudge, arguments, checkpoints, fork, log, write_dataset
from safetensors.torch import load_file

import sample
import train_nft

MOMENTS = {
    "rollout": (train_nft, "rollout"),
    "judgement": (RuleJudge, "submit"),
    "update": (train_nft, "nft_loss"),
    "file": (sample, "save_file"),
    "rename": (Path, "rename"),
    "removal": (shutil, "rmtree"),
}
SIGNALS = {
    "SIGTERM": signal.SIGTERM,
    "SIGHUP": signal.SIGHUP,
    "SIGINT": signal.SIGINT,
    "SIGTERM to all": signal.SIGTERM,
}


def die_in(moment, calls):
    """From now on this process kills itself in the calls-th call of a moment's function."""
    owner, name = MOMENTS[moment]
    call = getattr(owner, name)
    left = [calls]

    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            if moment == "file":
                args[1].write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    setattr(owner, name, dying)


def launch(words, said, processes):
    """The run under accelerate launch: the launcher's pid."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    with open(said, "a") as file:
        return subprocess.Popen(
            [*command, rule_judge.__file__, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).pid


class Course:
    """Two runs in one folder: `whole`, which nobody disturbs, and `killed`."""

    def __init__(self, out, processes, epochs):
        self.out = out
        self.processes = processes
        self.epochs = epochs
        tiny_kontext().save_pretrained(out / "editor")
        write_dataset(out / "data")

    def start(self, name, fault=""):
        """Starts or resumes one of the runs: the pid to wait for."""
        how = {"epochs": self.epochs, "resume": "auto", "keep_checkpoints": 2, "save_every": 3}
        words = arguments(self.out / "editor", self.out / "data", self.out / name, **how)
        if self.processes > 1:
            return launch(words, self.said(name), self.processes)
        return fork(words, self.said(name), fault)

    def said(self, name):
        return self.out / f"{name}.txt"

    def finish(self, name):
        status = os.waitpid(self.start(name), 0)[1]
        assert status == 0, f"the run {name} failed, see {self.said(name)}"

    def compare(self):
        """Stops unless both runs came to the same end: the number of tensors compared."""
        ends = []
        for name in ("whole", "killed"):
            folder = self.out / name / f"checkpoint-{checkpoints(self.out / name)[0]}"
            tensors = {}
            for path in sorted(folder.rglob("*.safetensors")):
                for key, value in load_file(path).items():
                    tensors[f"{path.relative_to(folder)} {key}"] = value
            ends.append(tensors)
        assert checkpoints(self.out / "whole")[0] == checkpoints(self.out / "killed")[0]
        assert ends[0].keys() == ends[1].keys()
        for key, value in ends[0].items():
            assert torch.equal(value, ends[1][key]), f"the ends differ in {key}"
        losses = []
        for name in ("whole", "killed"):
            losses.append([(line["epoch"], line["update/loss"]) for line in log(self.out / name)])
        assert losses[0] == losses[1], "the logs differ"
        return len(ends[0])

    def check_stop(self, how):
        """Stops unless the killed run kept every epoch that its log names."""
        if (self.out / "killed" / "log.jsonl").exists():
            logged = [line["epoch"] for line in log(self.out / "killed")]
            kept = checkpoints(self.out / "killed")
            assert not logged or kept[0] >= logged[-1], f"{how}: {logged} logged, {kept} kept"


def is_running(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def end_run(child, how):
    """Ends a run the way that is named, and waits for it: its status."""
    launcher = psutil.Process(child)
    workers = launcher.children(recursive=True)
    if how in SIGNALS:
        if how == "SIGTERM to all":
            for worker in workers:
                worker.send_signal(SIGNALS[how])
        launcher.send_signal(SIGNALS[how])
        ended = workers or [launcher]
        end = time.time() + 25
        while any(is_running(process) for process in ended):
            assert time.time() < end, f"{how}: the run did not end"
            time.sleep(0.05)
        return os.waitpid(child, 0)[1]
    for process in (*workers, launcher):
        process.kill()
    return os.waitpid(child, 0)[1]


def wait_until(child, end):
    """The status of a run that ends by itself before the time `end`, else None."""
    while time.time() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="An empty folder. [a temporary one]")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    rng = random.Random(args.seed)
    torch.set_num_threads(1)
    os.cpu_count = lambda: 1
    course = Course(out, args.processes, args.epochs)
    ways = ["SIGKILL", *SIGNALS]
    if args.processes == 1:
        ways += MOMENTS
    ways *= args.kills // len(ways) + 1
    rng.shuffle(ways)

    begun = time.time()
    course.finish("whole")
    whole = time.time() - begun
    runs = 1
    kills = 0
    while kills < args.kills:
        how = ways[kills]
        fault = ""
        patience = rng.uniform(0.2, 0.9) * whole
        if how in MOMENTS:
            fault = how
            calls = rng.randint(1, 9)
            FAULTS[how] = lambda how=how, calls=calls: die_in(how, calls)
            patience = 60
        child = course.start("killed", fault)
        status = wait_until(child, time.time() + patience)
        if status == 0:  # it came to its end first: a new run to kill
            course.compare()
            shutil.rmtree(out / "killed")
            runs += 1
            continue
        if status is None:
            end_run(child, how)
        else:
            assert status == signal.SIGKILL, f"a resumed run failed, see {course.said('killed')}"
        if how in SIGNALS:
            course.check_stop(how)
        kills += 1
        print(f"kill {kills}, {how}: checkpoints {checkpoints(out / 'killed')}", flush=True)
    course.finish("killed")
    print(f"{kills} kills, the same bits in {course.compare()} tensors at the end of {runs} runs")
    if args.out is None:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
