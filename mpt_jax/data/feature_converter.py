"""SeqIO feature converter that produces the batch contract.

Prompts are not concatenated to inputs. Each example has P reserved positions, into which the model
writes the prompt, and the features say what every position holds:

    encoder_input_tokens   int32 [B, T]  token id; 0 at prompt slots and padding
    encoder_prompt_slots   int32 [B, T]  i + 1 at the position reserved for prompt row i, else 0
    encoder_task_ids       int32 [B, T]  bank row of the example at every real position, else 0
    decoder_input_tokens   int32 [B, L]  targets shifted right, 0 at the start of each example
    decoder_target_tokens  int32 [B, L]  token id; 0 at padding
    decoder_loss_weights   int32 [B, L]  1 at every target token, else 0
    decoder_task_ids       int32 [B, L]  bank row of the example at every target token, else 0

Packed batches also have `encoder_segment_ids`, `encoder_positions` [B, T] and
`decoder_segment_ids`, `decoder_positions` [B, L]: the number of the example (from 1; 0 is
padding) and the position inside it. Without packing, T is P + the limit on inputs.

The feature `task_ids` [1] identifies the task: the CRC-32 of its name (31 bits), which the
converter maps to an index of `Runs.run_names`, the bank row. An example with a text longer than
its limit has `~id` instead of `id`. The converter, which gin configures, can then decide what to do
with such examples. Gin cannot configure the registered task.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mpt_jax.batching import collate
from mpt_jax.core.runs import Runs
from mpt_jax.data.preprocessors import _NAME_OF_ID, TASK_IDS, map_dataset, task_id

OVERLONG_POLICIES = ("error", "truncate")


class PromptFeatureConverter(seqio.FeatureConverter):
    """Converts task features (inputs, targets, task_ids) into the batch contract above.

    With its first two arguments bound by gin or `functools.partial`, the class serves as T5X's
    `FEATURE_CONVERTER_CLS`. The argument `task_feature_lengths` of its methods has the limits on
    the texts of `inputs` and `targets`, without prompt positions; `task_ids` may be omitted.

    Args:
        prompt_length: P, the number of positions reserved in front of each text; 0 for methods
            without a prompt. The model supplies it.
        runs: the runs of the job; the name of an example's task determines its bank row.
        pack: whether to pack several examples into a row, each with its own prompt positions.
        use_custom_packing_ops: SeqIO's option; must be False, since this library does the packing.
        pack_lengths: number of encoder positions (`inputs`, prompt positions included) and decoder
            positions (`targets`) of a packed row; by default twice those of a full-length example.
        pack_window: number of examples packed at a time (`packing.best_fit`). A larger window
            leaves less padding and changes the order of the stream more.
        on_overlong: what to do with examples that `end_and_limit` truncated: 'error' raises an
            error, 'truncate' keeps them.
        prompt_lengths: number of prompt positions of each bank row, at most P; by default P for
            all.

    Raises:
        ValueError: a setting is out of range or would have no effect.
    """

    TASK_FEATURES = {
        "inputs": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "targets": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        TASK_IDS: seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
    }
    MODEL_FEATURES = {
        name: seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
        for name in (
            "encoder_input_tokens",
            "encoder_prompt_slots",
            "encoder_task_ids",
            "decoder_input_tokens",
            "decoder_target_tokens",
            "decoder_loss_weights",
            "decoder_task_ids",
        )
    }
    PACKING_FEATURE_DTYPES = {
        "encoder_segment_ids": tf.int32,
        "encoder_positions": tf.int32,
        "decoder_segment_ids": tf.int32,
        "decoder_positions": tf.int32,
    }

    def __init__(
        self,
        prompt_length: int,
        runs: Runs,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
        pack_lengths: Mapping[str, int] | None = None,
        pack_window: int = 256,
        on_overlong: str = "error",
        prompt_lengths: Sequence[int] | None = None,
    ):
        if prompt_length < 0:
            raise ValueError(
                f"prompt_length must be 0 or more, got {prompt_length}. Correct PROMPT_LENGTH."
            )
        if on_overlong not in OVERLONG_POLICIES:
            raise ValueError(
                f"on_overlong must be {' or '.join(map(repr, OVERLONG_POLICIES))}, got "
                f"{on_overlong!r}. Correct ON_OVERLONG."
            )
        if pack_lengths is not None and set(pack_lengths) != {"inputs", "targets"}:
            raise ValueError(
                "pack_lengths must have exactly the keys 'inputs' and 'targets', got "
                f"{', '.join(map(repr, sorted(pack_lengths))) or 'none'}. Correct PACK_LENGTHS."
            )
        if use_custom_packing_ops:
            raise ValueError(
                "use_custom_packing_ops = True would have no effect, because "
                "mpt_jax/batching/packing.py does the packing. Set use_custom_packing_ops = False."
            )
        if pack_window < 1:
            raise ValueError(
                f"pack_window must be 1 or more, got {pack_window}. Correct PACK_WINDOW."
            )
        if prompt_lengths is not None and (
            len(prompt_lengths) != runs.num_rows or max(prompt_lengths) > prompt_length
        ):
            raise ValueError(
                f"prompt_lengths must have one value for each of the {runs.num_rows} runs, and "
                f"none above prompt_length = {prompt_length}, got {tuple(prompt_lengths)}. Bind "
                "PromptFeatureConverter.prompt_length to the length of the longest prompt."
            )
        for name in runs.run_names:
            task_id(name)
        # `_row` checks lengths inside the map that converts. SeqIO's own checks would add two more
        # maps, which cost more than the conversion.
        super().__init__(pack=pack, apply_length_check=False)
        self.prompt_length = prompt_length
        self.prompt_lengths = tuple(prompt_lengths or (prompt_length,) * runs.num_rows)
        self.runs = runs
        self.on_overlong = on_overlong
        self.pack_lengths = None if pack_lengths is None else dict(pack_lengths)
        self.pack_window = pack_window
        self._graphs: dict[tuple, Callable[..., Any]] = {}

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        """Converts a dataset; raises ValueError if its examples have no `task_ids`."""
        features: list[str] = sorted(dict(ds.element_spec))  # type: ignore[arg-type]  # flat, by SeqIO
        if TASK_IDS not in features:
            raise ValueError(
                f"The dataset has no feature {TASK_IDS!r} (it has {', '.join(features)}), so the "
                "prompt of an example is unknown. End the task's preprocessors with "
                "*preprocessors.finish(name), and use preprocessors.output_features(...) as its "
                "output features (from mpt_jax.data import preprocessors)."
            )
        return super().__call__(ds, {**task_feature_lengths, TASK_IDS: 1})

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Returns the length of each model feature: T for the encoder, L for the decoder."""
        positions = self._positions(task_feature_lengths)
        names = [*self.MODEL_FEATURES, *(self.PACKING_FEATURE_DTYPES if self.pack else ())]
        side = {"encoder": "inputs", "decoder": "targets"}
        return {name: positions[side[name.split("_")[0]]] for name in names}

    def feature_shapes(
        self, task_feature_lengths: Mapping[str, int]
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the shape, without the batch, and the dtype of each model feature."""
        lengths = self.get_model_feature_lengths(task_feature_lengths)
        return {name: ((length,), "int32") for name, length in lengths.items()}

    def positions(self, task_feature_lengths: Mapping[str, int]) -> tuple[int, int]:
        """Returns the numbers of encoder and decoder positions of a row, (T, L)."""
        found = self._positions(task_feature_lengths)
        return found["inputs"], found["targets"]

    def _positions(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """Returns {'inputs': T, 'targets': L}."""
        one_example = {
            "inputs": self.prompt_length + task_feature_lengths["inputs"],
            "targets": task_feature_lengths["targets"],
        }
        # T5X turns packing off for evaluation but keeps the bindings, so pack_lengths has no
        # effect then.
        if not self.pack:
            return one_example
        if self.pack_lengths is None:
            return {name: 2 * length for name, length in one_example.items()}
        for name, needed in one_example.items():
            if self.pack_lengths[name] < needed:
                raise ValueError(
                    f"pack_lengths[{name!r}] is {self.pack_lengths[name]}, but one example may "
                    f"need {needed} positions (prompt_length {self.prompt_length}, "
                    f"task_feature_lengths {dict(task_feature_lengths)}). Raise "
                    f"pack_lengths[{name!r}] to at least {needed}, or lower "
                    f"task_feature_lengths[{name!r}]."
                )
        return self.pack_lengths

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        positions = self._positions(task_feature_lengths)
        limits = {name: task_feature_lengths[name] for name in ("inputs", "targets")}

        def unpacked(example):
            row = self._row(example, limits)
            with tf.control_dependencies([row]):
                return self._place(example, row, positions)

        def checked(example):
            row = self._row(example, limits)
            with tf.control_dependencies(self._packable(example, row)):
                return {**{name: example[name] for name in limits}, "row": tf.identity(row)}

        if not self.pack:
            if ds.cardinality() < 0:
                return map_dataset(ds, unpacked)
            # Evaluation converts the data of each task. All share one graph, because tracing it for
            # each of hundreds of tasks takes minutes. Endless streams have their own, because
            # tf.data cannot save the position of a stream that calls a shared one.
            return map_dataset(ds, self._shared(unpacked, limits))
        windows = map_dataset(ds, checked).ragged_batch(self.pack_window)
        lengths = self.get_model_feature_lengths(task_feature_lengths)
        # One window at a time, because windows packed ahead are saved with the data position.
        pack = tf.autograph.experimental.do_not_convert(self._packed)
        return windows.map(lambda window: pack(window, positions, lengths)).unbatch()

    def _shared(
        self, function: Callable[..., Any], limits: Mapping[str, int]
    ) -> Callable[..., Any]:
        """Returns `function` compiled; datasets with the same limits share one compilation."""
        key = tuple(sorted(limits.items()))
        if key not in self._graphs:
            self._graphs[key] = tf.function(function, autograph=False, reduce_retracing=True)
        graph = self._graphs[key]
        names = (*limits, TASK_IDS)
        return lambda example: graph({name: example[name] for name in names})

    def _row(self, example, limits: Mapping[str, int]) -> tf.Tensor:
        """Returns the example's bank row, a scalar. Fails in the graph for an unknown task or an
        over-long example."""
        identity = example[TASK_IDS][0]
        was_cut = identity < 0
        identity = tf.where(was_cut, tf.bitwise.invert(identity), identity)
        is_run = tf.equal(tf.constant([task_id(n) for n in self.runs.run_names]), identity)
        row = tf.argmax(is_run, output_type=tf.int32)
        too_long = [tf.size(example[name]) > limit for name, limit in limits.items()]
        if self.on_overlong == "error":
            too_long.append(was_cut)
        # No quotes in messages that the graph raises, because TensorFlow escapes them.
        limited = ", ".join(f"{name}: {limit}" for name, limit in limits.items())
        message = (
            f" is longer than task_feature_lengths allows ({limited}). Raise TASK_FEATURE_LENGTHS, "
            "or truncate examples: set ON_OVERLONG to truncate, and end the preprocessors of the "
            "task with preprocessors.finish."
        )
        names = tf.constant(self.runs.run_names)
        checks = [
            assert_that(tf.reduce_any(is_run), lambda: unknown_run(self.runs, identity)),
            assert_that(
                tf.logical_not(tf.reduce_any(too_long)),
                lambda: tf.strings.join(["An example of ", names[row], message]),
            ),
        ]
        with tf.control_dependencies(checks):
            return tf.identity(row)

    def _place(self, example, row: tf.Tensor, positions: Mapping[str, int]):
        """Converts one example to a row, in the graph: prompt slots, then the text, then padding.

        `batching.collate.unpacked` does the same for lists, `serving.predict.compiled` on the
        device.
        """
        prompt = tf.constant(self.prompt_lengths)[row]
        targets = _pad(example["targets"], positions["targets"])
        tokens = tf.concat([tf.zeros([prompt], tf.int32), example["inputs"]], axis=0)
        tokens = _pad(tokens, positions["inputs"])
        slots = _pad(tf.range(1, prompt + 1), positions["inputs"])
        # If all prompts have one length, models insert them at the front without reading slots.
        is_target = tf.cast(targets != 0, tf.int32)
        return {
            "encoder_input_tokens": tokens,
            "encoder_prompt_slots": slots,
            "encoder_task_ids": row * tf.cast((slots > 0) | (tokens != 0), tf.int32),
            "decoder_input_tokens": seqio.utils.make_autoregressive_inputs(targets),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": is_target,
            "decoder_task_ids": row * is_target,
        }

    def _packable(self, example, row: tf.Tensor) -> list[tf.Tensor]:
        """Returns assertions that no position of an example can be mistaken for padding."""
        checks, run = [], tf.constant(self.runs.run_names)[row]
        for name, may_be_empty in (("inputs", self.prompt_length > 0), ("targets", False)):
            text, tokens = f"Cannot pack an example of {{}}, because its {name} ", example[name]
            fix = " Correct the preprocessors of the task, or set DatasetConfig.pack to False."
            no_zero = _named(f"{text}contain id 0, which is padding.{fix}", run)
            checks.append(assert_that(tf.reduce_all(tokens != 0), no_zero))
            if not may_be_empty:
                not_empty = _named(f"{text}are empty.{fix}", run)
                checks.append(assert_that(tf.size(tokens) > 0, not_empty))
        return checks

    def _packed(
        self, window, positions: Mapping[str, int], lengths: Mapping[str, int]
    ) -> dict[str, tf.Tensor]:
        """Packs a window of examples into rows."""

        def pack(inputs, input_splits, targets, target_splits, rows):
            texts = np.split(inputs, input_splits[1:-1]), np.split(targets, target_splits[1:-1])
            examples = [collate.Example(*fields) for fields in zip(*texts, rows, strict=True)]
            batch = collate.packed(examples, self.prompt_lengths, positions)
            return [batch[name] for name in lengths]

        inputs, targets = window["inputs"], window["targets"]
        # Stateless, because tf.data cannot save the position of a stateful function.
        features = tf.numpy_function(
            pack,
            [inputs.values, inputs.row_splits, targets.values, targets.row_splits, window["row"]],
            [tf.int32] * len(lengths),
            stateful=False,
        )
        for rows, length in zip(features, lengths.values(), strict=True):
            rows.set_shape([None, length])
        return dict(zip(lengths, features, strict=True))


def unknown_run(runs: Runs, identity: tf.Tensor) -> tf.Tensor:
    """Returns the error for a task id without a run, with the task's name if it is known."""
    known = (
        f" has no run in this job, whose runs are {', '.join(runs.run_names)}. Add the "
        "name of the task to RUN_NAMES, or remove the task from the dataset."
    )
    ids, names = tf.constant([*_NAME_OF_ID]), tf.constant([*_NAME_OF_ID.values()])
    matches = tf.equal(ids, identity)
    name = tf.where(
        tf.reduce_any(matches),
        tf.strings.join(["The task ", names[tf.argmax(matches)]]),
        tf.strings.format("The task with the unregistered id {}", identity),
    )
    return tf.strings.join([name, known])


def _pad(tokens: tf.Tensor, length: int) -> tf.Tensor:
    padded = tf.pad(tokens, [[0, length - tf.size(tokens)]])
    padded.set_shape([length])
    return padded


def _named(template: str, name: tf.Tensor):
    before, after = template.split("{}")
    return lambda: tf.strings.join([before, name, after])


def assert_that(condition: tf.Tensor, message: Callable[[], tf.Tensor]) -> tf.Tensor:
    """Fails in the graph with `message()`, a string, unless `condition`. The text is built only if
    needed, and should have no quotes, because TensorFlow escapes them."""
    return tf.cond(
        condition,
        lambda: tf.constant(True),
        lambda: _fail(message()),
    )


def _fail(text: tf.Tensor) -> tf.Tensor:
    with tf.control_dependencies([tf.debugging.Assert(False, [text])]):
        return tf.constant(False)
