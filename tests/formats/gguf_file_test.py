"""GGUF files whose headers lie, byte by byte; what is right is read by the published reader."""

import pathlib
import struct
import tempfile
import time

import gguf
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.formats import gguf_file

_UINT8, _UINT32, _STRING, _ARRAY = 0, 4, 8, 9


def text(value):
    return struct.pack("<Q", len(value)) + value


def field(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def array(kind, count, values=b""):
    return struct.pack("<IQ", kind, count) + values


def tensor(dimensions, offset=0, kind=0, name=b"a"):
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


class OpenTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.file = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / "m.gguf"

    def open(self, *entries, tensors=0, fields=0, data=bytes(64)):
        header = b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(entries)
        self.file.write_bytes(header + bytes(-len(header) % 32) + data)
        return gguf_file.open_gguf(self.file)

    def test_fields_and_tensors_of_a_right_file_are_read(self):
        reader = self.open(
            field(b"n", _UINT32, struct.pack("<I", 7)),
            field(b"t", _STRING, text("é".encode())),
            field(b"l", _ARRAY, array(_STRING, 2, text(b"x") + text(b""))),
            tensor([4], name=b"a"),
            tensor([2, 4], offset=32, name=b"b"),
            fields=3,
            tensors=2,
        )
        read = [gguf_file.contents(self.file, reader, *wanted) for wanted in (("n", int), ("t", str), ("none", int))]
        self.assertEqual(read, [7, "é", None])
        self.assertEqual(gguf_file.contents(self.file, reader, "l", str, many=True), ["x", ""])
        self.assertEqual([each.data.shape for each in reader.tensors], [(4,), (4, 2)])

    @parameterized.parameters(
        ({"fields": 1 << 63}, ()),
        ({"tensors": 1 << 63}, ()),
        ({"fields": 1}, (struct.pack("<Q", 1 << 62),)),
        ({"fields": 1}, (field(b"k", _STRING, struct.pack("<Q", (1 << 64) - 8)),)),
        ({"fields": 1}, (field(b"k", _ARRAY, array(_UINT8, 1 << 60)),)),
        ({"fields": 1}, (field(b"k", _ARRAY, array(_STRING, 1 << 60)),)),
        ({"fields": 1, "data": bytes(5 << 20)}, (field(b"k", _ARRAY, array(_UINT8, 5 << 20)),)),
        ({"fields": 1}, (field(b"k", _ARRAY, array(_ARRAY, 1, array(_ARRAY, 1))),)),
        ({"fields": 1}, (field(b"k", 99, b""),)),
        ({"fields": 1}, (field(b"\xff", _UINT32, bytes(4)),)),
        ({"fields": 2}, (field(b"k", _UINT32, bytes(4)), field(b"k", _UINT32, bytes(4)))),
        ({"tensors": 1}, (tensor([1 << 32, 1 << 32]),)),
        ({"tensors": 1}, (tensor([1 << 40]),)),
        ({"tensors": 1}, (tensor([17]),)),
        ({"tensors": 1}, (tensor([4], offset=1 << 63),)),
        ({"tensors": 1}, (tensor([4], offset=56),)),
        ({"tensors": 1}, (tensor([1] * 5),)),
        ({"tensors": 1}, (tensor([4], kind=999),)),
        ({"tensors": 2}, (tensor([8], name=b"a"), tensor([8], offset=16, name=b"b"))),
        ({"tensors": 2}, (tensor([4]), tensor([4], offset=32))),
    )
    def test_a_header_that_lies_is_an_error_at_once(self, counts, entries):
        began = time.monotonic()
        with self.assertRaisesRegex(ValueError, r"^m\.gguf is not a complete GGUF file: .+ Download it again"):
            self.open(*entries, **counts)
        self.assertLess(time.monotonic() - began, 5)

    def test_no_file_an_empty_one_and_another_kind_are_errors(self):
        with self.assertRaisesRegex(ValueError, "m.gguf: no such file"):
            gguf_file.open_gguf(self.file)
        for content in (b"", b"GG", b"GGUF", b"PK" * 100, b"GGUF" + bytes(20)):
            self.file.write_bytes(content)
            with self.assertRaisesRegex(ValueError, "m.gguf is not a complete GGUF file"):
                gguf_file.open_gguf(self.file)

    @parameterized.parameters(
        (_UINT32, bytes(4), str, False),
        (_STRING, text(b"x"), int, False),
        (_STRING, text(b"\xff"), str, False),
        (_STRING, text(b"x"), str, True),
        (_ARRAY, array(_UINT8, 2, b"ab"), int, False),
        (_ARRAY, array(_UINT8, 2, b"ab"), str, True),
    )
    def test_a_field_of_another_kind_is_an_error_that_names_it(self, kind, value, wanted, many):
        reader = self.open(field(b"k", kind, value), fields=1)
        with self.assertRaisesRegex(ValueError, "m.gguf: field k (is|cannot).* Download the file again"):
            gguf_file.contents(self.file, reader, "k", wanted, many=many)

    def test_files_of_the_published_writer_are_read(self):
        for order in (gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG):
            writer = gguf.GGUFWriter(self.file, "llama", endianess=order)
            writer.add_token_list(["a", "é"])
            writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            reader = gguf_file.open_gguf(self.file)
            self.assertEqual(gguf_file.contents(self.file, reader, "tokenizer.ggml.tokens", str, many=True), ["a", "é"])
            self.assertEqual(reader.tensors[0].data.shape, (2, 3))


if __name__ == "__main__":
    absltest.main()
