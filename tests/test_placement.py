"""Local crops inside global ones, or apart: boxes, sizes, and that nothing else changes."""

import io
import math
import pickle
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import default_collate

from logo_plugin import MultiCropCollate, MultiCropTransform, crop_overlap
from logo_plugin.__main__ import main

SMALL = {"global_size": 40, "local_size": 24}
# The channels say in which row and column a pixel is, so that the mean of a view is the centre of its box.
PLACE = torch.stack(torch.meshgrid((torch.arange(90) + 0.5) / 90, (torch.arange(120) + 0.5) / 120, indexing="ij"))
UNTOUCHED = {"mean": (0, 0), "std": (1, 1), "flip_p": 0, "jitter_p": 0, "blur_p": 0, "hue": 0, "saturation": 0}


def drawn(seed, width, height, **options):
    torch.manual_seed(seed)
    return MultiCropTransform(**options).draw(width, height)


def boxes_of(recipes):
    return [recipe.box for recipe in recipes]


def size(box):
    return box[2] - box[0], box[3] - box[1]


def common_pixels(boxes):
    """By painting them."""
    width, height = max(box[2] for box in boxes), max(box[3] for box in boxes)
    masks = []
    for left, top, right, bottom in boxes:
        masks.append(np.zeros((height, width), int))
        masks[-1][top:bottom, left:right] = 1
    return sum((first * second).sum() for first, second in combinations(masks, 2))


def test_anywhere_draws_what_it_drew_before_there_was_a_choice():
    """Boxes, flips and the generator's next number, as of the commit before the option."""
    images = [Image.new("RGB", size, (9, 9, 9)) for size in ((150, 110), (30, 47), (400, 10))]
    torch.manual_seed(5)
    _, crops = MultiCropCollate(**SMALL, local_crops=3, return_boxes=True)(images)
    panorama = [193, 0, 206, 10]
    assert crops.boxes.tolist() == [
        [[37, 9, 132, 84], [0, 13, 30, 41], panorama],
        [[33, 16, 149, 109], [4, 13, 30, 45], panorama],
        [[18, 29, 90, 109], [1, 4, 22, 25], panorama],
        [[19, 24, 53, 67], [6, 8, 28, 29], panorama],
        [[67, 50, 107, 96], [14, 0, 30, 15], panorama],
    ]
    assert crops.flips.int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 1, 1], [0, 1, 1]]
    assert torch.rand(()).item() == 0.9467530846595764


@pytest.mark.parametrize("placement", ["inside", "apart"])
def test_of_an_image_only_the_local_boxes_change(placement):
    changed = 0
    for seed in range(20):
        usual = drawn(seed, 150, 110, local_crops=3, local_scale=(0.05, 0.2))
        moved = drawn(seed, 150, 110, local_crops=3, local_scale=(0.05, 0.2), local_placement=placement)
        assert moved[:2] == usual[:2]
        for before, after in zip(usual[2:], moved[2:], strict=True):
            assert before._replace(box=after.box) == after
            assert size(before.box) == size(after.box)  # local crops so small fit any global one
            changed += before.box != after.box
    assert changed > 10


@settings(max_examples=150)
@given(
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
)
def test_inside(image, seed, global_crops, scale):
    """Every local crop lies in its global crop, and has the size that it would have anywhere, where that fits."""
    options = {"global_crops": global_crops, "local_crops": 4, "local_scale": tuple(scale), "global_scale": (0.2, 0.9)}
    usual = boxes_of(drawn(seed, *image, **options))[global_crops:]
    boxes = boxes_of(drawn(seed, *image, **options, local_placement="inside"))
    for i, (before, box) in enumerate(zip(usual, boxes[global_crops:], strict=True)):
        around = boxes[i % global_crops]
        assert around[0] <= box[0] < box[2] <= around[2]
        assert around[1] <= box[1] < box[3] <= around[3]
        (w, h), (drawn_w, drawn_h), (most_w, most_h) = size(box), size(before), size(around)
        if drawn_w <= most_w and drawn_h <= most_h:
            assert (w, h) == (drawn_w, drawn_h)
        elif drawn_w * drawn_h >= most_w * most_h:
            assert box == around
        else:  # as wide or as high as the global, and with the area that was drawn
            assert w == most_w if drawn_w > most_w else h == most_h
            assert abs(w * h - drawn_w * drawn_h) <= max(w, h)
            limits = sorted((math.log(drawn_w / drawn_h), math.log(most_w / most_h)))
            rounding = 1 / min(w, h)
            assert limits[0] - rounding <= math.log(w / h) <= limits[1] + rounding


def test_inside_is_uniform_and_keeps_the_scale():
    torch.manual_seed(0)
    transform = MultiCropTransform(local_placement="inside")
    places, areas = [], []
    for _ in range(2000):
        boxes = boxes_of(transform.draw(3000, 2400))
        for around, box in zip(boxes[:2], boxes[2:], strict=True):
            areas.append(math.prod(size(box)) / (3000 * 2400))
            slack = [most - own for most, own in zip(size(around), size(box), strict=True)]
            if min(slack) > 300:
                places.append([(box[k] - around[k]) / slack[k] for k in (0, 1)])
    tenths = (torch.tensor(places) * 10).long().clamp_max(9)
    for of_axis in tenths.unbind(1):
        shares = of_axis.bincount(minlength=10) / len(places)
        assert (shares - 0.1).abs().max() < 0.02  # four standard deviations
    deciles = torch.tensor(areas).quantile(torch.linspace(0.1, 0.9, 9))
    torch.testing.assert_close(deciles, 0.05 + 0.35 * torch.linspace(0.1, 0.9, 9), rtol=0, atol=0.01)


@pytest.mark.parametrize("local_crops", [2, 4])
def test_apart_is_the_choice_that_the_docstring_says(local_crops):
    for seed in range(10):
        options = {"local_crops": local_crops, "local_scale": (0.05, 0.5)}
        boxes = boxes_of(drawn(seed, 60, 45, **options))[2:]
        places = torch.rand(local_crops, 9, 2).tolist()
        for i, own in enumerate(list(boxes)):
            w, h = size(own)
            corners = [(int(u * (60 - w + 1)), int(v * (45 - h + 1))) for u, v in places[i]]
            ten = [own, *((left, top, left + w, top + h) for left, top in corners)]
            common = [sum(common_pixels([box, other]) for other in boxes[:i] + boxes[i + 1 :]) for box in ten]
            boxes[i] = ten[common.index(min(common))]
        assert boxes_of(drawn(seed, 60, 45, **options, local_placement="apart"))[2:] == boxes


@settings(max_examples=50)
@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.integers(0, 10**6), st.integers(0, 5))
def test_apart_never_overlaps_more_than_the_same_draw_anywhere(image, seed, local_crops):
    usual = boxes_of(drawn(seed, *image, local_crops=local_crops))
    apart = boxes_of(drawn(seed, *image, local_crops=local_crops, local_placement="apart"))
    assert all(0 <= box[0] < box[2] <= image[0] and 0 <= box[1] < box[3] <= image[1] for box in apart)
    if local_crops:
        assert common_pixels(apart[2:]) <= common_pixels(usual[2:])


@pytest.mark.parametrize(
    ("local_crops", "scale", "most"),
    [
        (2, (0.05, 0.4), 0.2),
        (2, (0.05, 0.25), 0.05),
        (4, (0.05, 0.25), 0.2),
        (2, (0.02, 0.06), 0),
        (4, (0.01, 0.03), 0),
    ],
)
def test_apart_overlaps_little(local_crops, scale, most):
    """At most this part of the mean IoU of crops that lie anywhere; none where there is room."""
    means = []
    for placement in ("anywhere", "apart"):
        torch.manual_seed(0)
        transform = MultiCropTransform(local_crops=local_crops, local_scale=scale, local_placement=placement)
        boxes = torch.tensor([boxes_of(transform.draw(500, 375))[2:] for _ in range(600)], dtype=torch.float32)
        means.append(crop_overlap(boxes.transpose(0, 1)).mean().item())
    assert means[0] > 0.01
    assert means[1] <= most * means[0]


@pytest.mark.parametrize("kind", ["tensor", "array", "dicts"])
@pytest.mark.parametrize("defer", [None, "augment", "normalize"])
@pytest.mark.parametrize("placement", ["anywhere", "inside", "apart"])
def test_views_show_what_the_boxes_say(placement, defer, kind):
    """Of two channels, whatever the samples are, also where the device finishes the views."""
    image = (PLACE * 255).round().to(torch.uint8)
    samples = {"tensor": [(image, 1)], "array": [(image.movedim(0, 2).numpy(), 1)], "dicts": [{"x": image, "y": 1}]}
    keys = {"image_key": "x", "target_key": "y"} if kind == "dicts" else {}
    options = {"local_placement": placement, "local_crops": 3, "return_boxes": True, "grayscale_p": 0, "defer": defer}
    torch.manual_seed(1)
    views, targets, crops = MultiCropCollate(**SMALL, **UNTOUCHED, **options, **keys)(samples[kind] * 5)
    assert targets.tolist() == [1] * 5
    for view, boxes in zip(views.to("cpu") if defer else views, crops.boxes, strict=True):
        centre = (boxes[:, [1, 0]] + boxes[:, [3, 2]]) / 2 / torch.tensor([90, 120])
        torch.testing.assert_close(view.mean((2, 3)), centre, rtol=0, atol=0.005)


@pytest.mark.parametrize("placement", ["inside", "apart"])
def test_transform_and_collate_agree_and_files_are_images(placement):
    image = Image.effect_noise((70, 50), 60).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    options = {"local_placement": placement, "return_boxes": True}
    transform, collate = (cls.cifar10(**options) for cls in (MultiCropTransform, MultiCropCollate))
    assert pickle.loads(pickle.dumps(collate)) == collate
    assert f"local_placement='{placement}'" in repr(collate)
    torch.manual_seed(0)
    *views, boxes = default_collate([transform(buffer.getvalue()) for _ in range(3)])
    torch.manual_seed(0)
    (expected, crops) = collate([image] * 3)
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
    assert torch.equal(boxes.transpose(0, 1), crops.boxes)


def test_a_damaged_file_gives_its_place_to_crops_of_the_same_kind():
    collate = MultiCropCollate(**SMALL, local_placement="inside", return_boxes=True, on_error="skip")
    with pytest.warns(UserWarning, match="takes its place"):
        _, crops = collate([b"", Image.new("RGB", (90, 70)), b""])
    large, small = crops.boxes[:2], crops.boxes[2:]
    assert (small[..., :2] >= large[..., :2]).all()
    assert (small[..., 2:] <= large[..., 2:]).all()


def test_command(tmp_path, capsys):
    """`logo-plugin crops` draws them."""
    Image.effect_noise((80, 60), 60).convert("RGB").save(tmp_path / "photo.png")
    command = ["crops", str(tmp_path / "photo.png"), "--rows", "1", "--option", "local_crops=5", "--output"]
    for placement in ("anywhere", "inside", "apart"):
        path = tmp_path / f"{placement}.png"
        assert main([*command, str(path), "--option", f"local_placement={placement}"]) == 0
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in ("anywhere", "inside", "apart")}) == 3
    assert main([*command, str(tmp_path / "none.png"), "--option", "local_placement=centre"]) == 1
    assert "local_placement must be one of ('anywhere', 'inside', 'apart'), got 'centre'" in capsys.readouterr().err
