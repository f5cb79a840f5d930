"""For whatever they are given, the loss, the crops and wrap give finite results or an error of ours; nothing else.

2,000 examples in all; `make soak` draws ten times as many (HYPOTHESIS_EXAMPLES=20000).
"""

import inspect
import io
import linecache
import math
import os
import warnings

import hosts
import pytest
import torch
from adapter_contract import views
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from logo_plugin import Affinity, LoGoLoss, MultiCropCollate, MultiCropTransform, crop_overlap, diagnose, info_nce, wrap

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "2000"))


def examples(share):
    """A share of them all; reproducible, and without a clock, since the machine may be busy."""
    return settings(
        max_examples=max(1, int(EXAMPLES * share)),
        deadline=None,
        derandomize=EXAMPLES <= 2000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def result_or_our_error(call):
    """What the call gives; None where it raised an error that a `raise` in this package made."""
    try:
        return call()
    except (ValueError, TypeError, RuntimeError) as error:
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        code = trace.tb_frame.f_code
        if "logo_plugin" not in code.co_filename.replace("adapters", "logo_plugin"):
            raise
        if not linecache.getline(code.co_filename, trace.tb_lineno).strip().startswith("raise "):
            raise
        return None


numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-3, 3), st.booleans(), st.none(), st.just("a")
)
weights = st.one_of(st.floats(0, 10), numbers)
LOSS_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "local_weight": weights,
        "gradient_ratio": st.one_of(st.none(), weights),
        "local_global_weight": weights,
        "positive_noise": weights,
        "affinity_loss": st.sampled_from(["logistic", "difference", "hinge", None]),
        "repulsion": st.sampled_from(["softplus", "logit", 3]),
        "reduction": st.sampled_from(["pairs", "sum", "mean"]),
        "average_targets": st.sampled_from([True, False, 1]),
        "similarity": st.sampled_from(["cosine", info_nce, "dot"]),
        "affinity": st.sampled_from([None, 8, "affinity", "cosine", nn.Linear(4, 1)]),
    },
)


@examples(0.2)
@given(LOSS_OPTIONS)
def test_options_of_the_loss(options):
    result_or_our_error(lambda: LoGoLoss(**options))


words = st.sampled_from(["projection_head", "backbone", "forward", "criterion", "nothing", "auto"])
anything = st.one_of(numbers, words, st.sampled_from([nn.Linear(4, 1), len, [], nn.Identity]))
WRAP_OPTIONS = [*inspect.signature(wrap).parameters][1:-1]


@examples(0.05)
@given(st.dictionaries(st.sampled_from(WRAP_OPTIONS), anything, max_size=3))
def test_options_of_wrap(options):
    """What wrap accepts trains, or its first step refuses it."""
    model = result_or_our_error(lambda: wrap(hosts.BYOL(), **options))
    if model is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = result_or_our_error(lambda: model.training_step([views(), None], 0))
    assert loss is None or loss.isfinite()


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
GOOD_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "local_weight": st.floats(0, 10),
        "local_global_weight": st.floats(0, 10),
        "positive_noise": st.floats(0, 3),
        "affinity_loss": st.sampled_from(["logistic", "difference"]),
        "repulsion": st.sampled_from(["softplus", "logit"]),
        "reduction": st.sampled_from(["pairs", "sum"]),
        "average_targets": st.booleans(),
        "similarity": st.sampled_from(["cosine", info_nce]),
    },
)


@examples(0.4)
@given(
    options=GOOD_OPTIONS,
    shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4)), min_size=4, max_size=4),
    alike=st.booleans(),
    affinity=st.sampled_from(["none", "batch", "layer", "half"]),
    ratio=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e4]),
    overlap=st.sampled_from([None, 0.0, 0.5, 1.0, 1.5, math.nan]),
    seed=st.integers(0, 1000),
)
def test_terms_are_finite_or_an_error_is_ours(options, shapes, alike, affinity, ratio, dtype, scale, overlap, seed):
    """Any shapes, of any precision, with zeros and with values from the smallest to the largest that make sense."""
    torch.manual_seed(seed)
    if alike:  # most shapes that are drawn apart do not fit
        (_, n, d), locals_ = shapes[0], shapes[1][0]
        shapes = [(2, n, d), (2, n, d), (locals_, n, d), (locals_, n, d)]
    g, t, p, z = [(scale * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]
    scorer = None
    if affinity != "none":
        scorer = Affinity(max(1, shapes[3][2]), 4, norm="batch" if affinity == "half" else affinity)
        scorer = scorer.to(torch.bfloat16) if affinity == "half" else scorer
    arguments = {"global_pred": g, "global_target": t, "local_pred": p, "local_proj": z}
    if overlap is not None:
        arguments["local_overlap"] = torch.full((len(z) * (len(z) - 1) // 2, shapes[3][1]), overlap)
    if ratio:
        options = options | {"local_weight": None, "gradient_ratio": 0.1}
        arguments |= {"local_pred": p, "local_proj": p if shapes[2] == shapes[3] else z}
    terms = result_or_our_error(lambda: LoGoLoss(affinity=scorer, **options)(**arguments))
    if terms is None:
        return
    assert all(term.isfinite() and term.ndim == 0 for term in terms), terms
    terms.total.backward()
    for tensor in (g, p, z, *(() if scorer is None else scorer.parameters())):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    if scorer is not None:
        assert all(buffer.isfinite().all() for buffer in scorer.buffers())
        if len(z) and shapes[3][1] > 1:
            found = diagnose(z.detach(), scorer)
            assert all(math.isfinite(value) for value in found.values()), found


CROP_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "global_crops": st.one_of(st.integers(-1, 3), numbers),
        "local_crops": st.one_of(st.integers(-1, 3), numbers),
        "global_size": st.one_of(st.integers(0, 24), numbers),
        "local_size": st.one_of(st.integers(0, 24), numbers),
        "global_scale": st.one_of(st.tuples(st.floats(0, 1), st.floats(0, 1)), numbers),
        "local_scale": st.one_of(st.tuples(st.floats(0, 1), st.floats(0, 1)), numbers),
        "ratio": st.one_of(st.tuples(st.floats(0.1, 4), st.floats(0.1, 4)), st.tuples(numbers, numbers), numbers),
        "flip_p": st.one_of(st.floats(0, 1), numbers),
        "jitter_p": st.one_of(st.floats(0, 1), numbers),
        "brightness": st.one_of(st.floats(0, 3), numbers),
        "contrast": st.one_of(st.floats(0, 3), numbers),
        "saturation": st.one_of(st.floats(0, 3), numbers),
        "hue": st.one_of(st.floats(0, 0.5), numbers),
        "grayscale_p": st.one_of(st.floats(0, 1), numbers),
        "blur_p": st.one_of(st.floats(0, 1), numbers),
        "blur_sigma": st.one_of(st.tuples(st.floats(0.01, 3), st.floats(0.01, 3)), numbers),
        "solarize_p": st.one_of(st.floats(0, 1), numbers),
        "mean": st.one_of(st.tuples(*[st.floats(0, 1)] * 3), st.tuples(numbers, numbers)),
        "std": st.one_of(st.tuples(*[st.floats(0.01, 1)] * 3), st.tuples(numbers, numbers, numbers)),
        "local_placement": st.sampled_from(["anywhere", "inside", "apart", "outside", 1]),
        "defer": st.sampled_from([None, "normalize", "augment", "gpu"]),
        "on_error": st.sampled_from(["raise", "skip", 0]),
        "return_boxes": st.sampled_from([True, False, 2]),
        "size": st.just(3),
    },
)
SMALL = {"global_size": 12, "local_size": 8, "blur_sigma": (0.1, 1.0)}


@examples(0.15)
@given(CROP_OPTIONS)
def test_options_of_the_crops(options):
    collate = result_or_our_error(lambda: MultiCropCollate(**(SMALL | options)))
    if collate is None:
        return
    torch.manual_seed(0)
    views = collate([torch.randint(256, (3, 9, 14), dtype=torch.uint8)])[0]
    for view in views if collate.defer is None else views.to("cpu"):
        assert view.isfinite().all()


def encoded(kind, mode, size):
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(buffer, kind)
    return buffer.getvalue()


FILES = [
    encoded(kind, mode, size)
    for kind, modes in {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "RGBA", "P", "1"), "WebP": ("RGB",)}.items()
    for mode in modes
    for size in ((17, 11), (1, 5))
]


@st.composite
def damaged(draw):
    """A file cut short and with bytes that changed."""
    content = bytearray(draw(st.sampled_from(FILES)))
    del content[draw(st.integers(0, len(content))) :]
    for _ in range(draw(st.integers(0, 3)) if content else 0):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


sides = st.integers(1, 40)
images = st.one_of(
    damaged(),
    st.binary(max_size=40),
    st.sampled_from(FILES),
    st.builds(
        torch.zeros, st.lists(st.integers(0, 5), max_size=4), dtype=st.sampled_from([torch.uint8, torch.float32])
    ),
    st.builds(Image.new, st.sampled_from(["RGB", "L", "RGBA", "I;16", "F", "LAB"]), st.tuples(sides, sides)),
    st.sampled_from([None, 3, "no such file", [1]]),
)


@examples(0.15)
@given(st.lists(images, max_size=3), st.sampled_from(["raise", "skip"]), st.integers(0, 100))
def test_views_are_finite_or_an_error_is_ours(samples, on_error, seed):
    torch.manual_seed(seed)
    collate = MultiCropCollate(**SMALL, on_error=on_error, return_boxes=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = result_or_our_error(lambda: collate([(image, i) for i, image in enumerate(samples)]))
    if batch is None:
        return
    views, targets, crops = batch
    assert [tuple(view.shape) for view in views] == [(len(samples), 3, side, side) for side in (12, 12, 8, 8)]
    assert all(view.isfinite().all() for view in views)
    assert len(targets) == len(samples)
    overlap = crop_overlap(crops.boxes)
    assert ((overlap >= 0) & (overlap <= 1)).all()


@examples(0.05)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 10**6))
def test_boxes_lie_in_the_image(width, height, seed):
    torch.manual_seed(seed)
    for recipe in MultiCropTransform().draw(width, height):
        left, top, right, bottom = recipe.box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_the_shares_are_whole():
    assert pytest.approx(1) == 0.2 + 0.05 + 0.4 + 0.15 + 0.15 + 0.05
