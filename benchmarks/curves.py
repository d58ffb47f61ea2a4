"""Draw values of several runs' log.jsonl over their updates, one panel per run. Needs matplotlib (requirements-dev.txt).

    python benchmarks/curves.py --keys train/beta/3,train/beta/6 --out beta.png "one start=runs/a" "another=runs/b"
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="TITLE=FOLDER of a run, or TITLE=FILE.jsonl")
    parser.add_argument("--keys", required=True, help="which values, separated by commas")
    parser.add_argument("--columns", type=int, default=2, help="panels side by side")
    parser.add_argument("--out", required=True, help="the picture (PNG)")
    args = parser.parse_args()
    rows = -(-len(args.runs) // args.columns)
    figure, panels = plt.subplots(rows, args.columns, sharex=True, sharey="row", squeeze=False,
                                  figsize=(4 * args.columns, 2.6 * rows), layout="constrained")
    for panel, entry in zip(panels.flat, args.runs, strict=False):
        title, path = entry.rsplit("=", 1)
        path = Path(path, "log.jsonl") if Path(path).is_dir() else Path(path)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for key in args.keys.split(","):
            points = [(line["step"], line[key]) for line in lines if key in line]
            panel.plot(*zip(*points, strict=True), label=key.removeprefix("train/"))
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(args.runs) :]:
        panel.set_axis_off()
    panels[0, 0].legend(fontsize=7)
    for panel in panels[-1]:
        panel.set_xlabel("update")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
