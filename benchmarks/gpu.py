"""The scripts on one GPU: do they run, and how fast. One command, under ten minutes; Markdown goes to --out.

checks   Twenty updates of every script in float32, bf16 and fp16, three at a time: exit code, and losses
         against tests/golden.json, which a CPU wrote in float32. A run that is killed and resumed against one
         that was left alone, and on two GPUs, if there are two, against one. The tests that need a GPU.
demos    The demo of each pre-training script, all at once: exit code, seconds, first and last loss.
data     With --data PHOTOS: updates of MAE, ViT-B/16, on these: images/s, share of the time spent waiting.
speed    One update of every method, ViT-B/16 at 224 px in bf16, from pinned 8-bit images to the optimizer:
         images/s, share of the speed of a large matrix product (MFU; FLOPs counted, attention included), peak
         memory; eager and compiled. MAE's also in fp16 and at another micro-batch; transformers' ViTMAE.

    python benchmarks/gpu.py --data PHOTOS    on a CPU: a rehearsal at tiny size
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from throughput import (
    DEVICE,
    METHODS,
    ROOT,
    count_flops,
    mae_mff,
    make_update,
    matrix_product,
    peer_step,
    table,
    turns,
)
from torture import commands

from common import EXTENSIONS

CUDA = DEVICE.type == "cuda"
SIZE, BATCH = ("base", 256) if CUDA else ("tiny", 2)
HEAVY = {"CIM-ResPix": 4, "CIM-RevDet": 4, "Vision ELECTRA": 2, "DDAE": 2}  # their batch is BATCH over this


def log(folder):
    """The lines of a run's log that are on training"""
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "train/loss" in line]


def launch(words, folder, processes=1):
    """(exit code, losses of log.jsonl, end of the output) of a script"""
    script, *flags = words
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *torchrun * (processes > 1), str(ROOT / script), *flags, "--out", str(folder)]
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.returncode, [line["train/loss"] for line in log(folder)], result.stdout.strip()[-300:]


def furthest(losses, expected):
    return max((abs(a / b - 1) for a, b in zip(losses, expected, strict=False)), default=1.0)


def checks(folder):
    jobs, precisions = commands(folder), ("off", "bf16", "fp16") if CUDA else ("off", "bf16")
    from commands import GOLDEN

    def row(job):
        name, words = job
        cells = [name]
        for amp in precisions:
            late = ["--eval_every", "99"] if "--iters" in words else []
            code, losses, output = launch([*words, "--amp", amp, *late], folder / f"{name}_{amp}")
            ends = f"{len(losses)} updates" if code == 0 else f"FAILED ({code}): {output}"
            cells.append(f"{ends}, {furthest(losses, GOLDEN[name]['losses']):.1%}")
        print(cells, flush=True)
        return cells

    with ThreadPoolExecutor(3 if CUDA else 1) as pool:
        rows = list(pool.map(row, jobs.items()))
    words = [*jobs["mae_mff"], "--amp", "bf16"]
    whole = launch(words, folder / "whole")[1]
    script, *flags = [*words, "--out", str(folder / "killed")]
    run = subprocess.Popen([sys.executable, str(ROOT / script), *flags], stdout=subprocess.DEVNULL)
    while not (folder / "killed/last.pth").exists() and run.poll() is None:
        time.sleep(0.01)
    run.kill()
    run.wait()
    resumed = launch([*words, "--resume"], folder / "killed")[1]
    two = "Two processes: there is one GPU."
    if torch.cuda.device_count() > 1 or not CUDA:
        code, losses, output = launch([*jobs["mae_mff"], "--amp", "off"], folder / "two", 2)
        two = (f"Two processes, {'NCCL' if CUDA else 'gloo'}: {len(losses)} updates, "
               f"{furthest(losses, whole):.1%} from one in bf16." if code == 0
               else f"Two processes FAILED ({code}): {output}")
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = subprocess.run([*pytest, "tests/test_revcol_v2.py", "-k", "column_equals"], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE)
    return ["Updates of the golden runs, and the largest relative difference of their losses from a CPU's in "
            "float32; detection draws boxes by their scores, so rounding changes what it learns from.", "",
            *table(["script", "float32 (TF32)", *precisions[1:]], rows),
            f"Killed and resumed against unbroken, bf16: {len(resumed)} of {len(whole)} losses, largest "
            f"difference {furthest(resumed, whole):.2g}.", "", two, "",
            f"Tests of RevColV2 that a GPU adds to: {tests.stdout.strip().splitlines()[-1]}.", ""]


def demos(folder):
    def row(script):
        short = [] if CUDA else ["--epochs", "0.03", "--warmup_epochs", "0.01"]
        begin = time.monotonic()
        code, losses, output = launch([script, "--demo", *short], folder / script)
        if code:
            return [script, f"FAILED ({code}): {output}", "", "", ""]
        return [script, "ends", f"{time.monotonic() - begin:.0f}", f"{losses[0]:.3f}", f"{losses[-1]:.3f}"]

    scripts = [f"{module.__name__}.py" for module in dict.fromkeys(module for module, _ in METHODS.values())]
    with ThreadPoolExecutor(5 if CUDA else 1) as pool:
        rows = list(pool.map(row, scripts))
    return table(["demo", "", "seconds, all at once", "first loss", "last loss"], rows)


def data(folder, photos):
    if not photos:
        return ["Not measured: no --data.", ""]
    n = sum(path.suffix.lower() in EXTENSIONS for path in Path(photos).rglob("*"))
    batch = min(BATCH, 1 << (n.bit_length() - 1))
    size = [] if CUDA else ["--model", "tiny"]
    updates, every = (60, "20") if CUDA else (6, "3")
    words = ["mae_mff.py", "--data", photos, "--batch_size", str(batch), "--epochs", str(updates * batch / n),
             "--log_every", every, "--pictures", "0", *size]
    code, _, output = launch(words, folder / "run")
    if code:
        return [f"FAILED ({code}): {output}", ""]
    last = log(folder / "run")[-1]
    return [f"{n} photographs, batch {batch}: {last['images_per_second']:,.0f} images/s, "
            f"{last['data_wait']:.0%} of the time spent waiting for images; {os.cpu_count()} cores.", ""]


def measure(update, images, flops, peak):
    """[images/s, MFU, GiB] of a function that makes one update"""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = turns({"": update}, 5)[""]
    memory = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0
    return [f"{images / seconds:,.0f}", f"{flops / seconds / peak:.0%}", f"{memory:.1f}"]


def speed():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.set_float32_matmul_precision("high")
    product, work = matrix_product("bf16")
    peak, rows, small = work / turns({"": product}, 10)[""], [], 8 if CUDA else 1
    for name, (script, values) in METHODS.items():
        if name == "RevColV2" and SIZE not in script.SIZES:
            continue
        batch = max(1, BATCH // HEAVY.get(name, 1))
        flops = count_flops(make_update(script, small, "bf16", model=SIZE, **values(SIZE))[1]) / small
        for compiled in (False, True) if CUDA else (False,):
            what = "bf16, compiled" if compiled else "bf16"
            update = make_update(script, batch, "bf16", compiled, model=SIZE, **values(SIZE))[1]
            cells = measure(update, batch, flops * batch, peak)
            rows.append([name, what, batch, f"{flops / 1e9:.0f}", *cells])
            print(rows[-1], flush=True)
        if name == "MAE":
            mae = flops
    values = METHODS["MAE"][1](SIZE)
    for amp, batch in (("bf16", BATCH // 4), ("fp16", BATCH)) if CUDA else ():
        update = make_update(mae_mff, batch, amp, model=SIZE, **values)[1]
        rows.append(["MAE", amp, batch, f"{mae / 1e9:.0f}", *measure(update, batch, mae * batch, peak)])
        print(rows[-1], flush=True)
    images = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)
    for compiled in (False, True) if CUDA else (False,):
        model = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True))
        if compiled:
            model.compile()
        update = peer_step(model, images, "bf16", lambda output: output.loss)
        what = "bf16, compiled" if compiled else "bf16"
        rows.append(["transformers' ViTMAE (base)", what, BATCH, f"{mae / 1e9:.0f}",
                     *measure(update, BATCH, mae * BATCH, peak)])
        print(rows[-1], flush=True)
    head = ["update", "precision", "batch", "GFLOP per image", "images/s", "MFU", "peak GiB"]
    return [f"ViT {SIZE}, 224 px. A large bf16 matrix product runs at {peak / 1e12:,.1f} TFLOP/s: 100 % MFU. "
            "FLOPs are those of our update; transformers' row is given MAE's.", "", *table(head, rows)]


PARTS = {"checks": lambda folder, _: checks(folder), "demos": lambda folder, _: demos(folder), "data": data,
         "speed": lambda *_: speed()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="checks,demos,data,speed", help="by commas (default all)")
    parser.add_argument("--data", help="photographs, for that part")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.md"), help="(default runs/gpu.md)")
    parser.add_argument("--commit", default="", help="to be named, where there is no git")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    lines = ["# On a GPU", "", f"Written by `python benchmarks/gpu.py`. One {name}, torch "
             f"{torch.__version__}, commit {args.commit}.", ""]
    for part in args.parts.split(","):
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](Path(folder), args.data)
        lines += [f"## {part.capitalize()}", "", *found]
        args.out.write_text("\n".join(lines))
        print(f"{part}: {time.monotonic() - begin:.0f} s", flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
