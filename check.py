"""--check_data: read all images as training would, and print what a person would want to know of them.

A set of images may have `check(print)` for more, as label maps and boxes do: it raises UserError if training
would find nothing to learn from.
"""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import FORMATS, ImageArray, ImageFiles, KeyedSamples, UserError, init_worker, orientation, print0


class Looks(torch.utils.data.Dataset):
    """Facts on each image of `source`."""

    def __init__(self, source):
        self.samples = KeyedSamples(source, None, seed=0, tries=1)
        self.files = isinstance(source, ImageFiles) and not isinstance(source, ImageArray)

    def __len__(self):
        return len(self.samples.source)

    def __getitem__(self, index):
        image, label, bad = self.samples.read(index)
        facts = {"bad": bad, "label": label, "turn": 1, "pages": False}
        if bad:
            return facts
        C, H, W = image.shape
        facts |= {"size": f"{W}x{H}", "low": image.min().item(), "high": image.max().item(),
                  "kind": "8 bit, 0 to 255" if image.dtype == torch.uint8 else "other, 16 bit as 0 to 1"}
        path = Path(self.samples.source.name(index))
        if self.files and path.suffix.lower() != ".npy":
            with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as header:
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
    suffixes = Counter(Path(source.name(i)).suffix.lower() for i in range(len(source)))
    if isinstance(source, ImageFiles) and not isinstance(source, ImageArray):
        print0(f"  files: {listing(suffixes)}")
    print0(f"  sizes, width x height: {listing(Counter(fact['size'] for fact in good))}")
    for kind in sorted({fact["kind"] for fact in good}):
        some = [fact for fact in good if fact["kind"] == kind]
        low, high = min(fact["low"] for fact in some), max(fact["high"] for fact in some)
        print0(f"  values ({kind}) of {len(some)} images: {low:.4g} to {high:.4g}")
    turned = Counter(f"orientation {fact['turn']}:" for fact in good if fact["turn"] != 1)
    if turned:
        done = "applied" if getattr(source, "turn", True) else "ignored"
        print0(f"  rotation tags ({done}; --exif apply or ignore decides): {listing(turned)}")
    if pages := sum(fact["pages"] for fact in good):
        print0(f"  files of several pages or frames, of which the first is read: {pages}")
    problems = []
    if source.classes and len(good) and max(fact["label"] for fact in good) >= 0:
        labels = np.array([fact["label"] for fact in good])
        counts = Counter({name: int((labels == i).sum()) for i, name in enumerate(source.classes)})
        ranked = counts.most_common()
        print0(f"  {len(counts)} classes; largest {ranked[0][0]} {ranked[0][1]}, smallest {ranked[-1][0]} "
               f"{ranked[-1][1]}; without label: {int((labels < 0).sum())}")
        empty = [name for name, n in ranked if not n]
        if empty and part == "train":
            problems.append(f"{len(empty)} classes without an image, such as {empty[0]}")
        elif empty:
            print0(f"  classes without an image here: {', '.join(empty[:8])}")
    print0("\n    ".join([f"  unreadable: {len(bad)}", *(f"{path}: {why}" for path, why in bad[:20]),
                          *[f"and {len(bad) - 20} more"] * (len(bad) > 20)]))
    run.samples(source, None)  # sets the limit
    if len(bad) > run.bad_limit:
        problems.append(f"{len(bad)} unreadable files, more than the {run.bad_limit} of --max_bad")
    if check := getattr(source, "check", None):
        check(print0)
    return [f"{part}: {problem}" for problem in problems]


def check_data(parts, run):
    """Print on {part: source}; UserError if training would not run, or would have nothing to learn from."""
    problems = [problem for part, source in parts.items() for problem in check_part(part, source, run)]
    if problems:
        raise UserError("; ".join(problems))
