"""JSON files, compressed or not, to records; files that are not what their names say to errors that name it."""

import bz2
import gzip
import json
import lzma
import pathlib
import tempfile

import hypothesis
import pyarrow
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from dialog_jax.dialogues import parsing
from dialog_jax.errors import UserError
from tests.laws import budget

_RECORDS = [{"prompt": f"ö {number}", "completion": "b\u2028c"} for number in range(3)]
_LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in _RECORDS).encode()


def compress_zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


_COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": compress_zstd}


class JsonFilesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def read(self, name, data):
        path = self.directory / name
        path.write_bytes(data)
        return list(parsing.read_dialogues(path))

    def assert_refused(self, name, data, *parts):
        with self.assertRaises(UserError) as caught:
            self.read(name, data)
        for part in (name, *parts):
            self.assertIn(part, str(caught.exception))
        self.assertNotIn(str(self.directory), str(caught.exception))

    @parameterized.product(suffix=(".jsonl", ".ndjson", ".json"), compression=("", *_COMPRESS))
    def test_file_compressed_or_not_has_the_same_dialogues(self, suffix, compression):
        data = json.dumps(_RECORDS).encode() if suffix == ".json" else _LINES
        data = _COMPRESS[compression](data) if compression else data
        for name in (f"x{suffix}{compression}", f"X{suffix}{compression}".upper()):
            dialogues = self.read(name, data)
            self.assertEqual(
                [[m.content for m in d.messages] for d in dialogues], [[f"ö {n}", "b\u2028c"] for n in range(3)]
            )
            places = [f"{name}[{n}]" if suffix == ".json" else f"{name}:{n + 1}" for n in range(3)]
            self.assertEqual([dialogue.where for dialogue in dialogues], places)

    @parameterized.parameters(*_COMPRESS)
    def test_parts_compressed_one_after_another_are_one_file(self, compression):
        data = b"".join(_COMPRESS[compression](line) for line in _LINES.splitlines(keepends=True))
        self.assertLen(self.read(f"x.jsonl{compression}", data), 3)

    @parameterized.parameters(*_COMPRESS)
    def test_damaged_compressed_file_is_named(self, compression):
        data = _COMPRESS[compression](_LINES * 100)
        self.assert_refused(f"x.jsonl{compression}", data[: len(data) // 2], "damaged", "Write it again")
        self.assert_refused(f"x.jsonl{compression}", _LINES, f"not compressed as {compression} says", "rename it")

    @parameterized.parameters(*_COMPRESS)
    @budget.cases(60)
    @hypothesis.given(data=st.data())
    def test_any_damage_gives_dialogues_or_an_error_with_the_name(self, compression, data):
        damaged = bytearray(_COMPRESS[compression](_LINES))
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        name = f"x.jsonl{compression}"
        try:
            self.read(name, bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
        except UserError as error:
            self.assertIn(name, str(error))

    @parameterized.parameters(
        (".gz", "gzip", "Name it .gz"), (".bz2", "bzip2", ".bz2"), (".xz", "xz", ".xz"), (".zst", "zstd", ".zst")
    )
    def test_compressed_file_whose_name_does_not_say_so_is_identified(self, compression, what, remedy):
        self.assert_refused("x.jsonl", _COMPRESS[compression](_LINES), f"compressed by {what}", remedy)

    def test_other_compressions_and_formats_are_identified_by_name_or_content(self):
        for name, data, *parts in (
            ("x.jsonl.zip", b"PK\x03\x04", ".zip", "decompress", ".jsonl, .ndjson, .json, .parquet"),
            ("x.jsonl.lz4", b"\x04\x22\x4d\x18", ".lz4", ".gz, .bz2, .xz, .zst"),
            ("x.csv.gz", b"", "ends in .csv.gz", "Convert"),
            ("x.parquet.gz", b"", "ends in .parquet.gz", "decompress"),
            ("x.jsonl", b"PK\x03\x04...", "a zip archive", "unzip"),
            ("x.jsonl", b"\x04\x22\x4d\x18...", "lz4", "Decompress"),
            ("x.json", b"PAR1\x15", "a Parquet file", "Name it .parquet"),
        ):
            self.assert_refused(name, data, *parts)

    @parameterized.product(
        encoding=("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"), name=("x.jsonl", "x.json")
    )
    def test_utf_16_and_32_with_and_without_a_mark_are_identified(self, encoding, name):
        data = (json.dumps(_RECORDS[0], ensure_ascii=False) + "\n").encode(encoding)
        iconv = "UTF-" + encoding[4:].replace("-", "").upper()
        self.assert_refused(name, data, f"is {iconv} text", f": iconv -f {iconv} -t UTF-8 {name} > utf8-{name}")
        for compression, program in ((".gz", "gzip"), (".bz2", "bzip2"), (".xz", "xz"), (".zst", "zstd")):
            self.assert_refused(
                name + compression,
                _COMPRESS[compression](data),
                f": {program} -dc {name}{compression} | iconv -f {iconv} -t UTF-8 > utf8-{name}",
            )

    def test_utf_8_is_not_taken_for_another_encoding(self):
        for text in (
            '{"prompt": "a", "completion": "b"}',
            '\n\n{"prompt": "ő", "completion": "ő"}',
            '\ufeff{"prompt":"a","completion":"b"}',
        ):
            self.assertLen(self.read("x.jsonl", text.encode()), 1)


if __name__ == "__main__":
    absltest.main()
