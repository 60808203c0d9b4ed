"""Every kind of source gives the same images and classes; what it cannot give is said in one line."""

import csv
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from preprocessing.images import load_square
from preprocessing.labels import index_classes
from preprocessing.sources import open_source

CLASSES = ["apple", "bear", "cow"]


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


FILES = {f"{CLASSES[i % 3]}/{i:02d}.png": png(i) for i in range(7)}
LABELS = {name: CLASSES.index(name.split("/")[0]) for name in FILES}


def write_tree(folder: Path, files: dict = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict, meta: dict | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        if meta is not None:
            archive.writestr("dataset.json", json.dumps(meta))
    return path


def write_parquet(path: Path, numbers, labels=True, names=CLASSES) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(data, LABELS[name]) for name, data in FILES.items()]
    table = {"image": pa.array([{"bytes": rows[i][0], "path": f"{i}.png"} for i in numbers])}
    if labels:
        table["label"] = pa.array([rows[i][1] for i in numbers])
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    parquet.write_table(
        pa.table(table).replace_schema_metadata({"huggingface": json.dumps(info)} if names else {}),
        path,
        row_group_size=2,
    )
    return path


def content(source) -> dict[bytes, str]:
    """Image -> class."""
    return {
        bytes(load_square(source, i, 8)): source.class_names[source.labels[i]]
        for i in range(len(source))
    }


EXPECTED = None


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    source = open_source(write_tree(tmp_path_factory.mktemp("tree") / "t"))
    assert source.class_names == CLASSES and len(source) == 7 and source.names == sorted(FILES)
    return content(source)


def webdataset(names) -> dict:
    files = {}
    for name in names:
        key = name.replace("/", "_")[:-4]
        files |= {
            f"{key}.seg.png.txt": b"-",
            f"{key}.png": FILES[name],
            f"{key}.cls": str(LABELS[name]).encode(),
        }
    return files


def test_a_zip_with_and_without_dataset_json(tmp_path, expected):
    assert content(open_source(write_zip(tmp_path / "a.zip", FILES))) == expected
    meta = {"labels": list(LABELS.items()), "class_names": CLASSES}
    flat = {f"00000/{i}.png": data for i, data in enumerate(FILES.values())}
    assert content(open_source(write_zip(tmp_path / "b.zip", FILES, meta))) == expected
    unlabelled = open_source(
        write_zip(tmp_path / "c.zip", flat, {"labels": None})
    )  # EDM's folders are no classes
    assert unlabelled.class_names == ["0"] and set(content(unlabelled)) == set(expected)


def test_tars(tmp_path, expected):
    assert (
        content(
            open_source(
                write_tar(tmp_path / "one.tar", {f"./{name}": data for name, data in FILES.items()})
            )
        )
        == expected
    )
    inner = {}
    for name in CLASSES:
        members = {
            file.split("/")[1]: data for file, data in FILES.items() if file.startswith(name)
        }
        inner[f"{name}.tar"] = write_tar(tmp_path / "inner" / f"{name}.tar", members).read_bytes()
    assert (
        content(open_source(write_tar(tmp_path / "imagenet.tar", inner))) == expected
    )  # ILSVRC2012_img_train.tar
    names = list(FILES)
    write_tar(tmp_path / "shards/0000.tar", webdataset(names[:4]))
    write_tar(tmp_path / "shards/0001.tar", webdataset(names[4:]))
    for path in (tmp_path / "shards", tmp_path / "shards" / "*.tar"):
        source = open_source(path)
        assert source.class_names == ["0", "1", "2"]
        assert {image: CLASSES[int(name)] for image, name in content(source).items()} == expected
    assert open_source(tmp_path / "shards/0000.tar").names[0] == "apple_00.png"


def test_parquet(tmp_path, expected):
    write_parquet(tmp_path / "hub/data/train-00000-of-00002.parquet", range(0, 5))
    write_parquet(tmp_path / "hub/data/train-00001-of-00002.parquet", range(5, 7))
    assert content(open_source(tmp_path / "hub")) == expected
    write_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", range(2))
    with pytest.raises(
        UserError,
        match=r"several splits \(test, train\): name one, as in --source '.*/train-\*.parquet'",
    ):
        open_source(tmp_path / "hub")
    assert content(open_source(tmp_path / "hub/data/train-*.parquet")) == expected
    bare = open_source(write_parquet(tmp_path / "bare.parquet", range(7), labels=False))
    assert bare.class_names == ["0"] and set(content(bare)) == set(expected)


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        open_source(tmp_path / "a.parquet")


def test_labels_by_csv_and_json(tmp_path, expected):
    flat = write_tree(
        tmp_path / "flat", {name.replace("/", "_"): data for name, data in FILES.items()}
    )
    assert open_source(flat).class_names == ["0"]  # unlabelled data is one class
    for style in ("path", "stem"):
        with open(tmp_path / f"{style}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "class"]) if style == "path" else None
            for name in FILES:
                key = name.replace("/", "_")
                writer.writerow([key if style == "path" else key[:-4], name.split("/")[0]])
        assert content(open_source(flat, labels=tmp_path / f"{style}.csv")) == expected
    (tmp_path / "n.csv").write_text(
        "".join(f"{name.replace('/', '_')},{label}\n" for name, label in LABELS.items())
    )
    assert open_source(flat, labels=tmp_path / "n.csv").labels.tolist() == [
        LABELS[n] for n in sorted(FILES)
    ]
    labels = [[name.replace("/", "_"), label] for name, label in LABELS.items()]
    (tmp_path / "labels.json").write_text(json.dumps({"labels": labels, "class_names": CLASSES}))
    assert content(open_source(flat, labels=tmp_path / "labels.json")) == expected
    (flat / "dataset.json").write_text((tmp_path / "labels.json").read_text())
    assert content(open_source(flat)) == expected


def test_sources_go_to_other_processes(tmp_path, expected):
    """Pickled, as where processes are not forked; forked ones are tested with the encoding."""
    paths = [write_zip(tmp_path / "a.zip", FILES), write_tar(tmp_path / "a.tar", FILES)]
    for path in [*paths, write_parquet(tmp_path / "a.parquet", range(7))]:
        source = open_source(path)
        load_square(source, 0, 8)
        assert content(pickle.loads(pickle.dumps(source))) == expected


def test_links_are_followed_and_do_not_go_round(tmp_path, expected):
    tree = write_tree(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for name in CLASSES:
        (tmp_path / "linked" / name).symlink_to(tree / name)
    (tree / "apple/loop").symlink_to(tree / "apple")
    source = open_source(tmp_path / "linked")
    assert content(source) == expected and len(source) == 7


def test_the_digest_tells_lists_apart(tmp_path):
    source = open_source(write_tree(tmp_path / "a"))
    again = open_source(write_tree(tmp_path / "b"))
    assert source.digest(7) == again.digest(7) != source.digest(6)
    again.labels[3] += 1
    assert source.digest(7) != again.digest(7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write_tree(p, {"a/1.png": png(0), "2.png": png(1)}), r"beside them \(2\.png\)"),
        (
            lambda p: write_zip(p.with_suffix(".zip"), FILES, {"labels": [["apple/00.png", 0]]}),
            r"no label for .* \(and 5",
        ),
        (
            lambda p: write_zip(p.with_suffix(".zip"), FILES, {"labels": [[n, -1] for n in FILES]}),
            "label -1: .*from 0",
        ),
        (
            lambda p: write_zip(
                p.with_suffix(".zip"), FILES, {"labels": [[n, 0.5] for n in FILES]}
            ),
            "not 0.5",
        ),
        (lambda p: write_zip(p.with_suffix(".zip"), FILES, {"classes": 3}), "KeyError"),
        (
            lambda p: write_tar(p.with_suffix(".tar"), FILES | {"x.cls": b"1"}),
            "no .cls beside apple/00.png",
        ),
        (lambda p: write_tree(p, {"a.tar": b"x", "b/1.png": png(0)}), r"\.tar files and folders"),
        (lambda p: write_tree(p, {"a.tar": b"not a tar"}), "not a readable tar"),
        (
            lambda p: write_tree(p, {"a.tar.gz": b"x"}) / "a.tar.gz",
            "cannot be read from the middle: unpack",
        ),
        (lambda p: write_tree(p, {"a.parquet": b"PAR1nonsense"}), "not a readable parquet"),
        (lambda p: write_tree(p, {"a.txt": b"x"}), "holds no images"),
        (lambda p: p / "*.tar", "matches no file"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(make(tmp_path / "source"))
    assert "--source" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.png,1,2\n", "row 1 has 3 columns"),
        ("a.png,1\na.png,2\n", "names a.png twice"),
        ("apple/00.png,1\n", "no label for apple/03.png"),
        ("00,1\n01,2\n02,1\n03,1\n04,1\n05,1\n06,x\n", "all whole numbers, or all names, not 'x'"),
        ("00;1\n01;2\n", "row 1 has 1 columns; wanted are two, image,class, with a comma between"),
        ("00,b\n01,a\n02,b\n03,b\n04,x\n05,a\n06,x\n", None),
    ],
)
def test_csvs_are_checked(tmp_path, text, message):
    (tmp_path / "l.csv").write_text(text)
    tree = write_tree(tmp_path / "t")
    if message is None:
        assert open_source(tree, labels=tmp_path / "l.csv").class_names == ["a", "b", "x"]
        return
    with pytest.raises(UserError, match=message):
        open_source(tree, labels=tmp_path / "l.csv")


def test_a_csv_that_fits_several_images_is_refused(tmp_path):
    tree = write_tree(tmp_path / "t", {"a/1.png": png(0), "b/1.png": png(1)})
    (tmp_path / "l.csv").write_text("1.png,0\n")
    with pytest.raises(UserError, match=r"does not tell a/1\.png and b/1\.png apart"):
        open_source(tree, labels=tmp_path / "l.csv")


def test_damaged_and_cut_off_tars_are_refused(tmp_path):
    """tarfile takes a header that it cannot read for the end, and would lose the rest without a word."""
    data = write_tar(tmp_path / "a.tar", FILES).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        fourth = archive.getmembers()[3].offset
    damaged = data[:fourth] + b"x" * 512 + data[fourth + 512 :]
    for text in (damaged, data[:fourth], data[: fourth + 100], data[: fourth + 600]):
        (tmp_path / "a.tar").write_bytes(text)
        with pytest.raises(
            UserError, match=r"a\.tar is not a readable tar \((it ends at byte|unexpected end)"
        ):
            open_source(tmp_path / "a.tar")
    good = write_tar(tmp_path / "good.tar", {"1.png": png(1)}).read_bytes()
    for bad in (damaged, b"not a tar" * 100, bytes(10240)):
        write_tar(tmp_path / "outer.tar", {"apple.tar": good, "bear.tar": bad, "cow.tar": good})
        with pytest.raises(UserError, match=r"bear\.tar in it"):
            open_source(tmp_path / "outer.tar")


def test_class_tars_of_imagenet_in_a_folder(tmp_path):
    for k, name in enumerate(("n02084071", "n01440764")):
        write_tar(
            tmp_path / f"t/{name}.tar", {f"{name}_{i}.png": png(10 * k + i) for i in range(2)}
        )
    source = open_source(tmp_path / "t")
    assert source.class_names == ["n01440764", "n02084071"] and source.labels.tolist() == [
        0,
        0,
        1,
        1,
    ]


def test_odd_tars(tmp_path, expected):
    """A folder of EDM's in a tar, absolute names, a name that comes twice, two images for one class."""
    meta = json.dumps({"labels": list(LABELS.items()), "class_names": CLASSES}).encode()
    inside = {f"set/{name}": data for name, data in FILES.items()}
    assert (
        content(open_source(write_tar(tmp_path / "a.tar", inside | {"set/dataset.json": meta})))
        == expected
    )
    assert (
        content(
            open_source(
                write_tar(tmp_path / "b.tar", {f"/{name}": data for name, data in FILES.items()})
            )
        )
        == expected
    )
    with tarfile.open(write_tar(tmp_path / "c.tar", FILES), "a") as archive:
        info = tarfile.TarInfo("apple/00.png")
        info.size = len(png(77))
        archive.addfile(info, io.BytesIO(png(77)))
    twice = open_source(tmp_path / "c.tar")
    assert (
        len(twice) == 7 and bytes(load_square(twice, 0, 8)) not in expected
    )  # as tar does: the last
    write_tar(tmp_path / "d.tar", {"1.png": png(1), "1.seg.png": png(2), "1.cls": b"0"})
    with pytest.raises(UserError, match=r"two images for one class, 1\.cls"):
        open_source(tmp_path / "d.tar")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2**70], f"has label {2**70}"),
        (["²", 1], "not '²'"),
        (["--5", "", "1"], "not '--5'"),
        ([None, 1], "not None"),
        ([{}, 1], "not {}"),
        ([0.5, 1], "not 0.5"),
        (["2.0", "10.0", "1.0"], None),
        ([2.0, 10.0, 1.0], None),
    ],
)
def test_odd_labels(labels, message):
    if message:
        with pytest.raises(UserError, match=re.escape(message)):
            index_classes(labels, None, "--labels x")
    else:
        assert index_classes(labels, None, "--labels x")[0].tolist() == [2, 10, 1]
    for names, what in (
        (5, "list of names"),
        (["a", "a"], "a name twice"),
        (["a", 1], "list of names"),
    ):
        with pytest.raises(UserError, match=what):
            index_classes([0, 1], names, "--labels x")


def test_a_csv_of_a_spreadsheet(tmp_path, expected):
    """Byte-order mark, CRLF, quotes, spaces."""
    tree = write_tree(
        tmp_path / "flat", {name.replace("/", "_"): data for name, data in FILES.items()}
    )
    rows = "".join(f'"{name.replace("/", "_")}" , {name.split("/")[0]}\r\n' for name in FILES)
    (tmp_path / "l.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert content(open_source(tree, labels=tmp_path / "l.csv")) == expected


def test_parquet_of_polars_and_with_other_columns(tmp_path, expected):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "hash": pa.array([b"x"] * 7, pa.binary()),
        "jpg": pa.array(list(FILES.values()), pa.large_binary()),
        "label": [name.split("/")[0] for name in FILES],
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert content(open_source(tmp_path / "a.parquet")) == expected


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    write_tree(tmp_path / "t")
    scandir = os.scandir

    def fails(path):
        if str(path).endswith("bear"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(UserError, match=r"t/bear cannot be listed \(Permission denied\)"):
        open_source(tmp_path / "t")
