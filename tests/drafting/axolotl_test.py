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
    "weight_decay",
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
        self.assertEqual((optimizer.warmup_steps, optimizer.b2, optimizer.weight_decay), (10, 0.95, 0.0))
        self.assertEqual(optimizer.clip_norm, 0.5)

    def test_every_field_with_a_value_is_carried_over_or_listed_with_a_reason(self):
        conversion = self.convert(_LORA)
        self.assertCountEqual(conversion.left, _LEFT)
        self.assertTrue(all(conversion.left.values()))
        self.assertEqual(conversion.left["frobnicate"], "not recognized")
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
        self.assertContainsSubset(fields, conversion.carried)

    @parameterized.parameters(
        ("train_on_inputs", True, "objective.roles=('system', 'user', 'assistant', 'tool')"),
        ("lr_scheduler", "polynomial", "schedule not supported"),
        ("optimizer", "adamw_bnb_8bit", "8-bit and paged optimizers are not supported"),
        ("optimizer", "lion", "optimizer not supported"),
        ("val_set_size", 0, "5 % are held out"),
        ("val_set_size", 500, "a number of records"),
        ("sequence_len", "long", "'long' is not a number"),
        ("micro_batch_size", 0, "rows is 0"),
        ("lora_r", 8, "no effect without adapter"),
        ("load_in_4bit", True, "without adapter"),
        ("adapter", "llama-adapter", "lora and qlora are"),
        ("chat_template", "llama3", "the tokenizer's own template is used"),
        ("eval_steps", 0.1, "is not an integer"),
        ("eval_steps", 0, "evaluate_every is 0"),
        ("warmup_ratio", 0.1, "a share of the updates"),
        ("fp16", True, "float16 is not supported"),
        ("wandb_run_id", "x", "set trackers"),
        ("use_mlflow", True, "trackers are tensorboard, wandb and trackio"),
        ("liger_rope", True, "does not apply"),
        ("excess_length_strategy", "truncate", "not cut off"),
        ("sample_packing", True, "does not apply"),
        ("sample_packing", False, "dialogues were not packed there"),
        ("shuffle_merged_datasets", False, "always shuffled"),
        ("frobnicate", False, "not recognized"),
        ("plugins", ["axolotl.integrations.liger.LigerPlugin"], "does not apply"),
        ("plugins", ["a.LigerPlugin", "a.SpectrumPlugin"], "not supported: a.SpectrumPlugin"),
        ("resume_from_checkpoint", "out/checkpoint-1", "not supported"),
        ("eot_tokens", ["<|im_end|>"], "does not apply"),
        ("batch_size", 7.5, "is not an integer"),
        ("lora_rank_pattern", {"q_proj": 4}, "no effect without adapter"),
        ("datasets", "a.jsonl", "needed a list of data sets, each with a path"),
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
        ("name", "subset", "a configuration or revision"),
        ("revision", "main", "a configuration or revision"),
        ("message_field_training", "learn", "rename it to train"),
        ("data_files", "x.json", "single files of a data set"),
        ("ds_type", "text", "'text' are not read"),
        ("roles", {"narrator": ["x"]}, "'narrator' is no role here"),
        ("roles_to_train", "all", "'all' is not a list of roles"),
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
        self.assertEqual(conversion.left["datasets[1].roles_to_train"], "one for all data here")
        self.assertNotIn("val_set_size (default)", conversion.left)

    def test_set_with_what_is_done_anyway_is_carried_over(self):
        one = {"path": "a.jsonl", "ds_type": "json", "roles_to_train": ["assistant"], "train_on_eos": "turn"}
        conversion = self.convert_fields(datasets=[one, {"path": "b.jsonl", "message_field_training": "training"}])
        self.assertEmpty([name for name in conversion.left if name.startswith("datasets")])

    @parameterized.parameters(
        ({"path": "json", "data_files": "a.json"}, "a.json"),
        ({"path": "parquet", "data_files": ["a.parquet"], "ds_type": "parquet"}, "a.parquet"),
        ({"path": "json", "data_files": ["a.json", "b.json"]}, ""),
        ({"path": "csv", "data_files": "a.csv"}, ""),
    )
    def test_file_of_a_kind_of_files_is_the_data(self, one, expected):
        conversion = self.convert_fields(datasets=[one])
        self.assertEqual(config_text.build_config(conversion.entries).data.train, expected)
        self.assertEqual("datasets[0].path" in conversion.left, not expected)

    def test_name_with_two_roles_is_listed(self):
        sets = [{"path": "a.jsonl", "roles": {"user": ["Ann"]}}, {"path": "b.jsonl", "roles": {"assistant": ["Ann"]}}]
        conversion = self.convert_fields(datasets=sets)
        self.assertEqual(dict(config_text.build_config(conversion.entries).data.roles), {"Ann": "user"})
        self.assertIn("'Ann' is assistant in this data set and user", conversion.left["datasets[1].roles"])

    def test_absent_fields_have_the_defaults_of_axolotl(self):
        conversion = self.convert_fields(adapter="lora")
        values = config_text.build_config(conversion.entries)
        self.assertEqual((values.data.max_length, values.data.truncate), (512, "drop"))
        self.assertEqual((values.rows, values.gradient_accumulation, values.keep_checkpoints), (1, 1, 4))
        self.assertEqual((values.optimizer.b2, values.optimizer.final_fraction), (0.999, 0))
        self.assertEqual((values.lora.rank, values.lora.alpha), (8, 8))
        comments = {entry.field: entry.comment for entry in conversion.entries}
        self.assertEqual(comments["data.max_length"], "Axolotl's default.")
        left = ["val_set_size", "sample_packing", "lora_target_linear"]
        self.assertCountEqual(conversion.left, [f"{name} (default)" for name in left])
        self.assertIn("5 % are held out here", conversion.left["val_set_size (default)"])

    @parameterized.parameters(
        ({"batch_size": 8, "micro_batch_size": 2}, 4, ()),
        ({"batch_size": 8}, 8, ()),
        ({"batch_size": 7, "micro_batch_size": 2}, 8, ("batch_size",)),
        ({"batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 3}, 3, ("batch_size",)),
    )
    def test_batch_size_determines_accumulation(self, fields, accumulation, left):
        conversion = self.convert_fields(**fields)
        self.assertEqual(config_text.build_config(conversion.entries).gradient_accumulation, accumulation)
        self.assertEqual(tuple(name for name in conversion.left if name in fields), left)

    @parameterized.parameters(
        ("weight_decay", 0.1, "adapters do not decay"),
        ("lora_target_modules", ".*q_proj", "a regular expression; list names"),
        ("lora_target_linear", False, "all linear layers are adapted; set lora.targets"),
    )
    def test_adapter_field_that_means_something_else_is_listed(self, name, value, reason):
        self.assertIn(reason, self.convert_fields(adapter="qlora", **{name: value}).left[name])

    def test_adapter_fields_have_their_values(self):
        fields = {"lora_target_modules": "all-linear", "lora_rank_pattern": {"q_proj": 4}, "weight_decay": 0}
        conversion = self.convert_fields(adapter="lora", lora_target_linear=False, **fields)
        lora = config_text.build_config(conversion.entries).lora
        self.assertEqual((lora.targets, dict(lora.rank_pattern)), (("all-linear",), {"q_proj": 4}))
        self.assertContainsSubset([*fields, "lora_target_linear"], conversion.carried)

    @parameterized.parameters(("drop", "drop"), ("raise", "error"))
    def test_excess_length(self, strategy, truncate):
        conversion = self.convert_fields(excess_length_strategy=strategy)
        self.assertEqual(config_text.build_config(conversion.entries).data.truncate, truncate)

    @parameterized.parameters(
        ("tf32", False),
        ("plugins", []),
        ("resume_from_checkpoint", False),
        ("fsdp", []),
        ("special_tokens", {}),
        ("tensor_parallel_size", 1),
        ("neftune_noise_alpha", 0),
    )
    def test_what_is_off_is_not_lost(self, name, value):
        self.assertNotIn(name, self.convert_fields(**{name: value}).left)

    @parameterized.parameters(
        ({"rl": "dpo"}, "rl: dpo"),
        ({"reward_model": True}, "reward_model: True"),
        ({"process_reward_model": True}, "process_reward_model"),
        ({"pretraining_dataset": [{"path": "a"}]}, "pretraining_dataset without datasets"),
    )
    def test_other_training_is_an_error(self, fields, message):
        with self.assertRaisesRegex(UserError, message):
            self.convert_fields(**fields)

    def test_several_roles_to_train_are_the_objective_roles(self):
        conversion = self.convert_fields(datasets=[{"path": "a.jsonl", "roles_to_train": ["gpt", "human"]}])
        objective = config_text.build_config(conversion.entries).objective
        self.assertEqual((objective.name, objective.roles), ("roles", ("assistant", "user")))

    def test_checkpoints_alone_are_preceded_by_evaluations(self):
        values = config_text.build_config(self.convert_fields(save_steps=30).entries)
        self.assertEqual((values.evaluate_every, values.checkpoint_every), (30, 30))

    def test_error_of_eval_steps_is_not_that_of_save_steps(self):
        conversion = self.convert_fields(eval_steps=0.05, save_steps=500)
        self.assertIn("is not an integer", conversion.left["eval_steps"])
        self.assertNotIn("save_steps", conversion.left)

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
