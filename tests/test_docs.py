"""The pages say what the code says: functions exist, links lead somewhere, commands parse, figures."""

import functools
import gzip
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import replicate
import throughput
import torch
from conftest import ROOT
from PIL import Image
from scipy import stats
from torchvision.io import decode_image

import common
from shapes import Shapes

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = ["mae_mff", "mff_feature", "ddae", "ddae_beitv2", "cim", "vision_electra", "vision_electra_simmim",
           "revcol_v2"]
TUNING = ["finetune", "transfer_seg_det", "transfer_mask2former"]


def headings(page):
    """GitHub's anchors of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    lines = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


# ---- pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            assert file.exists(), target
            assert not anchor or anchor in headings(file), target


@pytest.mark.parametrize("method", METHODS)
def test_named_functions_are_the_scripts(method):
    page = (ROOT / f"docs/{method}.md").read_text()
    table = page.split("## The equations", 1)[1].split("\n## ")[0]
    names = re.findall(r"^\| .+ \| `([\w.]+)` \|$", table, re.MULTILINE)
    assert len(names) >= 6 and len(names) == table.count("\n| ") - 1  # all rows but the head name a function
    for name in names:
        function = functools.reduce(getattr, name.split("."), importlib.import_module(method))
        assert callable(function) and function.__module__ == method, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_printed_commands_are_accepted(page):
    """As far as the flags go; files and data are not looked for."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    text = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ")
    for command in re.findall(r"^.*\.py.*$", text, re.MULTILINE):
        script, words = re.search(r"(\w+)\.py\b *([^#|]*)", command).groups()
        skip = {"...", "--draw", "--help", "--predict", "evaluate", "--attention"} & set(words.split())
        if script in (*METHODS, "cim_pixels", *TUNING) and not skip:
            if script in TUNING:
                words = re.sub(r"--weights \S+", "", words) + " --weights none"
            module = importlib.import_module(script)
            common.parse_config(module.Config, module.presets, words.split())


# ---- figures


def test_every_figure_is_shown_and_drawn():
    pytest.importorskip("matplotlib")
    figures = importlib.import_module("make_figures").FIGURES
    shown = {name for page in PAGES for name in re.findall(r"figures/(\w+)\.png", page.read_text())}
    assert shown == set(figures) == {path.stem for path in (ROOT / "docs/figures").glob("*.png")}


@pytest.mark.parametrize("name", [
    "ddae_distance", "cim_windows", "revcol_columns", "mff_weights", "ddae_beta", "losses", "labels"])
def test_figures_of_code_and_logs_are_the_committed_ones(tmp_path, monkeypatch, name):
    pytest.importorskip("matplotlib")
    make_figures = importlib.import_module("make_figures")
    monkeypatch.setattr(sys, "argv", ["make_figures.py", name, "--out", str(tmp_path)])
    make_figures.main()
    folders = tmp_path, ROOT / "docs/figures"
    new, committed = (decode_image(folder / f"{name}.png").float() for folder in folders)
    assert new.shape == committed.shape and (new - committed).abs().mean() < 1.5  # fonts differ


# ---- benchmarks


def test_verdicts():
    for difference, margin, equal, words in (
            (2.1, 2.0, False, "agrees"), (-2.1, 2.0, False, "disagrees"), (1.9, 2.0, False, "within noise"),
            (0.4, 0.5, True, "agrees"), (0.6, 0.5, True, "disagrees"), (0.6, 0.7, True, "within noise"),
            (9.0, math.nan, False, "one seed")):
        assert replicate.verdict(difference, margin, equal) == words


def test_intervals_are_those_of_a_t_test():
    """Two arms, three seeds each: pooled over them, the margin is scipy's interval of a two-sample t test."""
    values = {"mae": [40.0, 41.0, 43.0], "mff": [42.0, 45.0, 44.0]}
    results = {(name, seed): {"finetune": value}
               for name, seeds in values.items() for seed, value in enumerate(seeds)}
    args = types.SimpleNamespace(seeds=[0, 1, 2], scale="small", only=["mff"])
    scale = replicate.SCALES["small"]
    bench = types.SimpleNamespace(args=args, scale=scale, arms=replicate.arms(scale), out=ROOT / "nowhere",
                                  data=ROOT / "cifar10.npz",
                                  epochs=1.0, results=lambda: (results, {"f2c164b"}))
    row = next(line for line in replicate.table(bench).splitlines() if line.startswith("| MFF beats MAE"))
    interval = stats.ttest_ind(values["mff"], values["mae"]).confidence_interval(0.95)
    margin = (interval.high - interval.low) / 2
    assert row.endswith(f"| {(interval.high + interval.low) / 2:+.2f} ± {margin:.2f} within noise |  |")


def test_the_script_that_shrinks_photographs(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/RUNNING.md").read_text(), re.DOTALL)[1]
    (tmp_path / "PHOTOS/a").mkdir(parents=True)
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (900, 600), "red").save(tmp_path / "PHOTOS/a/wide.JPG", exif=turned)
    Image.new("RGBA", (40, 30), "red").save(tmp_path / "PHOTOS/small.png")
    (tmp_path / "shrink.py").write_text(code)
    subprocess.run([sys.executable, "shrink.py"], cwd=tmp_path, check=True, timeout=60)
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "SMALL").rglob("*.jpg")}
    assert sizes == {"wide.jpg": (256, 384), "small.jpg": (40, 30)}


def test_replicate_goes_on_and_does_nothing_twice(tmp_path, monkeypatch):
    if not os.environ.get("MINMIM_SLOW_TESTS"):
        pytest.skip("takes a minute: set MINMIM_SLOW_TESTS=1")
    drawn = Shapes((32, 32), 3, n=96)
    images, labels = zip(*(drawn.read(i) for i in range(96)), strict=True)
    np.savez(tmp_path / "shapes.npz", images=torch.stack(images).permute(0, 2, 3, 1).numpy(),
             labels=np.array(labels), split=np.arange(96) >= 64)
    small = replicate.SCALES["small"] | {"updates": 2, "batch": 32, "images": 64, "tune_epochs": 1}
    monkeypatch.setattr(replicate, "SCALES", replicate.SCALES | {"small": small})
    claim = replicate.Claim("mff", "it learns", "nowhere", "mae", "scratch", ways=("finetune", "knn"))
    monkeypatch.setattr(replicate, "CLAIMS", [claim])
    out = tmp_path / "out"
    command = ["replicate.py", "--data", tmp_path / "shapes.npz", "--scale", "small", "--only", "mff",
               "--seeds", "0", "--out", out, "--table", tmp_path / "table.md", "--logs", tmp_path / "logs"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    replicate.main()
    table = (tmp_path / "table.md").read_text()
    assert "| it learns (`mae` - `scratch`) | nowhere |" in table and "one seed" in table
    with gzip.open(tmp_path / "logs/mae.jsonl.gz", "rt") as file:
        logs = [json.loads(line) for line in file]
    top1 = {line["run"]: line["eval/top1"] for line in logs if "eval/top1" in line}
    assert f"| 1 | {top1['mae/0_finetune']:.2f} | {top1['mae/0_knn']:.2f} |" in table

    def finished():
        return {path: path.stat().st_mtime_ns for path in out.glob("*/*/output.txt")}

    before = finished()
    (out / "scratch/0_finetune/done").unlink()  # as if it had been stopped, before its log was kept
    (tmp_path / "logs/scratch.jsonl.gz").unlink()
    replicate.main()
    again = {path.parent.parent.name for path, time in finished().items() if time != before[path]}
    assert again == {"scratch"} and (tmp_path / "table.md").read_text() == table
    shutil.rmtree(out)  # logs alone are as good
    replicate.main()
    assert not finished() and (tmp_path / "table.md").read_text() == table


@pytest.mark.parametrize("name", throughput.METHODS)
def test_throughput_makes_real_updates(name):
    script, values = throughput.METHODS[name]
    small = {"model": "nano", "img_size": (32, 32), "patch_size": 4}
    more = {"generator_depth": 2} if name.startswith("CIM") else {}
    model, update = throughput.make_update(script, 2, **small, **values("nano"), **more)
    before = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
    update()
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > 0.9 * len(before)
