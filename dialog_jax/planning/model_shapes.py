"""The structure of a model by its name or path, from its config.json alone; no weights are read or downloaded."""

import pathlib

import huggingface_hub

from dialog_jax.errors import UserError
from dialog_jax.model import hf_config, pretrained, tensor_files
from dialog_jax.model.decoder_config import DecoderConfig

_SHAPES = pathlib.Path(__file__).parent / "shapes"


def load_shape(name: str) -> DecoderConfig:
    """Returns the shape of a model: of a local directory or file, of planning/shapes, or of config.json on the Hub.

    Raises:
      UserError: there is no such model, or its family is not supported.
    """
    path = pathlib.Path(name).expanduser()
    if path.exists():
        return pretrained.load_config(path)
    file = _SHAPES / f"{path.name}.json"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in _SHAPES.glob("*.json")))
        try:
            file = pathlib.Path(huggingface_hub.hf_hub_download(name, "config.json"))
        except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
            raise UserError(
                f"model {name!r} is no local directory or file and none of the known shapes {known}, and its "
                f"config.json could not be loaded from the Hugging Face Hub ({type(error).__name__}). Check the name."
            ) from error
    return hf_config.from_json(file, tensor_files.read_json(file))
