"""What the package never does with files that others wrote, read from its source; and that a model brings no code."""

import ast
import json
import pathlib
import shutil
import tempfile

from absl.testing import absltest, parameterized

from dialog_jax.model import pretrained
from dialog_jax.rendering import tokenizers
from tests.rendering import chat_templates

_ROOT = pathlib.Path(__file__).parents[1]
_SOURCES = [file for room in ("dialog_jax", "scripts", "experiments") for file in sorted((_ROOT / room).rglob("*.py"))]
_REFERENCES = pathlib.Path(__file__).parent / "references"
# What runs code that is in the file it reads.
_RUNS_CODE = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "torch",
    "jsonpickle",
}


def offences(source):
    """(line, what) of everything in a source that reads a file as code, or runs code that a model brings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [(node.lineno, name) for name in modules if name.split(".")[0] in _RUNS_CODE]
        told = isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle")
        if told and not (isinstance(node.value, ast.Constant) and node.value.value is False):
            found.append((node.value.lineno, node.arg))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "__import__", "os.system") or name.endswith(
                ("yaml.load", "read_pickle", "torch.load")
            ):
                found.append((node.lineno, name))
    return found


class SourceTest(parameterized.TestCase):
    def test_no_module_reads_a_file_as_code(self):
        self.assertGreater(len(_SOURCES), 50)
        for file in _SOURCES:
            found = offences(file.read_text(encoding="utf-8"))
            if file.parent.name == "peers":  # others' programs, in environments of their own
                found = [one for one in found if one[1] != "torch"]
            self.assertEqual(found, [], file)

    @parameterized.parameters(
        "import pickle",
        "from marshal import loads",
        "import torch.nn",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "AutoTokenizer.from_pretrained(f, trust_remote_code=True)",
        "f(trust_remote_code=not False)",
        "eval(text)",
        "yaml.load(text)",
    )
    def test_the_search_finds_what_it_is_for(self, source):
        self.assertLen(offences("def f():\n    " + source), 1)

    def test_every_loading_of_a_published_tokenizer_says_that_its_code_is_not_run(self):
        calls = [
            node
            for file in _SOURCES
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("transformers.Auto")
        ]
        self.assertNotEmpty(calls)
        for call in calls:
            self.assertIn("trust_remote_code", [keyword.arg for keyword in call.keywords])


class ModelCodeTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.model, self.marker = self.directory / "model", self.directory / "marker"
        shutil.copytree(_REFERENCES / "tiny_llama", self.model)
        chat_templates.train_tokenizer("chatml").save_pretrained(self.model)

    def edit(self, name, **fields):
        file = self.model / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | fields))

    def test_code_that_a_model_directory_brings_is_not_run(self):
        code = f"import pathlib\npathlib.Path({str(self.marker)!r}).touch()\n"
        for name in ("evil.py", "tokenization_evil.py", "configuration_evil.py", "modeling_evil.py", "__init__.py"):
            (self.model / name).write_text(code + "class Evil: pass\n")
        self.edit("config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
        self.edit(
            "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"
        )
        with self.assertRaisesRegex(
            ValueError, "no tokenizer could be loaded .* code that comes with a tokenizer is never run"
        ):
            tokenizers.load_tokenizer(self.model)
        self.edit("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        tokenizers.load_tokenizer(self.model)
        pretrained.load_parameters(self.model, pretrained.load_config(self.model))
        self.assertFalse(self.marker.exists())

    @parameterized.parameters(True, False)
    def test_a_tokenizer_file_outside_the_directory_is_not_read(self, has_own):
        outside = self.directory / "outside.json"
        own = json.loads((self.model / "tokenizer.json").read_text())
        own["added_tokens"].append({**own["added_tokens"][0], "id": 512, "content": "<outside>"})
        outside.write_text(json.dumps(own))
        if not has_own:
            (self.model / "tokenizer.json").unlink()
        for name in ("../outside.json", str(outside)):
            self.edit(
                "tokenizer_config.json",
                tokenizer_file=name,
                vocab_file=name,
                fast_tokenizer_files=[name],
                name_or_path=name,
            )
            if has_own:
                self.assertNotIn("<outside>", tokenizers.load_tokenizer(self.model).get_vocab())
            else:
                with self.assertRaisesRegex(ValueError, "no tokenizer could be loaded"):
                    tokenizers.load_tokenizer(self.model)


if __name__ == "__main__":
    absltest.main()
