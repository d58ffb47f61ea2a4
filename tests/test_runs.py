"""The commands as users type them: demos, resume, several processes, wrong input, faults."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, start_script
from PIL import Image

import common
import mae_mff

DEMO = ["mae_mff.py", "--demo", "--amp", "off", "--workers", 0, "--log_every", 1]  # float32: comparable to the last bit


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def weights(out):
    return torch.load(out / "last.pth", weights_only=True)["model"]


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kill_after(arguments, cwd, out, lines, number, **how):
    """Start a run and send it a signal once `lines` updates are in its log and a checkpoint is there."""
    process = start_script(arguments, cwd, **how)
    log, deadline = out / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= lines and (out / "last.pth").exists()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


# ---- the demo, and what it writes


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One pass of the demo as the README prints it, log line by line."""
    folder = tmp_path_factory.mktemp("demo")
    output = run_script(["mae_mff.py", "--demo", "--epochs", 1], folder)
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


@pytest.fixture(scope="module")
def small_npz(tmp_path_factory):
    """400 + 101 labelled images: 101 is odd, so that two processes cannot share them evenly."""
    path = tmp_path_factory.mktemp("npz") / "small.npz"
    samples = [common.Shapes((32, 32), 3, n=501).read(i) for i in range(501)]
    images, labels = (np.stack([np.asarray(sample[part]) for sample in samples]) for part in (0, 1))
    np.savez(path, images=images.transpose(0, 2, 3, 1), labels=labels, split=np.arange(501) >= 400)
    return path


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
    assert last["eval/n"] == 101 and last["train_images"] == 400 and 0 < last["eval/top1"] <= last["eval/top5"] <= 100
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
    assert results[0] == results[1] == results[2] and results[0]["eval/n"] == 101


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


# ---- resume


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run_script([*STEPS, "--out", "whole"], folder)
    return folder / "whole"


STEPS = [*DEMO, "--epochs", 0.08, "--batch_size", 80, "--micro_batch", 40]  # 20 updates of two micro-batches


def test_killed_and_resumed_equals_unbroken_bit_for_bit(unbroken, tmp_path):
    command = [*STEPS, "--out", tmp_path / "broken", "--save_minutes", 0]
    code, _ = kill_after(command, tmp_path, tmp_path / "broken", 10, signal.SIGKILL)
    assert code == -signal.SIGKILL
    before = torch.load(tmp_path / "broken/last.pth", weights_only=True)["step"]
    assert 9 <= before < 20
    output = run_script([*command, "--resume", "--workers", 2], tmp_path)
    assert f"resumed from {tmp_path}/broken/last.pth: step {before}" in output
    assert_same(weights(unbroken), weights(tmp_path / "broken"))
    assert losses(unbroken) == losses(tmp_path / "broken")  # no line twice, none missing


def test_sigterm_saves_and_exits_0(unbroken, tmp_path):
    command = [*STEPS, "--out", tmp_path / "broken", "--save_minutes", 0]
    code, output = kill_after(command, tmp_path, tmp_path / "broken", 5, signal.SIGTERM)
    assert code == 0 and "the same command with --resume carries on" in output
    run_script([*command, "--resume"], tmp_path)
    assert_same(weights(unbroken), weights(tmp_path / "broken"))


def test_resume_of_finetuning_with_moving_average(small_npz, tmp_path):
    command = ["finetune.py", "--demo", "--weights", "none", "--amp", "off", "--workers", 0, "--epochs", 5, "--ema", 0.9,
               "--data", small_npz, "--batch_size", 40,
               "--mixup", 0.8, "--augment", "full", "--log_every", 1, "--save_minutes", 0]
    run_script([*command, "--out", "whole"], tmp_path)
    code, _ = kill_after([*command, "--out", tmp_path / "broken"], tmp_path, tmp_path / "broken", 5, signal.SIGINT)
    assert code == 0
    run_script([*command, "--out", "broken", "--resume"], tmp_path)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    best = [torch.load(tmp_path / out / "best.pth", weights_only=True)["model"] for out in ("whole", "broken")]
    assert_same(*best)


def test_resume_refuses_other_settings_and_damaged_files(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    settings = (tmp_path / "run/config.json").read_bytes()
    output = run_script([*STEPS, "--out", "run", "--resume", "--batch_size", 40], tmp_path, expect=2)
    assert "batch_size 80, not 40: repeat its flags" in output.splitlines()[-1]
    assert (tmp_path / "run/config.json").read_bytes() == settings
    whole = (tmp_path / "run/last.pth").read_bytes()
    (tmp_path / "run/previous.pth").write_bytes(whole)
    (tmp_path / "run/last.pth").write_bytes(whole[:1000])
    output = run_script([*STEPS, "--out", "run", "--resume"], tmp_path, expect=2)
    assert "previous.pth is good" in output


# ---- processes and accumulation


def test_two_processes_equal_one_and_so_does_accumulation(unbroken, tmp_path):
    run_script([*STEPS, "--out", "two"], tmp_path, processes=2)
    run_script([*DEMO, "--epochs", 0.08, "--batch_size", 80, "--micro_batch", 10, "--out", "eight"], tmp_path)
    for out in ("two", "eight"):
        assert losses(tmp_path / out) == pytest.approx(losses(unbroken), rel=1e-5)


# ---- faults


def faulty(tmp_path, fault):
    """A copy of mae_mff.py whose loss is damaged: `fault` is a line of code in forward()."""
    script = (ROOT / "mae_mff.py").read_text()
    marker = '        terms = {"loss": loss.detach()}\n'
    assert marker in script
    (tmp_path / "mae_mff.py").write_text(script.replace(marker, f"        {fault}\n{marker}"))
    return [str(tmp_path / "mae_mff.py"), *STEPS[1:]]


def test_one_non_finite_update_is_skipped_on_all_processes_and_written_down(tmp_path):
    fault = ("self.n = getattr(self, 'n', 0) + 1; import os; "
             "loss = loss * float('nan') if self.n == 6 and os.environ['RANK'] == '1' else loss")
    run_script([*faulty(tmp_path, fault), "--out", "run", "--micro_batch", 40], tmp_path, processes=2)
    dump = json.loads((tmp_path / "run/nonfinite_6.json").read_text())
    assert [rank["terms"]["loss"] for rank in dump["ranks"]] == ["nan", "nan"] and len(dump["ranks"][1]["samples"]) == 40
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert last["skipped_nonfinite"] == 1 and last["train/loss"] > 0


def test_ten_non_finite_updates_in_a_row_end_the_run_with_code_3(tmp_path):
    fault = "self.n = getattr(self, 'n', 0) + 1; loss = loss * float('nan') if self.n > 10 else loss"
    command = [*faulty(tmp_path, fault), "--out", "run", "--micro_batch", 80, "--save_minutes", 0]
    output = run_script(command, tmp_path, expect=3)
    assert "last good checkpoint: run/last.pth" in output and "--clip_grad" in output
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_too_many_unreadable_files_stop_the_run_with_their_names(folder, tmp_path):
    flags = [*DEMO, "--data", folder, "--batch_size", 10, "--epochs", 1, "--img_size", 32]
    (folder / "class0/nested/00.png").write_bytes(b"")
    output = run_script([*flags, "--out", "one"], tmp_path)
    assert output.count("unreadable, replaced by the next file") == 1 and "00.png" in output
    (folder / "class0/nested/02.png").write_bytes(b"x")
    output = run_script([*flags, "--out", "two"], tmp_path, expect=1)
    assert "--max_bad 0.001 allows 1:" in output and "02.png" in output and "Traceback" not in output


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


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pth"
    common.write_atomically(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(common.Refused, match="No space left.*untouched"):
        common.write_atomically(path, fails)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_importing_has_no_effect(tmp_path):
    code = "import sys; sys.argv = ['x', '--nonsense']; import common, mae_mff, finetune, torch; print(torch.initial_seed())"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert not list(tmp_path.iterdir())
