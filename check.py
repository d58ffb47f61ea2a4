"""--check_data: read all images as training would, and print what a person would want to know of them.

A set of images whose targets are more than a class has `unit` and `count(target)`, {class, or -1 where
nothing is labelled: number}, as label maps and boxes do.
"""

from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image

from common import FORMATS, KeyedSamples, UserError, init_worker, open_data, orientation, print0
from sources import open_part


class Looks(torch.utils.data.Dataset):
    """Facts on each image of `source`."""

    def __init__(self, source):
        self.samples = KeyedSamples(source, None, seed=0, tries=1)

    def __len__(self):
        return len(self.samples.source)

    def __getitem__(self, index):
        image, label, bad = self.samples.read(index)
        path = Path(self.samples.source.name(index))
        facts = {"bad": bad, "suffix": path.suffix.lower(), "turn": 1, "pages": False}
        if bad:
            return facts
        count = getattr(self.samples.source, "count", lambda label: Counter([label]))
        facts |= {"counts": dict(count(label)), "size": f"{image.shape[2]}x{image.shape[1]}",
                  "low": image.min().item(), "high": image.max().item(),
                  "kind": "8 bit, 0 to 255" if image.dtype == torch.uint8 else "other, 16 bit as 0 to 1"}
        if path.is_file() and path.suffix.lower() != ".npy":  # not one of an array, or drawn
            with Image.open(path, formats=FORMATS) as header:
                facts |= {"turn": orientation(header), "pages": getattr(header, "is_animated", False)}
        return facts


def listing(counts, most=8):
    rest = len(counts) - most
    return ", ".join(f"{name} {n}" for name, n in counts.most_common(most)) + f", {rest} more" * (rest > 0)


def check_part(part, source, run):
    """Print on one set of images; returns what makes training impossible, in words."""
    loader = torch.utils.data.DataLoader(Looks(source), batch_size=None, num_workers=run.workers,
                                         worker_init_fn=init_worker)
    facts = list(loader)
    good = [fact for fact in facts if not fact["bad"]]
    bad = [entry for fact in facts for entry in fact["bad"]]
    print0(f"{part}: {len(facts)} images, for example {source.name(0)}")
    print0(f"  suffixes: {listing(Counter(fact['suffix'] or 'none' for fact in facts))}")
    print0(f"  sizes, width x height: {listing(Counter(fact['size'] for fact in good))}")
    for kind in sorted({fact["kind"] for fact in good}):
        some = [fact for fact in good if fact["kind"] == kind]
        low, high = min(fact["low"] for fact in some), max(fact["high"] for fact in some)
        print0(f"  values ({kind}) of {len(some)} images: {low:.4g} to {high:.4g}")
    turned = Counter(f"orientation {fact['turn']}:" for fact in good if fact["turn"] != 1)
    if turned:
        done = "applied" if getattr(source, "turn", True) else "ignored"
        done += "; are labels drawn on the image as shown, or as stored?" if hasattr(source, "unit") else ""
        print0(f"  rotation tags ({done}; --exif apply or ignore decides): {listing(turned)}")
    if pages := sum(fact["pages"] for fact in good):
        print0(f"  files of several pages or frames, of which the first is read: {pages}")
    problems = []
    totals = Counter()
    for fact in good:
        totals.update(fact["counts"])
    unlabelled = totals.pop(-1, 0)
    if source.classes and totals:
        n, unit = totals.total() + unlabelled, getattr(source, "unit", "images")
        ranked = Counter({name: totals[i] for i, name in enumerate(source.classes)}).most_common()
        print0(f"  {len(ranked)} classes; {unit}, largest and smallest: "
               + ", ".join(f"{name} {k} ({k / n:.1%})" for name, k in [*ranked[:6], *ranked[6:][-3:]]))
        if unlabelled:
            print0(f"  {unit} without a label, which do not count: {unlabelled} ({unlabelled / n:.1%})")
        empty = [name for name, k in ranked if not k]
        if empty:
            problems += [f"{len(empty)} classes without {unit}, such as {empty[0]}"] * (part == "train")
            print0(f"  classes without {unit} here: {', '.join(empty[:8])}")
    elif source.classes and good:
        problems.append("nothing is labelled")
    print0("\n    ".join([f"  unreadable: {len(bad)}", *(f"{path}: {why}" for path, why in bad[:20]),
                          *[f"and {len(bad) - 20} more"] * (len(bad) > 20)]))
    if len(bad) > run.bad_allowed(len(source)):
        problems.append(f"{len(bad)} unreadable files, more than --max_bad allows")
    return [f"{part}: {problem}" for problem in problems]


def open_parts(cfg):
    """{part: images}: for pre-training, and those held out if there are."""
    parts = {"train": open_data(cfg)}
    with suppress(UserError):
        parts["val"] = open_part(cfg, cfg.data, "val", parts["train"].classes)
    return parts


def check_data(open_sets, run):
    """Print on all parts; UserError if training would not run, or would have nothing to learn from."""
    parts = (open_sets or open_parts)(run.cfg)
    problems = [problem for part, source in parts.items() for problem in check_part(part, source, run)]
    if problems:
        raise UserError("; ".join(problems))
