"""The rooms of the package keep their walls: who imports whom, read from the source."""

import ast
import graphlib
import importlib.util
import pathlib

from absl.testing import absltest

_ROOT = pathlib.Path(importlib.util.find_spec("dialog_jax").submodule_search_locations[0]).parent
# Along the flow: what stands later may import what stands earlier. Modules that are not named are free but for cycles.
# fmt: off
_FLOW = {
    "data": (
        "sources", "records", "dialogues", "bounded", "sandbox", "tokenizers", "special_text", "templates", "encoding",
        "locating", "rendering", "tries", "objectives", "truncation", "supervision", "teacher", "building", "dataset",
        "workers", "storage", "packing", "mixing", "streams", "dealing", "batches",
    ),
    "audit": ("inspection", "row_lengths", "findings", "figures"),
    "attention": ("cached", "padding", "portable", "pallas_gpu", "splash", "choosing"),
    "model": ("rotary", "decoder", "pretrained", "adapters"),
    "training": (
        "chips", "loss", "optimizer", "sharding", "sharded_loss", "step", "hosts", "interruption", "checkpoints",
        "metrics", "inputs", "run_directory", "compilation_cache", "progress", "steps", "loop",
    ),
    "planning": ("hlo", "compiling", "workload", "estimating"),
}
# fmt: on


def module_of(file):
    parts = file.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file):
    """The modules that a file imports, at its top or inside a function; for `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module, room):
    return module == room or module.startswith(room + ".")


class ImportGraphTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        files = sorted((_ROOT / "dialog_jax").rglob("*.py"))
        self.graph = {module_of(file): imports(file) for file in files}
        self.inside = {
            module: {name for name in names if name in self.graph and name != module}
            for module, names in self.graph.items()
        }

    def assert_none(self, room, *forbidden):
        modules = [module for module in self.graph if within(module, room)]
        self.assertNotEmpty(modules)
        for module in modules:
            wrong = [name for name in self.graph[module] for wall in forbidden if within(name, wall)]
            self.assertEmpty(wrong, f"{module} imports {wrong}")

    def test_the_graph_is_not_empty(self):
        self.assertIn("dialog_jax.data.rendering", self.graph["dialog_jax.data.dataset"])
        self.assertIn("jax", self.graph["dialog_jax.model.decoder"])

    def test_data_imports_no_jax_and_no_other_room(self):
        self.assert_none(
            "dialog_jax.data", "jax", "jaxlib", "flax", "optax", "orbax", "dialog_jax.model", "dialog_jax.training"
        )

    def test_audit_imports_no_jax_and_of_other_rooms_data_only(self):
        self.assert_none(
            "dialog_jax.audit", "jax", "jaxlib", "flax", "optax", "orbax", "dialog_jax.model", "dialog_jax.training"
        )
        self.assert_none("dialog_jax.data", "dialog_jax.audit")

    def test_model_imports_no_other_room(self):
        self.assert_none("dialog_jax.model", "dialog_jax.data", "dialog_jax.training")

    def test_formats_imports_no_jax_and_no_other_room(self):
        self.assert_none(
            "dialog_jax.formats",
            "jax",
            "dialog_jax.data",
            "dialog_jax.audit",
            "dialog_jax.model",
            "dialog_jax.training",
        )

    def test_no_room_imports_planning(self):
        for room in ("data", "audit", "model", "training", "formats"):
            self.assert_none(f"dialog_jax.{room}", "dialog_jax.planning")

    def test_rooms_import_nothing_of_the_top(self):
        top = [module_of(file) for file in (_ROOT / "dialog_jax").glob("*.py") if file.stem != "__init__"]
        self.assertIn("dialog_jax.generation", top)
        for room in ("data", "model"):
            self.assert_none(f"dialog_jax.{room}", *top)

    def test_only_scripts_experiments_and_tests_import_the_loop(self):
        for module, names in self.graph.items():
            self.assertNotIn("dialog_jax.training.loop", names, module)

    def test_there_is_no_torch(self):
        self.assert_none("dialog_jax", "torch")

    def test_there_are_no_cycles(self):
        graphlib.TopologicalSorter(self.inside).prepare()

    def test_modules_of_a_room_import_in_the_order_of_the_flow(self):
        for room, order in _FLOW.items():
            modules = [f"dialog_jax.{room}.{name}" for name in order if f"dialog_jax.{room}.{name}" in self.graph]
            self.assertGreater(len(modules), 2)
            for place, module in enumerate(modules):
                later = self.inside[module].intersection(modules[place:])
                self.assertEmpty(later, f"{module} imports what comes after it")

    def test_init_files_are_empty(self):
        for file in (_ROOT / "dialog_jax").rglob("__init__.py"):
            self.assertEqual(file.read_text(encoding="utf-8").strip(), "", str(file))


if __name__ == "__main__":
    absltest.main()
