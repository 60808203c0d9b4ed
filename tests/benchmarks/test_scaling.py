"""Test the formulas for memory and time on many GPUs against measurements, counts and laws."""

import json
import math
import shlex
from dataclasses import replace

import pytest

from benchmarks import scaling, scaling_count
from benchmarks.scaling import MEASURED_STEP, Case, list_cases, make_scenarios
from benchmarks.scaling_hardware import GPUS, NETWORKS, Fabric, Layout, Network
from benchmarks.scaling_memory import count_parameters, count_stored_bytes
from benchmarks.scaling_time import load_measurement
from benchmarks.table import RESULTS, TABLES
from benchmarks.variants import StepConfig, make_plan
from models.sit import PRESETS
from tests.helpers import ROOT

PAGE = (ROOT / "docs/scale.md").read_text()
COMMANDS = [
    shlex.split(line)
    for line in PAGE.replace("\\\n", " ").splitlines()
    if line.startswith("python -m benchmarks.scaling ") and "--json" in line
]


@pytest.fixture(scope="module")
def measurement():
    return load_measurement(MEASURED_STEP, "sra2")


@pytest.fixture(scope="module")
def xl(measurement):
    """The scenario of SiT-XL/2 on H200 GPUs with InfiniBand."""
    return make_scenarios("SiT-XL/2", "sra2", "bf16", "H200", ["ib-400"], measurement)[0]


def compute_step(scenario, num_gpus, shard, batch=64, accumulation=1, **changes):
    time = replace(scenario.time, **changes)
    return time.compute(Layout(num_gpus, shard), batch, accumulation)


def test_row_of_one_gpu_reproduces_the_measurement(xl, measurement):
    row = xl.compute_row(Case(Layout(1, "none"), 64, 0))
    assert row["step_s"] == pytest.approx(row["measured_step_s"], rel=1e-9)
    assert row["memory_gib"] == pytest.approx(row["measured_memory_gib"], rel=0.01)
    # The step without alignment was not used to derive the rate.
    unaligned = make_scenarios("SiT-XL/2", "none", "bf16", "H200", ["ib-400"], measurement)[0]
    values = measurement.result["results"]["none"]
    row = unaligned.compute_row(Case(Layout(1, "none"), 64, 0))
    assert "measured_step_s" not in row
    assert row["step_s"] == pytest.approx(values["step_s"]["median"], rel=0.01)
    assert row["memory_gib"] == pytest.approx(values["peak_memory_gib"], rel=0.01)


def test_only_the_measured_settings_are_reported_as_measured(xl):
    for case in (
        Case(Layout(1, "none"), 128, 0),
        Case(Layout(1, "none"), 64, 1),
        Case(Layout(8, "none"), 64, 0),
    ):
        assert "measured_step_s" not in xl.compute_row(case)


def test_stored_bytes_of_a_block_agree_with_a_manual_count():
    """Count the tensors that PyTorch stores for each token of a block of SiT-S/2 in bfloat16."""
    plan = make_plan(StepConfig(model="SiT-S/2"), ["none"])
    stored = count_stored_bytes(plan, "bf16", compile=False)
    width, heads, tokens = 384, 6, 256
    # float32: the inputs of both layer norms, and their outputs; bfloat16: the inputs of the
    # attention and the MLP, 3 + 1 + 1 tensors of the attention, and 4 + 4 + 1 of the MLP.
    per_token = width * (4 * 4 + 2 * (2 + 3 + 1 + 1 + 4 + 4 + 1))
    statistics = 4 * (heads + 4)  # log-sum-exp of the attention, and two numbers per layer norm
    # The conditioning vector in float32 before and after SiLU and in bfloat16, the modulation in
    # bfloat16, and 1 + scale twice. One of these is shared by all blocks.
    per_image = width * (4 + 2 + 12 + 2 + 2)
    expected = tokens * (per_token + statistics) + per_image
    assert stored.block == pytest.approx(expected, abs=4 * width)
    assert stored.block_copies == 2 * 18 * width**2
    assert stored.block_input == 4 * tokens * width
    # bfloat16: the input and the output of the activation of the MLP; float32: the tokens.
    assert stored.gradients == tokens * width * (2 * (4 + 4) + 4)
    # The compiler recomputes a fifth of these tensors or more, and never stores others.
    assert 0.6 < count_stored_bytes(plan, "bf16").block / stored.block < 0.8


def test_float32_stores_no_converted_weights():
    plan = make_plan(StepConfig(model="SiT-S/2"), ["sra2"])
    stored = count_stored_bytes(plan, "no", compile=False)
    assert stored.block_copies == stored.outside_copies == 0
    assert stored.block > 1.4 * count_stored_bytes(plan, "bf16", compile=False).block


def test_memory_is_split_over_the_shards(xl):
    state = ("parameters", "moments", "emas")
    whole = xl.memory.parts(Layout(1, "none"), 64)
    # The weights and two moments of AdamW; the EMA has no heads.
    parameters = xl.parameters
    expected = 12 * parameters.trained + 4 * parameters.backbone
    assert sum(whole[name] for name in state) == expected
    for shard, num_shards in (("full", 64), ("optimizer", 64), ("hybrid", 8)):
        parts = xl.memory.parts(Layout(64, shard), 8)
        for name in state:
            assert parts[name] == pytest.approx(whole[name] / num_shards)
    # DDP keeps the gradients in its buckets, and accumulated gradients are not sharded.
    buckets = xl.memory.parts(Layout(64, "none"), 64)["gradients"]
    accumulated = xl.memory.parts(Layout(64, "full"), 64, 2)["gradients"]
    assert buckets == accumulated == 4 * parameters.trained
    assert whole["gradients"] == xl.memory.parts(Layout(64, "full"), 64)["gradients"] == 0


def test_recomputation_frees_activations_and_adds_a_third_of_the_flops(xl):
    layout = Layout(1, "none")
    activations = [
        xl.memory.parts(layout, 64, 1, recomputed)["activations"] for recomputed in (0, 14, 28)
    ]
    assert activations[0] > activations[1] > activations[2]
    stored = xl.memory.stored
    assert activations[0] - activations[1] == 64 * 14 * (stored.block - stored.block_input)
    times = [xl.time.compute(layout, 64, 1, recomputed).compute_s for recomputed in (0, 28)]
    assert times[1] == pytest.approx(4 / 3 * times[0])


def test_collectives_move_the_bytes_of_a_ring():
    fabric = Fabric(GPUS["H100"], NETWORKS["ib-400"])
    gather = fabric.gather(8e9, 64, 8)
    assert gather.transfer == pytest.approx(63 / 64 * 8e9 / (0.8 * 450e9))  # NVLink is slower
    fabric = Fabric(GPUS["H100"], NETWORKS["ethernet-100"])
    slow = fabric.gather(8e9, 64, 8)
    assert slow.transfer == pytest.approx(63 / 64 * 8e9 / (0.92 * 12.5e9))
    assert fabric.gather(8e9, 8, 1).transfer < gather.transfer
    assert fabric.all_reduce(8e9, 64, 8).transfer == pytest.approx(2 * slow.transfer)
    assert slow.latency == pytest.approx(8.4e-6 + 56 * 3.4e-6 + 7 * 14e-6)
    assert fabric.gather(8e9, 1, 1).seconds == fabric.all_reduce(8e9, 1, 1).seconds == 0


def test_communication_agrees_with_the_bytes_per_parameter(xl):
    """DDP moves 8 bytes per parameter; full sharding 2 + 2 + 4 in a block and 4 + 4 outside."""
    network = Network(1, 1, "slow enough that latencies do not matter")
    changes = {"fabric": Fabric(GPUS["H200"], network)}
    num_bytes = {
        shard: compute_step(xl, 64, shard, **changes).communication.transfer * 0.92e9 / 8
        for shard in ("none", "optimizer", "full", "hybrid")
    }
    parameters = xl.parameters
    in_blocks = parameters.depth * parameters.block
    assert num_bytes["none"] == pytest.approx(63 / 64 * 8 * parameters.trained)
    assert num_bytes["full"] == pytest.approx(63 / 64 * 8 * parameters.trained)
    assert num_bytes["optimizer"] == pytest.approx(
        63 / 64 * (8 * parameters.trained - 2 * in_blocks)
    )
    # Across 8 nodes, hybrid sharding all-reduces the gradients.
    assert num_bytes["hybrid"] == pytest.approx(7 / 8 * 8 * parameters.trained, rel=0.01)


def test_step_time_follows_its_laws(xl):
    single = compute_step(xl, 1, "none")
    assert single.exposed_s == single.communication.seconds == 0
    for shard in ("none", "optimizer", "full", "hybrid"):
        steps = [
            compute_step(xl, 64, shard, fabric=Fabric(GPUS["H200"], NETWORKS[network]))
            for network in ("ib-400", "ib-200", "ethernet-100", "ethernet-25")
        ]
        waits = [step.exposed_s for step in steps]
        assert waits == sorted(waits)
        assert all(0 < step.exposed_s <= step.communication.seconds for step in steps)
        assert steps[-1].limit == "network"
    # The update is sharded; the gradients are reduced once per step.
    assert compute_step(xl, 8, "full").update_s == pytest.approx(single.update_s / 8)
    twice = compute_step(xl, 64, "none", accumulation=2)
    assert twice.communication == compute_step(xl, 64, "none").communication
    assert twice.compute_s == pytest.approx(2 * single.compute_s)
    # A ring over 512 GPUs has many hops.
    assert compute_step(xl, 512, "full", batch=8).limit == "latency"
    assert compute_step(xl, 1, "none").limit == "compute"


def test_the_teacher_of_sra_is_gathered_once_per_step(xl):
    plan = make_plan(StepConfig(model="SiT-XL/2"), ["sra"])
    parameters = count_parameters(plan)
    assert parameters.teacher == 20 * parameters.block  # the teacher is block 20
    without_teacher = parameters._replace(teacher=0)
    transfers = [
        compute_step(xl, 64, "full", parameters=values).communication.transfer
        for values in (without_teacher, parameters)
    ]
    expected = 63 / 64 * 2 * parameters.teacher / (0.8 * 450e9)
    assert transfers[1] - transfers[0] == pytest.approx(expected)


def test_cases_without_duplicates():
    cases = list_cases([1, 8, 64, 512], ["none", "full", "hybrid"], [256], 0)
    layouts = [(case.layout.num_gpus, case.layout.shard) for case in cases]
    assert layouts == [
        (1, "none"),
        (8, "none"),
        (8, "full"),
        (64, "none"),
        (64, "full"),
        (64, "hybrid"),
        (512, "none"),  # less than one image per GPU
    ]


def test_micro_batches_fit_into_the_memory(xl):
    row = xl.compute_row(Case(Layout(1, "none"), 1024, 0))
    assert row["micro_batch"] * row["accumulation"] == 1024
    assert row["memory_gib"] + 3 <= GPUS["H200"].memory_gib
    assert xl.fits({"state": 137 * 2**30}) and not xl.fits({"state": 138 * 2**30})
    larger = xl.memory.parts(Layout(1, "none"), 2 * row["micro_batch"], 2)
    assert sum(larger.values()) / 2**30 + 3 > GPUS["H200"].memory_gib
    many_emas = xl.parameters._replace(emas=100 * xl.parameters.backbone)
    scenario = replace(xl, memory=replace(xl.memory, parameters=many_emas))
    row = scenario.compute_row(Case(Layout(1, "none"), 4, 0))
    assert (row["limit"], row["micro_batch"]) == ("memory", 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--network", "nvlink", "--gpus", 8, 16], "--network nvlink connects only the 8 GPUs"),
        (["--recomputed-blocks", 29], "--recomputed-blocks 29: SiT-XL/2 has only 28 blocks"),
        (["--measured", "none.json"], "--measured none.json cannot be read"),
        (
            ["--measured", RESULTS / "checkpoint-b2-cpu.json"],
            "this is not a result of benchmarks.train_step on one of H100, H200",
        ),
        (
            ["--measured", RESULTS / "sampling-xl2-10steps-h200.json"],
            "this is not a result of benchmarks.train_step on one of H100, H200",
        ),
    ],
)
def test_invalid_flags_cause_one_line_errors(call, flags, message):
    code, out = call(scaling, *flags)
    assert code == 2
    assert message in out and len(out.strip().splitlines()) == 1


def assert_reproduces(call, command, tmp_path):
    """Run a command of the page and compare its result with the stored one."""
    *flags, path = command[3:]
    assert flags.pop() == "--json"
    code, out = call(scaling, *flags, "--json", tmp_path / "result.json")
    assert code == 0, out
    result = json.loads((tmp_path / "result.json").read_text())
    stored = json.loads((ROOT / path).read_text())
    assert_close(result, stored)
    assert TABLES["scaling"].format([stored]) in out


def assert_close(result, stored):
    """Compare results; other versions of PyTorch may store slightly different tensors."""
    if isinstance(stored, dict):
        assert result.keys() == stored.keys()
        for key in stored:
            assert_close(result[key], stored[key])
    elif isinstance(stored, list):
        assert len(result) == len(stored)
        for values in zip(result, stored):
            assert_close(*values)
    elif isinstance(stored, float):
        assert math.isclose(result, stored, rel_tol=0.02)
    else:
        assert result == stored


def test_a_command_of_the_page_reproduces_its_result(call, tmp_path):
    (command,) = (command for command in COMMANDS if "scaling-1-gpu" in command[-1])
    assert_reproduces(call, command, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_commands_of_the_page_reproduce_their_results(call, command, tmp_path):
    assert_reproduces(call, command, tmp_path)


def test_page_has_a_command_for_each_result():
    stored = {str(path.relative_to(ROOT)) for path in RESULTS.glob("scaling-*.json")}
    count = "benchmarks/results/scaling-count.json"
    assert {command[-1] for command in COMMANDS} == stored - {count}
    assert count in PAGE


def read_rows(name):
    """Return the rows of a stored result by (model, number of GPUs, sharding, network)."""
    rows = json.loads((RESULTS / f"scaling-{name}.json").read_text())["rows"]
    keys = ("model", "num_gpus", "shard", "network")
    return {tuple(row[key] for key in keys): row for row in rows if row["limit"] != "batch"}


def computing_share(row):
    return row["compute_s"] / row["step_s"]


@pytest.mark.parametrize("model", ["SiT-XL/2", "SiT-1B/2", "SiT-3B/2"])
def test_statements_of_the_page_about_8_64_and_512_gpus(model):
    small = read_rows("batch-256")
    large = read_rows("batch-4096")

    def select(rows, num_gpus):
        return {key[2]: row for key, row in rows.items() if key[:2] == (model, num_gpus)}

    on_8, on_64 = select(small, 8), select(small, 64)
    assert all(round(computing_share(row), 2) >= 0.86 for row in on_8.values())
    for shard in ("full", "optimizer"):
        assert on_8[shard]["step_s"] < on_8["none"]["step_s"]
        assert on_8[shard]["memory_gib"] < 0.525 * on_8["none"]["memory_gib"]
    assert all(computing_share(row) < 0.5 for row in on_64.values())
    assert all(row["communication_s"] > row["compute_s"] for row in on_64.values())
    fastest = [max(row["images_per_s"] for row in rows.values()) for rows in (on_8, on_64)]
    assert fastest[1] < 3.7 * fastest[0]
    shares = [computing_share(row) for row in select(large, 64).values()]
    assert round(min(shares), 2) >= 0.92 and round(max(shares), 2) <= 0.99

    on_512 = select(large, 512)
    assert on_512["full"]["limit"] == on_512["optimizer"]["limit"] == "latency"
    assert on_512["hybrid"]["limit"] == "network" and computing_share(on_512["hybrid"]) < 0.5
    is_slower = on_512["full"]["images_per_s"] < select(large, 64)["full"]["images_per_s"]
    assert is_slower == (model != "SiT-3B/2")


def test_statements_of_the_page_about_networks_and_data():
    for key, row in read_rows("networks").items():
        if key[3].startswith("ethernet"):
            assert row["exposed_s"] > 5 * row["compute_s"]
    rows = [*read_rows("batch-256").values(), *read_rows("batch-4096").values()]
    rates = [row["images_per_s"] / math.ceil(row["num_gpus"] / 8) for row in rows]
    assert 4200 < max(rates) < 4300
    unsharded = read_rows("batch-256")["SiT-3B/2", 8, "none", None]["memory_gib"]
    assert unsharded > GPUS["H100"].memory_gib
    assert "28 GiB with" in PAGE
    sharded = read_rows("batch-256")["SiT-3B/2", 8, "full", None]["memory_gib"]
    assert round(sharded) == 28


def test_counted_memory_of_a_sharded_step_agrees_with_the_formula(monkeypatch):
    few_wide_blocks = {"depth": 6, "width": 1536, "heads": 12, "patch": 2}
    monkeypatch.setitem(PRESETS, "SiT-S/2", few_wide_blocks)
    plan = make_plan(StepConfig(model="SiT-S/2"), ["sra2"])
    layout = Layout(64, "full")
    counted = scaling_count.count_step(plan, layout, 4, "bf16")
    computed = scaling_count.compute_peak(plan, layout, 4, "bf16")
    assert computed == pytest.approx(counted, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("shard", ["optimizer", "full", "hybrid"])
def test_counted_memory_of_the_3b_preset_agrees_with_the_formula(call, tmp_path, shard):
    path = tmp_path / "count.json"
    code, out = call(scaling_count, "--shard", shard, "--micro-batch", 8, "--json", path)
    assert code == 0, out
    (row,) = json.loads(path.read_text())["rows"]
    assert row["computed_bytes"] == pytest.approx(row["counted_bytes"], rel=0.04)
    stored_rows = json.loads((RESULTS / "scaling-count.json").read_text())["rows"]
    (stored,) = (r for r in stored_rows if (r["model"], r["shard"]) == ("SiT-3B/2", shard))
    assert row["counted_bytes"] == pytest.approx(stored["counted_bytes"], rel=0.02)
