"""Greedy decoding compared with generate() of transformers and PEFT, which take turns.

    python -m benchmarks.predict [--repeats 7] [--out docs/benchmarks/predict.json]

T5-small shape, the same random weights and prompts for all, float32; B = 16, 100 prompt and 64 text
positions, 16 decoded tokens, no end of sequence. Each contestant has a separate process with all
cores. A turn is one batch.

    mpt_jax        six tasks in every batch, from a bank of MPT's factors
    peft           the same tasks with MultitaskPromptTuning and its generate()
    transformers   the same prompts, materialized in advance, with inputs_embeds and generate()

All contestants must decode the same ids, otherwise the benchmark fails. Weights are scaled so that
the ids depend on the text. PEFT and transformers need the `parity` extra.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import contest, figures
from mpt_jax.runtime import malloc

B, P, TEXT, L, K = 16, 100, 64, 16, 6
CONTESTANTS = ("mpt_jax", "peft", "transformers")
INPUTS = "inputs.npz"
# Factors for random embeddings and queries. With sharper attention, rounding changes ids: at 16,
# two of 16 rows differed.
SMALL, SHARP = 0.05, 6.0


def prepare(folder: Path, model: str) -> None:
    """Writes a T5 with random weights, prompts and texts for all contestants."""
    import jax

    from mpt_jax.backbones.t5 import Transformer, t5_config
    from mpt_jax.convert import save_hf
    from mpt_jax.core.tree import flatten, unflatten

    config = t5_config(model)
    tokens = np.ones((1, 2), np.int32)
    made = jax.jit(Transformer(config).init)(jax.random.PRNGKey(0), tokens, tokens > 0, tokens)
    # A random T5 repeats the last token, whose embedding dominates all layers, and its attention is
    # uniform.
    scales = {"embedding": SMALL, "query": SHARP}
    leaves = {
        name: leaf * math.prod(x for part, x in scales.items() if part in name.split("/"))
        for name, leaf in flatten(made["params"]).items()
    }
    save_hf(folder / "backbone", config, unflatten(leaves))
    rng = np.random.default_rng(0)
    np.savez(
        folder / INPUTS,
        text=rng.integers(3, config.vocab_size, (B, TEXT)).astype(np.int32),
        tasks=(np.arange(B) % K).astype(np.int32),
        shared=rng.normal(0, SMALL, (1, P, config.emb_dim)).astype(np.float32),
        left=rng.normal(1, 0.3, (K, P, 1)).astype(np.float32),
        right=rng.normal(1, 0.3, (K, 1, config.emb_dim)).astype(np.float32),
    )


def ours(folder: Path) -> contest.Work:
    """Returns a turn of the function that `mpt-jax predict` compiles."""
    import jax

    from mpt_jax.artifacts.artifacts import Artifact
    from mpt_jax.convert import load_hf
    from mpt_jax.core.runs import Runs
    from mpt_jax.prompts.mpt import MPT
    from mpt_jax.serving.predict.compiled import Functions
    from mpt_jax.serving.prompt_bank import Bank

    class NoEnd:
        eos_id = -1

    config, params = load_hf(folder / "backbone")
    given = np.load(folder / INPUTS)
    factors = {name: given[name] for name in ("shared", "left", "right")}
    prompts = {"shared": factors["shared"], "task_left": factors["left"]}
    prompts["task_right"] = factors["right"]
    said = {"embedding_sha256": "random", "vocabulary_sha256": None}
    runs = Runs([f"task_{k}" for k in range(K)])
    bank = Bank([Artifact("memory", MPT(P), runs, prompts, said)])
    predict = jax.jit(Functions(config, bank.method, L, NoEnd()).predict)
    params = jax.device_put(params)
    malloc.keep_freed_memory()

    def run() -> np.ndarray:
        return np.asarray(predict(params, bank.arrays, given["text"], given["tasks"])[0])

    return contest.Work(run)


def theirs(folder: Path, peft: bool) -> contest.Work:
    """Returns a turn of generate(), with PEFT's MPT or with prompts prepended to the embeddings."""
    import torch
    from transformers import T5ForConditionalGeneration

    model: Any = T5ForConditionalGeneration.from_pretrained(folder / "backbone").eval()
    model.generation_config.eos_token_id = None
    given = {name: torch.as_tensor(value) for name, value in np.load(folder / INPUTS).items()}
    text, mask = given["text"].long(), torch.ones((B, TEXT), dtype=torch.long)
    settings = {"max_new_tokens": L, "do_sample": False, "num_beams": 1}
    if peft:
        model = _with_peft(model, given)
        inputs = {"input_ids": text, "attention_mask": mask, "task_ids": given["tasks"].long()}
    else:
        prompts = given["shared"] * (given["left"] @ given["right"])
        prompts = prompts[given["tasks"].long()]
        embedded = torch.cat([prompts, model.get_input_embeddings()(text)], 1).detach()
        inputs = {"inputs_embeds": embedded, "attention_mask": torch.ones(embedded.shape[:2])}
    malloc.keep_freed_memory()  # as for ours

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model.generate(**inputs, **settings)[:, 1:].numpy()

    return contest.Work(run)


def _with_peft(model: Any, given: dict[str, Any]) -> Any:
    import torch
    from peft import MultitaskPromptTuningConfig, TaskType, get_peft_model

    config = MultitaskPromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_tasks=K,
        num_virtual_tokens=P,
        num_transformer_submodules=1,
    )
    model = get_peft_model(model, config).eval()
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(given["shared"][0])
        encoder.prefix_task_cols.copy_(given["left"])
        encoder.prefix_task_rows.copy_(given["right"])
    return model


def serve(name: str, folder: Path) -> None:
    """Runs a contestant, and saves the ids it decodes in the folder."""

    def prepared() -> contest.Work:
        work = ours(folder) if name == "mpt_jax" else theirs(folder, peft=name == "peft")
        np.save(folder / f"{name}.npy", work.run())
        return work

    contest.serve(prepared)


def check_equal(folder: Path) -> int:
    """Returns the number of distinct decoded ids.

    Raises:
        ValueError: contestants decoded different ids.
    """
    decoded = {name: np.load(folder / f"{name}.npy") for name in CONTESTANTS}
    first = decoded[CONTESTANTS[0]]
    for name, ids in decoded.items():
        if ids.shape != first.shape:
            raise ValueError(
                f"{name} decoded ids of shape {ids.shape}, but {CONTESTANTS[0]} decoded ids of "
                f"shape {first.shape}."
            )
        if rows := np.flatnonzero((ids != first).any(1)).tolist():
            raise ValueError(f"{name} and {CONTESTANTS[0]} decoded different ids in rows {rows}.")
    return len(np.unique(first))


def main() -> None:
    """Prints a table, and writes the figures to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", default="t5_1_0_small", help="default: %(default)s")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        prepare(args.folder, args.model)
        return
    if args.serve:
        serve(args.serve, args.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a separate process, because a child's peak memory starts at its parent's.
        child = [sys.executable, "-m", "benchmarks.predict", "--prepare", "--folder", scratch]
        subprocess.run([*child, "--model", args.model], check=True)
        commands = {
            name: ["benchmarks.predict", "--serve", name, "--folder", scratch]
            for name in CONTESTANTS
        }
        found = contest.compare(commands, args.repeats)
        different = check_equal(folder)
    for row in found.values():
        row["examples_a_second"] = B / row["median_seconds"]
    rows = [
        (name, row["median_seconds"], row["examples_a_second"], row["peak_mib"])
        for name, row in found.items()
    ]
    print(figures.table(("", "seconds a batch", "examples a second", "peak MiB"), rows))
    ours_seconds = found["mpt_jax"]["median_seconds"]
    ratios = {
        f"time, ours / {name}": ours_seconds / found[name]["median_seconds"]
        for name in CONTESTANTS[1:]
    }
    record = {"repeats": args.repeats, "model": args.model, **figures.machine()}
    record |= {"different_ids_decoded": different, "contestants": found, "ratios": ratios}
    figures.write(record, args.out)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x")


if __name__ == "__main__":
    main()
