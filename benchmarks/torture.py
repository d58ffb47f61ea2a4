"""The slow attacks on a run; the fast ones are in tests/. Prints Markdown and writes it to --out.

kills        Every script: pre-training, fine-tuning, segmentation, detection. Runs of twenty updates
             are killed with SIGKILL again and again, at random moments after their start, and resumed,
             until they end, until there were --kills of them. Weights, optimizer and log of every run must
             equal, to the last bit, those of one that was left alone. Settings rotate: loader workers or
             none, a checkpoint after every update or now and then. What a process was doing when it was
             killed is what it prints on SIGUSR2, just before.
writers      A run is stopped (SIGSTOP) while another is started in its folder: refused, nothing changed.
orphans      torchrun is killed: its processes save and end, and the run can be resumed.
terminals    stdout full, closed, a pipe that ended: the run ends as with a terminal.
bits         One bit of a checkpoint is flipped, 100 times: found, or harmless.
annotations  Malformed files of boxes and masks, under a memory limit: one line and exit code 2, or a count.
inputs       A pipe, a link to itself, a JPEG of 300 scans among the images: named, in time.
memory       2,000 updates of the demo: growth of the resident memory of the process and its loader workers.
files        200,000 small image files in 200 folders: time and memory to index them.

    python benchmarks/torture.py                         about an hour on two cores; Linux
    python benchmarks/torture.py --attacks files
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("images_per_second", "data_wait", "peak_memory", "time")
SETTINGS = [["--workers", "2", "--save_minutes", "0"], ["--workers", "0", "--save_minutes", "0"],
            ["--workers", "1", "--save_minutes", "0.03"]]


def start(out, *flags):
    """The demo, in a new interpreter."""
    command = [sys.executable, str(ROOT / "mae_mff.py"), "--demo", "--pictures", "1", "--out", str(out),
               *flags]
    with open(f"{out}.txt", "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def log(out):
    """Lines of a run's log without the timings."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def state(out):
    """{name: value} of all that must be the same at the end of two runs that differ in what they met."""
    content = {"log": log(out)}
    for path in out.glob("*.pth"):
        if path.name != "previous.pth":
            saved = torch.load(path, weights_only=True)
            # has --out in it
            content |= {f"{path.name} {name}": value for name, value in saved.items() if name != "config"}
    return content


def same(a, b):
    """Whether two values of nested plain types and tensors are equal to the last bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def family(pid):
    """{process id: resident MB} of a process and its children."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        except OSError:
            continue
        if int(folder.name) == pid or int(status["PPid"]) == pid:
            found[int(folder.name)] = int(status.get("VmRSS", "0 kB").split()[0]) / 1024
    return found


def commands(folder):
    """{name: command} of the nine kinds of runs, on a small .npz in `folder`, shapes for boxes and maps."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from commands import GOLDEN, command

    from shapes import Shapes

    if not (folder / "small.npz").exists():
        samples = [Shapes((32, 32), 3, n=303).read(i) for i in range(303)]
        images, labels = (np.stack([np.asarray(sample[part]) for sample in samples]) for part in (0, 1))
        np.savez(folder / "small.npz", images=images.transpose(0, 2, 3, 1), labels=labels,
                 split=np.arange(303) >= 250)
    dense = ("seg", "det")
    return {name: [*command(name), "--data", "shapes" if name in dense else str(folder / "small.npz")]
            for name in GOLDEN}


def undisturbed(command, folder):
    """Seconds of a run that is left alone, in folder/whole."""
    from conftest import Started  # forks from a process that has imported torch: a start takes no seconds

    begin = time.monotonic()
    code, output = Started([*command, "--out", str(folder / "whole")], folder).wait(3000)
    if code:
        sys.exit(f"the undisturbed run failed: {output}")
    return time.monotonic() - begin


def kill_one(name, command, folder, wanted, length, seed):
    """Row of the table: runs of one script, killed `wanted` times in all."""
    from conftest import Started

    moments, done, runs, doing = random.Random(seed), 0, 0, dict.fromkeys(("start", "file", "evaluation"), 0)
    differ, expected = [], state(folder / "whole")
    while done < wanted and not differ:
        out, flags = folder / f"run{runs}", [*command, "--resume", *SETTINGS[runs % len(SETTINGS)]]
        runs += 1
        while True:
            run = Started([*flags, "--out", str(out)], folder)
            time.sleep(moments.uniform(0, 0.4 * length) if done < wanted else 0)
            if done < wanted and run.returncode() is None:
                with contextlib.suppress(ProcessLookupError):
                    if (out / ".lock").exists() and f"process {run.pid} " in (out / ".lock").read_text():
                        os.kill(run.pid, signal.SIGUSR2)
                        time.sleep(0.02)
                    os.kill(run.pid, signal.SIGKILL)
            code, output = run.wait(3000)
            os.unlink(run.output)
            if code != -signal.SIGKILL:
                break
            done += 1
            stack = output.rpartition("most recent call first")[2]
            doing["start"] += not (out / "last.pth").exists()
            doing["file"] += "in write_atomically" in stack
            doing["evaluation"] += bool(re.search(r" in (evaluate|eval_batches)\b", stack))
        if code or not same(state(out), expected):
            differ.append(str(out))
        else:
            shutil.rmtree(out)
    ends = f"DIFFERENT: {' '.join(differ)}" if differ else "identical"
    row = " | ".join(map(str, ["", name, runs, done, *doing.values(), ends, ""])).strip()
    print(row, flush=True)
    return row, done, not differ


def kills(folder, wanted, seed):
    jobs = commands(folder)
    for name in jobs:
        (folder / name).mkdir()
    with ThreadPoolExecutor(2) as pool:
        seconds = list(pool.map(lambda name: undisturbed(jobs[name], folder / name), jobs))
        # Slow scripts get fewer, but not less than a third of an equal share.
        weights = [max(1 / x, sum(1 / y for y in seconds) / len(jobs) / 3) for x in seconds]
        rows = list(pool.map(
            lambda i, job: kill_one(*job, folder / job[0], math.ceil(wanted * weights[i] / sum(weights)),
                                    seconds[i], seed + i), range(len(jobs)), jobs.items()))
    lost = sum(not good for _, _, good in rows)
    return ["| script | runs | kills | before a checkpoint | writing a file | in an evaluation | weights, "
            "optimizer, log |", "|---|---|---|---|---|---|---|", *[row for row, _, _ in rows], "",
            f"{sum(done for _, done, _ in rows)} kills in all; scripts with a difference: {lost}."]


def writers(folder):
    """Two runs in one folder, ten times; the first is stopped wherever it is."""
    from conftest import Started

    command = [*commands(folder)["mae_mff"], "--out", str(folder / "run")]
    refused, moments = 0, random.Random(0)
    first = Started(command, folder)
    while not (folder / "run/last.pth").exists():
        time.sleep(0.02)
    for _ in range(10):
        time.sleep(moments.uniform(0, 0.2))
        os.kill(first.pid, signal.SIGSTOP)
        before = {path: path.read_bytes() for path in (folder / "run").glob("*.*") if path.is_file()}
        code, output = Started([*command, "--resume"], folder).wait()
        after = {path: path.read_bytes() for path in (folder / "run").glob("*.*") if path.is_file()}
        refused += code == 2 and f"process {first.pid} on" in output and before == after
        os.kill(first.pid, signal.SIGCONT)
        if first.returncode() is not None:
            break
    code, _ = first.wait()
    return [f"A second run in the folder of a stopped one: refused {refused} of 10 times, nothing changed; "
            f"the first one ended with {code}."]


def orphans(folder):
    script, *flags = commands(folder)["mae_mff"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    saved, seconds = 0, []
    for i in range(3):
        out = folder / f"run{i}"
        with open(f"{out}.txt", "wb") as output:
            command = [*torchrun, str(ROOT / script), *flags, "--epochs", "900", "--out", str(out)]
            launcher = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        while not (out / "last.pth").exists():
            time.sleep(0.1)
        ranks = family(launcher.pid).keys() - {launcher.pid}
        launcher.kill()
        launcher.wait()
        begin = time.monotonic()
        while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() - begin < 60:
            time.sleep(0.05)
        seconds.append(time.monotonic() - begin)
        saved += torch.load(out / "last.pth", weights_only=True)["step"] == log(out)[-1]["step"]
    return [f"torchrun killed, 3 times: its 2 processes ended after {max(seconds):.1f} s at most; checkpoint "
            f"and log agree {saved} of 3 times."]


def terminals(folder):
    script, *flags = commands(folder)["mae_mff"]
    ends = {}
    for name, where in {"terminal": ">plain.txt", "full": ">/dev/full 2>&1", "closed": ">&- 2>&-",
                        "pipe that ended": "2>&1 | true"}.items():
        words = " ".join(map(str, [sys.executable, ROOT / script, *flags, "--out", f"'{folder / name}'"]))
        line = f"set -o pipefail; {words} {where}"
        ends[name] = subprocess.run(["bash", "-c", line], cwd=folder).returncode
    equal = [name for name in ends if same(state(folder / name), state(folder / "terminal"))]
    return [f"stdout and stderr: exit codes {ends}; equal to the first: {', '.join(equal)}."]


def bits(folder):
    from conftest import run_script

    from common import UserError, read_file

    run_script([*commands(folder)["mae_mff"], "--epochs", "0.2", "--out", str(folder / "run")], folder)
    data, moments = (folder / "run/last.pth").read_bytes(), random.Random(0)
    found = harmless = 0
    good = torch.load(folder / "run/last.pth", weights_only=True)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
        (folder / "bad.pth").write_bytes(damaged)
        try:
            harmless += same(read_file(folder / "bad.pth"), good)
        except UserError:
            found += 1
    return [f"One flipped bit in last.pth, 100 times: {found} refused, {harmless} harmless (padding), "
            f"{100 - found - harmless} loaded wrong."]


def annotations(folder):
    """Each malformed file of tests/malformed.py, checked in a process that may take 6 GB."""
    commands(folder)
    from conftest import Started
    from malformed import MALFORMED, write_set

    ends = {}
    for name, spoil in MALFORMED.items():
        data = write_set(folder / "set", spoil)
        limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))"
        script = folder / "limited.py"
        script.write_text(f"{limit}\nimport runpy\nrunpy.run_path({str(ROOT / 'transfer_seg_det.py')!r}, "
                          "run_name='__main__')\n")
        flags = ["--task", "det", "--weights", "none", "--model", "nano", "--check_data", "--workers", "0"]
        code, output = Started([script, *flags, "--data", str(data)], folder).wait(60)
        ends[name] = code if code in (0, 2) and "Traceback" not in output else output.strip()[-200:]
        shutil.rmtree(data)
    bad = {name: end for name, end in ends.items() if end not in (0, 2)}
    return [f"{len(ends)} malformed annotation files, 6 GB: {sum(end == 2 for end in ends.values())} refused "
            f"in one line, {sum(end == 0 for end in ends.values())} read, the wrong left out and counted, "
            f"{len(bad)} crashed{f': {bad}' if bad else ''}."]


def inputs(folder):
    from conftest import Started

    rng, images = np.random.default_rng(0), folder / "images"
    images.mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(images / f"{i:02}.jpg")
    os.mkfifo(images / "pipe.jpg")
    (images / "loop.jpg").symlink_to("loop.jpg")
    large = Image.fromarray(rng.integers(0, 256, (2000, 2000, 3), dtype=np.uint8))
    large.save(images / "bomb.jpg", progressive=True)
    data = (images / "bomb.jpg").read_bytes()
    last = data.rindex(b"\xff\xda")
    (images / "bomb.jpg").write_bytes(data[:last] + data[last:-2] * 300 + data[-2:])
    command = ["mae_mff.py", "--demo", "--data", str(images), "--batch_size", "10", "--epochs", "3"]
    begin = time.monotonic()
    code, output = Started([*command, "--out", str(folder / "run")], folder).wait(120)
    named = [name for name in ("pipe.jpg", "loop.jpg", "bomb.jpg") if f"/{name}: " in output]
    return [f"A pipe, a link to itself, a JPEG of 300 scans: exit code {code} after "
            f"{time.monotonic() - begin:.0f} s, named: {', '.join(named)}."]


def memory(folder):
    """Resident memory at the 200th and at the 2,000th update."""
    out = folder / "memory"
    process, seen = start(out, "--epochs", "13", "--log_every", "10", "--workers", "2", "--pictures", "8"), {}
    while process.poll() is None:
        log = out / "log.jsonl"
        text = log.read_text() if log.exists() else ""
        step = json.loads(text.splitlines()[-1])["step"] if text.endswith("\n") else 0
        for mark in (200, 2000):
            if step >= mark and mark not in seen:
                seen[mark] = family(process.pid)
        time.sleep(0.2)
    early, late = seen[200], seen[2000]
    if process.returncode or early.keys() != late.keys():
        sys.exit(f"the run failed or its workers changed: see {out}.txt")
    rows = [f"| {'training process' if pid == process.pid else 'loader worker'} | {early[pid]:.0f} | "
            f"{late[pid]:.0f} | {late[pid] - early[pid]:+.0f} |" for pid in sorted(early)]
    return ["| resident memory, MB | update 200 | update 2,000 | growth |", "|---|---|---|---|", *rows]


INDEX = """
import resource, sys, time
import common
def resident(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, begin = resident(), time.perf_counter()
source = common.open_folder(sys.argv[1], 3)
print(f"| {len(source):,} | {time.perf_counter() - begin:.2f} s | {resident() - before:.0f} MB |")
"""


def files():
    """Time and peak memory of indexing, on top of what importing torch takes."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(200):
            os.makedirs(f"{folder}/class_{i:03}")
            for j in range(1000):
                Path(f"{folder}/class_{i:03}/image_{i:03}_{j:06}.jpg").touch()
        row = subprocess.run([sys.executable, "-c", INDEX, folder], cwd=ROOT, check=True, capture_output=True,
                             text=True).stdout
    return ["| image files in 200 class folders | indexed in | growth of peak memory |", "|---|---|---|",
            row.strip()]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    attacks = {"files": files, "writers": writers, "orphans": orphans, "terminals": terminals, "bits": bits,
               "annotations": annotations, "inputs": inputs, "memory": memory, "kills": kills}
    parser.add_argument("--attacks", default=",".join(attacks),
                        help="which, separated by commas (default all)")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, default=Path("runs/torture"),
                        help="new folder (default runs/torture)")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True)
    commands(args.out)
    parts = []
    for name in args.attacks.split(","):
        folder = args.out / name
        folder.mkdir()
        more = (args.kills, args.seed) if name == "kills" else ()
        parts += [*attacks[name](*(() if name == "files" else (folder,)), *more), ""]
        (args.out / "torture.md").write_text("\n".join(parts))
    print("\n" + "\n".join(parts))


if __name__ == "__main__":
    main()
