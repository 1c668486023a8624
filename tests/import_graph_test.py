"""The walls of the rooms, read from the source: every module is known here, and imports only what stands before it."""

import ast
import functools
import graphlib
import importlib.util
import pathlib

from absl.testing import absltest

_PACKAGE = pathlib.Path(importlib.util.find_spec("dialog_jax").submodule_search_locations[0])
# The modules of each room, in the order of the flow. A module imports only modules and rooms that stand before it.
# fmt: off
_ROOMS = {
    "": ("errors", "atomic_files"),
    "formats": ("gguf_file", "gguf_tokenizer", "mxfp4", "tokenizer_files", "tokenizer_settings"),
    "dialogues": (
        "dialogue", "json_files", "sources", "json_values", "weights", "tool_calls", "schemas", "parsing", "holdout",
        "weight_file",
    ),
    "rendering": (
        "rendered_text", "reasoning", "written", "call_arguments", "template_rendering", "template_process",
        "tokenizers", "special_tokens", "refused_fields", "chat_template", "encoder", "responses", "token_spans",
        "virtual_tokens", "rendered_sequence", "sequences",
    ),
    "trees": (
        "prefix_tree", "division", "objectives", "histories", "fitting", "weighting", "teacher_file", "teacher",
        "refusals", "dialogue_trees", "chunks", "dataset", "worker_pool", "disk_cache",
    ),
    "batching": ("packing", "mixture", "row_stream", "load_balance", "batches"),
    "audit": (
        "inspection", "row_lengths", "unread", "finding_kinds", "findings", "tally", "figures", "sentences",
        "token_messages",
    ),
    "attention": (
        "mask", "cached", "blockwise", "pallas_gpu_kernels", "pallas_gpu", "splash", "probing", "dispatch",
    ),
    "model": (
        "lora_config", "soft_prompt_config", "rotary", "decoder_config", "quantization", "matrices", "parameter_trees",
        "grouped_products", "experts", "layers", "layer_runs", "decoder", "decoding", "family", "mixture_families",
        "gemma_families", "families", "tensor_names", "adapters", "soft_prompts", "tensor_files", "rope_parameters",
        "hf_config", "gguf_config", "model_files", "pretrained", "saving", "peft_modules", "peft_files", "peft_lora",
        "peft_reading",
    ),
    "inference": ("loading", "generation", "chat"),
    "training": (
        "config_fields", "data_config", "optimizer_config", "config", "data_sources", "config_renderer", "optimizer",
        "sharding", "expert_sharding", "trainable", "loss", "train_step", "score_steps", "distributed", "signals",
        "checksums", "checkpoints", "metrics", "sessions", "run_inputs", "run_directory", "initial_state",
        "model_card", "trained_models", "export", "compilation_cache", "console", "trackers", "loop", "run",
    ),
    "evaluation": (
        "tree_scores", "contexts", "scored_trees", "scoring", "token_scores", "escaping", "response_text", "k_passes",
        "k_pass_losses", "k_pass_scores", "differences", "agreement", "selection",
    ),
    "planning": ("hlo", "model_shapes", "simulated_devices", "compiling", "workload", "estimating"),
    "drafting": (
        "config_text",
        "survey",
        "memory",
        "values",
        "axolotl_values",
        "axolotl_adapters",
        "axolotl_reasons",
        "axolotl_fields",
        "axolotl_data",
        "axolotl",
    ),
    "diagnosis": (
        "run_figures", "finding", "statistics", "update_findings", "loss_findings", "findings", "measurements",
    ),
    "report": ("tree_html", "dialogue_views", "token_columns", "charts", "data_charts", "run_facts", "page"),
    "commands": (
        "config_flag", "help_text", "entry", "config_inputs", "train", "audit", "show", "check", "score", "select",
        "compare", "export", "chat", "plot", "report", "diagnose", "plan", "init",
    ),
}
# fmt: on
_WITHOUT_JAX = ("errors", "atomic_files", "formats", "dialogues", "rendering", "trees", "batching", "audit")
# In rooms that import JAX.
_CONFIGS = ("model.lora_config", "model.soft_prompt_config", "training.optimizer_config")
_JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
_OF_OUR_ROOMS = {"attention": ("errors", "formats"), "model": ("errors", "atomic_files", "formats", "attention")}


def _imports(file):
    """The modules that a file imports, anywhere in it; for `from a import b` both a and a.b."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@functools.cache
def _graph():
    """What each module of the package imports, by its name without `dialog_jax.`; ours likewise, others in full."""
    return {
        ".".join(file.relative_to(_PACKAGE).with_suffix("").parts): {
            name.removeprefix("dialog_jax.") for name in _imports(file)
        }
        for file in sorted(_PACKAGE.rglob("*.py"))
        if file.name not in ("__init__.py", "__main__.py")
    }


def _is_within(module, place):
    return module == place or module.startswith(f"{place}.")


class ImportGraphTest(absltest.TestCase):
    def modules_in(self, *rooms):
        modules = {name: names for name, names in _graph().items() if any(_is_within(name, room) for room in rooms)}
        self.assertNotEmpty(modules)
        return modules.items()

    def test_every_module_is_known(self):
        known = [f"{room}.{name}".lstrip(".") for room, names in _ROOMS.items() for name in names]
        self.assertLen(set(known), len(known))
        self.assertCountEqual(_graph(), known)

    def test_modules_import_only_what_stands_before_them(self):
        order = [f"{room}.{name}".lstrip(".") for room, names in _ROOMS.items() for name in names]
        seen = 0
        for place, module in enumerate(order):
            imported = _graph()[module].intersection(order)
            seen += len(imported)
            self.assertEmpty(imported.intersection(order[place:]), f"{module} imports what stands after it")
        self.assertGreater(seen, 50)

    def test_rooms_up_to_audit_import_no_jax(self):
        for module, names in self.modules_in(*_WITHOUT_JAX):
            self.assertEmpty([name for name in names for package in _JAX if _is_within(name, package)], module)

    def test_config_and_the_data_it_names_import_no_jax(self):
        for module in (
            "training.config_fields",
            "training.data_config",
            "training.optimizer_config",
            "training.config",
            "training.data_sources",
            "training.config_renderer",
            *_CONFIGS,
        ):
            names = _graph()[module]
            self.assertEmpty([name for name in names for package in _JAX if _is_within(name, package)])
            ours = names.intersection(_graph()) - {
                "training.config",
                "training.data_config",
                "training.optimizer_config",
                "training.config_fields",
                *_CONFIGS,
            }
            self.assertEmpty([name for name in ours if not any(_is_within(name, room) for room in _WITHOUT_JAX)])

    def test_attention_and_model_import_no_room_of_the_data(self):
        for room, allowed in _OF_OUR_ROOMS.items():
            for module, names in self.modules_in(room):
                ours = [name for name in names if name in _graph() and not _is_within(name, room)]
                wrong = [name for name in ours if not any(_is_within(name, other) for other in allowed)]
                self.assertEmpty(wrong, module)

    def test_only_commands_import_the_run_and_one_another(self):
        for module, names in _graph().items():
            if not _is_within(module, "commands"):
                self.assertNotIn("training.run", names, module)
                self.assertEmpty([name for name in names if _is_within(name, "commands")], module)

    def test_there_is_no_torch(self):
        for module, names in _graph().items():
            self.assertEmpty([name for name in names if _is_within(name, "torch")], module)

    def test_there_are_no_cycles(self):
        graph = _graph()
        graphlib.TopologicalSorter(
            {name: names.intersection(graph) - {name} for name, names in graph.items()}
        ).prepare()

    def test_init_files_are_empty(self):
        for file in _PACKAGE.rglob("__init__.py"):
            self.assertEqual(file.read_text(encoding="utf-8").strip(), "", str(file))


if __name__ == "__main__":
    absltest.main()
