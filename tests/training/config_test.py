"""The two forms of a config, and what they refuse."""

import dataclasses

import ml_collections
from absl.testing import absltest, parameterized

from dialog_jax.attention import dispatch
from dialog_jax.errors import UserError
from dialog_jax.model import decoder
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.training import config
from dialog_jax.training.config import DataConfig, LossConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from dialog_jax.trees.objectives import ObjectiveConfig


def example(**changes):
    return TrainConfig(**{"model": "m", "data": DataConfig(train="t.jsonl", validation="v.jsonl"), **changes})


class ConfigTest(parameterized.TestCase):
    def test_config_dict_and_back_is_the_same(self):
        original = TrainConfig(
            model="m",
            data=DataConfig(train="t", validation="v", chat_template_kwargs={"enable_thinking": False}),
            optimizer=OptimizerConfig(learning_rate=1e-5, schedule="linear"),
        )
        self.assertEqual(config.from_config_dict(config.to_config_dict(original)), original)

    def test_remat_names_those_of_the_decoder(self):
        self.assertEqual(config.REMAT, tuple(decoder.REMAT))

    def test_attention_names_the_kernels(self):
        kernels = [candidate.name for candidate in dispatch._CANDIDATES]
        self.assertEqual(config.ATTENTION, ("auto", "blockwise", *kernels))

    def test_parts_of_a_mixture_can_be_overridden(self):
        mix = {"a": {"train": "a", "weight": 1}, "b": {"train": "b", "weight": 0.5}}
        overridden = config.to_config_dict(TrainConfig(model="m", data=DataConfig(mix=mix, validation="v")))
        self.assertEqual(config.from_config_dict(overridden).data.mix, mix)
        overridden.data.mix.b.weight = 2.0
        self.assertEqual(config.from_config_dict(overridden).data.mix, mix | {"b": {"train": "b", "weight": 2.0}})

    def test_override_reaches_the_dataclass(self):
        overridden = config.to_config_dict(example())
        overridden.optimizer.learning_rate = 0.5
        overridden.objective.roles = ("user",)
        overridden.loss.z_loss = 1e-4
        built = config.from_config_dict(overridden)
        self.assertEqual((built.optimizer.learning_rate, built.objective.roles), (0.5, ("user",)))
        self.assertEqual(built.loss, LossConfig(z_loss=1e-4))

    def test_trackers_are_known_and_named_once(self):
        overridden = config.to_config_dict(TrainConfig())
        overridden.trackers = ("tensorboard,wandb,trackio",)  # as a flag gives it
        self.assertEqual(config.from_config_dict(overridden).trackers, config.TRACKERS)
        self.assertEqual(TrainConfig(trackers=()).trackers, ())
        for names in (("wandb", "mlflow"), ("wandb", "wandb")):
            with self.assertRaisesRegex(UserError, "at most once"):
                TrainConfig(trackers=names)

    def test_names_can_be_separated_by_commas(self):
        overridden = config.to_config_dict(TrainConfig())
        overridden.lora.rank = 4
        overridden.lora.targets = ("q_proj,v_proj",)  # as a flag gives it
        self.assertEqual(config.from_config_dict(overridden).lora.targets, ("q_proj", "v_proj"))

    def test_bad_extra_of_the_loss_is_refused(self):
        overridden = config.to_config_dict(example())
        overridden.loss.label_smoothing = 1.0
        with self.assertRaisesRegex(ValueError, "loss.label_smoothing is 1.0; it must be at least 0 and below 1"):
            config.from_config_dict(overridden)

    def test_numbers_become_the_type_of_their_field(self):
        original = example()
        object.__setattr__(original, "epochs", 3)  # as an experiment may write it
        overridden = config.to_config_dict(original)
        self.assertIsInstance(overridden.epochs, float)  # so that a flag can set 2.5
        overridden.objective.turn_weights = (1, 2)
        self.assertEqual(
            [type(weight) for weight in config.from_config_dict(overridden).objective.turn_weights], [float] * 2
        )

    @parameterized.parameters(
        ("rows", 1.5, "config.rows is 1.5; it must be of type int"),
        ("rows", True, "config.rows is True; it must be of type int"),
        ("objective.roles", ("user", 1), "config.objective.roles is 1; it must be of type str"),
        ("optimizer.learning_rate", "1e-5", "config.optimizer.learning_rate is '1e-5'; it must be of type float"),
    )
    def test_value_of_another_type_is_refused(self, field, value, message):
        overridden = config.to_config_dict(example()).unlock()
        values = overridden.to_dict()
        place = values
        *parents, name = field.split(".")
        for parent in parents:
            place = place[parent]
        place[name] = value
        with self.assertRaisesRegex(UserError, message):
            config.from_config_dict(ml_collections.ConfigDict(values))

    def test_unknown_field_is_refused_with_those_there_are(self):
        overridden = config.to_config_dict(example())
        with overridden.unlocked():
            overridden.optimizer.lr = 1.0
        with self.assertRaisesRegex(
            ValueError, r"config.optimizer has no field lr; it has name, learning_rate, schedule"
        ):
            config.from_config_dict(overridden)

    @parameterized.parameters(
        ({"rows": 0}, "rows is 0"),
        ({"checkpoint_every": 30}, "multiple of evaluate_every = 50"),
        ({"steps": 0, "epochs": 0.0}, "one of them must be above 0"),
        ({"loss": LossConfig(distillation=0.5)}, "data.teacher is '' and loss.distillation is 0.5; set both"),
        ({"data": DataConfig(train="t", validation="v", teacher="s")}, "data.teacher is 's' and .* 0.0; set both"),
        (
            {"data": DataConfig(train="t", validation="v", weights="w"), "objective": ObjectiveConfig(name="joint")},
            "data.weights chooses responses, and objective.name='joint' also trains on other tokens",
        ),
        ({"compute_dtype": "float16"}, "must be auto, float32 or bfloat16"),
        ({"lora": LoraConfig(targets=("q_proj",))}, "lora.targets is .*no effect without lora.rank"),
        ({"lora": LoraConfig(alpha=16.0), "adapter": "a"}, "lora.alpha is 16.0, .*on an adapter that is continued"),
        (
            {"soft_prompt": SoftPromptConfig(tokens=1023)},
            "as long as the row leaves no room for a prompt and a response",
        ),
        (
            {"soft_prompt": SoftPromptConfig(tokens=8), "freeze": ("embedding",)},
            "freeze or train_only is set with soft_prompt.tokens, which freezes the model's own parameters",
        ),
        ({"attention": "portable"}, "attention is 'portable'; it must be one of auto, blockwise, pallas, splash"),
    )
    def test_bad_value_is_refused(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            example(**changes)

    @parameterized.parameters(
        ({"mix": {"a": {"train": "a"}}}, "data.mix has neither weight nor epochs"),
        (
            {"train": "t", "mix": {"a": {"train": "a", "weight": 1}}},
            "data.mix names a beside data.train 't', data.teacher '' and data.weights ''; leave data.train empty",
        ),
        (
            {"weights": "w", "mix": {"a": {"train": "a", "weight": 1}}},
            "data.weights 'w'; leave data.train empty, and a teacher and weights to a single set",
        ),
        ({"workers": -2}, "data.workers is -2; it must be at least 0, or -1"),
        ({"template_time": "July"}, "data.template_time is 'July'; it must be a date or time"),
        ({"validation_share": 1.0}, "data.validation_share is 1.0; it must be above 0 and below 1"),
        ({"responses": "raw"}, "data.responses is 'raw'; it must be one of rendered, verbatim"),
        ({"roles": {"Bot": "robot"}}, "data.roles maps 'Bot' to 'robot'; needed one of"),
    )
    def test_bad_value_of_the_data_is_refused(self, fields, message):
        with self.assertRaisesRegex(UserError, message):
            DataConfig(**fields)

    @parameterized.parameters(
        ({"tokens": -1}, "soft_prompt.tokens is -1; it must be at least 1, or 0 for no soft prompt"),
        ({"text": "Hi", "init": "text"}, "soft_prompt.text 'Hi', which have no effect without soft_prompt.tokens"),
        ({"tokens": 8, "init": "zeros"}, "soft_prompt.init is 'zeros'; it must be one of vocabulary, text, random"),
        ({"tokens": 8, "init": "text"}, "soft_prompt.text is ''; text is read with init = text, which needs it"),
        ({"tokens": 8, "text": "Hi"}, "soft_prompt.init is 'vocabulary' and soft_prompt.text is 'Hi'"),
    )
    def test_bad_soft_prompt_is_refused(self, fields, message):
        with self.assertRaisesRegex(UserError, message):
            SoftPromptConfig(**fields)

    def test_learning_rate_is_that_of_what_is_trained(self):
        prompt, lora = SoftPromptConfig(tokens=8), LoraConfig(rank=4)
        rates = [
            example(**fields).resolve().optimizer.learning_rate
            for fields in ({}, {"soft_prompt": prompt}, {"lora": lora}, {"lora": lora, "soft_prompt": prompt})
        ]
        self.assertEqual(rates, [2e-5, 3e-2, 3e-4, 3e-4])

    def test_defaults_are_a_config_and_what_is_missing_is_named_when_it_is_needed(self):
        defaults = TrainConfig()
        config.require_fields(dataclasses.replace(defaults, model="m"), "chat", "model")
        with self.assertRaisesRegex(UserError, "model is empty; train needs it: --config.model=..."):
            config.require_fields(defaults, "train", "model", "data.train")
        with self.assertRaisesRegex(UserError, "data.train is empty; audit needs it: --config.data.train=..."):
            config.require_fields(dataclasses.replace(defaults, model="m"), "audit", "model", "data.train")


if __name__ == "__main__":
    absltest.main()
