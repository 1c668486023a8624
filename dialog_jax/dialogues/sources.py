"""Files and hub data sets to records, one at a time, each with its place for errors.

Knows file formats, and nothing of dialogues.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dialog_jax.dialogues import json_files
from dialog_jax.errors import UserError

_PARQUET_BATCH = 256  # records held in memory at once


def read_records(source: str | pathlib.Path, *, split: str) -> Iterator[tuple[str, Any]]:
    """Returns an iterator over (place for errors, such as "train.jsonl:413"; record).

    A line that is not JSON is a `UserError` in place of its record.

    Args:
      source: a `.jsonl`, `.ndjson`, `.json` (a list of records, or one) or `.parquet` file, all but the last also
        compressed; otherwise a directory or Hugging Face hub name that the optional package `datasets` reads.
      split: which split of a data set; files have none.

    Raises:
      UserError: the file is missing or has an unknown suffix; while reading: its content is not what its suffix says.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _dataset_records(str(source), path, split)
    name = path.name.lower()
    for compression in json_files.COMPRESSIONS:
        name = name.removesuffix(compression)
    is_compressed = name != path.name.lower()
    suffix = pathlib.PurePath(name).suffix
    readers: dict[str, Callable[[pathlib.Path], Iterator[tuple[str, Any]]]] = {
        **dict.fromkeys(json_files.LINES, json_files.read_lines),
        ".json": json_files.read_list,
    }
    if not is_compressed:
        readers[".parquet"] = _parquet_records
    if suffix in readers:
        if not path.is_file():
            raise UserError(
                f"{path.name}: no such file. Check the path; relative paths start at the working directory."
            )
        return readers[suffix](path)
    if path.is_file():
        ending = suffix * is_compressed + path.suffix or "nothing"
        raise UserError(
            f"{path.name}: got a file that ends in {ending}; dialogues are read from {', '.join(readers)}, all but "
            f"Parquet also compressed as {', '.join(json_files.COMPRESSIONS)}, a directory or a hub data set. Convert "
            "or decompress it, or rename it to what it is."
        )
    return _dataset_records(str(source), path, split)


def _parquet_records(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path.name}: reading Parquet needs pyarrow. Run: pip install pyarrow") from None
    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH):
                for record in batch.to_pylist():
                    yield f"{path.name}[{index}]", record
                    index += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"damaged after {index:,} records" if index else "not a Parquet file"
        raise UserError(f"{path.name}: {what} ({error}). Write it again, or rename it.") from None


def _dataset_records(source: str, path: pathlib.Path, split: str) -> Iterator[tuple[str, Any]]:
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not path.is_dir():
        raise UserError(
            f"{path.name}: no such file or directory. Check the path; relative paths start at the working directory, "
            "and a hub data set is written owner/name."
        )
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path.name}: got a directory or hub name, which the package datasets reads, and it is not installed. "
            "Run: pip install datasets; or give a .jsonl, .json or .parquet file."
        ) from None
    if path.is_dir():
        _check_inside(path)
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            stored = datasets.load_from_disk(str(path))
            rows = stored[split] if isinstance(stored, Mapping) else stored
        else:
            rows = datasets.load_dataset(source, split=split, streaming=True)
    except KeyError:
        raise UserError(f"{path.name}: has no split {split!r}; it has {', '.join(stored)}. Name one of them.") from None
    except (FileNotFoundError, ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path.name}: split {split!r} could not be opened as a data set ({error}). Check name, split and network."
        ) from None
    for index, record in enumerate(rows):
        yield f"{path.name}[{index}]", record


def _check_inside(directory: pathlib.Path) -> None:
    """Raises UserError if a data set's directory refers to a file outside it that `datasets` would read.

    Names are checked, not links: in the cache of the Hub, the files of a directory are links to files elsewhere.
    """
    import huggingface_hub
    import yaml  # huggingface_hub reads cards with it

    references: list[tuple[pathlib.Path, Any]] = []
    try:
        for state in sorted(directory.rglob("state.json")):
            references += [
                (state, entry["filename"]) for entry in json.loads(state.read_bytes()).get("_data_files", [])
            ]
        for stored in sorted(directory.rglob("dataset_dict.json")):
            references += [(stored, name) for name in json.loads(stored.read_bytes()).get("splits", [])]
        card = directory / "README.md"
        configs = (huggingface_hub.metadata_load(card) or {}).get("configs", []) if card.is_file() else []
        for config in configs:
            references += [(card, name) for name in _list_patterns([config.get("data_files"), config.get("data_dir")])]
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{directory.name}: its dataset_dict.json, state.json or README.md cannot be read as a data set's "
            f"({error}). Save it again."
        ) from None
    for file, name in references:
        parts = pathlib.PurePosixPath(str(name)).parts
        if "://" in str(name) or "\\" in str(name) or ".." in parts or parts[:1] in (("/",), ("~",)):
            raise UserError(
                f"{directory.name}: {file.name} names {name!r}, which is outside the directory. A data set's files "
                "must lie in it: move the file there, or pass the file instead of the directory."
            )


def _list_patterns(value: Any) -> Iterator[str]:
    """Yields the file patterns in a data set's card."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            if key != "split":
                yield from _list_patterns(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _list_patterns(entry)
