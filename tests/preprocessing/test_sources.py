"""All types of sources return the same images and classes and report errors in one line."""

import csv
import io
import json
import os
import pickle
import re
import sys
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


def make_png(seed: int) -> bytes:
    """Return a random image of 8x8 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {f"{CLASSES[i % 3]}/{i:02d}.png": make_png(i) for i in range(7)}
LABELS = {name: CLASSES.index(name.split("/")[0]) for name in FILES}
FLAT_FILES = {name.replace("/", "_"): data for name, data in FILES.items()}
FLAT_LABELS = {name.replace("/", "_"): label for name, label in LABELS.items()}
LISTED_LABELS = {"labels": list(LABELS.items()), "class_names": CLASSES}


def write_tree(folder: Path, files: dict = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def add_to_tar(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_tar(path: Path, files: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            add_to_tar(archive, name, data)
    return path


def write_zip(path: Path, files: dict, dataset_json: dict | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        if dataset_json is not None:
            archive.writestr("dataset.json", json.dumps(dataset_json))
    return path


def write_parquet(path: Path, image_indices, has_labels=True) -> Path:
    """Write a file as the library `datasets` does, in row groups of two images."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    names = [list(FILES)[i] for i in image_indices]
    table = {"image": pa.array([{"bytes": FILES[name], "path": name} for name in names])}
    if has_labels:
        table["label"] = pa.array([LABELS[name] for name in names])
    info = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
    metadata = {"huggingface": json.dumps(info)}
    parquet.write_table(pa.table(table).replace_schema_metadata(metadata), path, row_group_size=2)
    return path


def make_webdataset_files(names) -> dict:
    files = {}
    for name in names:
        key = name.replace("/", "_").removesuffix(".png")
        files[f"{key}.seg.png.txt"] = b"-"
        files[f"{key}.png"] = FILES[name]
        files[f"{key}.cls"] = str(LABELS[name]).encode()
    return files


def read_classes(source) -> dict[bytes, str]:
    """Return the name of the class of each image, keyed by its pixels."""
    return {
        bytes(load_square(source, i, 8)): source.class_names[source.labels[i]]
        for i in range(len(source))
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    source = open_source(write_tree(tmp_path_factory.mktemp("tree") / "t"))
    assert source.class_names == CLASSES and len(source) == 7 and source.names == sorted(FILES)
    return read_classes(source)


def test_zip_classes_come_from_dataset_json_or_folders(tmp_path, expected):
    assert read_classes(open_source(write_zip(tmp_path / "a.zip", FILES))) == expected
    labels = {"labels": list(FLAT_LABELS.items()), "class_names": CLASSES}
    assert read_classes(open_source(write_zip(tmp_path / "b.zip", FLAT_FILES, labels))) == expected


def test_zip_with_labels_null_has_one_class(tmp_path, expected):
    """EDM writes null for unlabeled data, whose folders are not classes."""
    files = {f"0000{i % 2}/{i}.png": data for i, data in enumerate(FILES.values())}
    source = open_source(write_zip(tmp_path / "c.zip", files, {"labels": None}))
    assert source.class_names == ["0"] and set(read_classes(source)) == set(expected)


def test_tar_classes_come_from_its_folders(tmp_path, expected):
    files = {f"./{name}": data for name, data in FILES.items()}
    assert read_classes(open_source(write_tar(tmp_path / "one.tar", files))) == expected


def test_tar_of_tars_has_one_class_per_inner_tar(tmp_path, expected):
    """ImageNet's ILSVRC2012_img_train.tar has this layout."""
    inner = {}
    for class_name in CLASSES:
        files = {
            name.split("/")[1]: data for name, data in FILES.items() if name.startswith(class_name)
        }
        path = write_tar(tmp_path / "inner" / f"{class_name}.tar", files)
        inner[path.name] = path.read_bytes()
    assert read_classes(open_source(write_tar(tmp_path / "imagenet.tar", inner))) == expected


def test_webdataset_classes_come_from_cls_files(tmp_path, expected):
    names = list(FILES)
    write_tar(tmp_path / "shards/0000.tar", make_webdataset_files(names[:4]))
    write_tar(tmp_path / "shards/0001.tar", make_webdataset_files(names[4:]))
    for path in (tmp_path / "shards", tmp_path / "shards" / "*.tar"):
        source = open_source(path)
        assert source.class_names == ["0", "1", "2"]
        assert {
            image: CLASSES[int(name)] for image, name in read_classes(source).items()
        } == expected
    assert open_source(tmp_path / "shards/0000.tar").names[0] == "apple_00.png"


def test_parquet_classes_come_from_the_label_column(tmp_path, expected):
    write_parquet(tmp_path / "hub/data/train-00000-of-00002.parquet", range(5))
    write_parquet(tmp_path / "hub/data/train-00001-of-00002.parquet", range(5, 7))
    assert read_classes(open_source(tmp_path / "hub")) == expected
    unlabeled = write_parquet(tmp_path / "unlabeled.parquet", range(7), has_labels=False)
    source = open_source(unlabeled)
    assert source.class_names == ["0"] and set(read_classes(source)) == set(expected)


def test_parquet_requires_the_choice_of_a_split(tmp_path, expected):
    write_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet", range(7))
    write_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", range(2))
    message = r"several splits \(test, train\); choose one, .* --source '.*/train-\*.parquet'"
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "hub")
    assert read_classes(open_source(tmp_path / "hub/data/train-*.parquet")) == expected


def test_parquet_without_pyarrow_is_an_error_with_the_pip_command(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        open_source(tmp_path / "a.parquet")


def test_parquet_rejects_a_label_file(tmp_path):
    (tmp_path / "labels.csv").write_text("a.png,1\n")
    path = write_parquet(tmp_path / "a.parquet", range(7))
    with pytest.raises(UserError, match="--labels requires images with file names"):
        open_source(path, labels=tmp_path / "labels.csv")


def test_parquet_finds_image_column_among_binary_columns(tmp_path, expected):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "hash": pa.array([b"x"] * 7, pa.binary()),
        "jpg": pa.array(list(FILES.values()), pa.large_binary()),  # written by Polars
        "label": [name.split("/")[0] for name in FILES],
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read_classes(open_source(tmp_path / "a.parquet")) == expected


def test_folder_of_images_has_one_class(tmp_path):
    assert open_source(write_tree(tmp_path / "flat", FLAT_FILES)).class_names == ["0"]


@pytest.mark.parametrize("style", ["file name", "stem"])
def test_csv_assigns_class_names_to_images(tmp_path, expected, style):
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        if style == "file name":
            writer.writerow(["image", "class"])
        for name, label in FLAT_LABELS.items():
            key = name if style == "file name" else name.removesuffix(".png")
            writer.writerow([key, CLASSES[label]])
    flat = write_tree(tmp_path / "flat", FLAT_FILES)
    assert read_classes(open_source(flat, labels=tmp_path / "labels.csv")) == expected


def test_csv_assigns_class_indices_to_images(tmp_path):
    rows = "".join(f"{name},{label}\n" for name, label in FLAT_LABELS.items())
    (tmp_path / "labels.csv").write_text(rows)
    source = open_source(write_tree(tmp_path / "flat", FLAT_FILES), labels=tmp_path / "labels.csv")
    assert source.labels.tolist() == [LABELS[name] for name in sorted(FILES)]


def test_csv_header_is_not_the_class_of_an_image(tmp_path):
    """The stem of image.png equals the first column of the header."""
    tree = write_tree(tmp_path / "t", {"image.png": make_png(0), "other.png": make_png(1)})
    (tmp_path / "labels.csv").write_text("image,class\nother.png,cat\n")
    with pytest.raises(UserError, match=r"has no label for image\.png"):
        open_source(tree, labels=tmp_path / "labels.csv")


def test_csv_of_a_spreadsheet_is_accepted(tmp_path, expected):
    """Spreadsheets write a byte order mark, CRLF, quotes and spaces."""
    rows = "".join(f'"{name}" , {CLASSES[label]}\r\n' for name, label in FLAT_LABELS.items())
    (tmp_path / "labels.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    flat = write_tree(tmp_path / "flat", FLAT_FILES)
    assert read_classes(open_source(flat, labels=tmp_path / "labels.csv")) == expected


def test_dataset_json_assigns_classes_from_the_flag_or_the_folder(tmp_path, expected):
    flat = write_tree(tmp_path / "flat", FLAT_FILES)
    labels = {"labels": list(FLAT_LABELS.items()), "class_names": CLASSES}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    assert read_classes(open_source(flat, labels=tmp_path / "labels.json")) == expected
    (flat / "dataset.json").write_text(json.dumps(labels))
    assert read_classes(open_source(flat)) == expected


def test_pickled_sources_return_the_same_images(tmp_path, expected):
    """Spawned processes receive pickled sources. test_encoding.py covers forked processes."""
    paths = [
        write_zip(tmp_path / "a.zip", FILES),
        write_tar(tmp_path / "a.tar", FILES),
        write_parquet(tmp_path / "a.parquet", range(7)),
    ]
    for path in paths:
        source = open_source(path)
        load_square(source, 0, 8)
        assert read_classes(pickle.loads(pickle.dumps(source))) == expected


def test_symlinks_are_followed_without_infinite_recursion(tmp_path, expected):
    tree = write_tree(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for name in CLASSES:
        (tmp_path / "linked" / name).symlink_to(tree / name)
    (tree / "apple/loop").symlink_to(tree / "apple")
    source = open_source(tmp_path / "linked")
    assert read_classes(source) == expected and len(source) == 7


def test_digest_depends_on_count_and_labels(tmp_path):
    source = open_source(write_tree(tmp_path / "a"))
    other_source = open_source(write_tree(tmp_path / "b"))
    assert source.digest(7) == other_source.digest(7) != source.digest(6)
    other_source.labels[3] += 1
    assert source.digest(7) != other_source.digest(7)


def write_zip_with_one_label(path, label):
    """Write a zip whose dataset.json assigns one label to all images."""
    labels = {"labels": [[name, label] for name in FILES]}
    return write_zip(path.with_suffix(".zip"), FILES, labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: write_tree(path, {"a/1.png": make_png(0), "2.png": make_png(1)}),
            r"outside of class folders \(2\.png\)",
        ),
        (
            lambda path: write_zip(
                path.with_suffix(".zip"), FILES, {"labels": [["apple/00.png", 0]]}
            ),
            r"no label for .* \(and 5",
        ),
        (lambda path: write_zip_with_one_label(path, -1), "label -1; labels must be from 0"),
        (lambda path: write_zip_with_one_label(path, 0.5), "found 0.5"),
        (
            lambda path: write_zip(path.with_suffix(".zip"), FILES, {"classes": 3}),
            "labels. is missing",
        ),
        (
            lambda path: write_tar(path.with_suffix(".tar"), FILES | {"x.cls": b"1"}),
            "no .cls file for apple/00.png",
        ),
        (
            lambda path: write_tree(path, {"a.tar": b"x", "b/1.png": make_png(0)}),
            r"\.tar files and folders",
        ),
        (lambda path: write_tree(path, {"a.tar": b"not a tar"}), "not a readable tar"),
        (
            lambda path: write_tree(path, {"a.tar.gz": b"x"}) / "a.tar.gz",
            "does not allow random access; decompress",
        ),
        (lambda path: write_tree(path, {"a.parquet": b"PAR1nonsense"}), "not a readable parquet"),
        (lambda path: write_tree(path, {"a.txt": b"x"}), "contains no images"),
        (lambda path: path / "*.tar", "matches no file"),
    ],
)
def test_invalid_source_is_a_one_line_error_that_names_the_flag(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(make(tmp_path / "source"))
    assert "--source" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.png,1,2\n", "row 1 has 3 columns"),
        ("a.png,1\na.png,2\n", "lists a.png twice"),
        ("apple/00.png,1\n", "no label for apple/03.png"),
        ("00,1\n01,2\n02,1\n03,1\n04,1\n05,1\n06,x\n", "all integers or all names; found 'x'"),
        ("00;1\n01;2\n", "row 1 has 1 columns; expected two columns, image,class, separated by"),
    ],
)
def test_invalid_csv_is_an_error(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(write_tree(tmp_path / "t"), labels=tmp_path / "labels.csv")


def test_names_in_csv_are_normalized(tmp_path):
    tree = write_tree(tmp_path / "t", {"a.png": make_png(0), "b/1.png": make_png(1)})
    (tmp_path / "labels.csv").write_text("./a.png , 1\nb\\1.png,0\n")
    assert open_source(tree, labels=tmp_path / "labels.csv").labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="--unlabeled cannot be combined with --labels"):
        open_source(tree, labels=tmp_path / "labels.csv", is_unlabeled=True)


def test_links_in_a_tar_are_counted_as_ignored(tmp_path):
    path = write_tar(tmp_path / "t.tar", FILES)
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("apple/link.png")
            link.type = kind
            link.linkname = "apple/00.png"
            archive.addfile(link)
    assert open_source(path).describe().endswith("2 ignored files and folders (links)")


def test_csv_class_names_are_sorted(tmp_path):
    (tmp_path / "labels.csv").write_text("00,b\n01,a\n02,b\n03,b\n04,x\n05,a\n06,x\n")
    source = open_source(write_tree(tmp_path / "t"), labels=tmp_path / "labels.csv")
    assert source.class_names == ["a", "b", "x"]


def test_csv_row_that_matches_two_images_is_an_error(tmp_path):
    tree = write_tree(tmp_path / "t", {"a/1.png": make_png(0), "b/1.png": make_png(1)})
    (tmp_path / "labels.csv").write_text("1.png,0\n")
    with pytest.raises(UserError, match=r"1\.png matches both a/1\.png and b/1\.png"):
        open_source(tree, labels=tmp_path / "labels.csv")


def test_damaged_or_truncated_tar_is_an_error(tmp_path):
    """tarfile treats an unreadable header as the end of the file and ignores the rest."""
    data = write_tar(tmp_path / "a.tar", FILES).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        fourth = archive.getmembers()[3].offset
    damaged = data[:fourth] + b"x" * 512 + data[fourth + 512 :]
    message = (
        r"a\.tar is not a readable tar file \((the file is damaged or truncated at|unexpected end)"
    )
    for invalid in (damaged, data[:fourth], data[: fourth + 100], data[: fourth + 600]):
        (tmp_path / "a.tar").write_bytes(invalid)
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "a.tar")

    valid = write_tar(tmp_path / "valid.tar", {"1.png": make_png(1)}).read_bytes()
    for invalid in (damaged, b"not a tar" * 100, bytes(10240)):
        files = {"apple.tar": valid, "bear.tar": invalid, "cow.tar": valid}
        write_tar(tmp_path / "outer.tar", files)
        with pytest.raises(UserError, match=r"nested tar file bear\.tar"):
            open_source(tmp_path / "outer.tar")


def test_folder_of_imagenet_tars_has_one_class_per_tar(tmp_path):
    for k, name in enumerate(("n02084071", "n01440764")):
        files = {f"{name}_{i}.png": make_png(10 * k + i) for i in range(2)}
        write_tar(tmp_path / f"t/{name}.tar", files)
    source = open_source(tmp_path / "t")
    assert source.class_names == ["n01440764", "n02084071"]
    assert source.labels.tolist() == [0, 0, 1, 1]


def test_tar_paths_in_dataset_json_are_relative_to_its_folder(tmp_path, expected):
    files = {f"set/{name}": data for name, data in FILES.items()}
    files["set/dataset.json"] = json.dumps(LISTED_LABELS).encode()
    assert read_classes(open_source(write_tar(tmp_path / "a.tar", files))) == expected


def test_tar_with_absolute_paths_is_accepted(tmp_path, expected):
    files = {f"/{name}": data for name, data in FILES.items()}
    assert read_classes(open_source(write_tar(tmp_path / "b.tar", files))) == expected


def test_last_of_two_tar_entries_with_the_same_name_is_read(tmp_path, expected):
    with tarfile.open(write_tar(tmp_path / "c.tar", FILES), "a") as archive:
        add_to_tar(archive, "apple/00.png", make_png(77))
    source = open_source(tmp_path / "c.tar")
    assert len(source) == 7 and bytes(load_square(source, 0, 8)) not in expected


def test_two_images_with_one_webdataset_key_are_an_error(tmp_path):
    write_tar(tmp_path / "d.tar", {"1.png": make_png(1), "1.seg.png": make_png(2), "1.cls": b"0"})
    with pytest.raises(UserError, match=r"two images for 1\.cls"):
        open_source(tmp_path / "d.tar")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([1, 2**70], f"has label {2**70}"),
        (["²", 1], "found '²'"),
        (["--5", "", "1"], "found '--5'"),
        ([None, 1], "found None"),
        ([{}, 1], "found {}"),
        ([0.5, 1], "found 0.5"),
    ],
)
def test_invalid_classes_are_an_error(classes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        index_classes(classes, None, "--labels x")


@pytest.mark.parametrize("classes", [["2.0", "10.0", "1.0"], [2.0, 10.0, 1.0]])
def test_integral_floats_are_class_indices(classes):
    labels, _ = index_classes(classes, None, "--labels x")
    assert labels.tolist() == [2, 10, 1]


@pytest.mark.parametrize(
    ("class_names", "message"),
    [(5, "list of names"), (["a", "a"], "duplicate"), (["a", 1], "list of names")],
)
def test_invalid_class_names_are_an_error(class_names, message):
    with pytest.raises(UserError, match=message):
        index_classes([0, 1], class_names, "--labels x")


def test_unreadable_folder_is_an_error_that_names_it(tmp_path, monkeypatch):
    write_tree(tmp_path / "t")
    scandir = os.scandir

    def scandir_without_permission(path):
        if str(path).endswith("bear"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir_without_permission)
    with pytest.raises(UserError, match=r"t/bear cannot be listed \(Permission denied\)"):
        open_source(tmp_path / "t")
