"""What keeps the scripts easy to compare, to read and to copy: read off their source."""

import ast
import difflib
import importlib
import inspect
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import common

FILES = {path.stem for path in ROOT.glob("*.py")}
# Of train_step and the loop: lines of mae_mff.py that others may replace, and all lines of their own.
REPLACED = {
    "total = {}",
    "for images, noise in run.micro_batches(model, batches):",
    "loss, terms = model(images, noise)",
    "grad_norm = nn.utils.clip_grad_norm_(model.parameters(), run.cfg.clip_grad or math.inf)",
    "lr = warmup_cosine(run.epoch, peak_lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)",
    "save_pictures(path, model, examples, run)",
    "run.save(model.trunk_state())",
}
OWN = {
    "ddae": [
        "total, share = ({}, run.cfg.feature_ramp)",
        "ramp = torch.full((), min(1.0, run.step / run.steps / share) if share else 1.0, device=run.device)",
        "for images, distance in run.micro_batches(model, batches):",
        "loss, terms = model(images, distance, ramp)",
        "momentum = np.interp(run.epoch, (0, 100, 400), run.cfg.momentum)",
        'getattr(model, "module", model).update_teacher(momentum)',
    ],
    "ddae_beitv2": [
        "for images, distance in run.micro_batches(model, batches):",
        "loss, terms = model(images, distance)",
        "lr = warmup_cosine(run.epoch, cfg.lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)",
        'run.save(model.trunk_state(), prefix=None, model=f"beit_{cfg.model}")',
    ],
    "cim": [
        "total, restore_statistics = ({}, remember_statistics(model))",
        "k = torch.full((), sample_num_masked(run.step, run.cfg), device=run.device)",
        "for pixels, noise in run.micro_batches(model, batches):",
        "loss, terms = model(pixels, noise, k)",
        "else:",
        "restore_statistics()",
        "lr = warmup_cosine(run.epoch, cfg.lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)",
        'encoder = None if cfg.objective == "none" else model.enhancer.trunk_state()',
        'run.save(encoder, prefix="enhancer.", model=cfg.model if cfg.enhancer == "vit" else "resnet50")',
    ],
    "vision_electra": [
        "total, cfg = ({}, run.cfg)",
        'deceive = cfg.adversarial != "none" and run.epoch >= cfg.generator_warmup_epochs',
        "loss, terms = model(images, noise, cfg.gan_weight if deceive else 0.0)",
        "if cfg.generator_waits and run.epoch < cfg.generator_warmup_epochs:",
        'getattr(model, "module", model).generator.zero_grad(set_to_none=True)',
        'for name, network in getattr(model, "module", model).named_children():',
        'total[f"grad_norm_{name}"] = nn.utils.clip_grad_norm_(network.parameters(), math.inf)',
        "grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)",
        "watch_for_collapse(terms, run)",
        'run.save(getattr(model, encoder).trunk_state(), prefix=f"{encoder}.")',
    ],
    "mff_feature": [],  # whose train_step is mae_mff.py's
    "revcol_v2": ['run.save(model.trunk_state(), model=f"revcol_{cfg.model}")'],
}


def syntax(script):
    return ast.parse((ROOT / f"{script}.py").read_text())


def imports(tree):
    """{file of ours: names taken from it}"""
    found = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            found.setdefault(getattr(node, "module", alias.name), []).append(alias.name)
    return {module: names for module, names in found.items() if module in FILES}


def needs(script):
    """The files that its imports lead to, those in functions and classes aside; and those of its own."""
    tree, found = syntax(script), {script}
    lazy = imports(tree).keys()
    tree.body = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for module in imports(tree).keys() - {script}:
        found |= needs(module)[0]
    return found, lazy - imports(tree).keys()


def rows(page, title):
    """The files named in the first and in the second column of a section's table"""
    section = (ROOT / page).read_text().split(f"## {title}\n", 1)[1].split("\n## ")[0]
    for first, second in re.findall(r"^\| (.*) \| (.*) \|$", section, re.MULTILINE):
        yield *(set(re.findall(r"`(\w+)\.py`", cell)) for cell in (first, second)), second


def test_copied_scripts_need_the_files_that_the_pages_name():
    before, scripts = set(), set()
    for copied, files, words in rows("README.md", "Copy a script"):
        files |= before if words.startswith("the same") else set()
        assert all(needs(script)[0] == files | {script, "common"} for script in copied), copied
        before, scripts = files, scripts | copied
    flags = set.union(*(files for _, files, _ in rows("docs/RUNNING.md", "Files that flags need")))
    assert set.union(*(needs(script)[1] for script in FILES)) == flags - {"beit"}  # of weights.py
    assert len(scripts) == 11 and all(len(imports(syntax(x)).get("common", ())) <= 30 for x in FILES)


def lines_of_an_update(script):
    """train_step and the loop, without comments and docstring"""
    trees = syntax("mae_mff"), syntax(script)  # a script may import the first one's train_step
    functions = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    functions["train_step"].body.pop(0)
    loop = next(node for node in functions["train"].body if isinstance(node, ast.While))
    text = "\n".join(map(ast.unparse, (functions["train_step"], loop)))
    return [line.strip() for line in text.replace("'", '"').splitlines()]


@pytest.mark.parametrize("script", OWN)
def test_one_update_reads_the_same_in_every_script(script):
    lines = list(difflib.ndiff(lines_of_an_update("mae_mff"), lines_of_an_update(script)))
    assert [line[2:] for line in lines if line[0] == "+"] == OWN[script]
    assert {line[2:] for line in lines if line[0] == "-"} <= REPLACED


@pytest.mark.parametrize("script", [*OWN, "mae_mff", "vision_electra_simmim", "convert_dalle", "finetune",
                                    "transfer_seg_det"])
def test_flags_have_help_and_an_update_few_arguments(script):
    module = importlib.import_module(script)
    common.make_parser(module.Config).format_help()  # fails at a field without a comment
    assert len(inspect.signature(module.train_step).parameters) <= 5


def test_importing_has_no_effect(tmp_path):
    code = ["import sys, torch", "sys.argv, before = ['x', '--nonsense'], torch.get_rng_state()",
            f"import {', '.join(sorted(FILES))}", "assert torch.equal(before, torch.get_rng_state())"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=tmp_path, check=True, env=environment)
    assert not list(tmp_path.iterdir())
