"""Old and new lines of metrics.jsonl are read with the columns of the current schema."""

import json

import pytest

from common.cli import UserError
from common.metrics_log import METRICS_SCHEMA, read_rows

OLD_COLUMNS = {"align": 0.5, "cosine": 0.25, "token_norm": 8.0}
NEW_COLUMNS = {"align/sra2": 0.5, "cosine/sra2": 0.25, "token_norm/sra2": 8.0}


def write_run(folder, lines, **args):
    (folder / "metrics.jsonl").write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    if args:
        (folder / "args.json").write_text(json.dumps(args))
    return folder


def test_old_columns_get_the_name_of_their_method(tmp_path):
    old = {"step": 1, **OLD_COLUMNS, "grad_norm": 1.0, "align_repa": 0.75, "token_norm_repa": None}
    run = write_run(tmp_path, [old], align=["sra2", "repa"])
    (row,) = read_rows(run)
    assert row == {
        "schema": METRICS_SCHEMA,
        "step": 1,
        **NEW_COLUMNS,
        "grad_norm": 1.0,
        "align/repa": 0.75,
        "token_norm/repa": None,
    }


def test_old_and_new_lines_of_one_run_have_the_same_columns(tmp_path):
    old = {"step": 1, **OLD_COLUMNS}
    new = {"schema": METRICS_SCHEMA, "step": 2, **NEW_COLUMNS}
    first, second = read_rows(write_run(tmp_path, [old, new], align=["sra2"]))
    assert first | {"step": 2} == second == new


def test_reading_does_not_change_new_lines(tmp_path):
    lines = [
        {"schema": METRICS_SCHEMA, "step": 1, "align": "unchanged", "mfu": 0.5},
        {"schema": METRICS_SCHEMA, "step": 1, "FID": 3.0, "evaluation": {"ema_decay": 0.9}},
    ]
    rows = read_rows(write_run(tmp_path, lines, align=["sra2"]))
    assert [json.dumps(row) for row in rows] == [json.dumps(line) for line in lines]


def test_mfu_of_older_schemas_is_the_share_of_the_matmul_rate(tmp_path):
    lines = [{"step": 1, "mfu": 0.5}, {"schema": 2, "step": 2, "align": 1.0, "mfu": 0.25}]
    assert read_rows(write_run(tmp_path, lines)) == [
        {"schema": METRICS_SCHEMA, "step": 1, "matmul_share": 0.5},
        {"schema": METRICS_SCHEMA, "step": 2, "align": 1.0, "matmul_share": 0.25},
    ]


@pytest.mark.parametrize("args", [{"align": ["none"]}, {"align": []}, {}])
def test_null_columns_of_a_run_without_alignment_are_dropped(tmp_path, args):
    old = {"step": 1, **dict.fromkeys(OLD_COLUMNS), "denoising": None}
    rows = read_rows(write_run(tmp_path, [old], **args))
    assert rows == [{"schema": METRICS_SCHEMA, "step": 1, "denoising": None}]


def test_null_columns_of_a_method_are_kept(tmp_path):
    """All steps since the previous line were skipped."""
    (row,) = read_rows(write_run(tmp_path, [{"step": 1, "align": None}], align=["sra"]))
    assert row["align/sra"] is None


@pytest.mark.parametrize("damaged_args", [None, "{", "[]"])
def test_columns_of_an_unknown_method_are_kept(tmp_path, damaged_args):
    if damaged_args:
        (tmp_path / "args.json").write_text(damaged_args)
    (row,) = read_rows(write_run(tmp_path, [{"step": 1, "align": 0.5}]))
    assert row["align/unknown"] == 0.5


def test_incomplete_last_line_is_ignored(tmp_path):
    assert len(read_rows(write_run(tmp_path, [{"step": 1}, '{"step": 2}']))) == 1
    assert read_rows(tmp_path / "not started") == []


@pytest.mark.parametrize(
    "damage",
    [
        '{"step"\n',
        "\0" * 50 + "\n",
        "[1]\n",
        '{"stop": 1}\n',
        '{"step": "1"}\n',
        '{"step": 1, "schema": null}\n',
    ],
)
def test_error_names_the_damaged_line(tmp_path, damage):
    run = write_run(tmp_path, [{"step": 1}, damage, {"step": 3}])
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged: remove it"):
        read_rows(run)


def test_line_that_is_not_utf8_is_damaged(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "a": "\xff"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged: remove it"):
        read_rows(tmp_path)


def test_lines_with_nul_bytes_are_ignored_on_request(tmp_path):
    run = write_run(tmp_path, [{"step": 1}, "\0" * 50 + "\n", '{"st\0\0": 2}\n', {"step": 3}])
    assert [row["step"] for row in read_rows(run, ignore_zeroed=True)] == [1, 3]


def test_line_written_by_newer_code_is_rejected(tmp_path):
    with pytest.raises(UserError, match="line 1 has schema 4: update this code"):
        read_rows(write_run(tmp_path, [{"schema": 4, "step": 1}]))
