"""The images of first_day.sh: what a person might have. `python benchmarks/first_day.py FOLDER N`

photos/    drawn images and, where MINMIM_TEST_DATA is set, real ones, in many formats, some broken
labelled/  CLASS/*.jpg, N of each of five classes
maps/      images with label maps; boxes/: the same with boxes and masks
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from shapes import Shapes  # noqa: E402  (found through the line above)


def save(path, array, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)


def photos(folder, n):
    source, suffixes = Shapes((120, 160), 3, seed=1), ("jpg", "png", "webp", "bmp", "tif")
    for i in range(n):
        image = source.draw(i)[0]
        if i % 7 == 3:
            image = image[..., 0]  # grey
        if i % 11 == 5:
            save(folder / f"scans/{i:03}.png", image[..., :1].astype(np.uint16).squeeze() * 200)  # 16 bit
        else:
            save(folder / f"20{i % 3 + 22}/IMG {i:03}.{suffixes[i % len(suffixes)]}", image)
    real = os.environ.get("MINMIM_TEST_DATA")
    for path in sorted(Path(real).glob("imagenet_sample/**/*.jp*g"))[:n] if real else ():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.jpg").write_bytes(b"")


def labelled(folder, n):
    source = Shapes((96, 96), 3, seed=2)
    left = dict.fromkeys(source.classes[:5], n)
    for i in range(len(source)):
        image, label = source.read(i)
        name = source.classes[label]
        if left.get(name, 0):
            left[name] -= 1
            save(folder / name / f"{i:05}.jpg", image.permute(1, 2, 0).numpy(), quality=95)


def scenes(maps, boxes, n):
    source = Shapes((64, 64), 3, seed=3)
    (maps / "images").mkdir(parents=True)
    (maps / "classes.txt").write_text("\n".join(["background", *source.classes]))
    number = 0
    for split, size in (("train", n), ("val", max(4, n // 5))):
        images, objects = [], []
        for _ in range(size):
            number += 1
            image, instances, kinds = source.draw(number)
            name = f"{number:06}"
            save(maps / f"images/{split}/{name}.jpg", image, quality=95)
            save(boxes / f"images/{split}/{name}.jpg", image, quality=95)
            labels = np.append(0, kinds + 1)[instances].astype(np.uint8)
            save(maps / f"annotations/{split}/{name}.png", labels)
            images.append({"id": number, "file_name": f"{name}.jpg", "height": 64, "width": 64})
            for i in np.unique(instances[instances > 0]):
                rows, columns = np.nonzero(instances == i)
                x, y, w, h = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]  # as a labelling tool's rectangle
                objects.append({"id": len(objects) + 1, "image_id": number, "iscrowd": 0, "area": int(w * h),
                                "category_id": int(kinds[i - 1]) + 1, "bbox": [int(v) for v in (x, y, w, h)],
                                "segmentation": [[int(v) for v in corners]]})
        (boxes / "annotations").mkdir(exist_ok=True)
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(source.classes)]
        content = {"images": images, "annotations": objects, "categories": categories}
        (boxes / f"annotations/instances_{split}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    folder, n = Path(sys.argv[1]), int(sys.argv[2])
    photos(folder / "my photos", n)
    labelled(folder / "labelled", n)
    scenes(folder / "maps", folder / "boxes", n)
