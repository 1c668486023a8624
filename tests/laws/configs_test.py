"""Configs with any values of the right kind, and figures cut off anywhere: taken, or refused in words."""

import json
import math
import pathlib

import hypothesis
import ml_collections
from absl.testing import absltest
from hypothesis import strategies as st

from dialog_jax.errors import UserError
from dialog_jax.training import config, metrics
from tests.laws import budget
from tests.laws.readers_test import damaged

_WHOLE = config.TrainConfig(
    model="m", data=config.DataConfig(train="a.jsonl", validation="b.jsonl"), checkpoint_every=50
)
_numbers = st.sampled_from([-1.0, -0.0, 0.0, 1e-300, 0.5, 1.0, 1.5, 1e300, math.inf, -math.inf, math.nan])
_OF_KIND = {
    int: st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 50, 10**12]),
    float: _numbers,
    str: st.sampled_from(["", "turns", "last", "sum", "dialogue", "cosine", "full", "bfloat16", "none", "\x00", "é"]),
    bool: st.booleans(),
}  # fmt: skip
_OF_FIELD = {
    "roles": st.lists(st.sampled_from(["user", "assistant", "x", ""]), max_size=2).map(tuple),
    "turn_weights": st.lists(_numbers, max_size=2).map(tuple),
}


def leaves(values, path=()):
    """(path, value) of every field that holds no config."""
    for name, value in values.items():
        if isinstance(value, ml_collections.ConfigDict) and name != "chat_template_kwargs":
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


class ConfigTest(absltest.TestCase):
    @budget.cases(300)
    @hypothesis.given(data=st.data())
    def test_values_of_the_right_kind_make_a_config_or_an_error_in_words(self, data):
        made = config.to_config_dict(_WHOLE)
        fields = [(path, value) for path, value in leaves(made) if type(value) in _OF_KIND or path[-1] in _OF_FIELD]
        for path, value in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=4)):
            inner = made
            for name in path[:-1]:
                inner = inner[name]
            own = _OF_FIELD[path[-1]] if path[-1] in _OF_FIELD else _OF_KIND[type(value)]
            inner[path[-1]] = data.draw(own)
        try:
            found = config.from_config_dict(made)
        except UserError as error:
            self.assertTrue(any(path[-1] in str(error) or path[0] in str(error) for path, _ in leaves(made)))
            return
        self.assertEqual(repr(config.from_config_dict(config.to_config_dict(found))), repr(found))
        for path, value in leaves(config.to_config_dict(found)):
            if isinstance(value, float) and (path != ("epochs",) or not found.steps):
                self.assertTrue(math.isfinite(value), path)

    @budget.cases(60)
    @hypothesis.given(data=st.data())
    def test_an_unknown_field_is_named(self, data):
        name = data.draw(st.text("abcxyz_", min_size=1, max_size=6))
        plain = config.to_config_dict(_WHOLE).unlock()
        inner = data.draw(st.sampled_from([plain, plain.data, plain.objective, plain.optimizer]))
        hypothesis.assume(name not in inner)
        inner[name] = 1
        with self.assertRaisesRegex(ValueError, f"has no field {name}; it has"):
            config.from_config_dict(plain)


class FiguresTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.path = pathlib.Path(self.create_tempfile("metrics.jsonl").full_path)

    figure = st.fixed_dictionaries({"step": st.integers(1, 10**6), "loss": st.floats(allow_nan=False)})
    records = st.lists(figure, max_size=4)

    def text(self, records):
        return "".join(json.dumps(record) + "\n" for record in records).encode()

    @budget.cases(100)
    @hypothesis.given(records=records, data=st.data())
    def test_a_file_cut_anywhere_gives_its_whole_lines(self, records, data):
        text = self.text(records)
        kept = text[: data.draw(st.integers(0, len(text)))]
        self.path.write_bytes(kept)
        self.assertEqual(metrics.read_records(self.path), records[: kept.count(b"\n")])

    @budget.cases(150)
    @hypothesis.given(records=records, data=st.data())
    def test_a_damaged_file_gives_records_of_steps_or_names_a_line(self, records, data):
        self.path.write_bytes(data.draw(damaged(self.text(records))))
        try:
            found = metrics.read_records(self.path)
        except ValueError as error:
            self.assertRegex(str(error), r"metrics.jsonl:\d")
        else:
            self.assertTrue(all(isinstance(record["step"], int) for record in found))


if __name__ == "__main__":
    absltest.main()
