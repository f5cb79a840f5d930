"""Crops of images that are not 8-bit RGB files: arrays, 16 bits, floating point, dicts, any number of channels."""

import io
import re
from pathlib import Path

import hosts
import numpy as np
import pytest
import pytorch_lightning as pl
import tifffile
import timm
import torch
from photos import tiles
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from skimage import data
from torch.utils.data import DataLoader

from logo_plugin import LoGoLearner, LoGoMonitor, MultiCropCollate, MultiCropTransform, wrap
from logo_plugin.augment import Recipe, augment
from logo_plugin.picture import draw_crops

SMALL = {"global_size": 40, "local_size": 24}
GRAY = {"hue": 0.0, "saturation": 0.0, "grayscale_p": 0.0}


def options(channels, **more):
    """The pixels come out in [0, 255]."""
    return SMALL | GRAY | {"mean": (0.0,) * channels, "std": (1 / 255,) * channels} | more


def seeded(make, *arguments):
    torch.manual_seed(3)
    return make(*arguments)


def picture(channels, size=70):
    """Bands of several photographs, which differ from each other."""
    bands = [np.asarray(tile)[..., i % 3] for i, (tile, _) in enumerate(tiles(channels, size))]
    return np.stack(bands, axis=-1)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
def test_each_channel_is_cropped_as_if_it_were_alone(channels):
    """Its crops are those of the RGB image that has this channel three times: no channel is lost, moved or mixed."""
    image = picture(channels)
    more = {"contrast": 0.0, "blur_p": 1.0, "solarize_p": 0.5, "jitter_p": 1.0}
    views = seeded(MultiCropTransform(**options(channels, **more)), image)
    assert [tuple(view.shape) for view in views] == [(channels, 40, 40)] * 2 + [(channels, 24, 24)] * 2
    for i in range(channels):
        alone = np.repeat(image[..., i : i + 1], 3, axis=-1)
        for view, expected in zip(views, seeded(MultiCropTransform(**options(3, **more)), alone), strict=True):
            torch.testing.assert_close(view[i], expected[0], atol=1e-3, rtol=0)


def test_contrast_is_about_the_mean_of_all_channels():
    x = torch.rand(1, 5, 6, 6) * 200
    got = augment(x, [Recipe(box=(0, 0, 6, 6), contrast=0.5)])
    torch.testing.assert_close(got, 0.5 * x + 0.5 * x.mean())


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("kind", [np.uint16, np.dtype(">u2"), np.float32, np.float64])
def test_more_than_eight_bits_equals_eight_where_it_is_eight(channels, kind):
    image = picture(channels)
    deep = (image.astype(np.uint16) * 257).astype(kind) if np.dtype(kind).kind == "u" else (image / 255).astype(kind)
    transform = MultiCropTransform(**options(channels, jitter_p=0, blur_p=0))
    for view, expected in zip(seeded(transform, deep), seeded(transform, image), strict=True):
        torch.testing.assert_close(view, expected, atol=1.5, rtol=0)  # eight bits round twice, by weights of 16 bits
        assert view.min() >= 0
        assert view.max() <= 255


def test_sixteen_bits_are_kept():
    """A sixteenth of the first level is still a picture."""
    image = (np.arange(4096, dtype=np.uint16) % 16).reshape(64, 64, 1)
    view = seeded(MultiCropTransform(**options(1, jitter_p=0, blur_p=0)), image)[0]
    assert 0 < view.std() < 0.1


def test_arrays_and_tensors_of_one_picture_are_one():
    image = picture(5)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    transform = MultiCropTransform(**options(5))
    read_only = image.copy()
    read_only.flags.writeable = False
    for other in (tensor, read_only, image[::-1].copy()[::-1], np.asfortranarray(image)):
        for view, expected in zip(seeded(transform, other), seeded(transform, image), strict=True):
            assert torch.equal(view, expected)
    rgb = picture(3)
    plain = MultiCropTransform(**SMALL)
    for view, expected in zip(seeded(plain, rgb), seeded(plain, Image.fromarray(rgb)), strict=True):
        assert torch.equal(view, expected)


def test_one_channel_of_files_keeps_its_bits():
    deep = np.asarray(data.camera()[:80, :80], np.uint16) * 200
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "PNG")
    transform = MultiCropTransform(**options(1))
    for view, expected in zip(seeded(transform, file.getvalue()), seeded(transform, deep), strict=True):
        assert torch.equal(view, expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (picture(4), r"mean has 5 numbers.*\(70, 70, 4\) of uint8. Give mean= and std= of 4 numbers"),
        (np.moveaxis(picture(5), -1, 0), r"\(5, 70, 70\).*np.moveaxis\(image, 0, -1\)"),
        (Image.new("RGB", (9, 9)), r"mean has 5 numbers.*\(9, 9, 3\)"),
        (Image.new("P", (9, 9)), "mode P has no plain channels"),
        (picture(5).astype(np.int16), "uint8, uint16 or floating point"),
        (picture(5).astype(np.float32), r"must be in \[0, 1\], got values from"),
        (([picture(5)], 0), "list of 1 already.*Remove the transform"),
    ],
)
def test_other_channels_are_refused_by_number(image, message):
    with pytest.raises(TypeError, match=message):
        MultiCropCollate(**options(5))([image])


@pytest.mark.parametrize("name", GRAY)
def test_colour_is_refused_where_there_is_none(name):
    with pytest.raises(ValueError, match=rf"^{name}=0.3: for red, green and blue only.*5 channels. Set hue=0"):
        MultiCropCollate(**options(5) | {name: 0.3})


@pytest.mark.parametrize("defer", ["normalize", "augment"])
def test_left_to_the_device(defer):
    image = picture(5)
    deferred, expected = (MultiCropCollate(**options(5, defer=d)) for d in (defer, None))
    (views,) = seeded(deferred, [image])
    for view, other in zip(views.to("cpu"), seeded(expected, [image])[0], strict=True):
        torch.testing.assert_close(view, other, atol=0.51, rtol=0)
    with pytest.raises(TypeError, match=r"travel as uint8.*give defer=None"):
        deferred([image.astype(np.float32) / 255])


def test_dicts_by_their_keys():
    samples = [{"jpg": image, "cls": target, "__key__": str(i)} for i, (image, target) in enumerate(tiles(4))]
    views, targets = seeded(MultiCropCollate(**SMALL, image_key="jpg", target_key="cls"), samples)
    expected, _ = seeded(MultiCropCollate(**SMALL), tiles(4))
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
    assert targets.tolist() == [target for _, target in tiles(4)]
    assert len(MultiCropCollate(**SMALL, image_key="jpg")(samples)) == 1
    with pytest.raises(ValueError, match="sample 0 of the batch has no 'image', only jpg, cls, __key__"):
        MultiCropCollate(image_key="image")(samples)
    with pytest.raises(TypeError, match=r"image_key='jpg' is for samples that are dicts, and sample 0 .* is tuple"):
        MultiCropCollate(image_key="jpg")(tiles(2))


def test_a_learner_of_other_channels():
    net = timm.create_model("resnet18", num_classes=0, in_chans=5)
    learner = LoGoLearner(net, "simsiam", image_size=(40, 24), hidden_dim=16, output_dim=8, affinity="learned")
    views, _ = MultiCropCollate(**options(5))([(picture(5), 0), (picture(5), 1)])
    assert learner(views).isfinite()


def test_tiff(tmp_path):
    """uint16 with more bands than a picture has, through tifffile: every band, in its order, with 16 bits."""
    bands = picture(5).astype(np.uint16) + 40000  # which 8 bits would make one level of
    tifffile.imwrite(tmp_path / "last.tif", bands, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(
        tmp_path / "first.tif", np.moveaxis(bands, -1, 0), photometric="minisblack", planarconfig="separate"
    )
    last, first = (tifffile.imread(tmp_path / f"{name}.tif") for name in ("last", "first"))
    assert (last.shape, first.shape, last.dtype) == ((70, 70, 5), (5, 70, 70), np.uint16)
    whole = {"global_size": 70, "local_crops": 0, "global_scale": (1, 1), "ratio": (1, 1), "jitter_p": 0, "blur_p": 0}
    transform = MultiCropTransform(**options(5, flip_p=0, std=(1 / 65535,) * 5, **whole))
    (view, _) = transform(last)
    torch.testing.assert_close(view, torch.from_numpy(bands.astype(np.float32)).permute(2, 0, 1), rtol=0, atol=0.02)
    with pytest.raises(TypeError, match=r"np\.moveaxis\(image, 0, -1\) puts them last"):
        transform(first)
    assert torch.equal(transform(np.moveaxis(first, 0, -1))[0], view)


@pytest.mark.parametrize("subject", ["stains", "Scenes"])
def test_blocks_of_the_page(subject, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "crops.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if subject in b)
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        tifffile.imwrite(f"scene_{i}.tif", picture(5).astype(np.uint16) * 257, photometric="minisblack")
    names = {}
    exec(block, names)
    channels = {"stains": 2, "Scenes": 5}[subject]
    assert [tuple(view.shape[1:]) for view in names["views"]] == [(channels, s, s) for s in (224, 224, 96, 96)]


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("views_by", ["collate", "transform"])
def test_monitor_draws_other_channels(views_by, channels, tmp_path):
    """The first three, or one as gray."""
    model = hosts.SimSiam()
    model.backbone[0] = torch.nn.Conv2d(channels, 16, 3, stride=2)
    run = {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**run, logger=CSVLogger(tmp_path), callbacks=[LoGoMonitor()], log_every_n_steps=1)
    samples = [(picture(channels), i) for i in range(4)]
    loader = DataLoader(samples, batch_size=4, collate_fn=MultiCropCollate(**options(channels)))
    if views_by == "transform":
        transform = MultiCropTransform(**options(channels))
        loader = DataLoader([(transform(image), i) for image, i in samples], batch_size=4)
    trainer.fit(wrap(model), loader)
    (drawn,) = tmp_path.rglob("logo_crops/epoch_0000.png")
    with Image.open(drawn) as image:
        assert image.mode == "RGB"


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(picture(3).astype(np.uint16) * 257, id="16 bits"),
        pytest.param((picture(3) / 255).astype(np.float32), id="floating point"),
        pytest.param(picture(3)[:, :2], id="narrow"),
        pytest.param(picture(3)[:1], id="flat"),
        *(pytest.param(picture(channels), id=f"{channels} channels") for channels in (1, 2, 5)),
    ],
)
def test_crops_of_any_image_can_be_drawn(image):
    channels = image.shape[2]
    drawn = np.asarray(draw_crops(image, MultiCropCollate(**options(channels, image_key="image"))))
    assert drawn.shape[1] < 2000
    source = drawn[:, : drawn.shape[1] - 2 * (40 + 8) - 2 * (24 + 8)]
    inside = source[(source != 255).any(2)]
    shown = np.asarray(image[..., : 3 if channels > 2 else 1], float)
    shown *= {"u1": 1, "u2": 1 / 257, "f4": 255}[image.dtype.str[1:]]
    assert np.abs(np.median(inside, axis=0) - np.median(shown, axis=(0, 1))).max() < 40  # the boxes cover some
