"""Test the backbone, its presets, the alignment heads and `AlignedSiT`."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.aligned_sit import AlignedSiT
from models.errors import FieldError
from models.projector import ConvHead, Projector, make_head
from models.sit import PRESETS, SiT, SiTConfig, default_align_block, sincos_position_embedding
from models.targets import latent_tokens


def make_sit() -> SiT:
    torch.manual_seed(0)
    return SiT(SiTConfig(depth=3, width=32, heads=2, patch=2, latent_size=8, num_classes=5))


def make_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0, 1, 3), torch.arange(3)


def randomize_zeros(model: SiT) -> SiT:
    """Replace zero parameters by random values, because a new SiT returns zero for every input."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def count_millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SiT-S/2", 33),
        ("SiT-B/2", 130),
        ("SiT-L/2", 458),
        ("SiT-XL/2", 675),
        ("SiT-1B/2", 1029),
        ("SiT-3B/2", 2916),
    ],
)
def test_parameter_counts_match_the_papers(name, expected):
    with torch.device("meta"):
        assert count_millions(SiT(SiTConfig(**PRESETS[name]))) == pytest.approx(expected, abs=0.6)


def test_sit_xl_has_as_many_parameters_as_dit_xl_without_the_learned_sigma():
    """DiT-XL/2 has 675,129,632 parameters, including 16 more rows in the output layer."""
    with torch.device("meta"):
        model = SiT(SiTConfig(**PRESETS["SiT-XL/2"]))
    assert sum(p.numel() for p in model.parameters()) == 675_129_632 - 16 * (1152 + 1)


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [("SiT-B/2", 5, 8.3), ("SiT-B/2", 2, 1.2), ("SiT-XL/2", 5, 18.6)],
)
def test_head_parameter_counts_match_the_paper(name, layers, expected):
    with torch.device("meta"):
        assert round(count_millions(Projector(PRESETS[name]["width"], 16, layers)), 1) == expected


def test_presets_cover_all_sizes_and_patches():
    sizes = ("S", "B", "L", "XL", "1B", "3B")
    names = {f"SiT-{size}/{patch}" for size in sizes for patch in (1, 2, 4, 8)}
    assert names | {"SiT-Ti/2"} == set(PRESETS)


def test_large_presets_follow_the_rule_of_stable_diffusion_3():
    for name in ("SiT-1B/2", "SiT-3B/2"):
        preset = PRESETS[name]
        assert preset["width"] == 64 * preset["depth"] and preset["heads"] == preset["depth"]


def test_default_align_blocks_match_the_paper():
    assert [default_align_block(name) for name in ("SiT-B/2", "SiT-L/2", "SiT-XL/2")] == [2, 8, 8]
    assert all(default_align_block(name) <= PRESETS[name]["depth"] for name in PRESETS)


def test_parameter_names_and_shapes_match_the_sit_repository():
    d = 32  # width
    p = 2  # patch size
    c = 4  # channels
    k = 5  # classes
    side = 8
    block = {
        "attn.qkv.weight": (3 * d, d),
        "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "mlp.fc1.weight": (4 * d, d),
        "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d),
        "mlp.fc2.bias": (d,),
        "adaLN_modulation.1.weight": (6 * d, d),
        "adaLN_modulation.1.bias": (6 * d,),
    }
    expected = {
        "pos_embed": (1, (side // p) ** 2, d),
        "x_embedder.proj.weight": (d, c, p, p),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (k + 1, d),
        "final_layer.linear.weight": (p * p * c, d),
        "final_layer.linear.bias": (p * p * c,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
        **{f"blocks.{i}.{key}": shape for i in range(3) for key, shape in block.items()},
    }
    assert {key: tuple(value.shape) for key, value in make_sit().state_dict().items()} == expected


def test_qk_norm_applies_a_layer_norm_to_the_queries_and_keys_of_each_head():
    """The names, the epsilon of 1e-5 and the initial weights are those of timm and REPA."""
    config = SiTConfig(depth=3, width=32, heads=2, patch=2, latent_size=8, num_classes=5)
    torch.manual_seed(0)
    model = SiT(replace(config, qk_norm=True))
    plain = make_sit().state_dict()
    added = {key: value for key, value in model.state_dict().items() if key not in plain}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.items())
    for part in ("q_norm", "k_norm"):
        assert torch.equal(added.pop(f"blocks.1.attn.{part}.weight"), torch.ones(16))
        assert torch.equal(added.pop(f"blocks.1.attn.{part}.bias"), torch.zeros(16))
    assert len(added) == 2 * 4  # of the other two blocks

    attention = model.blocks[0].attn
    torch.nn.init.normal_(attention.q_norm.weight)
    torch.nn.init.normal_(attention.k_norm.bias)
    tokens = 1e-2 * torch.randn(2, 16, 32)  # so that the epsilon matters
    q, k, v = attention.qkv(tokens).reshape(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
    q = torch.nn.functional.layer_norm(q, (16,), attention.q_norm.weight, eps=1e-5)
    k = torch.nn.functional.layer_norm(k, (16,), bias=attention.k_norm.bias, eps=1e-5)
    mixed = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(tokens), attention.proj(mixed))


def test_config_of_a_network_without_qk_norm_is_that_of_older_versions():
    config = SiTConfig(depth=3, width=32, heads=2, patch=2)
    assert "qk_norm" not in config.to_json()
    with_qk_norm = replace(config, qk_norm=True)
    for original in (config, with_qk_norm):
        assert SiTConfig(**original.to_json()) == original


def test_initial_weights_follow_the_scheme_of_the_sit_repository():
    """Compare the scale of each tensor with the scheme, and the uniform weights with their bound.

    A Xavier-uniform weight has the bound sqrt(6 / (fan_in + fan_out)). The patch embedding is a
    linear layer from the values of a patch to the width.
    """
    torch.manual_seed(0)
    config = SiTConfig(depth=2, width=64, heads=2, patch=4, latent_size=8, num_classes=500)
    for name, parameter in SiT(config).named_parameters():
        if name == "pos_embed":  # compared with MAE below
            continue
        is_zero = name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name
        if is_zero:
            assert not parameter.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert parameter.abs().max() > 0.06, name  # a uniform weight would not exceed 0.035
        else:
            matrix = parameter.flatten(1)
            bound = (6 / sum(matrix.shape)) ** 0.5
            assert 0.98 * bound < matrix.abs().max() <= bound, name
            assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_new_sit_returns_zero():
    assert not make_sit()(*make_inputs()).any()


def test_return_blocks_adds_block_outputs_without_changing_the_velocity():
    model = randomize_zeros(make_sit())
    x, t, y = make_inputs()
    velocity, block_tokens = model(x, t, y, return_blocks=(3, 2))
    assert torch.equal(velocity, model(x, t, y))
    assert block_tokens.keys() == {2, 3}
    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y)
    torch.testing.assert_close(block_tokens[2], model.blocks[1](model.blocks[0](tokens, c), c))
    torch.testing.assert_close(block_tokens[3], model.blocks[2](block_tokens[2], c))
    with pytest.raises(AssertionError):
        model(x, t, y, return_blocks=(4,))


def test_block_tokens_equal_block_outputs_without_running_later_blocks():
    model = randomize_zeros(make_sit())
    x, t, y = make_inputs()
    expected = model(x, t, y, return_blocks=(1, 2))[1]
    model.blocks[2].forward = None  # calling None raises a TypeError
    block_tokens = model.compute_block_tokens(x, t, y, (1, 2))
    assert block_tokens.keys() == {1, 2}
    for block, tokens in block_tokens.items():
        assert torch.equal(tokens, expected[block])


def test_output_is_equal_in_train_and_eval_mode():
    model = randomize_zeros(make_sit())
    assert torch.equal(model.train()(*make_inputs()), model.eval()(*make_inputs()))


def test_latent_size_channels_and_class_count_are_configurable():
    config = SiTConfig(
        depth=1, width=32, heads=2, patch=4, latent_size=16, channels=16, num_classes=3
    )
    x = torch.zeros(2, 16, 16, 16)
    assert SiT(config)(x, torch.zeros(2), torch.tensor([0, 3])).shape == x.shape


def test_latent_size_must_be_a_multiple_of_the_patch_size():
    with pytest.raises(FieldError, match="side 6 is not a multiple of the patch size 4"):
        SiT(SiTConfig(depth=1, width=32, heads=2, patch=4, latent_size=6))


def test_position_embedding_matches_mae():
    width = 16
    side = 3
    embedding = sincos_position_embedding(width, side)
    omega = np.array([10000 ** (-4 * i / width) for i in range(width // 4)])
    for position in range(side * side):
        row, column = divmod(position, side)
        angles = (column * omega, row * omega)
        expected = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)])
        np.testing.assert_allclose(embedding[position], expected, rtol=1e-6)


def test_latent_tokens_are_ordered_like_the_output_layer():
    model = make_sit()
    x, _, _ = make_inputs()
    torch.testing.assert_close(model.unpatchify(latent_tokens(x, 2)), x)
    assert latent_tokens(x, 2).shape == (3, 16, 16)


def test_activation_checkpointing_does_not_change_gradients():
    """Each recomputed block saves the same share of the memory for activations."""
    gradients, stored_bytes = [], []

    def count_bytes(tensor):
        stored_bytes[-1] += tensor.nbytes
        return tensor

    for num_recomputed_blocks in range(4):
        model = randomize_zeros(make_sit())
        model.num_recomputed_blocks = num_recomputed_blocks
        stored_bytes.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda tensor: tensor):
            velocity, block_tokens = model(*make_inputs(), return_blocks=(2,))
        (velocity.square().sum() + block_tokens[2].sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for others in gradients[1:] for a, b in zip(gradients[0], others))
    savings = [more - less for more, less in itertools.pairwise(stored_bytes)]
    assert savings[0] == savings[1] == savings[2] > stored_bytes[0] / 5


def test_alignment_gradients_reach_only_blocks_up_to_the_aligned_block():
    backbone = randomize_zeros(make_sit())
    model = AlignedSiT(backbone, {"a": Projector(32, 16, layers=2)}, {"a": 2})
    model(*make_inputs()).projected["a"].sum().backward()
    has_gradient = [
        any(p.grad is not None and p.grad.any() for p in block.parameters())
        for block in backbone.blocks
    ]
    assert has_gradient == [True, True, False]
    assert backbone.pos_embed.grad is None
    assert AlignedSiT(backbone, {}, {})(*make_inputs())[1:] == ({}, {}, {})


def test_projected_tokens_are_contiguous():
    """Compiled losses require this. The tokens of the backbone are transposed views."""
    heads = {"none": make_head(None), "conv": ConvHead(32, 8), "mlp": Projector(32, 8)}
    model = AlignedSiT(randomize_zeros(make_sit()), heads, dict.fromkeys(heads, 2))
    projected = model(*make_inputs()).projected
    assert all(tokens.is_contiguous() for tokens in projected.values())


def test_heads_receive_tokens_of_their_block_and_inactive_heads_receive_zero_gradients():
    heads = {"a": Projector(32, 16, layers=2), "b": Projector(32, 7, layers=3)}
    model = AlignedSiT(randomize_zeros(make_sit()), heads, {"a": 1, "b": 3})
    velocity, block_tokens = model.backbone(*make_inputs(), return_blocks=(1, 3))
    output = model(*make_inputs(), student_blocks=[3])
    assert torch.equal(output.prediction, velocity)
    assert torch.equal(output.student_tokens[3], block_tokens[3])
    for name, block in model.blocks.items():
        assert torch.equal(output.projected[name], heads[name](block_tokens[block]))
        assert torch.equal(output.token_norm[name], block_tokens[block].norm(dim=-1).mean(1))
    output = model(*make_inputs(), active_heads=["b"])
    assert output.projected.keys() == output.token_norm.keys() == {"b"}
    assert torch.equal(output.prediction, velocity)
    (output.prediction.sum() + output.projected["b"].sum()).backward()
    assert not any(p.grad.any() for p in heads["a"].parameters())
    assert all(p.grad.any() for p in heads["b"].parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projected_tokens_are_float32_under_any_autocast(dtype):
    head = Projector(32, 8, layers=3)
    hidden = []
    head[-1].register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    with torch.autocast("cpu", dtype):
        model = AlignedSiT(randomize_zeros(make_sit()), {"a": head}, {"a": 2})
        projected = model(*make_inputs()).projected["a"]
    # The last layer runs in float32, and the other layers run in half precision.
    assert projected.dtype == torch.float32 and hidden[0].dtype == torch.float32
    assert not torch.equal(projected, projected.to(dtype).float())
    assert torch.equal(hidden[0], hidden[0].to(dtype).float())


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_conv_head_is_a_convolution_over_the_token_grid_with_zero_padding(kernel_size):
    torch.manual_seed(0)
    head = make_head({"kind": "conv", "width": 6, "out": 5, "kernel_size": kernel_size})
    assert isinstance(head, ConvHead)
    tokens = torch.randn(2, 16, 6)
    weight = head.conv.weight
    expected = head.conv.bias.expand(2, 16, 5).clone()
    for row, column, i, j in itertools.product(range(4), range(4), *[range(kernel_size)] * 2):
        other_row = row + i - kernel_size // 2
        other_column = column + j - kernel_size // 2
        if 0 <= other_row < 4 and 0 <= other_column < 4:
            neighbor = tokens[:, 4 * other_row + other_column]
            expected[:, 4 * row + column] += neighbor @ weight[:, :, i, j].T
    torch.testing.assert_close(head(tokens), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(tokens).dtype == torch.float32
