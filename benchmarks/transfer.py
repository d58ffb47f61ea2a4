"""Memory and time of one update of transfer_seg_det.py, or what a row names, each in a process of its own.

Peak memory (of the GPU, or what this process holds on a CPU) and the median time after a first update, with
random images and targets, AdamW states included. Prints a Markdown table and writes it to --out.

    python benchmarks/transfer.py                        about ten minutes on two cores
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
import transfer_mask2former  # noqa: E402
import transfer_seg_det as transfer  # noqa: E402

ROWS = [  # flags, images per forward pass
    ("--task seg --model base --img_size 512", 2),
    ("--task seg --model base --img_size 512 --recompute", 2),
    ("--task seg --model resnet50 --head fcn --img_size 512", 2),
    ("transfer_mask2former.py --model base --img_size 512", 2),
    ("--task det --model base --img_size 512", 1),
    ("--task det --model base --img_size 512 --detector cascade", 1),
    ("--task det --model base --img_size 768", 1),
    ("--task det --model base --img_size 1024", 1),
    ("--task det --model base --img_size 1024 --recompute", 1),
    ("--task det --model resnet50 --img_size 512", 1),
    ("--task det --model resnet50 --img_size 1024", 1),
]


def measure(flags, n, updates):
    """{"memory": GiB, "parameters": millions, "seconds": median of an update}"""
    words = flags.split()
    script = transfer_mask2former if words[0].endswith(".py") and words.pop(0) else transfer
    cfg = common.parse_config(script.Config, script.presets, [*words, "--weights", "none"])
    run, (H, W) = common.Run(cfg, "benchmark"), cfg.img_size
    torch.manual_seed(0)
    model = script.make_model(cfg, 150 if cfg.task == "seg" else 80, True).to(run.device).train()
    optimizer = transfer.make_optimizer(model, cfg)
    common.set_lr(optimizer, cfg.lr)
    images = torch.randn(n, 3, H, W, device=run.device)
    if cfg.head == "mask2former":  # nine classes in an image
        classes = torch.arange(9, device=run.device)
        squares = classes.view(3, 3).repeat_interleave(H // 3 + 1, 0).repeat_interleave(W // 3 + 1, 1)
        targets = squares[:H, :W].expand(n, -1, -1), classes.expand(n, -1)
    elif cfg.task == "seg":
        targets = torch.randint(150, (n, H, W), device=run.device)
    else:  # eight objects in an image
        corners = torch.randint(0, H // 2, (n, 8, 2))
        boxes = torch.cat([corners, corners + torch.randint(16, H // 2, (n, 8, 2))], dim=2).float()
        targets = [{"boxes": b, "labels": torch.randint(1, 81, (8,)),
                    "masks": torch.zeros(8, H, W, dtype=torch.uint8)}
                   for b in boxes]
        for target in targets:
            for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].long().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
        targets = [{name: value.to(run.device) for name, value in target.items()} for target in targets]
    times = []
    for _ in range(1 + updates):
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            loss, _ = model(images, targets)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the GPU
        times.append(time.perf_counter() - begin)
    return {"memory": run.peak_memory(), "seconds": statistics.median(times[1:]),
            "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "precision": str(run.amp_dtype or torch.float32)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return print(json.dumps(measure(*json.loads(args.row), args.updates)))
    lines = ["| flags | images | parameters | peak memory | seconds per update |", "|---|---|---|---|---|"]
    for flags, n in ROWS:
        command = [sys.executable, __file__, "--updates", str(args.updates), "--row", json.dumps([flags, n])]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        lines.append(f"| `{flags}` | {n} | {found['parameters']:.1f} M | {found['memory']:.1f} GiB | "
                     f"{found['seconds']:.1f} |")
        print(lines[-1], flush=True)
    cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {threads} threads"
    text = "\n".join([f"torch {torch.__version__}, {name}, {found['precision']}", "", *lines, ""])
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
