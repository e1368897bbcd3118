"""Kills a training run with SIGKILL again and again, resumes it, and compares its end with that of an undisturbed run.

    python tests/kill_train.py --kills 20                  # one process: random moments, and moments that are aimed at
    python tests/kill_train.py --kills 20 --processes 2    # two: random moments

Aimed at are the inside of a rollout, a judgement, an update, the writing of a checkpoint's files (left half written), its
renaming, and the removal of an old one. Exit code 0 when the newest checkpoints hold the same bits.
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
import traceback
from pathlib import Path

import psutil
import torch
from conftest import tiny_kontext
from rule_judge import RuleJudge, arguments, log, write_dataset
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


def die_in(moment, calls):
    """From now on this process kills itself in the calls-th call of a moment's function."""
    owner, name = MOMENTS[moment]
    call, left = getattr(owner, name), [calls]

    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            if moment == "file":
                args[1].write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    setattr(owner, name, dying)


def forked(command, said, moment=None, calls=0):
    """A child of this process that trains and writes what it says to the file `said`: its process id."""
    if child := os.fork():
        return child
    sink = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    train_nft.load_judge = lambda *args: RuleJudge()
    if moment:
        die_in(moment, calls)
    try:
        train_nft.main(command)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def launched(command, said, processes):
    """The same over several processes."""
    script = Path(__file__).with_name("rule_judge.py")
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--main_process_port",
            "0",
            script,
            *command,
        ],
        stdout=open(said, "a"),
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).pid


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="An empty folder. [a temporary one]")
    args = parser.parse_args()
    out, rng = args.out or Path(tempfile.mkdtemp()), random.Random(args.seed)
    torch.set_num_threads(1)
    os.cpu_count = lambda: 1
    tiny_kontext().save_pretrained(out / "editor")
    write_dataset(out / "data")

    def start(name, **aim):
        command = arguments(
            out / "editor",
            out / "data",
            out / name,
            epochs=args.epochs,
            resume="auto",
            keep_checkpoints=2,
        )
        said = out / f"{name}.txt"
        return (
            forked(command, said, **aim)
            if args.processes == 1
            else launched(command, said, args.processes)
        )

    def same_end():
        ends = [sample.checkpoints(out / name)[0] for name in ("whole", "killed")]
        tensors = [
            {
                (str(path.relative_to(end)), key): value
                for path in sorted(end.rglob("*.safetensors"))
                for key, value in load_file(path).items()
            }
            for end in ends
        ]
        assert ends[0].name == ends[1].name and tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items()), (
            "the ends differ"
        )
        assert [line["loss"] for line in log(out / "whole")] == [
            line["loss"] for line in log(out / "killed")
        ]
        return len(tensors[0])

    begun = time.time()
    assert os.waitpid(start("whole"), 0)[1] == 0, f"the undisturbed run failed, see {out}/whole.txt"
    whole, kills, runs = time.time() - begun, 0, 1
    while kills < args.kills:
        moment = rng.choice([None, *MOMENTS]) if args.processes == 1 else None
        child = (
            start("killed", moment=moment, calls=rng.randint(1, 9)) if moment else start("killed")
        )
        end, status = time.time() + rng.uniform(0.2, 0.9) * whole + 60 * bool(moment), (0, 0)
        while time.time() < end and not status[0]:
            status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        if not status[0]:
            for process in (
                *psutil.Process(child).children(recursive=True),
                psutil.Process(child),
            ):  # workers, then launcher
                process.kill()
            os.waitpid(child, 0)
        elif status[1] == 0:  # it came to its end first: a new run to kill
            same_end()
            shutil.rmtree(out / "killed")
            runs += 1
            continue
        assert status[1] in (0, signal.SIGKILL), f"a resumed run failed, see {out}/killed.txt"
        kills += 1
        there = [folder.name for folder in sample.checkpoints(out / "killed")]
        print(
            f"kill {kills}, {f'in a {moment}' if moment else 'at random'}: {', '.join(there) or 'no checkpoint yet'}",
            flush=True,
        )
    assert os.waitpid(start("killed"), 0)[1] == 0, f"the resumed run failed, see {out}/killed.txt"
    print(f"{kills} kills, the same bits in {same_end()} tensors at the end of {runs} runs")
    if args.out is None:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
