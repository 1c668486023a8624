"""Whole runs of a tiny model: what they write, how they go on, and how they refuse."""

import dataclasses
import datetime
import io
import json
import math
import os
import pathlib
import shutil
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import rich.console
from absl.testing import absltest, parameterized

from dialog_jax.attention import blockwise, dispatch
from dialog_jax.dialogues import holdout
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.errors import UserError
from dialog_jax.evaluation import scoring
from dialog_jax.model import decoder, saving
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import fingerprint
from dialog_jax.training import checkpoints, metrics, run_directory, run_inputs, sessions
from dialog_jax.training import loop as loop_lib
from dialog_jax.training import run as run_lib
from dialog_jax.training import train_step as step_lib
from dialog_jax.training.config import LossConfig, MeshConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from dialog_jax.training.signals import StoppedError
from dialog_jax.trees import disk_cache, teacher_file
from tests.rendering import chat_templates
from tests.training import tiny


def damage(checkpoint):
    """Changes one bit of an array of a checkpoint: orbax notices nothing.

    A bit of a file will not do: some bytes of the files that orbax writes belong to no array.
    """
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(checkpoint.absolute() / "trained")
        tree["final_norm"] = np.array(tree["final_norm"])
        tree["final_norm"].view(np.uint32)[3] ^= 1
        checkpointer.save(checkpoint.absolute() / "trained", tree, force=True)


class RunTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(tiny.shared_programs())
        self.directory = pathlib.Path(self.create_tempdir().full_path)
        self.config = tiny.run_config(self.directory)
        self.output = io.StringIO()

    def run_in(self, name, *, allow_changes=False, **changes):
        console = rich.console.Console(file=self.output, highlight=False, soft_wrap=True)
        config = dataclasses.replace(self.config, **changes)
        return run_lib.run(config, self.directory / name, allow_changes=allow_changes, console=console)

    def steps_of(self, name):
        """The steps that have a checkpoint."""
        return sorted(int(path.name) for path in (self.directory / name / "checkpoints").iterdir())

    def parameters_of(self, name, step):
        model = run_directory.read_model(self.directory / name).decoder
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            ),
            decoder.abstract_parameters(model),
        )
        return jax.device_get(checkpoints.restore_trained(self.directory / name / "checkpoints", step, like))

    def test_run_learns_and_writes_what_it_says(self):
        result = self.run_in("run")
        self.assertLess(result.final["loss"], result.initial["loss"] - 0.05)
        lines = metrics.read_records(self.directory / "run" / "metrics.jsonl")
        self.assertEqual([line["step"] for line in lines], [1, 2, 3, 4, 5, 6])
        for line in lines:
            self.assertContainsSubset(
                {
                    "loss",
                    "gradient_norm",
                    "learning_rate",
                    "tokens_per_second",
                    "response_tokens_per_second",
                    "row_tokens_used",
                },
                line,
            )
            self.assertTrue(all(math.isfinite(value) for value in line.values()))
        self.assertEqual(lines[0]["learning_rate"], np.float32(3e-3))
        self.assertEqual(["startup_seconds" in line for line in lines], [True] + [False] * 5)
        held_out = metrics.read_records(self.directory / "run" / "evaluation.jsonl")
        self.assertEqual([line["step"] for line in held_out], [0, 2, 4, 6])
        self.assertEqual([turn["turn"] for turn in held_out[0]["turns"]], [0, 1, 2])
        self.assertEqual(sum(turn["targets"] for turn in held_out[0]["turns"]), held_out[0]["targets"])
        self.assertNotEmpty(list((self.directory / "run" / "tensorboard").iterdir()))
        best = min(held_out[1:], key=lambda line: line["loss"])["step"]
        self.assertEqual(self.steps_of("run"), sorted({4, 6, best}))
        (session,) = sessions.read_sessions(self.directory / "run")
        self.assertEqual((session["step"], session["processes"], session["devices"]), (0, 1, {"cpu": 8}))
        self.assertEqual(session["packages"]["jax"], jax.__version__)
        self.run_in("run")  # finished: it trains nothing
        self.assertLen(sessions.read_sessions(self.directory / "run"), 1)

    def test_run_without_validation_data_holds_a_share_out_and_says_so(self):
        data = dataclasses.replace(self.config.data, validation="", validation_share=0.2)
        self.run_in("run", steps=1, data=data)
        dialogues = list(read_dialogues(self.directory / "train.jsonl"))
        held_out = sum(holdout.hash_dialogue(dialogue) < 0.2 * 2**64 for dialogue in dialogues)
        log = self.output.getvalue()
        self.assertIn(
            f"data.validation is empty: 20% of train.jsonl is held out (dialogues: {held_out}), chosen by a", log
        )
        self.assertIn(f"train.jsonl: {len(dialogues) - held_out} dialogues read", log)
        self.assertIn(f"\n20% of train.jsonl: {held_out} dialogues read", log)
        self.assertEqual(self.run_in("run", steps=1, data=data).step, 1)
        changed = dataclasses.replace(data, validation_share=0.3)
        with self.assertRaisesRegex(ValueError, "another config .*validation_share"):
            self.run_in("run", steps=1, data=changed)

    @pytest.mark.full
    def test_extras_of_the_loss_reach_the_update_and_leave_held_out_figures_plain(self):
        result = self.run_in("run", steps=1, loss=LossConfig(z_loss=1.0))
        (line,) = metrics.read_records(self.directory / "run" / "metrics.jsonl")
        self.assertGreater(line["loss"], line["nll"] + 1)
        self.assertLess(abs(result.initial["loss"] - line["nll"]), 0.5)

    def taught(self, name, dialogues):
        """The config of a run whose teacher, another model, has read some dialogues; the file is at `name`."""
        tokenizer = chat_templates.train_tokenizer("chatml")
        model, renderer = tiny.config(len(tokenizer)), Renderer(tokenizer)
        scores = scoring.score_dialogues(
            dialogues, renderer, model, tiny.parameters(model, seed=1), compute_dtype=jnp.float32, top_k=8
        )
        told = {"top_k": 8, "tokenizer": fingerprint(tokenizer), "vocabulary": model.vocab_size}
        with teacher_file.write_file(self.directory / name, **told) as add:
            for score in scores:
                add(score.record["id"], score.signals)
        data = dataclasses.replace(self.config.data, teacher=str(self.directory / name))
        return {"data": data, "loss": LossConfig(distillation=1.0)}

    @pytest.mark.full
    def test_student_comes_near_its_teacher_and_resumes_with_that_teacher_only(self):
        dialogues = list(read_dialogues(self.directory / "train.jsonl"))
        config = self.taught("teacher.safetensors", dialogues)
        self.run_in("run", steps=6, **config)
        lines = metrics.read_records(self.directory / "run" / "metrics.jsonl")
        self.assertLess(lines[-1]["loss"], lines[0]["loss"] / 2)
        self.assertGreater(lines[0]["nll"], lines[0]["loss"] + 1)  # of random models, which are alike
        self.assertEqual(self.run_in("run", steps=6, **config).step, 6)
        self.taught("teacher.safetensors", dialogues[::-1])
        with self.assertRaisesRegex(ValueError, "another config or data \\(data.train: "):
            self.run_in("run", steps=6, **config)

    def test_teacher_that_has_not_read_the_data_claims_nothing(self):
        config = self.taught("teacher.safetensors", list(read_dialogues(self.directory / "train.jsonl"))[:20])
        with self.assertRaisesRegex(ValueError, r"dialogue train-20 \(train.jsonl:21\): .* has no teacher"):
            self.run_in("run", **config)
        self.assertFalse((self.directory / "run" / "config.json").exists())

    def test_teacher_with_a_larger_vocabulary_is_refused(self):
        signal = teacher_file.Signal(
            1, 0, np.zeros(1, np.int32), np.full((1, 1), 600, np.int32), np.zeros((1, 1), np.float32)
        )
        with teacher_file.write_file(self.directory / "t", top_k=1, tokenizer="", vocabulary=600) as add:
            add("train-0", [signal])
        data = dataclasses.replace(self.config.data, teacher=str(self.directory / "t"))
        with self.assertRaisesRegex(ValueError, "t names token 600, but the model's vocabulary has 512"):
            self.run_in("run", data=data, loss=LossConfig(distillation=0.5))

    def test_attention_kernel_that_this_device_lacks_is_an_error_and_claims_nothing(self):
        with self.assertRaisesRegex(UserError, "attention=pallas does not work here: pallas is a kernel for gpu"):
            self.run_in("run", attention="pallas")
        self.assertFalse((self.directory / "run" / "config.json").exists())

    @pytest.mark.full
    def test_soft_prompt_precedes_each_dialogue_where_the_kernel_supports_only_paths(self):
        turns = [{"role": role, "content": "Hello"} for role in ("user", "assistant")] * 2  # a path
        for name in ("train", "validation"):
            lines = [json.dumps({"id": n, "messages": turns[: 2 + 2 * (n % 2)]}) for n in range(8)]
            (self.directory / f"{name}.jsonl").write_text("\n".join(lines))
        fields = {"soft_prompt": SoftPromptConfig(tokens=5), "steps": 1}
        shared = self.run_in("run", **fields)
        self.assertNotIn("precedes each dialogue", self.output.getvalue())
        kernel = dispatch._Candidate("paths", "cpu", False, lambda: blockwise.attend)
        with mock.patch.object(dispatch, "_CANDIDATES", (kernel,)):
            repeated = self.run_in("other", **fields)
        self.assertIn(
            "the soft prompt precedes each dialogue of a row: paths is for rows of paths", self.output.getvalue()
        )
        self.assertAlmostEqual(shared.initial["loss"] / repeated.initial["loss"], 1, delta=1e-5)

    @pytest.mark.full
    def test_time_of_a_template_that_reads_the_clock_is_fixed_for_the_run(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        template = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}" + tokenizer.chat_template
        data = dataclasses.replace(self.config.data, chat_template=template)
        self.run_in("run", steps=2, data=data)
        stored = json.loads((self.directory / "run" / "config.json").read_text())["data"]["template_time"]
        self.assertIn(f"the chat template reads the clock: it is {stored} for this run", self.output.getvalue())
        with mock.patch.object(run_lib, "datetime") as later:
            later.datetime.now.return_value = datetime.datetime(2040, 1, 1)
            self.assertEqual(self.run_in("run", steps=4, data=data, allow_changes=True).step, 4)
            self.assertLen(list((self.directory / "run" / "trees").iterdir()), 2)  # of training and held-out data
            changed = dataclasses.replace(data, template_time="2040-01-01")
            with self.assertRaisesRegex(UserError, f"data.template_time: '{stored}' before, '2040-01-01' now"):
                self.run_in("run", steps=4, data=changed)
            self.run_in("later", steps=1, data=data)
        later_time = json.loads((self.directory / "later" / "config.json").read_text())["data"]["template_time"]
        self.assertEqual(later_time, "2040-01-01T00:00:00")
        hashes = [run_directory.read_hashes(self.directory / name)["data.train"] for name in ("run", "later")]
        self.assertNotEqual(*hashes)

    def test_teacher_of_another_time_is_refused_with_the_remedy(self):
        with teacher_file.write_file(
            self.directory / "t", top_k=1, tokenizer="", vocabulary=9, template_time="2026-07-01"
        ) as add:
            add(
                "a",
                [
                    teacher_file.Signal(
                        1, 0, np.zeros(1, np.int32), np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
                    )
                ],
            )
        template = "{{ strftime_now('%Y') }}" + chat_templates.train_tokenizer("chatml").chat_template
        data = dataclasses.replace(
            self.config.data, teacher=str(self.directory / "t"), chat_template=template, template_time="2026-07-02"
        )
        with self.assertRaisesRegex(
            UserError, "prompts is 2026-07-01, in .* 2026-07-02. Set data.template_time=2026-07-01"
        ):
            self.run_in("run", data=data, loss=LossConfig(distillation=0.5))

    @pytest.mark.full
    def test_no_absolute_path_is_written(self):
        self.run_in("run", steps=2)
        for file in (self.directory / "run").rglob("*"):
            if file.is_file() and file.name != "commit_success.txt":  # orbax's own
                self.assertNotIn(str(self.directory).encode(), file.read_bytes(), file.name)

    def test_run_stopped_by_an_error_goes_on_to_the_same_bits(self):
        self.run_in("whole")
        evaluations = 0
        original = metrics.Writer.evaluation

        def stop_after_the_third(writer, step, figures):
            nonlocal evaluations
            evaluations += 1
            original(writer, step, figures)
            if evaluations == 3:  # step 4: its checkpoint is never written
                raise KeyboardInterrupt

        with (
            mock.patch.object(metrics.Writer, "evaluation", stop_after_the_third),
            self.assertRaises(KeyboardInterrupt),
        ):
            self.run_in("stopped")
        self.run_in("stopped")
        self.assertIn("resuming from step 2", self.output.getvalue())
        self.assert_same("whole", "stopped")

    def assert_same(self, first, second):
        """Two runs ended in the same bits and wrote the same lines."""
        jax.tree.map(np.testing.assert_array_equal, self.parameters_of(first, 6), self.parameters_of(second, 6))
        for file in ("metrics.jsonl", "evaluation.jsonl"):
            lines = [metrics.read_records(self.directory / name / file) for name in (first, second)]
            self.assertEqual(*([(line["step"], line["loss"]) for line in written] for written in lines))

    def stopping_in(self, function, number):
        """Sends this process a signal when a function of `loop` is called for the third time."""
        original, calls = getattr(loop_lib, function), 0

        def called(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 3:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        return mock.patch.object(loop_lib, function, called)

    @parameterized.parameters(
        ("_place_batch", 4, signal.SIGTERM, 2),  # the first batch is taken by the evaluation before training
        ("_evaluate", 1, signal.SIGTERM, 4),
    )
    @pytest.mark.full
    def test_signal_elsewhere_finishes_the_step_saves_it_and_says_how_to_go_on(self, *case):
        self.check_signal(*case)

    def test_signal_finishes_the_step_saves_it_and_says_how_to_go_on(self):
        self.check_signal("_wait_for_figures", 1, signal.SIGINT, 4)

    def check_signal(self, function, rows, number, step):
        with self.stopping_in(function, number), self.assertRaises(StoppedError) as stopped:
            self.run_in("stopped", checkpoint_every=6, evaluate_rows=rows)
        self.assertEqual((stopped.exception.signal, stopped.exception.step), (number, step))
        self.assertRegex(str(stopped.exception), f"after step {step}, which is saved; the same command resumes the run")
        self.assertEqual(self.steps_of("stopped"), [step])
        self.run_in("stopped", checkpoint_every=6, evaluate_rows=rows)
        self.run_in("whole", checkpoint_every=6, evaluate_rows=rows)
        self.assert_same("whole", "stopped")

    def test_signal_before_there_is_anything_to_save_stops_at_once(self):
        with (
            mock.patch.object(run_lib, "_plan_steps", lambda *_: os.kill(os.getpid(), signal.SIGTERM)),
            self.assertRaisesRegex(StoppedError, "stopped by SIGTERM before its first step"),
        ):
            self.run_in("run")
        self.assertFalse((self.directory / "run" / "config.json").exists())
        self.assertEqual(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)

    @pytest.mark.full
    def test_damaged_checkpoint_is_told_and_the_one_before_gives_the_same_bits(self):
        self.run_in("whole")
        with self.stopping_in("_evaluate", signal.SIGTERM), self.assertRaises(StoppedError):
            self.run_in("run")
        self.assertEqual(self.steps_of("run"), [2, 4])
        damage(self.directory / "run" / "checkpoints" / "4")
        self.run_in("run")
        told = self.output.getvalue()
        self.assertRegex(told, "checkpoint 4 is not what was written: .* has another checksum")
        self.assertIn("checkpoint 4 was moved to damaged/4\nresuming from step 2", told)
        self.assert_same("whole", "run")

    @pytest.mark.full
    def test_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(self):
        with self.stopping_in("_evaluate", signal.SIGTERM), self.assertRaises(StoppedError):
            self.run_in("run")
        for step in (2, 4):
            shutil.rmtree(self.directory / "run" / "checkpoints" / str(step) / "trained" / "ocdbt.process_0")
        for _ in range(2):
            with self.assertRaisesRegex(ValueError, "none of the checkpoints 4, 2 can be read"):
                self.run_in("run")
        self.assertEqual(self.steps_of("run"), [2, 4])

    def test_two_runs_in_one_directory_are_refused(self):
        with (
            run_directory.lock(self.directory / "run"),
            self.assertRaisesRegex(ValueError, rf"run is in use: process {os.getpid()} on .* trains there"),
        ):
            self.run_in("run")
        self.run_in("run", steps=2)

    @pytest.mark.full
    def test_other_mesh_goes_on_to_the_same_parameters(self):
        # With so large an epsilon Adam does not turn the rounding of gradients near 0 into steps.
        optimizer = OptimizerConfig(learning_rate=3e-3, epsilon=1e-2)
        self.run_in("whole", optimizer=optimizer)
        with self.stopping_in("_evaluate", signal.SIGTERM), self.assertRaises(StoppedError):
            self.run_in("run", optimizer=optimizer)
        self.run_in("run", optimizer=optimizer, mesh=MeshConfig(data=4, fsdp=1, tensor=2), trackers=())
        gap = tiny.largest_difference(self.parameters_of("run", 6), self.parameters_of("whole", 6))
        self.assertLess(gap, 1e-6)

    @pytest.mark.full
    def test_finished_run_whose_last_checkpoint_is_damaged_makes_it_again(self):
        self.run_in("whole")
        shutil.copytree(self.directory / "whole", self.directory / "run")
        damage(self.directory / "run" / "checkpoints" / "6")
        self.assertEqual(self.run_in("run").step, 6)
        self.assert_same("whole", "run")

    @pytest.mark.full
    def test_numbers_of_another_type_are_refused_and_the_same_by_name_are_not(self):
        self.run_in("run", steps=2)
        with self.assertRaisesRegex(ValueError, "compute_dtype: float32 before, bfloat16 now"):
            self.run_in("run", steps=2, compute_dtype="bfloat16")
        self.assertEqual(self.run_in("run", steps=2, compute_dtype="float32").step, 2)

    @pytest.mark.full
    def test_same_files_in_another_place_are_the_same(self):
        self.run_in("run", steps=2)
        moved = self.directory / "moved.jsonl"
        shutil.copy(self.directory / "train.jsonl", moved)
        data = dataclasses.replace(self.config.data, train=str(moved))
        self.assertEqual(self.run_in("run", steps=2, data=data).step, 2)

    @pytest.mark.full
    def test_finished_run_is_left_alone(self):
        first = self.run_in("run", steps=2)
        again = self.run_in("run", steps=2)
        self.assertIn("Nothing to do", self.output.getvalue())
        self.assertEqual(first.final, again.final)

    @pytest.mark.full
    def test_directory_of_another_run_is_refused_with_the_fields_that_differ(self):
        self.run_in("run", steps=2)
        with self.assertRaisesRegex(ValueError, r"seed: 0 before, 1 now.*--output_dir"):
            self.run_in("run", steps=2, seed=1)

    @pytest.mark.full
    def test_changes_that_are_allowed_are_told_and_noted(self):
        self.run_in("run", steps=2)
        self.run_in("run", steps=4, seed=1, allow_changes=True)
        self.assertIn("changed: seed: 0 before, 1 now", self.output.getvalue())
        self.assertRegex(
            self.output.getvalue(), "steps: 2 before, 4 now. From here on the cosine schedule is that of 4 s"
        )
        (line,) = (self.directory / "run" / "changes.jsonl").read_text().splitlines()
        self.assertEqual(
            json.loads(line)["changes"],
            ["seed: 0 before, 1 now", "steps: 2 before, 4 now"],
        )
        self.assertEqual(self.run_in("run", steps=4, seed=1).step, 4)
        self.assertEqual(self.run_in("run", steps=3, seed=1, allow_changes=True).step, 4)
        self.assertIn("finished: step 4, beyond the 3 of the config. Nothing to do", self.output.getvalue())

    def test_claim_that_was_interrupted_is_made_again(self):
        tokenizer, synchronise = chat_templates.train_tokenizer("chatml"), os.fsync

        def claim(directory):
            run_directory.claim(directory, self.config, {}, tiny.config(64), tokenizer, stop_tokens={1})

        for number, torn in enumerate(("model.json", "inputs.json", "config.json")):
            directory = self.directory / f"torn {torn}"
            answers = iter([synchronise] * number + [mock.Mock(side_effect=OSError("No space left on device"))])
            with (
                mock.patch.object(os, "fsync", lambda file, answers=answers: next(answers)(file)),
                self.assertRaisesRegex(OSError, "No space"),
            ):
                claim(directory)
            self.assertFalse((directory / "config.json").exists())
            (directory / f".unfinished.{torn}").write_text("{")  # a killed process would leave it
            run_directory.check_directory(directory)
            claim(directory)
            self.assertEqual(run_directory.find_config_changes(directory, self.config), [])

    def test_directory_with_other_files_is_refused(self):
        (self.directory / "full").mkdir()
        (self.directory / "full" / "thesis.txt").write_text("precious")
        with self.assertRaisesRegex(ValueError, "full is not empty and holds no run"):
            self.run_in("full")
        self.assertEqual([file.name for file in (self.directory / "full").iterdir()], ["thesis.txt"])

    @parameterized.parameters("lr[1e-5]", "a/*/run", "runs?", "gs:/run")
    def test_directory_whose_checkpoints_could_not_be_read_is_refused_before_anything_is_written(self, name):
        with self.assertRaisesRegex(UserError, r"does not take literally. Choose a path without \[ \]"):
            self.run_in(name)
        self.assertFalse((self.directory / name.partition("/")[0]).exists())

    @pytest.mark.full
    def test_first_checkpoint_that_cannot_be_read_back_stops_the_run(self):
        check = checkpoints.check_saved

        def damage_and_check(directory, state):
            damage(directory / "2")
            check(directory, state)

        with (
            mock.patch.object(checkpoints, "check_saved", damage_and_check),
            self.assertRaisesRegex(
                UserError, "the first checkpoint, just written, cannot be read: checkpoint 2 is not"
            ),
        ):
            self.run_in("run")
        self.assertEqual(self.steps_of("run"), [2])

    @pytest.mark.full
    def test_home_directory_is_expanded(self):
        with mock.patch.dict(os.environ, {"HOME": str(self.directory)}):
            console = rich.console.Console(file=self.output)
            run_lib.run(dataclasses.replace(self.config, steps=1), "~/new/run", console=console)
        self.assertEqual(self.steps_of("new/run"), [1])

    def test_mistake_in_the_data_claims_nothing(self):
        data = dataclasses.replace(self.config.data, validation=str(self.directory / "validatoin.jsonl"))
        with self.assertRaisesRegex(ValueError, "validatoin.jsonl"):
            self.run_in("run", data=data)
        self.assertFalse((self.directory / "run" / "config.json").exists())
        self.run_in("run", steps=2)

    @pytest.mark.full
    def test_claim_that_was_cut_off_is_no_run(self):
        self.run_in("run", steps=2)
        for file in (self.directory / "run").iterdir():
            if file.name not in ("trees", "tokenizer", "model.json", "inputs.json", "lock"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        self.assertEqual(self.run_in("run", steps=4).step, 4)

    def test_data_that_changes_while_it_is_read_is_not_stored(self):
        file = self.directory / "train.jsonl"
        whole, build = file.read_text(), disk_cache.load_or_build

        def cut_first(*args, **kwargs):
            file.write_text(whole.splitlines()[0] + "\n")  # after it was hashed, before it is read
            return build(*args, **kwargs)

        console = rich.console.Console(file=self.output)
        with (
            mock.patch.object(disk_cache, "load_or_build", cut_first),
            self.assertRaisesRegex(ValueError, "train.jsonl changed while it was read. Start again"),
        ):
            run_inputs.read_inputs(self.config, self.directory / "run", console)
        file.write_text(whole)
        self.assertLen(run_inputs.read_inputs(self.config, self.directory / "run", console).train, 24)

    def test_missing_weights_claim_nothing(self):
        broken = self.directory / "broken"
        shutil.copytree(self.directory / "model", broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with self.assertRaisesRegex(ValueError, "model.safetensors"):
            self.run_in("run", model=str(broken))
        self.assertFalse((self.directory / "run" / "config.json").exists())

    @pytest.mark.full
    def test_mixture_goes_on_as_if_never_stopped_and_each_set_is_watched(self):
        (self.directory / "other.jsonl").write_text((self.directory / "validation.jsonl").read_text())
        mix = {
            "first": {"train": str(self.directory / "train.jsonl"), "epochs": 1},
            "other": {"train": str(self.directory / "other.jsonl"), "epochs": 2.5},
        }
        data = dataclasses.replace(self.config.data, train="", mix=mix)
        self.run_in("whole", data=data, steps=4)
        self.assertRegex(self.output.getvalue(), r"other: \d+ rows per epoch, 2.50 passes over 4 trees, \d+.\d% of the")
        self.assertRegex(
            self.output.getvalue(), r"busiest of 4 shards 1.\d+ times the mean .*, 1.\d+ times in their order"
        )
        with self.stopping_in("_wait_for_figures", signal.SIGTERM), self.assertRaises(StoppedError):
            self.run_in("parts", data=data, steps=4)
        self.run_in("parts", data=data, steps=4)
        jax.tree.map(np.testing.assert_array_equal, self.parameters_of("parts", 4), self.parameters_of("whole", 4))
        for line in metrics.read_records(self.directory / "whole" / "metrics.jsonl"):
            self.assertGreaterEqual(line["imbalance"], 1.0)
            self.assertLess(line["imbalance"], 4.0)
        with (self.directory / "other.jsonl").open("a") as file:
            file.write((self.directory / "train.jsonl").read_text().splitlines()[0] + "\n")
        with self.assertRaisesRegex(ValueError, r"another config or data \(data.mix.other: [0-9a-f]{64} before"):
            self.run_in("whole", data=data, steps=4)

    @pytest.mark.full
    def test_data_that_changed_since_the_run_began_is_refused(self):
        self.run_in("run", steps=2)
        file = self.directory / "train.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:20]))
        with self.assertRaisesRegex(
            ValueError, r"another config or data \(data.train: [0-9a-f]{64} before, [0-9a-f]{64} now\)"
        ):
            self.run_in("run", steps=2)

    @pytest.mark.full
    def test_other_model_of_the_same_name_is_refused(self):
        self.run_in("run", steps=2)
        model = tiny.config(520)
        other = self.directory / "elsewhere" / "model"
        tokenizer = chat_templates.train_tokenizer("chatml")
        saving.save_pretrained(other, model, tiny.parameters(model), tokenizer=tokenizer)
        with self.assertRaisesRegex(ValueError, r"another config or data \(model: [0-9a-f]+ before, [0-9a-f]+ now\)"):
            self.run_in("run", steps=2, model=str(other))

    @pytest.mark.full
    def test_held_out_nan_stops_before_it_can_be_the_best_checkpoint(self):
        figures = metrics.Evaluation.figures
        calls = 0

        def poisoned(evaluation):
            nonlocal calls
            calls += 1  # before training, after step 2, after step 4
            return figures(evaluation) | ({"loss": math.nan} if calls == 3 else {})

        with (
            mock.patch.object(metrics.Evaluation, "figures", poisoned),
            self.assertRaisesRegex(UserError, "step 4: held-out loss nan"),
        ):
            self.run_in("run")
        self.assertEqual(self.steps_of("run"), [2])

    def poisoned_at(self, *steps):
        """Makes the loss of these steps NaN."""
        original = step_lib.make_train_step

        def poisoned(*args, **kwargs):
            run = original(*args, **kwargs)

            def step(state, batch):
                if int(state.step) + 1 in steps:
                    batch = batch._replace(weight=batch.weight * np.nan)
                return run(state, batch)

            return step

        return mock.patch.object(step_lib, "make_train_step", poisoned)

    def test_step_that_is_not_finite_is_skipped_and_told(self):
        with self.poisoned_at(3, 6):
            self.run_in("run", evaluate_every=1, checkpoint_every=1, keep_checkpoints=6)
        self.assertRegex(self.output.getvalue(), r"step 3: loss nan, gradient norm nan: no update. .*train-\d+")
        lines = metrics.read_records(self.directory / "run" / "metrics.jsonl")
        self.assertEqual([line["skipped"] for line in lines], [0, 0, 1, 1, 1, 2])
        self.assertEqual([line["loss"] is None for line in lines], [False, False, True, False, False, True])
        # The schedule counts updates.
        self.assertEqual(lines[2]["learning_rate"], lines[3]["learning_rate"])
        held_out = [line["loss"] for line in metrics.read_records(self.directory / "run" / "evaluation.jsonl")]
        self.assertEqual((held_out[3], held_out[6]), (held_out[2], held_out[5]))
        self.assertNotEqual(held_out[4], held_out[3])
        jax.tree.map(np.testing.assert_array_equal, self.parameters_of("run", 2), self.parameters_of("run", 3))

    @pytest.mark.full
    def test_too_many_bad_steps_in_a_row_stop_with_dialogues_and_keep_the_last_checkpoint(self):
        with (
            self.poisoned_at(1, 4, 5, 6),
            self.assertRaisesRegex(UserError, r"step 5: loss nan.*train-\d+.*max_bad_steps = 2 in a row"),
        ):
            self.run_in("run", max_bad_steps=2)
        self.assertEqual(self.steps_of("run"), [2, 4])
        # The count goes on where it was: step 4 was bad, and so is 5 again.
        with self.poisoned_at(5), self.assertRaisesRegex(UserError, "step 5: loss nan"):
            self.run_in("run", max_bad_steps=2)
        for leaf in jax.tree.leaves(self.parameters_of("run", 4)):
            self.assertTrue(np.isfinite(leaf).all())

    def test_tokenizer_larger_than_the_vocabulary_is_refused(self):
        model = tiny.config(100)
        tokenizer = chat_templates.train_tokenizer("chatml")
        saving.save_pretrained(self.directory / "small", model, tiny.parameters(model), tokenizer=tokenizer)
        with self.assertRaisesRegex(ValueError, r"token ids up to 511 .*embedding has 100 rows"):
            self.run_in("run", model=str(self.directory / "small"))

    def test_rows_that_do_not_divide_over_devices_are_refused(self):
        with self.assertRaisesRegex(ValueError, "rows is 3; it must be a multiple of dcn_data \\* data \\* fsdp = 4"):
            self.run_in("run", rows=3)
        self.assertFalse((self.directory / "run").exists())

    def test_row_longer_than_the_context_is_refused(self):
        data = dataclasses.replace(self.config.data, max_length=4096)
        with self.assertRaisesRegex(ValueError, "max_length is 4,096, but the model's context is 2,048"):
            self.run_in("run", data=data)


if __name__ == "__main__":
    absltest.main()
