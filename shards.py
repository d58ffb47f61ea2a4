"""Images inside tar files, read in place: one .tar, a folder of them, 'train-*.tar'; tars of tars, shards of
WebDataset. An image's class is the text of its sibling NAME.cls; else the inner tar that it is in, or the
first folder that not all share. A hidden file lists all, anew when a tar has another size or time."""

import glob
import os
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from common import EXTENSIONS, ImageFiles, UserError, decode_image, print0, write_atomically


def find_shards(data):
    """Sorted paths of the tars that `data` names, [] if it names none. UserError for compressed ones."""
    names = glob.escape(str(data)) + "/*" * Path(data).is_dir() if Path(data).exists() else str(data)
    found = [Path(x) for x in sorted(glob.glob(names)) if x.endswith((".tar", ".tgz", ".tar.gz", ".tar.xz"))]
    for path in found:
        if path.suffix != ".tar":
            raise UserError(f"{path} is compressed, so nothing in it can be read in place: make it a .tar")
    return found


def members(file, path, end):
    """(name, offset, size) of what is in the tar from file's place to `end`, also in tars in it."""
    inner, n, why = [], 0, ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # or it would keep all
                whole, n = member.isreg() and member.offset_data + member.size <= end, n + 1
                if whole and member.name.endswith(".tar"):
                    inner.append(member)
                elif whole:
                    yield member.name, member.offset_data, member.size
            file.seek(tar.offset)
            why = "no header where one is expected" if any(file.read(512)) else ""
    except tarfile.TarError as error:
        why = str(error)
    if why:
        print0(f"{path} is damaged after {n} files ({why}): what follows is left out")
    for member in inner:
        file.seek(member.offset_data)
        for name, *place in members(file, f"{path}/{member.name}", member.offset_data + member.size):
            yield f"{member.name[:-4]}/{name}", *place


def build_index(paths):
    """{name: array}: of each image its shard, offset, size, name and label; and the classes."""
    rows, texts, others = [], [], 0
    for number, path in enumerate(paths):
        with open(path, "rb") as file:
            listed = list(members(file, path, os.path.getsize(path)))
            marks = {name[:-4]: os.pread(file.fileno(), size, offset).decode(errors="replace").strip()
                     for name, offset, size in listed if name.endswith(".cls")}
        images = [entry for entry in listed if entry[0].lower().endswith(EXTENSIONS) and entry[2] < 2**31]
        others += len(listed) - len(images) - len(marks)
        rows += [(number, offset, size, os.fsencode(name)) for name, offset, size in images]
        texts += [marks.get(os.path.splitext(name)[0], "") for name, *_ in images]
    print0(f"{len(paths)} tars, {paths[0]} ...: {len(rows)} images, {others} other files, left out")
    if not rows:
        raise UserError(f"no image in {paths[0]} ...: expected one of {' '.join(EXTENSIONS)}")
    if not any(texts):
        folders = [os.path.dirname(os.fsdecode(name)) for *_, name in rows]
        shared = len(os.path.commonpath(set(folders))) if all(folders) else 0
        texts = [folder[shared:].strip("/").split("/")[0] for folder in folders]
        texts = texts if all(texts) else [""] * len(texts)
    classes = sorted(set(texts) - {""}, key=int if all(text.isdecimal() for text in texts) else str)
    place = dict(zip(classes, range(len(classes)), strict=True)) | {"": -1}
    shard, offset, size, name = map(np.array, zip(*rows, strict=True))
    columns = {"shard": shard, "offset": offset, "size": size, "labels": np.array([place[x] for x in texts])}
    index = {key: x.astype(np.min_scalar_type(-x.max() - 1)) for key, x in columns.items()}  # 14 million fit
    return index | {"name": name, "classes": np.array(classes, str)}


class Shards(ImageFiles):  # in the tars `paths`; index: build_index's
    def name(self, i):
        return f"{super().name(self.index['shard'][i])}/{os.fsdecode(self.index['name'][i])}"

    def read(self, i):
        with open(super().name(self.index["shard"][i]), "rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.index["size"][i], self.index["offset"][i])
        return decode_image(bytearray(data), self.name(i), self.in_chans, self.turn), int(self.labels[i])


def open_shards(paths, in_chans, turn=True):
    """Shards of these tars, by the list next to the first one, made if there is none or an old one."""
    tars = np.array([[x.name, str(x.stat().st_size), str(x.stat().st_mtime_ns)] for x in paths])
    path, index = paths[0].parent / f".list_of_{len(paths)}_{paths[0].stem}.npz", {}
    with suppress(Exception):  # not there, or damaged
        index = dict(np.load(path, allow_pickle=False))
    if not np.array_equal(index.get("tars"), tars):
        index = build_index(paths) | {"tars": tars}
        with suppress(UserError):  # a folder that may not be written: listed again in the next run
            write_atomically(path, lambda file: np.savez(file, **index))
    source = Shards(paths, index["labels"], index["classes"].tolist() or None, in_chans, turn)
    source.index = index
    return source
