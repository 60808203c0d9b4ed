"""The same rules determine the classes of folders, zip files and tar files (docs/data.md)."""

import errno
import json
import os
from pathlib import Path

import pytest

from common.cli import UserError
from preprocessing.listing import IGNORED_NAMES, find_ignored_name, normalize_path
from preprocessing.sources import open_source
from tests.preprocessing.test_sources import make_png, write_tar, write_tree, write_zip

IMAGE = make_png(0)
WRITERS = {
    "folder": write_tree,
    "zip": lambda path, files: write_zip(path.with_suffix(".zip"), files),
    "tar": lambda path, files: write_tar(path.with_suffix(".tar"), files),
}


def make_files(*names: str, **contents: object) -> dict[str, bytes]:
    """Return images with these names, and files with other contents."""
    return dict.fromkeys(names, IMAGE) | encode_contents(contents)


def encode_contents(contents: dict) -> dict[str, bytes]:
    return {
        name: (value if isinstance(value, str) else json.dumps(value)).encode()
        for name, value in contents.items()
    }


def read_labels(source) -> dict[str, str]:
    """Return the name of the class of each image, by the normalized path of the image."""
    classes = [source.class_names[label] for label in source.labels]
    return {normalize_path(name): name_of for name, name_of in zip(source.names, classes)}


FOLDERS = {"cat/1.png": "cat", "dog/1.png": "dog"}
METADATA = "file_name,label\na.png,dog\nb.png,cat\n"
SIDECARS = {"a.png": "1", "b.png": "0"}
LABELED = {
    "parent folder": (make_files("m/cat/1.png", "m/dog/1.png"), "cat", "dog"),
    "two parent folders": (make_files("m/n/cat/1.png", "m/n/dog/x/1.png"), "cat", "dog"),
    "one split": (make_files("train/cat/1.png", "train/dog/1.png"), "cat", "dog"),
    "dataset.json in a parent folder": (
        make_files(
            "m/0/a.png",
            "m/1/b.png",
            **{"m/dataset.json": {"labels": [["0/a.png", 1], ["1/b.png", 0]]}},
        ),
        "1",
        "0",
    ),
    "dataset.json in each folder": (
        make_files(
            "x/a.png",
            "y/a.png",
            **{"x/dataset.json": {"labels": [["a.png", 1]]}},
            **{"y/dataset.json": {"labels": [["a.png", 0]]}},
        ),
        "1",
        "0",
    ),
    "cls": (make_files("a.png", "b.png", **{"a.cls": "1", "b.cls": "0"}), "1", "0"),
    "upper-case CLS": (make_files("a.PNG", "b.png", **{"a.CLS": "1\n", "b.cls": "0"}), "1", "0"),
    "index": (make_files("a.png", "b.png", **{"a.index": "1", "b.index": "0"}), "1", "0"),
    "dots in names": (
        make_files("22.05.png", "22.06.png", **{"22.05.cls": "1", "22.06.cls": "0"}),
        "1",
        "0",
    ),
    "json of img2dataset": (
        make_files(
            "00000/a.png",
            "00000/b.png",
            **{"00000/a.json": {"caption": "x", "label": 1}, "00000/a.txt": "x"},
            **{"00000/b.json": {"caption": "y", "label": 0}, "00000/b.txt": "y"},
        ),
        "1",
        "0",
    ),
    "txt with integers": (make_files("a.png", "b.png", **{"a.txt": "1", "b.txt": "0"}), "1", "0"),
    "metadata.csv": (
        make_files("a.png", "b.png", **{"metadata.csv": "file_name,label\na.png,1\nb.png,0\n"}),
        "1",
        "0",
    ),
    "metadata.jsonl": (
        make_files(
            "t/a.png",
            "t/b.png",
            **{
                "t/metadata.jsonl": '{"file_name": "a.png", "label": "x"}\n'
                '{"file_name": "b.png", "label": "y"}\n'
            },
        ),
        "x",
        "y",
    ),
    "captions next to class folders": (
        make_files("cat/1.png", "dog/1.png", **{"cat/1.txt": "a cat", "dog/1.txt": "a dog"}),
        "cat",
        "dog",
    ),
}
AMBIGUOUS = {
    "splits": (
        make_files("train/cat/1.png", "val/cat/1.png"),
        r"contains several splits \(train, val\); pass the folder of one split",
    ),
    "splits in a parent folder": (
        make_files("m/Train/cat/1.png", "m/Test/cat/1.png"),
        r"several splits \(Test, Train\)",
    ),
    "splits in class folders": (
        make_files("cat/train/1.png", "cat/val/1.png", "dog/train/1.png"),
        r"several splits \(train, val\)",
    ),
    "ImageNet's root": (
        make_files("Data/CLS-LOC/train/n01/1.png", "Data/CLS-LOC/val/1.png"),
        r"several splits \(train, val\)",
    ),
    "captions only": (
        make_files("a.png", "b.png", **{"a.txt": "a cat", "b.txt": "a dog"}),
        r"has \.txt files, but no classes were read from them; pass --labels FILE, or --unlabeled",
    ),
    "captions in numbered folders": (
        make_files("00000/a.png", "00001/b.png", **{"00000/a.txt": "x", "00001/b.txt": "y"}),
        r"pass --labels FILE, or --unlabeled",
    ),
    "captions in metadata.csv": (
        make_files("a.png", **{"metadata.csv": "file_name,text\na.png,a cat\n"}),
        r"has metadata\.csv files, but no classes were read from them",
    ),
    "some json files without a label": (
        make_files("a.png", "b.png", **{"a.json": {"label": 1}, "b.json": {"caption": "x"}}),
        r"no \.json file for b\.png, or the file contains no class",
    ),
    "some rows of metadata.csv without a label": (
        make_files(
            "x/a.png", "y/b.png", **{"metadata.csv": "file_name,label\nx/a.png,1\ny/b.png,"}
        ),
        r"metadata\.csv has no class for y/b\.png",
    ),
    "empty metadata.csv": (
        make_files("a.png", **{"metadata.csv": "file_name,label\n"}),
        r"has metadata\.csv files, but no classes were read",
    ),
    "two classes of an image": (
        make_files("a.png", **{"dataset.json": {"labels": [["a.png", 1], ["./a.png", 0]]}}),
        r"dataset\.json lists \./a\.png twice",
    ),
    "number in place of a name": (
        make_files("a.png", **{"dataset.json": {"labels": [[7, 1]]}}),
        r"dataset\.json has 7 in place of the name of an image",
    ),
    "other tables": (
        make_files("a.png", **{"train.csv": "id,breed\na,cat\n"}),
        r"has train\.csv files, but no classes were read from them; pass --labels FILE",
    ),
    "damaged json": (
        make_files("a.png", **{"a.json": "{"}),
        r"a\.json is not a JSON file",
    ),
    "images next to class folders": (
        make_files("m/cat/1.png", "m/2.png"),
        r"inside and outside of class folders \(m/2\.png\)",
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("case", LABELED)
def test_classes_are_found_in_every_kind_of_source(tmp_path, kind, case):
    files, *expected = LABELED[case]
    source = open_source(WRITERS[kind](tmp_path / "source", files))
    assert list(read_labels(source).values()) == expected
    assert source.label_origin.startswith("labels from ")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("case", AMBIGUOUS)
def test_ambiguous_classes_are_an_error_with_a_remedy(tmp_path, kind, case):
    files, message = AMBIGUOUS[case]
    path = WRITERS[kind](tmp_path / "source", files)
    with pytest.raises(UserError, match=message) as error:
        open_source(path)
    assert "\n" not in str(error.value)
    assert open_source(path, is_unlabeled=True).class_names == ["0"]


@pytest.mark.parametrize("kind", WRITERS)
def test_files_of_operating_systems_are_ignored_and_counted(tmp_path, kind):
    junk = {"__MACOSX/cat/._1.png", "cat/@eaDir/1.png/thumb.jpg", "#recycle/y.png", "Thumbs.db"}
    files = make_files(*FOLDERS, *junk, "dog/.ipynb_checkpoints/1-checkpoint.png")
    source = open_source(WRITERS[kind](tmp_path / "source", files))
    assert read_labels(source) == FOLDERS
    assert source.ignored.startswith("5 ignored files and folders (#recycle, ")
    assert source.describe().endswith(source.ignored)


def test_unreadable_ignored_folder_is_skipped(tmp_path, monkeypatch):
    scandir = os.scandir

    def fail_to_scan(folder):
        if Path(folder).name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    tree = write_tree(tmp_path / "t", make_files(*FOLDERS, "lost+found/x.png"))
    monkeypatch.setattr(os, "scandir", fail_to_scan)
    source = open_source(tree)
    assert read_labels(source) == FOLDERS and "lost+found" in source.ignored


def test_damaged_label_file_in_a_zip_is_reported(tmp_path):
    source = write_zip(tmp_path / "z.zip", make_files("a.png", **{"dataset.json": {"labels": []}}))
    source.write_bytes(source.read_bytes().replace(b"dataset", b"data\0et", 1))
    with pytest.raises(UserError, match=r"dataset\.json cannot be read \(File name in directory"):
        open_source(source)


def test_ignored_names_are_lower_case():
    assert all(name == name.lower() and find_ignored_name(f"a/{name}/b") for name in IGNORED_NAMES)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_with_unusual_names_have_the_same_classes(tmp_path, kind):
    for prefix, separator in (("./", "/"), ("", "\\")):
        names = [prefix + name.replace("/", separator) for name in FOLDERS]
        source = open_source(WRITERS[kind](tmp_path / f"s{len(prefix)}", make_files(*names)))
        assert read_labels(source) == FOLDERS


def test_label_file_next_to_an_archive_is_read(tmp_path):
    for kind in ("zip", "tar"):
        folder = write_tree(tmp_path / kind, encode_contents({"metadata.csv": METADATA}))
        path = WRITERS[kind](folder / "source", make_files("a.png", "b.png"))
        assert open_source(folder).class_names == ["cat", "dog"]
        assert open_source(folder, is_unlabeled=True).class_names == ["0"]
        (folder / "metadata.csv").rename(folder / "labels.csv")
        with pytest.raises(UserError, match=r"has labels\.csv files, but no classes were read"):
            open_source(folder)
        assert open_source(path).class_names == ["0"]


def test_label_files_in_and_next_to_several_tars_are_read(tmp_path):
    for i in range(2):
        labels = {"dataset.json": {"labels": [["a.png", 1 - i]]}}
        write_tar(tmp_path / f"inside/{i}.tar", make_files("a.png", **labels))
        write_tar(tmp_path / f"outside/{i}.tar", make_files(f"{i}.png"))
    labels = json.dumps({"labels": [["0.png", 1], ["1.png", 0]]})
    (tmp_path / "outside/dataset.json").write_text(labels)
    for folder in ("inside", "outside"):
        assert open_source(tmp_path / folder).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "names",
    [
        ("train-00.tar", "val-00.tar"),
        ("train/00.tar", "val/00.tar"),
        ("imagenet-train-00.tar", "imagenet-validation-00.tar"),
    ],
)
def test_archives_of_several_splits_require_a_choice(tmp_path, names):
    for name in names:
        write_tar(tmp_path / "t" / name, make_files(*FOLDERS))
    with pytest.raises(
        UserError, match=r"several splits .*choose one, for example --source '.*tar'"
    ):
        open_source(tmp_path / "t")


def test_nested_folders_of_tars_and_a_folder_with_one_zip_are_read(tmp_path):
    for i, name in enumerate(FOLDERS):
        write_tar(tmp_path / f"tars/{i}/shard.tar", make_files(name))
    write_tree(tmp_path / "zips", {"README.md": b"x"})
    write_zip(tmp_path / "zips/images.zip", make_files(*FOLDERS))
    for folder in ("tars", "zips"):
        assert open_source(tmp_path / folder).class_names == ["cat", "dog"]


def write_table(path: Path, **columns) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"image": [IMAGE] * 2, **columns}), path)
    return path


@pytest.mark.parametrize(
    ("columns", "flags", "expected"),
    [
        ({"target": [1, 0]}, {}, [1, 0]),
        ({"breed_label": [1, 0], "width": [8, 8]}, {}, [1, 0]),
        ({"breed": [1, 0], "width": [8, 8]}, {"label_column": "breed"}, [1, 0]),
        ({"breed": [1, 0], "width": [8, 8]}, {"is_unlabeled": True}, [0, 0]),
        ({"label": [-1, -1]}, {}, [0, 0]),
        ({"label": [None, None]}, {}, [0, 0]),
    ],
)
def test_parquet_label_column_is_found_or_chosen(tmp_path, columns, flags, expected):
    path = write_table(tmp_path / "a.parquet", **columns)
    assert open_source(path, **flags).labels.tolist() == expected


def test_parquet_without_a_known_label_column_is_an_error(tmp_path):
    path = write_table(tmp_path / "a.parquet", breed=[1, 0], width=[8, 8])
    with pytest.raises(UserError, match=r"columns: breed, width\); pass --label-column NAME, or"):
        open_source(path)
    with pytest.raises(UserError, match=r"--label-column colour: .* has the columns image, breed"):
        open_source(path, label_column="colour")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1], [0, 1]], r"all integers or all names; found \[1\]"),
        ([1, None], "some rows have a label and others have none"),
    ],
)
def test_parquet_with_invalid_labels_is_an_error(tmp_path, labels, message):
    path = write_table(tmp_path / "a.parquet", label=labels)
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_damaged_or_empty_parquet_is_an_error(tmp_path):
    path = write_table(tmp_path / "a.parquet", label=["some cat", "some dog"])
    path.write_bytes(path.read_bytes().replace(b"some cat", b"\xff" * 8, 1))
    with pytest.raises(UserError, match=r"a\.parquet is not a readable parquet file") as error:
        open_source(path)
    assert "\n" not in str(error.value)
    from pyarrow import parquet

    path = write_table(tmp_path / "b.parquet", label=[1, 0])
    parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(UserError, match=r"b\.parquet contains no images"):
        open_source(path)


def test_parquet_files_of_several_splits_require_a_choice(tmp_path):
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.parquet", label=[1, 0])
    with pytest.raises(UserError, match=r"several splits \(test, train\); choose one"):
        open_source(tmp_path)
