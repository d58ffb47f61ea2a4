"""The commands as users type them: the demo, every mode, own data, wrong input."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import SCRIPTS
from conftest import ROOT, run_command, run_script
from torture import log

import common
import mae_mff

MAE = SCRIPTS["mae_mff.py"]


# ---- the demo, and what it writes


def test_demo_learns_says_what_to_type_next_and_writes_plain_files_with_their_settings(tmp_path):
    flags = ["--epochs", 0.12, "--warmup_epochs", 0.04, "--log_every", 1]
    output = run_command(["mae_mff.py", "--demo", *flags], tmp_path)
    run, cfg = tmp_path / "runs/mae_mff", mae_mff.Config(**mae_mff.DEMO)
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "config.json", "curves.png", "encoder.pth", "last.pth", "log.jsonl", "pictures"]
    lines = log(run)
    assert lines[-1]["train/loss"] < 0.75 * lines[0]["train/loss"]
    assert {"step", "epoch", "train/fuse_weight/0", "lr", "grad_norm"} <= lines[-1].keys()
    assert output.splitlines()[-1].endswith(
        "finetune.py --mode linear --weights runs/mae_mff/encoder.pth --out runs/mae_mff_finetune --demo")
    assert (run / "pictures/epoch_0001.png").exists()
    encoder = torch.load(run / "encoder.pth", weights_only=True)
    expected = {name: getattr(cfg, name) for name in ("model", "img_size", "patch_size", "mean")}
    assert {"method": "mae_mff", **expected}.items() <= encoder["meta"].items()
    common.ViT(cfg.model, cfg.img_size, cfg.patch_size).load_state_dict(encoder["model"])  # strict
    checkpoint = torch.load(run / "last.pth", weights_only=True)
    assert checkpoint["step"] == lines[-1]["step"] and checkpoint["config"]["model"] == cfg.model
    assert json.loads((run / "config.json").read_text())["fuse_layers"] == list(cfg.fuse_layers)
    again = run_script(["mae_mff.py", "--demo"], tmp_path, expect=2)
    assert "runs/mae_mff is not empty" in again and again.count("\n") == 1


@pytest.mark.parametrize("mode, more", [
    ("linear", ["--batch_size", 100, "--augment", "crop"]), ("finetune", ["--ema", 0.9])])
def test_training_modes_of_finetune_end_their_log_with_the_result(unbroken, small_npz, tmp_path, mode, more):
    command = ["finetune.py", "--demo", "--mode", mode, "--weights", unbroken / "mae_mff.py/encoder.pth"]
    output = run_script([*command, "--data", small_npz, "--out", "run", "--epochs", 2, *more], tmp_path)
    last = log(tmp_path / "run")[-1]
    assert last["eval/n"] == 53 and last["train_images"] == 250
    assert 0 < last["eval/top1"] <= last["eval/top5"] <= 100
    assert f"top-1 {last['eval/top1']:.2f} %" in output
    best = torch.load(tmp_path / "run/best.pth", weights_only=True)["meta"]
    assert best["eval/top1"] >= last["eval/top1"]


def test_checkpoint_and_encoder_file_give_the_same_on_one_and_three_processes(unbroken, small_npz, tmp_path):
    command, results = ["finetune.py", "--mode", "knn", "--data", small_npz, "--amp", "off", "--weights"], []
    for name, processes in (("last.pth", 1), ("encoder.pth", 3)):
        run_script([*command, unbroken / f"mae_mff.py/{name}", "--out", name], tmp_path, processes)
        results += log(tmp_path / name)
    assert results[0] == results[1] and results[0]["eval/n"] == 53


def test_scripts_copied_alone_run_anywhere(folder, tmp_path):
    for name in ("mae_mff.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, *map(str, [*MAE, "--data", folder, "--batch_size", 20, "--epochs", 1])]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for flags in (["run"], ["next", "--init", "run/encoder.pth"]):
        subprocess.run([*command, "--out", *flags], cwd=tmp_path, check=True, timeout=120, env=alone)
    assert (tmp_path / "next/encoder.pth").exists()


def test_own_images_of_any_channels_and_shape_and_a_start_from_weights_of_another(tmp_path, folder):
    (tmp_path / "scans").mkdir()
    for i in range(10):
        values = np.random.default_rng(i).integers(0, 65535, (50, 70, 5)).astype(np.uint16)
        np.save(tmp_path / f"scans/{i}.npy", values)
    for data, channels in ((tmp_path / "scans", 5), (folder, 1)):
        out = tmp_path / f"run{channels}"
        run_script([*MAE, "--data", data, "--in-chans", channels, "--img-size", "32,64", "--batch_size", 10,
                    "--epochs", 2, "--no-detach-shallow", "--target", "pixmim", "--out", out], tmp_path)
        meta = torch.load(out / "encoder.pth", weights_only=True)["meta"]
        assert meta["in_chans"] == channels == len(meta["mean"]) and meta["img_size"] == (32, 64)
        assert (out / "pictures/epoch_0002.png").exists()
    command = [*MAE, "--data", folder, "--in-chans", 1, "--batch_size", 10, "--epochs", 1, "--out", "next"]
    assert "pos_embed 8x16 -> 8x8" in run_script([*command, "--init", out / "encoder.pth"], tmp_path)


# ---- wrong input


@pytest.mark.parametrize("script, flags, words", [
    ("mae_mff", "--epocs 3", "did you mean --epochs?"),
    ("mae_mff", "--target pixels", "--target"),
    ("mae_mff", "--img_size 33", "--patch_size"),
    ("mae_mff", "--fuse_layers 0,2", "--fuse_layers"),
    ("mae_mff", "--batch_size 64 --micro_batch 48", "use 48 or 96"),
    ("mae_mff", "--batch_size 50000", "20000 images"),
    ("mae_mff", "--epochs 0.001", "less than one update"),
    ("mae_mff", "--data nowhere", "nowhere does not exist"),
    ("mae_mff", "--resume runs/x/last.pth", "--resume takes no file"),
    ("mae_mff", "--init missing.pth", "missing.pth does not exist"),
    ("mff_feature", "--in_chans 1", "3 channels"),
    ("ddae", "--num_levels 3", "--num_levels 3"),
    ("ddae", "--beta_init 0,1,2", "--beta_init has 3"),
    ("ddae", "--dds feature --no-distill", "--dds feature"),
])
def test_wrong_flags_are_refused_in_one_line(script, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--demo", *flags.split()])
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        common.launch(module.Config, module.presets, module.train, script)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_flags_are_the_fields_in_either_spelling_and_negative_values_pass():
    flags = ["--demo", "--base-lr", "1e-3", "--no-compile", "--mean", "-0.5,0,0.5", "--img-size=64,96"]
    cfg = common.parse_config(mae_mff.Config, mae_mff.presets, flags)
    assert (cfg.base_lr, cfg.compile, cfg.mean, cfg.img_size) == (1e-3, False, (-0.5, 0.0, 0.5), (64, 96))
    paper = {"epochs": 800, "batch_size": 4096, "base_lr": 1.5e-4, "warmup_epochs": 40, "betas": (0.9, 0.95)}
    assert paper.items() <= vars(common.parse_config(mae_mff.Config, mae_mff.presets, [])).items()
