"""The slow attacks on a run; the fast ones are tests/test_attacks.py. Prints Markdown and writes it to --out.

kills    The demo is killed with SIGKILL again and again, at random moments after its start, and resumed,
         until it ends; then the next one, until there were --kills of them. Every run's weights, optimizer
         and log must equal, to the last bit, those of one that was left alone. Settings rotate: loader
         workers or none, a checkpoint after every update or second.
memory   2,000 updates of the demo: growth of the resident memory of the process and of its loader workers.
files    200,000 small image files in 200 folders: time and memory to index them.

    python benchmarks/torture.py                         about half an hour on two cores; Linux
    python benchmarks/torture.py --attacks files
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("images_per_second", "data_wait", "peak_memory")
SETTINGS = [["--workers", "2", "--save_minutes", "0.02"], ["--workers", "0", "--save_minutes", "0"],
            ["--workers", "1", "--save_minutes", "0"]]


def start(out, *flags):
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


def kills(folder, wanted, seed):
    """Rows of the table: one per run."""
    moments = random.Random(seed)
    begin = time.monotonic()
    if start(folder / "whole").wait():
        sys.exit(f"the undisturbed run failed: see {folder}/whole.txt")
    expected, length = state(folder / "whole"), time.monotonic() - begin
    print(f"undisturbed: {length:.0f} s", flush=True)
    done, rows, orphans = 0, [], set()
    while done < wanted:
        out, flags = folder / f"run{len(rows)}", SETTINGS[len(rows) % len(SETTINGS)]
        count = {"kills": 0, "early": 0, "writing": 0}
        while True:
            process = start(out, "--resume", *flags)
            time.sleep(moments.uniform(2, 11) if done < wanted else 0)
            if done < wanted and process.poll() is None:
                orphans |= family(process.pid).keys()
                process.send_signal(signal.SIGKILL)
                done += 1
                count["kills"] += 1
                count["early"] += not (out / "last.pth").exists()
                count["writing"] += any(out.glob("*.tmp"))
            if process.wait() != -signal.SIGKILL:
                break
        ok = process.returncode == 0 and same(state(out), expected)
        rows.append(f"| {' '.join(flags)} | {count['kills']} | {count['early']} | {count['writing']} | "
                    f"{'identical' if ok else f'DIFFERENT, see {out}.txt'} |")
        print(rows[-1], flush=True)
    time.sleep(15)
    left = [pid for pid in orphans if Path(f"/proc/{pid}").exists()]
    return ["| settings | kills | before the first checkpoint | while writing | weights, optimizer, log |",
            "|---|---|---|---|---|", *rows, "",
            f"{done} kills in all; processes left over 15 s after the last: {len(left)}."]


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
    parser.add_argument("--attacks", default="files,kills,memory",
                        help="which, separated by commas (default all)")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, default=Path("runs/torture"),
                        help="new folder (default runs/torture)")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    attacks = {"files": files, "kills": lambda: kills(args.out, args.kills, args.seed),
               "memory": lambda: memory(args.out)}
    parts = []
    for name in args.attacks.split(","):
        parts += [*attacks[name](), ""]
        (args.out / "torture.md").write_text("\n".join(parts))
    print("\n" + "\n".join(parts))


if __name__ == "__main__":
    main()
