"""Plans against what is really allocated, and against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.attention import blockwise
from dialog_jax.model import quantization
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.planning import compiling, workload
from dialog_jax.training import metrics, optimizer, sharding, train_step
from dialog_jax.training.config import DataConfig, MeshConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from tests.training import tiny

_MODEL = tiny.config(512, width=64, layers=3, heads=8, kv_heads=4, tie_embeddings=False)


def run_config(*, length=128, **fields):
    data = DataConfig(train="absent.jsonl", validation="absent.jsonl", max_length=length)
    return TrainConfig(
        model="absent", data=data, **{"rows": 8, "gradient_accumulation": 1, "steps": 10, "remat": "none", **fields}
    )


def compiled(mesh, config, *, devices=8, dtype=jnp.float32, tokens=128, targets=128, pairs=128 * 129 // 2):
    mesh = sharding.make_mesh(mesh, jax.devices()[:devices])
    return compiling.compile_step(
        config, _MODEL, mesh, compute_dtype=dtype, tokens=tokens, targets=targets, attention_pairs=pairs
    )


def count(model):
    """Numbers in the matrices of a layer."""
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return model.width * (2 * query + 2 * key + 3 * model.feed_forward)


class MemoryTest(parameterized.TestCase):
    @pytest.mark.full
    def test_bytes_are_those_of_a_real_state(self):
        config, sizes = run_config(), MeshConfig(data=1, fsdp=4, tensor=2)
        memory = compiled(sizes, config).memory
        mesh = sharding.make_mesh(sizes)
        parameters = jax.tree_util.tree_map_with_path(
            lambda keys, leaf: jax.device_put(
                leaf, sharding.parameter_sharding(mesh, [key.key for key in keys], leaf.shape)
            ),
            tiny.parameters(_MODEL),
        )
        state = train_step.initialize_state(mesh, parameters, optimizer.make_optimizer(config.optimizer, 10))

        def held(arrays):
            shards = [shard for leaf in jax.tree.leaves(arrays) for shard in leaf.addressable_shards]
            return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[3])

        self.assertEqual(memory.parameters, held(state.parameters))
        self.assertEqual(memory.gradients, held(state.parameters))
        self.assertEqual(memory.moments, held(state.optimizer_state))
        rows = np.zeros((1, 8, 128), np.int32)
        batch = jax.device_put([rows] * 8, sharding.batch_sharding(mesh))
        self.assertEqual(memory.batch, held(batch))
        self.assertGreater(memory.temporaries, memory.gradients)
        self.assertEqual(memory.compiled, memory.parameters + memory.moments + memory.batch + memory.temporaries)

    @parameterized.parameters((True, 1), (True, 2), (False, 1))
    @pytest.mark.full
    def test_sum_of_micro_batches_is_held_beside_the_gradient_of_one(self, tied, divided):
        wide = dict(width=256, layers=4, head_dim=32, feed_forward=1024, tie_embeddings=tied)
        model = dataclasses.replace(_MODEL, vocab_size=1024, **wide)
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=divided), jax.devices()[:divided])
        # Plain descent needs nothing beside the gradient, so that the peak is where gradients are added up.
        self.enter_context(absltest.mock.patch.object(optimizer, "make_optimizer", lambda *_: optax.sgd(0.1)))

        def memory(micro_batches):
            config = run_config(length=16, rows=divided, gradient_accumulation=micro_batches, remat="full")
            return compiling.compile_step(
                config, model, mesh, compute_dtype=jnp.float32, tokens=16, targets=16, attention_pairs=136
            ).memory

        once, twice, often = map(memory, (1, 2, 5))
        self.assertEqual(once.gradients, once.parameters)
        layers = 4 * count(model) * 4 // divided
        needed = twice.parameters + (twice.parameters if tied else layers)
        self.assertAlmostEqual(twice.gradients / needed, 1, delta=0.001)  # of a layer's norms too
        self.assertEqual(often.gradients, twice.gradients)
        more = twice.temporaries - once.temporaries
        self.assertAlmostEqual(more / (twice.gradients - once.gradients), 1, delta=0.1)

    @pytest.mark.full
    def test_full_recomputation_keeps_the_input_of_each_layer(self):
        full = compiled(MeshConfig(), run_config(remat="full"), dtype=jnp.bfloat16)
        self.assertEqual(full.memory.activations, 3 * 128 * 64 * 2)  # layers, tokens of the one row, width, bytes
        alone = compiled(MeshConfig(), run_config(remat="full"), dtype=jnp.bfloat16, devices=1)
        self.assertEqual(alone.memory.activations, 8 * full.memory.activations)
        self.assertEmpty(alone.collectives)

    @pytest.mark.full
    def test_quantized_matrices_are_codes_and_nothing_more_is_kept_for_the_backward_pass(self):
        lora = LoraConfig(rank=2)
        quantized, plain = (
            compiled(MeshConfig(), run_config(lora=lora, frozen_dtype=dtype), dtype=jnp.bfloat16, devices=1).memory
            for dtype in ("nf4", "bfloat16")
        )
        self.assertEqual(quantized.activations, plain.activations)
        self.assertEqual(quantized.trained, plain.trained)
        self.assertEqual(quantized.gradients, quantized.trained)
        codes = sum(
            leaf.size * leaf.dtype.itemsize
            for sizes in ((64, 64), (64, 32), (64, 32), (64, 64), (64, 48), (64, 48), (48, 64))
            for leaf in jax.tree.leaves(quantization.abstract_quantized("nf4", (3, *sizes)))
        )
        self.assertEqual(plain.frozen - quantized.frozen, 3 * count(_MODEL) * 2 - codes)

    @pytest.mark.full
    def test_largest_temporary_is_named(self):
        largest = compiled(MeshConfig(), run_config(length=512)).largest
        self.assertGreaterEqual(largest.bytes, 8 * 256 * 256 * 4)  # scores of 8 heads, 256 queries and 256 keys
        self.assertRegex(largest.shape, r"^\w+\[[\d,]+\]$")
        self.assertIn("/", largest.operation_name)


class FlopsTest(parameterized.TestCase):
    def test_flops_of_assumed_full_rows_equal_those_of_a_full_batch(self):
        config = run_config(gradient_accumulation=2)
        work = workload.assume_workload(config, _MODEL, tokens=1.0, targets=1.0)
        planned = metrics.count_flops(
            _MODEL, tokens=work.tokens, attention_pairs=work.attention_pairs, targets=work.targets
        )
        self.assertEqual(
            planned,
            metrics.count_flops(
                _MODEL, tokens=2 * 8 * 128, attention_pairs=2 * 8 * sum(range(1, 129)), targets=2 * 8 * 128
            ),
        )

    @parameterized.parameters((8, MeshConfig(), "none"), (1, MeshConfig(), "full"))
    @pytest.mark.full
    def test_executed_flops_are_counted_product_by_product(self, devices, mesh, remat):
        step_plan = compiled(mesh, run_config(remat=remat, gradient_accumulation=2), devices=devices)
        tokens, layers = 2 * 8 * 128, 3
        again = remat == "full"
        # Of a layer's matrices: forward, and twice backward. The last product of a layer is not needed again.
        matrices = 3 * count(_MODEL) + (count(_MODEL) - 64 * _MODEL.feed_forward if again else 0)
        # Of attention, over whole blocks of 256 and so over masked pairs: scores and read, scores again, four backward.
        attention = 8 * _MODEL.head_dim * 128 * (2 + 1 + 4 + (2 if again else 0))
        vocabulary = 3 * 512 * 64
        expected = 2 * tokens * (layers * (matrices + attention) + vocabulary)
        self.assertAlmostEqual(step_plan.products.flops * devices / expected, 1, delta=0.03)

    @pytest.mark.full
    def test_half_as_many_tiles_of_targets_are_half_the_work(self):
        some, all_ = (compiled(MeshConfig(), run_config(length=512), targets=targets) for targets in (256, 512))
        tile = 3 * 2 * 256 * 512 * 64
        self.assertEqual(all_.products.flops - some.products.flops, tile)

    @pytest.mark.full
    def test_attention_of_short_dialogues_is_less_work_than_that_of_one_long_one(self):
        config = run_config(length=1024)
        long, short = (compiled(MeshConfig(), config, pairs=1024 * size // 2) for size in (1024, 256))
        # One dialogue of four blocks meets itself in 10 pairs; those of one block each in 6 at most. Seven products.
        pair = 7 * 2 * 256 * 256 * 8 * _MODEL.head_dim
        self.assertAlmostEqual((long.products.flops - short.products.flops) / (3 * 4 * pair), 1, delta=0.6)


class CollectivesTest(absltest.TestCase):
    @pytest.mark.full
    def test_data_parallel_gradients_are_reduced_once_a_micro_batch(self):
        step_plan = compiled(MeshConfig(data=8), run_config(gradient_accumulation=2))
        reduced = sum(one.runs * one.bytes for one in step_plan.collectives if one.kind == "all-reduce")
        self.assertAlmostEqual(reduced / (2 * step_plan.memory.parameters), 1, delta=0.01)
        self.assertEqual({len(one.group) for one in step_plan.collectives}, {8})

    @pytest.mark.full
    def test_divided_parameters_are_gathered_for_forward_and_backward_pass_and_rows_stay_where_they_are(self):
        step_plan = compiled(MeshConfig(data=1, fsdp=8), run_config(remat="full"))

        def moved(kind):
            return sum(one.runs * one.bytes for one in step_plan.collectives if one.kind == kind)

        layers, head, tokens = 3 * count(_MODEL) * 4, 512 * 64 * 4, 8 * 128 * 4
        self.assertEqual(moved("all-gather"), 2 * layers + head + tokens)
        self.assertEqual(moved("reduce-scatter"), layers + head)
        self.assertLess(moved("all-reduce"), 2000)  # norms and sums


class ErrorsTest(absltest.TestCase):
    def test_rows_that_do_not_divide_are_refused(self):
        with self.assertRaisesRegex(ValueError, r"rows is 6, but rows are divided as .*fsdp"):
            compiled(MeshConfig(), run_config(rows=6))

    def test_rows_longer_than_the_context_are_refused(self):
        with self.assertRaisesRegex(ValueError, "data.max_length is 4,096, but the model's context is 2,048"):
            compiled(MeshConfig(), run_config(length=4096))

    def test_warm_up_longer_than_the_run_is_refused(self):
        with self.assertRaisesRegex(ValueError, "warmup_steps is 20"):
            compiled(MeshConfig(), run_config(optimizer=OptimizerConfig(warmup_steps=20)))

    def test_loop_of_unknown_length_is_named(self):
        def attend(q, k, v, mask):
            with jax.named_scope("until_sure"):
                added = jax.lax.fori_loop(0, jnp.max(mask.subtree_end), lambda _, x: jnp.sin(x), q)
            return q + jax.lax.stop_gradient(added)

        self.enter_context(absltest.mock.patch.object(blockwise, "attend", attend))
        with self.assertRaisesRegex(
            ValueError, "loop 'jit.*/until_sure/while' depends .* for block_pairs and tiles only"
        ):
            compiled(MeshConfig(), run_config(), devices=1)


if __name__ == "__main__":
    absltest.main()
