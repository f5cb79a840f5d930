"""Multi-crop collate and transform: batches, inputs, randomness, work left to the device, bad files."""

import io
import pickle
import random
import runpy
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pretended
import pytest
import torch
import torch.multiprocessing as mp
import torchvision.transforms.v2.functional as reference
from photos import tiles
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from logo_plugin import MultiCropCollate, MultiCropTransform

SMALL = {"global_size": 40, "local_size": 24}
PLAIN = {"jitter_p": 0, "grayscale_p": 0, "blur_p": 0, "mean": (0, 0, 0), "std": (1 / 255,) * 3}  # 0 to 255


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seeded(make, *arguments, seed=0):
    torch.manual_seed(seed)
    return make(*arguments)


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def photograph():
    return tiles(1, 200)[0][0].resize((150, 110), Image.Resampling.BICUBIC)


def test_views_come_globals_first_then_targets_and_filenames():
    samples = [(image, target, f"{i}.png") for i, (image, target) in enumerate(tiles(5))]
    views, targets, names = MultiCropCollate(global_crops=3, local_crops=1, **SMALL)(samples)
    assert [tuple(view.shape) for view in views] == [(5, 3, 40, 40)] * 3 + [(5, 3, 24, 24)]
    assert all(view.dtype == torch.float32 and view.is_contiguous() for view in views)
    assert targets.tolist() == [target for _, target in tiles(5)]
    assert names == [f"{i}.png" for i in range(5)]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_batch_has_what_the_samples_have(length):
    samples = [(image, target, str(target))[:length] for image, target in tiles(3)]
    batch = MultiCropCollate(**SMALL, return_boxes=True)(samples)
    assert len(batch) == length + 1
    if length == 1:
        bare = MultiCropCollate(**SMALL)
        assert same(seeded(bare, samples)[0], seeded(bare, [image for image, _ in tiles(3)])[0])


@pytest.mark.parametrize("count", [4, 70])  # of more images small views are augmented together
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_transform_with_torchs_own_collate_gives_the_same_batch(count, kind):
    transform, collate = MultiCropTransform(**SMALL, solarize_p=0.3), MultiCropCollate(**SMALL, solarize_p=0.3)
    scale = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[kind]
    samples = [((np.asarray(image, np.float64) * scale).astype(kind), target) for image, target in tiles(count)]
    views, targets = seeded(lambda: default_collate([(transform(image), target) for image, target in samples]))
    expected, expected_targets = seeded(collate, samples)
    assert same(views, expected)
    assert torch.equal(targets, expected_targets)


def test_transform_gives_the_boxes_of_the_collate():
    options = SMALL | {"return_boxes": True}
    transform = MultiCropTransform(**options)
    *views, boxes = seeded(lambda: default_collate([transform(image) for image, _ in tiles(4)]))
    expected, crops = seeded(MultiCropCollate(**options), [image for image, _ in tiles(4)])
    assert same(views, expected)
    assert torch.equal(boxes.transpose(0, 1), crops.boxes)


def test_defaults_are_the_papers():
    collate = MultiCropCollate()
    views = collate([tiles(1)[0][0]])[0]
    assert [view.shape[-1] for view in views] == [224, 224, 96, 96]
    assert (collate.global_scale, collate.local_scale) == ((0.4, 1.0), (0.05, 0.4))
    assert (collate.brightness, collate.contrast, collate.saturation, collate.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (collate.jitter_p, collate.grayscale_p, collate.blur_p, collate.flip_p) == (0.8, 0.2, 0.5, 0.5)
    assert collate.blur_sigma == (0.1, 2.0)


@pytest.mark.parametrize("cls", [MultiCropCollate, MultiCropTransform])
def test_cifar_preset(cls):
    preset = cls.cifar10(local_crops=4, blur_p=0.1, blur_sigma=(0.1, 1.0))
    assert isinstance(preset, cls)
    assert (preset.global_size, preset.local_size, preset.local_crops, preset.blur_p) == (32, 16, 4, 0.1)
    assert cls.cifar10().blur_p == 0
    assert preset.mean == (0.4914, 0.4822, 0.4465)
    assert preset.std == (0.2023, 0.1994, 0.2010)


def test_normalisation():
    color = Image.new("RGB", (30, 30), (255, 51, 0))
    options = SMALL | {"jitter_p": 0, "grayscale_p": 0, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}
    for view in MultiCropTransform(**options)(color):
        expected = torch.tensor([0.9 / 0.5, 0.0, -0.3 / 2]).view(3, 1, 1).expand_as(view)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(150, 110), (30, 47)])
def test_crops_are_resized_as_torchvision_and_pillow_do(photograph, size):
    """Bicubic with antialias, of the box and with the flip that the batch reports.

    To the level against torchvision's uint8 kernel. Against Pillow, whose weights have more bits, one
    level where it shrinks and two at a few pixels where it enlarges; first across, then down, as
    Pillow did before it chose the order by size.
    """
    image = photograph.resize(size)
    collate = MultiCropCollate(**SMALL, **PLAIN, return_boxes=True)
    views, crops = seeded(collate, [image] * 8)
    assert crops.boxes.shape == (4, 8, 4)
    assert 0 < crops.flips.sum() < 32
    for v, view in enumerate(views):
        for n in range(8):
            side = view.shape[-1]
            left, top, right, bottom = crops.boxes[v, n].int().tolist()
            crop = image.crop((left, top, right, bottom))
            flip = crops.flips[v, n]
            expected = reference.resize(pil_to_tensor(crop), [side, side], InterpolationMode.BICUBIC, antialias=True)
            torch.testing.assert_close(view[n], (expected.flip(-1) if flip else expected).float(), rtol=0, atol=1e-3)
            across = crop.resize((side, bottom - top), Image.Resampling.BICUBIC)
            expected = pil_to_tensor(across.resize((side, side), Image.Resampling.BICUBIC))
            difference = (view[n] - (expected.flip(-1) if flip else expected)).abs().round()
            shrinks = right - left >= side and bottom - top >= side
            assert difference.max() <= (1 if shrinks else 2)
            assert (difference > 1).float().mean() < 5e-3


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (1, 50), (1, 1), (3, 2)])
def test_an_image_that_no_crop_fits_is_cut_in_the_centre_like_torchvisions(size):
    width, height = size
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    transform = MultiCropTransform(global_scale=(1.0, 1.0), **SMALL)
    if size != (3, 2):
        assert transform.draw(width, height)[0].box == (left, top, left + w, top + h)
    views = MultiCropTransform(**SMALL)(Image.new("RGB", size, (9, 9, 9)))
    assert [tuple(view.shape) for view in views] == [(3, 40, 40)] * 2 + [(3, 24, 24)] * 2
    assert all(view.isfinite().all() for view in views)


def test_an_image_may_come_as_tensor_bytes_or_path(photograph, tmp_path):
    collate = MultiCropCollate(**SMALL)
    path = tmp_path / "photograph.png"
    photograph.save(path)
    expected = seeded(collate, [photograph])[0]
    tensor = pil_to_tensor(photograph)
    lossless = [encoded(photograph, "PNG"), encoded(photograph, "WebP", lossless=True)]
    for sample in (tensor, tensor.contiguous(), *lossless, path, str(path)):
        assert same(seeded(collate, [sample])[0], expected)
    assert torch.equal(tensor, pil_to_tensor(photograph))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("with_torchvision", [True, False])
def test_jpeg_is_decoded_as_pillow_does(photograph, mode, with_torchvision, tmp_path, monkeypatch):
    if not with_torchvision:  # as where torchvision has dropped its decoder
        monkeypatch.setattr("logo_plugin.decoding._decode_jpeg", None)
    jpeg = encoded(photograph.convert(mode), "JPEG", quality=80)
    path = tmp_path / "photograph.jpg"
    path.write_bytes(jpeg)
    expected = seeded(MultiCropTransform(**SMALL), Image.open(io.BytesIO(jpeg)).convert("RGB"))
    assert same(seeded(MultiCropTransform(**SMALL), jpeg), expected)
    assert same(seeded(MultiCropTransform(**SMALL), path), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "tensor L"])
def test_every_mode_becomes_rgb(photograph, mode):
    if mode.startswith("tensor"):
        converted = photograph.convert(mode[7:])
        image, expected = pil_to_tensor(converted), converted.convert("RGB")
    elif mode.startswith("I"):
        gray = np.asarray(photograph.convert("L"))
        image = Image.fromarray(gray.astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
        assert image.mode == mode
        expected = Image.fromarray(gray).convert("RGB")
    else:
        base = photograph.convert("RGB" if mode in ("YCbCr", "HSV", "CMYK", "P") else "L" if mode == "1" else "RGBA")
        image = base.convert("P").convert("PA") if mode == "PA" else base.convert(mode)
        expected = image.convert("RGB")
    options = SMALL | PLAIN
    views, expected = (seeded(MultiCropTransform(**options), x) for x in (image, expected))
    assert all((a - b).abs().max() <= 1 for a, b in zip(views, expected, strict=True))


@pytest.mark.parametrize("values", [[0, 255], [0, 100_000], [-3, 300]])
def test_integers_of_no_known_range_are_refused(values):
    """As 16 bits, what is stored as 0 to 255 would be black."""
    image = Image.fromarray(np.array([values] * 9, np.int32))
    with pytest.raises(ValueError, match=rf"integers of 32 bits, here {values[0]} to {values[1]}, have no fixed range"):
        MultiCropTransform(**SMALL)(image)


def test_an_iterator_is_a_batch(photograph):
    """Nothing of it is lost."""
    samples = [(photograph, n) for n in range(3)]
    collate = MultiCropCollate(**SMALL)
    assert same(seeded(collate, iter(samples))[0], seeded(collate, samples)[0])
    assert collate(map(tuple, samples))[1].tolist() == [0, 1, 2]
    of_dicts = collate({"image": image, "label": n} for image, n in samples)
    assert of_dicts["views"][0]["label"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_mean_and_std_of_any_kind(photograph, kind):
    mean, std = (0.5, 0.25, 0.125), (0.25, 0.5, 1.0)
    collate = MultiCropCollate(**SMALL, mean=kind(mean), std=kind(std))
    assert collate == MultiCropCollate(**SMALL, mean=mean, std=std)
    assert same(
        seeded(collate, [photograph])[0], seeded(MultiCropCollate(**SMALL, mean=mean, std=std), [photograph])[0]
    )


def test_16_bit_png_keeps_its_range(photograph):
    gray = np.asarray(photograph.convert("L"))
    png = encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")
    options = SMALL | PLAIN
    assert same(
        seeded(MultiCropTransform(**options), png), seeded(MultiCropTransform(**options), Image.fromarray(gray))
    )


def test_all_randomness_is_torchs(photograph):
    transform = MultiCropTransform(**SMALL, solarize_p=0.3)
    states = random.getstate(), np.random.get_state()[1].tolist()
    first = seeded(transform, photograph)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    random.seed(1)
    assert same(first, seeded(transform, photograph))
    assert not same(first, transform(photograph))
    assert not same(first, seeded(transform, photograph, seed=1))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_are_reproducible_and_differ():
    samples = [tiles(1)[0]] * 8
    collate = MultiCropCollate.cifar10(return_boxes=True)

    def batches(seed):
        torch.manual_seed(seed)
        return list(DataLoader(samples, batch_size=2, num_workers=2, collate_fn=collate))

    first, again, other = batches(0), batches(0), batches(1)
    assert all(same(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not any(same(a[0], b[0]) for a, b in zip(first, other, strict=True))
    boxes = Counter(tuple(box.tolist()) for batch in first for box in batch[-1].boxes.flatten(0, 1))
    assert len(boxes) > 28  # of 32: two workers do not draw the same


def test_pickles():
    for made in (MultiCropCollate.cifar10(on_error="skip", defer="augment"), MultiCropTransform(global_size=64)):
        copy = pickle.loads(pickle.dumps(made))
        assert copy == made
        assert repr(copy) == repr(made)


def test_a_model_can_train_on_the_views(photograph):
    weight = torch.ones((), requires_grad=True)
    transform = MultiCropTransform(**SMALL)
    for views in (transform(photograph), MultiCropCollate(**SMALL)([photograph])[0]):
        for view in views:
            assert not view.is_inference()
            (weight * view.add_(1)).sum().backward()
    assert weight.grad.isfinite()


def everything(**options):
    return MultiCropCollate(**SMALL, solarize_p=0.3, **options)


@pytest.mark.parametrize(("defer", "tolerance"), [("augment", 2e-3), ("normalize", 0.51)])
def test_the_device_gives_the_workers_picture(photograph, defer, tolerance):
    """The same draws, in levels of 255."""
    samples = [photograph, *(image for image, _ in tiles(7))]
    expected = seeded(everything(), samples)[0]
    deferred = seeded(everything(defer=defer), samples)[0]
    views = pickle.loads(pickle.dumps(deferred)).to("cpu", non_blocking=True)
    assert same(views, deferred.to(torch.device("cpu")))
    for view, other in zip(views, expected, strict=True):
        assert view.dtype == torch.float32
        difference = 255 * (view - other).abs() * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        assert difference.max() <= tolerance


@pytest.mark.parametrize("defer", ["augment", "normalize"])
def test_everything_deferred_happens_on_the_device(photograph, defer):
    """The meta device, like a GPU, refuses to mix with tensors on the CPU."""
    views = everything(defer=defer)([photograph] * 12)[0].to("meta")
    assert [(view.device.type, tuple(view.shape)) for view in views] == [
        ("meta", (12, 3, side, side)) for side in (40, 40, 24, 24)
    ]


@pytest.mark.skipif(not pretended.POSSIBLE, reason="this torch has no backends in Python")
def test_the_device_is_never_waited_for(photograph):
    """What was drawn goes there without a stop, whose price is that the device then waits for the next operator."""
    batches = [everything(defer=defer)([photograph] * 12)[0] for defer in ("augment", "normalize")]
    mp.start_processes(_finish_on_a_device, (batches,), start_method="forkserver")


def _finish_on_a_device(_, batches):
    pretended.begin()
    for batch in batches:
        with pretended.Device():
            views = batch.to(pretended.NAME, non_blocking=True)
        assert [(view.device.type, view.shape[2]) for view in views] == [
            (pretended.NAME, side) for side in (40, 40, 24, 24)
        ]


@pytest.mark.parametrize("defer", ["augment", "normalize"])
def test_copies_to_apples_devices_are_waited_for(photograph, defer):
    """Torch's may read the source when it is gone; Lightning waits for them, too."""
    copies = []

    class Apple(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.to and args[1] == "mps":
                copies.append(kwargs["non_blocking"])
                return args[0]
            return func(*args, **kwargs or {})

    batch = everything(defer=defer)([photograph] * 2)[0]
    with Apple():
        batch.to("mps", non_blocking=True)
    assert copies == [False] * 6  # four views, mean, std


@pytest.mark.parametrize("defer", ["augment", "normalize"])
def test_unfinished_views_reach_no_model(photograph, defer):
    batch = everything(defer=defer)([(photograph, 3)] * 2)
    for use in (list, len, lambda views: views[0], lambda views: default_collate([views]), torch.stack):
        with pytest.raises(TypeError):
            use(batch[0])
    with pytest.raises(TypeError, match=r"views = batch\[0\]\.to\(device\)"):
        _first, _second, *_ = batch[0]
    assert batch[1].tolist() == [3, 3]


def test_lightning_finishes_deferred_views_by_itself(photograph):
    apply_func = pytest.importorskip("lightning_fabric.utilities.apply_func")
    batch = seeded(everything(defer="augment", return_boxes=True), [(photograph, 3, "a")])
    moved = apply_func.move_data_to_device(batch, torch.device("cpu"))
    assert same(moved[0], batch[0].to("cpu"))
    assert torch.equal(moved[3].boxes, batch[3].boxes)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_deferred_views_travel_from_workers():
    collate = MultiCropCollate.cifar10(defer="augment")
    (views, _), *_ = DataLoader(tiles(4), batch_size=4, num_workers=1, collate_fn=collate)
    assert [tuple(view.shape) for view in views.to("cpu")] == [(4, 3, side, side) for side in (32, 32, 16, 16)]


def bad_files(photograph):
    jpeg = encoded(photograph, "JPEG")
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": encoded(photograph, "PNG")[:2000],
        "text.jpg": b"not an image",
        "empty.jpg": b"",
        "header.jpg": jpeg[:40],
        "float.tiff": encoded(photograph.convert("F"), "TIFF"),
    }


@pytest.mark.parametrize(
    "name", ["truncated.jpg", "truncated.png", "text.jpg", "empty.jpg", "header.jpg", "float.tiff"]
)
def test_a_bad_file_is_named(photograph, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(bad_files(photograph)[name])
    good = encoded(photograph, "PNG")
    with pytest.raises(ValueError, match=rf"sample 1 of the batch \(.*{name}\): cannot decode .*on_error"):
        MultiCropCollate(**SMALL)([(good, 0), (path, 1)])
    with pytest.raises(ValueError, match=r"sample 2 of the batch \(third\)"):
        MultiCropCollate(**SMALL)([(good, 0, "first"), (good, 1, "second"), (path.read_bytes(), 2, "third")])
    with pytest.raises(ValueError, match=r"sample 0 of the batch: cannot decode"):
        MultiCropCollate(**SMALL)([path.read_bytes()])
    with pytest.raises(ValueError, match="cannot decode"):
        MultiCropTransform(**SMALL)(path)


@pytest.mark.parametrize("count", [5, 20])
def test_skipping_warns_once_per_file_and_keeps_the_batch(photograph, tmp_path, count):
    (tmp_path / "bad.jpg").write_bytes(b"x")
    samples = [(Image.new("RGB", (40, 40), (i, i, i)), i, f"{i}.png") for i in range(1, count + 1)]
    samples[2] = (tmp_path / "bad.jpg", 3, "bad.jpg")
    samples[4] = (tmp_path / "missing.jpg", 5, "missing.jpg")
    collate = MultiCropCollate(**SMALL, **PLAIN, on_error="skip", return_boxes=True)
    with pytest.warns(UserWarning, match="takes its place") as caught:
        views, targets, names, crops = collate(samples)
    assert [str(w.message).split(":")[0] for w in caught] == [
        "sample 2 of the batch (bad.jpg)",
        "sample 4 of the batch (missing.jpg)",
    ]
    good = [i for i in range(count) if i not in (2, 4)]
    assert len(names) == count
    assert crops.boxes.shape == (4, count, 4)
    assert [targets[i].item() for i in good] == [i + 1 for i in good]
    assert set(targets.tolist()) == {i + 1 for i in good}
    for view in views:  # each image carries its target's gray level
        assert view.mean((1, 2, 3)).round().tolist() == targets.tolist()
    assert names == [f"{i}.png" for i in targets.tolist()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate(samples)
    assert len(samples) == count
    assert samples[2][2] == "bad.jpg"


def test_an_index_is_no_file_name(photograph, tmp_path):
    """Third items of samples that are numbers: files are told apart by their paths, and all are warned of."""
    collate = MultiCropCollate(**SMALL, on_error="skip")
    paths = [tmp_path / f"{n}.jpg" for n in range(2)]
    for path in paths:
        with pytest.warns(UserWarning, match=rf"sample 1 of the batch \(.*{path.name}\): cannot decode"):
            collate([(photograph, 0, 0), (path, 1, 1)])
    for _ in range(2):  # what has no name is warned of each time
        with pytest.warns(UserWarning, match="sample 1 of the batch: cannot decode"):
            collate([(photograph, 0, 0), (b"x", 1, 1)])


def test_an_unsuitable_file_is_named(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "colour.png")
    gray = MultiCropCollate(**SMALL, mean=(0.5,), std=(0.2,), hue=0, saturation=0, grayscale_p=0)
    with pytest.raises(TypeError, match=r"sample 1 of the batch \(.*colour\.png\): mean has 1 number"):
        gray([(Image.new("L", (9, 9)), 0), (tmp_path / "colour.png", 1)])


def test_encoded_bytes_of_any_container(photograph):
    """As LMDB, HDF5 and torchvision.io.read_file give them."""
    file = encoded(photograph, "JPEG")
    array = np.frombuffer(file, np.uint8)
    expected = seeded(MultiCropTransform(**SMALL), file)
    for same_file in (bytearray(file), memoryview(file), array, torch.tensor(array), array.repeat(2)[::2]):
        assert same(seeded(MultiCropTransform(**SMALL), same_file), expected)
        assert same(seeded(MultiCropCollate(**SMALL), [(same_file, 1)])[0], [view[None] for view in expected])


def test_half_precision_images(photograph):
    image = (pil_to_tensor(photograph) // 2 * 2).div(256).to(torch.bfloat16)
    for view, other in zip(*(seeded(MultiCropTransform(**SMALL), x) for x in (image, image.float())), strict=True):
        assert torch.equal(view, other)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        ([(Image.new("RGB", (9, 9)), 0)] * 2, r"one image, got a list of 2.*collate_fn.*use MultiCropCollate"),
        ([Image.new("RGB", (9, 9))], r"one image, got a list of 1"),
        (
            {"image": [1], "label": [0]},
            r"got a dict of image, label.*without with_transform.*MultiCropCollate\(image_key=",
        ),
    ],
)
def test_the_transform_says_what_belongs_to_the_collate(image, match):
    with pytest.raises(TypeError, match=f"MultiCropTransform takes .*{match}"):
        MultiCropTransform(**SMALL)(image)


def test_skipping_draws_the_substitute_at_random():
    collate = MultiCropCollate(**SMALL, on_error="skip")
    samples = [(image, i, str(i)) for i, (image, _) in enumerate(tiles(3))] + [(b"", 3, "3")]
    with pytest.warns(UserWarning, match="3"):
        targets = {collate(samples)[1][3].item() for _ in range(30)}
    assert targets == {0, 1, 2}


def test_a_batch_without_any_good_image_is_an_error():
    with (
        pytest.warns(UserWarning, match=r"sample [01] of the batch: cannot decode"),
        pytest.raises(ValueError, match="none of the 2 images"),
    ):
        MultiCropCollate(**SMALL, on_error="skip")([b"x", b"y"])


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ([], "got 0 samples"),
        (Image.new("RGB", (9, 9)), "takes a batch, as collate_fn .*got Image.*MultiCropTransform"),
        ("photo.jpg", "takes a batch, as collate_fn .*got str.*MultiCropTransform"),
        (np.zeros((9, 9, 3), np.uint8), "takes a batch, as collate_fn .*got ndarray.*MultiCropTransform"),
        (torch.zeros(2, 3, 9, 9), "takes a batch, as collate_fn .*got Tensor.*MultiCropTransform"),
        ([1, 2], "got int"),
        ([(0, Image.new("RGB", (9, 9)), 1)], "got int"),
        ([(Image.new("RGB", (9, 9)), 1), Image.new("RGB", (9, 9))], r"\[1, 2\] items"),
        ([(Image.new("RGB", (9, 9)), 1, "a", 2)], r"\[4\] items"),
        ([torch.randn(3, 99, 9)], r"must be in \[0, 1\], got values from -.*remove the transform"),
        ([torch.full((3, 9, 9), float("nan"))], r"must be in \[0, 1\], got values from nan to nan"),
        (
            [torch.zeros(3, 9, 9, dtype=torch.int32)],
            r"uint8, uint16 or floating point .*got a tensor .*int32",
        ),
        ([np.zeros((3, 9, 9), np.uint8)], r"\(3, 9, 9\) of uint8.*np.moveaxis\(image, 0, -1\)"),
        ([np.zeros((9, 9, 4), np.uint8)], r"\(9, 9, 4\) of uint8.*none is dropped.*mean= and std="),
        ([np.zeros(9, np.float32)], r"got an array \(9,\)"),
        ([io.BytesIO(b"x")], r"got BytesIO\. Of an open file give what its read\(\) gives"),
        (
            [(np.zeros((9, 9, 3), np.uint8), 0), (np.zeros((9, 9, 4), np.uint8), 1)],
            "sample 1 of the batch: an image must",
        ),
        (
            [{"image": Image.new("RGB", (9, 9)), "label": label} for label in (1, None)],
            r"the dicts beside the images, with label in sample 0, can't be stacked .*image_key=\"image\", target_key=",
        ),
        ([([torch.zeros(3, 9, 9)] * 2, 0)], "an image is a list of 2 already.*Remove the transform"),
        ([{"jpg": Image.new("RGB", (9, 9))}], "got dict. Of dicts, image_key= says where the image is"),
        ([torch.zeros(9, 9, 3, dtype=torch.uint8)], r"\(9, 9, 3\)"),
        ([torch.zeros(3, 0, 9, dtype=torch.uint8)], r"\(3, 0, 9\)"),
        ([torch.zeros(9, 9, dtype=torch.uint8)], r"\(9, 9\)"),
        (
            [torch.zeros(4, 9, 9, dtype=torch.uint8)],
            r"1 or 3 channels, got a tensor \(4, 9, 9\) .*image\[:3\]",
        ),
        ([torch.zeros(2, 9, 9, dtype=torch.uint8)], r"1 or 3 channels, got a tensor \(2, 9, 9\)"),
        ([torch.zeros(13, 9, 9, dtype=torch.uint8)], r"1 or 3 channels, got a tensor \(13, 9, 9\)"),
    ],
)
def test_samples_of_another_kind_are_an_error_even_when_skipping(samples, match):
    for on_error in ("raise", "skip"):
        with pytest.raises(TypeError, match=match):
            MultiCropCollate(**SMALL, on_error=on_error)(samples)


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("global_crops", 0, "an integer >= 1"),
        ("global_crops", 2.0, "an integer >= 1"),
        ("local_crops", -1, "an integer >= 0"),
        ("local_crops", True, "an integer >= 0"),
        ("global_size", (224, 224), "an integer >= 1"),
        ("global_scale", (0.0, 1.0), "0 < low <= high <= 1"),
        ("global_scale", (0.4, 1.1), "0 < low <= high <= 1"),
        ("local_scale", (0.4, 0.05), "0 < low <= high <= 1"),
        ("local_scale", 0.4, "0 < low <= high <= 1"),
        ("local_placement", "centre", r"one of \('anywhere', 'inside', 'apart'\)"),
        ("local_placement", None, r"one of \('anywhere', 'inside', 'apart'\)"),
        ("ratio", (0.75,), "0 < low <= high"),
        ("blur_sigma", (0.0, 2.0), "0 < low <= high"),
        ("flip_p", 1.5, r"a probability in \[0, 1\]"),
        ("jitter_p", None, r"a probability in \[0, 1\]"),
        ("brightness", -0.1, ">= 0"),
        ("contrast", float("nan"), ">= 0"),
        ("hue", 0.6, r"\[0, 0.5\]"),
        ("mean", (), "a number per channel"),
        ("image_key", 3, "the name of a column or None"),
        ("target_key", "label", "give image_key too"),
        ("std", (0.2, 0.0, 0.2), "3 numbers > 0"),
        ("std", (0.2, 0.2), "3 numbers > 0, as many as mean has"),
        ("defer", "gpu", '"normalize" or "augment"'),
        ("on_error", "ignore", '"raise" or "skip"'),
        ("local_size", 6, "blur_sigma=.* larger than 7 pixels, got 6"),
    ],
)
def test_bad_options_say_what_was_expected(option, value, match):
    with pytest.raises(ValueError, match=match) as error:
        MultiCropCollate(**{option: value})
    assert str(value) in str(error.value)


def test_integers_of_numpy():
    made = MultiCropCollate(global_size=np.int64(40), local_crops=np.uint8(1))
    assert repr(made) == repr(MultiCropCollate(global_size=40, local_crops=1))


def test_a_subclass_has_the_arguments_that_it_says():
    class Mine(MultiCropCollate):
        def __init__(self, side, *, log=None):
            super().__init__(global_size=side, local_size=side // 2)
            object.__setattr__(self, "log", log)

    made = Mine(48, log="here")
    assert (made.log, [view.shape[-1] for view in made([Image.new("RGB", (9, 9))])[0]]) == ("here", [48, 48, 24, 24])
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        Mine(size=3)
    with pytest.raises(TypeError, match="MultiCropCollate: unknown option size"):
        MultiCropCollate(size=3)


@pytest.mark.parametrize("cls", [MultiCropCollate, MultiCropTransform])
@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((), {"size": 96}, r"unknown option size; did you mean global_size or local_size\? There are blur_p, "),
        ((), {"local_crop": 4}, r"unknown option local_crop; did you mean local_crops\?"),
        ((), {"workers": 4}, r"unknown option workers; none is near\. There are"),
        ((), {"_warned": set()}, "unknown option _warned"),
        ((2, 4), {}, r"takes its options by name, as in global_size=224; got \(2, 4\)"),
        (
            ([*range(99)],),
            {},
            r"got \(\[0, 1, 2, 3, 4, 5, \.\.\.\],\)\. If .* was given the class, give it an instance",
        ),
    ],
)
def test_unknown_options_are_named(cls, arguments, options, match):
    with pytest.raises(TypeError, match=f"{cls.__name__}.*{match}"):
        cls(*arguments, **options)


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (
            [torch.zeros(2), torch.zeros(2), torch.zeros(3)],
            r"sample 0 is a tensor \(2,\), that of sample 2 is a tensor \(3,\)",
        ),
        ([1, None, 2], r"sample 0 is int, that of sample 1 is NoneType"),
        ([None, None, None], r"sample 0 is NoneType \("),
        ([Image.new("RGB", (4, 4))] * 3, r"sample 0 is Image"),
        ([[1, 2], [1, 2], [1]], r"sample 0 is list \(RuntimeError"),
    ],
)
def test_targets_that_do_not_stack_are_named(targets, match):
    samples = [(Image.new("RGB", (9, 9)), target) for target in targets]
    with pytest.raises(TypeError, match=f"the targets, second items of the samples, can't be stacked.*{match}"):
        MultiCropCollate(**SMALL, blur_p=0)(samples)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("with_torchvision", [True, False])
def test_decompression_bombs_stop_at_pillows_limit(kind, with_torchvision, tmp_path, monkeypatch):
    """By the header: a file of a few KiB could otherwise take gigabytes."""
    if not with_torchvision:
        monkeypatch.setattr("logo_plugin.decoding._decode_jpeg", None)
    bomb, path = encoded(Image.new("L", (400, 300)), kind), tmp_path / "bomb"
    path.write_bytes(bomb)
    good = [(Image.new("RGB", (9, 9)), 0)]
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 400 * 300 // 2 - 1)
    for image in (bomb, path):
        with pytest.raises(ValueError, match=r"cannot decode the image .*DecompressionBomb.*120000 pixels"):
            MultiCropTransform(**SMALL)(image)
        with pytest.warns(UserWarning, match=r"sample 1 of the batch.*DecompressionBomb.*Another image takes"):
            _views, targets = MultiCropCollate(**SMALL, on_error="skip")([*good, (image, 1)])
        assert targets.tolist() == [0, 0]
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 400 * 300 - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        MultiCropTransform(**SMALL)(bomb)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", None)
    assert MultiCropTransform(**SMALL)(bomb)


def test_small_crops_go_without_blur():
    assert MultiCropTransform(global_size=4, local_size=1, blur_p=0)(Image.new("RGB", (9, 9)))[3].shape == (3, 1, 1)
    assert MultiCropTransform(global_size=8, local_crops=0, local_size=1)(Image.new("RGB", (9, 9)))[1].shape == (
        3,
        8,
        8,
    )


def test_the_example_draws_its_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    output = tmp_path / "crops.png"
    monkeypatch.setattr("sys.argv", ["show_crops.py", "--output", str(output), "--local-crops", "3"])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "show_crops.py"), run_name="__main__")
    with Image.open(output) as picture:
        assert picture.size[0] > 800
    assert "differ by at most" in capsys.readouterr().out
