"""SPP-Net's recipe: its data, its files, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from skimage.data import coins
from warploom import cli
from warploom.models.boxes import box_iou
from warploom.recipes._extras import make_console
from warploom.recipes._spp_coins import (
    SPLIT_ROW,
    augmented,
    coin_boxes,
    jittered,
    sliding_proposals,
)
from warploom.recipes._spp_digits import DigitsTask, load_digits, resized
from warploom.recipes.spp_demo import spp_demo
from warploom.recipes.spp_net import SPPNetConfig, spp_net

PNG = b"\x89PNG"
QUICK = {"steps": 3, "batch_size": 16, "regions": 16, "validate_every": 2, "device": "cpu"}


def config(output: Path, **changes: Any) -> SPPNetConfig:
    return SPPNetConfig(output=output, **{**QUICK, **changes})


def read_log(output: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for record in records:
        assert record.pop("steps_per_second") > 0  # all else is the same in two runs
    return records


# Data


def test_digits_are_split_once_for_a_seed():
    (images, labels), (tested, test_labels) = load_digits(seed=3)
    assert images.shape == (1437, 1, 8, 8) and tested.shape == (360, 1, 8, 8)
    assert images.min() == -1 and images.max() == 1
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    assert torch.equal(load_digits(seed=3)[1][0], tested)
    assert not torch.equal(load_digits(seed=4)[1][0], tested)
    assert len(torch.cat([images, tested])) == 1797
    assert torch.equal(resized(images, 8), images)


def test_steps_take_the_sizes_in_turn(monkeypatch: pytest.MonkeyPatch):
    task = DigitsTask([8, 12], [10], 4, 0, torch.device("cpu"))
    seen = []
    monkeypatch.setattr(
        task.model, "forward", lambda x: seen.append(x.shape[-1]) or torch.zeros(len(x), 10)
    )
    for _ in range(4):
        task.loss()
    assert seen == [8, 12, 8, 12]
    assert list(task.tests) == [8, 10, 12]


def test_the_photograph_has_24_coins_12_in_each_half():
    boxes = coin_boxes(coins())
    assert len(boxes) == 24
    assert int((boxes[:, 3] <= SPLIT_ROW).sum()) == int((boxes[:, 1] >= SPLIT_ROW).sum()) == 12
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() > 30 and sides.max() < 80
    overlaps = box_iou(boxes, boxes).fill_diagonal_(0)
    assert overlaps.max() < 0.05


def test_proposals_reach_every_coin():
    """They know nothing of the boxes, so that recall is the detector's to lose."""
    boxes = coin_boxes(coins())
    height, width = coins().shape
    proposals = sliding_proposals((height, width), torch.Generator().manual_seed(0))
    assert float(box_iou(boxes, proposals).max(1).values.min()) > 0.5


def test_jitter_stays_within_its_share():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 100.0]]).repeat(200, 1)
    moved = (jittered(boxes, 0.1, torch.Generator().manual_seed(0)) - boxes).abs()
    limits = torch.tensor([1.0, 10.0, 1.0, 10.0])
    assert (moved <= limits).all() and (moved.amax(0) > 0.9 * limits).all()


def test_augmentation_takes_the_boxes_along():
    """An image that is 1 inside its box and 0 outside, resized and mirrored in all four ways."""
    boxes = torch.tensor([[5.0, 20.0, 25.0, 28.0]])
    image = torch.zeros(1, 1, 40, 60)
    image[..., 20:28, 5:25] = 1
    generator = torch.Generator().manual_seed(0)
    corners = set()
    for _ in range(40):
        changed, moved = augmented(image, boxes, generator)
        x1, y1, x2, y2 = moved[0].round().int().tolist()
        bright = changed > (changed.max() + changed.min()) / 2
        rows, columns = bright[0, 0].any(1).nonzero(), bright[0, 0].any(0).nonzero()
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert all(abs(int(a) - b) <= 1 for a, b in zip(found, (x1, y1, x2, y2)))
        corners.add((x1 < 20, y1 < 16))
    assert len(corners) == 4


# Runs


@pytest.mark.parametrize(
    ("task", "figures"),
    [
        ("digits", {"accuracy_at_8", "accuracy_at_10", "accuracy_at_12"}),
        (
            "coins",
            {"map_trained", "map_11point_trained", "map_held_out", "map_11point_held_out"},
        ),
    ],
)
def test_a_run_leaves_log_result_weights_and_picture(task, figures, tmp_path: Path):
    settings = {"task": task, "sizes": "8, 12", "unseen_sizes": "10"}
    picture = spp_net(config(tmp_path / "one", **settings))
    assert picture == tmp_path / "one" / "spp.png" and picture.read_bytes().startswith(PNG)
    log = read_log(tmp_path / "one")
    assert [record["step"] for record in log] == [1, 2, 3]
    assert all({"loss", "learning_rate", "grad_norm"} <= record.keys() for record in log)
    assert [figures <= record.keys() for record in log] == [False, True, True]
    written = json.loads((tmp_path / "one" / "result.json").read_text())
    assert written["settings"]["task"] == task
    assert written["results"] == {name: log[-1][name] for name in written["results"]}
    assert written["results"].keys() == figures
    assert "classes.weight" in load_file(tmp_path / "one" / "model.safetensors")

    spp_net(config(tmp_path / "two", **settings))
    assert read_log(tmp_path / "two") == log


def test_a_folder_with_a_run_is_refused(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(FileExistsError, match="holds a run; name another folder"):
        spp_net(config(tmp_path))


def test_one_network_learns_sizes_that_it_was_not_shown(tmp_path: Path):
    spp_net(config(tmp_path, steps=60, batch_size=64, sizes="8,12", unseen_sizes="10"))
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert min(results.values()) > 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "faces"}, "task: expected one of digits, coins, got 'faces'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"sizes": "8;12"}, "sizes: expected sides such as 8,12,16, got '8;12'"),
        ({"unseen_sizes": "0"}, "unseen_sizes: expected sides"),
    ],
)
def test_settings_are_checked(change, message, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **change)


def test_the_command_prints_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["spp-net", "--output", str(tmp_path / "run"), "--steps", "1", "--sizes", "8"]
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--unseen-sizes", "", "--device", "cpu"])
    assert not end.value.code
    assert str(tmp_path / "run" / "spp.png") in capsys.readouterr().out


def test_the_demo_draws_one_picture_of_both(tmp_path: Path):
    (tmp_path / "spp-coins").mkdir()
    (tmp_path / "spp-coins" / "log.jsonl").write_text("an earlier demo")
    picture = spp_demo(tmp_path, make_console(), steps=1)
    assert picture.read_bytes().startswith(PNG)
    for name in ("digits", "coins"):
        assert len(read_log(tmp_path / f"spp-{name}")) == 1
