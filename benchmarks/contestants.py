"""Training steps of MPT to compare: ours, and PEFT's on transformers' T5.

Both take the same batches, train only the prompt by AdamW with the same learning rate and clipping,
and have no dropout. Weights are random, because no figure depends on them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import contest
from mpt_jax.backbones.t5.config import T5Config, t5_config
from mpt_jax.training.state import abstract_train_state, create_train_state

RATE, CLIP = 0.3, 1.0
SIZES = ("tiny", "small", "base", "large")
CACHE_BYTES = 10**9  # more than a few batches need
IGNORED = -100  # torch's label for positions without loss


def t5(size: str, dtype: str = "float32") -> T5Config:
    """Returns the shape of T5 1.0 in a size; `tiny` is for tests."""
    if size == "tiny":
        return T5Config(
            vocab_size=512,
            dtype=dtype,
            emb_dim=32,
            num_heads=2,
            head_dim=16,
            mlp_dim=64,
            num_encoder_layers=2,
            num_decoder_layers=2,
            logits_via_embedding=True,
        )
    return t5_config(f"t5_1_0_{size}", dtype=dtype)


# --- Ours ----------------------------------------------------------------------------------------


class Ours:
    """The trainer's own compiled step.

    Args:
        config: the backbone; its dtype is the dtype of activations.
        prompt_length: P.
        num_tasks: K, rows of the bank, in one group.
        distilled: whether the loss has distillation terms (logits and hidden states).
        absent_tasks: update of tasks that are not in the batch, `'dense'` or `'hold'`.
        cached: whether teacher outputs are cached, so that teachers run only for new examples.
    """

    def __init__(
        self,
        config: T5Config,
        prompt_length: int,
        num_tasks: int,
        distilled: bool = False,
        absent_tasks: str = "dense",
        cached: bool = False,
    ):
        import jax

        from mpt_jax.backbones.t5.network import Transformer
        from mpt_jax.core.runs import Runs
        from mpt_jax.models import losses
        from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
        from mpt_jax.prompts.mpt import MPT
        from mpt_jax.runtime import malloc
        from mpt_jax.training.optimizers import PromptOptimizer
        from mpt_jax.training.partitioning import PjitPartitioner
        from mpt_jax.training.schedules import Schedule
        from mpt_jax.training.teacher_cache import TeacherCache
        from mpt_jax.training.trainer import Trainer

        rates = Schedule(RATE, decay="constant")
        model = PromptedEncoderDecoder(
            Transformer(config),
            MPT(prompt_length),
            Runs([f"task_{k}" for k in range(num_tasks)]),
            PromptOptimizer(
                {"shared": rates, "task": rates}, clip_norm=CLIP, absent_tasks=absent_tasks
            ),
            objective=losses.Objective(distillation=losses.Distillation() if distilled else None),
        )
        partitioner = PjitPartitioner()
        state = create_train_state(model, random_params(model, partitioner), partitioner)
        malloc.keep_freed_memory()
        cache = TeacherCache(CACHE_BYTES) if cached else None
        self.trainer = Trainer(
            model, state, partitioner, jax.random.PRNGKey(0), teacher_cache=cache
        )

    def step(self, batch: Mapping[str, np.ndarray]) -> None:
        """Dispatches one step."""
        self.trainer.train(batch)

    def wait(self) -> None:
        """Returns when all steps are computed."""
        import jax

        jax.block_until_ready(self.trainer.state.trainable)

    def loss(self) -> float:
        """Returns the mean cross entropy of the steps since the last call.

        Raises:
            NonFiniteLoss: a step was skipped.
        """
        return self.trainer.read_metrics()["term/cross_entropy"]

    def peak_mib(self) -> float:
        """Returns the peak memory of the process or of the accelerator, in MiB."""
        import jax

        device = jax.devices()[0]
        if device.platform == "cpu":
            return contest.peak_mib()
        return (device.memory_stats() or {})["peak_bytes_in_use"] / 2**20


def random_params(model: Any, partitioner: Any) -> dict[str, Any]:
    """Returns a whole parameter tree of NumPy arrays with sensible scales and the state's dtypes.
    Drawing takes a second here; compiling the initial values of thousands of rows takes minutes."""
    from mpt_jax.core.tree import flatten, unflatten

    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("scale") or "/task_" in name:
            return np.ones(shape, np.float32)
        values = rng.standard_normal(shape, np.float32)
        return values / np.float32(np.sqrt(shape[0])) if name.endswith("kernel") else values

    expected = flatten(abstract_train_state(model, partitioner).params)
    return unflatten({n: draw(n, x.shape).astype(x.dtype) for n, x in expected.items()})


# --- PEFT ----------------------------------------------------------------------------------------


class Peft:
    """PEFT's MultitaskPromptTuning, with prompts only in the encoder as in ours.

    Args:
        config: the backbone; its dtype is the dtype of the weights. Prompts are float32.
        prompt_length: P.
        num_tasks: K.
        device: torch's name of the device.
        fused: whether to use torch's fused attention and compile the model; transformers' T5 does
            neither by default.
    """

    def __init__(
        self,
        config: T5Config,
        prompt_length: int,
        num_tasks: int,
        device: str = "cpu",
        fused: bool = False,
    ):
        # Otherwise transformers also imports TensorFlow, which needs memory.
        os.environ["USE_TF"] = "0"
        import torch
        from peft import MultitaskPromptTuningConfig, TaskType, get_peft_model
        from transformers import T5ForConditionalGeneration

        torch.manual_seed(0)
        self.torch, self.device = torch, device
        backbone = T5ForConditionalGeneration(hugging_face(config))
        model = get_peft_model(
            backbone.to(getattr(torch, config.dtype.name)),
            MultitaskPromptTuningConfig(
                task_type=TaskType.SEQ_2_SEQ_LM,
                num_tasks=num_tasks,
                num_virtual_tokens=prompt_length,
                num_transformer_submodules=1,
            ),
        )
        self.model = model.to(device).train()
        self.learned = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=RATE, weight_decay=1e-5)
        if fused:
            from benchmarks import fused_t5

            fused_t5.fuse_attention(backbone)
            # Beyond the limit, torch would run the rest uncompiled, and only log it.
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            self.model = torch.compile(self.model, dynamic=True)
        self._last: Any = None

    def step(self, batch: Mapping[str, np.ndarray]) -> None:
        """Runs one step."""
        self.optimizer.zero_grad()
        self._last = self.model(**self.inputs(batch)).loss
        self._last.backward()
        self.torch.nn.utils.clip_grad_norm_(self.learned, CLIP)
        self.optimizer.step()

    def inputs(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Converts an unpacked batch to the arguments of PEFT's model."""
        slots = batch["encoder_prompt_slots"][0]
        text = batch["encoder_input_tokens"][:, int((slots > 0).sum()) :]
        labels = np.where(batch["decoder_loss_weights"], batch["decoder_target_tokens"], IGNORED)
        arrays = {
            "input_ids": text,
            "attention_mask": text != 0,
            "labels": labels,
            "task_ids": batch["encoder_task_ids"][:, 0],
        }
        return {
            name: self.torch.as_tensor(x, dtype=self.torch.long, device=self.device)
            for name, x in arrays.items()
        }

    def wait(self) -> None:
        """Returns when all steps are computed."""
        if self.device != "cpu":
            self.torch.cuda.synchronize()

    def loss(self) -> float:
        """Returns the cross entropy of the last step.

        Raises:
            FloatingPointError: it is not finite.
        """
        found = float(self._last.detach())
        if not np.isfinite(found):
            raise FloatingPointError(f"PEFT's loss is {found}, which is not finite.")
        return found

    def peak_mib(self) -> float:
        """Returns the peak memory of the process or of the accelerator, in MiB."""
        if self.device == "cpu":
            return contest.peak_mib()
        return self.torch.cuda.max_memory_allocated() / 2**20


def hugging_face(config: T5Config) -> Any:
    """Returns the same shape as a transformers configuration."""
    from transformers import T5Config as TheirConfig

    from mpt_jax.convert import hf

    # The cache is only for decoding; without it a step is slightly cheaper.
    return TheirConfig(**hf.config_to_hf(config), use_cache=False)
