"""The commands as users type them: the demo, every mode, own data, wrong input."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command, run_script
from PIL import Image

import common
import mae_mff

DEMO = ["mae_mff.py", "--demo", "--amp", "off", "--workers", 0, "--log_every", 1]  # float32: comparable to the last bit


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


# ---- the demo, and what it writes


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One pass of the demo as the README prints it, log line by line."""
    folder = tmp_path_factory.mktemp("demo")
    output = run_command(["mae_mff.py", "--demo", "--epochs", 1], folder)
    return folder, output


def test_demo_learns_and_says_what_to_type_next(demo):
    folder, output = demo
    run = folder / "runs/mae_mff"
    assert {path.name for path in run.iterdir()} == {"config.json", "log.jsonl", "last.pth", "encoder.pth", "pictures"}
    curve = losses(run)
    assert curve[-1] < 0.75 * curve[0]
    assert "python finetune.py --demo --mode linear --weights runs/mae_mff/encoder.pth" in output
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "epoch", "train/loss", "train/fuse_weight/0", "lr", "grad_norm", "images_per_second", "data_wait",
            "peak_memory"} <= last.keys()
    with Image.open(run / "pictures/epoch_0001.png") as picture:
        assert picture.width > 4 * 128 and picture.height > 8 * 128


def test_every_file_written_is_plain_and_carries_its_settings(demo):
    run = demo[0] / "runs/mae_mff"
    encoder = torch.load(run / "encoder.pth", weights_only=True)
    assert {"method": "mae_mff", "model": "nano", "img_size": (32, 32), "patch_size": 4, "in_chans": 3}.items() <= (
        encoder["meta"].items())
    common.ViT("nano", (32, 32), 4).load_state_dict(encoder["model"])  # strict
    checkpoint = torch.load(run / "last.pth", weights_only=True)
    assert checkpoint["step"] == 156 and checkpoint["config"] == torch.load(run / "last.pth", weights_only=True)["config"]
    assert json.loads((run / "config.json").read_text())["fuse_layers"] == [0, 1, 2, 3]


@pytest.mark.parametrize("mode, more", [
    ("linear", ["--batch_size", 100]),
    ("linear", ["--batch_size", 100, "--augment", "crop"]),
    ("finetune", ["--epochs", 2, "--ema", 0.9]),
    ("knn", []),
])
def test_every_mode_of_finetune_ends_its_log_with_the_result(demo, small_npz, tmp_path, mode, more):
    encoder = demo[0] / "runs/mae_mff/encoder.pth"
    output = run_script(["finetune.py", "--demo", "--mode", mode, "--weights", encoder, "--data", small_npz, "--out", "run",
                         "--epochs", 3, *more], tmp_path)
    out = tmp_path / "run"
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["eval/n"] == 53 and last["train_images"] == 250 and 0 < last["eval/top1"] <= last["eval/top5"] <= 100
    assert "tensors loaded; missing: " in output and f"top-1 {last['eval/top1']:.2f} %" in output
    if mode != "knn":
        best = torch.load(out / "best.pth", weights_only=True)["meta"]
        assert best["eval/top1"] >= last["eval/top1"]


def test_full_checkpoint_and_encoder_file_give_the_same_on_one_and_two_processes(demo, small_npz, tmp_path):
    results = []
    for name, processes in (("last.pth", 1), ("encoder.pth", 1), ("encoder.pth", 2)):
        out = tmp_path / f"{name}{processes}"
        run_script(["finetune.py", "--mode", "knn", "--weights", demo[0] / f"runs/mae_mff/{name}", "--data", small_npz,
                    "--amp", "off", "--out", out], tmp_path, processes)
        results.append(json.loads((out / "log.jsonl").read_text()))
    assert results[0] == results[1] == results[2] and results[0]["eval/n"] == 53


def test_init_continues_from_weights_at_another_shape(demo):
    folder, _ = demo
    output = run_script([*DEMO, "--init", "runs/mae_mff/encoder.pth", "--img_size", "32,48", "--epochs", 0.02, "--out", "init"],
                        folder)
    assert "pos_embed 8x8 -> 8x12, bicubic" in output and "missing: decoder_blocks" in output


def test_scripts_copied_alone_run_anywhere(tmp_path):
    for name in ("mae_mff.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "mae_mff.py", "--demo", "--epochs", "0.05"], cwd=tmp_path, check=True, timeout=120,
                   env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    assert (tmp_path / "runs/mae_mff/encoder.pth").exists()


def test_own_images_of_any_channels_and_shape(tmp_path, folder):
    (tmp_path / "scans").mkdir()
    for i in range(20):
        np.save(tmp_path / f"scans/{i}.npy", np.random.default_rng(i).integers(0, 65535, (50, 70, 5)).astype(np.uint16))
    for data, channels in ((tmp_path / "scans", 5), (folder, 1), (folder, 3)):
        out = tmp_path / f"out{channels}"
        run_script([*DEMO, "--data", data, "--in-chans", channels, "--img-size", "32,64", "--batch_size", 10, "--epochs", 2,
                    "--no-detach-shallow", "--target", "pixmim", "--out", out], tmp_path)
        meta = torch.load(out / "encoder.pth", weights_only=True)["meta"]
        assert meta["in_chans"] == channels == len(meta["mean"]) and meta["img_size"] == (32, 64)
        assert (out / "pictures/epoch_0002.png").exists()


def test_twenty_steps_of_vit_base_on_photographs(real_data, tmp_path):
    if not os.environ.get("MINMIM_SLOW_TESTS"):
        pytest.skip("takes minutes: set MINMIM_SLOW_TESTS=1")
    run_script(["mae_mff.py", "--data", real_data / "imagenet_sample", "--batch_size", 16, "--epochs", 1.6, "--log_every", 1,
                "--out", "base"], tmp_path, environment={"OMP_NUM_THREADS": "2"})
    assert len(losses(tmp_path / "base")) == 20


def test_check_data_reads_and_writes_nothing(folder, tmp_path):
    (folder / "class0/broken.jpg").write_bytes(b"\xff\xd8\xff")
    output = run_script(["mae_mff.py", "--data", folder, "--check_data"], tmp_path)
    assert "41 images, 2 classes" in output and ".png 40" in output and "48x40 40" in output
    assert "unreadable: 1" in output and "broken.jpg" in output and not (tmp_path / "runs").exists()


# ---- wrong input


@pytest.mark.parametrize("flags, words", [
    (["--epocs", "3"], "did you mean --epochs?"),
    (["--epochs", "many"], "--epochs: invalid float value"),
    (["--target", "pixels"], "invalid choice"),
    (["--img_size", "33"], "not a multiple of --patch_size"),
    (["--img_size", "1,2,3"], "--img_size"),
    (["--fuse_layers", "0,2"], "must rise and end with the last of 4 blocks"),
    (["--mask_ratio", "1.0"], "hides none or all"),
    (["--batch_size", "64", "--micro_batch", "48"], "use 48 or 96"),
    (["--batch_size", "50000"], "20000 images are fewer than one batch"),
    (["--mean", "0.5"], "--mean has 1"),
    (["--data", "nowhere"], "does not exist"),
    (["--data", "data/imagenet"], "link ImageNet there, give --data PATH (any folder of images), or try --demo"),
    (["--resume", "runs/x/last.pth"], "--resume takes no file"),
    (["--init", "."], "to continue the run in it: --resume --out ."),
    (["--init", "missing.pth"], "missing.pth does not exist"),
    (["--amp", "fp16"], "needs CUDA"),
    (["--log_every", "0"], "--log_every is 0, expected more than 0"),
    (["--batch_size", "-1"], "expected more than 0"),
    (["--workers", "-1"], "--workers not negative"),
    (["--decoder_num_heads", "5"], "--decoder_num_heads 5"),
])
def test_wrong_flags_are_refused_in_one_line(flags, words, tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available() and "--amp" in flags:
        pytest.skip("fp16 is right here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mae_mff.py", "--demo", *flags])
    with pytest.raises(SystemExit) as stop:
        common.launch(mae_mff.Config, mae_mff.presets, mae_mff.train, "mae_mff")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(demo):
    output = run_script(["mae_mff.py", "--demo"], demo[0], expect=2)
    assert output == "mae_mff: runs/mae_mff is not empty: continue the run in it with --resume, or choose another --out\n"


def test_flags_are_the_fields_in_either_spelling_and_negative_values_pass():
    cfg = common.parse_config(mae_mff.Config, mae_mff.presets,
                              ["--demo", "--base-lr", "1e-3", "--no-compile", "--betas", "-0.5,0.9", "--img-size=64,96"])
    assert (cfg.base_lr, cfg.compile, cfg.betas, cfg.img_size, cfg.model) == (1e-3, False, (-0.5, 0.9), (64, 96), "nano")
    paper = common.parse_config(mae_mff.Config, mae_mff.presets, [])
    assert (paper.epochs, paper.batch_size, paper.base_lr, paper.warmup_epochs, paper.weight_decay, paper.betas) == (
        800, 4096, 1.5e-4, 40, 0.05, (0.9, 0.95))


def test_importing_has_no_effect(tmp_path):
    code = "import sys; sys.argv = ['x', '--nonsense']; import common, mae_mff, finetune, torch; print(torch.initial_seed())"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert not list(tmp_path.iterdir())
