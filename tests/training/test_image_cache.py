"""Cached image features against images that are encoded in every step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.data.image_transforms import ImageTransform
from mpt_jax.data.iterators import fill
from mpt_jax.prompts.init import Uniform
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import SitePrompts
from mpt_jax.training import trainer
from mpt_jax.training.image_cache import ImageCache
from mpt_jax.training.optimizers import PromptOptimizer, sgd
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.schedules import Schedule
from mpt_jax.training.state import create_train_state
from tests.fixtures import clip_models, image_files, tiny, tiny_clip

KEY = jax.random.PRNGKey(0)
ROOM = 10**9
CONFIG = clip_models.shallow()
WIDTH = 10  # of a feature, in `clip_models.tiny`
BYTES = 4 * WIDTH
COOP = SitePrompts(PromptTuning(tiny_clip.CONTEXT, Uniform(0.5)))
APART = Runs(["pets", "shapes", "pets"], ["pets_s1", "shapes_s1", "pets_s2"], "independent")
# Not Adam, which enlarges rounding of small gradients.
RECIPE = PromptOptimizer(
    {label: Schedule(0.1, decay="constant") for label in ("shared", "task")},
    weight_decay=0.0,
    clip_norm=None,
    rule=functools.partial(sgd, 0.9, 0.0),
)
FULL = "The image cache is full: it holds the features of "


def made(prompt=COOP, **settings):
    return tiny_clip.model(prompt, **{"config": CONFIG, "optimizer_def": RECIPE, **settings})


def batch_of(images, rows=(0, 1, 0, 1), labels=(0, 1, 2, 0)):
    """A batch of images with these numbers; equal numbers are equal images."""
    batch = tiny_clip.batch(list(rows), list(labels))
    pixels = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in images]
    return {name: np.array(value) for name, value in {**batch, "image": np.stack(pixels)}.items()}


def started(model, settings=None, parts=1, partitioner=None):
    partitioner = partitioner or PjitPartitioner()
    state = create_train_state(model, jax.tree.map(jnp.array, tiny_clip.params(model)), partitioner)
    return trainer.Trainer(model, state, partitioner, KEY, parts, image_cache=settings)


def opened(settings, model=None):
    """Returns an empty cache, and a function that adds its features to a batch of some images."""
    one = started(model or made(), settings)
    cache = one._images
    assert cache is not None

    def add(images):
        with one.partitioner.activate():
            return cache.add(
                one.state.frozen, batch_of(images, [0] * len(images), [0] * len(images))
            )

    return cache, add


def calls(cache, monkeypatch) -> list[int]:
    """Records the number of images of every call of the encoder from now on."""
    sizes, encode = [], cache._encode

    def counted(frozen, images):
        sizes.append(len(images))
        return encode(frozen, images)

    monkeypatch.setattr(cache, "_encode", counted)
    return sizes


def features(add, images) -> list[bytes]:
    return [row.tobytes() for row in add(images)["image_features"]]


# --- Training ------------------------------------------------------------------------------------

EPOCH = ([0, 1, 2, 3], [4, 5, 0, 6], [1, 1, 4, 7])


@pytest.mark.parametrize(
    ("settings", "parts", "runs"),
    [
        (ImageCache(ROOM), 1, tiny_clip.RUNS),
        pytest.param(ImageCache(3 * BYTES, chunk=3), 2, APART, marks=pytest.mark.slow),
    ],
    ids=["all fit", "three fit"],
)
def test_image_cache_trains_and_evaluates_as_without(settings, parts, runs):
    """Losses, prompts and metrics over two epochs, to 1e-6."""
    model = made(runs=runs)
    plain, cached = started(model, None, parts), started(model, settings, parts)
    before = jax.tree.map(np.asarray, plain.state.trainable["prompt"])
    for images in EPOCH * 2:
        found = []
        for one in (plain, cached):
            one.train(batch_of(images))
            metrics = one.read_metrics()
            found.append({k: v for k, v in metrics.items() if not k.startswith("image_cache/")})
        tiny.close(found[1], found[0], 1e-6, "metrics: ")
    prompts = [one.state.trainable["prompt"] for one in (plain, cached)]
    tiny.close(prompts[1], prompts[0], 1e-6, "prompts: ")
    moved = [
        np.abs(a - b) for a, b in zip(*map(jax.tree.leaves, (prompts[1], before)), strict=True)
    ]
    assert max(x.max() for x in moved) > 0.01, "the prompts were trained"
    batches = [batch_of(images) for images in ([8, 9, 0, 1], [2, 2, 3, 10])]
    expected, evaluated = (one.evaluate(batches) for one in (plain, cached))
    assert expected["loss"] > 0
    tiny.close(evaluated, expected, 1e-6, "evaluation: ")


def test_image_cache_metrics_count_images_and_bytes():
    one = started(made(), ImageCache(ROOM))
    for images in EPOCH:
        one.train(batch_of(images))
    metrics = one.read_metrics()
    assert metrics["image_cache/images"] == 8
    assert metrics["image_cache/gigabytes"] == pytest.approx(8 * BYTES / 1e9)
    one.evaluate([batch_of([0, 8, 9, 9])])
    one.train(batch_of(EPOCH[0]))
    assert one.read_metrics()["image_cache/images"] == 10


def test_image_cache_batch_has_features_instead_of_images():
    model = made()
    _, add = opened(ImageCache(ROOM, chunk=4), model)
    images = [0, 1, 0, 2, 3]
    batch = add(images)
    whole = batch_of(images, [0] * 5, [0] * 5)
    assert sorted(batch) == sorted({*whole, "image_features"} - {"image"})
    expected = jax.jit(model.image_features)(tiny_clip.params(model), whole)
    assert batch["image_features"].dtype == np.float32
    np.testing.assert_allclose(batch["image_features"], expected, 1e-6, 1e-6)
    for name in batch.keys() & whole.keys():
        np.testing.assert_array_equal(batch[name], whole[name])
    with pytest.raises(ValueError, match="features of this model depend on its image tokens"):
        made(BOTH).image_features({}, jax.tree.map(jnp.asarray, batch))


# --- Hits and misses -----------------------------------------------------------------------------


def test_image_cache_known_images_are_not_encoded(monkeypatch):
    cache, add = opened(ImageCache(ROOM, chunk=4))
    sizes = calls(cache, monkeypatch)
    first = features(add, [0, 1, 0, 1])
    assert sizes == [4] and len(cache) == 2 and cache.held_bytes == 2 * BYTES
    assert features(add, [1, 0]) == [first[1], first[0]] and sizes == [4]
    add([0, 1, 2, 3, 4, 5, 6])
    assert sizes == [4, 4, 4] and len(cache) == 7, "five new images in two chunks"
    add([6, 5, 4, 3, 2, 1, 0])
    assert len(sizes) == 3


def test_image_cache_full_keeps_what_it_has(monkeypatch, caplog):
    cache, add = opened(ImageCache(2 * BYTES + 1, chunk=4))
    _, unlimited = opened(ImageCache(ROOM, chunk=4))
    expected = features(unlimited, range(5))
    sizes = calls(cache, monkeypatch)
    with caplog.at_level("WARNING", logger="absl"):
        for _ in range(2):
            assert features(add, range(5)) == expected
    assert len(cache) == 2 and cache.held_bytes == 2 * BYTES
    assert sizes == [4, 4, 4], "five images, and later the three that are not stored"
    assert [x.startswith(f"{FULL}2 images in") for x in caplog.messages] == [True]
    assert "IMAGE_CACHE_BYTES" in caplog.text


def test_image_cache_features_are_independent_of_the_batch():
    """Every bit: a job that resumes sees images in other batches first."""
    expected = features(opened(ImageCache(ROOM, chunk=4))[1], range(9))
    for batches in ([[8], [7, 6], [5, 4, 3], [2, 1, 0]], [[3, 3, 8, 0], [7, 6, 5, 4, 2, 1]]):
        _, add = opened(ImageCache(ROOM, chunk=4))
        for images in batches:
            assert features(add, images) == [expected[i] for i in images]


def test_image_cache_features_do_not_hold_the_chunk():
    cache, add = opened(ImageCache(ROOM))
    add([0, 1])
    assert all(x.base is None and x.nbytes == BYTES for x in cache._held.values())


# --- Encoded files -------------------------------------------------------------------------------


def files_of(images, rows=(0, 1, 0, 1), labels=(0, 1, 2, 0), content=None):
    """The batch of `batch_of` with PNG files of its images."""
    batch = batch_of(images, rows, labels)
    pixels = batch.pop("image")
    files = [content or image_files.encoded(image, "PNG") for image in pixels]
    names = [f"example {image}.png of pets".encode() for image in images]
    encoded = {"image_files": files, "image_names": names}
    return {**batch, **{name: np.array(x, object) for name, x in encoded.items()}}


def of_files(**settings):
    return made(image_transform=ImageTransform(16), **settings)


def test_image_cache_trains_on_files_as_on_their_pixels():
    pixels, files = (started(of_files(), ImageCache(ROOM)) for _ in range(2))
    for images in EPOCH * 2:
        pixels.train(batch_of(images))
        files.train(files_of(images))
        assert files.read_metrics() == pixels.read_metrics()
    tiny.close(files.state.trainable["prompt"], pixels.state.trainable["prompt"], 0.0)
    found = [
        one.evaluate([batch([8, 9, 0, 1])])
        for one, batch in ((files, files_of), (pixels, batch_of))
    ]
    assert found[0] == found[1]


def test_image_cache_files_of_known_images_are_not_decoded(monkeypatch):
    one = started(of_files(), ImageCache(ROOM))
    one.train(files_of([0, 1, 2, 3]))
    monkeypatch.setattr(ImageTransform, "of_file", lambda *_: pytest.fail("decoded again"))
    one.train(files_of([3, 1, 0, 2]))
    assert one.read_metrics()["image_cache/images"] == 4


def test_image_cache_rows_that_fill_a_batch_have_no_file():
    one = started(of_files(), ImageCache(ROOM))
    batch = {name: fill(x, 6) for name, x in files_of([0, 1, 2, 3]).items()}
    expected = one.evaluate([files_of([0, 1, 2, 3])])
    assert batch["image_files"][5] == 0
    tiny.close(one.evaluate([batch]), expected, 1e-6)


def test_image_cache_damaged_file_is_named():
    one = started(of_files(), ImageCache(ROOM))
    message = "The image of example 3.png of pets cannot be used: its PNG data is truncated"
    batch = files_of([0, 1, 2, 3])
    batch["image_files"][3] = batch["image_files"][3][:60]
    with pytest.raises(ValueError, match=message):
        one.train(batch)


def test_trainer_without_cache_refuses_files():
    with pytest.raises(ValueError, match="only the image cache of a training job decodes"):
        started(of_files()).train(files_of([0, 1, 2, 3]))


def test_trainer_lower_with_files_takes_features():
    one = started(of_files(), ImageCache(ROOM))
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in batch_of([0, 1, 2, 3]).items()
        if name != "image"
    }
    lowered = one.lower({**shapes, "image_files": np.array([b""] * 4, object)})
    assert f"4x{WIDTH}xf32" in lowered["train"].as_text()


@pytest.mark.slow
@pytest.mark.devices(2)
def test_image_cache_on_two_devices():
    """The chunk of 3 is rounded up to 4 images, 2 on each device."""
    model = made()
    mesh = PjitPartitioner(num_partitions=1)
    assert mesh.mesh.devices.size == 2
    plain = started(model, None, partitioner=mesh)
    cached = started(
        model, ImageCache(ROOM, chunk=3), partitioner=PjitPartitioner(num_partitions=1)
    )
    for images in EPOCH:
        plain.train(batch_of(images))
        cached.train(batch_of(images))
    expected, found = plain.read_metrics(), cached.read_metrics()
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert found["image_cache/images"] == 8
    tiny.close(cached.state.trainable["prompt"], plain.state.trainable["prompt"], 1e-6)


# --- Lowering ------------------------------------------------------------------------------------


def test_trainer_lower_with_shapes_takes_features():
    """The lowered steps are those of a batch with features: without images or an image encoder."""
    one = started(made(), ImageCache(ROOM))
    batch = batch_of([0, 1, 2, 3])
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    lowered, plain = one.lower(shapes), started(made()).lower(shapes)
    for step in ("train", "eval"):
        assert "ui8" in plain[step].as_text() and "ui8" not in lowered[step].as_text()
        assert f"4x{WIDTH}xf32" in lowered[step].as_text()
    with one.partitioner.activate():
        ready = one.with_image_features(batch)
        totals = lowered["eval"].compile()(
            one.params_for_evaluation(), one.partitioner.shard_batch(ready), one.state.failed
        )
    expected = started(made()).evaluate([batch])["loss"]
    cross_entropy = totals["term/cross_entropy"]
    assert float(np.sum(cross_entropy.sum)) / 4 == pytest.approx(expected, abs=1e-6)
    assert len(one._images or ()) == 4


# --- Jobs that cannot use a cache ----------------------------------------------------------------


class Augmentation:
    def config(self):
        return {"kind": "augmentation"}


BOTH = SitePrompts(PromptTuning(3, Uniform(0.5)), PromptTuning(2, Uniform(0.5)))
VPT = SitePrompts(None, PromptTuning(2, Uniform(0.5)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: made(VPT), "its prompts are inputs of the image encoder"),
        (
            lambda: made(BOTH),
            "inputs of the image encoder",
        ),
        (lambda: made(augmentation=Augmentation()), r"its images are augmented \(AUGMENTATION\)"),
        (
            lambda: made(labels=((r"image_encoder/.*bias", "shared"),)),
            "image_encoder/.*bias is trainable, so the features of an image change",
        ),
    ],
)
def test_image_cache_refuses_features_that_change(model, reason):
    found = model()
    with pytest.raises(ValueError, match=f"cannot use an image cache: .*{reason}") as raised:
        started(found, ImageCache(ROOM))
    assert str(raised.value).endswith("set trainer.Trainer.image_cache to None.")


def test_image_cache_accepts_a_trainable_text_encoder():
    found = made(labels=((r"text_encoder/.*bias", "shared"),))
    assert started(found, ImageCache(ROOM))._images is not None


def test_image_cache_with_a_trainable_scale_trains_as_without():
    found = made(labels=(("logit_scale", "shared"),))
    plain, cached = started(found), started(found, ImageCache(ROOM))
    for one in (plain, cached):
        one.train(batch_of([0, 1, 2, 3]))
    before = float(tiny_clip.params(found)["logit_scale"])
    assert float(cached.state.trainable["logit_scale"]) != before
    tiny.close(cached.state.trainable, plain.state.trainable, 1e-6)


def test_image_cache_refuses_a_model_of_texts():
    found = tiny.model()
    state = tiny.state(found, tiny.params(found))
    with pytest.raises(ValueError, match="holds features of images, and the examples are texts"):
        ImageCache(ROOM).open(found, state, PjitPartitioner())


@pytest.mark.parametrize("settings", [{"max_bytes": 0}, {"max_bytes": -1}, {"chunk": 0}])
def test_image_cache_settings_must_be_positive(settings):
    with pytest.raises(ValueError, match="must be positive, got .* Set IMAGE_CACHE_BYTES"):
        ImageCache(**{"max_bytes": ROOM, **settings})
