"""--compile: each model is one graph, and learns what it learns without. With torch's own compiler and in two
processes this takes minutes: MINMIM_SLOW_TESTS=1."""

import os
import shutil

import pytest
from commands import SCRIPTS
from conftest import Started, losses, run_script, sabotaged

COMMANDS = SCRIPTS | {"revcol_v2.py": [*SCRIPTS["revcol_v2.py"], "--memory", "column"]}
ONE_GRAPH = ("compile = torch.nn.Module.compile; torch.nn.Module.compile = lambda model: "
             "print('one graph') or compile(model, backend='eager', fullgraph=True)")

# After three updates.
STOP = ("seed = common.Run.seed; common.Run.seed = lambda run, *x: "
        "(seed(run, *x), run.step == 2 and os.kill(os.getpid(), signal.SIGTERM))")


@pytest.fixture(scope="module")
def compiled(small_npz, tmp_path_factory):
    """{script: (its run, --out)}, all at once; an error where a model is not one graph."""
    runs = {}
    for script, command in COMMANDS.items():
        folder = tmp_path_factory.mktemp("compiled")
        command = sabotaged(folder, command, "Run.prepare", f"{ONE_GRAPH}; {STOP}", before=True)
        command = [*command, "--data", small_npz, "--compile", "--out", "run"]
        runs[script] = Started(command, folder), folder / "run"
    return runs


@pytest.mark.parametrize("script", COMMANDS)
def test_one_graph_and_the_same_losses(compiled, unbroken, script):
    run, out = compiled[script]
    code, output = run.wait()
    assert code == 0 and "one graph" in output, output
    assert losses(out) == pytest.approx(losses(unbroken / script)[:3], rel=1e-4)


@pytest.mark.parametrize("script", COMMANDS)
def test_compiled_in_two_processes(small_npz, tmp_path, script):
    if "MINMIM_SLOW_TESTS" not in os.environ or not shutil.which("g++"):
        pytest.skip("needs minutes and a C++ compiler: set MINMIM_SLOW_TESTS=1")
    same_noise = "import torch._inductor.config; torch._inductor.config.fallback_random = True"
    command = sabotaged(tmp_path, COMMANDS[script], "Run.prepare", same_noise, before=True)
    for flags in (["eager"], ["compiled", "--compile"]):
        run_script([*command, "--data", small_npz, "--out", *flags], tmp_path, 2)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
