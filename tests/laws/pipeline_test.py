"""What readers let through, training renders or refuses by name: mutated records all the way to batches."""

import hypothesis
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from dialog_jax.batching import batches
from dialog_jax.dialogues import parsing
from dialog_jax.errors import UserError
from tests.laws import budget, oracles
from tests.laws.readers_test import mutants
from tests.laws.targets_test import prepare


class PipelineTest(parameterized.TestCase):
    @parameterized.parameters("chatml", "llama3", "qwen3", "mistral", "gemma", "plain")
    @budget.cases(60)
    @hypothesis.given(data=st.data())
    def test_a_mutated_record_is_trained_on_or_refused_by_name(self, family, data):
        try:
            (dialogue,) = parsing.parse_records([data.draw(mutants())])
        except UserError:
            return  # what readers refuse is the affair of their own test
        options = data.draw(
            st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["conditional", "joint", "last", "roles"]),
                    "roles": st.sampled_from([("assistant",), ("user", "tool"), ("system", "assistant")]),
                    "normalize": st.sampled_from(["token", "turn", "dialogue"]),
                    "merge_weights": st.sampled_from(["max", "sum"]),
                    "max_length": st.sampled_from([8, 40, 100_000]),
                    "truncate": st.sampled_from(["turns", "drop", "split", "error"]),
                    "share_prefixes": st.booleans(),
                }
            )
        )
        try:
            trees = prepare([dialogue], family, **options)
        except UserError as error:
            self.assertIn(dialogue.name, str(error))
            return
        if trees is not None:
            length = int(trees.sizes()[0].max())
            batch = batches.Plan(trees, max_length=length, rows=1, micro_batches=1, seed=0).batch(0)
            self.assertNotEmpty(oracles.row_targets(batch))


if __name__ == "__main__":
    absltest.main()
