"""What transformers calls the tensors of a checkpoint."""

from __future__ import annotations

from pipeline.model.checkpoint_config import CheckpointConfig
from pipeline.model.tensor_places import TensorPlaces
from pipeline.weights.safetensors import SafetensorsWeights

# The attribute by which transformers' language models hold their base model, by what that calls its
# blocks. Published checkpoints may leave it out, but the names of quantized modules may not.
_BASE_MODELS = {"layers": "model", "encoder.layers": "model", "h": "transformer"}


def tensor_names(
    config: CheckpointConfig, places: TensorPlaces, *, generates: bool
) -> dict[str, str]:
    """What transformers calls each tensor of a checkpoint, by KerasHub's name.

    KerasHub's converters leave out the base model's name within its task where published
    checkpoints differ in it.

    Args:
        generates: whether the checkpoint is a language model; if not, it is a base model.
    """
    own = list(places.tensors)
    if not generates:
        # A base model: nothing encloses it.
        base = f"{config.content['model_type']}."
        return {name: name.removeprefix(base) for name in own}
    found = {name: name for name in own}
    if config.has_tensors:
        known = SafetensorsWeights(config.folder).tensor_names
        for name in own:
            ends = (one for one in known if one == name or one.endswith(f".{name}"))
            found[name] = min(ends, key=len, default=name)
    for blocks, base in _BASE_MODELS.items():
        if any(full.startswith(f"{blocks}.") for full in found.values()):
            head = "lm_head."
            found = {
                name: full if full.startswith(head) else f"{base}.{full}"
                for name, full in found.items()
            }
    return found
