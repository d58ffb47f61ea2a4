"""What differs on Windows, macOS and other accelerators, acted out here; none of it replaces a run there."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import common
from mae_mff import Config

# No POSIX locks, resource or signals but two; loader workers that are spawned, as on Windows and macOS.
ELSEWHERE = """
import multiprocessing, signal, sys, types
if __name__ == "__main__":
    import multiprocessing.popen_spawn_posix, subprocess, torch.distributed, torch.utils.data, torchvision
    torch.utils.data._utils.signal_handling.IS_WINDOWS = True
    sys.modules["fcntl"] = sys.modules["resource"] = None
    sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda descriptor, mode, n: None)
    for name in ("SIGALRM", "SIGCHLD", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU", "setitimer"):
        delattr(signal, name)
    import faulthandler, os
    del faulthandler.register, os.sched_getaffinity, os.O_NOFOLLOW
    multiprocessing.set_start_method("spawn")
    import common
    import {script} as script
    sys.argv = ["{script}.py", *sys.argv[1:]]
    common.launch(script.Config, script.presets, script.train, "{script}")
"""


def test_without_what_only_posix_has_and_with_spawned_workers(tmp_path):
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE.replace("{script}", "mae_mff"))
    command = [sys.executable, "elsewhere.py", "--demo", "--epochs", "0.02", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, text=True, timeout=300,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0 and "done: " in result.stdout, result.stdout


@pytest.mark.parametrize("kind, amp", [("mps", None), ("xpu", torch.bfloat16)])
def test_other_accelerators_are_taken_and_fall_back(monkeypatch, tmp_path, capsys, kind, amp):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(common, "Normalize", lambda *_: None)  # would want the device
    run = common.Run(Config(out=str(tmp_path)), "mae_mff")
    assert (run.device, run.gpu, run.amp_dtype) == (torch.device(kind, 0), True, amp)
    real = torch.optim.AdamW

    def without_fused(*arguments, fused=False, **how):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be on supported devices")
        return real(*arguments, **how)

    monkeypatch.setattr(torch.optim, "AdamW", without_fused)
    optimizer = common.adamw([{"params": [torch.nn.Parameter(torch.zeros(2))]}], (0.9, 0.95))
    assert not optimizer.defaults["fused"] and "AdamW is not fused" in capsys.readouterr().out
