"""Images as Hugging Face's datasets and webdataset hand them over, through real DataLoaders."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import tiles
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torchvision import transforms

from logo_plugin import MultiCropCollate

datasets = pytest.importorskip("datasets", reason="datasets is not installed: it is in the extra [test]")
webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed: it is in the extra [test]")

# webdataset leaves its files open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
SMALL = {"global_size": 40, "local_size": 24}
SAMPLES = tiles(6)
PAGE = (Path(__file__).parents[1] / "docs" / "crops.md").read_text()


def collate(image="image", target="label", **options):
    return MultiCropCollate(**SMALL | options, image_key=image, target_key=target)


def first(dataset, collate_fn, **options):
    """The first batch; its crops are drawn with one seed."""
    torch.manual_seed(3)
    return next(iter(DataLoader(dataset, **{"batch_size": 4} | options, collate_fn=collate_fn)))


def check_equal(batch, expected):
    assert len(batch) == len(expected)
    for view, other in zip(batch[0], expected[0], strict=True):
        assert torch.equal(view, other)
    assert torch.equal(batch[1], expected[1])


@pytest.fixture(scope="module")
def expected():
    return first(SAMPLES, MultiCropCollate(**SMALL))


@pytest.fixture
def hugging_face():
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["man", "cat", "cup", "rocket"])}
    images, labels = zip(*SAMPLES, strict=True)
    rows = {"image": list(images), "label": list(labels)}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(columns))


def applied(function):
    """What `with_transform` takes: it is given columns, also of one sample."""
    return lambda batch: batch | {"image": [function(image) for image in batch["image"]]}


def stacked(batch):
    images = torch.stack([transforms.functional.pil_to_tensor(image) for image in batch["image"]])
    return {"image": images, "label": torch.tensor(batch["label"])}


FORMS = {
    "PIL images": lambda d: d,
    "bytes": lambda d: d.cast_column("image", datasets.Image(decode=False)),
    "bytes, numpy": lambda d: d.cast_column("image", datasets.Image(decode=False)).with_format("numpy"),
    "bytes, torch": lambda d: d.cast_column("image", datasets.Image(decode=False)).with_format("torch"),
    "numpy": lambda d: d.with_format("numpy"),
    "torch": lambda d: d.with_format("torch"),
    "torch, labels alone": lambda d: d.with_format("torch", columns=["label"], output_all_columns=True),
    "transform to PIL images": lambda d: d.with_transform(applied(lambda image: image.convert("RGB"))),
    "transform to arrays": lambda d: d.with_transform(applied(np.asarray)),
    "transform to uint8 tensors": lambda d: d.with_transform(applied(transforms.PILToTensor())),
    "transform to a stack": lambda d: d.with_transform(stacked),
    "iterable": lambda d: d.to_iterable_dataset(),
    "iterable, bytes": lambda d: d.to_iterable_dataset().cast_column("image", datasets.Image(decode=False)),
    "iterable, torch": lambda d: d.to_iterable_dataset().with_format("torch"),
}


@pytest.mark.parametrize("form", FORMS)
def test_hugging_face_gives_the_crops_of_its_pictures(hugging_face, expected, form):
    """In each form the same pixels: sample by sample, and as the batches of columns that the dataset makes itself."""
    dataset = FORMS[form](hugging_face)
    check_equal(first(dataset, collate()), expected)
    if hasattr(dataset, "__getitems__"):
        batches = BatchSampler(SequentialSampler(dataset), 4, drop_last=False)
        check_equal(first(dataset, collate(), sampler=batches, batch_size=None), expected)
    if not form.startswith("transform"):  # datasets batches a transform's rows only as above
        check_equal(first(dataset.batch(4), collate(), batch_size=None), expected)


def test_hugging_face_in_workers(hugging_face, expected):
    for dataset in (hugging_face, FORMS["bytes"](hugging_face)):
        loader = DataLoader(dataset, batch_size=4, collate_fn=collate(), num_workers=1)
        (views, labels), _ = loader
        assert [view.shape for view in views] == [view.shape for view in expected[0]]
        assert torch.equal(labels, expected[1])


def test_a_transform_to_floats_in_0_1_is_an_image_too(hugging_face, expected):
    floats = hugging_face.with_transform(applied(transforms.ToTensor()))
    for view, other in zip(first(floats, collate())[0], expected[0], strict=True):
        torch.testing.assert_close(view, other, rtol=0, atol=3 / 255 / 0.22)  # 8 bits round; jitter enlarges it


def test_a_path_is_read(hugging_face, tmp_path, expected):
    """A folder of images gives paths without bytes; on_error names the damaged one."""
    for i, (image, _) in enumerate(SAMPLES):
        image.save(tmp_path / f"{i}.png")
    folder = datasets.Dataset.from_dict({"image": [str(tmp_path / f"{i}.png") for i in range(6)]})
    folder = folder.cast_column("image", datasets.Image(decode=False)).add_column("label", [t for _, t in SAMPLES])
    assert folder[0]["image"]["bytes"] is None
    check_equal(first(folder, collate()), expected)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"sample 1 of the batch \(.*1\.png\): cannot decode the image"):
        first(folder, collate())
    with pytest.warns(UserWarning, match=r"sample 1 of the batch \(.*1\.png\).*Another image takes its place"):
        first(folder, collate(on_error="skip"))


def test_a_missing_image_is_one_that_cannot_be_decoded(hugging_face):
    images = [SAMPLES[0][0], None, SAMPLES[2][0]]
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    for dataset in (rows, rows.cast_column("image", datasets.Image(decode=False))):
        with pytest.raises(ValueError, match=r"sample 1 of the batch: there is no image, only None\."):
            first(dataset, collate(target=None))


def views_of(batch):
    return {"image": [[image, image] for image in batch["image"]], "label": batch["label"]}


NORMALIZED = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda d: d.with_transform(applied(NORMALIZED)),
            {},
            r"got values from -1 .*has normalised it, remove the trans",
        ),
        (lambda d: d.with_transform(views_of), {}, "is a list of 2 already: the dataset has a transform that makes"),
        (lambda d: d.rename_column("image", "pixels"), {}, "has no 'image', only pixels, label: name the columns"),
        (lambda d: d, {"image": None, "target": None, "batch_size": None}, "dict of columns, image, label: name those"),
        (lambda d: d, {"batch_size": None}, r"its 'image' must be a list of images .*PngImageFile.*batch_size=\.\.\."),
        (
            lambda d: d.with_format("numpy"),
            {"batch_size": None, "target": None},
            "array of four dimensions, got nd",
        ),
    ],
)
def test_what_cannot_be_cropped_says_why(hugging_face, change, options, message):
    keys = {name: options.pop(name) for name in ("image", "target") if name in options}
    with pytest.raises((TypeError, ValueError), match=message):
        first(change(hugging_face), collate(**keys), **dict(options))


def test_columns_of_arrays(hugging_face):
    """Array3D: lists as they are, 64 bits with a format, and pixels where the format says so."""
    features = datasets.Features({"image": datasets.Array3D((48, 48, 3), "uint8")})
    images = [np.asarray(image) for image, _ in SAMPLES]
    dataset = datasets.Dataset.from_dict({"image": images}, features=features)
    alone = collate(target=None)
    with pytest.raises(TypeError, match=r"not nested lists of numbers.*with_format\(\"numpy\", dtype=\"uint8\"\)"):
        first(dataset, alone)
    with pytest.raises(TypeError, match=r"of int64\. .*with_format, dtype=\"uint8\" keeps eight bits"):
        first(dataset.with_format("numpy"), alone)
    with pytest.raises(TypeError, match=r"\(48, 48, 3\).*channels are last, image\.permute\(2, 0, 1\)"):
        first(dataset.with_format("torch", dtype=torch.uint8), alone)
    (views,) = first(dataset.with_format("numpy", dtype="uint8"), alone)
    for view, other in zip(views, first([(image,) for image in images], MultiCropCollate(**SMALL))[0], strict=True):
        assert torch.equal(view, other)


def test_unequal_columns():
    with pytest.raises(ValueError, match="the batch has 2 images in 'image' and 1 targets in 'label'"):
        collate()({"image": [image for image, _ in SAMPLES[:2]], "label": [0]})


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "tiles.tar"
    with webdataset.TarWriter(str(path)) as sink:
        for i, (image, label) in enumerate(SAMPLES):
            file = io.BytesIO()
            image.save(file, "PNG")
            sink.write({"__key__": f"{i:04d}", "png": file.getvalue(), "cls": label})
    return str(path)


@pytest.mark.parametrize("decoder", [None, "pil", "rgb8", "torchrgb8"])
def test_webdataset_gives_the_crops_of_its_pictures(shard, expected, decoder):
    """Samples that are dicts or tuples, and its own batches, of columns or collated."""
    samples = webdataset.WebDataset(shard, shardshuffle=False)
    samples = samples.decode(only=["cls"]) if decoder is None else samples.decode(decoder)
    by_key = collate("png", "cls")
    check_equal(first(samples, by_key), expected)
    check_equal(first(samples.to_tuple("png", "cls"), MultiCropCollate(**SMALL)), expected)
    check_equal(first(samples.rename(image="jpg;png", label="cls"), collate()), expected)
    check_equal(first(samples.batched(4), by_key, batch_size=None), expected)
    check_equal(first(samples.batched(4, collation_fn=by_key), None, batch_size=None), expected)


@pytest.mark.parametrize("start", ["from datasets import", "import webdataset"])
def test_blocks_of_the_page_run(start, shard, tmp_path, monkeypatch):
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE, re.S) if b.startswith(start))
    for label in ("cat", "cup"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i, (image, _) in enumerate(SAMPLES):
            image.save(tmp_path / "images" / label / f"{i}.png")
    (tmp_path / "tiles.tar").symlink_to(shard)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = {}
    exec(compile(block, "crops.md", "exec"), names)
    assert names["views"][0].shape == (4, 3, 224, 224)
    assert names["labels"].shape == (4,)
