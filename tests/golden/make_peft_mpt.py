"""Writes peft_mpt.npz: multitask prompts as PEFT's own module composes them.

Needs the `parity` extra: `python tests/golden/make_peft_mpt.py`.
"""

from pathlib import Path

import numpy as np

P, H, K = 5, 6, 3
TASK_IDS = np.array([2, 0, 1, 2])


def compose(shared: np.ndarray, left: np.ndarray, right: np.ndarray, task_ids: np.ndarray):
    """PEFT's prompts [B, P, H] of tasks [B] from P* [P, H], factors [K, P, R] and [K, R, H]."""
    import torch
    from peft import MultitaskPromptTuningConfig, TaskType
    from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

    settings = MultitaskPromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_tasks=left.shape[0],
        num_ranks=left.shape[2],
        num_virtual_tokens=shared.shape[0],
        num_transformer_submodules=1,
        token_dim=shared.shape[1],
        prompt_tuning_init="RANDOM",
    )
    module = MultitaskPromptEmbedding(settings, torch.nn.Embedding(1, shared.shape[1]))
    state = {"embedding.weight": shared, "prefix_task_cols": left, "prefix_task_rows": right}
    module.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    positions = torch.arange(shared.shape[0])[None].repeat(len(task_ids), 1)
    with torch.no_grad():
        return module(positions, torch.tensor(task_ids)).numpy()


def numbers(rank: int) -> dict[str, np.ndarray]:
    """P* and factors of a rank, at random."""
    rng = np.random.default_rng(rank)
    shapes = {"shared": (P, H), "left": (K, P, rank), "right": (K, rank, H)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


if __name__ == "__main__":
    arrays = {"task_ids": TASK_IDS}
    for rank in (1, 3):
        given = numbers(rank)
        found = compose(**given, task_ids=TASK_IDS)
        arrays |= {f"rank{rank}/{name}": value for name, value in given.items()}
        arrays[f"rank{rank}/prompts"] = found
    np.savez(Path(__file__).with_name("peft_mpt.npz"), **arrays)
