"""A teacher's file with any bytes changed, and with any numbers in it: read, or refused by its name."""

import json
import pathlib

import hypothesis
import numpy as np
import safetensors.numpy
from absl.testing import absltest
from hypothesis import strategies as st

from dialog_jax.errors import UserError
from dialog_jax.rendering import sequences
from dialog_jax.trees import dataset, teacher, teacher_file
from dialog_jax.trees.dialogue_trees import TreeConfig
from tests.laws import budget, oracles, strategies
from tests.laws.readers_test import damaged, values
from tests.rendering import chat_templates

_TOP = 2
_RECORD = {
    "id": "a",
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Good bye."},
    ],
}


def signal(one):
    """What a teacher that finds the right token likeliest says of a response."""
    right = np.array(one.tokens, np.int32)
    return teacher_file.Signal(
        one.message,
        teacher_file.checksum(np.array(one.prompt, np.int32)),
        right,
        np.stack([right, (right + 1) % 500], axis=1).astype(np.int32),
        np.log(np.full((len(right), _TOP), [0.75, 0.2])).astype(np.float32),
    )


def train_on(path):
    """Reads the file and the teacher's word on every target; True if it all went well."""
    (dialogue,) = strategies.parsed([_RECORD])
    file = teacher_file.read_file(path, tokenizer="t")
    renderer = sequences.Renderer(chat_templates.train_tokenizer("chatml"))
    trees = dataset.prepare([dialogue], renderer, TreeConfig(max_length=256), teacher=file)
    token, log_probability = teacher.read_rows(trees.teacher, trees.teacher_rows(0)[trees.tree(0).weight > 0])
    assert token.min() >= 0 and token.max() <= file.largest, (token.min(), token.max())
    assert (np.exp(log_probability).sum(axis=-1) <= 1.01).all()


class TeacherFileTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        (dialogue,) = strategies.parsed([_RECORD])
        self.directory = pathlib.Path(self.create_tempdir().full_path)
        self.path = self.directory / "teacher.safetensors"
        with teacher_file.write_file(self.path, top_k=_TOP, tokenizer="t", vocabulary=512) as add:
            add("a", [signal(oracles.response(dialogue, message, "chatml")) for message in (1, 3)])
        self.whole = self.path.read_bytes()

    def check(self):
        try:
            train_on(self.path)
        except UserError as error:
            self.assertIn(self.path.name, str(error))

    def test_the_file_as_written_is_read(self):
        train_on(self.path)

    @budget.cases(150)
    @hypothesis.given(data=st.data())
    def test_damaged_bytes(self, data):
        self.path.write_bytes(data.draw(damaged(self.whole)))
        self.check()

    @budget.cases(250)
    @hypothesis.given(data=st.data())
    def test_other_numbers_in_its_arrays(self, data):
        self.path.write_bytes(self.whole)
        arrays = safetensors.numpy.load_file(self.path)
        with safetensors.safe_open(self.path, framework="numpy") as file:
            metadata = file.metadata()
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from([*sorted(arrays), "ids"]))
            if name == "ids":
                text = json.dumps(data.draw(st.one_of(values, st.lists(values, min_size=1, max_size=2))))
                metadata["ids"] = data.draw(st.sampled_from([text, text[:-1], '["a", "a"]', '["b"]']))
                continue
            array = arrays[name].copy()
            change = data.draw(st.sampled_from(["number", "number", "number", "cut", "double", "empty", "columns"]))
            if change == "number" and array.size:
                numbers = (
                    [-1, 0, 1, 7, 2**31 - 1, -(2**31)]
                    if array.dtype.kind == "i"
                    else [np.nan, np.inf, -np.inf, 1, -200]
                )
                array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(st.sampled_from(numbers))
            elif change == "cut":
                array = array[: data.draw(st.integers(0, len(array)))]
            elif change == "double":
                array = np.concatenate([array, array])
            elif change == "empty":
                array = array[:0]
            elif array.ndim == 2:
                array = array[:, : data.draw(st.integers(0, 1))]
            arrays[name] = np.ascontiguousarray(array)
        safetensors.numpy.save_file(arrays, self.path, metadata=metadata)
        self.check()


if __name__ == "__main__":
    absltest.main()
