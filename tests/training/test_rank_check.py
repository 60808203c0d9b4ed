"""Test that processes that differ from each other are reported at start."""

import shutil
import socket
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import train
from common.cli import UserError
from common.processes import ProcessEnvironment
from latents.cache import LatentCache
from tests.helpers import ROOT, run_ranks, train_flags
from training import setup
from training.config import parse_settings
from training.process_records import (
    ProcessRecord,
    check_records,
    describe_difference,
    describe_gpu_models,
    format_ranks,
    hash_code,
    make_cache_record,
    make_process_record,
)
from training.rank_check import exchange_records

GROUPS = {
    "code": {"the code in train.py": "sha256 1", "the code in training": "sha256 2"},
    "packages": {"torch": "2.11.0", "numpy": "2.2.6"},
    "devices": {"the device": "cuda"},
    "flags": {"--seed": "0", "--mixed-precision": "bf16"},
}


def make_records(**values: tuple[str, str]) -> list[ProcessRecord]:
    """Return records of four processes on two nodes, with another value by group on the second."""
    groups = GROUPS | {group: GROUPS[group] | dict([pair]) for group, pair in values.items()}
    return [
        ProcessRecord(rank, f"node{rank // 2}", GROUPS if rank < 2 else groups) for rank in range(4)
    ]


def test_equal_processes_have_no_difference():
    assert describe_difference(make_records()) == ""


@pytest.mark.parametrize(
    ("group", "name", "value", "message"),
    [
        ("code", "the code in training", "sha256 3", "sha256 3 instead of sha256 2; update the"),
        ("packages", "torch", "2.10.0", "torch is 2.10.0 instead of 2.11.0; install the same"),
        ("packages", "NCCL", "2.27", "NCCL is 2.27 instead of missing; install the same"),
        ("devices", "the device", "cpu", "the device is cpu instead of cuda; use the same kind"),
        ("flags", "--seed", "1", "--seed is 1 instead of 0; start all processes with the same"),
    ],
)
def test_difference_names_ranks_hosts_values_and_remedy(group, name, value, message):
    difference = describe_difference(make_records(**{group: (name, value)}))
    assert difference.startswith("ranks 2-3 on node1 differ from rank 0 on node0: ")
    assert message in difference and "\n" not in difference


def test_only_processes_with_the_same_difference_are_named():
    records = make_records(flags=("--seed", "1"))
    records[3] = replace(records[3], groups=GROUPS | {"flags": {"--seed": "2"}})
    assert describe_difference(records).startswith("rank 2 on node1 differs from rank 0 on node0")


def test_ranks_are_abbreviated():
    assert format_ranks([3]) == "rank 3"
    assert format_ranks([*range(8), 9, 12, 14, 16]) == "ranks 0-7, 9, 12 and 2 more"


def test_other_gpu_models_are_a_warning():
    records = [replace(record, gpu_name="H100") for record in make_records()]
    assert describe_gpu_models(records) == ""
    records[3] = replace(records[3], gpu_name="A100")
    assert describe_gpu_models(records).startswith("rank 3 on node1: the GPU is A100, but rank 0")
    assert describe_difference(records) == ""


@pytest.fixture
def settings(cache, tmp_path):
    return parse_settings(train_flags(cache, tmp_path, "run", "--seed", 7))


def test_record_contains_flags_and_versions(settings):
    record = make_process_record(ProcessEnvironment(1, 2, 1, 2), settings)
    flags = record.groups["flags"]
    assert flags["--seed"] == "7" and not {"--data-dir", "--local-cache"} & flags.keys()
    assert record.groups["packages"]["torch"] == torch.__version__
    assert record.groups["devices"] == {"the device": "cpu"} and record.problem == ""


def test_node_with_fewer_gpus_than_processes_is_named(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    records = [
        make_process_record(ProcessEnvironment(rank, 4, rank, 4), settings) for rank in range(4)
    ]
    host = socket.gethostname()
    expected = f"ranks 2-3 on {host}: no GPU is left, because 4 processes share the 2"
    assert describe_difference(records).startswith(expected)
    assert records[1].gpu_name == "H100" and records[1].groups["packages"]["NCCL"] == "2.27.3"


def test_changed_source_file_is_another_version_of_the_code(tmp_path):
    for name in ("train.py", "training", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    before = hash_code(tmp_path)
    assert list(before) == ["the code in train.py", "the code in training"]
    with (tmp_path / "training/guard.py").open("a") as file:
        file.write("# changed\n")
    after = hash_code(tmp_path)
    assert after["the code in train.py"] == before["the code in train.py"]
    assert after["the code in training"] != before["the code in training"]


def test_another_cache_is_reported_by_the_first_process(cache):
    records = [make_cache_record(rank, LatentCache(cache)) for rank in range(2)]
    check_records(records, 0)
    other = LatentCache(cache)
    other.manifest = replace(other.manifest, shards=other.manifest.shards[::-1])
    records[1] = make_cache_record(1, other)
    with pytest.raises(UserError, match=r"rank 1 on .*: shards of --data-dir is sha256"):
        check_records(records, 0)
    with pytest.raises(SystemExit):
        check_records(records, 1)


def test_caches_are_compared_before_the_run_folder_is_created(call, cache, tmp_path, monkeypatch):
    def gather_from_two_nodes(record):
        return [record, replace(record, rank=1, groups={"cache": {}})]

    monkeypatch.setattr(setup, "gather_objects", gather_from_two_nodes)
    code, out = call(train, *train_flags(cache, tmp_path, "run"))
    assert code == 2 and "count of --data-dir is missing instead of 24" in out, out
    assert out.count("\n") == 1 and not list(tmp_path.iterdir())


def test_all_processes_receive_the_result_and_missing_ones_are_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node0")
    records = make_records(flags=("--seed", "1"))[1:3]
    records = [replace(record, rank=rank) for rank, record in enumerate(records)]
    timeout = timedelta(seconds=20)
    store = dist.HashStore()
    results = []
    other = threading.Thread(
        target=lambda: results.append(exchange_records(store, records[1], 2, timeout))
    )
    other.start()
    results.append(exchange_records(store, records[0], 2, timeout))
    other.join()
    assert results[0] == results[1] and "--seed is 1 instead of 0" in results[0]

    store = dist.HashStore()
    store.set_timeout(timeout)  # limits a wait for the record of a missing process
    result = exchange_records(store, records[0], 4, timedelta(seconds=0.1))
    assert result.startswith("ranks 1-3 did not start within") and "reach node0" in result


def test_rank_with_another_seed_ends_the_job_in_one_line(cache, tmp_path):
    flags = train_flags(cache, tmp_path, "run", "--seed", "{rank}")
    with pytest.raises(AssertionError) as failure:
        run_ranks(2, "train", *flags)
    output = str(failure.value)
    assert output.count("error: rank 1 on ") == 1 and "--seed is 1 instead of 0" in output
    assert "Traceback" not in output and not list(tmp_path.iterdir())
