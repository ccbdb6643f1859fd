"""Server that classifies images with the prompts of any of its tasks.

Prompts of several artifacts are kept as plain prompts, and the features of all classes are computed
once, when the server starts. A request then costs one pass of the image encoder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mpt_jax.artifacts import artifacts, compatibility
from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.artifacts.backbone_digest import backbone_config, backbone_digest
from mpt_jax.backbones.clip import CLIP, CLIPConfig
from mpt_jax.batching.clip_tokenizer import ClipTokenizer
from mpt_jax.convert.clip import load_clip, read_clip_config
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Params
from mpt_jax.core.tree import flatten
from mpt_jax.models.class_scores import FEATURES
from mpt_jax.models.class_texts import ClassTexts, TaskClasses, class_texts
from mpt_jax.models.dual_encoder import PromptedDualEncoder
from mpt_jax.prompts.base import PromptMethod, params_of_parts
from mpt_jax.prompts.lanes import LANE
from mpt_jax.prompts.materialize import materialize
from mpt_jax.prompts.prompt_tuning import PromptTuning
from mpt_jax.prompts.sites import IMAGE, TEXT, SitePrompts
from mpt_jax.serving.predict.image_requests import ImageReader, ImageRequest
from mpt_jax.serving.predict.requests import Failure
from mpt_jax.serving.prompt_bank import Named, row_names, taken

Answer = dict[str, Any]
# A job of 1,000 classes and 80 templates has 80,000. The features of this many take 2 GiB.
MOST_TEXTS = 2**20


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The part of the artifacts that says how images and class texts are made.

    Attributes:
        transform: the settings of the image transform.
        position: the position of class names (`class_texts`).
        tasks: the classes of each row's task.
    """

    transform: dict[str, Any]
    position: str
    tasks: tuple[TaskClasses, ...]


class ImageServer:
    """A CLIP with the plain prompts of many tasks.

    Args:
        model: the model, with one run per name.
        params: its parameters; the server keeps the features of all classes instead of the text
            encoder, unless they depend on the image.
        inputs: how inputs are made.
        batch_size: the number of images that are encoded at a time.
        digests: what answers depend on besides the requests, for resumable outputs.

    Attributes:
        names: the names that requests can use.
        model, params, inputs: the arguments.
    """

    def __init__(
        self,
        model: PromptedDualEncoder,
        params: Any,
        inputs: Inputs,
        batch_size: int,
        digests: dict[str, Any],
    ):
        self.names = model.runs.run_names
        self.digests = digests
        self.model, self.inputs = model, inputs
        self.params = model.params_for_evaluation(params)
        if FEATURES in self.params:
            self.params = {n: x for n, x in self.params.items() if n != "text_encoder"}
        self._batch_size = batch_size
        self._score = jax.jit(model.score_batch)

    @classmethod
    def load(
        cls,
        prompts: Iterable[str],
        path: str | None,
        *,
        batch_size: int = 32,
        dtype: str = "float32",
        digest_backbone: bool = True,
        warn: Callable[[str], None] = logging.warning,
    ) -> ImageServer:
        """Loads a server from artifacts of image jobs.

        Args:
            prompts: the artifact folders, each as FOLDER or NAME=FOLDER.
            path: the Hugging Face or open_clip folder of the backbone.
            batch_size: the number of images that are encoded at a time.
            dtype: the dtype that the backbone computes in.
            digest_backbone: whether to compare all weights with those of the artifacts.
            warn: called with a line if the backbone could not be compared by all its weights.

        Raises:
            FileNotFoundError: an artifact or the backbone does not exist.
            ValueError: the artifacts disagree, were trained with another backbone or tokenizer, or
                do not fit the backbone; they have more than `MOST_TEXTS` class texts; two rows have
                the same name; or `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}. Set --batch-size to at least 1.")
        if path is None:
            raise ValueError(
                "These prompts are of a CLIP, which is not shipped. Set --backbone to its Hugging "
                "Face or open_clip folder, with vocab.json and merges.txt."
            )
        sources = [Named.parse(text) for text in prompts]
        found = [artifacts.load_artifact(source.folder) for source in sources]
        _refuse_lanes(found)
        config = dataclasses.replace(read_clip_config(path), dtype=dtype)
        if config.text is None:
            raise ValueError(
                f"{path} is a ViT without a text encoder. Set --backbone to the CLIP that the "
                "prompts were trained on."
            )
        backbone, tokenizer = load_clip(path, config), ClipTokenizer.from_folder(path)
        digests = _check(found, backbone, config, tokenizer, digest_backbone, warn)
        names = _names(found, sources)
        method, prompt = _plain(found)
        inputs = _inputs(found)
        _check_shapes(found, method, prompt, inputs, config)
        _check_number(method, inputs)
        model = PromptedDualEncoder(
            CLIP(config),
            method,
            Runs([task.task for task in inputs.tasks], names, "independent"),
            _texts(inputs, method, tokenizer, config),
        )
        cast = lambda x: np.asarray(x).astype(jnp.dtype(dtype), copy=False)  # noqa: E731
        scale = np.asarray(backbone["logit_scale"], np.float32)  # rounded, all logits would change
        params = {**jax.tree.map(cast, backbone), "logit_scale": scale, "prompt": prompt}
        tables = artifacts.digest(flatten(prompt))
        digests["prompts_sha256"] = hashlib.sha256(f"{names} {tables}".encode()).hexdigest()
        settings = json.dumps(dataclasses.asdict(inputs), sort_keys=True)
        digests["inputs_sha256"] = hashlib.sha256(settings.encode()).hexdigest()
        return cls(model, jax.device_put(params), inputs, batch_size, digests)

    @property
    def nbytes(self) -> int:
        """The size of the prompts in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params["prompt"]))

    def reader(self, mode: str = "predict", truncate: bool = False) -> ImageReader:
        """Returns a parser of requests to this server."""
        del truncate  # images are never truncated
        return ImageReader(self.names, self.inputs.transform, mode)

    def answer(self, requests: Sequence[ImageRequest | Failure]) -> list[Answer]:
        """Returns one answer for each request, in their order."""
        answers: list[Answer] = [
            {**x.label, "error": x.error} if isinstance(x, Failure) else {} for x in requests
        ]
        jobs = [(i, x) for i, x in enumerate(requests) if isinstance(x, ImageRequest)]
        for first in range(0, len(jobs), self._batch_size):
            part = jobs[first : first + self._batch_size]
            rows = np.resize(np.arange(len(part)), self._batch_size)  # repeats rows as padding
            batch = {
                "image": np.stack([part[row][1].image for row in rows]),
                "task_ids": np.array([part[row][1].row for row in rows], np.int32),
            }
            scores = np.asarray(self._score(self.params, batch))
            for (index, request), row in zip(part, scores, strict=False):
                answers[index] = {**request.label, **self._answer(request, row)}
        return answers

    def _answer(self, request: ImageRequest, scores: np.ndarray) -> Answer:
        task = self.inputs.tasks[request.row]
        own = scores[: len(task.names)]
        if not np.isfinite(own).all():
            return {
                "error": f"The scores are NaN or infinite ({own.tolist()}), so the answer is "
                "meaningless. Check the weights of the backbone and of the prompt."
            }
        best = int(own.argmax())
        prediction: Any = task.names[best]
        if task.multi_label:
            prediction = [x for x, s in zip(task.names, own, strict=True) if s > np.log(0.5)]
        answer: Answer = {"prediction": prediction, "score": float(own[best])}
        if request.all_scores:
            answer["scores"] = dict(zip(task.names, own.tolist(), strict=True))
        return answer


def _refuse_lanes(found: Sequence[Artifact]) -> None:
    """Raises ValueError if an artifact has lanes, which are not compared with class texts."""
    if lanes := [x.path for x in found if LANE in x.method.parts]:
        raise ValueError(
            f"The artifacts {abbreviate(lanes)} have lanes and heads, which this server cannot "
            "run. Use `python -m t5x.infer` with gin/models/prompted_vit.gin and "
            "gin/methods/multi_lane.gin."
        )


def is_of_images(folder: str) -> bool:
    """Whether a folder holds an artifact of an image job; raises as `load_artifact`."""
    return "images" in artifacts.load_artifact(folder).config


def _check(
    found: Sequence[Artifact],
    backbone: Any,
    config: CLIPConfig,
    tokenizer: ClipTokenizer,
    digest_backbone: bool,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Checks that artifacts agree with each other, the backbone and the tokenizer. Returns the
    digests of the backbone and the tokenizer.

    Raises:
        ValueError: they disagree; the message shows both values.
    """
    compatibility.check_mutually_compatible(found, folded=True)
    if texts := [x.path for x in found if "images" not in x.config]:
        raise ValueError(
            f"The artifacts {abbreviate(texts)} have prompts for texts, and the others for images. "
            "Serve them separately."
        )
    weights = backbone_digest(backbone) if digest_backbone else None
    embedding = artifacts.embedding_digest(backbone["text_encoder"]["token_embedder"]["embedding"])
    vocabulary = artifacts.vocabulary_digest(tokenizer)
    for artifact in found:
        compatibility.check_backbone(artifact, embedding, weights, backbone_config(config))
        compatibility.check_vocabulary(artifact, vocabulary)
    for warning in compatibility.not_compared(*compatibility.lacking(found), weights is not None):
        warn(warning)
    return {
        "embedding_sha256": embedding,
        "backbone_sha256": weights,
        "backbone_config": backbone_config(config),
        "vocabulary_sha256": vocabulary,
    }


def _names(found: Sequence[Artifact], sources: Sequence[Named]) -> list[str]:
    """Returns the names of all rows. Raises ValueError if two rows have the same name."""
    folder_of: dict[str, str] = {}
    for artifact, source in zip(found, sources, strict=True):
        for name in row_names(artifact.runs, source.name):
            if name in folder_of:
                raise ValueError(taken(name, folder_of[name], artifact.path))
            folder_of[name] = artifact.path
    return list(folder_of)


def _plain(found: Sequence[Artifact]) -> tuple[SitePrompts, dict[str, Any]]:
    """Returns the plain prompts of all rows, as a method and its parameters.

    Raises:
        ValueError: the artifacts have prompts at other sites or of other lengths.
    """
    tables: dict[str, list[tuple[PromptMethod, Params]]] = {}
    shapes: dict[str, list[str]] = {}
    for artifact in found:
        parts = params_of_parts(artifact.method, artifact.params, artifact.runs)
        method: Any = artifact.method
        sizes = [
            f"{name} of {part.prompt_length} rows" + f" ({part.name})" * part.reads_image
            for name, (part, _) in parts.items()
        ]
        shape = f"{' and '.join(sizes)} in {method.image_layers} layers"
        shapes.setdefault(f"{shape}, {method.text_classes} classes", []).append(artifact.path)
        for name, (part, values) in parts.items():
            tables.setdefault(name, []).append(_by_row(part, values, artifact.runs))
    if len(shapes) > 1:
        values = "; ".join(f"{shape} in {abbreviate(paths)}" for shape, paths in shapes.items())
        raise ValueError(
            f"These artifacts cannot be served together, since their prompts differ: {values}. Use "
            "only artifacts that agree."
        )
    methods: Any = {name: parts[0][0] for name, parts in tables.items()}
    joined = {
        name: jax.tree.map(lambda *x: jnp.concatenate(x), *(values for _, values in parts))
        for name, parts in tables.items()
    }
    first: Any = found[0].method
    method = SitePrompts(
        **methods, text_classes=first.text_classes, image_layers=first.image_layers
    )
    return method, joined


def _by_row(
    part: PromptMethod, values: Params, runs: Runs
) -> tuple[PromptMethod, dict[str, np.ndarray]]:
    """Returns plain prompts, as a method and its parameters; for prompts that depend on the image,
    their method, with the parameters of each row's group."""
    if part.reads_image:
        groups = np.asarray(runs.group_of_row)
        return part, {name: np.asarray(x)[groups] for name, x in values.items()}
    table = np.asarray(materialize(part, values, runs))
    return PromptTuning(table.shape[1]), {"table": table}


def _inputs(found: Sequence[Artifact]) -> Inputs:
    """Returns how the inputs of artifacts are made.

    Raises:
        ValueError: artifacts differ in the position of class names, the image transform, or the
            classes of a task; or an artifact records no classes of a task.
    """
    tasks: list[TaskClasses] = []
    known: dict[str, tuple[TaskClasses, str]] = {}
    for artifact in found:
        classes = _classes(artifact)
        for name in artifact.runs.task_names:
            task = classes[name]
            first, path = known.setdefault(name, (task, artifact.path))
            if first != task:
                raise ValueError(
                    f"{path} and {artifact.path} have other classes or templates of the task "
                    f"{name!r}. Serve them separately."
                )
            tasks.append(task)
    position = _agreed(found, "context position", lambda images: images["context_position"])
    transform = _agreed(found, "image transform", lambda images: images["transform"])
    return Inputs(transform, position, tuple(tasks))


def _classes(artifact: Artifact) -> dict[str, TaskClasses]:
    """Returns the classes of each task of an artifact's runs, by its name. Raises ValueError if it
    does not record those of a task."""
    recorded = artifact.config["images"]["tasks"]
    classes = {}
    for name in dict.fromkeys(artifact.runs.task_names):
        if (entry := recorded.get(name)) is None:
            raise ValueError(
                f"{artifact.path} records no classes of its task {name!r}. {artifacts.COPY_AGAIN}"
            )
        names, templates = tuple(entry["names"]), tuple(entry["templates"])
        classes[name] = TaskClasses(name, names, templates, entry["multi_label"])
    return classes


def _agreed(found: Sequence[Artifact], what: str, value_of: Callable[[dict[str, Any]], Any]) -> Any:
    """Returns a setting of artifacts' images.

    Raises:
        ValueError: it differs; the message lists each value with its artifacts.
    """
    folders: dict[str, list[str]] = {}
    for artifact in found:
        value = json.dumps(value_of(artifact.config["images"]), sort_keys=True)
        folders.setdefault(value, []).append(artifact.path)
    if len(folders) > 1:
        values = "; ".join(f"{value} in {abbreviate(paths)}" for value, paths in folders.items())
        raise ValueError(
            f"These artifacts cannot be served together, since their {what} differs: {values}. Use "
            "only artifacts that agree."
        )
    return value_of(found[0].config["images"])


def _check_shapes(
    found: Sequence[Artifact],
    method: SitePrompts,
    prompt: dict[str, Any],
    inputs: Inputs,
    config: CLIPConfig,
) -> None:
    """Raises ValueError if the images or the prompts do not have the sizes of the backbone."""
    assert config.text is not None
    image = config.image
    compared: list[Any] = [("images of {} pixels", inputs.transform["size"], image.image_size)]
    for site, tower in ((TEXT, config.text), (IMAGE, image)):
        for name, leaf in prompt.get(site, {}).items():
            sizes = dict(zip(method.parts[site].axes[name], leaf.shape, strict=True))
            compared.append((f"{site} of width {{}}", sizes.get("embed"), tower.emb_dim))
            compared.append(("features of width {}", sizes.get("joint"), config.joint_dim))
    if IMAGE in prompt and method.image_layers != 1:
        compared.append((f"{IMAGE} in {{}} layers", method.image_layers, image.num_layers))
    for what, size, expected in compared:
        if size is not None and size != expected:
            raise ValueError(
                f"The artifacts {abbreviate([x.path for x in found])} have {what.format(size)}, "
                f"but the backbone has {what.format(expected)}. {artifacts.COPY_AGAIN}"
            )


def _check_number(method: SitePrompts, inputs: Inputs) -> None:
    """Raises ValueError if there are too many class texts, or pairs of a row and a class."""
    number = sum(len(task.names) for task in inputs.tasks)
    if TEXT not in method.parts:
        distinct = {task.task: len(task.names) * len(task.templates) for task in inputs.tasks}
        number = max(number, sum(distinct.values()))
    if number > MOST_TEXTS:
        raise ValueError(
            f"The artifacts have {number:,} class texts, and the limit is {MOST_TEXTS:,}. Serve "
            "fewer artifacts together, or ones with fewer classes or templates."
        )


def _texts(
    inputs: Inputs, method: SitePrompts, tokenizer: ClipTokenizer, config: CLIPConfig
) -> ClassTexts:
    length = 0
    if (part := method.parts.get(TEXT)) is not None:
        length = part.prompt_length // (method.text_classes or 1)
    assert config.text is not None
    distinct = list({task.task: task for task in inputs.tasks}.values())
    most = config.text.context_length
    return class_texts(distinct, tokenizer, most, length, inputs.position)
