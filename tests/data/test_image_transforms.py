"""Decoding, resizing and augmentation in tf.data: against Pillow and torchvision's definitions."""

import io
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import stats

from mpt_jax.data import image_transforms
from mpt_jax.data.dataset_iterator import plain_message
from mpt_jax.data.image_transforms import Augmentation, ImageTransform
from tests.fixtures.image_files import encoded, noise, photo

SIZES = [
    *((375, 500), (500, 375), (333, 500), (50, 80), (32, 32), (1, 1), (1, 9), (300, 1)),
    *(
        (224, 300),
        (224, 224),
        (256, 256),
        (225, 223),
        (1000, 1500),
        (2000, 333),
        (7, 5),
        (448, 448),
    ),
    *((447, 449), (225, 448), (448, 225)),
]
TRANSFORMS = [
    ImageTransform(224),
    ImageTransform(224, resize_to=256),
    ImageTransform(224, "squash"),
    ImageTransform(33),
]
ANY_IMAGE = tf.TensorSpec([None, None, 3], tf.uint8)


def compiled(function):
    return tf.function(function, input_signature=[ANY_IMAGE], autograph=False)


def resized_by_pillow(image, height, width):
    """Pillow's bicubic filter: the width first. Pillow 13 may choose another order."""
    bicubic = Image.Resampling.BICUBIC
    narrow = Image.fromarray(image).resize((width, image.shape[0]), bicubic)
    return np.asarray(narrow.resize((width, height), bicubic)).astype(int)


def expected(transform, image, resize=resized_by_pillow):
    """torchvision's Resize and CenterCrop, in Python's arithmetic."""
    height, width = image.shape[:2]
    size = transform.size
    if transform.mode == "squash":
        return resize(image, size, size)
    edge = transform.resize_to or size
    if height <= width:
        height, width = edge, int(edge * width / height)
    else:
        height, width = int(edge * height / width), edge
    top, left = int(round((height - size) / 2)), int(round((width - size) / 2))
    return resize(image, height, width)[top : top + size, left : left + size]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_resizing_equals_pillow(transform):
    """At most 2 of 255 levels and a mean of 0.025. The mean is 0.021 for a photo of 256 x 256 that
    is reduced to 224, where many values are exact halves before rounding; else below 0.006."""
    run = compiled(transform)
    for height, width in SIZES:
        for make in (noise, photo):
            image = make(height, width)
            ours = run(image).numpy()
            assert ours.dtype == np.uint8
            difference = np.abs(ours - expected(transform, image))
            where = (make.__name__, height, width)
            assert difference.max() <= 2, where
            assert difference.mean() <= (0.025 if image.shape[:2] == (256, 256) else 0.006), where


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_photos_equal_those_of_any_pillow_within_tolerance(transform):
    """At most 2 of 255 levels and a mean of 0.3, whatever order Pillow resizes in."""

    def resize(image, height, width):
        bicubic = Image.Resampling.BICUBIC
        return np.asarray(Image.fromarray(image).resize((width, height), bicubic)).astype(int)

    run = compiled(transform)
    for height, width in SIZES:
        image = photo(height, width)
        difference = np.abs(run(image).numpy() - expected(transform, image, resize))
        assert difference.max() <= 2 and difference.mean() <= 0.3, (height, width)


@pytest.mark.parametrize("resize_to", [None, 33])
def test_image_of_final_size_is_returned_unchanged(resize_to):
    transform = ImageTransform(33, resize_to=resize_to)
    image = noise(transform.size, transform.size)
    np.testing.assert_array_equal(compiled(transform)(image), image)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2**16), (2**16, 1)])
@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_smallest_and_longest_images_are_resized(shape, mode):
    image = np.full((*shape, 3), 90, np.uint8)
    found = ImageTransform(224, mode)(tf.constant(image)).numpy()
    assert found.shape == (224, 224, 3) and (found == 90).all()


def test_settings_are_checked_and_recorded():
    for arguments, message in [
        ({"size": 0}, "ImageTransform.size must be between 1 and 4096, got 0. Set it to the"),
        ({"size": 5000}, "must be between 1 and 4096, got 5000"),
        ({"size": 8, "mode": "pad"}, "mode must be 'crop' or 'squash', got 'pad'. Correct"),
        ({"size": 8, "mode": "squash", "resize_to": 9}, "resize_to = 9 would have no effect"),
        ({"size": 8, "resize_to": 7}, "resize_to is 7, less than the size of the crop, 8. Set"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageTransform(**arguments)
    for arguments, message in [
        ({"size": -1}, "Augmentation.size must be between 1 and 4096, got -1"),
        (
            {"area": (0.0, 1.0)},
            r"area must be two ascending numbers above 0 and at most 1, got \(0",
        ),
        ({"area": (0.5, 1.5)}, "Augmentation.area must be"),
        ({"area": (float("nan"), 1.0)}, "Augmentation.area must be"),
        ({"ratio": (2.0, 1.0)}, r"above 0 and at most 100, got \(2.0, 1.0\)"),
        ({"ratio": (1.0, float("inf"))}, "Augmentation.ratio must be"),
        ({"flip": 1.5}, "flip must be between 0 and 1, got 1.5. Correct the binding"),
    ]:
        with pytest.raises(ValueError, match=message):
            Augmentation(**{"size": 8, **arguments})
    config = ImageTransform(224, resize_to=256).config()
    assert config == {"kind": "transform", "size": 224, "mode": "crop", "resize_to": 256}
    config = Augmentation(8, ratio=(0.5, 2.0)).config()
    assert config == {
        "kind": "augmentation", "size": 8, "area": [0.08, 1.0], "ratio": [0.5, 2.0], "flip": 0.5
    }  # fmt: skip
    assert json.loads(json.dumps(config)) == config


# --- Decoding --------------------------------------------------------------------------------


def test_decoded_and_transformed_file_equals_pillow():
    contents = [encoded(photo(h, w, h), "JPEG") for h, w in ((60, 80), (90, 70), (24, 31))]
    transform = ImageTransform(24)

    def load(content, name):
        return transform(image_transforms.decode(content, name))

    dataset = tf.data.Dataset.from_tensor_slices((contents, ["a", "b", "c"])).map(load)
    assert dataset.element_spec.shape == (24, 24, 3)
    for content, ours in zip(contents, dataset.as_numpy_iterator(), strict=True):
        image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.abs(ours - expected(transform, image)).max() <= 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(photo(60, 80), "JPEG")[:-300], "its JPEG data is truncated or damaged. Replace"),
        (b"<html>", "it starts with the bytes 3c 68 74 6d, so it is not a JPEG, PNG, GIF or BMP"),
        (b"", "it is empty, so it is not"),
    ],
)
def test_bad_file_names_the_example_in_a_dataset(content, reason):
    good = encoded(noise(4, 4), "PNG")
    names = ["row 16 of pets (cat_2.jpg)", "row 17 of pets (cat_3.jpg)"]
    dataset = tf.data.Dataset.from_tensor_slices(([good, content], names))
    iterator = dataset.map(image_transforms.decode).as_numpy_iterator()
    np.testing.assert_array_equal(next(iterator), noise(4, 4))
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        next(iterator)
    message = plain_message(raised.value)
    start = f"The image of row 17 of pets (cat_3.jpg) cannot be used: {reason}"
    assert message.startswith(start)
    assert message.endswith("Replace the image, or remove the example from the data.")


def test_position_of_stream_with_decoding_and_augmentation_is_saved(tmp_path):
    contents = [encoded(noise(9, 9, i), "PNG") for i in range(5)]
    augment = Augmentation(6)

    def load(number, content):
        return augment(image_transforms.decode(content, "x"), 1, 0, number)

    dataset = tf.data.Dataset.from_tensor_slices((tf.range(5), contents)).repeat().map(load)
    iterator = iter(dataset)
    for _ in range(3):
        next(iterator)
    checkpoint = tf.train.Checkpoint(iterator=iterator)
    path = checkpoint.write(str(tmp_path / "position"))
    rest = [next(iterator).numpy() for _ in range(4)]
    checkpoint.read(path)
    np.testing.assert_array_equal([next(iterator).numpy() for _ in range(4)], rest)


# --- Augmentation ----------------------------------------------------------------------------


def draws(augmentation, height, width, ids, seed=0, epoch=0):
    """Crops and flips of many examples: top, left, height, width, flip, each [n]."""

    def draw(number):
        return augmentation.draw(height, width, seed, epoch, number)

    dataset = tf.data.Dataset.from_tensor_slices(np.asarray(ids, np.uint32)).map(draw)
    return [np.concatenate(x) for x in zip(*dataset.batch(512).as_numpy_iterator(), strict=True)]


def reference_draws(height, width, count, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's documented procedure, with NumPy's generator."""
    random = np.random.default_rng(0)
    crops = []
    for _ in range(count):
        for _ in range(10):
            target = height * width * random.uniform(*area)
            aspect = np.exp(random.uniform(*np.log(ratio)))
            w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                crops.append(
                    (random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w)
                )
                break
        else:
            w, h = width, height
            if width / height < ratio[0]:
                h = round(width / ratio[0])
            elif width / height > ratio[1]:
                w = round(height * ratio[1])
            crops.append(((height - h) // 2, (width - w) // 2, h, w))
    return np.array(crops).T


@pytest.mark.parametrize(("height", "width"), [(375, 500), (200, 620)])
def test_crops_are_distributed_as_defined(height, width):
    """Kolmogorov-Smirnov distance of 4,000 crops to the reference: 0.043 is p = 0.001."""
    ours = draws(Augmentation(224), height, width, range(4000))
    theirs = reference_draws(height, width, 4000)
    top, left, tall, wide, flips = ours
    assert np.all((top >= 0) & (left >= 0) & (top + tall <= height) & (left + wide <= width))
    pairs = {
        "area": (tall * wide, theirs[2] * theirs[3]),
        "ratio": (wide / tall, theirs[3] / theirs[2]),
        "top": (top, theirs[0]),
        "left": (left, theirs[1]),
    }
    for name, (a, b) in pairs.items():
        assert stats.ks_2samp(a, b).statistic < 0.043, name
    assert abs(np.mean(flips) - 0.5) < 0.026  # 3.3 standard deviations
    assert abs(np.corrcoef(flips, tall * wide)[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (1, 1, (0, 0, 1, 1))],
)
def test_fallback_is_largest_central_crop(height, width, box):
    """Only areas above any crop that fits are drawn, except for 1 x 1, which always fits."""
    crops = draws(Augmentation(8, area=(0.99, 1.0)), height, width, range(20))[:4]
    np.testing.assert_array_equal(np.array(crops).T, [box] * 20)


def test_draws_depend_on_seed_epoch_and_example_only():
    augmentation = Augmentation(16)
    ids = [0, 1, 7, 2**31, 2**32 - 1, 7]
    first = np.array(draws(augmentation, 300, 400, ids))
    np.testing.assert_array_equal(first[:, 2], first[:, 5])
    np.testing.assert_array_equal(
        np.array(draws(augmentation, 300, 400, ids[::-1])), first[:, ::-1]
    )
    others = [
        draws(augmentation, 300, 400, ids, seed=1),
        draws(augmentation, 300, 400, ids, epoch=1),
        draws(augmentation, 300, 400, ids, seed=-1, epoch=2**31 - 1),
    ]
    crops = {tuple(column[:4]) for x in (first, *map(np.array, others)) for column in x.T}
    assert len(crops) == 4 * 5


def test_draws_are_those_of_an_earlier_version():
    """Written once by this code: runs must be resumed with the same crops."""
    crops = np.array(draws(Augmentation(224), 375, 500, [0, 1, 123456789], seed=5, epoch=3)).T
    assert crops.tolist() == [
        [3, 17, 363, 432, 1],
        [49, 101, 218, 281, 0],
        [104, 69, 213, 208, 0],
    ]


def test_pixels_are_independent_of_order_and_parallelism():
    images = np.stack([photo(40, 60, i) for i in range(12)])
    augmentation = Augmentation(16)

    def run(order, parallel):
        dataset = tf.data.Dataset.from_tensor_slices((images[order], np.uint32(order)))
        dataset = dataset.map(
            lambda x, i: (i, augmentation(x, 3, 2, i)), num_parallel_calls=parallel
        )
        return {int(i): x.tobytes() for i, x in dataset.as_numpy_iterator()}

    order = np.random.default_rng(0).permutation(12)
    assert run(np.arange(12), None) == run(order, 4)


def test_augmented_pixels_equal_pillow():
    image = photo(90, 120)
    augmentation = Augmentation(32)
    boxes = np.array(draws(augmentation, 90, 120, range(24), seed=4, epoch=2)).T
    run = tf.function(lambda x, i: augmentation(x, 4, 2, i), autograph=False)
    assert {*boxes[:, 4]} == {0, 1}
    for number, (top, left, tall, wide, flips) in enumerate(boxes):
        crop = resized_by_pillow(image[top : top + tall, left : left + wide], 32, 32)
        crop = crop[:, ::-1] if flips else crop
        ours = run(image, tf.constant(number, tf.uint32))
        assert ours.shape == (32, 32, 3) and ours.dtype == tf.uint8
        assert np.abs(ours.numpy() - crop).max() <= 1


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_can_be_turned_off_or_always_on(flip):
    flips = draws(Augmentation(8, flip=flip), 30, 30, range(50))[4]
    assert flips.mean() == flip
