"""Writes clip_hf_<activation>.npz and clip_hf_names.json from Hugging Face's CLIP.

The first are weights, inputs and outputs of tiny random models, float32. Arrays named `weight:*`
are the state dict, `config` is config.json. The second has the names and shapes of the tensors of
two published models, which need no weights. Needs torch and transformers:
`python tests/golden/make_clip_hf.py`.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

# All widths differ, so that no transpose can hide.
GOLDEN_SHAPE = {
    "projection_dim": 10,
    "text_config": {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 4,
    },
}
# activation -> the eos_token_id in the config. 2 makes transformers use the largest id.
GOLDENS = {"quick_gelu": 2, "gelu": 30}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BASE = {
    "projection_dim": 512,
    "text_config": {},
    "vision_config": {"patch_size": 16},
}
LARGE = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}


def config_of(shape: dict, activation: str, eos: int) -> CLIPConfig:
    shared = {"hidden_act": activation}
    return CLIPConfig(
        projection_dim=shape["projection_dim"],
        text_config={**shape["text_config"], **shared, "eos_token_id": eos},
        vision_config={**shape["vision_config"], **shared},
        attn_implementation="eager",
    )


def random_model(shape: dict, activation: str, eos: int, seed: int) -> CLIPModel:
    """Weights large enough that attention is far from uniform; norms and biases are random too,
    since transformers initializes them to ones and zeros, which would hide a missing one."""
    torch.manual_seed(seed)
    model = CLIPModel(config_of(shape, activation, eos)).eval()
    for name, weight in model.named_parameters():
        if name == "logit_scale":
            torch.nn.init.constant_(weight, 1.5)
        elif "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(weight, 1.0, 0.1)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
        elif "layers" in name:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
        else:
            torch.nn.init.normal_(weight, std=0.5 if "embedding" in name else 0.2)
    return model


def random_inputs(model: CLIPModel, seed: int) -> dict[str, torch.Tensor]:
    """Images, and texts that end at other positions; one has a second end, one a larger id."""
    generator = torch.Generator().manual_seed(seed)
    text, size = model.config.text_config, model.config.vision_config.image_size
    largest = text.eos_token_id == 2
    end = text.vocab_size - 1 if largest else text.eos_token_id
    length = text.max_position_embeddings
    tokens = torch.randint(3, end, (4, length), generator=generator)
    for row, position in enumerate((length - 1, 5, 3, 7)):
        tokens[row, position] = end
        tokens[row, position + 1 :] = 0
    tokens[2, 6] = end
    if not largest:
        tokens[3, 2] = text.vocab_size - 1
    images = torch.randint(0, 256, (3, size, size, 3), generator=generator, dtype=torch.uint8)
    eot = tokens.argmax(-1) if largest else (tokens == end).int().argmax(-1)
    return {"tokens": tokens, "images": images, "eot": eot}


@torch.no_grad()
def outputs(model: CLIPModel, inputs: dict) -> dict[str, torch.Tensor]:
    pixels = (inputs["images"].float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    pixels = pixels.permute(0, 3, 1, 2)
    result = model(input_ids=inputs["tokens"], pixel_values=pixels, output_hidden_states=True)
    return {
        "image_hidden": torch.stack(result.vision_model_output.hidden_states),
        "text_hidden": torch.stack(result.text_model_output.hidden_states),
        "image_features": model.get_image_features(pixels),
        "text_features": model.get_text_features(inputs["tokens"]),
        "logits": result.logits_per_image,
    }


def names_and_shapes(shape: dict) -> dict[str, list[int]]:
    """The tensors that transformers writes, from a model without values."""
    with torch.device("meta"):
        model = CLIPModel(config_of(shape, "quick_gelu", 2))
    return {name: list(x.shape) for name, x in model.state_dict().items()}


def main() -> None:
    for activation, eos in GOLDENS.items():
        model = random_model(GOLDEN_SHAPE, activation, eos, seed=1)
        inputs = random_inputs(model, seed=1)
        arrays = {**inputs, **outputs(model, inputs)}
        arrays |= {f"weight:{name}": x.detach() for name, x in model.state_dict().items()}
        arrays = {name: x.contiguous().numpy() for name, x in arrays.items()}
        path = Path(__file__).with_name(f"clip_hf_{activation}.npz")
        np.savez_compressed(path, config=np.array(model.config.to_json_string()), **arrays)
        print(path, path.stat().st_size)
    published = {"clip_vit_b16": names_and_shapes(BASE), "clip_vit_l14": names_and_shapes(LARGE)}
    rows = {
        name: "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(x.items()))
        for name, x in published.items()
    }
    content = ",\n".join(f"{json.dumps(name)}: {text}\n}}" for name, text in rows.items())
    Path(__file__).with_name("clip_hf_names.json").write_text("{\n" + content + "\n}\n")
    print({name: len(x) for name, x in published.items()})


if __name__ == "__main__":
    main()
