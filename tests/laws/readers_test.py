"""Readers given what nobody should write: dialogues come out, or a UserError that says where; nothing else, ever.

Hypothesis rather than a coverage-guided fuzzer: it needs no compiler, shrinks what it finds, and runs with the tests.
"""

import copy
import json
import pathlib
import tempfile

import hypothesis
import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from dialog_jax.dialogues import parsing, sources
from dialog_jax.errors import UserError
from tests.laws import budget, strategies

# fmt: off
_KEYS = (
    "messages", "conversations", "prompt", "completion", "continuations", "role", "content", "from", "value", "weight",
    "train", "id", "parent", "type", "text", "system", "tools", "tool_calls", "function", "arguments", "x", "",
    "functions", "function_call", "name", "parameters", "chat_template_kwargs", "loss", "loss_mask", "masked",
    "loss_weight", "system_prompt", "mask_history",
)
_VALUES = (
    "user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "developer",
    "text", "m0", "[]", "{}", '[{"type": "function"}]', " [1",
    "\x00", "\ud800", "\udcff", "a" * 200, 0, 1, -1, 0.5, 1e-40, 1e39, 10**400, -(10**30), float("nan"), float("inf"),
    True, False, None, [], {},
)
# fmt: on
_scalars = st.one_of(
    st.sampled_from(_VALUES),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=4),
)


def _objects(inner):
    keys = st.one_of(st.sampled_from(_KEYS), st.text(st.characters(), max_size=2))
    return st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=5))


values = st.recursive(_scalars, _objects, max_leaves=25)
"""JSON values, and numbers and half characters that JSON cannot have, with the keys and words of dialogues."""


def places(value):
    """Every (container, key) inside a value."""
    found = []
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


@st.composite
def mutants(draw):
    """A valid record, changed in one to three places."""
    record = copy.deepcopy(draw(strategies.records("chatml", kind=draw(st.sampled_from(["any", "parts"])))))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(record) or [({"": 0}, "")]))
        change = draw(st.sampled_from(["replace", "replace", "remove", "copy", "wrap", "rename"]))
        if change == "replace":
            container[key] = draw(values)
        elif change == "wrap":
            container[key] = draw(st.sampled_from([[container[key]], {"x": container[key]}]))
        elif change == "remove":
            del container[key]
        elif isinstance(container, list):
            container.insert(draw(st.integers(0, len(container))), copy.deepcopy(container[key]))
        else:
            container[draw(st.sampled_from(_KEYS))] = container[key] if change == "copy" else container.pop(key)
    return record


@st.composite
def nested(draw):
    """A record with a value so deep that a function that calls itself would not come to its end."""
    value = draw(_scalars)
    depth = draw(st.sampled_from([50, 101, 900, 1100, 20_000]))
    for _ in range(depth):
        value = [value] if depth % 3 else {"x": value}
    record = draw(strategies.lists("chatml"))
    place = draw(
        st.sampled_from(["record", "content", "tools", "fields", "metadata", "id", "parent", "weight", "messages"])
    )
    if place == "record":
        return value
    if place in ("content", "parent", "weight"):
        record["messages"][-1][place] = value
    elif place == "fields":
        record["messages"][-1]["tool_calls"] = value
    else:
        record[place] = value
    return record


class RecordsTest(parameterized.TestCase):
    """Python's own values."""

    def check(self, record):
        try:
            (dialogue,) = parsing.parse_records([record])
        except UserError as error:
            self.assertIn("records[0]", str(error))
            self.assertLess(len(str(error)), 2000)
            return
        self.assertNotEmpty(dialogue.messages)
        text = [dialogue.name, str(dialogue.id)]
        for number, message in enumerate(dialogue.messages):
            self.assertIn(message.role, ("system", "user", "assistant", "tool"))
            self.assertTrue(message.weight == 0 or 1e-30 <= message.weight <= 1e30)
            self.assertTrue(not message.parts or "".join(part.text for part in message.parts) == message.content)
            text.append(message.content)
            self.assertTrue(not dialogue.parents or -1 <= dialogue.parents[number] < number)
            for call in message.fields.get("tool_calls", ()):
                self.assertIsInstance(call["function"]["arguments"], dict | list | str | int | float)
        json.dumps([message.as_dict() for message in dialogue.messages]).encode()
        self.assertTrue(all(isinstance(tool, dict) for tool in dialogue.tools or ()))
        "".join(text).encode()

    @budget.cases(250)
    @hypothesis.given(values)
    def test_any_value_is_a_dialogue_or_refused_with_its_place(self, value):
        self.check(value)

    @budget.cases(400)
    @hypothesis.given(mutants())
    def test_a_record_changed_in_places_is_a_dialogue_or_refused_with_its_place(self, record):
        self.check(record)

    @budget.cases(40)
    @hypothesis.given(nested())
    def test_a_deep_value_is_a_dialogue_or_refused_with_its_place(self, record):
        self.check(record)


def file_texts(records):
    """Records as the lines of a file, and as a list."""
    return ["\n".join(map(json.dumps, records)), json.dumps(records)]


@st.composite
def literals(draw):
    """JSON texts that are none, or that say more than Python takes."""
    nines = "9" * draw(st.sampled_from([10, 4400, 20_000]))
    depth = draw(st.sampled_from([10, 990, 5000, 100_000]))
    deep = "[" * depth + "]" * depth
    # fmt: off
    texts = [
        "NaN", "-Infinity", "1e999", "-1e-999", nines, f"-{nines}.5", '"\\ud800"', '"\\u0000"', '{"a":1,"a":2}', "{}{}",
        "\ufeff{}", "{}\r", "\r", "\x0c", "\x00", deep, deep[:depth], '{"x":' * depth + "1" + "}" * depth,
        f'{{"prompt": "a", "completion": "b", "id": {nines}}}',
        f'{{"prompt": "a", "completion": "b", "x": {deep}}}',
        f'{{"messages": [{{"role": "user", "content": "a", "weight": {nines}}}]}}',
        '{"messages": [], "messages": [{"role": "user", "content": "a"}]}',
    ]
    # fmt: on
    return draw(st.sampled_from(texts))


@st.composite
def damaged(draw, data):
    """Bytes, changed in a few places or cut."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        change = draw(st.sampled_from(["flip", "set", "cut", "insert", "double"]))
        if change == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "set":
            data[at] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[at : at + draw(st.integers(1, 20))]
        elif change == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=6))
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 60))]
    return bytes(data)


class FilesTest(parameterized.TestCase):
    def check(self, name, data):
        with tempfile.TemporaryDirectory() as made:
            path = pathlib.Path(made) / name
            path.write_bytes(data)
            try:
                found = list(parsing.read_dialogues(path))
            except UserError as error:
                self.assertIn(name, str(error))
                self.assertLess(len(str(error)), 3000)
            else:
                self.assertNotEmpty(found)
            if name.endswith(".jsonl"):
                self.check_errors_kept(path, data)

    def check_errors_kept(self, path, data):
        """Each line that is not empty is one record or one error."""
        lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        try:
            given = list(sources.read_records(path, split="train"))
        except UserError as error:  # the file is no text
            self.assertRegex(str(error), r"^data\.jsonl: is (UTF-|compressed by|a )")
            return
        self.assertLen(given, len(lines))
        for where, record in given:
            self.assertStartsWith(where, f"{path.name}:")
            if isinstance(record, ValueError):
                self.assertIn(where, str(record))

    @parameterized.parameters(".jsonl", ".json")
    @budget.cases(150)
    @hypothesis.given(data=st.data())
    def test_any_bytes(self, suffix, data):
        self.check(f"data{suffix}", data.draw(st.binary(max_size=60)))

    @parameterized.parameters(".jsonl", ".json")
    @budget.cases(150)
    @hypothesis.given(data=st.data())
    def test_odd_literals_among_records(self, suffix, data):
        lines = [json.dumps(data.draw(strategies.lists("chatml"))), data.draw(literals())]
        ending = data.draw(st.sampled_from(["\n", "\r\n", "\n\n", " \n", "\r"]))
        text = ending.join(data.draw(st.permutations(lines)))
        if suffix == ".json":
            text = data.draw(st.sampled_from([f"[{', '.join(lines)}]", lines[1], text]))
        bom = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
        self.check(f"data{suffix}", bom + text.encode("utf-8", "surrogatepass"))

    @parameterized.parameters(".jsonl", ".json")
    @budget.cases(200)
    @hypothesis.given(data=st.data())
    def test_damaged_files(self, suffix, data):
        records = data.draw(st.lists(strategies.records("chatml"), min_size=1, max_size=3))
        text = file_texts(records)[suffix == ".json"]
        self.check(f"data{suffix}", data.draw(damaged(text.encode())))

    @parameterized.parameters("NONE", "SNAPPY")
    @budget.cases(300)
    @hypothesis.given(data=st.data())
    def test_damaged_parquet(self, compression, data):
        self.check("data.parquet", data.draw(damaged(parquet(compression))))


def parquet(compression):
    """The bytes of a small file."""
    messages = [
        {"role": "user", "content": "Hi there", "weight": None, "train": None},
        {"role": "assistant", "content": "Hello! Привет", "weight": 0.5, "train": True},
    ]
    table = pyarrow.Table.from_pylist([{"id": f"d{n}", "messages": messages * n} for n in range(1, 6)])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression=compression)
    return sink.getvalue().to_pybytes()


if __name__ == "__main__":
    absltest.main()
