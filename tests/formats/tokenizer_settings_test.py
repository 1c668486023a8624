"""Files beside a tokenizer.json: shapes that transformers reads, and shapes that are named."""

import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.formats.tokenizer_settings import check_settings


class SettingsTest(parameterized.TestCase):
    def check(self, file, content):
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "model"
            path.mkdir()
            (path / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            check_settings(path)

    @parameterized.product(
        file=("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"),
        content=(b"[]", b"null", b"{", b"\xff\xfe{\0}\0"),
    )
    def test_file_that_is_no_json_object_is_named(self, file, content):
        with self.assertRaisesRegex(UserError, rf"model/{file}: (got|not JSON).*download the file again"):
            self.check(file, content)

    @parameterized.parameters(
        ("tokenizer_config.json", "eos_token", 5),
        ("tokenizer_config.json", "eos_token", {"foo": 1}),
        ("tokenizer_config.json", "added_tokens_decoder", []),
        ("tokenizer_config.json", "added_tokens_decoder", {"0": "x"}),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "x"}}),
        ("tokenizer_config.json", "extra_special_tokens", 5),
        ("tokenizer_config.json", "extra_special_tokens", {"image": 1}),
        ("tokenizer_config.json", "additional_special_tokens", [{"a": 1}]),
        ("tokenizer_config.json", "additional_special_tokens", "x"),
        ("tokenizer_config.json", "tokenizer_class", 5),
        ("tokenizer_config.json", "chat_template", [{"a": "b"}]),
        ("tokenizer_config.json", "chat_template", 5),
        ("special_tokens_map.json", "pad_token", ["x"]),
        ("config.json", "model_type", []),
    )
    def test_field_of_another_shape_is_named_with_file_and_need(self, file, field, value):
        with self.assertRaisesRegex(UserError, rf"model/{file}: {field} is .*; needed .*Correct it"):
            self.check(file, {field: value})

    def test_number_of_an_added_token_is_an_integer(self):
        with self.assertRaisesRegex(UserError, "model/added_tokens.json: got .*needed the id"):
            self.check("added_tokens.json", {"<x>": "5"})

    def test_shapes_of_published_files_are_accepted(self):
        token = {"content": "<x>", "lstrip": False, "special": True}
        for fields in (
            {"eos_token": None, "bos_token": "<s>", "unk_token": token, "model_max_length": 1e30, "auto_map": {}},
            {"added_tokens_decoder": {"0": token}, "additional_special_tokens": ["<x>", token]},
            {"extra_special_tokens": {"image_token": "<x>"}, "chat_template": "{{ x }}"},
            {"extra_special_tokens": ["<x>", token], "chat_template": [{"name": "default", "template": ""}]},
        ):
            self.check("tokenizer_config.json", fields)
            self.check("special_tokens_map.json", fields)
        self.check("added_tokens.json", {"<x>": 5})
        self.check("config.json", {"model_type": "llama", "vocab_size": 3})


if __name__ == "__main__":
    absltest.main()
