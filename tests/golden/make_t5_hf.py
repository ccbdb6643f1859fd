"""Writes t5_hf_<version>.npz: weights, inputs and outputs of Hugging Face's T5, float32.

Three tiny random models: one like T5 1.0, one like T5 1.1, and one like umT5. Arrays
named `weight:*` are the state dict, `config` is config.json. Needs torch and transformers:
`python tests/golden/make_t5_hf.py [VERSION ...]`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

VERSIONS = {
    "1_0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
CLASSES = {"umt5": (UMT5Config, UMT5ForConditionalGeneration)}
SHAPE = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 5,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
}
GREEDY_STEPS = 8
SEEDS = {"1_0": 9, "1_1": 1, "umt5": 1}  # whose greedy outputs are not the same token over and over


def random_model(version: str, seed: int) -> PreTrainedModel:
    """Weights large enough that attention is far from uniform and every part matters."""
    torch.manual_seed(seed)
    make_config, make_model = CLASSES.get(version, (T5Config, T5ForConditionalGeneration))
    fields = {**SHAPE, **VERSIONS[version], "dropout_rate": 0.0, "decoder_start_token_id": 0}
    model = make_model(make_config(**fields)).eval()
    for name, weight in model.named_parameters():
        if "layer_norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        else:
            torch.nn.init.normal_(weight, std=1.0 if "shared" in name else 0.3)
    return model


def padded_inputs(seed: int) -> dict[str, torch.Tensor]:
    """Rows of 24, 17 and 3 tokens in a batch 24 wide; more positions than T5's exact buckets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 32, (3, 24), generator=generator)
    mask = torch.arange(24)[None] < torch.tensor([24, 17, 3])[:, None]
    targets = torch.randint(2, 32, (3, 7), generator=generator)
    targets = torch.cat([torch.zeros(3, 1, dtype=torch.long), targets], dim=1)
    return {"tokens": tokens * mask, "mask": mask, "decoder_tokens": targets}


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict) -> dict[str, torch.Tensor]:
    result = model(
        input_ids=inputs["tokens"],
        attention_mask=inputs["mask"].long(),
        decoder_input_ids=inputs["decoder_tokens"],
        output_hidden_states=True,
    )
    greedy = model.generate(
        input_ids=inputs["tokens"],
        attention_mask=inputs["mask"].long(),
        max_new_tokens=GREEDY_STEPS,
        do_sample=False,
        num_beams=1,
        use_cache=False,
    )
    return {
        "logits": result.logits,
        "encoder_hidden": torch.stack(result.encoder_hidden_states),
        "decoder_hidden": torch.stack(result.decoder_hidden_states),
        "greedy": greedy[:, 1:],
    }


def main() -> None:
    for version in sys.argv[1:] or VERSIONS:
        model, inputs = random_model(version, SEEDS[version]), padded_inputs(SEEDS[version])
        arrays = {**inputs, **outputs(model, inputs)}
        arrays |= {f"weight:{name}": x.detach() for name, x in model.state_dict().items()}
        arrays = {name: x.contiguous().numpy() for name, x in arrays.items()}
        path = Path(__file__).with_name(f"t5_hf_{version}.npz")
        np.savez_compressed(path, config=np.array(model.config.to_json_string()), **arrays)
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
