"""Shared by all tests: run a script as a user would, and small data on disk."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def start_script(arguments, cwd, processes=1, environment=(), **how):
    """Popen of `python SCRIPT ...`, or torchrun if processes > 1; one thread per process, so that runs are comparable."""
    script, *flags = arguments
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | dict(environment)
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *map(str, flags)], cwd=cwd, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


def run_script(arguments, cwd, processes=1, expect=0, **how):
    """Run to the end, check the exit code, return the output."""
    process = start_script(arguments, cwd, processes, **how)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expect, output
    return output


@pytest.fixture
def folder(tmp_path):
    """40 small PNG photographs, so to say, in two nested class folders."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "images" / f"class{i % 2}" / "nested" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def real_data():
    """Folder of real images, from MINMIM_TEST_DATA."""
    path = os.environ.get("MINMIM_TEST_DATA")
    if not path:
        pytest.skip("MINMIM_TEST_DATA is not set: no real images to test with")
    return Path(path)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
