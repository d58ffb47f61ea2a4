"""Shared by all tests: run a script as a user would, and small data on disk."""

import atexit
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("", "benchmarks", "docs")]

import common  # noqa: E402  (found through the line above)
from shapes import Shapes  # noqa: E402

common.commented_lines(common.RunConfig)  # once for all runs: a parser reads the comments of its fields

# One folder for all processes of pytest-xdist: the first one makes it, starts the others, and removes it.
if "MINMIM_SHARED" not in os.environ:
    FOLDER = tempfile.TemporaryDirectory()
    os.environ["MINMIM_SHARED"] = FOLDER.name
SHARED = Path(os.environ["MINMIM_SHARED"])
# Importing torch takes longer than most runs: they are forked from a process that has done so.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision.transforms.v2", "conftest", "common", "torch._dynamo"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests, where pytest-xdist is installed: in two processes, file by file. (They come here, too.)"""
    whole = not hasattr(config, "workerinput") and config.args_source == config.ArgsSource.TESTPATHS
    free = config.pluginmanager.hasplugin("xdist") and not config.option.usepdb
    if whole and free and config.option.numprocesses is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        config.option.numprocesses, config.option.dist = 2, "loadfile"


def _run_here(arguments, cwd, environment, output):
    """In the forked process: what `python SCRIPT ...` does, with both streams in a file."""
    os.setsid()  # a process group of its own, so that a test can interrupt all of it
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers: as without our fork
    os.chdir(cwd)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # though pytest runs under nohup
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [str(part) for part in arguments]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as an interpreter does, but a forked process does not


@pytest.fixture(autouse=True)
def seeded():
    """Whatever a test draws is the same in every run: no test passes or fails by luck."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class Started:
    """One script in one or more processes, which find each other as under torchrun, each with one thread."""

    def __init__(self, arguments, cwd, processes=1, environment=()):
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self.output = file.name
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        script, *flags = arguments
        self.processes = []
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                     "MASTER_ADDR": "localhost", "MASTER_PORT": port} if processes > 1 else {}
            place = {name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"}
            arguments = [ROOT / script, *flags], cwd, place | dict(environment), self.output
            self.processes.append(FORKS.Process(target=_run_here, args=arguments))
            self.processes[-1].start()

    @property
    def pid(self):
        return self.processes[0].pid

    def returncode(self):
        """That of the first process with a bad one; None while all that have ended ended well."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def wait(self, timeout=300):
        """Until all have ended, or some time after one has failed, like torchrun; returns (code, output)."""
        deadline = time.monotonic() + timeout
        while self.returncode() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        code = self.returncode()
        for process in self.processes:
            process.join(10)
            process.kill()  # nothing to do if it has ended
        return code, Path(self.output).read_text()


def run_script(arguments, cwd, processes=1, expect=0, **how):
    """Run to the end, check the exit code, return the output."""
    code, output = Started(arguments, cwd, processes, **how).wait()
    assert code == expect, output
    return output


def run_command(arguments, cwd, processes=1, expect=0, launcher=()):
    """In new interpreters: `python SCRIPT ...`, or torchrun (`launcher`: its flags) if processes > 1."""
    script, *flags = arguments
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *launcher]
    launcher, threads = (torchrun, {"OMP_NUM_THREADS": "1"}) if processes > 1 else ([], {})
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, flags)]
    result = subprocess.run(command, cwd=cwd, text=True, timeout=300, env=os.environ | threads,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == expect, result.stdout
    return result.stdout


def sabotaged(folder, command, method, code, when="True", before=False):
    """The command of a script in which each call of `common.METHOD(...)` is followed, or preceded, by `code`
    if `when` holds. Both see `self`, `args`, `rank` and `count` (calls so far)."""
    script, *flags = command
    path = folder / f"sabotaged_{script}"
    path.write_text(f"""
import os, resource, runpy, signal, sys, time
import torch
import common

rank, count, original = int(os.environ.get("RANK", 0)), 0, common.{method}

def disturbed(self, *args, **named):
    global count
    count += 1
    if {before} and {when}:
        {code}
    result = original(self, *args, **named)
    if {not before} and {when}:
        {code}
    return result

common.{method} = disturbed
runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
""")
    return [path, *flags]


def once(name, make):
    """The path SHARED/name after make(path), which one of xdist's processes calls while the others wait."""
    try:
        (SHARED / f"{name}.made").mkdir()
    except FileExistsError:
        while not (SHARED / f"{name}.done").exists():
            time.sleep(0.1)
        return SHARED / name
    try:
        make(SHARED / name)
    finally:
        (SHARED / f"{name}.done").touch()
    return SHARED / name


@pytest.fixture(scope="session")
def small_npz():
    """250 + 53 labelled images: no number of processes above one shares 53 evenly, no batch divides 250."""
    def make(path):
        samples = [Shapes((32, 32), 3, n=303).read(i) for i in range(303)]
        images, labels = (np.stack([np.asarray(sample[part]) for sample in samples]) for part in (0, 1))
        np.savez(path, images=images.transpose(0, 2, 3, 1), labels=labels, split=np.arange(303) >= 250)

    return once("small.npz", make)


KILL, TERM = (f"os.kill(os.getpid(), signal.{name})" for name in ("SIGKILL", "SIGTERM"))


def killed(folder, command, when, method="Run.end_update", processes=1):
    """Run until a process kills itself after a call of common.METHOD in which `when` holds; the output."""
    attack = sabotaged(folder, command, method, KILL, when)
    return run_script(attack, folder, processes, expect=-signal.SIGKILL)


def stopped(folder, command, when, method="Run.seed", processes=1):
    """The same of a run that gets SIGTERM, saves and ends."""
    output = run_script(sabotaged(folder, command, method, TERM, when), folder, processes)
    assert "stopped after step" in output, output
    return output


def losses(out):
    """train/loss of all lines of a log."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


SNAPSHOTS = """
        import shutil
        due, save, steps = common.Run.save_due, common.Run.save, (8, 13, 18)
        common.Run.save_due = lambda run: due(run) or run.step in steps
        common.Run.save = lambda run, *weights, **meta: (
            save(run, *weights, **meta),
            run.step in steps and shutil.copytree(run.out, f"{run.out}@{run.step}"))"""


@pytest.fixture(scope="session")
def unbroken(small_npz):
    """A folder SCRIPT.py per script with its golden run: twenty updates, a log line after each, a checkpoint
    after each pass. SCRIPT.py@8, @13 and @18 are that folder after these updates."""
    from commands import SCRIPTS

    def make(folder):
        folder.mkdir()
        runs = []
        for script, command in SCRIPTS.items():
            golden = sabotaged(folder, command, "Run.start", SNAPSHOTS, "count == 1")
            golden += ["--data", small_npz, "--out", script, "--save_minutes", 10]
            runs.append(Started(golden, folder))
        for run in runs:
            code, output = run.wait()
            assert code == 0, output

    return once("unbroken", make)


@pytest.fixture
def folder(tmp_path):
    """40 small PNG photographs, so to say, in two nested class folders."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "images" / f"class{i % 2}" / "nested" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"
