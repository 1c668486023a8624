"""How errors of one process reach the others, seen from each of two processes with a key-value store in memory."""

import itertools
import json
from unittest import mock

import jax
import orbax.checkpoint as ocp
from absl.testing import absltest

from dialog_jax.errors import UserError
from dialog_jax.training import distributed


class Store(dict):
    """The part of JAX's distributed client that is used. A key that no process sets is an error, not a wait."""

    def key_value_set(self, key, value):
        self[key] = value

    def blocking_key_value_get(self, key, timeout):
        del timeout
        return self[key]


class TwoProcessesTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.store = Store()
        self.enter_context(mock.patch.object(jax, "process_count", lambda: 2))
        self.enter_context(mock.patch.object(ocp.multihost, "get_jax_distributed_client", lambda: self.store))

    def run_on(self, process, function, outcomes_of_the_other):
        """Runs `function` on a process, while the other process has these outcomes in its exchanges."""
        for exchange, outcome in enumerate(outcomes_of_the_other):
            self.store[f"dialog_jax/{exchange}/{1 - process}"] = json.dumps(outcome)
        with (
            mock.patch.object(jax, "process_index", lambda: process),
            mock.patch.object(distributed, "_exchanges", itertools.count()),
        ):
            return distributed.run_on_all_hosts(function)

    def outcome_of(self, process):
        return json.loads(self.store[f"dialog_jax/0/{process}"])

    def test_result_is_that_of_this_process(self):
        self.assertEqual(self.run_on(1, lambda: "mine", [{}]), "mine")

    def test_user_error_is_raised_on_both(self):
        def fail():
            raise UserError("no such file")

        with self.assertRaisesRegex(UserError, "^process 1: no such file$"):
            self.run_on(1, fail, [{}])
        with self.assertRaisesRegex(UserError, "^process 1: no such file$"):
            self.run_on(0, lambda: None, [self.outcome_of(1)])

    def test_error_of_the_system_is_a_user_error_on_both(self):
        def fail():
            raise OSError("disk full")

        with self.assertRaisesRegex(UserError, "^process 0: disk full$"):
            self.run_on(0, fail, [{}])

    def test_bug_keeps_its_traceback_and_is_no_user_error_elsewhere(self):
        bug = ValueError("could not broadcast")

        def fail():
            raise bug

        with self.assertRaises(ValueError) as caught:
            self.run_on(0, fail, [])  # does not wait for the other
        self.assertIs(caught.exception, bug)
        with self.assertRaisesRegex(RuntimeError, "process 0 raised ValueError; see the traceback"):
            self.run_on(1, lambda: None, [self.outcome_of(0)])

    def test_bug_of_one_process_outranks_a_user_error_of_another(self):
        def fail():
            raise UserError("no such file")

        with self.assertRaises(RuntimeError):
            self.run_on(0, fail, [{"bug": "process 1 raised KeyError"}])

    def test_facts_that_differ_are_named(self):
        self.store["dialog_jax/0/0"] = json.dumps({"seed": 0, "rows": 8})
        with (
            mock.patch.object(jax, "process_index", lambda: 1),
            mock.patch.object(distributed, "_exchanges", itertools.count()),
            self.assertRaisesRegex(UserError, "process 1 has another config of seed than process 0"),
        ):
            distributed.check_same("config", {"seed": 1, "rows": 8})


class OneProcessTest(absltest.TestCase):
    def test_error_is_raised_as_it_is(self):
        error = OSError("disk full")

        def fail():
            raise error

        with self.assertRaises(OSError) as caught:
            distributed.run_on_all_hosts(fail)
        self.assertIs(caught.exception, error)


if __name__ == "__main__":
    absltest.main()
