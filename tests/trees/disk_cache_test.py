"""Stored trees: the same as in memory whatever builds them, built once, and never half of them."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
import unittest
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.rendering import template_process
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.template_process import TemplateStopped
from dialog_jax.trees import chunks as chunks_lib
from dialog_jax.trees import dataset, disk_cache, teacher_file, worker_pool
from dialog_jax.trees.dialogue_trees import TreeConfig
from tests.rendering import chat_templates
from tests.trees import teacher_test
from tests.trees.dataset_test import said, turns


class Arguments(NamedTuple):
    """What trees are built with."""

    renderer: Renderer
    config: TreeConfig
    teacher: teacher_file.TeacherFile | None = None


def arguments(*, family="chatml", template="", file=None, max_length=300, **config):
    tokenizer = chat_templates.train_tokenizer.__wrapped__(family)
    tokenizer.chat_template = template or tokenizer.chat_template
    return Arguments(Renderer(tokenizer), TreeConfig(max_length=max_length, **config), file)


def awkward(count):
    """Dialogues of several lengths, some too long, some without target, with ids of both kinds."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        name = number if number % 3 else f"ö {number}"
        if number % 11 == 5:
            made.append(said(("user", "a"), id=number))
        elif number % 13 == 7:
            made.append(turns(30, id=number))
        else:
            one = chat_templates.random_dialogue(rng, turns=1 + number % 4, system=number % 2 == 0)
            made.append(dataclasses.replace(one, id=name, where=f"said.jsonl:{number + 1}"))
    return made


def in_memory(dialogues, given):
    return dataset.prepare(dialogues, given.renderer, given.config, teacher=given.teacher)


def files_of(directory):
    (stored,) = [path for path in pathlib.Path(directory).iterdir() if path.suffix != ".lock"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(stored.iterdir())}


def together(count):
    """So many dialogues in a chunk."""
    return mock.patch.object(chunks_lib, "_MAX_DIALOGUES", count)


def build_in_small_chunks(directory, dialogues, *, barrier=None, stop=None):
    """In a process of its own; leaves a file for each process that builds.

    Begins when all processes have come to `barrier`, and waits to be killed when it has read `stop` dialogues.
    """
    given = arguments()
    if barrier:
        barrier.wait(timeout=60)

    def read():
        (pathlib.Path(directory) / f"made by {os.getpid()}").touch()
        yield from dialogues[:stop]
        if stop:
            signal.pause()

    with together(16):
        disk_cache.load_or_build(directory, {"a": 1}, read(), given.renderer, given.config, workers=0, seconds=0.0)


class StorageTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.create_tempdir().full_path)

    def load(self, dialogues, given=None, *, name="trees", key=None, **options):
        renderer, config, taught = given or arguments()
        return disk_cache.load_or_build(
            self.directory / name, key or {"a": 1}, dialogues, renderer, config, teacher=taught, **options
        )

    def assert_same(self, got, wanted):
        for field in dataclasses.fields(dataset.Trees):
            if field.name in ("ids", "report", "teacher", "skipped"):
                continue
            one, other = getattr(got, field.name), getattr(wanted, field.name)
            self.assertEqual(one is None, other is None)
            if one is not None:
                np.testing.assert_array_equal(one, other, err_msg=field.name)
                self.assertEqual(one.dtype, other.dtype, field.name)
        self.assertEqual(list(got.ids), list(wanted.ids))
        self.assertEqual(got.report, wanted.report)
        self.assertEqual(tuple(got.skipped), tuple(wanted.skipped))

    @pytest.mark.full
    def test_bad_records_are_left_out_and_listed_whatever_builds_the_trees(self):
        given = arguments(family="gemma", on_error="skip")
        refused = [said(("system", "a"), ("user", "b"), ("assistant", "c"), id=number) for number in (3, 20)]
        good = [turns(2, id=number, system=False) for number in range(30)]
        records = [*good[:7], UserError("x.jsonl:8: not JSON"), refused[0], *good[7:20], refused[1], *good[20:]]
        wanted = in_memory(records, given)
        self.assert_same(
            dataclasses.replace(wanted, skipped=(), report=in_memory(good, given).report), in_memory(good, given)
        )
        self.assertEqual((wanted.report.dialogues, wanted.report.skipped), (30, 3))
        self.assertLen(wanted.skipped, 3)
        self.assertEqual(wanted.skipped[0], "x.jsonl:8: not JSON")
        for error, number in zip(wanted.skipped[1:], (3, 20), strict=True):
            self.assertRegex(error, rf"^dialogue {number} \(said.jsonl:{number + 1}\): .*System role not supported")
        for name, processes, count in (("a", 0, 1), ("b", 2, 8)):
            with together(count):
                trees = self.load(iter(records), given, name=name, workers=processes, seconds=0.0)
            self.assert_same(trees, wanted)
            self.assert_same(self.load(iter(()), given, name=name), wanted)

        def interrupted():
            yield from records[:17]
            raise KeyboardInterrupt

        with together(4), self.assertRaises(KeyboardInterrupt):
            self.load(interrupted(), given, name="c", workers=0, seconds=0.0)
        with together(5):
            self.assert_same(self.load(iter(records), given, name="c", workers=0), wanted)
        text = str(wanted.report)
        self.assertIn("30 dialogues read", text)
        self.assertIn("3 skipped because of errors: x.jsonl:8: not JSON; dialogue 3", text)
        self.assertIn("3 skipped because of errors, listed in s.txt", wanted.report.format("names", "s.txt"))

    def test_bad_record_stops_the_build_unless_it_is_skipped(self):
        refused = said(("system", "a"), ("user", "b"), ("assistant", "c"), id=3)
        for record, reason in ((UserError("x.jsonl:8: not JSON"), "not JSON"), (refused, "System role")):
            with self.assertRaisesRegex(UserError, reason):
                in_memory([turns(1, system=False), record], arguments(family="gemma"))

    def test_stopped_template_is_not_skipped(self):
        loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        template = "{% if messages[0].content == 'loop' %}" + loops + "{% endif %}" + chat_templates.TEMPLATES["chatml"]
        given = arguments(template=template, on_error="skip")
        records = [turns(1), said(("user", "loop"), ("assistant", "a"), id=1)]
        with (
            mock.patch.object(template_process, "SECONDS", 1.0),
            self.assertRaisesRegex(TemplateStopped, r"dialogue 1 .*more than 1 s"),
        ):
            in_memory(records, given)

    @parameterized.parameters("turns", "split")
    @pytest.mark.full
    def test_any_workers_and_any_chunks_give_the_same_bytes(self, truncate):
        given = arguments(truncate=truncate, share_prefixes=True)
        dialogues = awkward(60)
        wanted = in_memory(dialogues, given)
        self.assertGreater(wanted.report.dropped_no_target, 0)
        for name, processes, count in (("a", 0, 256), ("b", 0, 1), ("c", 1, 7), ("d", 2, 8)):
            with together(count):
                trees = self.load(iter(dialogues), given, name=name, workers=processes, seconds=0.0)
            self.assert_same(trees, wanted)
            files = files_of(self.directory / name)
            self.assertEqual(files, files_of(self.directory / "a"), name)

    def test_trees_are_built_once_and_then_mapped(self):
        first = self.load(awkward(20))
        again = self.load(iter(()))  # nothing is read
        self.assert_same(again, first)
        self.assertIsInstance(again.tokens, np.memmap)
        self.assertEqual(again.ids[-1], list(again.ids)[-1])
        self.assertEqual(again.ids[1:3], list(again.ids)[1:3])
        with self.assertRaises(IndexError):
            again.ids[len(again)]
        (stored,) = (self.directory / "trees").iterdir()
        report = json.loads((stored / "report.json").read_text(encoding="utf-8"))
        self.assertEqual(report["named"], first.report.named)

    def test_another_key_is_another_directory(self):
        self.assertLen(self.load([turns(1), turns(2, id=1)], key={"a": 1}), 2)
        self.assertLen(self.load([turns(1)], key={"a": 2}), 1)
        self.assertLen(self.load(iter(()), key={"a": 1}), 2)
        self.assertLen(list((self.directory / "trees").iterdir()), 2)

    @parameterized.parameters((0, (3, 20, 41)), (2, (20, 41)))
    @pytest.mark.full
    def test_an_interrupted_build_goes_on_behind_its_journal(self, processes, stops):
        dialogues = awkward(60)
        wanted = in_memory(dialogues, arguments())
        given = []

        def interrupted(stop):
            for number, dialogue in enumerate(dialogues):
                if number == stop:
                    raise KeyboardInterrupt
                yield dialogue

        with together(4):
            for stop in stops:
                with self.assertRaises(KeyboardInterrupt):
                    self.load(interrupted(stop), workers=processes, seconds=0.0)
                (unfinished,) = (self.directory / "trees").glob("*.unfinished")
                with (unfinished / "tokens").open("ab") as column:  # what was written after the last journal
                    column.write(bytes(7))
            journal = json.loads((unfinished / "journal.json").read_text())
            self.assertGreater(journal["counts"]["dialogues"], 20)
            batched = chunks_lib.batch_dialogues
            with mock.patch.object(
                chunks_lib, "batch_dialogues", lambda rest: given.append(rest := list(rest)) or batched(rest)
            ):
                trees = self.load(iter(dialogues), workers=processes)
        self.assertLen(given[0], 60 - journal["counts"]["dialogues"])
        self.assert_same(trees, wanted)
        self.load(dialogues, name="undisturbed", workers=0)
        self.assertEqual(files_of(self.directory / "trees"), files_of(self.directory / "undisturbed"))

    def test_columns_shorter_than_their_journal_are_built_from_the_beginning(self):
        dialogues = awkward(30)

        def interrupted():
            yield from dialogues[:20]
            raise KeyboardInterrupt

        with together(4), self.assertRaises(KeyboardInterrupt):
            self.load(interrupted(), workers=0, seconds=0.0)
        (unfinished,) = (self.directory / "trees").glob("*.unfinished")
        with (unfinished / "turn").open("r+b") as column:
            column.truncate(8)
        self.assert_same(self.load(dialogues), in_memory(dialogues, arguments()))

    @pytest.mark.full
    def test_a_killed_build_leaves_its_lock_and_the_next_one_goes_on(self):
        dialogues = [turns(2 + n % 3, id=n) for n in range(60)]
        process = multiprocessing.get_context("spawn").Process(
            target=build_in_small_chunks, args=(str(self.directory / "trees"), dialogues), kwargs={"stop": 40}
        )
        process.start()
        deadline = time.monotonic() + 60
        while not list((self.directory / "trees").glob("*.unfinished/journal.json")):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.02)
        process.kill()
        process.join()
        with together(16):
            trees = self.load(dialogues, workers=0)
        self.assert_same(trees, in_memory(dialogues, arguments()))

    @pytest.mark.full
    def test_of_two_processes_one_builds_and_the_other_waits(self):
        dialogues = [turns(2 + n % 3, id=n) for n in range(100)]
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(2)
        others = [
            context.Process(
                target=build_in_small_chunks,
                args=(str(self.directory / "trees"), dialogues),
                kwargs={"barrier": barrier},
            )
            for _ in range(2)
        ]
        for other in others:
            other.start()
        for other in others:
            other.join()
            self.assertEqual(other.exitcode, 0)
        made = list((self.directory / "trees").glob("made by *"))
        self.assertLen(made, 1)
        made[0].unlink()
        self.assertLen(list((self.directory / "trees").iterdir()), 1)
        self.assert_same(self.load(iter(())), in_memory(dialogues, arguments()))

    def test_an_error_in_the_data_names_the_dialogue_and_leaves_nothing(self):
        dialogues = [turns(1, system=False, id=id) for id in range(40)] + [turns(1, id=40)]
        for processes in (0, 2):
            with together(8), self.assertRaisesRegex(ValueError, r"dialogue 40 \(said.jsonl:41\).*refuses"):
                self.load(dialogues, arguments(family="gemma"), workers=processes)
            self.assertEmpty(list((self.directory / "trees").glob("*.unfinished")))
        with self.assertRaisesRegex(ValueError, r"(?s)None of 1 dialogues has a target.*said.jsonl:1"):
            self.load([said(("user", "a"), ("assistant", "b", 0))])

    @pytest.mark.full
    def test_a_worker_that_is_killed_costs_no_work(self):
        dialogues = [turns(2 + n % 3, id=n) for n in range(60)]
        receive, given = worker_pool._Worker.receive, []

        def killed(worker, seconds):
            given.append(worker)
            if len(given) == 5:
                worker.process.kill()
                worker.process.wait()
            return receive(worker, seconds)

        with together(6), mock.patch.object(worker_pool._Worker, "receive", killed):
            with self.assertRaisesRegex(
                ValueError, r"dialogue \d+ \(said.jsonl:\d+\) to dialogue \d+ .* ended \(exit code -9\)"
            ) as refused:
                self.load(dialogues, workers=1, seconds=0.0)
            (unfinished,) = (self.directory / "trees").glob("*.unfinished")
            kept = json.loads((unfinished / "journal.json").read_text())["counts"]["dialogues"]
            self.assertIn(kept, (24, 30))  # the fifth chunk may have been sent before
            self.assertStartsWith(str(refused.exception), f"dialogue {kept} (")
            before = len(given)
            self.assert_same(self.load(dialogues, workers=1), in_memory(dialogues, arguments()))
        self.assertLen(given, before + 10 - kept // 6)

    def test_a_column_of_another_length_is_refused(self):
        self.load(awkward(10))
        (stored,) = [path for path in (self.directory / "trees").iterdir() if path.is_dir()]
        with (stored / "weight").open("ab") as column:
            column.write(bytes(4))
        with self.assertRaisesRegex(ValueError, "weight: has .* bytes; needed .* Remove the directory"):
            self.load(iter(()))

    @pytest.mark.full
    def test_a_teacher_is_read_by_each_worker(self):
        dialogues = [teacher_test.turns(1 + n % 3, id=n) for n in range(12)]
        saying = teacher_test.Saying()
        path = self.directory / "teacher.safetensors"
        with teacher_file.write_file(path, top_k=3, tokenizer="T", vocabulary=512) as add:
            for dialogue in dialogues:
                add(dialogue.id, saying.signals(dialogue, "chatml"))
        given = arguments(file=teacher_file.read_file(path, tokenizer="T"))
        wanted = in_memory(dialogues, given)
        with together(3):
            trees = self.load(dialogues, given, workers=2)
            self.assert_same(trees, wanted)
            self.assertIs(trees.teacher, given.teacher)
            other = [*dialogues, teacher_test.turns(2, id=99)]
            with self.assertRaisesRegex(ValueError, "dialogue 99 .*has no dialogue with this id"):
                self.load(other, given, workers=2, key={"a": 2})


@unittest.skipUnless(sys.platform == "linux", "the limit is the Linux one")
class BoundedMemoryTest(absltest.TestCase):
    @pytest.mark.full
    def test_a_set_20_times_larger_than_the_memory_is_stored_and_read(self):
        directory = self.create_tempdir().full_path
        program = pathlib.Path(__file__).with_name("bounded_memory.py")
        environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, str(program), directory, "8"], capture_output=True, text=True, env=environment
        )
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        limit, stored, trees, tokens, whole = done.stdout.split()
        self.assertEqual(int(limit), 8 << 20)
        self.assertGreaterEqual(int(stored), 20 * int(limit))
        self.assertEqual(int(tokens) * 24, int(stored))  # every token was in a batch
        self.assertGreater(int(trees), 1000)
        self.assertEqual(whole, "refused")  # to have them in memory, as a check that the limit is one


class WorkersTest(parameterized.TestCase):
    def build(self, batches, given, **options):
        return list(worker_pool.build_chunks(batches, *given, workers=2, **options))

    def test_a_template_that_does_not_end_is_ended_and_its_dialogues_named(self):
        loop = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
        template = (
            "{% for m in messages %}{% if m.content == 'Loop.' %}" + loop + "{% endif %}"
            "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
        batches = [[turns(1, id=1), said(("user", "Loop."), ("assistant", "a"), id=2)], [turns(1, id=3)]]
        with self.assertRaisesRegex(ValueError, r"dialogue 1 \(said.jsonl:2\) to dialogue 2 .* not rendered after 1"):
            self.build(batches, arguments(template=template), seconds=1.0)

    @pytest.mark.full
    def test_what_needs_too_much_memory_is_named(self):
        huge = said(("user", "a " * 3_000_000), ("assistant", "b"), id=1)
        with self.assertRaisesRegex(ValueError, r"dialogue 1 \(said.jsonl:2\): (need more memory|the process that)"):
            self.build([[turns(1)], [huge], [turns(1, id=2)]], arguments(max_length=10**8), memory=300 << 20)

    @pytest.mark.full
    def test_bug_in_a_worker_is_an_error_with_its_traceback_and_not_a_users(self):
        broken = turns(1, id=1)
        object.__setattr__(broken, "messages", (None,))  # no data gives this, so that what it causes is a bug
        with self.assertRaisesRegex(
            RuntimeError,
            r"(?s)^dialogue 1 .*: a bug in the process that rendered them:\nTraceback .* in build_chunk\n.*AttributeEr",
        ):
            self.build([[turns(1)], [broken], [turns(1, id=2)]], arguments())

    def test_no_process_stays(self):
        chunks = worker_pool.build_chunks([[turns(1, id=n)] for n in range(9)], *arguments(), workers=2)
        next(chunks)
        chunks.close()
        self.assertEmpty(multiprocessing.active_children())
        children = subprocess.run(["ps", "-o", "args", "--ppid", str(os.getpid())], capture_output=True, text=True)
        self.assertNotIn("workers", children.stdout)

    def test_a_worker_loads_no_jax(self):
        code = "import sys, dialog_jax.trees.worker_pool; print('jax' in sys.modules, 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout.split(), ["False", "False"])


if __name__ == "__main__":
    absltest.main()
