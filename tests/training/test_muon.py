"""Muon equals PyTorch's Muon, and skips updates like fused AdamW."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from models.aligned_sit import AlignedSiT
from models.projector import Projector
from models.sit import SiT, SiTConfig
from training.config import OptimizerConfig
from training.matrix_exchange import MatrixExchange, ShardedExchange, count_rows, pad_matrices
from training.muon import Muon, orthogonalize
from training.optimizer import build_optimizer

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.2, "eps": 1e-8}


def make_parameters(*shape, count=2, seed=0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]


def make_muon(matrices, num_stacked=1, others=()) -> Muon:
    return Muon([(matrices, num_stacked)], list(others), 0.95, 0.1, MatrixExchange(), **OPTIONS)


def set_gradients(parameters, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_singular_values_are_close_to_one(shape):
    matrices = torch.stack([p.detach() for p in make_parameters(*shape)])
    values = torch.linalg.svdvals(orthogonalize(matrices).float())
    assert values.min() > 0.6 and values.max() < 1.3
    assert not orthogonalize(torch.zeros(1, *shape)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_muon_equals_that_of_pytorch(shape):
    parameters = make_parameters(*shape)
    expected = copy.deepcopy(parameters)
    muon = make_muon(parameters)
    reference = torch.optim.Muon(
        expected, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        for optimizer, trained in ((muon, parameters), (reference, expected)):
            set_gradients(trained, step)
            optimizer.step()
    for actual, other in zip(parameters, expected):
        # The largest difference is a rounding error of bf16 in an update of 0.01.
        torch.testing.assert_close(actual, other, rtol=0, atol=1e-4)
        buffer = muon.state[actual]["momentum_buffer"]
        assert torch.equal(buffer, reference.state[other]["momentum_buffer"])


def test_stacked_matrices_are_updated_separately():
    stacked = make_parameters(48, 16)
    separate = [nn.Parameter(part.clone()) for p in stacked for part in p.detach().chunk(3)]
    for parameters, count in ((stacked, 3), (separate, 1)):
        muon = make_muon(parameters, count)
        set_gradients(stacked, 0)
        if count == 1:
            for parameter, gradient in zip(separate, [g for p in stacked for g in p.grad.chunk(3)]):
                parameter.grad = gradient
        muon.step()
    assert torch.equal(torch.cat(list(stacked)), torch.cat(separate))


def test_other_parameters_are_updated_by_adamw():
    others = make_parameters(5, seed=1)
    expected = copy.deepcopy(others)
    matrices = make_parameters(4, 4)
    muon = make_muon(matrices, others=others)
    adamw = torch.optim.AdamW(expected, **OPTIONS, fused=True)
    for step in range(3):
        for optimizer, parameters in ((muon, others), (adamw, expected)):
            set_gradients([*parameters, *matrices], step)
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, others, expected))
    for other, reference in zip(others, expected):
        assert muon.state[other].keys() == adamw.state[reference].keys()


def test_skipped_update_changes_nothing():
    """Neither the weights nor the state change, even if gradients are NaN."""
    matrices = make_parameters(8, 8)
    muon = make_muon(matrices, others=make_parameters(5))
    parameters = [p for group in muon.param_groups for p in group["params"]]
    for step, found_inf in enumerate([0.0, 1.0, 0.0]):
        before = copy.deepcopy((parameters, muon.state_dict()["state"]))
        set_gradients(parameters, step)
        if found_inf:
            matrices[0].grad[0, 0] = torch.nan
        muon.found_inf = torch.tensor(found_inf)
        muon.step()
        after = (parameters, muon.state_dict()["state"])
        are_equal = [torch.equal(a, b) for a, b in zip(before[0], after[0])]
        are_equal += [
            torch.equal(before[1][index][key], value)
            for index, state in after[1].items()
            for key, value in state.items()
            if before[1]
        ]
        assert set(are_equal) == {found_inf == 1}
    assert muon.state[matrices[0]]["step"] == 2


def test_muon_updates_matrices_of_the_blocks_that_multiply_tokens():
    backbone = SiT(SiTConfig(depth=2, width=16, heads=2, patch=2, latent_size=4, channels=4))
    model = AlignedSiT(backbone, {"sra2": Projector(16, 16)}, {"sra2": 1})
    optimizer = build_optimizer(model, OptimizerConfig(optimizer="muon"))
    *matrices, others = optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert [[names[id(p)] for p in group["params"]] for group in matrices] == [
        [f"backbone.blocks.{block}.{layer}.weight" for block in range(2)] for layer in layers
    ]
    assert [group["num_stacked"] for group in matrices] == [3, 1, 1, 1]
    num_trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(others["params"]) == num_trained - 2 * len(layers)
    assert "momentum" not in others and others["weight_decay"] == 0


class ThreadExchange(ShardedExchange):
    """Exchanges between threads. `mailboxes[receiver][sender]` holds a message."""

    def __init__(self, rank: int, mailboxes: list[list], barrier: Barrier):
        self.rank = rank
        self.num_processes = len(mailboxes)
        self.mailboxes = mailboxes
        self.barrier = barrier

    def _exchange(self, values, sent, received):
        for mailbox, part in zip(self.mailboxes, values.flatten().split(sent), strict=True):
            mailbox[self.rank] = part
        self.barrier.wait(timeout=60)
        parts = list(self.mailboxes[self.rank])
        self.barrier.wait(timeout=60)
        assert [len(part) for part in parts] == received
        return torch.cat(parts)


@pytest.mark.parametrize(("count", "num_rows", "num_processes"), [(6, 8, 2), (5, 7, 3), (2, 5, 4)])
def test_rows_of_any_number_of_processes_are_assembled_and_returned(count, num_rows, num_processes):
    matrices = torch.randn(count, num_rows, 3)
    parts = matrices.split(count_rows(num_rows, num_processes), dim=1)
    mailboxes = [[None] * num_processes for _ in range(num_processes)]
    barrier = Barrier(num_processes)

    def work(rank):
        exchange = ThreadExchange(rank, mailboxes, barrier)
        share = exchange.gather_share(parts[rank], num_rows)
        return share, exchange.return_rows(2 * share, count)

    with ThreadPoolExecutor(num_processes) as pool:
        shares, returned = zip(*pool.map(work, range(num_processes)))
    assert torch.equal(torch.cat(shares)[:count], matrices)
    assert len({len(share) for share in shares}) == 1
    assert all(map(torch.equal, returned, [2 * part for part in parts]))


def test_matrices_are_padded_to_a_multiple_of_the_processes():
    matrices = torch.ones(5, 2, 3)
    assert pad_matrices(matrices, 5) is matrices
    padded = pad_matrices(matrices, 4)
    assert padded.shape == (8, 2, 3) and padded.sum() == matrices.sum()


def test_rows_of_shards_are_those_of_chunk():
    for num_rows, num_shards in ((8, 4), (9, 4), (3, 4), (1152, 100)):
        chunks = [len(chunk) for chunk in torch.arange(num_rows).chunk(num_shards)]
        chunks += [0] * (num_shards - len(chunks))
        assert count_rows(num_rows, num_shards) == chunks
