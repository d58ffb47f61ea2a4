"""The papers' claims at small scale: one command, resumable, one table.

Every method is pre-trained on the same images for the same number of updates of as many images, three seeds
each (Vision ELECTRA and its rival begin with an MAE that has had as many), and read out by fine-tuning and a
linear probe; each claim compares the means of two of these. What a paper's table says of hundreds of epochs
of ImageNet need not hold after some minutes of CIFAR-10.

    python benchmarks/replicate.py --data cifar10.npz                          ViT-Tiny, 2,150 updates; GPU
    python benchmarks/replicate.py --data cifar10.npz --scale small --jobs 2   ViT-nano, 500 updates; CPU
    python benchmarks/replicate.py --data tiny.npz --scale tiny_imagenet --only twelve  ViT-Tiny, 64 px; GPU
    python benchmarks/replicate.py --data tiny.npz --scale photographs --only photographs,shares    nano; CPU

`--data` is an .npz of images, 32 or 64 px square, with labels and `split`; CIFAR-10 as one:

    import numpy as np, torchvision
    parts = [torchvision.datasets.CIFAR10("data", train, download=True) for train in (True, False)]
    np.savez("cifar10.npz", images=np.concatenate([part.data for part in parts]),
             labels=np.concatenate([part.targets for part in parts]),
             split=np.repeat([0, 1], [50_000, 10_000]))

Repeat the command to go on after a stop: what is finished is not run again, nor what --logs holds already.
`--only mff,ddae` runs a part, `--jobs` so many at a time. Runs go to --out, the tables to --table, and all
logs, one compressed file per kind of run, to --logs.
"""

import argparse
import collections
import gzip
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import readings
import torch
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
MARKS = "<!-- replicate.py writes from here -->\n\n", "\n<!-- to here -->\n"  # in docs/RESULTS.md
# model, updates and batch of pre-training, base learning rates; training images and passes of the read-outs
SCALES = {
    "small": {"model": "nano", "updates": 500, "batch": 64, "mae": "6e-3", "ve": "2e-3", "revcol": "6e-3",
              "cim": "2e-3",
              "images": 10_000, "tune_epochs": 2},
    "full": {"model": "tiny", "updates": 2150, "batch": 256, "mae": "1.5e-3", "ve": "5e-4",
             "revcol": "1.5e-3", "cim": "2e-3",
             "images": 50_000, "tune_epochs": 5},
    "tiny_imagenet": {"model": "tiny", "updates": 4000, "batch": 128, "mae": "3e-3", "ve": "1e-3",
                      "revcol": "3e-3", "cim": "2e-3", "images": 100_000, "tune_epochs": 1,
                      "tune_updates": 600, "img_size": 64, "patch_size": 8,
                      "resnet": "--img_size 64 --patch_size 16"},
    "photographs": {"model": "nano", "updates": 2000, "batch": 128, "mae": "4e-3", "ve": "1e-3",
                    "revcol": "4e-3", "cim": "2e-3", "images": 100_000, "tune_epochs": 1,
                    "tune_updates": 600, "img_size": 64, "patch_size": 8,
                    "resnet": "--img_size 64 --patch_size 16"},
}
READ_OUTS = {
    "finetune": "--batch_size 64 --base_lr 2e-3 --warmup_epochs 0.3 --augment crop --mixup 0 --cutmix 0 "
                "--erasing 0 --drop_path 0 --eval_every 100",
    "linear": "--mode linear --augment none --batch_size 1024 --base_lr 1.0 --epochs 50 --warmup_epochs 5 "
              "--eval_every 50",
}
READ_OUTS["finetune_.9"] = f"{READ_OUTS['finetune']} --layer_decay 0.9"
READ_OUTS["linear_mean"] = f"{READ_OUTS['linear']} --pool avg"
READ_OUTS["knn"] = "--mode knn"
SHARES = {"share_1": 0.01, "share_5": 0.05, "share_25": 0.25, "share_100": 1.0}  # of the labelled images
WAYS = READ_OUTS | dict.fromkeys(SHARES, READ_OUTS["finetune"])
HEADS = {"finetune": "fine-tuned", "finetune_.9": "fine-tuned, layer decay 0.9", "linear": "linear probe",
         "linear_mean": "probe of the mean token", "knn": "kNN",
         **{way: f"fine-tuned, {share:.0%} of the labels" for way, share in SHARES.items()}}


@dataclass
class Arm:
    """One way to pre-train: the script and its flags; `start`: arms whose files it begins with, by flag."""

    script: str
    flags: str
    start: dict = field(default_factory=dict)


def arms(scale):
    """{name: Arm}, all with as many updates of the same images, and with crops and rates of their own"""
    last = {"nano": 3, "tiny": 11}[scale["model"]]
    mae, fused = f"--base_lr {scale['mae']} --decoder_depth 1", f"--fuse_layers {last}"
    ddae, steps = f"{mae} --target mae --momentum 0.99", "--no-distill --decoder mae"
    cim = f"--lr {scale['cim']} --generator_depth {min(4, (last + 1) // 2)} --initial mae"
    image = scale.get("resnet", "--img_size 64 --patch_size 8")
    resnet = f"{cim} --enhancer resnet50 --resnet_width 16 {image}"
    tokenizer = {"--tokenizer": "tokenizer/tokenizer.pth"}
    # with the decoder that Vision ELECTRA's generator has
    raw = f"--base_lr {scale['mae']} {fused} --target raw"
    ve, revcol = f"--base_lr {scale['ve']}", f"--base_lr {scale['revcol']} --memory plain"
    continued = {"--generator_init": "raw/last.pth", "--discriminator_init": "raw/encoder.pth"}
    own = {"mae": f"{mae} {fused}", "ddae": ddae, "dds": f"{ddae} {steps}", "ve": ve, "cim": cim,
           "slow30": 2 * float(scale["mae"]) / 30, "slow100": 2 * float(scale["mae"]) / 100,
           "raw": raw, "half": "{half}", "few": "{few}", "unseen": "{unseen}",
           "window": scale.get("patch_size", 4) // 2}
    more = {name: Arm(*words.format(**own).split(" ", 1), start)
            for name, (words, start) in readings.ARMS.items()}
    return more | {
        "mae": Arm("mae_mff.py", f"{mae} {fused}"),
        "mff": Arm("mae_mff.py", mae),
        "mff_detach": Arm("mae_mff.py", f"{mae} --detach_shallow"),
        "pixmim": Arm("mae_mff.py", f"{mae} {fused} --target pixmim"),
        "blocks": Arm("ddae.py", f"{ddae} {steps} --no-dynamic --num_levels 1"),
        "d": Arm("ddae.py", f"{ddae} {steps} --num_levels 1"),
        "ds": Arm("ddae.py", f"{ddae} {steps} --no-dynamic"),
        "dds": Arm("ddae.py", f"{ddae} {steps}"),
        "ddae": Arm("ddae.py", ddae),
        "tokenizer": Arm("convert_dalle.py", "--train --vocab_size 512 --tokenizer_width 16 --lr 3e-3"),
        "respix": Arm("cim.py", cim, tokenizer),
        "respix_none": Arm("cim.py", f"{cim} --pixel_norm none", tokenizer),
        "respix_patch": Arm("cim.py", f"{cim} --pixel_norm patch", tokenizer),
        "respix_argmax": Arm("cim.py", f"{cim} --sampling argmax", tokenizer),
        "respix_uniform": Arm("cim.py", f"{cim} --sampling uniform", tokenizer),
        "revdet": Arm("cim.py", f"{cim} --objective revdet", tokenizer),
        "resnet_respix": Arm("cim.py", resnet, tokenizer),
        "resnet_revdet": Arm("cim.py", f"{resnet} --objective revdet", tokenizer),
        "raw": Arm("mae_mff.py", raw),
        "raw_on": Arm("mae_mff.py", raw, {"--init": "raw/last.pth"}),
        "ve": Arm("vision_electra.py", ve, continued),
        "ve_half": Arm("vision_electra.py", f"{ve} --gan_weight 0.5", continued),
        "revcol": Arm("revcol_v2.py", revcol),
        "revcol_flat": Arm("revcol_v2.py", f"{revcol} --model {scale['model']}_flat"),
        "scratch": Arm(None, ""),
        "resnet_scratch": Arm(None, "--model resnet50 --resnet_width 16 --img_size 64"),
        "revcol_scratch": Arm(None, f"--model revcol_{scale['model']}"),
    }


@dataclass
class Claim:
    """`first` is better than `second`; paper: where it says so, and by how many points (on ImageNet)."""

    group: str
    words: str
    paper: str
    first: str
    second: str
    equal: bool = False  # the paper finds no difference
    ways: tuple = ("finetune", "linear")


PAPERS = "mff,ddae,cim,ve,revcol"  # groups of claims
TUNED = ("finetune",)  # the paper probes no features
CLAIMS = [
    Claim("mff", "MFF beats MAE", "MFF's main claim", "mff", "mae"),
    Claim("mff", "no gradients through the shortcuts: as good", "MFF A.8: -0.1, probe -0.2",
          "mff_detach", "mff", equal=True),
    Claim("mff", "PixMIM's target and crop beat MAE's", "PixMIM's main claim", "pixmim", "mae"),
    Claim("ddae", "DDAE (with MAE's target) beats MAE", "DDAE, abstract: 83.5 after 100 epochs",
          "ddae", "mae"),
    Claim("ddae", "DDAE beats MAE with the same masks", "DDAE, abstract", "ddae", "blocks"),
    Claim("ddae", "the dynamic loss helps", "DDAE, table 3", "d", "blocks"),
    Claim("ddae", "deep supervision helps", "DDAE, table 3", "ds", "blocks"),
    Claim("ddae", "both together help more", "DDAE, table 3", "dds", "ds"),
    Claim("ddae", "self-distillation helps", "DDAE, table 4", "ddae", "dds"),
    Claim("cim", "ResPix beats random weights, ViT", "CIM, table 1: +1.0", "respix", "scratch", ways=TUNED),
    Claim("cim", "RevDet beats random weights, ViT", "CIM, table 1: +1.0", "revdet", "scratch", ways=TUNED),
    Claim("cim", "ResPix beats random weights, ResNet", "CIM, table 2: +0.1",
          "resnet_respix", "resnet_scratch", ways=TUNED),
    Claim("cim", "RevDet beats random weights, ResNet", "CIM, table 2: +0.7",
          "resnet_revdet", "resnet_scratch", ways=TUNED),
    Claim("cim", "the window beats no normalisation", "CIM, table 6: +0.5",
          "respix", "respix_none", ways=TUNED),
    Claim("cim", "the window beats patches", "CIM, table 6: +0.3", "respix", "respix_patch", ways=TUNED),
    Claim("cim", "sampling beats argmax", "CIM, table 7: +4.8", "respix", "respix_argmax", ways=TUNED),
    Claim("cim", "sampling beats uniform tokens", "CIM, table 7: +6.1",
          "respix", "respix_uniform", ways=TUNED),
    Claim("ve", "continual VE beats its start", "VE, supplement 0.2", "ve", "raw"),
    Claim("ve", "continual VE beats as many more updates of MAE", "VE, abstract: +1.17 over others",
          "ve", "raw_on"),
    Claim("ve", "a weight of 0.2 beats 0.5", "VE, supplement: +6.7", "ve", "ve_half"),
    Claim("revcol", "pre-training beats random weights", "RevColV2, supplement 2.1: +1.6",
          "revcol", "revcol_scratch"),
    Claim("layout", "a pyramid beats levels of one stride, at equal FLOPs", "ours: the paper shows neither",
          "revcol", "revcol_flat"),
]
CLAIMS += [
    *(Claim(*claim, ways=ways) for *claim, ways in readings.CLAIMS),
    *(replace(claim, group="photographs", ways=(*readings.PROBES, "knn", *SHARES))
      for claim in CLAIMS if claim.second == "mae"),
    *(Claim("shares", f"{words} beats random weights", "", name, scratch, ways=tuple(SHARES))
      for words, name, scratch in (
          ("MAE", "mae", "scratch"), ("MFF", "mff", "scratch"), ("DDAE", "ddae", "scratch"),
          ("CIM (RevDet) on a ResNet", "resnet_revdet", "resnet_scratch"),
          ("CIM (RevDet) on a ViT", "revdet", "scratch"),
          ("CIM (ResPix, windows of half a patch) on a ViT", "respix_half_window", "scratch"),
          ("RevColV2", "revcol", "revcol_scratch"))),
]


class Bench:
    def __init__(self, args):
        self.args, self.scale = args, SCALES[args.scale]
        self.out, self.data = args.out.resolve(), args.data.resolve()
        self.arms = arms(self.scale)
        self.logs = read_logs(args.logs)  # {run: lines} of earlier runs: these need not run again
        # arms that start from the same run wait for one another
        self.locks = collections.defaultdict(threading.Lock)
        if not self.data.is_file():
            sys.exit(f"--data {args.data} does not exist: --help says how to make one")
        with np.load(self.data) as data:
            if missing := {"images", "labels", "split"} - set(data):
                sys.exit(f"--data {args.data} has no {', '.join(sorted(missing))}: see --help")
            images, labels, split = (data[name] for name in ("images", "labels", "split"))
        train = np.flatnonzero(split == 0)
        self.epochs = self.scale["updates"] * self.scale["batch"] / len(train)
        pixels = images[train[:5000]].reshape(-1, 3) / 255
        mean, std = (",".join(f"{v:.4f}" for v in f(pixels, axis=0)) for f in (np.mean, np.std))
        sides = self.scale.get("img_size", 32), self.scale.get("patch_size", 4)
        self.shape = ["--img_size", sides[0], "--patch_size", sides[1], "--mean", mean, "--std", std]
        self.out.mkdir(parents=True, exist_ok=True)
        settings = json.dumps([self.scale, READ_OUTS, len(train), mean, std])
        file = self.out / "settings.json"
        if file.exists() and file.read_text() != settings:
            sys.exit(f"{self.out} has runs of another scale or of other images: give another --out")
        file.write_text(settings)
        first = train[: self.scale["images"]]
        if len(np.unique(labels[first])) < len(np.unique(labels)):  # they lie class by class
            first = evenly(train, len(first))
        if len(np.unique(labels[first])) < len(np.unique(labels)):
            sys.exit(f"{self.data}: {len(first):,} evenly spaced training images lack a class")
        self.train, self.labelled = train, first  # the latter: what the read-outs learn from

    def part(self, name, train):
        """Path of out/NAME.npz: of --data the training images with these numbers, and all test images."""
        path = self.out / f"{name}.npz"
        with self.locks[path.name]:
            if not path.exists():
                with np.load(self.data) as data:
                    keep = np.concatenate([train, np.flatnonzero(data["split"] == 1)])
                    arrays = {name: data[name][keep] for name in ("images", "labels", "split")}
                with open(path.with_suffix(".tmp"), "wb") as file:
                    np.savez(file, **arrays)
                os.replace(path.with_suffix(".tmp"), path)
        return path

    def run(self, name, command):
        """One script into out/name, unless that is done: its file `done` names the commit."""
        folder = self.out / name
        with self.locks[name]:
            if (folder / "done").exists():
                return
            folder.mkdir(parents=True, exist_ok=True)
            words = [sys.executable, ROOT / command[0], *command[1:], "--out", folder / "run"]
            words += ["--resume"] if "knn" not in words else []  # kNN has nothing to resume
            threads = max(1, (os.cpu_count() or 1) // self.args.jobs)
            words += ["--workers", threads, "--log_every", max(20, self.scale["updates"] // 40)]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            commit = f"{git_commit()} with torch {torch.__version__} on {machine()}"
            with open(folder / "output.txt", "ab") as file:
                words = [str(word) for word in words]
                code = subprocess.run(words, stdout=file, stderr=file, env=environment).returncode
            # A script that was asked to stop has saved, and ends with 0 too.
            if code or "\ndone:" not in (folder / "output.txt").read_text():
                raise RuntimeError(f"{name} did not end (exit code {code}); see {folder}/output.txt")
            (folder / "done").write_text(commit)
            print(f"done: {name}", flush=True)

    def pretrain(self, name, seed):
        """Path of the encoder."""
        arm, scale = self.arms[name], self.scale
        seed = 0 if name == "tokenizer" else seed
        start = []
        for flag, file in arm.start.items():
            other, file = file.split("/")
            start += [flag, self.pretrain(other, seed).with_name(file)]
        model = ["--model", scale["model"]] if name != "tokenizer" else []
        few, paths = evenly(self.train, 2000), {}
        if "{few}" in arm.flags:
            paths["few"] = self.part("few", few)
        if "{unseen}" in arm.flags:
            paths["unseen"] = self.part("unseen", evenly(np.setdiff1d(self.train, few), 2000))
        self.run(f"{name}/{seed}", [arm.script, "--data", self.data, *self.shape, *model, "--batch_size",
                                    scale["batch"],
                                    "--epochs", f"{self.epochs:.6g}", "--warmup_epochs",
                                    f"{self.epochs / 10:.6g}",
                                    "--pictures", 0, "--seed", seed, *start,
                                    *arm.flags.format(half=f"{self.epochs / 2:.4g}", **paths).split()])
        return self.out / name / str(seed) / "run/encoder.pth"

    def read_out(self, name, seed, ways):
        """Pre-train one arm with one seed, unless that is done, and read it out."""
        flags = self.arms[name].flags.split()
        left = [way for way in ways if f"{name}/{seed}_{way}" not in self.logs]
        if not left and (ways or f"{name}/{seed}" in self.logs):  # without ways its training log is wanted
            return
        if self.arms[name].script:
            size = flags[flags.index("--img_size"):][:2] if "--img_size" in flags else []
            shape = [*self.shape, *size, "--weights", self.pretrain(name, seed)]
        else:
            shape = [*self.shape, "--model", self.scale["model"], *flags, "--weights", "none",
                     "--layer_decay", 1]
        for way in left:
            epochs, share = ["--epochs", self.scale["tune_epochs"]], SHARES.get(way, 1.0)
            images = evenly(self.labelled, int(share * len(self.labelled)))
            data = self.part("labelled" if share == 1.0 else f"labelled_{share:g}", images)
            if "--mode" in WAYS[way]:  # a probe's epochs stand in its flags
                epochs = []
            elif way in SHARES:  # the same number of updates, whatever the share
                epochs = self.scale["tune_updates"] * 64 / len(images)
                epochs = ["--epochs", epochs, "--warmup_epochs", epochs / 10]
            words = ["finetune.py", "--data", data, *shape, *WAYS[way].split(), *epochs, "--seed", seed]
            self.run(f"{name}/{seed}_{way}", words)

    def read_log(self, run):
        """Lines of a finished run, each with its commit; none of another."""
        folder = self.out / run
        if not (folder / "done").exists():
            return self.logs.get(run, [])
        commit = (folder / "done").read_text()
        with open(folder / "run/log.jsonl") as log:
            return [{"run": run, "commit": commit} | json.loads(line) for line in log]

    def end_of_log(self, name):
        """Means of readings.WATCHED over the last five lines of all seeds, in words"""
        lines = [line for seed in self.args.seeds for line in self.read_log(f"{name}/{seed}")[-5:]]
        values = {key: [line[f"train/{key}"] for line in lines if f"train/{key}" in line]
                  for key in readings.WATCHED}
        return ", ".join(f"{key} {statistics.mean(some):.3g}" for key, some in values.items() if some)

    def results(self):
        """{(arm, seed): {way: top-1}} of all that is done, and the commits that it was done at."""
        found, commits = collections.defaultdict(dict), set()
        for name, seed, way in itertools.product(self.arms, self.args.seeds, WAYS):
            if lines := self.read_log(f"{name}/{seed}_{way}"):
                found[name, seed][way] = lines[-1]["eval/top1"]
                commits.add(lines[-1]["commit"])
        logged = itertools.product((claim for claim in CLAIMS if not claim.ways), self.args.seeds)
        found |= {(name, seed): {} for claim, seed in logged for name in (claim.first, claim.second)
                  if self.read_log(f"{name}/{seed}")}
        return found, commits


def evenly(numbers, n):
    """n evenly spaced ones of them."""
    return numbers[np.linspace(0, len(numbers), n, endpoint=False).astype(int)]


def git_commit():
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def machine():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, no GPU"


def read_logs(folder):
    """What write_logs wrote: {run: its lines}."""
    runs = collections.defaultdict(list)
    for file in folder.glob("*.jsonl.gz"):
        with gzip.open(file, "rt") as log:
            for line in map(json.loads, log):
                runs[line["run"]].append(line)
    return runs


def pooled_spread(results, way):
    """Standard deviation of one run's top-1 over seeds, pooled over all arms, and its degrees of freedom."""
    by_arm = collections.defaultdict(list)
    for (name, _), result in results.items():
        if way in result:
            by_arm[name].append(result[way])
    freedom = sum(len(values) - 1 for values in by_arm.values())
    squares = sum(statistics.pvariance(values) * len(values) for values in by_arm.values())
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def verdict(difference, margin, equal):
    """agrees, disagrees, or within noise: a difference of means, and the half-width of its 95 % interval
    (NaN: unknown). Equal means: the whole interval within a point."""
    if math.isnan(margin):
        return "one seed"
    if equal and abs(difference) + margin < 1:
        return "agrees"
    if abs(difference) < margin:
        return "within noise"
    return "disagrees" if equal or difference < 0 else "agrees"


def cell(values):
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" if values else ""


def table(bench):
    """Markdown: one row per claim, one per arm, of all that is done."""
    scale, seeds = bench.scale, bench.args.seeds
    results, commits = bench.results()
    claims = [claim for claim in CLAIMS if claim.group in bench.args.only]
    shown = [way for way in WAYS if any(way in claim.ways for claim in claims)]
    heads = " | ".join(HEADS[way] for way in shown)
    spreads, widths = {}, {}
    for way in WAYS:
        spreads[way], freedom = pooled_spread(results, way)
        # of one run's interval
        widths[way] = spreads[way] * stats.t.ppf(0.975, freedom) if freedom else math.nan
    how = [f"fine-tuned (passes: {scale['tune_epochs']})"] if "finetune" in shown else []
    if set(SHARES) & set(shown):
        how += [f"fine-tuned on a share of them (updates of 64: {scale['tune_updates']})"]
    if "linear" in shown:
        how += ["by a linear probe on frozen features (class token; RevColV2: mean)"]
    if "knn" in shown:
        how += ["by a vote of nearest neighbours (class token)"]
    lines = [
        f"`python benchmarks/replicate.py --data {bench.data.name} --scale {bench.args.scale}`: size "
        f"{scale['model']}, patches of {scale.get('patch_size', 4)} px, {scale['updates']} updates of "
        f"{scale['batch']} images "
        f"({bench.epochs:.2f} passes). Read out on {scale['images']:,} training images: {', '.join(how)}; "
        "layer decay 0.75, of random weights 1. Top-1 on the "
        f"test images in %, mean ± standard deviation over seeds {', '.join(map(str, seeds))}. Runs of "
        f"commit {', '.join(sorted(commits))}; table of {git_commit()}.", "",
        "Differences are points of top-1 ± half their 95 % interval, with the spread over seeds pooled over "
        f"all runs ({', '.join(f'{HEADS[way]} {spreads[way]:.2f}' for way in shown)} points; nan: one seed); "
        "expect about 5 % false positives. *Within noise*: the interval contains 0. A claim of no difference "
        "*agrees* if the interval stays within a point.", "",
        f"| claim | paper (ImageNet) | {heads} |", "|---|---|" + "---|" * len(shown)]
    for claim in claims:
        cells = []
        for way in shown:
            first, second = ([results[name, seed][way] for seed in seeds
                              if way in results.get((name, seed), {})]
                             for name in (claim.first, claim.second))
            if first and second and way in claim.ways:
                difference = statistics.mean(first) - statistics.mean(second)
                margin = widths[way] * math.sqrt(1 / len(first) + 1 / len(second))
                around = "" if math.isnan(margin) else f" ± {margin:.2f}"
                cells.append(f"{difference:+.2f}{around} {verdict(difference, margin, claim.equal)}")
            else:
                cells.append("")
        if any(cells):
            lines.append(f"| {claim.words} (`{claim.first}` - `{claim.second}`) | {claim.paper} | "
                         + " | ".join(cells) + " |")
    watch = any(claim.group.endswith("_readings") for claim in claims)
    lines += ["", f"| run | seeds | {heads} |" + " end of the training log |" * watch,
              "|---|---|" + "---|" * (len(shown) + watch)]
    for name in bench.arms:
        found = [results[name, seed] for seed in seeds if (name, seed) in results]
        if found:
            cells = [cell([result[way] for result in found if way in result]) for way in shown]
            cells += [bench.end_of_log(name)] if watch else []
            lines.append(f"| `{name}` | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_table(text, file):
    """Between the two marks of a page that has them, or as the whole file."""
    page = file.read_text(encoding="utf-8") if file.exists() else ""
    if MARKS[0] in page:
        before, rest = page.split(MARKS[0])
        text = before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1]
    file.write_text(text, encoding="utf-8")


def write_logs(bench, folder):
    """NAME.jsonl.gz: log lines of all finished runs of one arm, numbers of six digits; `run`: arm/seed, or
    arm/seed_read-out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in bench.arms:
        runs = {f"{name}/{done.parent.name}" for done in bench.out.glob(f"{name}/*/done")}
        runs |= {run for run in bench.logs if run.split("/")[0] == name}
        short = [{key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in line.items()}
                 for run in sorted(runs) for line in bench.read_log(run)]
        lines = [json.dumps(line) for line in short]
        if lines:
            with (open(folder / f"{name}.jsonl.gz", "wb") as file,
                  gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed):
                packed.write(("\n".join(lines) + "\n").encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")],
                        default=[0, 1, 2])
    parser.add_argument("--only", help=f"groups (default {PAPERS}; also photographs, shares, layout, "
                        "ddae_readings,cim_readings,ve_readings,twelve,twelve_more: readings.py)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--no_runs", action="store_true", help="only write table and logs of what is done")
    parser.add_argument("--out", type=Path, help="default runs/replicate_SCALE")
    parser.add_argument("--table", type=Path,
                        help="file, or page with marks, such as docs/RESULTS.md; default OUT/table.md")
    parser.add_argument("--logs", type=Path, help="default OUT/logs")
    args = parser.parse_args()
    groups = dict.fromkeys(claim.group for claim in CLAIMS)
    wanted = args.only = (args.only or PAPERS).split(",")
    if unknown := set(wanted) - set(groups):
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(groups)}")
    args.out = args.out or Path(f"runs/replicate_{args.scale}")
    args.table, args.logs = args.table or args.out / "table.md", args.logs or args.out / "logs"
    bench, ways = Bench(args), collections.defaultdict(dict)
    # Seed by seed within a group, so that its table of one seed is there early
    for group, seed, claim in itertools.product(() if args.no_runs else wanted, args.seeds, CLAIMS):
        for name in (claim.first, claim.second) if claim.group == group else ():
            ways[name, seed] |= dict.fromkeys(claim.ways)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(bench.read_out, *run, own) for run, own in ways.items()]
        failed = 0
        try:
            for job in jobs:
                try:
                    job.result()
                except RuntimeError as error:  # the others may go on
                    failed += 1
                    print(error, flush=True)
                write_table(table(bench), args.table)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    write_logs(bench, args.logs)
    text = table(bench)
    write_table(text, args.table)
    print(text)
    if failed:
        sys.exit(f"{failed} of {len(jobs)} read-outs failed, see above")


if __name__ == "__main__":
    main()
