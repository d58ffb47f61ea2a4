"""What the papers' runs cost: docs/COSTS.md.

    python benchmarks/costs.py --data PHOTOS --table docs/COSTS.md

Counted, not measured: the floating-point operations of a real update of each method (bf16, on fake tensors:
tests/fake_cuda.py), and the bytes of its parameters, gradients, optimizer and of what waits for the backward
pass. From these follow GPU-hours at a share of the peak, images per second of one GPU and, with what one core
of this machine decodes and crops of PHOTOS in a second, the cores that must feed it.
"""

import argparse
import math
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from replicate import git_commit  # noqa: E402
from throughput import table  # noqa: E402

import common  # noqa: E402
import finetune  # noqa: E402
from augment import train_transform  # noqa: E402
from convert_dalle import DVAE  # noqa: E402

IMAGES = 1_281_167  # ImageNet-1K's, to train on
PEAK = {"H100": 989e12, "A100": 312e12}  # FLOP per second, bf16, dense: the maker's numbers
SHARE = 0.25  # of the peak: what MAE reaches with --compile (docs/GPU.md: 4,126 images/s)
PROBE = "--weights none --mode linear --augment crop --mixup 0 --cutmix 0 --erasing 0 --smoothing 0"
RUNS = [  # name, script, size, epochs, largest micro-batch of one process, flags
    ("MAE", "mae_mff", "base", 800, 256, "--fuse_layers 11"),
    ("MAE", "mae_mff", "large", 800, 256, "--fuse_layers 23"),
    ("MFF", "mae_mff", "base", 800, 256, ""),
    ("DDAE", "ddae", "base", 800, 256, ""),
    ("DDAE", "ddae", "large", 800, 256, ""),
    ("CIM-ResPix, ViT", "cim", "base", 300, 256, "--tokenizer DALLE"),
    ("CIM-RevDet, ViT", "cim", "base", 300, 256, "--tokenizer DALLE --objective revdet"),
    ("CIM-ResPix, ResNet-50", "cim", "small", 300, 256, "--tokenizer DALLE --enhancer resnet50"),
    ("Vision ELECTRA", "vision_electra", "base", 50, 160, ""),
    ("RevColV2", "revcol_v2", "base", 1600, 256, ""),
    ("RevColV2", "revcol_v2", "large", 1600, 256, ""),
    ("fine-tuning, ViT", "finetune", "base", 100, 256, "--weights none --warmup_epochs 0"),
    ("fine-tuning, ViT", "finetune", "large", 50, 256, "--weights none --warmup_epochs 0"),
    ("linear probe, ViT", "finetune", "base", 90, 256, f"{PROBE} --warmup_epochs 0"),
]
# To run before: nothing is saved, and the parameters are counted, those that learn and others.
COUNT = """
def load(run, model, **state):
    run.state, run.last_save, common.counts = {"model": model, **state}, 0.0, [0, 0]
    for x in model.parameters():
        common.counts[x.requires_grad] += x.numel()

common.Run.load, common.Run.save, common.Run.export = load, lambda *_, **__: None, lambda *_: None
"""


def trace(script, size, flags, batch, folder):
    """What fake_cuda finds in an update of `batch` images; numbers of parameters, [frozen, learning]"""
    import fake_cuda

    words = f"{flags} --model {size} --data {folder}/images.npz --workers 0 --batch_size {batch}"
    words = words.replace("DALLE", f"{folder}/dalle.pth") + " --pictures 0" * (script != "finetune")
    command = script, [*words.split(), "--epochs", 2 * batch / 64], COUNT, False
    found = fake_cuda.task("trace", command, f"{tempfile.mkdtemp(dir=folder)}/run")
    return found, getattr(common, "counts", None)


def per_core(data, augment, seconds=10):
    """Images per second that one process reads and augments"""
    flags = ["--data", data, "--weights", "none", "--augment", augment]
    cfg = common.parse_config(finetune.Config, finetune.presets, flags)
    samples = common.KeyedSamples(common.open_data(cfg, "all"), train_transform(cfg), 0, 2)
    begin, n = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        samples[0, n % len(samples.source)]
        n += 1
    return n / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder of photographs, to measure a core with")
    parser.add_argument("--table", default="docs/COSTS.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [path.stat().st_size for path in Path(args.data).rglob("*") if path.is_file()]
    kilobytes = sum(sizes) / len(sizes) / 1000
    rates = {augment: per_core(args.data, augment) for augment in ("crop", "full")}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        images, labels = np.zeros((96, 32, 32, 3), np.uint8), np.arange(96) * 999 // 95  # of 1,000 classes
        np.savez(f"{folder}/images.npz", images=images, labels=labels, split=np.arange(96) >= 64)
        torch.save({"model": DVAE((8, 8)).state_dict()}, f"{folder}/dalle.pth")
        for name, script, size, epochs, micro_batch, flags in RUNS:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                found, more = (pool.apply(trace, (script, size, flags, batch, folder)) for batch in (8, 16))
            assert isinstance(found[0], dict), found[0]
            (found, (frozen, learning)), (more, _) = found, more
            flops = (more["flops"] - found["flops"]) / 8
            stored = found["stored"] + (more["stored"] - found["stored"]) / 8 * (micro_batch - 8)
            memory = (16 * learning + 4 * frozen + stored) / 2**30
            hours = [flops * IMAGES * epochs / (SHARE * peak) / 3600 for peak in PEAK.values()]
            rate = SHARE * PEAK["H100"] / flops
            cores = rate / rates["full" if name.startswith("fine") else "crop"]
            lines.append([name, size, f"{flops / 1e9:.0f}", epochs, *(f"{x:,.0f}" for x in hours),
                          f"{rate:,.0f}", f"{math.ceil(cores)}", f"{math.ceil(memory)}"])
            print(*lines[-1], flush=True)
    head = ["run", "size", "GFLOP per image", "epochs", *(f"{name} hours" for name in PEAK),
            "images/s of an H100", "cores per H100", "GiB"]
    text = f"""# What a paper's run costs

Written by `python benchmarks/costs.py --data PHOTOS`; commit {git_commit()}, torch {torch.__version__}.

- Hours of one card for {IMAGES:,} images (ImageNet-1K, 224 px; about 140 GB on disk) at {SHARE:.0%} of the
  maker's peak, which MAE reached with `--compile` on [an H100](GPU.md); N cards take an N-th.
  RevColV2 reached 11 % there, uncompiled: double its hours.
- Cores: one of this machine decodes and crops {rates["crop"]:.0f} photographs in a second, and gives
  {rates["full"]:.0f} the full augmentation, of {kilobytes:.0f} kB on average. ImageNet's have 110 kB and take
  longer in proportion, unless they are [shrunk](RUNNING.md#speed).
- GiB: parameters, gradients, optimizer and stored activations at the default micro-batch of one process (256;
  Vision ELECTRA 160), without what an operation needs for itself, nor the column that RevColV2 recomputes
  (Base took 12 GiB on the H100); half the micro-batch, about half of it.

""" + "\n".join(table(head, lines))
    Path(args.table).write_text(text)


if __name__ == "__main__":
    main()
