"""Attempts to lose something: kills at every stage, other numbers of processes, numbers that are not finite,
bad files, full disks. Each attacked run ends where an undisturbed one does, or stops with one line.

The slow attacks (100 random kills, 2,000 updates, 200,000 files) are in benchmarks/torture.py.
"""

import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from commands import CIM, SCRIPTS
from conftest import KILL, ROOT, Started, killed, losses, run_command, run_script, sabotaged, stopped
from torture import family, log, same, state

import common

MAE = SCRIPTS["mae_mff.py"]


def read(path):
    return torch.load(path, weights_only=True)


def assert_same_run(a, b):
    """Weights, optimizer, moving average, exported weights, counts, log: no line twice, none missing."""
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not same(first[name], second[name])] == []


def terms(out):
    """All values of the loss's terms in the order of the log, without those that are of a micro-batch."""
    return [value for line in log(out) for name, value in line.items()
            if name.startswith("train/") and not name.startswith("train/target/")]


# ---- resume


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_equals_unbroken_bit_for_bit(unbroken, small_npz, tmp_path, script):
    """Killed in the middle of a pass, after an update and before its checkpoint; stopped in the next pass."""
    shutil.copytree(unbroken / f"{script}@8", tmp_path / "run")
    command = [*SCRIPTS[script], "--data", small_npz, "--out", tmp_path / "run", "--workers", 2, "--resume"]
    killed(tmp_path, command, "self.step == 10")
    assert read(tmp_path / "run/last.pth")["step"] == 9
    stopped(tmp_path, command, "self.step == 12")
    assert_same_run(unbroken / f"{script}@13", tmp_path / "run")


def test_the_checkpoint_of_a_passs_end_keeps_the_values_not_yet_logged(unbroken, small_npz, tmp_path):
    command = [*MAE, "--data", small_npz, "--out", "run", "--save_minutes", 10, "--log_every", 3, "--resume"]
    killed(tmp_path, command, "self.step == 14")
    assert read(tmp_path / "run/last.pth")["step"] == 11  # 11 * 24 > 250; 10 and 11 are not logged yet
    run_script(command, tmp_path)
    every = losses(unbroken / "mae_mff.py")
    means = [sum(every[i : i + 3]) / len(every[i : i + 3]) for i in range(0, 20, 3)]
    assert losses(tmp_path / "run") == pytest.approx(means)


def test_signals_save_and_end_with_0(unbroken, small_npz, tmp_path):
    shutil.copytree(unbroken / "mae_mff.py@8", tmp_path / "run")
    command = [*MAE, "--data", small_npz, "--out", "run", "--save_minutes", 10, "--resume"]
    for step, name in ((8, "TERM"), (9, "INT"), (10, "HUP"), (11, "XCPU"), (12, "USR1")):
        stop = f"os.kill(os.getpid(), signal.SIG{name})"
        attack = sabotaged(tmp_path, command, "Run.seed", stop, f"self.step == {step}")
        assert f"stopped after step {step + 1} of 20" in run_script(attack, tmp_path)
    assert_same_run(unbroken / "mae_mff.py@13", tmp_path / "run")


def test_resnet_resumes_with_its_statistics_on_as_many_processes(small_npz, tmp_path):
    """CIM samples by process, and BatchNorm's statistics are each process's own."""
    command = [*CIM, "--enhancer", "resnet50", "--resnet_width", 8, "--objective", "revdet",
               "--data", small_npz, "--epochs", 0.6, "--micro_batch", 6, "--out"]
    run_script([*command, "whole"], tmp_path, processes=2)
    stopped(tmp_path, [*command, "run"], "self.step == 3", "Run.end_update", processes=2)
    run_script([*command, "run", "--resume"], tmp_path, processes=2)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.fixture
def almost(unbroken, small_npz, tmp_path):
    """Command that goes on with a run in tmp_path, which has 18 of 20 updates."""
    shutil.copytree(unbroken / "mae_mff.py@18", tmp_path / "run")
    return [*MAE, "--data", small_npz, "--out", "run", "--resume"]


STAGES = {  # of writing checkpoint 19: the call in which the process dies, and the step that must be left
    "half written": ("torch.save", "half = file.tell() // 2; file.truncate(half)", 18),
    "written": ("os.fsync", "pass", 18),
    "new one renamed": ("os.replace", "pass", 19),
    "old one renamed": ("os.replace", "pass", 19),  # of checkpoint 20
}


def test_killed_while_writing_a_checkpoint_at_one_stage_after_another(unbroken, almost, tmp_path):
    for stage, (dies_in, action, left) in STAGES.items():
        arm = f"""
            def deadly(*args, real={dies_in}, seen=[]):
                result, file = real(*args), args[-1]
                seen.append(file)
                if len(seen) > {int(stage == "new one renamed")}:
                    {action}
                    {KILL}
                return result
            {dies_in} = deadly"""
        # Armed once the encoder is exported: the next thing written is last.pth.
        attack = sabotaged(tmp_path, almost, "Run.export", arm, "count == 1")
        run_script(attack, tmp_path, expect=-signal.SIGKILL)
        assert (tmp_path / "run/last.pth").exists() == (stage != "old one renamed")
        kept = tmp_path / f"run/{'previous' if stage == 'old one renamed' else 'last'}.pth"
        assert read(kept)["step"] == left
    assert ": step 19," in run_script(almost, tmp_path)
    assert_same_run(unbroken / "mae_mff.py", tmp_path / "run")
    assert not list(tmp_path.glob("run/*.tmp"))


def test_a_full_disk_leaves_the_old_checkpoint_whole(unbroken, almost, tmp_path):
    # encoder.pth fits, last.pth does not
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))"
    output = run_script(sabotaged(tmp_path, almost, "Run.seed", limit), tmp_path, expect=1)
    assert "cannot write run/last.pth" in output and "File too large" in output and "Traceback" not in output
    assert read(tmp_path / "run/last.pth")["step"] == 18 and not list(tmp_path.glob("run/*.tmp"))
    run_script(almost, tmp_path)
    assert_same_run(unbroken / "mae_mff.py", tmp_path / "run")


def damage(path, how):
    content, raw = read(path), bytearray(path.read_bytes())
    if how == "truncated":
        return path.write_bytes(raw[:1000])
    if how == "a flipped bit":
        raw[len(raw) // 2] ^= 1
        return path.write_bytes(raw)
    if how == "malicious":
        class Bomb:
            def __reduce__(self):
                return os.system, (f"touch {path.parent}/executed",)
        content["model"] = Bomb()
    if how == "another method's":
        content["method"] = "ddae"
    if how == "old format":
        del content["version"]
    if how == "without a flag":
        del content["config"]["detach_shallow"]
    torch.save(content, path)


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("[!.]*.*")}


@pytest.mark.parametrize("how, words", [
    ("truncated", "cannot read"), ("a flipped bit", "cannot read"), ("malicious", "cannot read"),
    ("another method's", "ddae"), ("old format", "older"), ("removed", "has no last.pth")])
def test_a_wrong_checkpoint_is_refused_in_one_line_and_the_good_one_named(almost, tmp_path, how, words):
    for name in ("last.pth", "previous.pth") if how in ("old format", "removed") else ("last.pth",):
        path = tmp_path / "run" / name
        path.unlink() if how == "removed" else damage(path, how)
    before = contents(tmp_path / "run")
    output = run_script(almost, tmp_path, expect=2)
    assert "Traceback" not in output and words in output.splitlines()[-1]
    assert ("run/previous.pth is good" in output) == (how not in ("old format", "removed"))
    assert before == contents(tmp_path / "run")


def test_resume_refuses_other_settings_and_takes_a_younger_flag_for_its_default(almost, tmp_path):
    damage(tmp_path / "run/last.pth", "without a flag")
    output = run_script([*almost, "--detach_shallow", "--clip_grad", 1], tmp_path, expect=2)
    assert "clip_grad 0.0" in output.splitlines()[-1] and "detach_shallow False" in output.splitlines()[-1]
    run_script(almost, tmp_path)


# ---- one writer, nothing overwritten


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_runs_in_one_folder_are_refused_and_a_stopped_holder_is_named(small_npz, tmp_path):
    command = [*MAE, "--data", small_npz, "--out", "run", "--epochs", 50, "--resume"]
    first = Started(command, tmp_path)
    wait_for(lambda: (tmp_path / "run/last.pth").exists())
    os.kill(first.pid, signal.SIGSTOP)
    before = contents(tmp_path / "run")
    output = run_script(command, tmp_path, expect=2)
    assert f"kill -9 {first.pid}" in output and output.count("\n") == 1
    assert before == contents(tmp_path / "run")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    run_script([*command, "--epochs", 2], tmp_path, expect=2)  # not locked any more: the flags differ


def test_where_there_are_no_locks_the_file_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "lock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    host, dead = socket.gethostname(), 2**22 + 1  # above the largest there can be
    for pid, where in ((os.getppid(), host), (dead, "elsewhere")):
        (tmp_path / ".lock").write_text(f"process {pid} on {where} since 2026-01-01T00:00:00")
        with pytest.raises(common.UserError, match=f"process {pid} on {where}"):
            common.hold_folder(tmp_path)
    (tmp_path / ".lock").write_text(f"process {dead} on {host} since 2026-01-01T00:00:00")
    common.hold_folder(tmp_path).close()
    common.hold_folder(tmp_path).close()  # our own mark of before


def test_processes_end_when_their_launcher_was_killed(small_npz, tmp_path):
    """They save, and then the folder is free again."""
    script, *flags = map(str, [*MAE, "--data", small_npz, "--epochs", 500, "--out", "run"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher = subprocess.Popen([*torchrun, ROOT / script, *flags], cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run/last.pth").exists())
    pid = int((tmp_path / "run/.lock").read_text().split()[1])
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not alive(pid))
    assert read(tmp_path / "run/last.pth")["step"] == log(tmp_path / "run")[-1]["step"]


def test_failed_starts_and_kills_before_the_first_checkpoint_refuse_nothing(unbroken, small_npz, tmp_path):
    command = [*MAE, "--data", small_npz, "--out", "run"]
    run_script(sabotaged(tmp_path, command, "Run.load", "raise common.UserError('no')"), tmp_path, expect=2)
    killed(tmp_path, [*command, "--save_minutes", 9], True, "Run.export")  # before its last.pth
    run_script([*command, "--resume"], tmp_path)
    assert_same_run(unbroken / "mae_mff.py", tmp_path / "run")


def test_a_finished_file_outlives_a_rename_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("the disk is lost")))
    with pytest.raises(common.UserError, match="the disk is lost.*new content is"):
        common.write_atomically(tmp_path / "x.pth", lambda file: file.write(b"whole"))
    assert next(tmp_path.glob("x.pth.*.tmp")).read_bytes() == b"whole"


# ---- terminals and logs


def test_a_run_outlives_its_terminal_and_its_log(unbroken, almost, tmp_path):
    """What the log lacks is said; nothing else is lost."""
    command, runs = [sys.executable, ROOT / almost[0], *almost[1:], "--out"], {}
    for name, where in (("full", ">/dev/full"), ("closed", ">&-"), ("gone", "| true")):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        line = f"set -o pipefail; {shlex.join(map(str, [*command, tmp_path / name]))} {where}"
        runs[name] = subprocess.Popen(["bash", "-c", line], env=os.environ | {"OMP_NUM_THREADS": "1"})
    for name, run in runs.items():
        assert run.wait(200) == 0
        assert_same_run(unbroken / "mae_mff.py", tmp_path / name)
    block = "os.remove('run/log.jsonl'); os.mkdir('run/log.jsonl')"
    output = run_script(sabotaged(tmp_path, almost, "Run.end_update", block, "self.step == 19"), tmp_path)
    assert "log.jsonl lacks step 20" in output and read(tmp_path / "run/last.pth")["step"] == 20


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = {number: signal.getsignal(number) for number in common.STOP_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        common.Run.catch_signals(None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_foreign_lines_of_the_log_stay_and_torn_ones_go(almost, tmp_path):
    path = tmp_path / "run/log.jsonl"
    foreign = [b"my note", b'{"step": "x"}', b"[1, 2]", b"\xff\xfe", b'"\xe2\x80\xa8"']
    own = path.read_bytes().splitlines()[:18]
    path.write_bytes(b"\n".join([*own, *foreign, b'{"step": 19, "lr": 0.1}', b'{"step": 19, "epo']))
    run_script(almost, tmp_path)
    lines = path.read_bytes().splitlines()
    assert lines[: len(own) + 5] == own + foreign and len(lines) == 20 + 5


@pytest.mark.parametrize("given", [{"RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "5"}, {"RANK": "one"}])
def test_an_environment_set_in_part_is_refused(monkeypatch, given):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if len(given) == 2:
        given = given | {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(common.UserError, match="RANK="):
        common.read_environment()


# ---- processes


@pytest.mark.parametrize("script, splits", [
    ("mae_mff.py", [(2, 3), (3, 8), (1, 6)]),
    *((name, [(2, 6)]) for name in ("mff_feature.py", "ddae.py", "ddae_beitv2.py", "revcol_v2.py"))])
def test_any_split_of_the_batch_gives_the_same_losses(unbroken, small_npz, tmp_path, script, splits):
    """One run that goes on with other processes and micro-batches; its last process alone gets the signal."""
    command = [*SCRIPTS[script], "--data", small_npz, "--out", "run", "--resume", "--micro_batch"]
    for i, (processes, micro_batch) in enumerate(splits):
        when = f"self.step == {4 * i + 3} and rank == {processes - 1}"
        stopped(tmp_path, [*command, micro_batch], when, processes=processes)
    # Weights are no measure: keys' biases have no gradient but rounding's, which AdamW makes as large as any.
    found = terms(tmp_path / "run")
    assert found == pytest.approx(terms(unbroken / script)[: len(found)], rel=1e-4)
    assert read(tmp_path / "run/last.pth")["step"] == 4 * len(splits)


@pytest.mark.parametrize("error, words", [
    ("raise common.UserError('the cable is out', code=1)", "mae_mff: [process 1] the cable is out\n"),
    ("raise ValueError('boom')", "ValueError: boom\n"),
])
def test_a_process_that_fails_says_so_and_brings_the_others_down(small_npz, tmp_path, error, words):
    command = [*MAE, "--data", small_npz, "--out", "run", "--workers", 1]
    attack = sabotaged(tmp_path, command, "Run.end_update", error, "self.step == 3 and rank == 1")
    run = Started(attack, tmp_path, processes=2)
    code, output = run.wait(60)
    assert code == 1 and words in output and output.count("Traceback") == ("boom" in error)
    assert all(process.exitcode not in (None, -signal.SIGKILL) for process in run.processes)  # of themselves
    assert (tmp_path / "run/last.pth").exists()


def alive(pid):
    """A zombie is not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_loader_workers_live_through_all_passes_and_end_with_the_run(folder, tmp_path, number):
    command = [*MAE, "--data", folder, "--batch_size", 20, "--epochs", 50, "--workers", 2, "--out", "run"]
    run = Started(command, tmp_path)
    seen, path = [], tmp_path / "run/log.jsonl"
    for step in (1, 3, 5):  # in three passes
        wait_for(lambda step=step: path.exists() and path.read_text().count("\n") >= step)
        seen.append(family(run.pid).keys() - {run.pid})
    assert len(seen[0]) == 2 and seen[0] == seen[1] == seen[2]
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)  # Ctrl-C reaches the whole group
    code, output = run.wait(60)
    assert code == (0 if number == signal.SIGINT else -number) and "Traceback" not in output
    wait_for(lambda: not any(map(alive, seen[0])))


# ---- numbers


def test_non_finite_updates_of_one_process_are_skipped_by_all_and_ten_in_a_row_end_it(small_npz, tmp_path):
    command = [*MAE, "--data", small_npz, "--out", "run", "--resume"]
    # In the second process the loss of the third update is not finite, then the gradients of ten.
    poison = """
        model, nan = args[0], float("nan")
        model.register_forward_pre_hook(lambda _, x: (x[0] * (nan if self.step == 2 else 1), x[1]))
        model.norm.weight.register_hook(lambda grad: grad * (nan if self.step in range(4, 14) else 1))"""
    attack = sabotaged(tmp_path, command, "Run.prepare", poison, "rank == 1", before=True)
    output = run_script(attack, tmp_path, processes=2, expect=3)
    assert "last good checkpoint: run/last.pth" in output and "Traceback" not in output
    found = {}
    for path in (tmp_path / "run").glob("nonfinite_*.json"):
        dump = json.loads(path.read_text())
        assert [len(rank["samples"]) for rank in dump["ranks"]] == [12, 12]
        found[dump["step"]] = [math.isfinite(float(rank["terms"]["loss"])) for rank in dump["ranks"]]
    assert found == {3: [True, False]} | {step: [True, True] for step in range(5, 15)}
    assert all(torch.isfinite(value).all() for value in read(tmp_path / "run/last.pth")["model"].values())
    run_script([*command, "--clip_grad", 1, "--base_lr", 1e-3], tmp_path)  # what may differ after that
    last = log(tmp_path / "run")[-1]
    assert last["step"] == 20 and math.isfinite(last["train/loss"]) and last["skipped_nonfinite"] == 10


def test_weights_beyond_repair_are_not_saved_as_good(small_npz, tmp_path):
    command = [*MAE, "--data", small_npz, "--out", "run", "--resume"]
    diverge = "next(self.state['model'].parameters()).data.fill_(1e28)"
    attack = sabotaged(tmp_path, command, "Run.end_update", diverge, "self.step == 5")
    output = run_script(attack, tmp_path, expect=3)
    assert "last good checkpoint: run/last.pth" in output and "Traceback" not in output
    assert read(tmp_path / "run/last.pth")["step"] == 4


# ---- files


def test_processes_that_see_other_images_stop(folder, tmp_path):
    command = [*MAE, "--data", folder, "--batch_size", 20, "--epochs", 1, "--workers", 0]
    attack = sabotaged(tmp_path, command, "open_folder", "result.paths[0] = b'/other.png'", "rank == 1")
    output = run_script(attack, tmp_path, processes=2, expect=2)
    assert "process 0: 40 files" in output and "process 1: 40 files" in output and "Traceback" not in output


def test_unreadable_files_are_named_once_replaced_and_remembered(folder, tmp_path):
    (folder / "class0/nested/00.png").write_bytes(b"")
    command = [*MAE, "--data", folder, "--batch_size", 20, "--epochs", 3, "--workers", 1, "--out"]
    output = killed(tmp_path, [*command, "run"], "self.step == 4", processes=2)
    assert output.count("00.png: ") == 1
    assert "00.png" not in run_script([*command, "run", "--resume"], tmp_path)
    for i in range(2, 12, 2):  # six of at most five
        (folder / f"class0/nested/{i:02}.png").write_bytes(b"x")
    output = run_script([*command, "two"], tmp_path, processes=2, expect=1)
    assert "08.png" in output and "--max_bad" in output and "Traceback" not in output
    (folder / "class0/nested/10.png").unlink()
    assert "08.png" in run_script([*command, "five"], tmp_path)


def test_torchrun_restarts_after_a_worker_was_killed(unbroken, small_npz, tmp_path):
    shutil.copytree(unbroken / "mae_mff.py@8", tmp_path / "run")
    command = [*MAE, "--data", small_npz, "--resume", "--out", tmp_path / "run"]
    attack = sabotaged(tmp_path, command, "Run.end_update", KILL,
                       "self.step == 10 and rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'")
    output = run_command(attack, tmp_path, processes=2, launcher=["--max-restarts", "3"])
    assert re.search(r"resumed from .*: step (9|10),", output)
    assert terms(tmp_path / "run") == pytest.approx(terms(unbroken / "mae_mff.py"), rel=1e-4)


@pytest.mark.parametrize("lost, words", [("images", "unreadable files"), ("run", "cannot write run/")])
def test_a_folder_that_vanishes_during_the_run(folder, tmp_path, lost, words):
    command = [*MAE, "--data", folder, "--batch_size", 20, "--epochs", 5, "--out", "run"]
    loss = f"os.rename({str(tmp_path / lost)!r}, 'gone')"
    attack = sabotaged(tmp_path, command, "Run.end_update", loss, "self.step == 3")
    output = run_script(attack, tmp_path, expect=1)
    assert words in output and "Traceback" not in output
