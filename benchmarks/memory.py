"""Peak memory and time of an update of RevColV2 by number of columns, --memory column against plain.

Each is measured in a process of its own (GPU: the allocator's peak; CPU: resident memory; both less what was
held before the first update). Prints a Markdown table and the growth per added column, and writes both to
--out.

    python benchmarks/memory.py                          about ten minutes on two cores
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (found through the line above)
import revcol_v2  # noqa: E402


def measure(size, columns, memory, batch_size, updates):
    """{"memory": GiB that an update adds, "seconds": median of an update}; columns: of both directions"""
    cfg = common.parse_config(revcol_v2.Config, revcol_v2.presets,
                              ["--model", size, "--columns", str(columns // 2), "--memory", memory,
                               "--amp", "off"])
    run = common.Run(cfg, "benchmark")
    torch.manual_seed(0)
    model = revcol_v2.MaskedRevCol(cfg).to(run.device).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    images = torch.randn(batch_size, 3, *cfg.img_size, device=run.device)
    noise = torch.rand(batch_size, model.grid[0] * model.grid[1], device=run.device)
    before, times = run.peak_memory(), []
    for _ in range(1 + updates):
        begin = time.perf_counter()
        loss, _ = model(images, noise)
        loss.backward()
        loss.item()  # waits for the GPU
        times.append(time.perf_counter() - begin)
    return {"memory": run.peak_memory() - before, "seconds": statistics.median(times[1:])}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return print(json.dumps(measure(args.model, *json.loads(args.row), args.batch_size, args.updates)))
    lines, found = ["| columns | memory | GiB for an update | seconds |", "|---|---|---|---|"], {}
    for columns in (2, 4, 8):
        for memory in ("plain", "column"):
            flags = ["--model", args.model, "--batch_size", str(args.batch_size),
                     "--updates", str(args.updates)]
            command = [sys.executable, __file__, *flags, "--row", json.dumps([columns, memory])]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[columns, memory] = row = json.loads(output.splitlines()[-1])
            lines.append(f"| {columns} | {memory} | {row['memory']:.2f} | {row['seconds']:.2f} |")
            print(lines[-1], flush=True)
    slope = {memory: (found[8, memory]["memory"] - found[2, memory]["memory"]) / 6
             for memory in ("plain", "column")}
    cost = [found[columns, "column"]["seconds"] / found[columns, "plain"]["seconds"] for columns in (2, 4, 8)]
    cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {threads} threads"
    text = "\n".join([
        f"torch {torch.__version__}, {name}, float32; {args.model}, 224 px, batch {args.batch_size}", "",
        *lines, "",
        f"Growth per added column: plain {slope['plain']:.3f} GiB, column {slope['column']:.3f} GiB, "
        f"{slope['column'] / slope['plain']:.0%} of it. Time of column against plain: "
        + ", ".join(f"{ratio:.2f}x" for ratio in cost) + ".", ""])
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
