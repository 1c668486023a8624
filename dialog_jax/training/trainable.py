"""What a run trains: its config and the model's structure in, the trained and the frozen parameters out.

Full fine-tuning trains everything. `freeze` and `train_only` divide the model's own parameters by their paths; LoRA
freezes all of them and trains factors beside them (see `model.adapters`); a soft prompt freezes all of them and is
trained itself (see `model.soft_prompts`), alone or together with LoRA.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dialog_jax.errors import UserError
from dialog_jax.model import adapters, decoder, parameter_trees, quantization, soft_prompts, tensor_names
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.peft_reading import Adapter
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.training.config import TrainConfig

_ZERO_FACTOR_SCALE = 0.02  # of random numbers in place of zeros


class Parameters(NamedTuple):
    """Two nested dicts that share no path, of arrays or of their shapes."""

    trained: dict[str, Any]
    frozen: dict[str, Any]


class Selection(NamedTuple):
    """Which parameters of a model are trained, and which have a low-rank update."""

    model: DecoderConfig
    trained_paths: frozenset[str]
    """Of the model's own parameters."""
    scales: adapters.Scales
    """Of LoRA; empty without."""
    frozen_dtype: np.dtype
    """Of frozen matrices that are not quantized. Norms and biases stay float32."""
    soft_prompt: SoftPromptConfig
    frozen_kind: str = ""
    """Of `model.quantization`, for the frozen matrices of the layers but those of experts; empty if not quantized."""

    def dtype(self, path: str) -> np.dtype:
        """Returns the type of one of the model's own parameters."""
        is_matrix = path in adapters.list_modules(self.model)
        return self.frozen_dtype if is_matrix and path not in self.trained_paths else np.dtype(np.float32)

    def find_kind(self, path: str) -> str:
        """Returns the kind of `model.quantization` of one of the model's own parameters; empty if not quantized."""
        is_quantizable = path in adapters.list_quantizable(self.model) and path not in self.trained_paths
        return self.frozen_kind if is_quantizable else ""


def select(
    config: TrainConfig, model: DecoderConfig, compute_dtype: jax.typing.DTypeLike, adapter: Adapter | None = None
) -> Selection:
    """Returns what `config` trains.

    Args:
      adapter: the content of `config.adapter`, or what a loaded model has in its place; None if there is none.

    Raises:
      UserError: a pattern or target matches nothing, a rank is too large, nothing would be trained, no matrix that is
        to be quantized is frozen, or there is dropout with experts.
    """
    paths = sorted(parameter_trees.flatten(decoder.abstract_parameters(model)))
    assert adapter or not config.adapter, config.adapter
    scales = adapters.find_scales(model, config.lora) if config.lora.rank else {}
    soft_prompt = config.soft_prompt
    if adapter:
        scales = adapter.scales
        if adapter.soft_prompt is not None:
            soft_prompt = SoftPromptConfig(tokens=len(adapter.soft_prompt))
    if config.lora.dropout and scales.keys() & set(tensor_names.EXPERT_MATRICES):
        raise UserError(
            f"lora.dropout is {config.lora.dropout}, and matrices of experts are adapted, for which it is not "
            "supported, as in PEFT. Set it to 0, or name other lora.targets."
        )
    trained = set() if scales or soft_prompt.tokens else set(paths)
    if config.freeze:
        trained -= _find(config.freeze, "freeze", paths)
    if config.train_only:
        trained &= _find(config.train_only, "train_only", paths)
    if not trained and not scales and not soft_prompt.tokens:
        raise UserError(f"freeze is {', '.join(config.freeze)}: nothing is left to train. Freeze less.")
    if config.frozen_dtype not in quantization.KINDS:
        dtype = jnp.dtype(compute_dtype if config.frozen_dtype == "auto" else config.frozen_dtype)
        return Selection(model, frozenset(trained), scales, dtype, soft_prompt)
    dtype = jnp.dtype(jnp.bfloat16)
    selection = Selection(model, frozenset(trained), scales, dtype, soft_prompt, config.frozen_dtype)
    if not any(map(selection.find_kind, paths)):
        raise UserError(
            f"frozen_dtype is {config.frozen_dtype}, but no matrix of a layer is frozen, and only those are quantized. "
            "Set lora.rank, freeze layers, or leave frozen_dtype at auto."
        )
    return selection


def select_all(model: DecoderConfig) -> Selection:
    """Returns the selection of full fine-tuning."""
    paths = parameter_trees.flatten(decoder.abstract_parameters(model))
    return Selection(model, frozenset(paths), {}, np.dtype(np.float32), SoftPromptConfig())


def find_rate_ratios(config: TrainConfig, selection: Selection) -> dict[str, float]:
    """Returns what multiplies the learning rate of parameters, by the last part of their paths."""
    if not selection.scales:
        return {}
    ratios = {"lora_b": config.lora.learning_rate_ratio}
    if selection.soft_prompt.tokens:
        ratios[decoder.SOFT_PROMPT] = config.soft_prompt.learning_rate_ratio
    return ratios


def _find(patterns: Sequence[str], field: str, paths: Sequence[str]) -> set[str]:
    """Returns the paths that match one of the patterns."""
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(paths, pattern)
        if not matches:
            raise UserError(f"{field} has {pattern!r}, which matches none of {', '.join(paths)}.")
        found.update(matches)
    return found


def abstract_parameters(selection: Selection) -> Parameters:
    """Returns the parameters as `jax.ShapeDtypeStruct`."""
    flat: dict[str, Any] = {}
    for path, leaf in parameter_trees.flatten(decoder.abstract_parameters(selection.model)).items():
        kind = selection.find_kind(path)
        flat[path] = (
            quantization.abstract_quantized(kind, leaf.shape)
            if kind
            else jax.ShapeDtypeStruct(leaf.shape, selection.dtype(path))
        )
    added = adapters.abstract_factors(selection.model, selection.scales)
    if tokens := selection.soft_prompt.tokens:
        added[decoder.SOFT_PROMPT] = jax.ShapeDtypeStruct((tokens, selection.model.width), jnp.float32)
    scales = {path: jax.ShapeDtypeStruct(scale.shape, scale.dtype) for path, scale in selection.scales.items()}
    return _divide(selection, parameter_trees.unflatten(flat), added, scales)


def make_parameters(
    selection: Selection,
    base: dict[str, Any],
    key: jax.Array,
    place: Callable[[str, Any], jax.Array] = lambda path, array: jnp.asarray(array),
    *,
    soft_prompt_text: Sequence[int] = (),
    adapter: Adapter | None = None,
) -> Parameters:
    """Returns the parameters before training.

    Args:
      base: the model's own, of the types and kinds that the selection says.
      key: for the initial factors of LoRA and the initial soft prompt.
      place: (path, array) to the array where it belongs.
      soft_prompt_text: tokens of `soft_prompt.text`.
      adapter: that training continues; None to start a new one.

    Raises:
      UserError: the soft prompt is to start from a text that has no tokens.
    """
    factors = adapter.factors if adapter else adapters.init_factors(selection.model, selection.scales, key)
    added = parameter_trees.flatten(factors)
    if adapter and adapter.soft_prompt is not None:
        added[decoder.SOFT_PROMPT] = adapter.soft_prompt
    elif selection.soft_prompt.tokens:
        prompt = soft_prompts.init_soft_prompt(
            selection.soft_prompt, base["embedding"], soft_prompt_text, jax.random.fold_in(key, len(selection.scales))
        )
        model = selection.model  # virtual tokens begin as what the first layer sees of words
        added[decoder.SOFT_PROMPT] = prompt if model.scales_soft_prompt else prompt * model.embedding_scale
    placed = parameter_trees.unflatten({path: place(path, leaf) for path, leaf in added.items()})
    scales = {path: place(f"{path}/{adapters.SCALE}", scale) for path, scale in selection.scales.items()}
    return _divide(selection, base, placed, scales)


def divide(
    config: TrainConfig, model: DecoderConfig, parameters: dict[str, Any], soft_prompt_text: Sequence[int] = ()
) -> Parameters:
    """Returns the parameters of a loaded model, divided as training would divide them, at a point with a full gradient.

    Of a model with an adapter, that is trained; otherwise what `config` says, with new factors and a new soft prompt if
    it asks for them. Factors that are zero are drawn at random, since the gradient of one is a product with the other.
    Frozen matrices get the type that `config.frozen_dtype` says.

    Args:
      parameters: float32.
      soft_prompt_text: tokens of `soft_prompt.text`.

    Raises:
      UserError: what `select` or `make_parameters` raise.
    """
    flat = parameter_trees.flatten(parameters)
    suffix = f"/{adapters.SCALE}"
    scales = {path.removesuffix(suffix): np.asarray(leaf) for path, leaf in flat.items() if path.endswith(suffix)}
    prompt = flat.get(decoder.SOFT_PROMPT)
    adapter = Adapter(scales, {}, prompt) if scales or prompt is not None else None
    selection = select(config, model, jnp.float32, adapter)
    if adapter:
        parts = Parameters(*parameter_trees.split(parameters, _is_added))
    else:
        parts = make_parameters(selection, parameters, jax.random.key(0), soft_prompt_text=soft_prompt_text)
    trained = parameter_trees.flatten(parts.trained)
    for number, (path, leaf) in enumerate(sorted(trained.items())):
        if _is_added(path) and not leaf.any():
            drawn = jax.random.normal(jax.random.key(number), leaf.shape, leaf.dtype)
            trained[path] = _ZERO_FACTOR_SCALE * drawn
    return Parameters(parameter_trees.unflatten(trained), _convert_frozen(selection, parts.frozen))


def _convert_frozen(selection: Selection, frozen: dict[str, Any]) -> dict[str, Any]:
    """Returns frozen parameters, float32, in the types and kinds that the selection says."""
    converted = {}
    for path, leaf in parameter_trees.flatten(frozen).items():
        own = path.removesuffix("/weight")
        if path.endswith(f"/{adapters.SCALE}"):
            converted[path] = leaf
        elif kind := selection.find_kind(own):
            layers = [quantization.quantize(kind, np.asarray(layer))[0] for layer in leaf]
            for name in layers[0]:
                converted[f"{path}/{name}"] = jnp.stack([layer[name] for layer in layers])
        else:
            converted[path] = leaf.astype(selection.dtype(own))
    return parameter_trees.unflatten(converted)


def _is_added(path: str) -> bool:
    """Returns whether a parameter is a part of an adapter or a soft prompt, and not one of the model's own."""
    return path.rpartition("/")[2] in (*adapters.TRAINED, decoder.SOFT_PROMPT)


def _divide(selection: Selection, base: dict[str, Any], added: dict[str, Any], scales: Mapping[str, Any]) -> Parameters:
    trained, frozen = parameter_trees.split(base, lambda path: path in selection.trained_paths)
    return Parameters(parameter_trees.merge(trained, added), adapters.attach_scales(frozen, scales))


def describe(selection: Selection) -> list[str]:
    """Returns lines that say how many numbers are trained and frozen, and where: one line for each path."""
    parameters = abstract_parameters(selection._replace(frozen_kind=""))  # whose sizes are those of the matrices
    lines = []
    for part, tree in zip(("trained", "frozen"), parameters, strict=True):
        leaves = parameter_trees.flatten(tree).items()
        flat = {path.removesuffix("/weight"): leaf for path, leaf in leaves if not path.endswith(f"/{adapters.SCALE}")}
        if not flat:
            continue
        lines.append(f"{part}: {sum(leaf.size for leaf in flat.values()):,} parameters")
        for path, leaf in sorted(flat.items()) if parameters.frozen else ():
            kind = selection.find_kind(path) or leaf.dtype
            lines.append(f"  {path} {'x'.join(map(str, leaf.shape))} {kind}")
    return lines
