"""Every augmentation against torchvision v2, and what is drawn against torchvision's distributions."""

import itertools
import math

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from photos import tiles
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from logo_plugin import MultiCropTransform
from logo_plugin.augment import Recipe, augment, table

JITTER = {
    "brightness": reference.adjust_brightness,
    "contrast": reference.adjust_contrast,
    "saturation": reference.adjust_saturation,
    "hue": reference.adjust_hue,
}
FACTORS = {"brightness": 1.37, "contrast": 1.31, "saturation": 0.62, "hue": -0.083}


def recipe(**values):
    return Recipe(box=(0, 0, 1, 1), **values)


def photographs(count=3, size=48):
    return torch.stack([pil_to_tensor(image) for image, _ in tiles(count, size)])


@pytest.fixture
def images():
    """Photographs, noise and every kind of tie between channels, as (B, 3, H, W) in [0, 255]."""
    levels = torch.tensor([0.0, 1.0, 77.0, 254.0, 255.0])
    ties = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 5, 25)
    ties = ties.repeat(1, 10, 2)[:, :48, :48]
    noise = 255 * torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return torch.cat([photographs().float(), noise, ties[None]])


def one_by_one(images, made):
    """What v2 gives, image by image, in the range [0, 255]."""
    return torch.stack([255 * made(image / 255) for image in images])


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n in ("brightness", "contrast", "saturation") for v in (0.0, 0.6, 0.97, 1.4, 3.0)]
    + [("hue", v) for v in (-0.5, -0.3, -0.1, -1e-3, 0.05, 0.1, 0.25, 0.5)],
)
def test_jitter_is_exact(images, name, value):
    expected = one_by_one(images, lambda image: JITTER[name](image, value))
    actual = augment(images, [recipe(**{name: value})] * len(images))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_follows_its_order(images, order):
    def made(image):
        for operation in order:
            name = list(JITTER)[operation]
            image = JITTER[name](image, FACTORS[name])
        return image

    actual = augment(images, [recipe(**FACTORS, order=order)] * len(images))
    torch.testing.assert_close(actual, one_by_one(images, made), rtol=0, atol=5e-3)


def test_grayscale_and_solarisation_are_exact(images):
    gray = augment(images, [recipe(gray=True)] * len(images))
    assert gray.shape == images.shape
    torch.testing.assert_close(gray, reference.rgb_to_grayscale(images, 3), rtol=0, atol=1e-3)
    solarized = augment(images, [recipe(solarize=True)] * len(images))
    torch.testing.assert_close(solarized, torch.where(images >= 128, 255 - images, images), rtol=0, atol=0)
    uint8 = images.to(torch.uint8)
    assert (augment(uint8, [recipe(solarize=True)] * len(images)) == reference.solarize(uint8, 128)).all()


@pytest.mark.parametrize("sigma", [0.1, 0.16, 0.3, 0.5, 0.77, 1.0, 1.27, 1.6, 1.9, 2.0])
def test_blur_is_within_half_a_level(images, sigma):
    step = 255 * (torch.arange(48) >= 24).float().expand(1, 3, 48, 48)
    corner = step * step.transpose(2, 3) / 255
    images = torch.cat([images, step, corner])
    expected = reference.gaussian_blur(images, [45, 45], [sigma, sigma])
    actual = augment(images, [recipe(sigma=sigma)] * len(images))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.5)


def test_the_stages_run_in_order(images):
    def made(image):
        image = reference.rgb_to_grayscale(reference.adjust_hue(image, 0.1), 3)
        image = reference.gaussian_blur(image, [45, 45], [1.0, 1.0])
        return torch.where(255 * image >= 128, 1 - image, image)

    images = images[:3]
    actual = augment(images, [recipe(hue=0.1, gray=True, sigma=1.0, solarize=True)] * 3)
    difference = (actual - one_by_one(images, made)).abs()
    assert (difference > 0.5).float().mean() < 2e-3  # pixels within the blur's tolerance of the threshold


def test_each_image_follows_its_own_recipe(images):
    """The batched path, which is the device's, against one image at a time, which is the workers'."""
    recipes = [
        recipe(),
        recipe(**FACTORS, order=(3, 1, 0, 2), sigma=0.4),
        recipe(brightness=0.7, hue=0.2, order=(2, 3, 1, 0), gray=True, sigma=1.9),
        recipe(contrast=1.4, saturation=1.2, order=(3, 1, 0, 2)),
        recipe(gray=True, solarize=True),
        recipe(sigma=0.12, solarize=True),
    ]
    before = images.clone()
    batched = augment(images, recipes)
    single = torch.cat([augment(images[i : i + 1], [recipes[i]]) for i in range(len(images))])
    torch.testing.assert_close(batched, single, rtol=0, atol=1e-3)
    torch.testing.assert_close(batched[0], images[0], rtol=0, atol=0)
    assert (images == before).all()
    assert not any(torch.allclose(batched[i], images[i], atol=0.5) for i in (1, 2, 3, 4, 5))
    # As they travel from the workers.
    drawn = table(recipes)
    assert torch.equal(augment(images, drawn), batched)
    assert torch.equal(torch.cat([augment(images[i : i + 1], drawn[i : i + 1]) for i in range(len(images))]), single)


@pytest.mark.parametrize("value", [recipe(), recipe(gray=True), recipe(sigma=1.0), recipe(**FACTORS)])
def test_all_images_may_be_alike(images, value):
    single = torch.cat([augment(image[None], [value]) for image in images])
    torch.testing.assert_close(augment(images, [value] * len(images)), single, rtol=0, atol=1e-3)


def ks(first, second):
    """Two-sample Kolmogorov-Smirnov statistic over its 0.1 % critical value: above 1 they differ."""
    first, second = (torch.as_tensor(sample, dtype=torch.float64).sort().values for sample in (first, second))
    points = torch.cat([first, second])
    below = [torch.searchsorted(s, points, right=True) / len(s) for s in (first, second)]
    return ((below[0] - below[1]).abs().max() / (1.95 * math.sqrt(1 / len(first) + 1 / len(second)))).item()


@pytest.mark.parametrize("size", [(500, 375), (64, 200), (32, 32)])
@pytest.mark.parametrize(("view", "scale"), [(0, (0.4, 1.0)), (1, (0.05, 0.4))])
def test_boxes_are_distributed_as_torchvisions(size, view, scale):
    torch.manual_seed(0)
    width, height = size
    transform = MultiCropTransform(global_crops=1, local_crops=1)
    boxes = torch.tensor([transform.draw(width, height)[view].box for _ in range(3000)])
    image = torch.empty(3, height, width)
    drawn = [transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)]
    top, left, h, w = torch.tensor(drawn).T
    expected = torch.stack([left, top, left + w, top + h], dim=1)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()

    def features(b):
        w, h = b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]
        across, down = b[:, 0] / (width - w + 1), b[:, 1] / (height - h + 1)
        joint = {"diagonal": across - down, "left and area": across - w * h / (width * height)}
        return {"left": b[:, 0], "top": b[:, 1], "right": b[:, 2], "area": w * h, "ratio": w / h, **joint}

    for name, values in features(boxes).items():
        assert ks(values, features(expected)[name]) < 1, name


def test_jitter_is_distributed_as_torchvisions():
    torch.manual_seed(0)
    transform = MultiCropTransform(local_crops=0, jitter_p=1.0, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    drawn = [r for _ in range(2000) for r in transform.draw(10, 10)]
    jitter = transforms.ColorJitter(0.4, 0.3, 0.2, 0.1)
    expected = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(4000)
    ]
    for k, name in enumerate(JITTER, 1):
        assert ks([getattr(r, name) for r in drawn], [e[k] for e in expected]) < 1, name
    for orders in ([r.order for r in drawn], [tuple(e[0].tolist()) for e in expected]):
        counts = torch.tensor([orders.count(p) for p in itertools.permutations(range(4))])
        chi2 = ((counts - 4000 / 24) ** 2 / (4000 / 24)).sum()
        assert counts.sum() == 4000
        assert chi2 < 49.7  # 0.1 % of 23 degrees of freedom


def test_strong_jitter_stops_at_zero():
    transform = MultiCropTransform(jitter_p=1.0, brightness=3.0)
    drawn = [r.brightness for _ in range(200) for r in transform.draw(10, 10)]
    assert 0 <= min(drawn) < 0.2
    assert 3.7 < max(drawn) <= 4


def test_probabilities_and_sigma_are_as_asked_and_independent():
    torch.manual_seed(0)
    asked = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "sigma": 0.5, "solarize": 0.3}
    transform = MultiCropTransform(local_crops=1, solarize_p=0.3)
    drawn = [r for _ in range(2000) for r in transform.draw(100, 100)]
    n = len(drawn)
    happened = torch.tensor(
        [[r.flip, r.brightness != 1, r.gray, r.sigma > 0, r.solarize] for r in drawn], dtype=torch.float64
    )
    for k, (name, p) in enumerate(asked.items()):
        assert abs(happened[:, k].mean() - p) < 4 * math.sqrt(p * (1 - p) / n), name
    sigmas = [r.sigma for r in drawn if r.sigma]
    assert ks(sigmas, 0.1 + 1.9 * torch.arange(0.5, 100000) / 100000) < 1
    # Independent of each other: happenings, factors, places in the order, box.
    groups = [
        happened[:, [0, 2, 3, 4]],
        torch.tensor([[r.brightness, r.contrast, r.saturation, r.hue] for r in drawn], dtype=torch.float64),
        torch.tensor([[r.order.index(k) for k in range(4)] for r in drawn], dtype=torch.float64),
        torch.tensor([r.box for r in drawn], dtype=torch.float64),
    ]
    jittered = happened[:, 1] > 0
    correlation = torch.corrcoef(torch.cat(groups, dim=1)[jittered].T)
    correlation.fill_diagonal_(0)
    correlation[8:12, 8:12] = correlation[12:, 12:] = 0  # places exclude each other, corners of a box follow each other
    assert correlation.abs().max() < 4.5 / math.sqrt(jittered.sum())


def test_probability_one_and_zero():
    for p in (0.0, 1.0):
        options = dict.fromkeys(("flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p"), p)
        for r in MultiCropTransform(**options).draw(50, 50):
            assert (r.flip, r.gray, r.solarize) == (bool(p),) * 3
            assert (r.sigma > 0, r.hue != 0) == (bool(p),) * 2
