"""ResNets: torchvision's names and sizes, transformers' numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import ResNetBackbone, ResNetConfig, ResNetForImageClassification
from warploom.convert.resnet import rename_from_transformers, resnet_from_transformers
from warploom.models.resnet import (
    FrozenBatchNorm2d,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
)

SHAPES = {
    "18": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3]},
    "50, stride first": {
        "layer_type": "bottleneck",
        "depths": [3, 4, 6, 3],
        "downsample_in_bottleneck": True,
    },
}


@pytest.mark.parametrize(
    ("make", "parameters", "tensors"),
    [
        (resnet18, 11_689_512, 122),
        (resnet34, 21_797_672, 218),
        (resnet50, 25_557_032, 320),
        (resnet101, 44_549_160, 626),
    ],
)
def test_sizes_are_torchvision_s(make, parameters, tensors):
    with torch.device("meta"):
        model = make()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_names_are_torchvision_s():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in resnet50().state_dict().items()}
    expected = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.num_batches_tracked": (),
        "layer1.0.conv1.weight": (64, 64, 1, 1),
        "layer1.0.bn3.running_var": (256,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.bias": (256,),
        "layer3.5.conv2.weight": (256, 256, 3, 3),
        "layer4.0.downsample.0.weight": (2048, 1024, 1, 1),
        "fc.weight": (1000, 2048),
        "fc.bias": (1000,),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert "layer1.1.downsample.0.weight" not in shapes


def randomize(model: nn.Module) -> None:
    """Statistics and affine parameters that no layer can leave out unseen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.2)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_gives_the_same_logits(shape):
    config = ResNetConfig(**SHAPES[shape], num_labels=7)
    theirs = ResNetForImageClassification(config).eval().double()
    randomize(theirs)
    ours = resnet_from_transformers(config, theirs.state_dict()).eval().double()
    ours.load_state_dict(rename_from_transformers(theirs.state_dict()))  # strict, in double
    image = torch.randn(2, 3, 65, 48, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs(image).logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_features_are_the_stages_of_transformers_backbone():
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = ResNetConfig(**SHAPES["18"], out_features=stages)
    theirs = ResNetBackbone(config).eval()
    ours = resnet_from_transformers(config, theirs.state_dict()).eval()
    image = torch.randn(1, 3, 64, 96)
    maps = ours.features(image)
    assert list(maps) == ["layer1", "layer2", "layer3", "layer4"]
    for ours_map, theirs_map in zip(maps.values(), theirs(image).feature_maps, strict=True):
        torch.testing.assert_close(ours_map, theirs_map, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected relu, got gelu"),
        ({"embedding_size": 32}, "embedding_size: expected 64, got 32"),
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage: expected False"),
    ],
)
def test_settings_that_resnet_has_not_are_refused(change, message):
    config = ResNetConfig(**{**SHAPES["18"], **change})
    with pytest.raises(ValueError, match=message):
        resnet_from_transformers(config, {})


def test_foreign_and_missing_tensors_are_named():
    with pytest.raises(KeyError, match=r"got 'encoder\.layers\.0\.weight'"):
        rename_from_transformers({"encoder.layers.0.weight": torch.ones(1)})
    with pytest.raises(KeyError, match="missing 'bn1.bias'"):
        resnet_from_transformers(ResNetConfig(**SHAPES["18"]), {})


@torch.no_grad()
def test_dilation_keeps_the_map_and_its_receptive_field():
    """A dilated stage, read at every second place, is the strided one (a trous)."""
    strided, dilated = (
        resnet50(replace_stride_with_dilation=dilate).eval()
        for dilate in (None, [False, False, True])
    )
    randomize(strided)
    dilated.load_state_dict(strided.state_dict())
    image = torch.randn(1, 3, 64, 64)
    coarse, fine = (model.features(image) for model in (strided, dilated))
    assert fine["layer4"].shape[-2:] == fine["layer3"].shape[-2:] == (4, 4)
    torch.testing.assert_close(fine["layer3"], coarse["layer3"])
    first_of_each = fine["layer4"][..., ::2, ::2]
    torch.testing.assert_close(first_of_each, coarse["layer4"], rtol=1e-4, atol=1e-4)


def test_dilation_of_basic_blocks_is_refused():
    with pytest.raises(ValueError, match="BasicBlock: dilation: expected 1, got 2"):
        resnet18(replace_stride_with_dilation=[False, False, True])
    with pytest.raises(ValueError, match="expected 3 values, got 2"):
        resnet50(replace_stride_with_dilation=[False, True])


def test_frozen_norm_is_batch_norm_in_evaluation():
    norm = nn.BatchNorm2d(5, eps=1e-3)
    randomize(norm)
    frozen = FrozenBatchNorm2d(5, eps=1e-3)
    frozen.load_state_dict(norm.state_dict())  # num_batches_tracked is passed over
    assert not list(frozen.parameters())
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(frozen.train()(x), norm.eval()(x))


def test_frozen_resnet_takes_the_same_checkpoint():
    model = resnet18(num_classes=3)
    randomize(model)
    frozen = resnet18(num_classes=3, norm_layer=FrozenBatchNorm2d)
    frozen.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(frozen(image), model.eval()(image), rtol=1e-4, atol=1e-4)


def test_zero_initialised_residuals_start_as_the_identity():
    block = resnet50(zero_init_residual=True).layer1[1]
    x = torch.rand(1, 256, 4, 4)
    torch.testing.assert_close(block(x), x)
