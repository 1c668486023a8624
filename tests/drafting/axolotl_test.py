"""Axolotl's fields: what is carried over, and that nothing else is left out in silence."""

import pathlib

import yaml
from absl.testing import absltest, parameterized

from dialog_jax.drafting import axolotl, config_text
from dialog_jax.errors import UserError

# With fields of Axolotl's examples of LoRA.
_LORA = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: chat.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles: {assistant: [gpt, Bot], user: [human]}
    drop_system_message: true
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
wandb_project: mine
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_torch
adam_beta2: 0.95
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
gradient_checkpointing: true
warmup_steps: 10
eval_steps: 20
save_steps: 40
save_total_limit: 3
evals_per_epoch: 4
weight_decay: 0.1
max_grad_norm: 0.5
seed: 7
frobnicate: 3
"""
_LEFT = (
    "datasets[0].drop_system_message",
    "output_dir",
    "sample_packing",
    "wandb_project",
    "evals_per_epoch",
    "frobnicate",
)


class AxolotlTest(parameterized.TestCase):
    def convert(self, text):
        file = pathlib.Path(self.create_tempdir().full_path) / "axolotl.yml"
        file.write_text(text)
        return axolotl.convert(file)

    def convert_fields(self, **fields):
        return self.convert(yaml.safe_dump({"base_model": "m", **fields}))

    def test_fields_with_a_counterpart_have_their_values(self):
        values = config_text.build_config(self.convert(_LORA).entries)
        self.assertEqual((values.model, values.data.train), ("NousResearch/Llama-3.2-1B", "chat.jsonl"))
        self.assertEqual(dict(values.data.roles), {"Bot": "assistant"})
        self.assertEqual((values.data.validation_share, values.data.max_length), (0.1, 2048))
        lora = values.lora
        self.assertEqual((lora.rank, lora.alpha, lora.dropout, lora.targets), (32, 16, 0.05, ("q_proj", "v_proj")))
        self.assertEqual((values.frozen_dtype, values.remat, values.seed), ("nf4", "full", 7))
        self.assertEqual((values.rows, values.gradient_accumulation, values.epochs), (2, 4, 3))
        self.assertEqual((values.evaluate_every, values.checkpoint_every, values.keep_checkpoints), (20, 40, 3))
        optimizer = values.optimizer
        self.assertEqual((optimizer.learning_rate, optimizer.schedule, optimizer.final_fraction), (2e-4, "cosine", 0))
        self.assertEqual((optimizer.warmup_steps, optimizer.b2, optimizer.weight_decay), (10, 0.95, 0.1))
        self.assertEqual(optimizer.clip_norm, 0.5)

    def test_every_field_with_a_value_is_carried_over_or_listed_with_a_reason(self):
        conversion = self.convert(_LORA)
        self.assertCountEqual(conversion.left, _LEFT)
        self.assertTrue(all(conversion.left.values()))
        self.assertEqual(conversion.left["frobnicate"], "unknown to init")
        fields = yaml.safe_load(_LORA)
        names = [name for name, value in fields.items() if value is not None and name != "datasets"]
        names += [f"datasets[0].{name}" for name in fields["datasets"][0]]
        self.assertCountEqual([*conversion.carried, *conversion.left], names)

    @parameterized.parameters(
        ({"use_wandb": True}, ("tensorboard", "wandb")),
        ({"use_trackio": True, "use_wandb": True}, ("tensorboard", "wandb", "trackio")),
        ({"use_trackio": True, "use_wandb": False}, ("tensorboard", "trackio")),
        ({"use_tensorboard": False}, ("tensorboard",)),
    )
    def test_trackers_are_those_in_use(self, fields, expected):
        conversion = self.convert_fields(**fields)
        self.assertEqual(config_text.build_config(conversion.entries).trackers, expected)
        self.assertEmpty(conversion.left)

    @parameterized.parameters(
        ("train_on_inputs", True, 'objective.name="joint"'),
        ("lr_scheduler", "polynomial", "there is no such schedule"),
        ("optimizer", "adamw_bnb_8bit", "are not supported: AdamW with float32 moments"),
        ("optimizer", "lion", "there is no such optimizer"),
        ("val_set_size", 0, "5 % are held out"),
        ("val_set_size", 500, "a number of records"),
        ("sequence_len", "long", "'long' is no number"),
        ("micro_batch_size", 0, "rows is 0"),
        ("lora_r", 8, "no effect without adapter"),
        ("load_in_4bit", True, "without adapter"),
        ("adapter", "llama-adapter", "lora and qlora are"),
        ("chat_template", "llama3", "the tokenizer's own template is used"),
        ("eval_steps", 0.1, "no whole number"),
        ("eval_steps", 0, "evaluate_every is 0"),
        ("warmup_ratio", 0.1, "a share of the updates"),
        ("fp16", True, "float16 is not supported"),
        ("wandb_run_id", "x", "set trackers"),
        ("use_mlflow", True, "trackers are tensorboard, wandb and trackio"),
        ("liger_rope", True, "does not apply"),
    )
    def test_value_without_a_counterpart_is_listed(self, name, value, reason):
        conversion = self.convert_fields(**{name: value})
        self.assertEqual(conversion.carried, ["base_model"])
        self.assertIn(reason, conversion.left[name])

    @parameterized.parameters(
        ("type", "alpaca", "records of 'alpaca' are not read"),
        ("field_messages", "chat", "rename 'chat'"),
        ("message_property_mappings", {"role": "speaker"}, "rename role: speaker"),
        ("split", "train[:20%]", "a part of a split"),
        ("name", "subset", "docs/data.md"),
        ("roles", {"narrator": ["x"]}, "'narrator' is no role here"),
        ("roles_to_train", "all", "'all' are no roles"),
    )
    def test_data_that_is_read_otherwise_is_listed(self, name, value, reason):
        conversion = self.convert_fields(datasets=[{"path": "a/b", name: value}])
        self.assertIn(reason, conversion.left[f"datasets[0].{name}"])
        self.assertEqual(config_text.build_config(conversion.entries).data.train, "a/b")

    def test_several_sets_are_a_mixture_and_test_data_is_held_out(self):
        sets = [{"path": "a.jsonl", "type": "chat_template"}, {"path": "b.jsonl", "roles_to_train": ["user"]}]
        conversion = self.convert_fields(datasets=sets, test_datasets=[{"path": "c.jsonl", "split": "test"}])
        data = config_text.build_config(conversion.entries).data
        self.assertEqual([entry["train"] for entry in data.mix.values()], ["a.jsonl", "b.jsonl"])
        self.assertEqual((data.validation, data.validation_split), ("c.jsonl", "test"))
        self.assertEqual(conversion.left, {"datasets[1].roles_to_train": "one for all data here"})

    def test_several_roles_to_train_are_the_objective_roles(self):
        conversion = self.convert_fields(datasets=[{"path": "a.jsonl", "roles_to_train": ["gpt", "human"]}])
        objective = config_text.build_config(conversion.entries).objective
        self.assertEqual((objective.name, objective.roles), ("roles", ("assistant", "user")))

    def test_checkpoints_alone_are_preceded_by_evaluations(self):
        values = config_text.build_config(self.convert_fields(save_steps=30).entries)
        self.assertEqual((values.evaluate_every, values.checkpoint_every), (30, 30))

    @parameterized.parameters((30, 20), (30, 0), (30, -10))
    def test_checkpoints_between_evaluations_are_listed(self, saves, evaluations):
        conversion = self.convert_fields(save_steps=saves, eval_steps=evaluations)
        self.assertIn("no multiple of eval_steps", conversion.left["save_steps"])
        values = config_text.build_config(conversion.entries)
        self.assertEqual(values.evaluate_every, values.checkpoint_every)

    @parameterized.parameters(
        ("a: [", "not YAML"),
        ("- a", "its content is list; needed a mapping"),
        ("frobnicate: 1", r"none of its fields \(frobnicate\) can be carried over"),
    )
    def test_file_that_is_not_of_axolotl_is_an_error(self, text, message):
        with self.assertRaisesRegex(UserError, message):
            self.convert(text)


if __name__ == "__main__":
    absltest.main()
