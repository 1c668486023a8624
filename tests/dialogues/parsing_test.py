"""Every format to the same Dialogue, and every bad input to an error that says where it is and what to do."""

import json
import pathlib
import sys
import tempfile
import types
from unittest import mock

import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized

from dialog_jax.dialogues import parsing, schemas
from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError

_GOOD = {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
_HI = (Message(role="user", content="Hi"), Message(role="assistant", content="Hello"))


class _Files(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def file(self, name: str, content: str | bytes) -> pathlib.Path:
        path = self.directory / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def assert_error(self, call, *parts: str):
        with self.assertRaises(ValueError) as caught:
            call()
        message = str(caught.exception)
        for part in parts:
            self.assertIn(part, message)
        self.assertNotIn(str(self.directory), message)


class FormatsTest(_Files):
    def test_messages_all_fields_are_kept(self):
        record = {
            "id": 7,
            "source": "shop",
            "tools": [{"type": "function", "function": {"name": "price", "parameters": '{"type": "object"}'}}],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": " What is it?\n", "name": "Ann", "weight": 2},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
                {"role": "tool", "content": "3", "tool_call_id": "c1"},
                {"role": "assistant", "content": "3", "train": False, "refusal": None},
                {"role": "assistant", "content": "4", "weight": 0.25, "train": True, "reasoning_content": "Hm."},
            ],
        }
        self.assertEqual(
            parsing.parse_dialogue(record, index=3, where="x.jsonl:4"),
            Dialogue(
                id=7,
                messages=(
                    Message(role="system", content="Be brief."),
                    Message(role="user", content=" What is it?\n", weight=2.0, fields={"name": "Ann"}),
                    Message(
                        role="assistant",
                        content="",
                        fields={"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
                    ),
                    Message(role="tool", content="3", fields={"tool_call_id": "c1"}),
                    Message(role="assistant", content="3", weight=0.0),
                    Message(role="assistant", content="4", weight=0.25, fields={"reasoning_content": "Hm."}),
                ),
                tools=({"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}},),
                metadata={"source": "shop"},
                where="x.jsonl:4",
            ),
        )

    def test_as_dict_has_what_a_template_reads_and_no_weight(self):
        message = Message(role="user", content="Hi", weight=0.5, fields={"name": "Ann"})
        self.assertEqual(message.as_dict(), {"role": "user", "content": "Hi", "name": "Ann"})

    def test_name_with_and_without_place(self):
        self.assertEqual(str(Dialogue(id=412, messages=_HI, where="train.jsonl:413")), "dialogue 412 (train.jsonl:413)")
        self.assertEqual(Dialogue(id="x", messages=_HI).name, "dialogue x")

    @parameterized.parameters(
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("observation", "tool"),
        ("function_response", "tool"),
        ("tool_response", "tool"),
        ("developer", "system"),
        ("function", "tool"),
        ("ipython", "tool"),
    )
    def test_sharegpt_speaker_becomes_role(self, speaker, role):
        record = {"conversations": [{"from": speaker, "value": "x", "weight": 0}], "idx": 3}
        dialogue = parsing.parse_dialogue(record, index=9, where="")
        self.assertEqual(
            dialogue, Dialogue(id=9, messages=(Message(role=role, content="x", weight=0.0),), metadata={"idx": 3})
        )

    def test_roles_of_the_config_name_further_roles_and_replace_those_known(self):
        roles = {"Bot": "assistant", "developer": "user"}
        for key, content in (("role", "content"), ("from", "value")):
            messages = [{key: "developer", content: "a"}, {key: "Bot", content: "b"}, {key: "gpt", content: "c"}]
            (dialogue,) = parsing.parse_records([{"messages": messages}], roles=roles)
            self.assertEqual([message.role for message in dialogue.messages], ["user", "assistant", "assistant"])

    def test_unknown_role_names_the_option_that_maps_it(self):
        record = {"messages": [{"role": "Bot", "content": "a"}]}
        self.assert_error(
            lambda: list(parsing.parse_records([record])),
            "message 0 has role 'Bot'",
            """--config.data.roles="{'Bot': ROLE}\"""",
        )
        record = {"messages": [{"role": "User", "content": "a"}]}
        for name, role in (
            ("User", "'user'"),
            ("tool_result", "'tool'"),
            ("SYSTEM", "'system'"),
            ("environment", "ROLE"),
            ("user of a tool", "ROLE"),
        ):
            self.assert_error(
                lambda name=name: list(parsing.parse_records([{"messages": [{"role": name, "content": "a"}]}])),
                f"""--config.data.roles="{{'{name}': {role}}}\"""",
            )
        for fields, *problem in (
            ({}, "message 0 has no 'role'", "Add it."), ({"role": None}, "message 0 has no 'role'", "Add it."),
            ({"role": 5}, "message 0 has role 5 (int)", "Write one of them."),
        ):  # fmt: skip
            with self.assertRaises(UserError) as caught:
                list(parsing.parse_records([{"messages": [{**fields, "content": "a"}]}]))
            for part in problem:
                self.assertIn(part, str(caught.exception))
            self.assertNotIn("data.roles", str(caught.exception))
        self.assert_error(
            lambda: parsing.check_roles({"Bot": "robot"}), "data.roles", "'Bot'", "'robot'", "system, user"
        )

    def test_sharegpt_system_field_becomes_first_message(self):
        record = {
            "system": "Be kind.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        }
        dialogue = parsing.parse_dialogue(record, index=0, where="")
        self.assertEqual(dialogue.messages, (Message(role="system", content="Be kind."), *_HI))
        self.assertEqual(dialogue.metadata, {})

    def test_sharegpt_list_with_openai_keys_is_read(self):
        dialogue = parsing.parse_dialogue({"conversations": _GOOD["messages"]}, index=0, where="")
        self.assertEqual(dialogue.messages, _HI)

    def test_prompt_and_completion_strings(self):
        dialogue = parsing.parse_dialogue({"prompt": "Hi", "completion": "Hello", "score": 2}, index=5, where="")
        self.assertEqual(dialogue, Dialogue(id=5, messages=_HI, metadata={"score": 2}))

    def test_prompt_and_completion_messages_history_has_weight_zero_unless_given(self):
        prompt = [
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
            {"role": "assistant", "content": "3", "weight": 0.5},
        ]
        completion = [{"role": "assistant", "content": "4"}]
        dialogue = parsing.parse_dialogue({"prompt": prompt, "completion": completion}, index=0, where="")
        self.assertEqual([m.content for m in dialogue.messages], ["1", "2", "3", "4"])
        self.assertEqual([m.weight for m in dialogue.messages], [1.0, 0.0, 0.5, 1.0])

    def test_sharegpt_history_of_a_prompt_has_weight_zero(self):
        prompt = [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
            {"from": "gpt", "value": "b", "weight": 2},
        ]
        (dialogue,) = parsing.parse_records([{"prompt": prompt, "completion": "c"}])
        self.assertEqual([message.weight for message in dialogue.messages], [1, 0, 2, 1])

    def test_messages_win_over_prompt_which_stays_metadata(self):
        dialogue = parsing.parse_dialogue({**_GOOD, "prompt": "Hi"}, index=0, where="")
        self.assertEqual((dialogue.messages, dialogue.metadata), (_HI, {"prompt": "Hi"}))

    def test_tools_as_json_text_and_empty_tools(self):
        parse = lambda tools: parsing.parse_dialogue({**_GOOD, "tools": tools}, index=0, where="").tools  # noqa: E731
        self.assertEqual(parse('[{"type": "function"}]'), ({"type": "function"},))
        self.assertIsNone(parse([]))
        self.assertIsNone(parse(""))
        self.assertIsNone(parse(None))

    def test_records_without_id_are_numbered(self):
        records = [{"prompt": "Hi", "completion": "Hello"}, _GOOD]
        self.assertEqual(
            [d.name for d in parsing.parse_records(records)],
            ["dialogue 0 (records[0])", "dialogue a (records[1])"],
        )


class SpeakersTest(absltest.TestCase):
    def test_speakers_of_each_format_are_those_of_the_messages(self):
        messages = [{"role": "user", "content": "Hi"}, {"role": "Bot", "content": "Hello"}]
        turns = [{"from": "human", "value": "Hi"}, {"from": "Bot", "value": "Hello"}]
        for record, speakers in (
            ({"messages": messages, "continuations": ["Bye"]}, ["user", "Bot"]),
            ({"conversations": turns}, ["human", "Bot"]),
            ({"prompt": messages[:1], "completion": messages[1]}, ["user", "Bot"]),
            ({"prompt": json.dumps(messages), "completion": "Bye"}, ["user", "Bot"]),
            ({"prompt": "Hi", "completion": "Hello"}, []),
            ({"messages": ["Hi", {"role": 3}, {"content": "Hi"}]}, []),
        ):
            self.assertEqual(list(schemas.iterate_speakers(record)), speakers)


class FieldsOfRecordsTest(_Files):
    @parameterized.parameters("system", "system_prompt", "system_message")
    def test_system_field_is_the_system_message_of_every_format(self, key):
        for record in (
            {"messages": _GOOD["messages"]},
            {"messages": json.dumps(_GOOD["messages"])},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {"prompt": "Hi", "completion": "Hello"},
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
            {"prompt": [{"role": "user", "content": "Hi"}], "continuations": ["Hello"]},
        ):
            (dialogue,) = parsing.parse_records([{**record, key: "Be kind."}])
            self.assertEqual(dialogue.messages, (Message(role="system", content="Be kind."), *_HI))
            self.assertEqual((dialogue.metadata, dialogue.parents), ({}, ()))
            for nothing in (None, ""):
                (dialogue,) = parsing.parse_records([{**record, key: nothing}])
                self.assertEqual(dialogue.messages, _HI)

    def test_system_field_is_the_root_of_a_message_tree(self):
        (dialogue,) = parsing.parse_records([{**_tree((None, "q"), ("q", "a"), ("q", "b")), "system": "Be kind."}])
        self.assertEqual([message.content for message in dialogue.messages], ["Be kind.", "q", "a", "b"])
        self.assertEqual(dialogue.parents, (-1, 0, 1, 1))
        (dialogue,) = parsing.parse_records([{"prompt": "q", "continuations": ["a", "b"], "system": "Be kind."}])
        self.assertEqual(dialogue.parents, (-1, 0, 1, 1))

    def test_system_field_and_system_message_are_one_if_they_are_equal(self):
        for role in ("system", "developer"):
            record = {"messages": [{"role": role, "content": "Be kind."}, *_GOOD["messages"]]}
            (dialogue,) = parsing.parse_records([{**record, "system": "Be kind."}])
            self.assertEqual(dialogue.messages, (Message(role="system", content="Be kind."), *_HI))
            self.assert_error(
                lambda record=record: list(parsing.parse_records([{**record, "system": "Be brief."}])),
                "both a system field and a system message",
                "Remove",
            )
        self.assert_error(
            lambda: list(parsing.parse_records([{**_GOOD, "system": "a", "system_prompt": "b"}])),
            "different texts in system and system_prompt",
        )

    def test_messages_given_as_json_text_are_parsed(self):
        (dialogue,) = parsing.parse_records([{"conversations": json.dumps([{"from": "human", "value": "Hi"}])}])
        self.assertEqual(dialogue.messages, _HI[:1])
        record = {"messages": json.dumps([{"role": "user", "content": "Hi", "name": None}])}
        (dialogue,) = parsing.parse_records([record])
        self.assertEqual(dialogue.messages, _HI[:1])
        self.assert_error(
            lambda: list(parsing.parse_records([{"messages": "[{"}])), "messages is text but not JSON", "column", "list"
        )

    def test_prompt_and_completion_are_lists_of_messages_of_any_format(self):
        prompt = [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}, {"from": "Bot", "value": "3"}]
        completion = [
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "5"},
        ]
        (dialogue,) = parsing.parse_records([{"prompt": prompt, "completion": completion}], roles={"Bot": "assistant"})
        self.assertEqual([message.content for message in dialogue.messages], ["1", "2", "3", "", "4", "5"])
        self.assertEqual([message.weight for message in dialogue.messages], [1, 0, 0, 1, 1, 1])
        (dialogue,) = parsing.parse_records([{"prompt": "1", "completion": {"content": "2"}}])
        self.assertEqual([message.role for message in dialogue.messages], ["user", "assistant"])

    def test_prompt_completion_and_continuations_given_as_json_text_are_parsed(self):
        user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "name": None}
        for prompt in (
            [user],
            user,
            json.dumps([user]),
            json.dumps(user),
            json.dumps([{"from": "human", "value": "Hi"}]),
        ):
            for response in ([answer], json.dumps([answer]), json.dumps(answer), "Hello"):
                for fields in ({"completion": response}, {"continuations": [response]}):
                    (dialogue,) = parsing.parse_records([{"prompt": prompt, **fields}])
                    contents = [(message.role, message.content) for message in dialogue.messages]
                    self.assertEqual(contents, [("user", "Hi"), ("assistant", "Hello")], (prompt, fields))
                    self.assertEqual(dialogue.messages[1].fields, {})

    @parameterized.parameters(
        "[1, 2]", '{"answer": 4}', "[{", '[{"content": "a"}]', "[]", "{}", '[{"from": "here"}]', "[" * 999
    )
    def test_other_json_is_the_text_of_a_prompt_or_completion(self, text):
        (dialogue,) = parsing.parse_records([{"prompt": text, "completion": text}])
        self.assertEqual([message.content for message in dialogue.messages], [text, text])

    def test_integer_ids_that_a_table_stored_as_floats_are_integers(self):
        records = [{**_GOOD, "id": 3.0}, {**_GOOD, "id": -0.0}, {**_GOOD, "id": 2**70}]
        self.assertEqual([dialogue.id for dialogue in parsing.parse_records(records)], [3, 0, 2**70])
        for dialogue in parsing.parse_records(records):
            self.assertIsInstance(dialogue.id, int)
        for identifier in (3.5, 1e300, float("nan"), True, [3]):
            self.assert_error(
                lambda one=identifier: list(parsing.parse_records([{**_GOOD, "id": one}])), "id is", "integer"
            )
        messages = [
            {"role": "user", "content": "q", "id": 1.0, "parent": None},
            {"role": "assistant", "content": "a", "id": 2, "parent": 1},
            {"role": "assistant", "content": "b", "id": 3.0, "parent": 1.0},
        ]
        (dialogue,) = parsing.parse_records([{"messages": messages}])
        self.assertEqual(dialogue.parents, (-1, 0, 0))

    def test_chat_template_kwargs_of_a_record_are_variables_of_the_template(self):
        for kwargs in ({"enable_thinking": False, "x": None}, '{"enable_thinking": false}'):
            (dialogue,) = parsing.parse_records([{**_GOOD, "chat_template_kwargs": kwargs}])
            self.assertEqual(dialogue.chat_template_kwargs, {"enable_thinking": False})
            self.assertEqual(dialogue.metadata, {})
        for kwargs, *parts in (
            (["x"], "['x'] (list)", "needed an object"),
            ("x", "text but not JSON"),
            ({"tools": []}, "'tools'", "Remove"),
            ({"add_generation_prompt": True}, "'add_generation_prompt'"),
            ({"tokenize": True}, "'tokenize'"),
        ):
            record = {**_GOOD, "chat_template_kwargs": kwargs}
            self.assert_error(
                lambda record=record: list(parsing.parse_records([record])), "chat_template_kwargs", *parts
            )

    def test_content_under_both_names_is_refused(self):
        record = {"messages": [{"from": "human", "value": "a", "content": "b"}]}
        self.assert_error(
            lambda: list(parsing.parse_records([record])), "message 0 (user)", "value and content", "Remove"
        )

    @parameterized.parameters(
        ({"instruction": "a", "input": "", "output": "b"}, "instruction and input as prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen response as completion"),
        ({"prompt": "a", "response": "b"}, "Write response as completion"),
        ({"question": "a", "answer": "b"}, "question as prompt"),
        ({"query": "a", "response": "b", "history": []}, "history and query as a list of messages"),
        ({"segments": [{"label": True, "text": "a"}]}, "list of parts with weights"),
        ({"text": "a"}, "Plain text"),
        ({"input_ids": [1]}, "Tokens are not read"),
    )
    def test_other_known_format_is_refused_with_its_remedy(self, record, remedy):
        self.assert_error(lambda: list(parsing.parse_records([record])), "has the keys", remedy)


class FilesTest(_Files):
    def test_jsonl_with_bom_blank_lines_and_unusual_line_ends(self):
        line = json.dumps({"prompt": "Hi\u2028there", "completion": "Hello"}, ensure_ascii=False)
        path = self.file("train.jsonl", "\ufeff" + json.dumps(_GOOD) + "\r\n \t\r\n" + line)
        first, second = parsing.read_dialogues(path)
        self.assertEqual(first.name, "dialogue a (train.jsonl:1)")
        self.assertEqual(second.name, "dialogue 1 (train.jsonl:3)")
        self.assertEqual(second.messages[0].content, "Hi\u2028there")

    def test_jsonl_is_read_as_it_is_asked_for(self):
        path = self.file("train.jsonl", json.dumps(_GOOD) + "\nnot json\n")
        stream = parsing.read_dialogues(str(path))
        self.assertEqual(next(stream).id, "a")
        self.assert_error(lambda: next(stream), "train.jsonl:2: not JSON at column 1")

    @parameterized.parameters(([_GOOD, _GOOD], ["x.json[0]", "x.json[1]"]), (_GOOD, ["x.json"]))
    def test_json_list_or_object(self, content, places):
        path = self.file("x.json", "\ufeff" + json.dumps(content, indent=1))
        read = list(parsing.read_dialogues(path))
        self.assertEqual([d.where for d in read], places)
        self.assertEqual(read[0].messages, _HI)

    def test_parquet_absent_struct_fields_are_dropped(self):
        call = [{"function": {"name": "price", "arguments": '{"x": 1}'}}]
        records = [
            {
                "id": 5,
                "messages": [
                    {"role": "user", "content": "Hi", "weight": None, "train": None, "tool_calls": None},
                    {"role": "assistant", "content": None, "weight": 0.5, "train": None, "tool_calls": call},
                ],
                "note": None,
            },
            {"id": 6, "messages": _GOOD["messages"], "note": "n"},
        ]
        path = self.directory / "x.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        first, second = parsing.read_dialogues(path)
        self.assertEqual(first.messages[0], _HI[0])
        self.assertEqual(
            first.messages[1],
            Message(
                role="assistant",
                content="",
                weight=0.5,
                fields={"tool_calls": [{"function": {"name": "price", "arguments": {"x": 1}}}]},
            ),
        )
        self.assertEqual(first.metadata, {})
        self.assertEqual((second.name, second.metadata), ("dialogue 6 (x.parquet[1])", {"note": "n"}))

    def test_data_set_rows_are_read_from_the_named_split(self):
        calls = []

        def load_dataset(name, *, split, streaming):
            calls.append((name, split, streaming))
            return iter([{**_GOOD, "messages": [{**m, "weight": None} for m in _GOOD["messages"]]}])

        package = types.SimpleNamespace(load_dataset=load_dataset)
        with mock.patch.dict(sys.modules, {"datasets": package}):
            (dialogue,) = parsing.read_dialogues("owner/name", split="test")
        self.assertEqual(calls, [("owner/name", "test", True)])
        self.assertEqual((dialogue.name, dialogue.messages), ("dialogue a (name[0])", _HI))

    def test_data_set_without_the_package_says_how_to_install_it(self):
        with mock.patch.dict(sys.modules, {"datasets": None}):
            self.assert_error(lambda: list(parsing.read_dialogues("owner/name")), "pip install datasets", ".jsonl")

    def test_data_set_that_is_not_there(self):
        def load_dataset(name, *, split, streaming):
            raise FileNotFoundError("no such thing on the hub")

        with mock.patch.dict(sys.modules, {"datasets": types.SimpleNamespace(load_dataset=load_dataset)}):
            self.assert_error(
                lambda: list(parsing.read_dialogues("owner/nmae")), "nmae", "'train'", "no such thing", "Check"
            )

    def test_stored_data_set_without_the_split_lists_those_it_has(self):
        directory = self.directory / "stored"
        directory.mkdir()
        (directory / "dataset_dict.json").write_text("{}")
        package = types.SimpleNamespace(load_from_disk=lambda path: {"train": [_GOOD], "dev": []})
        with mock.patch.dict(sys.modules, {"datasets": package}):
            self.assertEqual(next(parsing.read_dialogues(directory)).id, "a")
            self.assert_error(
                lambda: list(parsing.read_dialogues(directory, split="test")), "stored", "'test'", "train, dev"
            )

    @parameterized.parameters("../a.jsonl", "/etc/a.jsonl", "sub/../../a.jsonl", "~/a", "https://host/a", "..\\a")
    def test_data_set_that_names_files_outside_its_directory_is_refused(self, name):
        directory = self.directory / "set"
        (directory / "train").mkdir(parents=True)
        package = types.SimpleNamespace(load_dataset=None, load_from_disk=None)
        (directory / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with mock.patch.dict(sys.modules, {"datasets": package}):
            self.assert_error(
                lambda: list(parsing.read_dialogues(directory)), "set: state.json names", "outside", "move"
            )
            (directory / "train" / "state.json").unlink()
            (directory / "dataset_dict.json").write_text(json.dumps({"splits": ["train", name]}))
            self.assert_error(lambda: list(parsing.read_dialogues(directory)), "set: dataset_dict.json names")
            (directory / "dataset_dict.json").unlink()
            for config in (
                {"data_files": name},
                {"data_files": ["a.jsonl", name]},
                {"data_files": [{"split": "train", "path": ["a.jsonl", name]}]},
                {"data_files": {"train": name}},
                {"data_dir": name},
            ):
                (directory / "README.md").write_text(f"---\n{json.dumps({'configs': [config]})}\n---\nA set.\n")
                self.assert_error(lambda: list(parsing.read_dialogues(directory)), "set: README.md names", "outside")

    def test_data_set_that_names_its_own_files_is_read(self):
        directory = self.directory / "set"
        directory.mkdir()
        package = types.SimpleNamespace(load_dataset=lambda name, **_: [_GOOD])
        (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        for card in ("---\nconfigs:\n- data_files:\n  - split: train\n    path: data/*.jsonl\n---\n", "Text.", ""):
            (directory / "README.md").write_text(card)
            with mock.patch.dict(sys.modules, {"datasets": package}):
                self.assertEqual([each.id for each in parsing.read_dialogues(directory)], ["a"])
        (directory / "README.md").write_text("---\nconfigs: [3]\n---\n")
        with mock.patch.dict(sys.modules, {"datasets": package}):
            self.assert_error(
                lambda: list(parsing.read_dialogues(directory)), "set: its dataset_dict.json, state.json or README"
            )


class TreesTest(_Files):
    def contents(self, record):
        (dialogue,) = parsing.parse_records([record])
        return dialogue, [[dialogue.messages[i].content for i in path] for path in dialogue.paths()]

    def test_a_list_is_one_path(self):
        dialogue, paths = self.contents(_GOOD)
        self.assertEqual(dialogue.parents, ())
        self.assertEqual(paths, [[message.content for message in dialogue.messages]])
        self.assertEqual([dialogue.ancestors(0), dialogue.ancestors(1)], [(), (0,)])

    def test_messages_with_parents_are_a_tree(self):
        record = _tree((None, "q"), ("q", "a"), ("q", "b"), ("a", "q2"), ("b", "q3"), ("q2", "c"), ("q2", "d"))
        dialogue, paths = self.contents(record)
        self.assertEqual(dialogue.parents, (-1, 0, 0, 1, 2, 3, 3))
        self.assertEqual(paths, [["q", "a", "q2", "c"], ["q", "a", "q2", "d"], ["q", "b", "q3"]])
        self.assertEqual(dialogue.ancestors(6), (0, 1, 3))
        self.assertEqual(dialogue.messages[6].as_dict(), {"role": "user", "content": "d"})

    def test_a_tree_that_is_a_list_is_a_list(self):
        dialogue, paths = self.contents(_tree((None, "q"), ("q", "a"), ("a", "q2")))
        self.assertEqual(dialogue.parents, ())
        self.assertEqual(paths, [["q", "a", "q2"]])

    def test_continuations_follow_the_last_message(self):
        chain = [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "c"}]
        messages = [{"role": "user", "content": "q"}]
        record = {"messages": messages, "continuations": ["a", {"content": "b", "weight": 0.5}, chain]}
        dialogue, paths = self.contents(record)
        self.assertEqual(paths, [["q", "a"], ["q", "b"], ["q", "q2", "c"]])
        self.assertEqual([message.weight for message in dialogue.messages], [1, 1, 0.5, 1, 1])
        self.assertEqual([message.role[0] for message in dialogue.messages], list("uaaua"))
        self.assertEqual(dialogue.metadata, {})

    def test_continuations_of_a_prompt_and_of_sharegpt(self):
        history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "old"}]
        dialogue, paths = self.contents({"prompt": history, "continuations": ["a", "b"]})
        self.assertEqual(paths, [["q", "old", "a"], ["q", "old", "b"]])
        self.assertEqual([message.weight for message in dialogue.messages], [1, 0, 1, 1])
        record = {"conversations": [{"from": "human", "value": "q"}], "continuations": [{"from": "gpt", "value": "a"}]}
        dialogue, paths = self.contents(record)
        self.assertEqual((paths, dialogue.messages[1].role), ([["q", "a"]], "assistant"))


class PartsTest(_Files):
    def message(self, content, **fields):
        record = {"messages": [{"role": "assistant", "content": content, **fields}]}
        (dialogue,) = parsing.parse_records([record])
        return dialogue.messages[0]

    def test_parts_are_joined_and_keep_their_weights(self):
        parts = [{"type": "text", "text": "so ", "weight": 0.2}, {"text": "yes", "train": False}, {"text": "."}]
        message = self.message(parts, weight=2)
        self.assertEqual((message.content, message.weight), ("so yes.", 2))
        self.assertEqual([(part.text, part.weight) for part in message.parts], [("so ", 0.2), ("yes", 0), (".", 1)])
        self.assertEqual(message.as_dict(), {"role": "assistant", "content": "so yes."})

    def test_parts_of_weight_1_are_plain_content(self):
        self.assertEqual(self.message([{"text": "so "}, {"text": "yes"}]), self.message("so yes"))


class BadFilesTest(_Files):
    @parameterized.named_parameters(
        ("truncated", "train.jsonl:2: not JSON at column 9", '{"id": 1'),
        ("comma", "train.jsonl:2: not JSON at column 10", '{"id": 1 "messages": []}'),
        ("two_objects", "train.jsonl:2: not JSON at column 4", "{} {}"),
    )
    def test_jsonl_broken_line_is_named_with_its_column(self, expected, line):
        path = self.file("train.jsonl", f"{json.dumps(_GOOD)}\n{line}\n{json.dumps(_GOOD)}\n")
        self.assert_error(lambda: list(parsing.read_dialogues(path)), expected, "one complete JSON object per line")

    def test_json_broken_file_is_named_with_line_and_column(self):
        path = self.file("x.json", '[\n {"id": 1,\n  "messages" []}\n]')
        self.assert_error(lambda: list(parsing.read_dialogues(path)), "x.json: not JSON at line 3, column 14")

    def test_json_file_that_holds_json_lines_says_rename(self):
        path = self.file("x.json", f"{json.dumps(_GOOD)}\n{json.dumps(_GOOD)}\n")
        self.assert_error(lambda: list(parsing.read_dialogues(path)), "x.json: not JSON at line 2", "name it .jsonl")

    @parameterized.parameters(
        ("x.jsonl", ""), ("x.jsonl", "\n  \n"), ("x.json", ""), ("x.json", "[]"), ("x.jsonl", "\ufeff")
    )
    def test_empty_file(self, name, content):
        path = self.file(name, content)
        self.assert_error(lambda: list(parsing.read_dialogues(path)), name, "no dialogue", "Check")

    def test_empty_parquet_and_no_parquet(self):
        path = self.directory / "x.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array([], pyarrow.string())}), path)
        self.assert_error(lambda: list(parsing.read_dialogues(path)), "x.parquet", "no dialogue")
        path.write_bytes(b"something else")
        self.assert_error(lambda: list(parsing.read_dialogues(path)), "x.parquet: not a Parquet file", "rename")

    def test_no_records_at_all(self):
        self.assert_error(lambda: list(parsing.parse_records([], source="mine")), "mine", "no dialogue")

    def test_text_that_is_not_utf8(self):
        path = self.file("x.jsonl", json.dumps(_GOOD).encode() + b'\n{"prompt": "caf\xe9", "completion": ""}\n')
        self.assert_error(lambda: list(parsing.read_dialogues(path)), "x.jsonl:2: byte 16 is not UTF-8", "Save")

    def test_missing_file_and_unknown_ending_fail_before_reading(self):
        self.assert_error(lambda: parsing.read_dialogues("nowhere/gone.jsonl"), "gone.jsonl: no such file", "Check")
        path = self.file("x.csv", "a,b")
        self.assert_error(
            lambda: parsing.read_dialogues(path), "x.csv", ".csv", ".jsonl, .ndjson, .json, .parquet", "Convert"
        )

    @parameterized.parameters("./missing", "/missing/dir", "a/b/c")
    def test_missing_directory_is_not_looked_up_on_the_hub(self, source):
        with mock.patch.dict(sys.modules, {"datasets": types.SimpleNamespace()}):
            self.assert_error(lambda: list(parsing.read_dialogues(source)), "no such file or directory", "Check")


def _with_message(**fields):
    return {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x", **fields}]}


def _tree(*messages):
    """Messages by (parent, id); user and assistant are not told apart."""
    made = [
        {"role": "user", "content": identifier, "id": identifier, "parent": parent} for parent, identifier in messages
    ]
    return {"id": "a", "messages": made}


# fmt: off
_BAD_RECORDS = (
    ("list", ["Hi"], ["dialogue 1 (bad.jsonl:2)", "(list)", "needed an object", '"messages"']),
    ("number", 3, ["dialogue 1 (bad.jsonl:2)", "3 (int)", "needed an object"]),
    ("null", None, ["dialogue 1 (bad.jsonl:2)", "None", "needed an object"]),
    ("no_messages", {"id": "a", "messages": []}, ["no messages", "at least one", "Remove"]),
    ("no_conversations", {"id": "a", "conversations": []}, ["no messages", "conversations", "Remove"]),
    ("messages_text", {"id": "a", "messages": "Hi"}, ["messages is 'Hi' (str)", "needed a list", "Write"]),
    ("unknown_format", {"id": "a", "text": "", "messages": None}, ["'text', 'messages' (null)", '"conversations"']),
    ("prompt_alone", {"id": "a", "prompt": "Hi"}, ["'prompt'", '"completion"', "Rename"]),
    ("message_text", {"id": "a", "messages": ["Hi"]}, ["message 0", "'Hi' (str)", '"role"', "Write"]),
    ("unknown_role", _with_message(role="bot"), ["message 1 has role 'bot'", "system, user, assistant, tool"]),
    ("role_number", _with_message(role=1), ["message 1", "role 1", "Write one"]),
    ("role_list", _with_message(role=["user"]), ["message 1", "role ['user']", "Write one"]),
    ("no_role", {"id": "a", "messages": [{"content": "Hi"}]}, ["message 0", "no 'role'", "Add it"]),
    ("unknown_from", {"id": "a", "conversations": [{"from": "bot"}]}, ["message 0", "from 'bot'", "human", "Rename"]),
    ("two_systems", {"id": "a", "system": "x", "conversations": [{"from": "system", "value": "y"}]}, ["system"]),
    ("content_null", _with_message(content=None), ["message 1", "None", "string", "tool_calls"]),
    ("content_null_empty_calls", _with_message(content=None, tool_calls=[]), ["message 1", "None", "string"]),
    ("content_number", _with_message(content=4), ["message 1", "content 4 (int)", "string", "text parts"]),
    ("part_without_text", _with_message(content=[{"type": "text"}]), ["message 1", "part 0", '"text"', "remove"]),
    ("part_image", _with_message(content=[{"text": "a"}, {"type": "image", "url": "x"}]), ["message 1", "part 1"]),
    ("part_string", _with_message(content=["a"]), ["message 1", "part 0", "'a' (str)", '"text"']),
    ("part_unknown_key", _with_message(content=[{"text": "a", "weigth": 2}]), ["part 0", "'weigth'", "Rename"]),
    ("part_weight", _with_message(content=[{"text": "a", "weight": -1}]), ["part 0", "weight -1 (int)", ">= 0"]),
    ("tree_two_roots", _tree((None, "q"), ("q", "a"), (None, "b")), ["message 2 has no parent", "first", "Give it"]),
    ("tree_unknown_parent", _tree((None, "q"), ("z", "a")), ["message 1", "parent 'z'", "no message before it"]),
    ("tree_later_parent", _tree((None, "q"), ("b", "a"), ("q", "b")), ["message 1", "parent 'b'", "before"]),
    ("tree_own_parent", _tree((None, "q"), ("a", "a")), ["message 1", "parent 'a'", "before"]),
    ("tree_same_id", _tree((None, "q"), ("q", "a"), ("q", "a")), ["message 2", "id 'a'", "Change"]),
    ("tree_parent_list", _tree((None, "q"), (["q"], "a")), ["message 1", "parent ['q']", "before"]),
    ("continuations_empty", {**_GOOD, "continuations": []}, ["no messages", "continuations"]),
    ("continuations_text", {**_GOOD, "continuations": "x"}, ["continuations is 'x' (str)", "list"]),
    ("continuation_parent", {**_GOOD, "continuations": [{"content": "x", "parent": "q"}]}, ["parent", "Remove"]),
    ("surrogate_in_field", _with_message(reasoning_content="\ud83d x"), ["message 1", "surrogate", "Write"]),
    ("surrogate_in_call", _with_message(tool_calls=[{"function": {"name": "\ud83d"}}]), ["message 1", "surrogate"]),
    ("weight_too_large", _with_message(weight=10**400), ["message 1", "weight 1", "needed 0, or", "Scale"]),
    ("weight_beyond_float32", _with_message(weight=1e60), ["message 1", "weight 1e+60", "Scale"]),
    ("weight_below_float32", _with_message(weight=1e-60), ["message 1", "weight 1e-60", "Scale"]),
    ("continuation_number", {**_GOOD, "continuations": [1]}, ["continuations is 1 (int)", "list"]),
    (
        "continuations_of_a_tree",
        {**_tree((None, "q"), ("q", "a"), ("q", "b")), "continuations": ["x"]},
        ["continuations and messages with a parent", "Remove"],
    ),
    (
        "continuations_and_completion",
        {"id": "a", "prompt": "x", "completion": "y", "continuations": ["z"]},
        ["continuations and a completion", "Remove"],
    ),
    ("content_missing", {"id": "a", "messages": [{"role": "user"}]}, ["message 0", "content None", "string"]),
    ("value_number", {"id": "a", "conversations": [{"from": "gpt", "value": 1}]}, ["message 0", "value 1", "string"]),
    ("surrogate", _with_message(content="ab\ud83d"), ["message 1", "character 2", "surrogate", "Write"]),
    ("weight_negative", _with_message(weight=-1), ["message 1", "weight -1 (int)", ">= 0", "train"]),
    ("weight_nan", _with_message(weight=float("nan")), ["message 1", "weight nan", "finite"]),
    ("weight_infinite", _with_message(weight=float("inf")), ["message 1", "weight inf", "finite"]),
    ("weight_text", _with_message(weight="1"), ["message 1", "weight '1' (str)", "number"]),
    ("weight_bool", _with_message(weight=True), ["message 1", "weight True (bool)", "number", "train"]),
    ("train_number", _with_message(train=2), ["message 1", "train 2", "true or false", "weight"]),
    ("tools_object", {**_GOOD, "tools": {"name": "f"}}, ["tools", "list of objects", "Write"]),
    ("tools_names", {**_GOOD, "tools": ["f"]}, ["tools", "list of objects", "Write"]),
    ("tools_text", {**_GOOD, "tools": "[f]"}, ["tools", "not JSON", "column 2", "Write"]),
    ("id_float", {**_GOOD, "id": 1.5}, ["dialogue 1 (bad.jsonl:2)", "id is 1.5 (float)", "string or an integer"]),
    ("prompt_number", {"id": "a", "prompt": 1, "completion": "x"}, ["prompt is 1 (int)", "list of messages"]),
    ("completion_empty", {"id": "a", "prompt": "x", "completion": []}, ["no messages", "completion"]),
)
# fmt: on


class BadRecordsTest(_Files):
    @parameterized.named_parameters(*_BAD_RECORDS)
    def test_bad_record_is_named_with_remedy(self, record, parts):
        # ensure_ascii keeps the lone surrogate as an escape; json writes NaN and Infinity as most tools do.
        path = self.file("bad.jsonl", f"{json.dumps(_GOOD)}\n{json.dumps(record)}\n")
        if not any(part.startswith("dialogue") for part in parts):
            parts = ["dialogue a (bad.jsonl:2)", *parts]
        self.assert_error(lambda: list(parsing.read_dialogues(path)), *parts)


if __name__ == "__main__":
    absltest.main()
