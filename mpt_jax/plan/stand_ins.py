"""Stand-ins for files that a plan does without: vocabularies, CLIP's tokenizer, and class names.

Shapes do not depend on the ids of a vocabulary. Those of class texts depend on the number of tokens
of the longest name, which a stand-in tokenizer estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gin
import seqio

from mpt_jax.backbones.clip.config import CLIPConfig
from mpt_jax.batching import clip_tokenizer
from mpt_jax.config import gin_check
from mpt_jax.data.classes import classes_of
from mpt_jax.data.task_lookup import is_missing_data
from mpt_jax.models.class_texts import ClassTexts
from mpt_jax.models.classifier import PromptedClassifier
from mpt_jax.models.dual_encoder import PromptedDualEncoder
from mpt_jax.runtime import paths
from mpt_jax.tasks.image_sets import published

_VOCABULARY = "toy.model"
_LETTERS = 4  # of a token, so that the longest name of a set is not underestimated
# What gin/models/prompted_clip.gin binds, with stand-ins for what may be missing.
_IMAGE_BINDINGS = """
from __gin__ import dynamic_registration
from mpt_jax.data import task_classes
from mpt_jax.models import dual_encoder
from mpt_jax.plan import stand_ins
stand_ins.tokenizer.path = %CLIP_TOKENIZER
stand_ins.tokenizer.config = %CLIP_CONFIG
dual_encoder.PromptedDualEncoder.tokenizer = @stand_ins.tokenizer()
task_classes.texts_of_tasks.tokenizer = @stand_ins.tokenizer()
task_classes.texts_of_tasks.names_of = @stand_ins.class_names
"""
_HEAD_BINDINGS = """
from __gin__ import dynamic_registration
from mpt_jax.data import task_classes
from mpt_jax.plan import stand_ins
task_classes.classes_of_tasks.names_of = @stand_ins.class_names
"""


def bind() -> None:
    """Binds the stand-ins in the parsed gin configuration."""
    with gin.unlock_config():
        gin.bind_parameter("VOCABULARY/gin.macro.value", str(paths.SHIPPED / _VOCABULARY))
        if gin_check.is_bound(PromptedDualEncoder):
            gin.parse_config(_IMAGE_BINDINGS)
        if gin_check.is_bound(PromptedClassifier):
            gin.parse_config(_HEAD_BINDINGS)


class EstimatedTokenizer:
    """Tokenizer that estimates how many tokens CLIP's makes of a text: one for every 4 letters of a
    word, and one for every digit or other character.

    Args:
        vocab_size: the number of ids.
    """

    pad_id = 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id = vocab_size - 2, vocab_size - 1
        self.identity = b"estimated"

    def encode(self, text: str) -> list[int]:
        """Returns as many ids as CLIP's tokenizer is estimated to return."""
        number = 0
        for word in text.split():
            letters = sum(character.isalpha() for character in word)
            number += -(-letters // _LETTERS) + len(word) - letters
        return [1] * number


def tokenizer(path: str, config: CLIPConfig) -> Any:
    """Returns the tokenizer in a folder; an `EstimatedTokenizer` if the folder has none."""
    try:
        return clip_tokenizer.load(path)
    except FileNotFoundError:
        return EstimatedTokenizer(config.text.vocab_size if config.text else 2)


def class_names(task: seqio.Task) -> Sequence[str]:
    """Returns the class names of an image task. If they need data that is not on this machine, and
    the task is of a suite, returns as many stand-ins.

    Raises:
        FileNotFoundError: the names of a user's task need missing data.
    """
    try:
        return classes_of(task).names
    except Exception as error:
        number = published.num_classes(task) if is_missing_data(error) else None
        if number is None:
            raise
        return _names(number)


def _names(number: int) -> tuple[str, ...]:
    return tuple(f"name {i:04}" for i in range(number))


def note(model: Any) -> str:
    """Returns a sentence on each stand-in that the shapes of a model depend on; '' without any."""
    texts = getattr(model, "texts", None)
    if not isinstance(texts, ClassTexts):
        return ""
    words = model.input_vocabulary
    lines = []
    if isinstance(words, EstimatedTokenizer):
        name_lengths = [len(words.encode(name)) for task in texts.tasks for name in task.names]
        lines.append(
            "The backbone's tokenizer is not on this machine, so the lengths of class names are "
            f"estimates: {sum(name_lengths) / len(name_lengths):.1f} tokens on average, at most "
            f"{max(name_lengths)}."
        )
    for task in texts.tasks:
        if task.names == _names(len(task.names)):
            size = f" of {len(words.encode(task.names[0]))} tokens" if words is not None else ""
            lines.append(
                f"The {len(task.names):,} class names of {task.task} are not on this machine; "
                f"stand-ins{size} were used."
            )
    if lines and words is not None:
        lines.append(f"Class texts have {texts.tokens.shape[1]} positions each.")
    return " ".join(lines)
