"""ImageNet-22K's number of images in tars, on this machine: the seconds to open their list, and the memory
of a training process with its loader workers.

    python benchmarks/many_images.py                    14 million entries, 8 workers

The entries are simulated: they all lead to a few real images, under names as long as ImageNet's.
"""

import argparse
import io
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
import types
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import shards  # noqa: E402


def real_tar(path, n=8):
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            file = io.BytesIO()
            Image.fromarray(np.full((64, 64, 3), 9 * i, np.uint8)).save(file, "jpeg")
            member = tarfile.TarInfo(f"n{i:08}/n{i:08}_{i}.JPEG")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))


def simulate(path, n):
    """A list of n entries next to the tar `path`, in place of its own"""
    source = shards.open_shards([path], 3)
    small, where = source.index, np.arange(n) % len(source)
    numbers = np.arange(n)
    names = np.char.add(np.char.add(b"n00000000/n00000000_", (numbers % 100_000).astype("S5")), b".JPEG")
    index = {name: small[name][where] for name in ("shard", "size")}
    index["size"] = index["size"].astype(np.int32)
    index["offset"] = small["offset"][where].astype(np.int64)  # as of tars of more than 2 GB
    index |= {"name": names, "labels": (numbers % 21841).astype(np.int16), "tars": small["tars"],
              "classes": np.array([str(i) for i in range(21841)])}
    with open(next(path.parent.glob(".list_of_*.npz")), "wb") as file:
        np.savez(file, **index)


def memory(pid):
    """Bytes of the process and its children: their own, and their share of what they have in common."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = next(line for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if "Pss:" in line)
    return int(own.split()[1]) * 1024 + sum(memory(child) for child in children)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=14_000_000)
    parser.add_argument("--workers", type=int, default=8)
    cfg = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.tar"
        real_tar(path)
        make = multiprocessing.Process(target=simulate, args=(path, cfg.images))  # whose memory is not ours
        make.start()
        make.join()
        listed = next(path.parent.glob(".list_of_*.npz")).stat().st_size
        begin = time.perf_counter()
        source = shards.open_shards([path], 3)
        seconds = time.perf_counter() - begin
        settings = types.SimpleNamespace(seed=0, max_bad=0.01)
        run = types.SimpleNamespace(step=0, steps=50, accum_steps=1, world_size=1, rank=0, micro_batch=64,
                                    n=len(source), cfg=settings, workers=cfg.workers,
                                    device=types.SimpleNamespace(type="cpu"), new_bad_files={}, bad_files={})
        samples = common.KeyedSamples(source, common.RandomResizedCrop((32, 32)), 0, 1)
        batches = common.Run.load_batches(run, samples, common.training_keys(run))
        for _ in range(40):
            next(batches)
        print(f"{len(source):,} entries, a list of {listed / 2**20:.0f} MiB: opened in {seconds:.1f} s; "
              f"{memory(os.getpid()) / 2**30:.2f} GiB with {cfg.workers} workers, after 40 batches of 64")


if __name__ == "__main__":
    main()
