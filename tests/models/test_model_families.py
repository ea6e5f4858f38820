"""What every family must do, and each model against a network written down differently here."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from torch import nn

from fedbd.defenses.cleanup.channel_masks import maskable
from fedbd.errors import UserError
from fedbd.models.cnn import Cnn
from fedbd.models.initialize import initialize, materialize
from fedbd.models.mlp import Mlp
from fedbd.models.mnistnet import MnistNet
from fedbd.models.preact_resnet import PreActResNet18
from fedbd.models.resnet import ResNet18
from fedbd.models.torchvision_models import Torchvision
from fedbd.models.vit import Vit
from fedbd.models.wrn import Wrn
from fedbd.params import flatten
from fedbd.training import TrainingPlan, memory_format_of, train
from fedbd.types import ModelFamily, Samples

SHAPES = [(1, 16, 16), (3, 32, 32), (1, 28, 28), (3, 17, 22)]
SMALL_VIT = Vit(patch=1, width=16, depth=2, heads=2)
OTHERS = [Torchvision(architecture=name, resize=64) for name in ("shufflenet_v2_x0_5", "mobilenet_v3_small")]
FAMILIES = [
    *(Cnn(), Cnn(width=3), Mlp(), Mlp(hidden=()), MnistNet(), Wrn(), Wrn(depth=10, width=2)),
    *(ResNet18(width=4), PreActResNet18(width=4), SMALL_VIT, *OTHERS),
]
FLAT = (Mlp, Vit)
"""Families without convolutions."""
ids = {"ids": repr}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(family, shape=(1, 16, 16), classes=10, seed=0):
    return family.build(shape, classes, rng(seed))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES, **ids)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_have_the_right_shape(family, shape):
    model = build(family, shape, classes=7)
    assert isinstance(family, ModelFamily)
    assert model.training
    logits = model(torch.rand(2, *shape, generator=rng()))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES, **ids)
def test_the_generator_alone_decides_the_weights(family):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = flatten(build(family))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert (flatten(build(family)) == first).all()
    assert (flatten(build(family, seed=1)) != first).any()


@pytest.mark.parametrize("family", FAMILIES, **ids)
def test_no_value_comes_from_uninitialized_memory(family, monkeypatch):
    to_empty = nn.Module.to_empty

    def filled(self, **kwargs):
        model = to_empty(self, **kwargs)
        with torch.no_grad():
            for entry in model.state_dict().values():
                entry.fill_(torch.nan if entry.is_floating_point() else 99)
        return model

    plain = build(family).state_dict()
    monkeypatch.setattr(nn.Module, "to_empty", filled)
    for name, entry in build(family).state_dict().items():
        assert torch.equal(entry, plain[name]), name


@pytest.mark.parametrize("family", FAMILIES, **ids)
def test_the_memory_format_is_the_faster_one_and_changes_no_result(family):
    shape = (3, 32, 32)
    model = build(family, shape)
    convolutional = not isinstance(family, FLAT)
    assert memory_format_of(model) is (torch.channels_last if convolutional else torch.contiguous_format)
    x = torch.rand(4, *shape, generator=rng())
    model.eval()
    channels_last = model(x.contiguous(memory_format=torch.channels_last))
    contiguous = model.to(memory_format=torch.contiguous_format)(x)
    assert torch.allclose(channels_last, contiguous, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES, **ids)
def test_the_named_modules_are_there(family):
    shape = (3, 32, 32)
    model = build(family, shape)
    seen = {}
    prunable = getattr(model, "prunable", model.maps)
    for name in (*model.taps, model.maps, prunable, model.channels, model.classifier):
        if name:
            model.get_submodule(name).register_forward_hook(
                lambda _, inputs, out, name=name: seen.update({name: (inputs[0].shape, out.clone())})
            )
    logits = model(torch.rand(2, *shape, generator=rng()))
    assert torch.equal(seen[model.classifier][1], logits)
    assert isinstance(model.get_submodule(model.classifier), nn.Linear)
    for name in model.taps:
        assert seen[name][1].dim() == (2 if isinstance(family, FLAT) else 4)
    if model.maps:
        assert seen[model.maps][1].dim() == (2 if isinstance(family, FLAT) else 4)
    if model.channels:
        maps, channels = seen[prunable][1], seen[model.channels][1]
        assert (maps >= 0).all() or isinstance(family, Torchvision)  # Hardswish
        assert maps.shape[1] == channels.shape[1] == len(model.get_submodule(model.channels).bias)
        fresh = build(family, shape)
        producer = fresh.get_submodule(model.channels)
        with torch.no_grad():  # scale (or filter) and bias switch a channel off
            producer.weight[1], producer.bias[1] = 0, 0
        fresh.get_submodule(prunable).register_forward_hook(lambda _, inputs, out: seen.update(off=out))
        fresh(torch.rand(2, *shape, generator=rng()))
        assert (seen["off"][:, 1] == 0).all()
        assert torch.equal(seen["off"][:, 0], maps[:, 0])


@pytest.mark.parametrize(
    "family",
    [
        *(Cnn(), Mlp(hidden=(32,)), MnistNet(), Wrn(depth=10), ResNet18(width=4), PreActResNet18(width=4)),
        *(Vit(width=32, depth=2, heads=2), OTHERS[0]),
    ],
    **ids,
)
def test_every_family_learns(family):
    labels = torch.arange(60) % 3
    images = torch.randint(0, 60, (60, 1, 16, 16), generator=rng(), dtype=torch.uint8)
    images[torch.arange(60), 0, 5 * labels] += 150
    model = build(family, classes=3)
    epochs = 30 if isinstance(family, Vit) else 10  # attention needs longer
    train(model, Samples(images, labels), TrainingPlan(epochs=epochs, batch_size=20, lr=0.05), rng())
    x, y = Samples(images, labels).batch(torch.arange(60))
    assert (model(x).argmax(1) == y).float().mean() > 0.95


def test_densenets_maps_are_activated_and_its_network_is_torchvisions():
    from torchvision.models import densenet121

    model = build(Torchvision(architecture="densenet121"), (3, 64, 64)).eval()
    seen = {}
    model.get_submodule(model.maps).register_forward_hook(lambda *given: seen.update(maps=given[2].clone()))
    x = torch.rand(2, 3, 64, 64, generator=rng())
    logits = model(x)
    assert seen["maps"].min() == 0 and seen["maps"].max() > 0
    theirs = densenet121(num_classes=logits.shape[1])
    theirs.load_state_dict({name.removeprefix("net."): entry for name, entry in model.state_dict().items()})
    assert torch.allclose(theirs.eval()(x), logits, atol=1e-5)
    norm = model.get_submodule(model.channels)
    with torch.no_grad():
        norm.weight[1], norm.bias[1] = 0, 0
    model(x)
    assert (seen["maps"][:, 1] == 0).all() and (seen["maps"][:, 0] != 0).any()


def test_parameter_counts():
    assert parameters(build(MnistNet(), (1, 28, 28))) == 431_080
    assert parameters(build(Mlp(), (1, 28, 28))) == 199_210  # McMahan et al.'s 2NN
    assert parameters(build(Mlp(hidden=()), (1, 28, 28), 10)) == 7_850
    assert parameters(build(Wrn(), (3, 32, 32))) == 175_066
    assert parameters(build(Wrn(depth=40, width=2), (3, 32, 32))) == 2_243_546  # 2.2 M, Wide ResNets, table 4
    assert parameters(build(ResNet18(), (3, 32, 32))) == 11_173_962  # kuangliu/pytorch-cifar's 11.17 M
    assert parameters(build(PreActResNet18(), (3, 32, 32))) == 11_171_146
    assert parameters(build(Vit(), (3, 32, 32))) == 811_146
    tokens, block = 49 * 128 + 66 * 128, 4 * 129 * 128 + 2 * 2 * 128 + 129 * 256 + 257 * 128
    assert parameters(build(Vit(), (3, 32, 32))) == tokens + 6 * block + 2 * 128 + 129 * 10
    assert parameters(build(Torchvision(architecture="resnet18", resize=64), (3, 32, 32), 1000)) == 11_689_512
    assert parameters(build(Cnn(), (1, 8, 8))) == 9 * (16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64) + 65 * 10


def norm(name: str) -> list[str]:
    return [f"{name}.{entry}" for entry in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def test_wrn_keys_are_the_authors():
    expected = {"conv1.weight", *norm("bn1"), "fc.weight", "fc.bias"}
    for block in ("block1", "block2", "block3"):
        for layer in (0, 1):
            at = f"{block}.layer.{layer}"
            expected |= {*norm(f"{at}.bn1"), f"{at}.conv1.weight", *norm(f"{at}.bn2"), f"{at}.conv2.weight"}
    expected |= {f"{block}.layer.0.convShortcut.weight" for block in ("block2", "block3")}
    state = build(Wrn(), (3, 32, 32)).state_dict()
    assert len(expected) == 82
    assert set(state) == expected
    assert {name for name, _ in build(MnistNet()).named_parameters()} == {
        f"{layer}.{entry}" for layer in ("conv1", "conv2", "fc1", "fc2") for entry in ("weight", "bias")
    }


CHANNELS = {"bn1": 64}
for _group, _width in enumerate((64, 128, 256, 512), start=1):
    CHANNELS |= {f"layer{_group}.{block}.bn{norm}": _width for block in (0, 1) for norm in (1, 2)}
    CHANNELS |= {f"layer{_group}.0.shortcut.1": _width} if _group > 1 else {}


def test_resnet18_has_the_authors_keys_and_4800_channels_to_mask():
    """The layers and counts are those of the mask file that the RNP authors published (logs/mask_values.txt)."""
    model = build(ResNet18(), (3, 32, 32))
    kind, masked = maskable(model, "rnp")
    assert kind == "batchnorm"
    assert {name: module.num_features for name, module in masked.items()} == CHANNELS
    assert sum(CHANNELS.values()) == 4800
    convolutions = {"conv1"} | {f"layer{g}.{b}.conv{c}" for g in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)}
    convolutions |= {f"layer{g}.0.shortcut.0" for g in (2, 3, 4)}
    expected = {f"{name}.weight" for name in convolutions} | {"linear.weight", "linear.bias"}
    expected |= {entry for name in CHANNELS for entry in norm(name)}
    assert set(model.state_dict()) == expected
    assert len(expected) == 122


def test_preact_resnet18_keys_are_backdoorbenchs():
    state = build(PreActResNet18(), (3, 32, 32)).state_dict()
    expected = {"conv1.weight", "linear.weight", "linear.bias"}
    for g in (1, 2, 3, 4):
        for b in (0, 1):
            at = f"layer{g}.{b}"
            expected |= {*norm(f"{at}.bn1"), f"{at}.conv1.weight", *norm(f"{at}.bn2"), f"{at}.conv2.weight"}
        expected |= {f"layer{g}.0.shortcut.0.weight"} if g > 1 else set()
    assert set(state) == expected


def randomize(model: nn.Module) -> dict[str, torch.Tensor]:
    """Move BatchNorm scales, shifts and statistics off their defaults; return the state."""
    generator = rng(3)
    for name, entry in model.state_dict().items():
        if entry.is_floating_point() and entry.dim() == 1:
            entry.copy_(torch.rand(entry.shape, generator=generator) + (0.5 if "var" in name else 0))
    return model.state_dict()


def batch_norm(x, state, name, training):
    entries = [state[f"{name}.{entry}"] for entry in ("running_mean", "running_var", "weight", "bias")]
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else entries[:2]
    scale = entries[2] / (var + 1e-5).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + entries[3][:, None, None]


@pytest.mark.parametrize("training", [False, True])
def test_wrn_computes_what_the_papers_block_says(training):
    model = build(Wrn(), (3, 32, 32)).train(training)
    s = {name: entry.clone() for name, entry in randomize(model).items()}
    images = torch.rand(3, 3, 32, 32, generator=rng())
    x = F.conv2d(images, s["conv1.weight"], padding=1)
    groups = []
    for block, stride in (("block1", 1), ("block2", 2), ("block3", 2)):
        for layer in (0, 1):
            at, step = f"{block}.layer.{layer}", stride if layer == 0 else 1
            active = torch.clamp(batch_norm(x, s, f"{at}.bn1", training), min=0)
            inner = F.conv2d(active, s[f"{at}.conv1.weight"], stride=step, padding=1)
            inner = torch.clamp(batch_norm(inner, s, f"{at}.bn2", training), min=0)
            inner = F.conv2d(inner, s[f"{at}.conv2.weight"], padding=1)
            shortcut = s.get(f"{at}.convShortcut.weight")
            x = inner + (x if shortcut is None else F.conv2d(active, shortcut, stride=step))
        groups.append(x)
    x = torch.clamp(batch_norm(x, s, "bn1", training), min=0)
    logits = F.avg_pool2d(x, 8).view(-1, 64) @ s["fc.weight"].T + s["fc.bias"]
    seen = []
    for name in model.taps:
        model.get_submodule(name).register_forward_hook(lambda _, inputs, out: seen.append(out.clone()))
    assert torch.allclose(model(images), logits, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(seen, groups, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_resnet18_computes_what_torchvisions_does_with_a_small_stem(training):
    model = build(ResNet18(), (3, 32, 32)).train(training)
    randomize(model)
    theirs = torchvision.models.resnet18(num_classes=10).train(training)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    names = {"shortcut": "downsample", "linear": "fc"}
    state = {".".join(names.get(part, part) for part in name.split(".")): e for name, e in model.state_dict().items()}
    theirs.load_state_dict(state)
    x = torch.rand(3, 3, 32, 32, generator=rng())
    seen = []
    for name in model.taps:
        model.get_submodule(name).register_forward_hook(lambda _, inputs, out: seen.append(out.clone()))
    assert torch.allclose(model(x), theirs(x), rtol=1e-4, atol=1e-4)
    x = theirs.relu(theirs.bn1(theirs.conv1(x)))
    for name, ours in zip(model.taps, seen, strict=True):
        x = theirs.get_submodule(name)(x)
        assert torch.allclose(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_preact_resnet18_computes_what_the_papers_block_says(training):
    model = build(PreActResNet18(width=8), (3, 32, 32)).train(training)
    s = {name: entry.clone() for name, entry in randomize(model).items()}
    images = torch.rand(3, 3, 32, 32, generator=rng())
    x = F.conv2d(images, s["conv1.weight"], padding=1)
    for g in (1, 2, 3, 4):
        for b in (0, 1):
            at, step = f"layer{g}.{b}", 2 if g > 1 and b == 0 else 1
            active = torch.clamp(batch_norm(x, s, f"{at}.bn1", training), min=0)
            inner = F.conv2d(active, s[f"{at}.conv1.weight"], stride=step, padding=1)
            inner = torch.clamp(batch_norm(inner, s, f"{at}.bn2", training), min=0)
            shortcut = s.get(f"{at}.shortcut.0.weight")
            x = F.conv2d(inner, s[f"{at}.conv2.weight"], padding=1) + (
                x if shortcut is None else F.conv2d(active, shortcut, stride=step)
            )
    logits = F.avg_pool2d(x, 4).view(-1, 64) @ s["linear.weight"].T + s["linear.bias"]
    assert torch.allclose(model(images), logits, rtol=1e-4, atol=1e-4)


def test_vit_computes_what_torchvisions_does():
    model = build(Vit(width=24, depth=3, heads=4), (3, 32, 24)).eval()
    square = build(Vit(width=24, depth=3, heads=4), (3, 32, 32)).eval()
    assert model(torch.rand(2, 3, 32, 24)).shape == (2, 10)  # not square
    layer_norm = functools.partial(nn.LayerNorm, eps=1e-5)
    theirs = torchvision.models.VisionTransformer(32, 4, 3, 4, 24, 48, num_classes=10, norm_layer=layer_norm).eval()
    names = {
        "tokens.token": "class_token", "tokens.positions": "encoder.pos_embedding", "tokens.embed": "conv_proj",
        "head": "heads.head", "norm": "encoder.ln", "blocks.": "encoder.layers.encoder_layer_", ".norm1": ".ln_1",
        ".norm2": ".ln_2", ".attention.qkv.": ".self_attention.in_proj_", ".attention.out": ".self_attention.out_proj",
        ".perceptron.0": ".mlp.0", ".perceptron.2": ".mlp.3",
    }  # fmt: skip
    state = {}
    for own, entry in randomize(square).items():
        name = own
        for ours, other in names.items():
            name = name.replace(ours, other, 1) if ours.startswith(".") or own.startswith(ours) else name
        state[name] = entry.view(24, 3, 4, 4) if name == "conv_proj.weight" else entry
    theirs.load_state_dict(state)
    x = torch.rand(5, 3, 32, 32, generator=rng())
    seen = {}
    square.get_submodule(square.taps[-1]).register_forward_hook(lambda _, inputs, out: seen.update(last=out))
    theirs.encoder.layers[-1].register_forward_hook(lambda _, inputs, out: seen.update(theirs=out[:, 0]))
    assert torch.allclose(square(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert torch.allclose(seen["last"], seen["theirs"], rtol=1e-4, atol=1e-4)


def test_torchvisions_network_is_torchvisions_and_fits_its_images():
    family = Torchvision(architecture="mobilenet_v3_small", resize=64)
    model = build(family, (1, 28, 28), classes=5).eval()
    theirs = torchvision.models.mobilenet_v3_small(num_classes=5).eval()
    theirs.load_state_dict({name.removeprefix("net."): entry for name, entry in model.state_dict().items()})
    x = torch.rand(3, 1, 28, 28, generator=rng())
    large = F.interpolate(x.repeat(1, 3, 1, 1), size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(model(x), theirs(large), atol=1e-5)
    torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=rng(7))))
    own = torchvision.models.mobilenet_v3_small(num_classes=5).state_dict()  # its own rules, from the same seed
    again = build(family, (1, 28, 28), classes=5, seed=7).state_dict()
    assert all(torch.equal(again[f"net.{name}"], entry) for name, entry in own.items())


@pytest.mark.parametrize("architecture", ["vgg11", "efficientnet_b0", "googlenet", "swin_t"])
def test_torchvisions_networks_draw_nothing_while_they_train(architecture):
    """Dropout and stochastic depth would draw from the global random state, and bits would depend on what it is."""
    model = build(Torchvision(architecture=architecture, resize=64), (3, 32, 32), classes=3)
    x = torch.rand(2, 3, 32, 32, generator=rng())
    before = torch.get_rng_state()
    model(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_mnistnet_computes_what_its_code_says():
    model = build(MnistNet(), (1, 28, 28))
    reference = nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2, 2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2, 2),
        nn.Flatten(), nn.Linear(4 * 4 * 50, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip
    reference.load_state_dict(dict(zip(reference.state_dict(), model.state_dict().values(), strict=True)))
    x = torch.rand(5, 1, 28, 28, generator=rng())
    assert torch.allclose(model(x), reference(x), atol=1e-5)


def test_cnn_and_mlp_compute_what_their_docstrings_say():
    model = build(Cnn(), (3, 9, 8)).eval()
    s = randomize(model)
    x = images = torch.rand(2, 3, 9, 8, generator=rng())
    for block in ("block1", "block2", "block3"):
        x = F.max_pool2d(x, 2) if block != "block1" else x
        x = batch_norm(F.conv2d(x, s[f"{block}.conv.weight"], padding=1), s, f"{block}.bn", training=False).relu()
    assert torch.allclose(model(images), F.adaptive_avg_pool2d(x, 1).flatten(1) @ s["fc.weight"].T + s["fc.bias"])
    model = build(Mlp(hidden=(5, 4)), (3, 9, 8))
    s = model.state_dict()
    x = images.reshape(2, -1)
    for layer in (0, 1):
        x = (x @ s[f"hidden.{layer}.0.weight"].T + s[f"hidden.{layer}.0.bias"]).relu()
    assert torch.allclose(model(images), x @ s["fc.weight"].T + s["fc.bias"], atol=1e-6)


def test_the_torch_rule_is_pytorchs_own():
    """Bit for bit what PyTorch draws by itself from a global generator of the same seed."""
    torch.manual_seed(5)
    theirs = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 11))
    ours = materialize(lambda: nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 11)))
    initialize(ours, rng(5), convolutions="torch")
    for name, entry in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], entry), name


def test_the_he_rule_has_its_moments():
    model = build(Wrn(width=4), (3, 32, 32))
    weight = model.block2.layer[0].conv1.weight.detach()  # 128 x 64 x 3 x 3
    assert weight.std() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.01)
    assert weight.mean().abs() < 4 * weight.std() / math.sqrt(weight.numel())
    assert (model.fc.bias == 0).all()
    assert model.fc.weight.abs().max() <= 1 / math.sqrt(256)
    assert model.fc.weight.detach().std() == pytest.approx(1 / math.sqrt(3 * 256), rel=0.05)


def test_a_layer_without_a_rule_is_refused():
    with pytest.raises(TypeError, match="no rule for Embedding"):
        initialize(nn.Sequential(nn.Embedding(2, 2)), rng(), convolutions="torch")


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        (
            MnistNet(),
            (1, 8, 8),
            "model: mnistnet takes images from 16x16 up, got 8x8; use cnn or mlp, or digits with pixels: 16",
        ),
        (Cnn(), (1, 7, 9), "model: cnn takes images from 8x8 up, got 7x9; use mlp"),
        (
            Wrn(),
            (1, 28, 7),
            "model: a Wide ResNet takes images from 8x8 up, got 28x7; use mlp",
        ),
        (
            ResNet18(),
            (1, 8, 8),
            "model: resnet18 takes images from 16x16 up, got 8x8; use cnn or mlp, or digits with pixels: 16",
        ),
        (
            PreActResNet18(),
            (1, 8, 8),
            "model: preact_resnet18 takes images from 16x16 up, got 8x8; use cnn or mlp, or digits with pixels: 16",
        ),
        (
            Vit(),
            (1, 17, 28),
            "model.patch: must divide the images' 17x28 into whole patches, got 4",
        ),
        (
            Torchvision(architecture="resnet18"),
            (3, 32, 32),
            "model: resnet18 cannot train on images of 32x32: Expected more than 1 value per channel when training, "
            "got input size torch.Size([1, 512, 1, 1]); set model.resize to 48",
        ),
        (
            Torchvision(architecture="resnet18", resize=64),
            (2, 32, 32),
            "model: torchvision's networks take images of 1 or 3 channels, got 2",
        ),
    ],
    **ids,
)
def test_refusals(family, shape, message):
    with pytest.raises(UserError) as caught:
        build(family, shape)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (Wrn, {"depth": 17}, "depth: must be 6 n + 4 (10, 16, 22, 28, 34, 40, ...), got 17"),
        (Vit, {"heads": 3}, "heads: must divide width (128), got 3"),
        (
            Torchvision,
            {"architecture": "resnet81", "weights": "DEFAULT"},
            "architecture: must be a classifier of torchvision, got 'resnet81'; did you mean 'resnet18'?\n"
            "  weights: must be null, since fedbd downloads nothing, got 'DEFAULT'; save them with torchvision's "
            "own tools and name the file in start.checkpoint",
        ),
    ],
)
def test_fields_that_fit_no_network_are_refused(family, fields, message):
    with pytest.raises(UserError) as caught:
        family(**fields)
    assert str(caught.value) == f"{family.__name__} cannot be made of these fields:\n  {message}"


@pytest.mark.parametrize(
    ("family", "side"), [(Cnn(), 8), (Wrn(), 8), (ResNet18(width=2), 16), (PreActResNet18(width=2), 16)], **ids
)
def test_a_last_batch_of_one_smallest_image_trains(family, side):
    model = build(family, (1, side, side))
    data = Samples(torch.zeros(5, 1, side, side, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 0]))
    train(model, data, TrainingPlan(epochs=1, batch_size=4), rng())
    assert all(entry.isfinite().all() for entry in model.state_dict().values())
