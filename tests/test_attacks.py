"""Attempts to lose something: kills at every stage, other numbers of processes, numbers that are not finite, bad files, full
disks. Each attacked run must end where an undisturbed one does, or stop with one line that says what to do.

The slow attacks (100 random kills, 2,000 updates, 200,000 files) are in benchmarks/torture.py.
"""

import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from commands import CIM, RESNET, SCRIPTS, TWENTY
from conftest import ROOT, Started, run_command, run_script, sabotaged
from torch import nn
from torture import family, log, same, state

import common
import finetune

KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def losses(out):
    return [line["train/loss"] for line in log(out) if "train/loss" in line]


def assert_same_run(a, b):
    """Weights, optimizer, moving average, best and exported weights, counts, log: no line twice, none missing."""
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not same(first[name], second[name])] == []


# ---- resume


@pytest.mark.parametrize("script, kills, flags", [
    ("mae_mff.py", [10], []),
    ("mae_mff.py", [10], ["--workers", 3]),
    ("mae_mff.py", [3, 7], []),  # twice in one pass
    ("mae_mff.py", [14], ["--save_minutes", 10]),  # the only checkpoint is that of the end of the first pass
    ("mae_mff.py", [14, 19], ["--workers", 1]),  # in the second pass
    ("ddae.py", [7, 14], ["--workers", 1]),
    ("cim.py", [7, 14], ["--workers", 1]),
    ("vision_electra.py", [7, 14], ["--workers", 1]),
    ("revcol_v2.py", [7, 14], ["--workers", 1]),
    ("finetune.py", [4, 13], ["--workers", 1]),
])
def test_killed_and_resumed_equals_unbroken_bit_for_bit(unbroken, small_npz, tmp_path, script, kills, flags):
    command = [*SCRIPTS[script], "--data", small_npz, "--out", tmp_path / "run", *flags]
    for i, step in enumerate(kills):  # killed after the update, before its checkpoint
        attack = sabotaged(tmp_path, command, "Run.end_update", KILL, f"args[0] == {step}")
        run_script([*attack, *["--resume"] * (i > 0)], tmp_path, expect=-signal.SIGKILL)
    before = torch.load(tmp_path / "run/last.pth", weights_only=True)["step"]
    assert before == kills[-1] - 1 or flags == ["--save_minutes", 10] and before == 11
    output = run_script([*command, "--resume"], tmp_path)
    assert f"resumed from {tmp_path}/run/last.pth: step {before}" in output
    assert_same_run(unbroken / script, tmp_path / "run")


@pytest.mark.parametrize("processes", [1, 2])
def test_resnet_resumes_with_its_statistics_on_as_many_processes(small_npz, tmp_path, processes):
    """CIM's samples differ with the number of processes, and BatchNorm's statistics are each process's own."""
    command = [*CIM, *RESNET, "--data", small_npz, "--micro_batch", 12, "--out"]
    run_script([*command, "whole"], tmp_path, processes)
    attack = sabotaged(tmp_path, [*command, "run"], "Run.end_update", "os.kill(os.getpid(), signal.SIGTERM)", "args[0] == 9")
    assert "stopped after step 10 of 20" in run_script(attack, tmp_path, processes)
    run_script([*command, "run", "--resume"], tmp_path, processes)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_demo_stopped_in_its_tokenizers_training_goes_on_there(small_npz, tmp_path, processes):
    command = [*CIM[:-2], "--data", small_npz, "--out"]
    run_script([*command, "whole"], tmp_path, processes)
    attack = sabotaged(tmp_path, [*command, "run"], "Run.end_update", "os.kill(os.getpid(), signal.SIGTERM)",
                       "self.cfg.train_tokenizer and args[0] == 2")
    assert "stopped after step 3 of 8" in run_script(attack, tmp_path, processes)
    assert not (tmp_path / "run/last.pth").exists()
    run_script([*command, "run", "--resume"], tmp_path, processes)
    a, b = (torch.load(tmp_path / name / "tokenizer/tokenizer.pth", weights_only=True)["model"] for name in ("whole", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_killed_between_two_micro_batches(small_npz, tmp_path):
    command = [*SCRIPTS["mae_mff.py"], "--data", small_npz, "--micro_batch", 6]
    run_script([*command, "--out", tmp_path / "whole"], tmp_path)
    attack = sabotaged(tmp_path, command, "Run.seed", KILL, "args == (10, 2)")
    run_script([*attack, "--out", "run"], tmp_path, expect=-signal.SIGKILL)
    run_script([*command, "--out", "run", "--resume"], tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_0(unbroken, small_npz, tmp_path, number):
    command = [*SCRIPTS["mae_mff.py"], "--data", small_npz, "--out", "run", "--save_minutes", 10]
    attack = sabotaged(tmp_path, command, "Run.seed", f"os.kill(os.getpid(), {int(number)})", "args[0] == 6")
    output = run_script(attack, tmp_path)
    assert "stopped after step 7 of 20; the same command with --resume carries on" in output
    assert torch.load(tmp_path / "run/last.pth", weights_only=True)["step"] == 7
    run_script([*command, "--resume"], tmp_path)
    assert_same_run(unbroken / "mae_mff.py", tmp_path / "run")


STAGES = {  # of the tenth checkpoint's write; the call in which the process dies, and the step that must be left
    "half written": ("torch.save", "half = file.tell() // 2; file.truncate(half)", 9),
    "written": ("os.fsync", "", 9),
    "old one renamed": ("os.replace", "", 9),
    "new one renamed": ("os.replace", "", 10),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_writing_a_checkpoint(unbroken, small_npz, tmp_path, stage):
    command = [*SCRIPTS["mae_mff.py"], "--data", small_npz, "--out", tmp_path / "run"]
    dies_in, action, left = STAGES[stage]
    skip = 1 if stage == "new one renamed" else 0
    arm = f"""
        def deadly(*args, real={dies_in}, seen=[]):
            result = real(*args)
            name = str(getattr(args[-1], "name", args[-1]))
            if {dies_in == "os.fsync"} or "last.pth" in name or "previous.pth" in name:
                seen.append(name)
            if len(seen) > {skip}:
                file = args[-1]
                {action or "pass"}
                {KILL}
            return result
        {dies_in} = deadly"""
    # Armed once the encoder of step 10 is exported: the next thing written is last.pth.
    attack = sabotaged(tmp_path, command, "Run.export", arm, "count == 10")
    run_script(attack, tmp_path, expect=-signal.SIGKILL)
    assert (tmp_path / "run/last.pth").exists() == (stage != "old one renamed")
    assert (tmp_path / "run/last.pth.tmp").exists() == (stage != "new one renamed")
    output = run_script([*command, "--resume"], tmp_path)
    assert f": step {left}," in output
    assert_same_run(unbroken / "mae_mff.py", tmp_path / "run")
    assert not (tmp_path / "run/last.pth.tmp").exists()


def damage(path, how, tmp_path):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    if how == "a wget log":
        path.write_text("--2026-01-01 00:00:00--  https://example.org/last.pth\nResolving example.org...")
    if how == "a malicious pickle":
        class Bomb:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/executed",)
        torch.save({"model": Bomb()}, path)
    if how in ("another method's", "another size's"):
        content = torch.load(path, weights_only=True)
        content |= {"method": "finetune"} if how == "another method's" else {"config": content["config"] | {"model": "tiny"}}
        torch.save(content, path)


@pytest.mark.parametrize("how, words", [
    ("truncated", "cannot read"), ("a wget log", "is a download log"), ("a malicious pickle", "cannot read"),
    ("another method's", "is no checkpoint of mae_mff but of finetune"), ("another size's", "has model tiny, not nano"),
])
def test_a_damaged_checkpoint_is_refused_and_the_good_one_named(unbroken, small_npz, tmp_path, how, words):
    command = [*SCRIPTS["mae_mff.py"], "--data", small_npz, "--out", "run", "--resume"]
    shutil.copytree(unbroken / "mae_mff.py", tmp_path / "run")
    damage(tmp_path / "run/last.pth", how, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    output = run_script(command, tmp_path, expect=2).splitlines()[-1]
    assert words in output and "run/last.pth" in output
    assert output.endswith("run/previous.pth is good: mv it over run/last.pth and --resume again")
    damage(tmp_path / "run/previous.pth", how, tmp_path)
    assert run_script(command, tmp_path, expect=2).rstrip().endswith("there is no other good checkpoint")
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "previous.pth")
    assert not (tmp_path / "executed").exists()


def test_resume_refuses_other_settings(unbroken, small_npz, tmp_path):
    shutil.copytree(unbroken / "mae_mff.py", tmp_path / "run")
    output = run_script([*SCRIPTS["mae_mff.py"], "--data", small_npz, "--out", "run", "--resume", "--batch_size", 48,
                         "--clip_grad", 1], tmp_path, expect=2)
    assert "batch_size 24, not 48; clip_grad 0.0, not 1.0: repeat its flags" in output.splitlines()[-1]
    assert (tmp_path / "run/config.json").read_bytes() == (unbroken / "mae_mff.py/config.json").read_bytes()


def test_resume_takes_a_flag_younger_than_the_run_for_its_default(unbroken, small_npz, tmp_path):
    shutil.copytree(unbroken / "finetune.py", tmp_path / "run")
    content = torch.load(tmp_path / "run/last.pth", weights_only=True)
    del content["config"]["columns"]
    torch.save(content, tmp_path / "run/last.pth")
    command = [*SCRIPTS["finetune.py"], "--data", small_npz, "--out", "run", "--resume"]
    assert "columns 2, not 3" in run_script([*command, "--columns", 3], tmp_path, expect=2).splitlines()[-1]
    run_script(command, tmp_path)


# ---- processes


@pytest.mark.parametrize("script, processes, micro_batch", [
    ("mae_mff.py", 1, 4), ("mae_mff.py", 2, 12), ("mae_mff.py", 2, 3), ("mae_mff.py", 3, 8), ("ddae.py", 2, 6),
    ("revcol_v2.py", 2, 6),
])
def test_any_split_of_the_batch_gives_the_same_losses(unbroken, small_npz, tmp_path, script, processes, micro_batch):
    run_script([*SCRIPTS[script], "--data", small_npz, "--out", "run", "--micro_batch", micro_batch], tmp_path, processes)
    assert losses(tmp_path / "run") == pytest.approx(losses(unbroken / script), rel=1e-5)
    weights = [torch.load(out / "last.pth", weights_only=True)["model"] for out in (unbroken / script, tmp_path / "run")]
    for name, value in weights[0].items():  # teacher and beta too
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_then_one_after_a_stop(unbroken, small_npz, tmp_path):
    command = [*SCRIPTS["mae_mff.py"], "--data", small_npz, "--out", "run"]
    # Only the second process gets the signal: all must agree to stop.
    attack = sabotaged(tmp_path, command, "Run.seed", "os.kill(os.getpid(), signal.SIGTERM)", "args[0] == 9 and rank == 1")
    assert "stopped after step 10 of 20" in run_script(attack, tmp_path, processes=2)
    run_script([*command, "--resume"], tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(losses(unbroken / "mae_mff.py"), rel=1e-5)


def test_torchrun_restarts_after_a_worker_was_killed(small_npz, tmp_path):
    command = [*SCRIPTS["mae_mff.py"], "--data", small_npz, "--resume"]
    run_script([*command, "--out", "whole"], tmp_path, processes=2)
    attack = sabotaged(tmp_path, command, "Run.end_update", KILL,
                       "args[0] == 10 and rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'")
    output = run_command([*attack, "--out", tmp_path / "run"], tmp_path, processes=2, launcher=["--max-restarts", "3"])
    assert re.search(r"resumed from .*: step (9|10),", output)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_an_error_ends_a_run_with_loader_workers(small_npz, tmp_path):
    attack = sabotaged(tmp_path, [*SCRIPTS["mae_mff.py"], "--data", small_npz, "--workers", 2], "Run.end_update",
                       "raise ValueError('boom')", "args[0] == 5")
    code, output = Started(attack, tmp_path).wait(60)
    assert code == 1 and "ValueError: boom" in output and output.count("Traceback") == 1


@pytest.mark.parametrize("error, words", [
    ("raise common.Refused('the cable is out', code=1)", "mae_mff: [process 1] the cable is out\n"),
    ("raise ValueError('boom')", "ValueError: boom\n"),
])
def test_a_process_that_fails_says_so_and_brings_the_others_down(small_npz, tmp_path, error, words):
    command = [*SCRIPTS["mae_mff.py"], "--data", small_npz, "--out", "run", "--workers", 1]
    attack = sabotaged(tmp_path, command, "Run.end_update", error, "args[0] == 5 and rank == 1")
    run = Started(attack, tmp_path, processes=2)
    code, output = run.wait(60)
    assert code == 1 and words in output and output.count("Traceback") == ("boom" in error)
    assert "mae_mff: another process of this run has ended" in output
    assert all(process.exitcode not in (None, -signal.SIGKILL) for process in run.processes)  # no hang to be ended by force
    assert (tmp_path / "run/last.pth").exists()


def test_a_mistake_of_all_processes_is_said_once(tmp_path):
    output = run_command(["mae_mff.py", "--demo", "--data", "nowhere"], tmp_path, processes=2, expect=1)
    assert output.count("--data nowhere does not exist") == 1 and "[process" not in output


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_shares_out_every_sample_once(world_size):
    for n in (0, 1, 4, 5, 257, 1030):
        shares = [finetune.own_share(n, types.SimpleNamespace(rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert sorted(index for share in shares for batch in share for _, index in batch) == list(range(n))


def test_evaluation_is_the_same_on_one_and_three_processes(unbroken, small_npz, tmp_path):
    for processes in (1, 3):
        run_script(["finetune.py", "--mode", "knn", "--weights", unbroken / "mae_mff.py/encoder.pth", "--data", small_npz,
                    "--amp", "off", "--out", f"knn{processes}"], tmp_path, processes)
    assert log(tmp_path / "knn1") == log(tmp_path / "knn3") and log(tmp_path / "knn3")[0]["eval/n"] == 53


# ---- numbers


@pytest.mark.parametrize("where, losses_of_ranks", [
    ("loss = loss * float('nan')", "finite, nan"), ("loss.register_hook(lambda g: g * float('nan'))", "finite, finite"),
])
def test_one_non_finite_update_of_one_process_is_skipped_and_written_down_by_all(small_npz, tmp_path, where, losses_of_ranks):
    script = (ROOT / "mae_mff.py").read_text()
    marker = '        terms = {"loss": loss.detach()}\n'
    assert marker in script
    (tmp_path / "mae_mff.py").write_text(script.replace(marker, f"""
        import os
        self.n = getattr(self, "n", 0) + 1
        if self.n == 6 and os.environ["RANK"] == "1":
            {where}
{marker}"""))
    command = [tmp_path / "mae_mff.py", *TWENTY, "--data", small_npz, "--out", "run"]
    run_script(command, tmp_path, processes=2)
    dump = json.loads((tmp_path / "run/nonfinite_6.json").read_text())
    found = ["finite" if math.isfinite(float(rank["terms"]["loss"])) else "nan" for rank in dump["ranks"]]
    assert ", ".join(found) == losses_of_ranks and [len(rank["samples"]) for rank in dump["ranks"]] == [12, 12]
    assert [line["skipped_nonfinite"] for line in log(tmp_path / "run")] == [0] + 6 * [1]
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))


def test_ten_in_a_row_end_the_run_with_code_3_and_a_way_past_them(unbroken, small_npz, tmp_path):
    command = [*SCRIPTS["mae_mff.py"], "--data", small_npz, "--out", "run"]
    poison = "args[0].param_groups[0]['params'][0].grad.fill_(float('nan'))"
    output = run_script(sabotaged(tmp_path, command, "finish_update", poison, "count > 6", before=True), tmp_path, expect=3)
    assert "up to step 16" in output and "last good checkpoint: run/last.pth" in output and "--clip_grad 1" in output
    weights = torch.load(tmp_path / "run/last.pth", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in weights.values())
    output = run_script([*command, "--resume", "--clip_grad", 1, "--base_lr", 1e-3], tmp_path)
    assert "resumed from run/last.pth: step 15" in output and log(tmp_path / "run")[-1]["skipped_nonfinite"] == 9


def test_fp16_overflow_is_the_scalers_own_affair_and_reported_as_that(tmp_path, capsys):
    run = common.Run(common.RunConfig(out=str(tmp_path), log_every=1), "test")
    run.plan = common.Plan(n=100, batch_size=10, micro_batch=10, accum_steps=1, steps=100)
    p = nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step, gradient in enumerate((1.0, math.inf, 1.0), start=1):
        p.grad = scaler.scale(torch.full((3,), gradient))
        stats = common.finish_update(run, optimizer, scaler, {"loss": torch.tensor(1.0)})
        run.end_update(step, stats, 1.0, [])
    output = capsys.readouterr().out
    assert "step 2: fp16 overflow, update skipped by the loss scaler" in output and "nonfinite" not in output
    assert scaler.get_scale() == 2.0**15 and p.tolist() == [-1.0] * 3
    assert log(tmp_path)[-1]["skipped_overflow"] == 1 and log(tmp_path)[-1]["skipped_nonfinite"] == 0
    for step in range(4, 34):
        p.grad = torch.full((3,), math.inf)
        with pytest.raises(common.Refused, match="thirty overflows") if step == 33 else nullcontext():
            run.end_update(step, common.finish_update(run, optimizer, scaler, {"loss": torch.tensor(1.0)}), 1.0, [])
    assert (tmp_path / "nonfinite_33.json").exists()


# ---- files


@pytest.fixture
def mixed(real_data, tmp_path):
    """The awkward files among copies of good ones."""
    folder = tmp_path / "mixed"
    shutil.copytree(real_data / "robustness", folder, ignore=lambda _, names: [n for n in names if n.endswith((".md", ".txt"))])
    good = common.list_images(real_data / "imagenet_sample")[:60]
    for i, path in enumerate(good):
        shutil.copy(path, folder / f"good_{i}.jpg")
    return folder


BAD = ["truncated_jpeg.jpg", "truncated_image.png", "broken_data_stream.png", "broken.png", "decompression_bomb.gif",
       "png_decompression_dos.png"]


def test_awkward_files_among_good_ones(mixed, tmp_path):
    assert len(common.list_images(mixed)) == 60 + 22
    command = ["mae_mff.py", *TWENTY, "--data", mixed, "--batch_size", 16, "--epochs", 2, "--workers", 2]
    output = run_script([*command, "--max_bad", 0.1, "--out", "run"], tmp_path, processes=2)
    assert [output.count(f"unreadable, replaced by the next file: {mixed}/{name}: ") for name in BAD] == [1] * 6
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    output = run_script([*command, "--out", "strict"], tmp_path, expect=1)
    assert "--max_bad 0.001 allows 1:" in output and "Traceback" not in output


def test_resume_remembers_the_unreadable_files(folder, tmp_path):
    (folder / "class0/nested/00.png").write_bytes(b"")
    command = ["mae_mff.py", *TWENTY, "--data", folder, "--batch_size", 20, "--epochs", 5, "--out", "run"]
    attack = sabotaged(tmp_path, command, "Run.end_update", KILL, "args[0] == 5")
    assert "00.png" in run_script(attack, tmp_path, expect=-signal.SIGKILL)
    assert "00.png" not in run_script([*command, "--resume"], tmp_path)
    (folder / "class0/nested/02.png").write_bytes(b"x")
    output = run_script([*command[:-1], "two"], tmp_path, expect=1)
    assert "2 unreadable files, --max_bad 0.001 allows 1:" in output and "02.png" in output and "Traceback" not in output


def test_a_full_disk_leaves_the_old_checkpoint_whole(unbroken, small_npz, tmp_path):
    command = [*SCRIPTS["mae_mff.py"], "--data", small_npz, "--out", "run"]
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))"  # encoder.pth fits, last.pth does not
    output = run_script(sabotaged(tmp_path, command, "Run.end_update", limit, "args[0] == 10"), tmp_path, expect=1)
    assert "cannot write run/last.pth ([Errno 27] File too large); what was there before is untouched" in output
    assert torch.load(tmp_path / "run/last.pth", weights_only=True)["step"] == 9 and not list(tmp_path.glob("run/*.tmp"))
    run_script([*command, "--resume"], tmp_path)
    assert_same_run(unbroken / "mae_mff.py", tmp_path / "run")


def test_folders_that_are_not_what_they_should_be(folder, tmp_path):
    command = ["mae_mff.py", *TWENTY, "--batch_size", 20, "--epochs", 10]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for flags, words in ((["--data", "empty"], "no image under empty"), (["--data", "file"], "file is empty"),
                         (["--data", folder, "--out", "file/run"], "cannot write into --out file/run")):
        output = run_script([*command, *flags], tmp_path, expect=2)
        assert words in output and "Traceback" not in output
    # Images, then the output folder, vanish during the run.
    for what, code, words in (("images", 1, "unreadable files"), ("run", 1, "cannot write run/")):
        shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        gone = tmp_path / ("copy" if what == "images" else "run")
        attack = sabotaged(tmp_path, [*command, "--data", "copy", "--out", "run"], "Run.end_update",
                           f"os.rename({str(gone)!r}, {str(gone) + '_gone'!r})", "args[0] == 5")
        output = run_script(attack, tmp_path, expect=code)
        assert words in output and "Traceback" not in output
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_an_unreadable_folder(folder, tmp_path, monkeypatch):
    if os.geteuid() == 0:  # root may read everything: the system call refuses in its stead
        monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", path)))
    folder.chmod(0)
    cfg = types.SimpleNamespace(data=str(folder), img_size=(32, 32), in_chans=3, download=False)
    try:
        with pytest.raises(common.Refused, match="Permission denied"):
            common.open_data(cfg)
    finally:
        folder.chmod(0o755)


# ---- processes of the loader


def gone(pids, within=20):
    """Whether all of these have ended; a zombie has."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if Path(f"/proc/{pid}/stat").exists()
                 and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"]
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, None])
def test_loader_workers_live_through_all_passes_and_end_with_the_run(small_npz, tmp_path, number):
    run = Started(["mae_mff.py", *TWENTY, "--data", small_npz, "--workers", 2, "--out", "run", "--log_every", 1,
                   "--epochs", 4.8], tmp_path)
    seen, path, deadline = [], tmp_path / "run/log.jsonl", time.monotonic() + 60
    for step in itertools.count(1):
        while not (path.exists() and path.read_text().count("\n") >= step):
            assert run.returncode() is None and time.monotonic() < deadline, run.wait()
            time.sleep(0.002)
        seen.append(family(run.pid).keys() - {run.pid})
        if step == 30:
            break
    assert len(seen[0]) == 2 and all(pids == seen[0] for pids in seen)  # in three passes the same two
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # Ctrl-C reaches the whole group
    elif number:
        os.kill(run.pid, number)
    code, output = run.wait(60)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0) and "Traceback" not in output
    assert gone(seen[0])
