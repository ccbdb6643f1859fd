"""Server that classifies images with the prompts, or lanes, of any of its tasks.

Prompts of several artifacts are kept as plain prompts, and the features of all classes are computed
once, when the server starts. A request then costs one pass of the image encoder. A request can
bring class names, or with lanes ask for the classes of all lanes of a sequence.
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

from mpt_jax.artifacts import artifacts
from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.backbones.clip import CLIP, CLIPConfig
from mpt_jax.batching.clip_tokenizer import ClipTokenizer
from mpt_jax.convert.clip import load_clip, read_clip_config
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import flatten
from mpt_jax.models.class_interface import predicted_classes
from mpt_jax.models.class_scores import FEATURES
from mpt_jax.models.classifier import PromptedClassifier
from mpt_jax.models.dual_encoder import PromptedDualEncoder
from mpt_jax.serving.predict.image_artifacts import (
    Inputs,
    check_number,
    check_origin,
    check_shapes,
    inputs_of,
    names_of_rows,
    plain_prompts_of,
    refuse_heads,
    texts_of,
)
from mpt_jax.serving.predict.image_requests import ImageReader, ImageRequest
from mpt_jax.serving.predict.lane_artifacts import (
    have_lanes,
    lane_model,
    mixed_rows,
    seen_classes,
)
from mpt_jax.serving.predict.open_classes import OpenClasses, unsupported
from mpt_jax.serving.predict.requests import Failure
from mpt_jax.serving.prompt_bank import Named

Answer = dict[str, Any]
Indexed = tuple[int, ImageRequest]  # a request after its position among requests

_MISSING_CLIP = (
    "These prompts are of a CLIP, which is not shipped. Set --backbone to its Hugging Face or "
    "open_clip folder, with vocab.json and merges.txt."
)
_MISSING_VIT = (
    "These lanes are of a ViT or CLIP, which is not shipped. Set --backbone to its Hugging Face or "
    "open_clip folder."
)


class ImageServer:
    """A CLIP with the plain prompts of many tasks.

    Args:
        model: the model, with one run per name.
        params: its parameters. The server computes the features of all classes once, unless they
            depend on the image. It keeps the text encoder if they do, or if requests can bring
            class names.
        inputs: how inputs are made.
        batch_size: the number of images that are encoded at a time.
        digests: what answers depend on besides the requests, for resumable outputs.
        tokenizer: the backbone's tokenizer; None with lanes, which read no texts.

    Attributes:
        names: the names that requests can use.
        lanes: whether the model has lanes.
        model, params, inputs: the arguments.
    """

    def __init__(
        self,
        model: PromptedDualEncoder,
        params: Any,
        inputs: Inputs,
        batch_size: int,
        digests: dict[str, Any],
        tokenizer: ClipTokenizer | None,
    ):
        self.names = model.runs.run_names
        self.digests = digests
        self.model, self.inputs = model, inputs
        self.params = model.params_for_evaluation(params)
        if FEATURES in self.params:
            self.params = {n: x for n, x in self.params.items() if n != "text_encoder"}
        self._batch_size = batch_size
        self._score = jax.jit(model.score_batch)
        self._encode = jax.jit(model.image_features)
        self.lanes = isinstance(model, PromptedClassifier)
        self._no_classes = "they have lanes" if self.lanes else unsupported(model)
        self._open = None
        if tokenizer is not None and self._no_classes is None:
            self._open = OpenClasses(model, params, inputs, tokenizer)
        self._score_seen, self._seen, self._mixed = None, [], {}
        if isinstance(model, PromptedClassifier):
            self._score_seen = jax.jit(model.score_seen_batch)
            self._seen, self._mixed = seen_classes(model), mixed_rows(model)

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
            ValueError: `path` is None; the artifacts disagree, were trained with another backbone
                or tokenizer, or do not fit the backbone; only some have lanes; they have more than
                `MOST_TEXTS` class texts; two rows have the same name; or `batch_size` is not
                positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}. Set --batch-size to at least 1.")
        sources = [Named.parse(text) for text in prompts]
        found = [artifacts.load_artifact(source.folder) for source in sources]
        refuse_heads(found)
        lanes = have_lanes(found)
        if path is None:
            raise ValueError(_MISSING_VIT if lanes else _MISSING_CLIP)
        config = dataclasses.replace(read_clip_config(path), dtype=dtype)
        if config.text is None and not lanes:
            raise ValueError(
                f"{path} is a ViT without a text encoder. Set --backbone to the CLIP that the "
                "prompts were trained on."
            )
        backbone = load_clip(path, config)
        tokenizer = None if lanes else ClipTokenizer.from_folder(path)
        digests = check_origin(found, backbone, config, tokenizer, digest_backbone, warn)
        names = names_of_rows(found, sources)
        if tokenizer is None:
            model, prompt, inputs = lane_model(found, names, config)
            backbone = model.precompute(backbone)
        else:
            model, prompt, inputs = _text_model(found, names, tokenizer, config)
        cast = lambda x: np.asarray(x).astype(jnp.dtype(dtype), copy=False)  # noqa: E731
        params = {**jax.tree.map(cast, backbone), "prompt": prompt}
        if "logit_scale" in params:  # rounded, all logits would change
            params["logit_scale"] = np.asarray(backbone["logit_scale"], np.float32)
        tables = artifacts.digest(flatten(prompt))
        digests["prompts_sha256"] = hashlib.sha256(f"{names} {tables}".encode()).hexdigest()
        settings = json.dumps(dataclasses.asdict(inputs), sort_keys=True)
        digests["inputs_sha256"] = hashlib.sha256(settings.encode()).hexdigest()
        return cls(model, jax.device_put(params), inputs, batch_size, digests, tokenizer)

    @property
    def nbytes(self) -> int:
        """The size of the prompts in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params["prompt"]))

    def reader(self, mode: str = "predict", truncate: bool = False) -> ImageReader:
        """Returns a parser of requests to this server."""
        del truncate  # images are never truncated
        return ImageReader(self.names, self.inputs.transform, mode, self.lanes, self._no_classes)

    def answer(self, requests: Sequence[ImageRequest | Failure]) -> list[Answer]:
        """Returns one answer for each request, in their order."""
        answers: dict[int, Answer] = {}
        valid: list[Indexed] = []
        for index, request in enumerate(requests):
            if isinstance(request, Failure):
                answers[index] = {**request.label, "error": request.error}
            else:
                valid.append((index, request))
        brought = [(index, x) for index, x in valid if x.classes is not None]
        seen = [(index, x) for index, x in valid if x.seen]
        plain = [(index, x) for index, x in valid if not x.seen and x.classes is None]
        answers |= self._answers(plain, self._score, self._answer)
        answers |= self._answers(brought, self._encode, self._open_answer)
        if self._score_seen is not None:
            answers |= self._answers(seen, self._score_seen, self._seen_answer)
        return [answers[index] for index in range(len(requests))]

    def _answers(
        self,
        requests: Sequence[Indexed],
        function: Callable[..., jax.Array],
        answer: Callable[[ImageRequest, np.ndarray], Answer],
    ) -> dict[int, Answer]:
        """Returns the answers to requests of one kind by their index, given a function of the model
        that reads their images, and one that makes an answer of its row."""
        answers = {}
        for first in range(0, len(requests), self._batch_size):
            part = requests[first : first + self._batch_size]
            rows = self._run(function, [request for _, request in part])
            for (index, request), row in zip(part, rows, strict=False):
                answers[index] = {**request.label, **answer(request, row)}
        return answers

    def _run(self, function: Callable[..., jax.Array], part: Sequence[ImageRequest]) -> np.ndarray:
        """Returns what a function of the model computes from the images of requests, with rows of
        padding."""
        # Repeats rows as padding.
        rows = np.resize(np.arange(len(part)), self._batch_size).tolist()
        batch = {
            "image": np.stack([part[row].image for row in rows]),
            "task_ids": np.array([part[row].row for row in rows], np.int32),
        }
        return np.asarray(function(self.params, batch))

    def _open_answer(self, request: ImageRequest, feature: np.ndarray) -> Answer:
        assert self._open is not None and request.classes is not None
        multi = self.inputs.tasks[request.row].multi_label
        try:
            texts = self._open.features(request.row, request.classes)
        except ValueError as error:
            return {"error": str(error)}
        logits = self.model.scaled(self.params, jnp.asarray(texts @ feature)[None])[0]
        scores = jax.nn.log_sigmoid(logits) if multi else jax.nn.log_softmax(logits)
        return _classified(request, request.classes, np.asarray(scores), multi)

    def _answer(self, request: ImageRequest, scores: np.ndarray) -> Answer:
        task = self.inputs.tasks[request.row]
        return _classified(request, task.names, scores[: len(task.names)], task.multi_label)

    def _seen_answer(self, request: ImageRequest, scores: np.ndarray) -> Answer:
        if tasks := self._mixed.get(request.row):
            return {
                "error": f"The tasks {abbreviate(tasks)} have one label per image or several, so "
                "their scores cannot be compared. Ask for one task at a time, in the field task."
            }
        groups = self.model.runs.group_of_row
        own = [i for i, (row, _) in enumerate(self._seen) if groups[row] == groups[request.row]]
        names = [self._seen[i][1] for i in own]
        multi = self.inputs.tasks[request.row].multi_label
        return _classified(request, names, scores[own], multi)


def _text_model(
    found: Sequence[Artifact], names: Sequence[str], tokenizer: ClipTokenizer, config: CLIPConfig
) -> tuple[PromptedDualEncoder, dict[str, Any], Inputs]:
    """Returns a model with the plain prompts of all rows, the parameters of its prompt, and how its
    inputs are made."""
    method, prompt = plain_prompts_of(found)
    inputs = inputs_of(found)
    check_shapes(found, method, prompt, inputs, config)
    check_number(method, inputs)
    model = PromptedDualEncoder(
        CLIP(config),
        method,
        Runs([task.task for task in inputs.tasks], names, "independent"),
        texts_of(inputs, method, tokenizer, config),
    )
    return model, prompt, inputs


def _classified(
    request: ImageRequest, names: Sequence[str], scores: np.ndarray, multi_label: bool
) -> Answer:
    """Returns the answer about an image, given the scores of some classes."""
    if not np.isfinite(scores).all():
        return {
            "error": f"The scores are NaN or infinite ({scores.tolist()}), so the answer is "
            "meaningless. Check the weights of the backbone and of the prompt."
        }
    prediction = predicted_classes(names, scores, multi_label)
    answer: Answer = {"prediction": prediction, "score": float(scores.max())}
    if request.all_scores:
        answer["scores"] = dict(zip(names, scores.tolist(), strict=True))
    return answer
