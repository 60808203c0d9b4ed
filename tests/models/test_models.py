import numpy as np
import pytest
import torch

from models.projector import AlignedSiT, Projector
from models.sit import PRESETS, SiT, SiTConfig, default_align_block, sincos_position_embedding
from models.targets import latent_tokens


def small(seed=0, **more) -> SiT:
    torch.manual_seed(seed)
    return SiT(SiTConfig(depth=3, width=32, heads=2, patch=2, latent_size=8, num_classes=5, **more))


def inputs(n=3, channels=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, 8, 8, generator=generator)
    return x, torch.linspace(0, 1, n), torch.arange(n)


def awake(model: SiT) -> SiT:
    """A fresh SiT ignores everything (zero gates, zero output): give it weights that do something."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "expected"), [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)]
)
def test_parameter_counts_are_the_papers(name, expected):
    with torch.device("meta"):
        assert millions(SiT(SiTConfig(**PRESETS[name]))) == pytest.approx(expected, abs=0.6)


def test_xl_counts_what_dit_prints_less_the_learned_sigma():
    """DiT-XL/2 prints 675,129,632 parameters; its output layer has 16 rows more."""
    with torch.device("meta"):
        assert sum(
            p.numel() for p in SiT(SiTConfig(**PRESETS["SiT-XL/2"])).parameters()
        ) == 675_129_632 - 16 * (1152 + 1)


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [("SiT-B/2", 5, 8.3), ("SiT-B/2", 2, 1.2), ("SiT-XL/2", 5, 18.6)],
)
def test_head_counts_are_the_papers(name, layers, expected):
    with torch.device("meta"):
        assert round(millions(Projector(PRESETS[name]["width"], 16, layers)), 1) == expected


def test_every_preset_is_there_and_auto_depth_is_the_papers():
    assert {f"SiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (1, 2, 4, 8)} | {
        "SiT-Ti/2"
    } == set(PRESETS)
    assert [default_align_block(name) for name in ("SiT-B/2", "SiT-L/2", "SiT-XL/2")] == [2, 8, 8]
    assert all(default_align_block(name) <= PRESETS[name]["depth"] for name in PRESETS)


def test_parameter_names_and_shapes_are_the_official_ones():
    d, p, c, k, side = 32, 2, 4, 5, 8
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
    assert {key: tuple(value.shape) for key, value in small().state_dict().items()} == expected


def test_a_fresh_sit_outputs_zero():
    assert not small()(*inputs()).any()


def test_returned_tokens_are_those_after_the_block_and_change_nothing():
    model, (x, t, y) = awake(small()), inputs()
    velocity, kept = model(x, t, y, return_blocks=(3, 2))
    assert torch.equal(velocity, model(x, t, y)) and {*kept} == {2, 3}
    tokens, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y)
    torch.testing.assert_close(kept[2], model.blocks[1](model.blocks[0](tokens, c), c))
    torch.testing.assert_close(kept[3], model.blocks[2](kept[2], c))
    with pytest.raises(AssertionError):
        model(x, t, y, return_blocks=(4,))


def test_features_are_the_same_tokens_without_the_blocks_after_them():
    model, (x, t, y) = awake(small()), inputs()
    kept = model(x, t, y, return_blocks=(1, 2))[1]
    model.blocks[2].forward = None  # not called
    features = model.features(x, t, y, (1, 2))
    assert {*features} == {1, 2} and all(torch.equal(features[k], kept[k]) for k in features)


def test_train_and_eval_mode_are_the_same():
    model = awake(small())
    assert torch.equal(model.train()(*inputs()), model.eval()(*inputs()))


def test_other_sides_channels_and_class_counts():
    model = SiT(
        SiTConfig(depth=1, width=32, heads=2, patch=4, latent_size=16, channels=16, num_classes=3)
    )
    assert model(torch.zeros(2, 16, 16, 16), torch.zeros(2), torch.tensor([0, 3])).shape == (
        2,
        16,
        16,
        16,
    )
    with pytest.raises(ValueError, match="patch size 4 cannot cut latents of side 6"):
        SiT(SiTConfig(depth=1, width=32, heads=2, patch=4, latent_size=6))


def test_position_embedding_is_maes():
    width, side = 16, 3
    for position in range(side * side):
        row, column = divmod(position, side)
        omega = [10000 ** (-4 * i / width) for i in range(width // 4)]
        expected = [f(at * w) for at in (column, row) for f in (np.sin, np.cos) for w in omega]
        np.testing.assert_allclose(sincos_position_embedding(width, side)[position], expected, rtol=1e-6)


def test_target_tokens_have_the_order_of_the_output_layer():
    model, (x, _, _) = small(), inputs()
    torch.testing.assert_close(model.unpatchify(latent_tokens(x, 2)), x)
    assert latent_tokens(x, 2).shape == (3, 16, 16)


def test_recomputing_blocks_changes_nothing():
    gradients = []
    for recompute in (False, True):
        model = awake(small())
        model.activation_checkpointing = recompute
        velocity, kept = model(*inputs(), return_blocks=(2,))
        (velocity.square().sum() + kept[2].sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_gradients_reach_the_blocks_up_to_the_aligned_one_only():
    backbone = awake(small())
    model = AlignedSiT(backbone, {"a": Projector(32, 16, layers=2)}, {"a": 2})
    model(*inputs())[1]["a"].sum().backward()
    reached = [
        any(p.grad is not None and p.grad.any() for p in block.parameters())
        for block in backbone.blocks
    ]
    assert reached == [True, True, False]
    assert backbone.pos_embed.grad is None
    assert AlignedSiT(backbone)(*inputs())[1:] == ({}, {})


def test_each_head_gets_its_blocks_tokens_and_an_idle_one_has_no_gradient_but_zero():
    heads = {"a": Projector(32, 16, layers=2), "b": Projector(32, 7, layers=3)}
    model = AlignedSiT(awake(small()), heads, {"a": 1, "b": 3})
    velocity, kept = model.backbone(*inputs(), return_blocks=(1, 3))
    pred, projected, lengths = model(*inputs())
    assert torch.equal(pred, velocity)
    for name, k in model.blocks.items():
        assert torch.equal(projected[name], heads[name](kept[k])) and torch.equal(
            lengths[name], kept[k].norm(dim=-1).mean(1)
        )
    pred, projected, lengths = model(*inputs(), idle=["a"])
    assert {*projected} == {*lengths} == {"b"} and torch.equal(pred, velocity)
    (pred.sum() + projected["b"].sum()).backward()
    assert all(not p.grad.any() for p in heads["a"].parameters()) and all(
        p.grad.any() for p in heads["b"].parameters()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_aligned_is_float32_under_any_autocast(dtype):
    head = Projector(32, 8, layers=3)
    hidden = []
    head[-1].register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    with torch.autocast("cpu", dtype):
        aligned = AlignedSiT(awake(small()), {"a": head}, {"a": 2})(*inputs())[1]["a"]
    assert aligned.dtype == torch.float32 and hidden[0].dtype == torch.float32
    assert not torch.equal(aligned, aligned.to(dtype).float())  # not rounded and widened again
    assert torch.equal(
        hidden[0], hidden[0].to(dtype).float()
    )  # while the layers before did run in half precision
