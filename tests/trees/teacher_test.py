"""A teacher's file: written whole or not at all, read by the safetensors library, and each word of it at its target.

The oracle tokenises every turn with the tokenizer's own chat interface and keys what the teacher says by the whole
string of tokens up to the one that it says it of: no tree, no row of a file, no message number.
"""

import dataclasses
import pathlib
import zlib

import numpy as np
import safetensors
import safetensors.numpy
from absl.testing import absltest, parameterized

from dialog_jax.batching import batches
from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.dialogues.parsing import parse_records
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.virtual_tokens import NONE, VirtualTokens
from dialog_jax.trees import dataset, disk_cache, prefix_tree, teacher_file
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.laws import oracles
from tests.rendering import chat_templates

_TOP = 3


def responses_of(dialogue, family):
    """[(message, prompt ids, response ids)] of the assistant messages of weight above 0."""
    return [(one.message, one.prompt, one.tokens) for one in oracles.responses(dialogue, family)]


class Saying:
    """A teacher that says something else of every token, and remembers what it said of which string of tokens."""

    def __init__(self):
        self.of_context = {}

    def signals(self, dialogue, family):
        return [self.signal(*response) for response in responses_of(dialogue, family)]

    def signal(self, message, prompt, response):
        words = []
        for stop in range(1, len(response) + 1):
            context = (*prompt, *response[:stop])
            words.append(self.of_context.setdefault(context, 10 * len(self.of_context)))
        top = np.array(words)[:, None] + np.arange(_TOP)
        log_probability = np.log(np.array([0.5, 0.3, 0.1])) - top % 7 / 50
        return teacher_file.Signal(
            message,
            zlib.crc32(np.array(prompt, "<i4").tobytes()),
            np.array(response, np.int32),
            top.astype(np.int32),
            log_probability.astype(np.float32),
        )


def two_turns(*, id="a", answer="I am fine.", question="How are you?", weight=1.0):
    return Dialogue(
        id=id,
        where="said.jsonl:1",
        messages=(
            Message(role="system", content="Be kind."),
            Message(role="user", content="Hi"),
            Message(role="assistant", content="Hello!"),
            Message(role="user", content=question),
            Message(role="assistant", content=answer, weight=weight),
        ),
    )


def turns(count, *, id="long", reasoning=False):
    messages = []
    for turn in range(count):
        thought = "<think>\nfirst, second\n</think>\n\n" if reasoning else ""
        messages.append(Message(role="user", content=f"ask {turn} " + "you " * 3))
        messages.append(Message(role="assistant", content=f"{thought}reply {turn}."))
    return Dialogue(id=id, messages=tuple(messages), where="said.jsonl:2")


TREE = next(
    parse_records(
        [
            {
                "id": "tree",
                "messages": [
                    {"id": "q", "role": "user", "content": "Hi"},
                    {"id": "a", "parent": "q", "role": "assistant", "content": "Hello there"},
                    {"id": "b", "parent": "q", "role": "assistant", "content": "Hello!"},
                    {"id": "r", "parent": "a", "role": "user", "content": "So?"},
                    {"id": "s", "parent": "r", "role": "assistant", "content": "Yes."},
                ],
            }
        ]
    )
)


class TeacherTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.create_tempdir().full_path)
        self.path = self.directory / "teacher.safetensors"

    def write(self, dialogues, family="chatml"):
        """What the teacher said of which string of tokens."""
        saying = Saying()
        with teacher_file.write_file(self.path, top_k=_TOP, tokenizer="T", vocabulary=512) as add:
            for dialogue in dialogues:
                add(dialogue.id, saying.signals(dialogue, family))
        return saying.of_context

    def prepare(
        self,
        dialogues,
        family="chatml",
        *,
        tokenizer="T",
        max_length=1000,
        truncate="turns",
        share_prefixes=False,
        virtual_tokens=NONE,
        **objective,
    ):
        return dataset.prepare(
            dialogues,
            Renderer(chat_templates.train_tokenizer(family), virtual_tokens=virtual_tokens),
            TreeConfig(
                objective=ObjectiveConfig(**objective),
                max_length=max_length,
                truncate=truncate,
                share_prefixes=share_prefixes,
            ),
            teacher=teacher_file.read_file(self.path, tokenizer=tokenizer),
        )


class FileTest(TeacherTest):
    def test_the_library_reads_what_was_written(self):
        dialogues = [two_turns(), turns(0, id=7), turns(3, id=1)]
        said = self.write(dialogues)
        self.assertEqual([file.name for file in self.directory.iterdir()], [self.path.name])
        arrays = safetensors.numpy.load_file(self.path)
        with safetensors.safe_open(self.path, "numpy") as file:
            self.assertEqual(
                file.metadata(), {"ids": '["a", 7, 1]', "tokenizer": "T", "vocabulary": "512", "template_time": ""}
            )
        expected = [(number, *r) for number, d in enumerate(dialogues) for r in responses_of(d, "chatml")]
        np.testing.assert_array_equal(arrays["response_dialogue"], [number for number, *_ in expected])
        np.testing.assert_array_equal(arrays["response_message"], [message for _, message, *_ in expected])
        np.testing.assert_array_equal(arrays["token"], [token for *_, response in expected for token in response])
        np.testing.assert_array_equal(np.diff(arrays["response_offset"]), [len(response) for *_, response in expected])
        words = [
            said[(*prompt, *response[: stop + 1])]
            for _, _, prompt, response in expected
            for stop in range(len(response))
        ]
        np.testing.assert_array_equal(arrays["top_token"], np.array(words)[:, None] + [0, 1, 2])
        self.assertEqual(arrays["top_log_probability"].dtype, np.float32)
        self.assertEqual(arrays["response_prompt"].dtype, np.int64)

    def test_error_while_writing_leaves_what_was_there(self):
        self.path.write_text("earlier")
        with (
            self.assertRaisesRegex(ValueError, "two dialogues have the id 'a', which teacher.safetensors could"),
            teacher_file.write_file(self.path, top_k=_TOP, tokenizer="T", vocabulary=512) as add,
        ):
            add("a", Saying().signals(two_turns(), "chatml"))
            add("a", [])
        self.assertEqual([file.name for file in self.directory.iterdir()], [self.path.name])
        self.assertEqual(self.path.read_text(), "earlier")

    def test_a_file_that_is_none_of_these_is_refused(self):
        for nothing in (self.path, self.directory):
            with self.assertRaisesRegex(ValueError, f"{nothing.name} is not a file.*--top_k"):
                teacher_file.read_file(nothing, tokenizer="T")
        self.write([two_turns()])
        self.path.write_bytes(self.path.read_bytes()[:-8])
        with self.assertRaisesRegex(ValueError, "teacher.safetensors is not a complete safetensors file"):
            teacher_file.read_file(self.path, tokenizer="T")
        safetensors.numpy.save_file({"embedding": np.zeros(3)}, self.path)
        with self.assertRaisesRegex(ValueError, "teacher.safetensors is not a teacher's file. Make it with"):
            teacher_file.read_file(self.path, tokenizer="T")
        self.write([])
        with self.assertRaisesRegex(ValueError, "teacher.safetensors has no response"):
            teacher_file.read_file(self.path, tokenizer="T")

    @parameterized.parameters((np.nan, "sum to nan"), (0.5, r"sum to 2\.\d+"))
    def test_what_are_no_probabilities_is_refused(self, value, message):
        self.write([two_turns()])
        arrays = safetensors.numpy.load_file(self.path)
        arrays["top_log_probability"][4, 1] = value
        safetensors.numpy.save_file(arrays, self.path, {"ids": '["a"]'})
        with self.assertRaisesRegex(ValueError, f"the probabilities at token 4 {message}"):
            teacher_file.read_file(self.path, tokenizer="T")

    def test_digest_tells_files_apart(self):
        digests = set()
        for dialogue in (two_turns(), turns(2)):
            self.write([dialogue])
            digests.add(teacher_file.read_file(self.path, tokenizer="T").digest)
        self.assertLen(digests, 2)


class PrepareTest(TeacherTest):
    @parameterized.named_parameters(
        ("one_path", "chatml", {}),
        ("reasoning_stripped_from_history", "qwen3", {}),
        ("sentencepiece", "mistral", {}),
        ("joint", "chatml", {"name": "joint"}),
        ("last", "qwen3", {"name": "last"}),
        ("every_path_by_itself", "chatml", {"merge_weights": "sum"}),
        ("shared_system_prompt", "chatml", {"name": "joint", "share_prefixes": True}),
    )
    def test_every_target_of_a_response_has_the_word_for_its_own_context(self, family, objective):
        dialogues = [turns(4, reasoning=family == "qwen3"), TREE, two_turns(), turns(1, id=3), two_turns(id=4)]
        said = self.write(dialogues[::-1], family)  # the order of the file is its own affair
        trees = self.prepare(dialogues, family, **objective)
        numbers = list(range(len(trees)))
        batch = batches.fill_rows(trees, [numbers, []], max_length=500)
        self.assertEqual(batch.segment.max() < len(trees), "share_prefixes" in objective)
        self.assertEqual(batch.teacher_token.shape, (2, 500, _TOP))
        taught = (batch.weight > 0) & (batch.turn >= 0)
        self.assertGreater(taught.sum(), 40)
        np.testing.assert_array_equal(np.isfinite(batch.teacher_log_probability).all(axis=-1), taught)
        np.testing.assert_array_equal(np.isfinite(batch.teacher_log_probability).any(axis=-1), taught)
        for b, s in zip(*np.nonzero(taught), strict=True):
            source = batch.source[b, s]
            seen = np.flatnonzero((np.arange(500) <= source) & (source < batch.subtree_end[b]))
            context = (*batch.tokens[b, seen].tolist(), int(batch.target[b, s]))
            np.testing.assert_array_equal(batch.teacher_token[b, s], said[context] + np.arange(_TOP))

    def test_a_soft_prompt_is_no_part_of_what_the_teacher_read(self):
        dialogues = [turns(2), TREE, two_turns()]
        self.write(dialogues)
        without, trees = self.prepare(dialogues), self.prepare(dialogues, virtual_tokens=VirtualTokens(512, 5))
        for number in range(len(without)):
            np.testing.assert_array_equal(
                trees.teacher_rows(number), np.pad(without.teacher_rows(number), (5, 0), constant_values=-1)
            )
        batch = batches.fill_rows(trees, [list(range(len(trees)))], max_length=500)
        other = batches.fill_rows(without, [list(range(len(trees)))], max_length=500)
        self.assertEqual(batch.segment.max(), 1)
        np.testing.assert_array_equal(batch.teacher_token, other.teacher_token)

    def test_pieces_of_a_long_dialogue_have_the_teacher_of_the_whole(self):
        dialogue = turns(6)
        self.write([dialogue])
        trees = self.prepare([dialogue], max_length=90, truncate="split")
        self.assertGreater(len(trees), 1)
        rows = [
            trees.teacher_row[trees.offsets[number] + prefix_tree.find_targets(trees.tree(number))[1]]
            for number in range(len(trees))
        ]
        np.testing.assert_array_equal(np.concatenate(rows), np.arange(len(trees.teacher.token)))

    @parameterized.parameters((turns(6, reasoning=True), "qwen3"), (TREE, "chatml"))
    def test_parts_of_a_divided_tree_have_the_teacher_of_each_target_once(self, dialogue, family):
        """Also where the parts repeat a target: in TREE, two responses begin with the same token."""
        said = self.write([dialogue], family)
        longest = max(len(prompt) + len(response) for _, prompt, response in responses_of(dialogue, family))
        trees = self.prepare([dialogue], family, max_length=longest)
        self.assertEqual((trees.report.divided, len(trees) > 1), (1, True))
        rows = []
        for number in range(len(trees)):
            tree, teacher_rows = trees.tree(number), trees.teacher_rows(number)
            np.testing.assert_array_equal(teacher_rows >= 0, tree.weight > 0)
            for node in np.flatnonzero(tree.weight > 0).tolist():
                context = tuple(tree.tokens[oracles.context(tree, node)].tolist())
                np.testing.assert_array_equal(
                    trees.teacher.top_token[teacher_rows[node]], said[context] + np.arange(_TOP)
                )
            rows += teacher_rows[teacher_rows >= 0].tolist()
        self.assertLen(set(rows), len(rows))
        self.assertLen(rows, len(said))

    def test_stored_trees_give_the_same_batches(self):
        dialogues = [two_turns(), turns(3)]
        self.write(dialogues)
        made = self.prepare(dialogues)
        file = teacher_file.read_file(self.path, tokenizer="T")
        renderer, config = Renderer(chat_templates.train_tokenizer("chatml")), TreeConfig(max_length=1000)
        for _ in range(2):  # made, then read
            stored = disk_cache.load_or_build(
                self.directory / "trees", {"teacher": file.digest}, dialogues, renderer, config, teacher=file
            )
            options = {"max_length": 200}
            for a, b in zip(
                batches.fill_rows(made, [[1, 0]], **options),
                batches.fill_rows(stored, [[1, 0]], **options),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b)
        plan = batches.Plan(stored, max_length=200, rows=1, micro_batches=2, seed=0)
        self.assertEqual(plan.batch(0).teacher_token.shape, (2, 1, 200, _TOP))

    @parameterized.named_parameters(
        (
            "no_dialogue",
            two_turns(id="b"),
            "T",
            r"message 2 has no teacher: teacher.safetensors has no dialogue with this",
        ),
        (
            "no_message",
            two_turns(weight=0.0),
            "T",
            "message 4 has no teacher: teacher.safetensors has only other messages",
        ),
        ("shorter", two_turns(answer="I am"), "T", r"message 4, token \d+: its id is \d+ here, but is \d+ in teacher"),
        ("other", two_turns(answer="You"), "T", "message 4, token 0: .* the chat template or the dialogue has changed"),
        ("tokenizer", two_turns(answer="You"), "U", "message 4, token 0: .* the tokenizer differs. Score again"),
        (
            "prompt",
            two_turns(question="What?"),
            "T",
            "message 4: teacher.safetensors has the same response after another",
        ),
    )
    def test_what_the_teacher_did_not_read_is_an_error(self, scored, tokenizer, message):
        self.write([scored])
        with self.assertRaisesRegex(ValueError, rf"dialogue a \(said.jsonl:1\): {message}"):
            self.prepare([two_turns()], tokenizer=tokenizer)

    def test_end_that_the_teacher_did_not_read_is_an_error(self):
        self.write([two_turns()])
        arrays = safetensors.numpy.load_file(self.path)
        for name in ("token", "top_token", "top_log_probability"):
            arrays[name] = arrays[name][:-1]
        arrays["response_offset"][-1] -= 1
        safetensors.numpy.save_file(arrays, self.path, {"ids": '["a"]'})
        at, token = len(responses_of(two_turns(), "chatml")[1][2]) - 1, responses_of(two_turns(), "chatml")[1][2][-1]
        with self.assertRaisesRegex(ValueError, f"message 4, token {at}: its id is {token} here, but is missing in"):
            self.prepare([two_turns()])

    def test_other_token_is_named(self):
        other = two_turns(answer="I am well.")
        self.write([other])
        mine, theirs = (responses_of(dialogue, "chatml")[1][2] for dialogue in (two_turns(), other))
        at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
        self.assertGreater(at, 0)
        with self.assertRaisesRegex(
            ValueError, f"message 4, token {at}: its id is {mine[at]} here, but is {theirs[at]} in teacher.safetensors"
        ):
            self.prepare([two_turns()])

    def test_response_of_weight_0_needs_no_teacher(self):
        self.write([two_turns(weight=0.0)])
        trees = self.prepare([dataclasses.replace(two_turns(weight=0.0), metadata={"kept": True})])
        self.assertLen(trees, 1)


if __name__ == "__main__":
    absltest.main()
