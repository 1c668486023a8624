"""Any damage to a checkpoint is noticed, and which checkpoints stay."""

import pathlib
import shutil
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.training import checkpoints, distributed
from dialog_jax.training.checkpoints import DamagedError
from dialog_jax.training.train_step import make_state
from tests.training import tiny


class PathTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.create_tempdir().full_path)
        self.state = make_state({"a": jnp.arange(6.0).reshape(2, 3)}, optax.adam(1e-3))._replace(step=jnp.int32(3))

    def save(self, name):
        with checkpoints.open_manager(self.directory / name) as manager:
            checkpoints.save(manager, self.state, keep=1, losses={})
            checkpoints.finish_save(manager, keep=1, losses={})

    @parameterized.parameters(
        "lr[1e-5]", "[a]", "a[", "a]", "*", "a?", "a\\b", "**", "gs:", "s3:", "a\udcff", "a[1]/run"
    )
    def test_path_that_orbax_does_not_take_literally_is_refused_with_the_character(self, name):
        with self.assertRaisesRegex(UserError, r"Choose a path without \[ \] \* \? .* or rename"):
            checkpoints.check_path(self.directory / name)

    @parameterized.parameters(
        "a b", " a ", "100%", "%41", "a%20b", "ünï🙂", "~x", "~", "a#b", "a{b,c}", "a:b", "a'b\"", "$HOME", "a|b&c;d",
        "@a", "a=b,c+d", "..a", "-a", "!a^", "a\nb", "1", "a/", "a.orbax-checkpoint-tmp-1",
    )  # fmt: skip
    @pytest.mark.quick_every(4)
    def test_path_that_is_accepted_gives_the_same_state_back_there_and_elsewhere(self, name):
        checkpoints.check_path(self.directory / name)
        self.save(name)
        checkpoints.check_saved(self.directory / name, self.state)
        shutil.copytree(self.directory / name, self.directory / "elsewhere")
        for place in (self.directory / name, self.directory / "elsewhere"):
            jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(place, 3, self.state), self.state)

    def test_saved_state_is_compared_array_by_array(self):
        self.save("run")
        nu = self.state.optimizer_state[0].nu
        for other in (
            self.state._replace(trained={"a": self.state.trained["a"].T}),
            self.state._replace(trained=self.state.trained | {"b": jnp.zeros(2)}),
            self.state._replace(optimizer_state=(self.state.optimizer_state[0]._replace(nu=nu | {"b": jnp.zeros(2)}),)),
        ):
            with self.assertRaisesRegex(
                UserError, "the first checkpoint, just written, cannot be read: .*Choose another"
            ):
                checkpoints.check_saved(self.directory / "run", other)

    def test_arrays_are_read_in_groups_of_the_largest_size(self):
        mebibytes = [10, 60, 100, 30, 80]
        groups = checkpoints._group_by_size([size << 20 for size in mebibytes])
        self.assertEqual(groups, [[0, 1], [2], [3], [4]])
        self.assertEqual(checkpoints._group_by_size([1, 2, 3]), [[0, 1, 2]])
        self.assertEqual(checkpoints._group_by_size([]), [])

    def test_saved_state_with_a_changed_byte_is_refused(self):
        state = make_state(tiny.parameters(tiny.config(64)), optax.adam(1e-3))
        with checkpoints.open_manager(self.directory / "run") as manager:
            checkpoints.save(manager, state, keep=1, losses={})
        checkpoints.check_saved(self.directory / "run", state)
        largest = max((self.directory / "run").rglob("*"), key=lambda file: file.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 4
        largest.write_bytes(data)
        with self.assertRaisesRegex(UserError, "cannot be read: checkpoint 0 is not what was written"):
            checkpoints.check_saved(self.directory / "run", state)


class DamageTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.create_tempdir().full_path) / "checkpoints"
        self.state = make_state(tiny.parameters(tiny.config(64)), optax.adam(1e-3))._replace(
            step=jnp.int32(5), skipped=jnp.int32(2), skipped_in_a_row=jnp.int32(1)
        )
        with checkpoints.open_manager(self.directory) as manager:
            checkpoints.save(manager, self.state, keep=1, losses={})

    def restored(self):
        return checkpoints.restore(self.directory, 5, self.state)

    def test_reading_warns_of_nothing(self):
        with self.assertNoLogs("absl", "WARNING"):
            self.restored()

    def test_state_comes_back_with_its_counts(self):
        jax.tree.map(np.testing.assert_array_equal, self.restored(), self.state)

    @parameterized.parameters("missing", "cut", "changed")
    @pytest.mark.quick_every(3)
    def test_damage_to_any_file_is_noticed_or_harmless(self, how):
        """Orbax keeps copies and notes that reading does not need; what matters is that no wrong array comes back."""
        rng = np.random.default_rng(0)
        whole = self.directory.with_name("whole")
        shutil.copytree(self.directory, whole)
        noticed = 0
        for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
            shutil.rmtree(self.directory)
            shutil.copytree(whole, self.directory)
            data = bytearray((whole / file).read_bytes())
            if how == "missing":
                (self.directory / file).unlink()
            elif how == "cut":
                (self.directory / file).write_bytes(data[: len(data) // 2])
            else:
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
                (self.directory / file).write_bytes(data)
            with self.subTest(file=file):
                try:
                    jax.tree.map(np.testing.assert_array_equal, self.restored(), self.state)
                except DamagedError:
                    noticed += 1
        self.assertGreaterEqual(noticed, 5)

    def test_errors_of_the_machine_and_bugs_are_not_damage(self):
        for error in (MemoryError, PermissionError, TypeError, IndexError):
            with (
                mock.patch.object(checkpoints.ocp.CheckpointManager, "restore", side_effect=error),
                self.assertRaises(error),
            ):
                self.restored()

    def test_process_that_fails_to_read_a_whole_checkpoint_does_not_damage_it(self):
        failed = ValueError("process 1: [Errno 5] Input/output error")
        with (
            mock.patch.object(distributed, "run_on_all_hosts", side_effect=failed),
            self.assertRaises(ValueError) as caught,
        ):
            self.restored()
        self.assertIs(caught.exception, failed)

    def test_damage_that_one_process_finds_is_damage_for_all(self):
        gathered = ["", "checkpoint 5 cannot be read: a file is missing"]
        with (
            mock.patch.object(distributed, "all_gather_strings", return_value=gathered),
            self.assertRaisesRegex(DamagedError, "a file is missing"),
        ):
            self.restored()

    def test_checkpoint_of_other_arrays_is_reported_by_the_first_that_differs(self):
        like = self.state._replace(trained=self.state.trained | {"adapter": jnp.ones(2)})
        with self.assertRaisesRegex(DamagedError, r"checkpoint 5 holds other arrays .*trained\['adapter'\] is in"):
            checkpoints.restore(self.directory, 5, like)

    def test_steps_are_those_of_complete_checkpoints(self):
        (self.directory / "7.orbax-checkpoint-tmp-3").mkdir()
        self.assertEqual(checkpoints.list_steps(self.directory), [5])
        self.assertEqual(checkpoints.list_steps(self.directory / "missing"), [])


class KeptTest(absltest.TestCase):
    def test_newest_and_best_stay(self):
        directory = pathlib.Path(self.create_tempdir().full_path)
        state = make_state({"a": jnp.ones(3)}, optax.sgd(1.0))
        losses, kept = {0: 0.1}, []
        with checkpoints.open_manager(directory) as manager:
            for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, None), (5, 6.0), (6, 2.0), (7, 9.0), (8, 9.0)):
                if loss is not None:
                    losses[step] = loss
                checkpoints.save(manager, state._replace(step=jnp.int32(step)), keep=2, losses=losses)
                checkpoints.finish_save(manager, keep=2, losses=losses)
                kept.append(sorted(int(path.name) for path in directory.iterdir()))
        self.assertEqual(kept, [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8]])

    def test_older_one_stays_until_somebody_knows_that_the_newer_one_is_whole(self):
        directory = pathlib.Path(self.create_tempdir().full_path)
        state = make_state({"a": jnp.ones(3)}, optax.sgd(1.0))
        with checkpoints.open_manager(directory) as manager:
            for step in (1, 2):
                checkpoints.save(manager, state._replace(step=jnp.int32(step)), keep=1, losses={})
            while manager.is_saving_in_progress():
                time.sleep(0.01)
            self.assertEqual(sorted(path.name for path in directory.iterdir()), ["1", "2"])
            checkpoints.finish_save(manager, keep=1, losses={})
            self.assertEqual([path.name for path in directory.iterdir()], ["2"])

    def test_best_is_the_first_of_the_lowest(self):
        self.assertEqual(checkpoints.find_best_step({0: 1.0, 2: 3.0, 4: 3.0, 6: 5.0}, [6, 4, 2, 8]), 2)
        self.assertIsNone(checkpoints.find_best_step({0: 1.0}, [6]))


if __name__ == "__main__":
    absltest.main()
