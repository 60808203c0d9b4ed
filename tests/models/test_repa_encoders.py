"""Compare tokens from the published files of REPA's encoders with an independent computation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.repa_encoders import make_script
from models.encoder import Encoder
from models.errors import FieldError
from models.repa_encoders import REPA_ENCODERS
from models.weights import load_network

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
WIDTH = 48
SIDE = 112  # a multiple of both patch sizes
SMALL = {"embed_dim": WIDTH, "depth": 2, "img_size": SIDE}  # with the original numbers of heads


def make_state(patch, has_class_token=True, has_patch_bias=True, depth=2):
    """Return random weights of a vision transformer for SIDE x SIDE pixels, with timm's names."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    num_tokens = (SIDE // patch) ** 2
    state = {
        "pos_embed": random(1, num_tokens + has_class_token, WIDTH),
        "patch_embed.proj.weight": random(WIDTH, 3, patch, patch),
        "norm.weight": 1 + random(WIDTH),
        "norm.bias": random(WIDTH),
    }
    if has_class_token:
        state["cls_token"] = random(1, 1, WIDTH)
    if has_patch_bias:
        state["patch_embed.proj.bias"] = random(WIDTH)
    layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for i in range(depth):
        for name, (size_out, size_in) in layers.items():
            state[f"blocks.{i}.{name}.weight"] = random(size_out * WIDTH, size_in * WIDTH)
            state[f"blocks.{i}.{name}.bias"] = random(size_out * WIDTH)
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.weight"] = 1 + random(WIDTH)
            state[f"blocks.{i}.{name}.bias"] = random(WIDTH)
    return state


def compute_tokens(state, images, patch, heads, normalization=IMAGENET, eps=1e-6, is_clip=False):
    """Compute the patch tokens before the final norm, with PyTorch's functions."""
    mean, std = (torch.tensor(values)[:, None, None] for values in normalization)
    x = (images / 255 - mean) / std
    bias = state.get("patch_embed.proj.bias")
    x = F.conv2d(x, state["patch_embed.proj.weight"], bias, stride=patch).flatten(2).mT
    if "cls_token" in state:
        x = torch.cat((state["cls_token"].expand(len(x), -1, -1), x), 1)
    x = x + state["pos_embed"]
    if "register_tokens" in state:  # without position embeddings
        registers = state["register_tokens"].expand(len(x), -1, -1)
        x = torch.cat((x[:, :1], registers, x[:, 1:]), 1)

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    if is_clip:
        x = norm("norm_pre", x)
    depth = sum(key.endswith("norm1.weight") for key in state)
    for i in range(depth):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.unflatten(2, (3, heads, WIDTH // heads)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / (WIDTH // heads) ** 0.5).softmax(-1)
        attended = linear(f"blocks.{i}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        x = x + state.get(f"blocks.{i}.ls1.gamma", 1) * attended
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if is_clip else F.gelu(hidden)
        x = x + state.get(f"blocks.{i}.ls2.gamma", 1) * linear(f"blocks.{i}.mlp.fc2", hidden)
    num_tokens = (SIDE // patch) ** 2
    return x[:, -num_tokens:]


def apply_final_norm(state, x):
    return F.layer_norm(x, (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6)


def to_mocov3(state):
    """Return the checkpoint of MoCo v3 whose base encoder has these weights."""
    base = {f"module.base_encoder.{key}": value for key, value in state.items()}
    momentum = {f"module.momentum_encoder.{key}": -value for key, value in state.items()}
    heads = {
        "module.base_encoder.head.0.weight": torch.ones(2, WIDTH),
        "module.predictor.0.weight": torch.ones(2, 2),
    }
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    return {"arch": "vit", "state_dict": momentum | base | heads, "optimizer": optimizer}


def to_misnamed_mocov3(state):
    """Return the checkpoint with the wrong names of the published ViT-L."""
    misnamed = {}
    for key, value in state.items():
        key = key.replace("blocks.13.norm1.", "blocks.13.norm13.")
        key = key.replace("blocks.13.mlp.fc1.", "blocks.13.mlp.fc13.")
        key = key.replace("blocks.14.norm2.", "blocks.14.norm14.")
        misnamed[key.replace("blocks.14.mlp.fc2.", "blocks.14.mlp.fc14.")] = value
    return to_mocov3(misnamed)


def to_ijepa(state):
    encoder = {f"module.{key}": value for key, value in state.items()}
    target = {key: -value for key, value in encoder.items()}
    predictor = {"module.mask_token": torch.ones(1, 1, 8)}
    return {"encoder": encoder, "target_encoder": target, "predictor": predictor, "epoch": 300}


def to_clip(state):
    """Return OpenAI's TorchScript archive of CLIP with an image network of these weights."""
    renamed = {}
    names = {
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "blocks.": "transformer.resblocks.",
    }
    for key, value in state.items():
        if key.startswith("norm."):
            key = key.replace("norm", "ln_post")
        for timm_name, name in names.items():
            key = key.replace(timm_name, name)
        renamed[key] = value
    renamed["class_embedding"] = renamed.pop("cls_token")[0, 0]
    renamed["positional_embedding"] = renamed.pop("pos_embed")[0]
    renamed["proj"] = torch.ones(WIDTH, 8)
    image = {f"visual.{key}": value for key, value in renamed.items()}
    return make_script(image | {"text_projection": torch.ones(8, 8)})


@pytest.fixture
def encode(monkeypatch, tmp_path):
    """Return a function that writes a file and encodes images with a small version of a network."""

    def encode_with_file(name, content, images, grid, depth=2):
        encoder = REPA_ENCODERS[name]
        arguments = encoder.arguments | SMALL | {"depth": depth}
        monkeypatch.setitem(REPA_ENCODERS, name, replace(encoder, arguments=arguments))
        path = tmp_path / encoder.file
        if isinstance(content, torch.jit.ScriptModule):
            content.save(str(path))
        else:
            torch.save(content, path)
        return Encoder(name, SIDE, grid, path, side=SIDE)(images)

    return encode_with_file


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("name", "patch", "heads", "convert"),
    [
        ("mocov3-vit-s", 16, 12, to_mocov3),
        ("mocov3-vit-b", 16, 12, to_mocov3),
        ("mocov3-vit-b", 16, 12, dict),  # the weights of the base encoder alone
        ("mocov3-vit-l", 16, 16, to_misnamed_mocov3),
        ("dinov1-vit-b", 16, 12, dict),
        ("jepa-vit-h", 14, 16, to_ijepa),
    ],
)
def test_published_files_yield_the_tokens_after_the_final_norm(
    encode, images, name, patch, heads, convert
):
    depth = 15 if name == "mocov3-vit-l" else 2
    state = make_state(patch, has_class_token=name != "jepa-vit-h", depth=depth)
    tokens = encode(name, convert(state), images, SIDE // patch, depth)
    expected = apply_final_norm(state, compute_tokens(state, images, patch, heads))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_published_file_of_mae_yields_the_tokens_before_the_final_norm(encode, images):
    state = make_state(16)
    tokens = encode("mae-vit-l", {"model": state}, images, 7)
    expected = compute_tokens(state, images, 16, 16)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_archive_of_clip_yields_the_tokens_before_the_final_norm(encode, images):
    state = make_state(14, has_patch_bias=False)
    state["norm_pre.weight"] = torch.linspace(0.5, 1.5, WIDTH)
    state["norm_pre.bias"] = torch.linspace(-1, 1, WIDTH)
    state = {key: value.half().float() for key, value in state.items()}
    half = {key: value.half() for key, value in state.items()}
    tokens = encode("clip-vit-L", to_clip(half), images, 8)
    expected = compute_tokens(state, images, 14, 16, CLIP, eps=1e-5, is_clip=True)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dinov2-vit-b", "dinov2reg-vit-b"])
def test_published_file_of_dinov2_yields_the_patch_tokens(encode, images, name):
    state = make_state(14) | {
        f"blocks.{i}.ls{k}.gamma": torch.linspace(0.5, 1, WIDTH) for i in (0, 1) for k in (1, 2)
    }
    if name == "dinov2reg-vit-b":
        state["register_tokens"] = torch.linspace(-1, 1, 4 * WIDTH).view(1, 4, WIDTH)
    tokens = encode(name, state | {"mask_token": torch.ones(1, WIDTH)}, images, 8)
    expected = apply_final_norm(state, compute_tokens(state, images, 14, 12))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_encoders_that_timm_cannot_download_need_a_file():
    with pytest.raises(FieldError, match=r"mocov3-vit-b .*: download vit-b-300ep.pth.tar \(http"):
        load_network("mocov3-vit-b")


def test_unsuitable_files_are_rejected(tmp_path):
    archive = tmp_path / "ViT-L-14.pt"
    make_script({"visual.conv1.weight": torch.ones(1)}).save(str(archive))
    other = tmp_path / "r-50-300ep.pth.tar"
    torch.save({"state_dict": {"module.base_encoder.conv1.weight": torch.ones(1)}}, other)
    for name, path, message in (
        ("mae-vit-l", archive, "TorchScript archive, which only the encoder clip-vit-L reads"),
        ("test_vit", archive, "TorchScript archive, which only the encoder clip-vit-L reads"),
        ("mocov3-vit-s", other, r"is missing\); mocov3-vit-s is published as vit-s-300ep.pth.tar"),
    ):
        with pytest.raises(FieldError, match=message) as error:
            load_network(name, path)
        assert error.value.field == "weights" and "\n" not in error.value.reason
