"""Collectives and products of programs, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dialog_jax.planning import hlo

_TEXT = """HloModule made_by_hand, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %both = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], /*index=1*/bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %all-reduce = bf16[8,4]{1,0} all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%sum, metadata={op_name="in"}
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%i, %all-reduce)
}

%until (p: (s32[], bf16[8,4])) -> pred[] {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%asked (p: (s32[], bf16[8,4])) -> pred[] {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%p#0, %p#0), direction=LT
}

%middle (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %within = f32[4,4]{1,0} dot(%p#1, %p#1), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  ROOT %w = (s32[], bf16[8,4]{1,0}) while(%p), condition=%until, body=%inner
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %s = (s32[], bf16[8,4]{1,0}) while(%x), condition=%asked, body=%middle
  %k = (s32[], bf16[8,4]) while(%x), condition=%asked, body=%inner, backend_config={"known_trip_count":{"n":"7"}}
  %g = f32[32,4]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %r = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  %at = s32[] constant(0)
  %own = f32[4,4]{1,0} dynamic-slice(%r, %at, %at), dynamic_slice_sizes={4,4}
  %q = f32[2,4]{1,0} reduce-scatter(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}, to_apply=%sum
  %o = (f32[4,4]{1,0}, f32[4,4]{1,0}) all-to-all(%own, %own), replica_groups={}
  %c = f32[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,4},{4,0}}
  ROOT %d = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="product"}
}
"""


class TextTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.program = hlo.parse(_TEXT)
        self.runs = hlo.count_runs(self.program, unknown=lambda name: 3.0)

    def test_loops_in_loops_multiply(self):
        self.assertEqual(self.runs["middle"], 3)
        self.assertEqual(self.runs["inner"], 3 * 5 + 7)

    def test_every_way_to_write_groups_is_read(self):
        found = hlo.find_collectives(self.program, self.runs, 8)
        self.assertCountEqual(
            [collective[:4] for collective in found],
            [
                ("all-reduce", 64, (0, 2, 4, 6), 22),
                ("all-gather", 512, (0, 1, 2, 3), 1),
                ("reduce-scatter", 128, (0, 1), 1),  # an all-reduce of which a half is used
                ("reduce-scatter", 128, (0, 4, 1, 5), 1),
                ("all-to-all", 128, tuple(range(8)), 1),
                ("collective-permute", 128, (4, 0), 1),
            ],
        )

    def test_products_are_counted_as_often_as_they_run(self):
        flops, size = hlo.sum_products(self.program, self.runs)
        self.assertEqual(flops, 2 * 8 * 8 * 4 + 3 * 2 * 4 * 4 * 8)
        self.assertEqual(size, 4 * (32 + 32 + 64) + 3 * (2 * (32 + 32) + 4 * 16))

    def test_text_without_program_is_refused(self):
        with self.assertRaisesRegex(ValueError, "no program"):
            hlo.parse("HloModule nothing")

    def test_groups_of_an_unknown_form_are_refused(self):
        text = _TEXT.replace("replica_groups=[2,4]<=[4,2]T(1,0)", "replica_groups=everyone")
        program = hlo.parse(text)
        with self.assertRaisesRegex(ValueError, "all-reduce cannot be read from"):
            hlo.find_collectives(program, self.runs, 8)


class CompiledTest(absltest.TestCase):
    def test_scan_of_five_reductions_is_five(self):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

        def reduce_five_times(x, matrices):
            def body(x, matrix):
                return jax.lax.psum(x @ matrix, "x"), None

            return jax.lax.scan(body, x, matrices)[0]

        mapped = jax.shard_map(
            reduce_five_times, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec()), out_specs=PartitionSpec()
        )
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 16), (5, 16, 16))]
        program = hlo.parse(jax.jit(mapped).lower(*shapes).compile().as_text())
        counts = hlo.count_runs(program, unknown=lambda name: 0.0)
        found = hlo.find_collectives(program, counts, 8)
        self.assertEqual(sum(collective.runs for collective in found), 5)
        self.assertEqual({collective.bytes for collective in found}, {4 * 16 * 4})
        self.assertEqual({len(collective.group) for collective in found}, {8})

    def test_matrix_in_parts_is_gathered_once_a_layer(self):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
        place = NamedSharding(mesh, PartitionSpec(None, "x"))
        rows = NamedSharding(mesh, PartitionSpec("x"))

        def layers(x, matrices):
            return jax.lax.scan(lambda x, matrix: (jnp.sin(x @ matrix), None), x, matrices)[0]

        x = jax.ShapeDtypeStruct((512, 16), np.float32, sharding=rows)
        matrices = jax.ShapeDtypeStruct((3, 16, 16), np.float32, sharding=place)
        text = jax.jit(layers, out_shardings=rows).lower(x, matrices).compile().as_text()
        program = hlo.parse(text)
        found = hlo.find_collectives(program, hlo.count_runs(program, unknown=lambda name: 0.0), 8)
        gathered = sum(one.runs * one.bytes for one in found if one.kind == "all-gather")
        self.assertEqual(gathered, 3 * 16 * 16 * 4)


if __name__ == "__main__":
    absltest.main()
