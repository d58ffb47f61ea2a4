"""Few photographs: pre-training further from weights that have seen others, against starting anew.

Of Tiny ImageNet (--data, an .npz with images, labels and split) 180 classes stand for what public weights
have seen; N photographs of each of the other 20 are the user's. All arms take the same number of updates on
these, are fine-tuned on them with their labels, and scored on their held-out images. Writes a table (--out).

    python benchmarks/small_data.py --data tiny.npz --runs FOLDER --out table.md
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from replicate import git_commit

ROOT = Path(__file__).resolve().parent.parent
MODEL = "--model nano --patch_size 8 --img_size 64 --amp auto --log_every 100"
PRETRAIN = f"mae_mff.py {MODEL} --batch_size 128 --base_lr 2e-3 --pictures 0"
FINETUNE = "finetune.py --epochs 10 --warmup_epochs 1 --batch_size 64 --lr 1e-3 --eval_every 10"


def split(data, folder, n):
    """others.npz: images of 180 classes; own.npz: n of each of the last 20, and all that are held out."""
    arrays = np.load(data)
    images, labels, marks = (arrays[name] for name in ("images", "labels", "split"))
    np.savez(folder / "others.npz", images=images[(labels < 180) & (marks == 0)])
    kept = [np.flatnonzero((labels == kind) & (marks == 0))[:n] for kind in range(180, 200)]
    kept = np.concatenate([*kept, np.flatnonzero((labels >= 180) & (marks != 0))])
    np.savez(folder / "own.npz", images=images[kept], labels=labels[kept] - 180, split=marks[kept])


def run(command, folder, out):
    """The last line of the log; a run that is done is not repeated."""
    log = folder / out / "log.jsonl"
    done = folder / f"{out}.done"
    if not done.exists():
        script, *flags = command.split()
        words = [sys.executable, str(ROOT / script), *flags, "--out", out]
        words += ["--resume"] if log.exists() and "knn" not in command else []
        subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        done.touch()
    return json.loads(log.read_text().splitlines()[-1])


def main():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--data", required=True, help="Tiny ImageNet as an .npz")
    parser.add_argument("--runs", required=True, type=Path, help="folder of the runs; continued if it exists")
    parser.add_argument("--out", required=True, type=Path, help="the table, Markdown")
    parser.add_argument("--n", type=int, default=150, help="photographs of each of the 20 classes")
    parser.add_argument("--epochs", type=float, default=25, help="passes over them")
    parser.add_argument("--base_epochs", type=float, default=4, help="passes over the other classes")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    if not (args.runs / "own.npz").exists():
        split(args.data, args.runs, args.n)
    run(f"{PRETRAIN} --data others.npz --epochs {args.base_epochs}", args.runs, "base")
    scores = {}
    for seed in range(args.seeds):
        anew = f"{PRETRAIN} --data own.npz --epochs {args.epochs} --seed {seed}"
        run(anew, args.runs, f"anew_{seed}")
        run(f"{anew} --init base/last.pth", args.runs, f"further_{seed}")
        arms = {"no pre-training": "none --model nano --patch_size 8 --img_size 64",
                "pre-trained on these photographs alone": f"anew_{seed}/encoder.pth",
                "weights from others as they are": "base/encoder.pth",
                "weights from others, pre-trained further": f"further_{seed}/encoder.pth"}
        for number, (arm, weights) in enumerate(arms.items()):
            flags = f"--data own.npz --seed {seed} --weights {weights}"
            for name, command in (("kNN", "finetune.py --mode knn"), ("fine-tuned", FINETUNE)):
                line = run(f"{command} {flags}", args.runs, f"{number}_{name}_{seed}")
                scores.setdefault(arm, {}).setdefault(name, []).append(line["eval/top1"])
    rows = [f"| {arm} | " + " | ".join(f"{statistics.mean(x):.1f} ({min(x):.1f} to {max(x):.1f})"
                                       for x in columns.values()) + " |" for arm, columns in scores.items()]
    head = (f"{20 * args.n:,} photographs of 20 classes, {args.epochs:g} passes; ViT-nano, 64 px; top-1 in "
            f"%, mean and range of {args.seeds} seeds. {git_commit()}, {os.cpu_count()} CPU cores.")
    args.out.write_text("\n".join([head, "", "| weights | kNN | fine-tuned |", "|---|---|---|", *rows, ""]))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
